package child

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// tree makes a directory that looks like control groups as far as reading goes.
func tree(t *testing.T, own string, controllers map[string]string) string {
	t.Helper()
	mount := t.TempDir()
	for group, text := range controllers {
		dir := filepath.Join(mount, group)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	self := filepath.Join(t.TempDir(), "cgroup")
	if err := os.WriteFile(self, []byte("4:memory:/else\n0::"+own+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	oldMount, oldSelf := cgroupMount, cgroupSelf
	cgroupMount, cgroupSelf = mount, self
	t.Cleanup(func() { cgroupMount, cgroupSelf = oldMount, oldSelf })
	return mount
}

// Where a group cannot be limited none is used, and none is left.
func TestNoGroup(t *testing.T) {
	limits := Limits{MemoryBytes: 1 << 20}
	for name, own := range map[string]string{
		"memory is not controlled": "/user/one", "escape": "/../../etc", "no such group": "/gone/two",
		"kernel refuses the limit": "/delegated/three",
	} {
		t.Run(name, func(t *testing.T) {
			mount := tree(t, own, map[string]string{
				"user": "cpu pids\n", "user/one": "", "delegated": "cpu memory pids\n", "delegated/three": "",
			})
			if g := newCgroup(limits); g != nil {
				t.Errorf("got %s", g.path)
			}
			if left, _ := filepath.Glob(filepath.Join(mount, "*", cgroupPrefix+"*")); len(left) > 0 {
				t.Errorf("left %v", left)
			}
		})
	}
	if newCgroup(Limits{}) != nil {
		t.Error("a group without a limit")
	}
}

func TestRanOut(t *testing.T) {
	dir := t.TempDir()
	g := &cgroup{dir}
	for text, want := range map[string]bool{
		"": false, "low 0\noom 3\noom_kill 0\n": false, "oom 1\noom_kill 1\noom_group_kill 0\n": true,
	} {
		if err := os.WriteFile(filepath.Join(dir, "memory.events"), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := g.ranOut(); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// realGroups returns a directory in which control groups can be made, or skips.
func realGroups(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(cgroupSelf)
	if err != nil {
		t.Skip(err)
	}
	_, own, _ := strings.Cut(string(text), "0::")
	own, _, _ = strings.Cut(own, "\n")
	for _, mount := range []string{cgroupMount, filepath.Join(cgroupMount, "unified")} {
		// The group of an ordinary user is beside his own, if he may make one.
		for _, parent := range []string{mount, filepath.Join(mount, filepath.Dir(own))} {
			if _, err := os.Stat(filepath.Join(parent, "cgroup.procs")); err != nil {
				continue
			}
			probe := filepath.Join(parent, "instar-probe")
			if os.Mkdir(probe, 0o755) == nil {
				os.Remove(probe)
				return parent
			}
		}
	}
	t.Skip("no writable control groups of version 2 here")
	return ""
}

// Killing a group ends what is in it, and it can be removed.
func TestGroupKill(t *testing.T) {
	mount := realGroups(t)
	g := &cgroup{filepath.Join(mount, cgroupPrefix+"999999999-1")}
	if err := os.Mkdir(g.path, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := g.add(cmd.Process.Pid); err != nil {
		cmd.Process.Kill()
		t.Fatal(err)
	}
	g.kill()
	if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("got %v", err)
	}
	time.Sleep(time.Millisecond)
	g.remove()
	if _, err := os.Stat(g.path); !os.IsNotExist(err) {
		t.Errorf("left: %v", err)
	}
	// And a later run removes what an earlier one left.
	if err := os.Mkdir(g.path, 0o755); err != nil {
		t.Fatal(err)
	}
	sweepCgroups(mount)
	if _, err := os.Stat(g.path); !os.IsNotExist(err) {
		t.Errorf("not swept: %v", err)
		g.remove()
	}
}

// A process that ended before it was in its group leaves none.
func TestGroupOfTheDead(t *testing.T) {
	limits := Limits{MemoryBytes: 1 << 20}
	g := newCgroup(limits)
	if g == nil {
		t.Skip("no control groups here whose memory can be limited")
	}
	g.remove()
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c := &Child{}
	awaitExit(cmd.Process.Pid)
	c.leaveGroup() // as the thread that waits for it does
	c.limitGroup(cmd.Process.Pid, limits)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(g.path), cgroupPrefix+"*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v %v", left, err)
	}
}

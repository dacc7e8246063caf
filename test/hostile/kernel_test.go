//go:build linux

package hostile

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// memoryGroups returns the directory in which instar makes control groups: the one
// above its own, where the caller may and memory is counted. Else it skips.
func memoryGroups(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Skip(err)
	}
	_, own, _ := strings.Cut(string(text), "0::")
	own, _, _ = strings.Cut(own, "\n")
	dir := filepath.Join("/sys/fs/cgroup", filepath.Dir(own))
	controllers, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if !strings.Contains(string(controllers), "memory") {
		t.Skip("no memory controller of version 2 here")
	}
	probe := filepath.Join(dir, "probe-of-the-tests")
	if err := os.Mkdir(probe, 0o755); err != nil {
		t.Skip(err)
	}
	if err := os.Remove(probe); err != nil {
		t.Fatal(err)
	}
	return dir
}

// oomKills is how often the kernel killed in a group or below it.
func oomKills(t *testing.T, group string) int {
	t.Helper()
	events, err := os.ReadFile(filepath.Join(group, "memory.events"))
	if os.IsNotExist(err) { // the root
		events, err = os.ReadFile("/proc/vmstat")
	}
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(events)) {
		if n, found := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); found {
			kills, err := strconv.Atoi(n)
			if err != nil {
				t.Fatal(err)
			}
			return kills
		}
	}
	t.Fatalf("%s counts no oom_kill", group)
	return 0
}

func noGroups(t *testing.T, dir string) {
	t.Helper()
	if left, err := filepath.Glob(filepath.Join(dir, "instar-*")); err != nil || len(left) > 0 {
		t.Errorf("control groups were left: %v %v", left, err)
	}
}

// Memory that no limit of the process counts is counted by its control group: the
// kernel ends the plugin, one line says why, and neither group nor process stays.
func TestMemoryGroup(t *testing.T) {
	groups := memoryGroups(t)
	for _, p := range points {
		switch p.when {
		case "open", "check", "place", "close":
		default: // which request it is makes no difference
			continue
		}
		verb, _, _ := strings.Cut(p.args, " ")
		t.Run(p.when+"/"+verb, func(t *testing.T) {
			l := install(t, "share-"+p.when)
			before := oomKills(t, groups)
			c := l.command(append(p.words(l.name), "--max-memory=64M")...)
			c.CPU = 30
			r := c.start(t)
			l.clean()
			noGroups(t, groups)
			if len(r.Left) > 0 {
				t.Errorf("left processes %v", r.Left)
			}
			if p.when == "close" {
				return // nobody waits for the answer
			}
			if line := r.oneLine(t); !strings.Contains(line, "plugin "+l.name+" ran out of memory") {
				t.Errorf("got %s", line)
			}
			if got := oomKills(t, groups); got != before+1 {
				t.Errorf("the kernel killed %d times", got-before)
			}
		})
	}
}

// Where all goes well nothing stays either, nor where the core is killed and
// another follows.
func TestGroupsGo(t *testing.T) {
	groups := memoryGroups(t)
	dir := work(t)
	for range 20 {
		r := command{Argv: []string{"info", "--untrusted", "-f", "raw", "disk"}, Dir: dir}.run(t)
		if r.Code != 0 {
			t.Fatalf("exit code %d: %s", r.Code, r.Stderr)
		}
		noGroups(t, groups)
	}
	l := install(t, "hang-open")
	c := l.command("info", "-f", l.name, "--untrusted", "src")
	c.Kill = 500e6
	if r := c.run(t); r.Signal != 9 {
		t.Errorf("exit code %d, signal %d: %s", r.Code, r.Signal, r.Stderr)
	}
	if left, _ := filepath.Glob(filepath.Join(groups, "instar-*")); len(left) != 1 {
		t.Errorf("it had the control groups %v", left)
	}
	command{Argv: []string{"info", "--untrusted", "-f", "raw", "disk"}, Dir: dir}.run(t)
	noGroups(t, groups)
}

// What plugin list says of the sandbox is what the kernel says of itself.
func TestSandboxSaid(t *testing.T) {
	modules, err := os.ReadFile("/sys/kernel/security/lsm")
	if err != nil {
		t.Skip(err)
	}
	r := command{Argv: []string{"plugin", "list"}}.run(t)
	want := "\nsandbox: seccomp only, no Landlock in this kernel\n"
	if strings.Contains(","+strings.TrimSpace(string(modules))+",", ",landlock,") {
		want = "\nsandbox: Landlock ABI "
	}
	if r.Code != 0 || !strings.Contains(r.Stdout, want) {
		t.Errorf("exit code %d: %s%s\nwant %s (the kernel has %s)", r.Code, r.Stdout, r.Stderr, want, modules)
	}
}

// A plugin gets at no file, no socket and no program, with Landlock or without.
func TestReaches(t *testing.T) {
	for _, p := range points {
		switch p.when {
		case "open", "map", "check", "plan", "emit", "place", "finish":
			verb, _, _ := strings.Cut(p.args, " ")
			t.Run(p.when+"/"+verb, func(t *testing.T) {
				l := install(t, "reach-"+p.when)
				if line := l.run(p.words(l.name)...).oneLine(t); !strings.Contains(line, "reached: nothing.") {
					t.Errorf("got %s", line)
				}
			})
		}
	}
}

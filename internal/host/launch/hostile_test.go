package launch

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestMemoryLimit(t *testing.T) {
	needSandbox(t)
	p := started(t, "plain", Options{Limits: Limits{MemoryBytes: 64 << 20}})
	begin := time.Now()
	_, err := do(t.Context(), p, "allocate")
	if err == nil {
		t.Fatal("it got all the memory it asked for")
	}
	err = p.Explain(err)
	var exit *ExitError
	if !errors.As(err, &exit) || !strings.Contains(err.Error(), "out of memory") {
		t.Errorf("got %v", err)
	}
	if d := time.Since(begin); d > 10*time.Second {
		t.Errorf("took %v", d)
	}
	assertNothingLeft(t, p)
}

// With a memory limit a plugin and all that it starts are in a control group of
// their own, where there can be one, which goes with them.
func TestGroup(t *testing.T) {
	needSandbox(t)
	p := started(t, "plain", Options{Limits: Limits{MemoryBytes: 64 << 20}})
	forked, err := strconv.Atoi(mustDo(t, p, "fork"))
	if err != nil {
		t.Fatal(err)
	}
	group := groupOf(t, p.child.Pid())
	if !strings.HasPrefix(filepath.Base(group), "instar-"+strconv.Itoa(os.Getpid())+"-") {
		t.Skipf("it is in %s: no control groups here whose memory can be limited", group)
	}
	if got := groupOf(t, forked); got != group {
		t.Errorf("what it started is in %s, not in %s", got, group)
	}
	for file, want := range map[string]string{"memory.max": strconv.Itoa(192 << 20), "pids.max": "256"} {
		if b, err := os.ReadFile(filepath.Join(group, file)); err != nil || strings.TrimSpace(string(b)) != want {
			t.Errorf("%s: %q %v, want %s", file, b, err, want)
		}
	}
	assertNothingLeft(t, p)
	if running(forked) {
		t.Errorf("%d outlived the plugin", forked)
	}
	if _, err := os.Stat(group); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", group, err)
	}
}

// groupOf returns the directory of a process's control group.
func groupOf(t *testing.T, pid int) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cgroup")
	if err != nil {
		t.Skip(err)
	}
	_, group, _ := strings.Cut(string(b), "0::")
	group, _, _ = strings.Cut(group, "\n")
	return filepath.Join("/sys/fs/cgroup", group)
}

func TestProcessorLimit(t *testing.T) {
	needSandbox(t)
	p := started(t, "plain", Options{Limits: Limits{CPUSeconds: 1}})
	_, err := do(t.Context(), p, "spin")
	if err == nil {
		t.Fatal("it span for ever")
	}
	if got, want := p.Explain(err).Error(), "plugin plain used up its processor time"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	assertNothingLeft(t, p)
}

func TestFileLimit(t *testing.T) {
	needSandbox(t)
	p := started(t, "plain", Options{Limits: Limits{Files: 20}})
	got := mustDo(t, p, "open-many")
	if n, err := strconv.Atoi(got); err != nil || n > 20 {
		t.Errorf("it opened %s", got)
	}
}

// A request under way ends when the plugin is killed.
func TestKillEndsRequests(t *testing.T) {
	p := started(t, "plain", Options{})
	failed := make(chan error)
	go func() {
		_, err := do(context.WithoutCancel(t.Context()), p, "hang")
		failed <- err
	}()
	time.Sleep(20 * time.Millisecond) // it does not matter whether the request got there
	p.Kill()
	select {
	case err := <-failed:
		if err == nil {
			t.Error("no error")
		}
	case <-time.After(5 * time.Second):
		t.Error("the request hangs on")
	}
}

// Processes that a plugin started end with it, also out of its process group.
func TestForks(t *testing.T) {
	needSandbox(t)
	p := started(t, "plain", Options{})
	var pids []int
	for _, how := range []string{"fork", "fork-twice"} {
		pid, err := strconv.Atoi(mustDo(t, p, how))
		if err != nil {
			t.Fatal(err)
		}
		if !running(pid) {
			t.Fatalf("%s: %d does not run", how, pid)
		}
		pids = append(pids, pid)
	}
	p.Kill()
	<-p.Done()
	for _, pid := range pids {
		deadline := time.Now().Add(5 * time.Second)
		for running(pid) {
			if time.Now().After(deadline) {
				syscall.Kill(pid, syscall.SIGKILL)
				t.Fatalf("%d outlived the plugin", pid)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func TestForksAreRefusedByTheSecondLock(t *testing.T) {
	needSandbox(t)
	p := started(t, "locked", Options{})
	if got, err := do(t.Context(), p, "fork"); err == nil {
		t.Errorf("it started process %s", got)
	}
}

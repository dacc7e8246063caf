package child

import (
	"bytes"
	"os"
	"path"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// cgroup is a control group (version 2) of one plugin with a memory limit.
// Other than the process's own limits it counts all memory, and the processes
// that the plugin starts. It is used where the caller may make one: as root, or
// in a part of the tree that was delegated, as systemd does for users.
type cgroup struct {
	path string
}

// Where the kernel shows control groups. Tests have others.
var (
	cgroupMount = "/sys/fs/cgroup"
	cgroupSelf  = "/proc/self/cgroup"
)

// maxProcesses bounds the processes and threads of a limited plugin.
const maxProcesses = 256

var cgroups atomic.Int32

// newCgroup returns a group with the limits, nil where there can be none.
func newCgroup(limits Limits) *cgroup {
	if limits.MemoryBytes <= 0 {
		return nil
	}
	text, err := os.ReadFile(cgroupSelf)
	if err != nil {
		return nil
	}
	own, found := "", false
	for line := range strings.Lines(string(text)) {
		if own, found = strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); found {
			break
		}
	}
	if !found || !path.IsAbs(own) || strings.Contains(own, "/../") {
		return nil
	}
	// A group with processes in it, such as our own, cannot have limited groups
	// below it, unless it is the root: else it is a sibling.
	for _, parent := range []string{path.Dir(own), own} {
		if g := newCgroupIn(path.Join(cgroupMount, parent), limits); g != nil {
			return g
		}
	}
	return nil
}

func newCgroupIn(parent string, limits Limits) *cgroup {
	controllers, err := os.ReadFile(path.Join(parent, "cgroup.subtree_control"))
	if err != nil || !containsWord(controllers, "memory") {
		return nil
	}
	sweepCgroups(parent)
	g := &cgroup{path.Join(parent, cgroupPrefix+strconv.Itoa(os.Getpid())+"-"+strconv.Itoa(int(cgroups.Add(1))))}
	if err := os.Mkdir(g.path, 0o755); err != nil {
		return nil
	}
	if g.set("memory.max", limits.MemoryBytes+memoryOverhead) != nil {
		g.remove()
		return nil
	}
	_ = g.set("memory.swap.max", 0) // there may be no swap accounting
	if containsWord(controllers, "pids") {
		_ = g.set("pids.max", maxProcesses) // the process's own limits remain
	}
	return g
}

const cgroupPrefix = "instar-"

func containsWord(text []byte, word string) bool {
	for _, field := range bytes.Fields(text) {
		if string(field) == word {
			return true
		}
	}
	return false
}

func (g *cgroup) set(file string, value int64) error {
	f, err := os.OpenFile(path.Join(g.path, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(strconv.FormatInt(value, 10))
	return err
}

// add moves a process into the group.
func (g *cgroup) add(pid int) error { return g.set("cgroup.procs", int64(pid)) }

// kill ends all processes in the group.
func (g *cgroup) kill() { _ = g.set("cgroup.kill", 1) } // Linux 5.14; others end them too

// ranOut reports whether the kernel killed for want of memory.
func (g *cgroup) ranOut() bool {
	text, err := os.ReadFile(path.Join(g.path, "memory.events"))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if n, found := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); found {
			return n != "0"
		}
	}
	return false
}

// remove removes the group. What was killed in it may take a moment to leave, and
// longer the more memory it has.
func (g *cgroup) remove() {
	for range 500 {
		if err := unix.Rmdir(g.path); err != unix.EBUSY {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// sweepCgroups removes the empty groups of dead runs.
func sweepCgroups(parent string) {
	entries, err := os.ReadDir(parent)
	if err != nil {
		return
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), cgroupPrefix)
		owner, _, _ := strings.Cut(rest, "-")
		if pid, err := strconv.Atoi(owner); ours && err == nil && unix.Kill(pid, 0) == unix.ESRCH {
			os.Remove(path.Join(parent, e.Name()))
		}
	}
}

package child

import (
	"bytes"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// A plugin without our SDK's lock can start processes, which run its own
// program in its sandbox. They leave its process group as they like, so they
// are found by descent: as children of its threads, or, when their parent is
// gone, as our own, because we adopt them.

// adoptOrphans makes processes whose parent ends below us our children.
var adoptOrphans = sync.OnceFunc(func() {
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
})

const maxDescendants = 4096

// descendants returns the processes that the process started, and those that
// it did, as far as they are alive.
func descendants(pid int) []int {
	found := childrenOf(pid)
	for i := 0; i < len(found) && len(found) < maxDescendants; i++ {
		found = append(found, childrenOf(found[i])...)
	}
	return found
}

// childrenOf lists the children of all threads of a process: nil where the
// kernel does not say (CONFIG_PROC_CHILDREN).
func childrenOf(pid int) []int {
	tasks := "/proc/" + strconv.Itoa(pid) + "/task"
	d, err := os.Open(tasks)
	if err != nil {
		return nil
	}
	defer d.Close()
	threads, _ := d.Readdirnames(-1)
	var children []int
	for _, t := range threads {
		children = append(children, numbersIn(tasks+"/"+t+"/children")...)
	}
	return children
}

func numbersIn(file string) []int {
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	var text []byte
	for {
		var b [512]byte
		n, err := unix.Read(fd, b[:])
		if n <= 0 || err != nil {
			break
		}
		text = append(text, b[:n]...)
	}
	var numbers []int
	for _, field := range bytes.Fields(text) {
		if n, err := strconv.Atoi(string(field)); err == nil {
			numbers = append(numbers, n)
		}
	}
	return numbers
}

// orphans returns our children that run what the plugin may run, and that we
// did not start.
func (c *Child) orphans() []int {
	self := strconv.Itoa(os.Getpid())
	var found []int
	for _, pid := range numbersIn("/proc/self/task/" + self + "/children") {
		if !isOurs(pid) && c.mayRun(pid) {
			found = append(found, pid)
		}
	}
	return found
}

func (c *Child) mayRun(pid int) bool {
	exe := "/proc/" + strconv.Itoa(pid) + "/exe"
	var theirs, own unix.Stat_t
	if unix.Stat(exe, &theirs) == nil && unix.Stat(c.path, &own) == nil &&
		theirs.Dev == own.Dev && theirs.Ino == own.Ino {
		return true
	}
	program, err := os.Readlink(exe)
	if err != nil {
		return false
	}
	for _, root := range c.roots {
		if strings.HasPrefix(program, strings.TrimSuffix(root, "/")+"/") {
			return true
		}
	}
	return false
}

// killTree ends the process and all that descends from it.
func (c *Child) killTree() {
	// First, because it takes the kernel a while, and nothing gets lost: until
	// there is no more of it its children are found below it, and then as ours.
	unix.Kill(-c.id, unix.SIGKILL)
	unix.Kill(c.id, unix.SIGKILL)
	below := append(descendants(c.id), c.orphans()...)
	for known := 0; len(below) != known; {
		// There are some, which nothing that behaves has. Stopped, they cannot
		// start more.
		known = len(below)
		for _, pid := range below {
			unix.Kill(pid, unix.SIGSTOP)
		}
		again := append(descendants(c.id), c.orphans()...)
		for _, pid := range again {
			again = append(again, descendants(pid)...)
		}
		below = unique(append(below, again...))
	}
	for _, pid := range below {
		unix.Kill(pid, unix.SIGKILL)
	}
}

func unique(pids []int) []int {
	slices.Sort(pids)
	return slices.Compact(pids)
}

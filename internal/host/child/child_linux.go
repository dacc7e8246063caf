package child

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const sendFlags = unix.MSG_NOSIGNAL | unix.MSG_DONTWAIT

func descriptorSockets() ([2]int, error) {
	return unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
}

func streamSockets() ([2]int, error) {
	return unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
}

func sysProcAttr() *syscall.SysProcAttr {
	// The signal comes when the launching thread dies, which is why that thread
	// stays to wait for the process.
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

// closeOnExec keeps descriptors that instar's caller left open away from
// plugins.
var closeOnExec = sync.OnceFunc(func() {
	_ = unix.CloseRange(3, 1<<31-1, unix.CLOSE_RANGE_CLOEXEC)
})

// run is the life of the thread that starts the process: it restricts itself,
// starts the process, which inherits the restrictions, and waits for it. The
// goroutine ends locked, so that the thread dies and nothing else ever runs on
// it.
func (c *Child) run(attr *syscall.ProcAttr, result chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread cannot be thrown away. While it is held here, another
		// goroutine gets another thread.
		other := make(chan error)
		go c.run(attr, other)
		result <- <-other
		runtime.UnlockOSThread()
		return
	}
	closeOnExec()
	adoptOrphans()
	if c.confined {
		if err := c.confine(); err != nil {
			result <- err
			return
		}
	}
	// The process inherits it. Without, the monitor thread of a Go program wakes
	// every 70 µs, which takes a tenth of the processor that it runs on.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(timerSlack.Nanoseconds()), 0, 0, 0)
	pid, err := syscall.ForkExec(c.path, c.args, attr)
	if err != nil {
		result <- startError(err, c.confined)
		return
	}
	own(pid)
	c.mu.Lock()
	c.id = pid
	c.mu.Unlock()
	result <- nil
	c.wait()
}

// timerSlack is by how much a plugin's timers may be late.
const timerSlack = 250 * time.Microsecond

// SetLimits bounds the process from outside. It may have begun to run, which
// does not matter: what it can have used by now is nothing.
func (c *Child) SetLimits(limits Limits) {
	c.mu.Lock()
	c.limits = limits
	c.mu.Unlock()
	pid := c.Pid()
	if limits.Files == 0 {
		limits.Files = DefaultFiles
	}
	set := func(resource int, limit, hard uint64) {
		l := unix.Rlimit{Cur: limit, Max: hard}
		var old unix.Rlimit
		if err := unix.Prlimit(pid, resource, nil, &old); err == nil {
			l.Max = min(l.Max, old.Max)
			l.Cur = min(l.Cur, l.Max)
		}
		_ = unix.Prlimit(pid, resource, &l, nil) // fails when the process is gone
	}
	set(unix.RLIMIT_CORE, 0, 0)
	set(unix.RLIMIT_NOFILE, uint64(limits.Files), uint64(limits.Files))
	if limits.CPUSeconds > 0 {
		// First a signal that says why, then one that cannot be caught.
		set(unix.RLIMIT_CPU, uint64(limits.CPUSeconds), uint64(limits.CPUSeconds)+1)
	}
	if limits.MemoryBytes > 0 {
		// Not RLIMIT_AS: a Go program reserves far more addresses than it uses.
		most := uint64(limits.MemoryBytes) + memoryOverhead
		set(unix.RLIMIT_DATA, most, most)
		c.limitGroup(pid, limits)
	}
}

// memoryOverhead is what a Go program maps beside its heap: arenas are mapped
// 64 MiB at a time.
const memoryOverhead = 128 << 20

// awaitExit returns when the process has ended and can be waited for.
func awaitExit(pid int) {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			return
		}
	}
}

func startError(err error, confined bool) error {
	if errors.Is(err, syscall.EACCES) && confined {
		// Not wrapped: it is no file of the caller's to which access is denied.
		return errors.New("start: permission denied: in its sandbox a program that is not one static binary needs the runtime-roots of its manifest")
	}
	if errors.Is(err, syscall.ENOENT) {
		// The program is there: discover has seen it.
		return errors.New("start: what runs it is not there: the interpreter in its first line, or its loader")
	}
	return fmt.Errorf("start: %w", err)
}

// limitGroup puts the process into a control group, where there can be one and it
// is in none yet.
func (c *Child) limitGroup(pid int, limits Limits) {
	if c.grouped() {
		return
	}
	g := newCgroup(limits)
	if g == nil {
		return
	}
	// A process that has just ended would be taken, and the group stay.
	c.mu.Lock()
	if !c.ended && g.add(pid) == nil {
		c.group, g = g, nil
	}
	c.mu.Unlock()
	if g != nil {
		g.remove()
	}
}

// grouped reports whether there is a control group to be removed.
func (c *Child) grouped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.group != nil
}

// leaveGroup ends what else is in the control group, and removes it. It reports
// whether the kernel killed for want of memory.
func (c *Child) leaveGroup() bool {
	c.mu.Lock()
	g := c.group
	c.ended = true
	c.mu.Unlock()
	if g == nil {
		return false
	}
	// On another thread: this one is in the plugin's sandbox, which has no groups.
	left := make(chan bool)
	go func() {
		ranOut := g.ranOut()
		g.kill()
		g.remove()
		left <- ranOut
	}()
	ranOut := <-left
	c.mu.Lock()
	c.group = nil
	c.mu.Unlock()
	return ranOut
}

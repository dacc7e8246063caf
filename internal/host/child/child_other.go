//go:build unix && !linux

package child

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

const sendFlags = unix.MSG_DONTWAIT

// descriptorSockets are streams here: each message is read on its own, because
// the kernel does not join data with different descriptors.
func descriptorSockets() ([2]int, error) { return streamSockets() }

func streamSockets() ([2]int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return pair, err
	}
	for _, fd := range pair {
		unix.CloseOnExec(fd)
	}
	return pair, nil
}

func sysProcAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }

func (c *Child) run(attr *syscall.ProcAttr, result chan<- error) {
	pid, err := syscall.ForkExec(c.path, c.args, attr)
	if err != nil {
		result <- fmt.Errorf("start: %w", err)
		return
	}
	own(pid)
	c.mu.Lock()
	c.id = pid
	c.mu.Unlock()
	result <- nil
	c.wait()
}

// awaitExit polls, because waiting without reaping is not portable, and a
// process id must not be signalled after it was reaped.
func awaitExit(int) {}

// SetLimits does nothing: limits are part of the sandbox.
func (c *Child) SetLimits(Limits) {}

// killTree ends the process and its process group. Descendants that left that
// are not found here.
func (c *Child) killTree() {
	unix.Kill(-c.id, unix.SIGKILL)
	unix.Kill(c.id, unix.SIGKILL)
}

// cgroup is a Linux matter.
type cgroup struct{}

func (c *Child) leaveGroup() bool { return false }

func (c *Child) grouped() bool { return false }

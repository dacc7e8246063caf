package lock

import "golang.org/x/sys/unix"

// allowedHere are system calls that other architectures do not have.
var allowedHere = []uint32{
	unix.SYS_EPOLL_WAIT, unix.SYS_POLL, unix.SYS_SELECT, unix.SYS_TIME, unix.SYS_PIPE, unix.SYS_DUP2,
	unix.SYS_ARCH_PRCTL,
}

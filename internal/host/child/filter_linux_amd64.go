package child

import "golang.org/x/sys/unix"

// refusedHere are system calls that other architectures do not have.
var refusedHere = []uint32{
	unix.SYS_FORK, // Go starts processes by clone; vfork is clone too
	unix.SYS_VFORK,
	unix.SYS_CHMOD, unix.SYS_CHOWN, unix.SYS_LCHOWN,
	unix.SYS_UTIME, unix.SYS_UTIMES, unix.SYS_FUTIMESAT, unix.SYS_INOTIFY_INIT,
	unix.SYS_IOPL, unix.SYS_IOPERM, unix.SYS_MODIFY_LDT, unix.SYS_USELIB,
}

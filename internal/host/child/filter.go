//go:build linux && (amd64 || arm64)

package child

import (
	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/confine"
)

func confineCalls() error { return firstFilter(unix.Getpid()).RestrictThread() }

const newNamespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// firstFilter refuses what no plugin needs, in any language: it lists what is
// refused, because a plugin's run-time system is not known here. It must let
// through what starting the process takes. core is the core's process id.
func firstFilter(core int) *confine.Filter {
	f := confine.NewFilter(confine.Allow)
	refuse := confine.Fail(unix.EPERM)

	// Other processes.
	f.On(refuse,
		unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV,
		unix.SYS_PROCESS_MADVISE, unix.SYS_PROCESS_MRELEASE, unix.SYS_KCMP,
		unix.SYS_PIDFD_OPEN, unix.SYS_PIDFD_GETFD, unix.SYS_PIDFD_SEND_SIGNAL,
		unix.SYS_KILL, unix.SYS_TKILL, unix.SYS_RT_SIGQUEUEINFO, unix.SYS_RT_TGSIGQUEUEINFO,
		unix.SYS_SETPRIORITY, unix.SYS_IOPRIO_SET, unix.SYS_SCHED_SETAFFINITY,
		unix.SYS_SCHED_SETSCHEDULER, unix.SYS_SCHED_SETPARAM, unix.SYS_SCHED_SETATTR,
		unix.SYS_MIGRATE_PAGES, unix.SYS_MOVE_PAGES, unix.SYS_SETSID)
	// tgkill names the process, which is not known before it starts, so that it
	// cannot be confined to its own. The one signal left is the one by which Go
	// interrupts its threads, which is ignored by those that do not expect it.
	f.When(refuse, unix.SYS_TGKILL, confine.Condition{Arg: 0, Value: uint32(core)})
	f.When(confine.Allow, unix.SYS_TGKILL, confine.Condition{Arg: 2, Value: uint32(unix.SIGURG)})
	f.On(refuse, unix.SYS_TGKILL)
	// Threads, and the clone by which Go starts a program: that one starts the
	// plugin itself. Name spaces not.
	f.When(confine.Allow, unix.SYS_CLONE,
		confine.Condition{Arg: 0, Mask: unix.CLONE_THREAD | newNamespaces, Value: unix.CLONE_THREAD})
	const vfork = unix.CLONE_VFORK | unix.CLONE_VM
	f.When(confine.Allow, unix.SYS_CLONE, confine.Condition{Arg: 0, Mask: vfork | newNamespaces, Value: vfork})
	f.On(refuse, unix.SYS_CLONE)
	f.On(confine.Fail(unix.ENOSYS), unix.SYS_CLONE3) // callers fall back to clone
	// Limits of this process may be changed, those of others not.
	f.When(confine.Allow, unix.SYS_PRLIMIT64, confine.Condition{Arg: 0, Value: 0})
	f.On(refuse, unix.SYS_PRLIMIT64)
	// The signal that ends it with the core stays.
	f.When(confine.Allow, unix.SYS_PRCTL,
		confine.Condition{Arg: 0, Value: unix.PR_SET_PDEATHSIG},
		confine.Condition{Arg: 1, Value: uint32(unix.SIGKILL)})
	f.When(refuse, unix.SYS_PRCTL, confine.Condition{Arg: 0, Value: unix.PR_SET_PDEATHSIG})

	// The network, and other programs' sockets: a plugin listens on a Unix
	// stream socket, and that is all.
	f.When(confine.Allow, unix.SYS_SOCKET,
		confine.Condition{Arg: 0, Value: unix.AF_UNIX},
		confine.Condition{Arg: 1, Mask: 0xf, Value: unix.SOCK_STREAM})
	f.On(refuse, unix.SYS_SOCKET, unix.SYS_SOCKETPAIR, unix.SYS_CONNECT)

	// Lengths of files, which Landlock covers from ABI 3 on; those that are open
	// have ftruncate.
	f.On(refuse, unix.SYS_TRUNCATE)
	// Metadata of files, which Landlock does not cover.
	f.On(refuse,
		unix.SYS_FCHMOD, unix.SYS_FCHMODAT, unix.SYS_FCHMODAT2,
		unix.SYS_FCHOWN, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT,
		unix.SYS_SETXATTR, unix.SYS_LSETXATTR, unix.SYS_FSETXATTR, unix.SYS_SETXATTRAT,
		unix.SYS_REMOVEXATTR, unix.SYS_LREMOVEXATTR, unix.SYS_FREMOVEXATTR, unix.SYS_REMOVEXATTRAT,
		unix.SYS_NAME_TO_HANDLE_AT, unix.SYS_OPEN_BY_HANDLE_AT,
		unix.SYS_FANOTIFY_INIT, unix.SYS_INOTIFY_INIT1, unix.SYS_QUOTACTL, unix.SYS_QUOTACTL_FD)

	// Name spaces, mounts, identities, the machine.
	f.On(refuse,
		unix.SYS_UNSHARE, unix.SYS_SETNS, unix.SYS_CHROOT, unix.SYS_PIVOT_ROOT,
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_MOUNT_SETATTR, unix.SYS_MOVE_MOUNT,
		unix.SYS_OPEN_TREE, unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK,
		unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETREUID, unix.SYS_SETREGID,
		unix.SYS_SETRESUID, unix.SYS_SETRESGID, unix.SYS_SETFSUID, unix.SYS_SETFSGID,
		unix.SYS_SETGROUPS, unix.SYS_CAPSET, unix.SYS_PERSONALITY,
		unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_SETTIMEOFDAY,
		unix.SYS_CLOCK_SETTIME, unix.SYS_CLOCK_ADJTIME, unix.SYS_ADJTIMEX,
		unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_SYSLOG,
		unix.SYS_VHANGUP, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
		unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD)

	// Kernel interfaces with a long record of holes, or ways around the rest.
	f.On(refuse,
		unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN, unix.SYS_USERFAULTFD,
		unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER,
		unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
		unix.SYS_MEMFD_CREATE, unix.SYS_MEMFD_SECRET, unix.SYS_EXECVEAT,
		unix.SYS_SHMGET, unix.SYS_SHMAT, unix.SYS_SHMCTL, unix.SYS_MSGGET, unix.SYS_MSGSND,
		unix.SYS_MSGRCV, unix.SYS_MSGCTL, unix.SYS_SEMGET, unix.SYS_SEMOP, unix.SYS_SEMCTL,
		unix.SYS_SEMTIMEDOP, unix.SYS_MQ_OPEN, unix.SYS_MQ_UNLINK,
		unix.SYS_IO_SETUP, unix.SYS_VMSPLICE, unix.SYS_LOOKUP_DCOOKIE)

	f.On(refuse, refusedHere...)
	return f
}

//go:build linux && (amd64 || arm64)

package lock

import (
	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/confine"
)

func engageSeccomp(accept bool) error {
	if !confine.HasSeccomp() {
		return confine.ErrUnavailable
	}
	return filter(unix.Getpid(), accept).RestrictAll()
}

// filter allows what a Go program needs that serves requests on an open socket,
// and refuses the rest: it lists what is allowed. pid is the process's own.
func filter(pid int, accept bool) *confine.Filter {
	f := confine.NewFilter(confine.Fail(unix.EPERM))

	// In order of how often they are called.
	f.On(confine.Allow,
		unix.SYS_FUTEX, unix.SYS_READ, unix.SYS_WRITE, unix.SYS_PREAD64, unix.SYS_PWRITE64,
		unix.SYS_EPOLL_PWAIT, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_GETTIME, unix.SYS_CLOSE,
		unix.SYS_MMAP, unix.SYS_MUNMAP, unix.SYS_MADVISE, unix.SYS_SCHED_YIELD)

	// Memory.
	f.On(confine.Allow,
		unix.SYS_MPROTECT, unix.SYS_MREMAP, unix.SYS_BRK, unix.SYS_MINCORE, unix.SYS_MSYNC,
		unix.SYS_MEMBARRIER)
	// Threads, time and signals of this process.
	f.On(confine.Allow,
		unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_GETPPID, unix.SYS_GETUID, unix.SYS_GETEUID,
		unix.SYS_GETGID, unix.SYS_GETEGID, unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RSEQ,
		unix.SYS_SET_ROBUST_LIST, unix.SYS_SET_TID_ADDRESS, unix.SYS_SCHED_GETAFFINITY,
		unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETRES, unix.SYS_GETTIMEOFDAY,
		unix.SYS_TIMER_CREATE, unix.SYS_TIMER_SETTIME, unix.SYS_TIMER_DELETE,
		unix.SYS_SETITIMER, unix.SYS_GETRUSAGE, unix.SYS_GETCPU, unix.SYS_SYSINFO, unix.SYS_UNAME,
		unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN,
		unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL, unix.SYS_GETRANDOM)
	f.When(confine.Allow, unix.SYS_CLONE,
		confine.Condition{Arg: 0, Mask: unix.CLONE_THREAD, Value: unix.CLONE_THREAD})
	f.When(confine.Allow, unix.SYS_TGKILL, confine.Condition{Arg: 0, Value: uint32(pid)})
	f.When(confine.Allow, unix.SYS_KILL, confine.Condition{Arg: 0, Value: uint32(pid)})
	f.When(confine.Allow, unix.SYS_PRLIMIT64, confine.Condition{Arg: 0, Value: 0})
	f.When(confine.Allow, unix.SYS_PRCTL, confine.Condition{Arg: 0, Value: unix.PR_SET_VMA})
	// Open files.
	f.On(confine.Allow,
		unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_PREADV, unix.SYS_PWRITEV,
		unix.SYS_PREADV2, unix.SYS_PWRITEV2, unix.SYS_LSEEK, unix.SYS_FSTAT,
		unix.SYS_FTRUNCATE, unix.SYS_FALLOCATE, unix.SYS_FSYNC, unix.SYS_FDATASYNC,
		unix.SYS_SYNC_FILE_RANGE, unix.SYS_FADVISE64, unix.SYS_COPY_FILE_RANGE,
		unix.SYS_DUP, unix.SYS_DUP3, unix.SYS_CLOSE_RANGE, unix.SYS_PIPE2)
	for _, request := range []uint32{
		unix.BLKGETSIZE64, unix.BLKSSZGET, unix.BLKPBSZGET, unix.BLKDISCARD, unix.BLKZEROOUT,
		unix.TCGETS, // is it a terminal?
	} {
		f.When(confine.Allow, unix.SYS_IOCTL, confine.Condition{Arg: 1, Value: request})
	}
	for _, command := range []uint32{
		unix.F_GETFL, unix.F_SETFL, unix.F_GETFD, unix.F_SETFD, unix.F_DUPFD_CLOEXEC,
	} {
		f.When(confine.Allow, unix.SYS_FCNTL, confine.Condition{Arg: 1, Value: command})
	}
	// The open sockets.
	if accept {
		f.On(confine.Allow, unix.SYS_ACCEPT4)
	}
	f.On(confine.Allow,
		unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_GETSOCKOPT,
		unix.SYS_SETSOCKOPT, unix.SYS_RECVMSG, unix.SYS_RECVFROM, unix.SYS_SENDMSG,
		unix.SYS_SENDTO, unix.SYS_SHUTDOWN, unix.SYS_EPOLL_CREATE1, unix.SYS_EPOLL_CTL,
		unix.SYS_EVENTFD2, unix.SYS_PPOLL)
	f.On(confine.Allow, allowedHere...)

	f.On(confine.Fail(unix.ENOSYS), unix.SYS_CLONE3)
	return f
}

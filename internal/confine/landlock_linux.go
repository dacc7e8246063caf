package confine

import (
	"fmt"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Rights on files beneath a path, by use.
const (
	ReadFile = unix.LANDLOCK_ACCESS_FS_READ_FILE
	Execute  = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_EXECUTE
	ReadTree = Execute | unix.LANDLOCK_ACCESS_FS_READ_DIR
	// Sockets are the rights that making a Unix socket through a temporary file
	// needs.
	Sockets = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE |
		unix.LANDLOCK_ACCESS_FS_REMOVE_FILE | unix.LANDLOCK_ACCESS_FS_MAKE_REG |
		unix.LANDLOCK_ACCESS_FS_MAKE_SOCK
)

// ofFiles are the rights that a rule for a file may have, of those above.
const ofFiles = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_EXECUTE

// LandlockABI returns the version of Landlock in the running kernel, 0 for none.
var LandlockABI = sync.OnceValue(func() int {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(v)
})

// Ruleset is a Landlock ruleset that refuses all that the running kernel can
// refuse: every use of the file system, TCP, signals to processes outside and
// abstract sockets made outside.
type Ruleset struct {
	fd      int
	handled uint64
}

// NewRuleset returns a ruleset that allows nothing.
func NewRuleset() (*Ruleset, error) {
	abi := LandlockABI()
	if abi == 0 {
		return nil, fmt.Errorf("landlock: %w", ErrUnavailable)
	}
	// Access rights of each ABI: linux/Documentation/userspace-api/landlock.rst.
	attr := unix.LandlockRulesetAttr{Handled_access_fs: unix.LANDLOCK_ACCESS_FS_MAKE_SYM<<1 - 1}
	size := unsafe.Offsetof(attr.Handled_access_net)
	if abi >= 2 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if abi >= 3 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if abi >= 4 {
		attr.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
		size = unsafe.Offsetof(attr.Scoped)
	}
	if abi >= 5 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if abi >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET | unix.LANDLOCK_SCOPE_SIGNAL
		size = unsafe.Offsetof(attr.Quiet_access_fs)
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), size, 0)
	if errno != 0 {
		return nil, fmt.Errorf("landlock: create ruleset: %w", errno)
	}
	return &Ruleset{fd: int(fd), handled: attr.Handled_access_fs}, nil
}

// Allow grants rights on path and what lies beneath it. Where it is no directory,
// those of files are granted.
func (r *Ruleset) Allow(path string, rights uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("landlock: %s: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("landlock: %s: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= ofFiles
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: rights & r.handled, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(r.fd),
		unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("landlock: allow %s: %w", path, errno)
	}
	return nil
}

// Close drops the ruleset. Threads restricted by it stay restricted.
func (r *Ruleset) Close() { unix.Close(r.fd) }

// RestrictThread applies the ruleset to the calling thread and all that it
// starts. The thread must have no_new_privs set.
func (r *Ruleset) RestrictThread() error {
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(r.fd), 0, 0); errno != 0 {
		return fmt.Errorf("landlock: restrict: %w", errno)
	}
	return nil
}

// NoNewPrivs gives up gaining privileges by exec, for the calling thread and
// all that it starts.
func NoNewPrivs() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	return nil
}

// LandlockAllThreads reports whether the kernel can restrict all threads of a
// process in one call.
func LandlockAllThreads() bool { return LandlockABI() >= 8 }

// RestrictAll applies the ruleset to every thread of the process.
func (r *Ruleset) RestrictAll() error {
	if LandlockAllThreads() {
		_, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(r.fd), unix.LANDLOCK_RESTRICT_SELF_TSYNC, 0)
		if errno != 0 {
			return fmt.Errorf("landlock: restrict all threads: %w", errno)
		}
		return nil
	}
	// ENOTSUP in a program built with cgo, whose threads Go does not all know.
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(r.fd), 0, 0)
	if errno == syscall.ENOTSUP {
		return fmt.Errorf("landlock: restrict all threads of a program with cgo: %w", ErrUnavailable)
	}
	if errno != 0 {
		return fmt.Errorf("landlock: restrict all threads: %w", errno)
	}
	return nil
}

// NoNewPrivsAll is NoNewPrivs for every thread of the process. Where the calling
// thread has given them up already, it is taken that all have: threads inherit.
func NoNewPrivsAll() error {
	v, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
	if err == nil && v == 1 {
		return nil
	}
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0)
	if errno == syscall.ENOTSUP {
		return fmt.Errorf("no_new_privs for all threads of a program with cgo: %w", ErrUnavailable)
	}
	if errno != 0 {
		return fmt.Errorf("no_new_privs: %w", errno)
	}
	return nil
}

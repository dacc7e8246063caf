package main

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// escape tries what a plugin must not be able to do, and returns as JSON what
// came of each attempt: "" where it succeeded. Of the arguments, KEY=VALUE, it
// takes the addresses and paths to try.
func escape(args []string) string {
	given := map[string]string{}
	for _, a := range args {
		k, v, _ := strings.Cut(a, "=")
		given[k] = v
	}
	results := map[string]string{}
	try := func(what string, f func() error) {
		results[what] = ""
		if err := f(); err != nil {
			results[what] = err.Error()
		}
	}
	raw := func(number uintptr, a ...uintptr) func() error {
		return func() error {
			var six [6]uintptr
			copy(six[:], a)
			if _, _, errno := unix.RawSyscall6(number, six[0], six[1], six[2], six[3], six[4], six[5]); errno != 0 {
				return errno
			}
			return nil
		}
	}
	parent := os.Getppid()
	victim := given["victim"] // a file of the caller's
	own := os.Getenv("PLUGIN_UNIX_SOCKET_DIR")

	// Files.
	try("read /etc/passwd", func() error { return readable("/etc/passwd") })
	try("list /", func() error { _, err := os.ReadDir("/"); return err })
	try("read /proc/self/environ", func() error { return readable("/proc/self/environ") })
	try("create a file", func() error { return os.WriteFile(victim+".new", nil, 0o600) })
	try("truncate a file", func() error { return os.Truncate(victim, 0) })
	try("remove a file", func() error { return os.Remove(victim + ".spare") })
	try("rename a file", func() error { return os.Rename(victim+".other", victim+".moved") })
	try("make a symlink", func() error { return os.Symlink("/", victim+".link") })
	try("make a hard link", func() error { return os.Link(victim, victim+".hard") })
	try("make a directory", func() error { return os.Mkdir(victim+".dir", 0o700) })
	try("change a mode", func() error { return os.Chmod(victim, 0o777) })
	try("change times", func() error { return unix.Utimes(victim, make([]unix.Timeval, 2)) })
	try("set an attribute", func() error { return unix.Setxattr(victim, "user.x", []byte("1"), 0) })
	try("make a symlink in its own directory", func() error {
		return os.Symlink("/", filepath.Join(own, "link"))
	})
	try("create in its own directory", func() error {
		return os.WriteFile(filepath.Join(own, "extra"), nil, 0o600)
	})
	try("read its own program", func() error { return readable(os.Args[0]) })

	// Sockets.
	try("connect by TCP", func() error { return connect(unix.AF_INET, unix.SOCK_STREAM, inet(given["port"])) })
	try("send by UDP", func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, []byte("x"), 0, inet(given["port"]))
	})
	try("make a netlink socket", func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 0)
		unix.Close(fd)
		return err
	})
	try("connect to a Unix socket", func() error {
		return connect(unix.AF_UNIX, unix.SOCK_STREAM, &unix.SockaddrUnix{Name: given["socket"]})
	})
	try("connect to an abstract socket", func() error {
		return connect(unix.AF_UNIX, unix.SOCK_STREAM, &unix.SockaddrUnix{Name: "@" + given["abstract"]})
	})
	try("make a Unix datagram socket", func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
		unix.Close(fd)
		return err
	})
	try("make a socket pair", func() error {
		_, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
		return err
	})
	try("make a Unix stream socket", func() error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		unix.Close(fd)
		return err
	})

	// Processes.
	try("run /bin/true", func() error { return run("/bin/true") })
	try("run itself", func() error { return run(os.Args[0]) })
	try("fork", func() error {
		r, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			return errno
		}
		if r == 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		_, err := unix.Wait4(int(r), nil, 0, nil)
		return err
	})
	try("trace its parent", func() error {
		result := make(chan error)
		go trace(parent, result)
		return <-result
	})
	try("signal its parent", func() error { return unix.Kill(parent, 0) })
	try("signal a thread of its parent", raw(unix.SYS_TGKILL, uintptr(parent), uintptr(parent), 0))
	try("signal its parent's group", func() error { return unix.Kill(0, 0) })
	try("read its parent's memory", func() error {
		b := make([]byte, 1)
		local := []unix.Iovec{{Base: &b[0], Len: 1}}
		_, err := unix.ProcessVMReadv(parent, local, []unix.RemoteIovec{{Base: 0x10000, Len: 1}}, 0)
		if errors.Is(err, unix.EFAULT) {
			return nil // it was let that far
		}
		return err
	})
	try("limit its parent", func() error {
		var old unix.Rlimit
		if err := unix.Prlimit(parent, unix.RLIMIT_NOFILE, nil, &old); err != nil {
			return err
		}
		return unix.Prlimit(parent, unix.RLIMIT_NOFILE, &old, nil)
	})
	try("outlive its parent", func() error { return unix.Prctl(unix.PR_SET_PDEATHSIG, 0, 0, 0, 0) })
	try("leave the session", raw(unix.SYS_SETSID))

	// The kernel. The arguments are invalid where that is enough to tell.
	page := uintptr(unsafe.Pointer(&make([]byte, 4096)[0]))
	name := append([]byte("x"), 0)
	namep := uintptr(unsafe.Pointer(&name[0]))
	try("memfd_create", raw(unix.SYS_MEMFD_CREATE, namep, 0))
	try("io_uring_setup", raw(unix.SYS_IO_URING_SETUP, 1, page))
	try("bpf", raw(unix.SYS_BPF, 0, page, 16))
	try("perf_event_open", raw(unix.SYS_PERF_EVENT_OPEN, page, 0, ^uintptr(0), ^uintptr(0), 0))
	try("userfaultfd", raw(unix.SYS_USERFAULTFD, 1))
	try("keyctl", raw(unix.SYS_KEYCTL, 0, ^uintptr(2), 0))
	try("mount", func() error { return unix.Mount("none", "/mnt", "tmpfs", 0, "") })
	try("unshare", func() error { return unix.Unshare(unix.CLONE_NEWUSER) })
	try("clone3", raw(unix.SYS_CLONE3, page, 64))
	try("personality", raw(unix.SYS_PERSONALITY, 0xffffffff))

	out, err := json.Marshal(results)
	if err != nil {
		return err.Error()
	}
	return string(out)
}

// trace traces a process from a thread that then ends, which lets go of it: one
// that is not stopped cannot be detached, and stops at its next signal.
func trace(pid int, result chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() { // which does not end
		other := make(chan error)
		go trace(pid, other)
		result <- <-other
		runtime.UnlockOSThread()
		return
	}
	result <- unix.PtraceSeize(pid)
}

func readable(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return f.Close()
}

// run starts a program with what is open: exec.Command would open /dev/null.
func run(path string) error {
	pid, err := syscall.ForkExec(path, []string{path, "nothing"}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
	if err != nil {
		return err
	}
	_, err = syscall.Wait4(pid, nil, 0, nil)
	return err
}

func connect(family, kind int, to unix.Sockaddr) error {
	fd, err := unix.Socket(family, kind, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Connect(fd, to)
}

func inet(port string) unix.Sockaddr {
	n := 0
	for _, c := range port {
		n = n*10 + int(c-'0')
	}
	return &unix.SockaddrInet4{Port: n, Addr: [4]byte{127, 0, 0, 1}}
}

// openDescriptors lists the open descriptors, without a file system to ask.
func openDescriptors() string {
	var b strings.Builder
	for fd := 0; fd < 256; fd++ {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err == nil {
			kind := map[uint32]string{
				unix.S_IFREG: "file", unix.S_IFDIR: "directory", unix.S_IFSOCK: "socket",
				unix.S_IFIFO: "pipe", unix.S_IFCHR: "device",
			}[st.Mode&unix.S_IFMT]
			b.WriteString(kind + " ")
		}
	}
	return b.String()
}

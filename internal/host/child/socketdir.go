package child

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Each plugin has a directory of its own for its socket:
//
//	BASE/instar-UID/PID-N
//
// BASE is $XDG_RUNTIME_DIR, $TMPDIR, /dev/shm (making a directory and a socket
// in memory takes a tenth of the time that it takes on disk) or /tmp. The owner
// of a directory keeps a lock on it, so that a later run can tell what a killed one left behind from
// what another running one uses, also across process id namespaces.
type socketDir struct {
	base string
	path string
	lock *os.File
}

// maxSocketPath is the room in sockaddr_un, less what go-plugin appends
// ("/plugin-dir0123456789/plugin0123456789") and the terminating zero.
const maxSocketPath = 104 - 40

var socketDirs atomic.Int32

func newSocketDir() (*socketDir, error) {
	var errs []error
	for _, base := range baseDirs() {
		d, err := newSocketDirIn(base)
		if err == nil {
			return d, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("directory for the plugin's socket: %w", errors.Join(errs...))
}

func baseDirs() []string {
	name := "instar-" + strconv.Itoa(os.Geteuid())
	var dirs []string
	for _, parent := range []string{os.Getenv("XDG_RUNTIME_DIR"), os.Getenv("TMPDIR"), "/dev/shm", "/tmp"} {
		if !path.IsAbs(parent) || len(parent)+len(name)+24 > maxSocketPath {
			continue
		}
		dir := path.Join(parent, name)
		dirs = append(dirs, dir)
	}
	return dirs
}

func newSocketDirIn(base string) (*socketDir, error) {
	own := path.Join(base, strconv.Itoa(os.Getpid())+"-"+strconv.Itoa(int(socketDirs.Add(1))))
	// Another run may remove an empty base directory between the two calls.
	for try := 0; ; try++ {
		if err := os.Mkdir(base, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		if err := ownAndPrivate(base); err != nil {
			if errors.Is(err, fs.ErrNotExist) && try < 10 {
				continue
			}
			return nil, err
		}
		err := os.Mkdir(own, 0o700)
		if err == nil {
			break
		}
		if errors.Is(err, fs.ErrExist) {
			// Left by a dead process with our process id.
			if err := os.RemoveAll(own); err != nil {
				return nil, err
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if try >= 10 {
			return nil, err
		}
	}
	lock, err := lockDir(own)
	if err != nil {
		os.RemoveAll(own)
		return nil, err
	}
	return &socketDir{base: base, path: own, lock: lock}, nil
}

// ownAndPrivate refuses a directory that somebody else made in a shared
// temporary directory.
func ownAndPrivate(dir string) error {
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s: not a private directory of user %d", dir, os.Geteuid())
	}
	return nil
}

func lockDir(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, &fs.PathError{Op: "flock", Path: path, Err: err}
	}
	return f, nil
}

// remove removes the directory. gone is closed at the end of the process that was
// killed, nil where there was none.
func (d *socketDir) remove(gone <-chan struct{}) {
	// Nearly always one socket and nothing else.
	names, _ := d.lock.Readdirnames(-1)
	for _, name := range names {
		os.Remove(path.Join(d.path, name))
	}
	if err := unix.Rmdir(d.path); err != nil && !errors.Is(err, unix.ENOENT) {
		// It was just making its socket, after the look at what is there.
		if gone != nil {
			select {
			case <-gone:
			case <-time.After(removeTimeout):
			}
		}
		os.RemoveAll(d.path)
	}
	d.lock.Close()
	_ = unix.Rmdir(d.base) // fails, as it should, while others use it
}

// removeTimeout bounds the wait for the end of a process that was killed.
const removeTimeout = 5 * time.Second

// sweepOnce removes what dead runs left wherever that may be, once in a process.
var sweepOnce = sync.OnceFunc(func() {
	for _, base := range baseDirs() {
		if ownAndPrivate(base) == nil {
			Sweep(base)
			_ = unix.Rmdir(base) // fails, as it should, while others use it
		}
	}
})

// Sweep removes from a base directory what dead runs left there.
func Sweep(base string) {
	f, err := os.Open(base)
	if err != nil {
		return
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1)
	for _, name := range names {
		owner, _, _ := strings.Cut(name, "-")
		pid, err := strconv.Atoi(owner)
		if err != nil || pid == os.Getpid() || unix.Kill(pid, 0) != unix.ESRCH {
			continue
		}
		left := path.Join(base, name)
		lock, err := lockDir(left)
		if err != nil {
			continue
		}
		os.RemoveAll(left)
		lock.Close()
	}
}

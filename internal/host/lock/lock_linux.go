package lock

import (
	"errors"
	"fmt"
	"math/bits"
	"os"

	"golang.org/x/sys/unix"
)

func take(f *os.File, path string, held, unshared uint8) error {
	// Lock first, look afterwards: of two that come at the same time at least
	// one sees the other.
	for _, own := range []struct {
		base   int64
		set    uint8
		shared bool
	}{
		{permBase, held, false},
		{unsharedBase, unshared, true},
	} {
		for set := own.set; set != 0; set &= set - 1 {
			n := bits.TrailingZeros8(set)
			err := fcntl(f, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_RDLCK, Start: own.base + int64(n), Len: 1})
			switch {
			case err == nil:
			case missing(err):
				return nil
			case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
				// Some other program has locked the byte for itself alone.
				return &Error{Path: path, Shared: own.shared, Permission: permNames[n]}
			default:
				return fmt.Errorf("lock byte %d: %w", own.base+int64(n), err)
			}
		}
	}
	for _, look := range []struct {
		base   int64
		set    uint8
		shared bool
	}{
		{unsharedBase, held, false}, // does anybody refuse us what we want?
		{permBase, unshared, true},  // has anybody what we refuse?
	} {
		for set := look.set; set != 0; set &= set - 1 {
			n := bits.TrailingZeros8(set)
			l := unix.Flock_t{Type: unix.F_WRLCK, Start: look.base + int64(n), Len: 1}
			if err := fcntl(f, unix.F_OFD_GETLK, &l); err != nil {
				if missing(err) {
					return nil
				}
				return fmt.Errorf("look at the lock of byte %d: %w", look.base+int64(n), err)
			}
			if l.Type != unix.F_UNLCK {
				return &Error{Path: path, Shared: look.shared, Permission: permNames[n]}
			}
		}
	}
	return nil
}

func release(f *os.File) {
	for _, base := range []int64{permBase, unsharedBase} {
		// An unlock of what is not locked succeeds; one that fails leaves a
		// lock that goes with the descriptor.
		_ = fcntl(f, unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_UNLCK, Start: base, Len: int64(len(permNames))})
	}
}

func fcntl(f *os.File, cmd int, l *unix.Flock_t) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var callErr error
	err = conn.Control(func(fd uintptr) {
		for {
			if callErr = unix.FcntlFlock(fd, cmd, l); callErr != unix.EINTR {
				return
			}
		}
	})
	return errors.Join(err, callErr)
}

// missing: there are no OFD locks here.
func missing(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOLCK) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP)
}

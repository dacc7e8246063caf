//go:build unix && !linux

package output

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// What other systems lack is done in a plainer way: see sys_linux.go for the
// contracts.

func openDir(name string, dir *os.File) (*os.File, error) {
	return openat(dir, name, name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
}

func magicLinks(*os.File) bool { return false }

func unnamed(*os.File, string) (*os.File, error) { return nil, errors.ErrUnsupported }

func giveName(_, dir *os.File, tmp, name string) error {
	at := int(dir.Fd())
	if err := unix.Linkat(at, tmp, at, name, 0); err != nil {
		return err
	}
	return unix.Unlinkat(at, tmp, 0)
}

func exchange(int, string, string) error { return errors.ErrUnsupported }

func irreplaceable(_ *os.File, _ string, old *os.File) string {
	var st unix.Stat_t
	if unix.Fstat(int(old.Fd()), &st) == nil && st.Nlink > 1 {
		return "it has other hard links"
	}
	return ""
}

func mayReplace(_, _ *os.File) error { return nil }

func claimDevice(f *os.File) (*os.File, error) { return f, nil }

func deviceSize(f *os.File) (size int64, err error) {
	err = control(f, func(fd int) error {
		size, err = unix.Seek(fd, 0, unix.SEEK_END)
		return err
	})
	return size, err
}

func setNocow(*os.File) error { return errors.ErrUnsupported }

func keepFlags(_, _ *os.File) {}

func setExtentSizeHint(*os.File, int64) error { return errors.ErrUnsupported }

func allocate(*os.File, int64, int64) error { return errors.ErrUnsupported }

func reserveSpace(*os.File, int64, int64) error { return nil }

func punch(*os.File, int64, int64) error { return errors.ErrUnsupported }

func syncDir(dir *os.File) { _ = dir.Sync() }

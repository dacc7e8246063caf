package client

import (
	"os"

	"golang.org/x/sys/unix"
)

// anonymousFile returns memory of a fixed size as a file. It is sealed against
// resizing: neither side can take pages away under the other.
func anonymousFile(size int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("instar-window", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return unlinkedFile(size)
	}
	f := os.NewFile(uintptr(fd), "window")
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

package copier

import (
	"os"

	"golang.org/x/sys/unix"
)

// cloneRange makes a range of dst share the blocks of a range of src.
func cloneRange(dst *os.File, dstOff int64, src *os.File, srcOff, length int64) error {
	to, err := dst.SyscallConn()
	if err != nil {
		return err
	}
	from, err := src.SyscallConn()
	if err != nil {
		return err
	}
	var fromErr, cloneErr error
	err = to.Control(func(dstFd uintptr) {
		fromErr = from.Control(func(srcFd uintptr) {
			arg := unix.FileCloneRange{Src_fd: int64(srcFd), Src_offset: uint64(srcOff), Src_length: uint64(length), Dest_offset: uint64(dstOff)}
			for {
				if cloneErr = unix.IoctlFileCloneRange(int(dstFd), &arg); cloneErr != unix.EINTR {
					return
				}
			}
		})
	})
	for _, e := range []error{err, fromErr} {
		if e != nil {
			return e
		}
	}
	return cloneErr
}

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

// copyRange has the kernel copy a range of src, and returns how much of it was
// copied: it ends at the end of src, and where the kernel will not.
func copyRange(dst *os.File, dstOff int64, src *os.File, srcOff, length int64) (copied int64) {
	to, err := dst.SyscallConn()
	if err != nil {
		return 0
	}
	from, err := src.SyscallConn()
	if err != nil {
		return 0
	}
	// What is left is copied in another way, which reports errors.
	_ = to.Control(func(dstFd uintptr) {
		_ = from.Control(func(srcFd uintptr) {
			for copied < length {
				in, out := srcOff+copied, dstOff+copied
				n, err := unix.CopyFileRange(int(srcFd), &in, int(dstFd), &out, int(min(length-copied, 1<<30)), 0)
				if err == unix.EINTR {
					continue
				}
				if err != nil || n <= 0 {
					return
				}
				copied += int64(n)
			}
		})
	})
	return copied
}

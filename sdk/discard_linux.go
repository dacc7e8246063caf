package sdk

import "golang.org/x/sys/unix"

// Discard makes n bytes at off of a file read as zeros and gives their space
// back. It returns false where it cannot, and the range is to be overwritten.
func Discard(f File, off, n int64) bool {
	o, ok := OSFile(f)
	return ok && unix.Fallocate(int(o.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n) == nil
}

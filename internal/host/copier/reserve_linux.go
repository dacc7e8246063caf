package copier

import (
	"os"

	"golang.org/x/sys/unix"
)

// worthReserving is the least length, in bytes, for which one more system call
// costs less than the file system's accounts of single blocks.
const worthReserving = 64 << 10

// reserves reports whether writing into new blocks of f is faster when they are
// allocated before: ext4 keeps an account of every block that is written and
// has no place yet, and of those in an allocated run one for all. Other file
// systems keep theirs by runs, or compress what was not allocated before.
func reserves(f *os.File) bool {
	var fs unix.Statfs_t
	var stat unix.Stat_t
	ok := false
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		ok = unix.Fstatfs(int(fd), &fs) == nil && unix.Fstat(int(fd), &stat) == nil
	})
	return err == nil && ok && fs.Type == unix.EXT4_SUPER_MAGIC && stat.Mode&unix.S_IFMT == unix.S_IFREG
}

// reserve allocates the blocks of a range of f without changing its length. Where
// that fails, so does the write that follows, or it does not need it.
func reserve(f *os.File, off, length int64) {
	raw, err := f.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		for unix.Fallocate(int(fd), unix.FALLOC_FL_KEEP_SIZE, off, length) == unix.EINTR {
		}
	})
}

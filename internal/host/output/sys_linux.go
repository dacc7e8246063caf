package output

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// openDir opens a directory, as a place only: it need not be readable. name is
// relative to dir; nil is the current directory.
func openDir(name string, dir *os.File) (*os.File, error) {
	return openat(dir, name, name, unix.O_PATH|unix.O_DIRECTORY, 0)
}

// magicLinks reports whether the symbolic links in dir stand for open files.
func magicLinks(dir *os.File) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(dir.Fd()), &st) == nil && st.Type == unix.PROC_SUPER_MAGIC
}

// unnamed makes a file without a name in dir's file system, which can be given
// one in dir; errors call it shown. The error is errors.ErrUnsupported where that does not work.
func unnamed(dir *os.File, shown string) (*os.File, error) {
	f, err := openat(dir, ".", shown, unix.O_TMPFILE|unix.O_RDWR, 0o644)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EINVAL) {
		return nil, errors.ErrUnsupported
	}
	if err != nil {
		return nil, err
	}
	// Without /proc an ordinary user could not give it a name.
	if unix.Access(procName(f), unix.F_OK) != nil {
		f.Close()
		return nil, errors.ErrUnsupported
	}
	return f, nil
}

func procName(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// giveName names f, whose name in dir is tmp so far (empty: none). An existing
// file of that name is an error.
func giveName(f, dir *os.File, tmp, name string) error {
	at := int(dir.Fd())
	if tmp == "" {
		return unix.Linkat(unix.AT_FDCWD, procName(f), at, name, unix.AT_SYMLINK_FOLLOW)
	}
	err := unix.Renameat2(at, tmp, at, name, unix.RENAME_NOREPLACE)
	if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	if err := unix.Linkat(at, tmp, at, name, 0); err != nil {
		return err
	}
	return unix.Unlinkat(at, tmp, 0)
}

// exchange swaps two names. The error is errors.ErrUnsupported where the file
// system cannot.
func exchange(dir int, a, b string) error {
	err := unix.Renameat2(dir, a, dir, b, unix.RENAME_EXCHANGE)
	if errors.Is(err, unix.EINVAL) {
		return errors.ErrUnsupported
	}
	return err
}

// irreplaceable says why no other file may take the place of old, if so.
func irreplaceable(dir *os.File, base string, old *os.File) string {
	var st unix.Statx_t
	if err := unix.Statx(int(old.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_NLINK, &st); err != nil {
		return ""
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		return "it is a mount point"
	}
	if st.Nlink > 1 {
		return "it has other hard links"
	}
	return ""
}

// mayReplace applies the rule of /proc/sys/fs/protected_regular, which the
// kernel applies to an open with O_CREAT: in a sticky directory that all (2:
// or a group) may write, a file of somebody who owns neither is not written.
func mayReplace(dir, old *os.File) error {
	var d, o unix.Stat_t
	if unix.Fstat(int(dir.Fd()), &d) != nil || unix.Fstat(int(old.Fd()), &o) != nil {
		return nil
	}
	if d.Mode&unix.S_ISVTX == 0 || o.Uid == d.Uid || int(o.Uid) == os.Geteuid() {
		return nil
	}
	level, err := os.ReadFile("/proc/sys/fs/protected_regular")
	if err != nil {
		return nil
	}
	level = bytes.TrimSpace(level)
	if d.Mode&0o002 != 0 && string(level) >= "1" || d.Mode&0o020 != 0 && string(level) >= "2" {
		return unix.EACCES
	}
	return nil
}

// claimDevice opens the block device again, for us alone: one that is mounted
// or belongs to another device is busy. f is closed.
func claimDevice(f *os.File) (*os.File, error) {
	claimed, err := openat(nil, procName(f), f.Name(), unix.O_RDWR|unix.O_EXCL|unix.O_NONBLOCK, 0)
	f.Close()
	if err != nil {
		return nil, err
	}
	return claimed, nil
}

// deviceSize returns the capacity of a device, 0 for one that has none.
func deviceSize(f *os.File) (size int64, err error) {
	err = control(f, func(fd int) error {
		size, err = unix.Seek(fd, 0, unix.SEEK_END)
		return err
	})
	return size, err
}

const (
	fsNocowFlag = 0x00800000 // FS_NOCOW_FL
	// What chattr sets and a new file may have too: FS_COMPR_FL, FS_SYNC_FL,
	// FS_NODUMP_FL, FS_NOATIME_FL and FS_NOCOW_FL.
	keptFlags = 0x04 | 0x08 | 0x40 | 0x80 | fsNocowFlag
)

func setNocow(f *os.File) error {
	return control(f, func(fd int) error {
		flags, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		if err != nil {
			return err
		}
		return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, flags|fsNocowFlag)
	})
}

// keepFlags copies the inode flags that a user can set, where that works.
func keepFlags(old, f *os.File) {
	var flags int
	if control(old, func(fd int) (err error) {
		flags, err = unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		return err
	}) != nil || flags&keptFlags == 0 {
		return
	}
	_ = control(f, func(fd int) error {
		own, err := unix.IoctlGetInt(fd, unix.FS_IOC_GETFLAGS)
		if err != nil {
			return err
		}
		return unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, own|flags&keptFlags)
	})
}

// fsxattr is struct fsxattr of <linux/fs.h>.
type fsxattr struct {
	xflags, extsize, nextents, projid, cowextsize uint32
	_                                             [8]byte
}

const (
	fsIocFsgetxattr = 0x801c581f
	fsIocFssetxattr = 0x401c5820
	fsXflagExtsize  = 0x800
)

func setExtentSizeHint(f *os.File, size int64) error {
	if size > math.MaxUint32 {
		return unix.EINVAL
	}
	return control(f, func(fd int) error {
		var x fsxattr
		if err := ioctl(fd, fsIocFsgetxattr, unsafe.Pointer(&x)); err != nil {
			return err
		}
		x.xflags |= fsXflagExtsize
		x.extsize = uint32(size)
		return ioctl(fd, fsIocFssetxattr, unsafe.Pointer(&x))
	})
}

func ioctl(fd int, request uintptr, arg unsafe.Pointer) error {
	if _, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg)); no != 0 {
		return no
	}
	return nil
}

// allocate reserves space for a range of f, whose length grows to its end.
func allocate(f *os.File, off, length int64) error {
	return control(f, func(fd int) error { return unix.Fallocate(fd, 0, off, length) })
}

// reserveSpace reserves space for a range of f and leaves its length as it is.
// Where the file system cannot, it compares with the free space.
func reserveSpace(f *os.File, off, length int64) error {
	err := control(f, func(fd int) error { return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, off, length) })
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	var st unix.Statfs_t
	if err := control(f, func(fd int) error { return unix.Fstatfs(fd, &st) }); err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if more := off + length - fi.Size(); more > 0 && uint64(more)/uint64(st.Bsize) > st.Bavail {
		return unix.ENOSPC
	}
	return nil
}

// punch makes a range of f a hole.
func punch(f *os.File, off, length int64) error {
	return control(f, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE|unix.FALLOC_FL_PUNCH_HOLE, off, length)
	})
}

// syncDir puts the names in dir on stable storage, where its owner lets us.
func syncDir(dir *os.File) {
	if d, err := openat(dir, ".", ".", unix.O_RDONLY|unix.O_DIRECTORY, 0); err == nil {
		_ = d.Sync()
		d.Close()
	}
}

package image

import (
	"io/fs"
	"syscall"

	"github.com/instar-img/instar/internal/host/gate"
	"github.com/instar-img/instar/sdk"
)

// Length is the file's length, or the device's capacity; 0 where unknown.
func (f *File) Length() int64 {
	n, err := sdk.NewFile(f.File).Size()
	if err != nil {
		return 0
	}
	return n
}

// AllocatedSize is the disk space the file occupies, in bytes; -1 where unknown.
func (f *File) AllocatedSize() int64 {
	fi, err := f.Stat()
	if err != nil {
		return -1
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return -1
	}
	return st.Blocks * 512
}

// Protocol is qemu-img's name for what kind of file it is.
func (f *File) Protocol() string {
	if fi, err := f.Stat(); err == nil && fi.Mode()&fs.ModeDevice != 0 {
		return "host_device"
	}
	return "file"
}

// AllocatedSize is the disk space of all the layer's files; -1 where unknown.
func (l *Layer) AllocatedSize() int64 {
	var sum int64
	for i := range l.Files {
		n := l.Files[i].AllocatedSize()
		if n < 0 {
			return -1
		}
		sum += n
	}
	return sum
}

// FullName is where a reference of the layer leads.
func (l *Layer) FullName(ref sdk.Reference) string { return gate.Resolve(l.Path, ref.Name) }

package sdk

import (
	"fmt"
	"io"
	"os"
)

// NewFile makes a File of an open regular file or block device.
func NewFile(f *os.File) File { return osFile{f} }

type osFile struct{ *os.File }

// OSFile returns the descriptor behind a File made by NewFile, or false.
func OSFile(f File) (*os.File, bool) {
	o, ok := f.(osFile)
	return o.File, ok
}

// OnDevice reports whether f is a block device: its size says nothing of what it
// holds, and what was not written is not zero.
func OnDevice(f File) bool {
	o, ok := OSFile(f)
	if !ok {
		return false
	}
	fi, err := o.Stat()
	return err == nil && !fi.Mode().IsRegular()
}

func (f osFile) Size() (int64, error) {
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if fi.Mode().IsRegular() {
		return fi.Size(), nil
	}
	// Descriptors of one open file share their position: nothing here uses it.
	return f.Seek(0, io.SeekEnd)
}

// ReadAtMost reads length bytes at off into memory, after checking that they
// lie inside the file and that length is at most limit. what names the
// structure in errors.
func ReadAtMost(f File, what string, off, length, limit int64) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if length < 0 || length > limit {
		return nil, fmt.Errorf("%s: length %d, at most %d accepted: %w", what, length, limit, ErrCorrupt)
	}
	if off < 0 || off > size || length > size-off {
		return nil, fmt.Errorf("%s: %#x bytes at %#x beyond end of file %#x: %w", what, length, off, size, ErrCorrupt)
	}
	buf := make([]byte, length)
	if _, err := f.ReadAt(buf, off); err != nil {
		return nil, fmt.Errorf("%s: read %#x bytes at %#x: %w", what, length, off, err)
	}
	return buf, nil
}

package output

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/host/errno"
	"github.com/instar-img/instar/sdk"
)

// chunk is how much is copied or zeroed at a time.
const chunk = 1 << 20

// span is a range of a file.
type span struct{ off, length int64 }

// spans returns where f has data, ascending, all of it where the file system
// does not know holes. Between and after them, up to size, f reads as zeros.
func spans(f *os.File) (data []span, size int64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	size = fi.Size()
	for off := int64(0); off < size; {
		start, end, err := nextData(f, off, size)
		if err != nil {
			return nil, 0, err
		}
		if start >= size {
			break
		}
		data = append(data, span{start, end - start})
		off = end
	}
	return data, size, nil
}

// reserve makes sure that the old file can take what f holds, and leaves its
// content and length as they are.
func (fl *file) reserve() error {
	data, size, err := spans(fl.f)
	if err != nil {
		return err
	}
	if fl.prealloc != sdk.PreallocOff {
		data = []span{{0, size}}
	}
	fi, err := fl.old.Stat()
	if err != nil {
		return err
	}
	for _, d := range data {
		if err := reserveSpace(fl.old, d.off, d.length); err != nil {
			// Space beyond the end goes back; the content is untouched.
			return errors.Join(err, fl.old.Truncate(fi.Size()))
		}
	}
	return nil
}

// copyOver gives the old file the content of f. Its space is reserved.
func (fl *file) copyOver() error {
	fl.done = true // from here on there is no way back
	if err := fl.rewrite(); err != nil {
		return &errno.Error{Text: "Could not write '" + fl.path + "', which is incomplete now", Err: err}
	}
	return nil
}

func (fl *file) rewrite() error {
	data, size, err := spans(fl.f)
	if err != nil {
		return err
	}
	if err := fl.old.Truncate(size); err != nil {
		return err
	}
	buf := make([]byte, chunk)
	end := int64(0)
	for _, d := range append(data, span{off: size}) {
		if err := clearRange(fl.old, end, d.off-end, fl.prealloc); err != nil {
			return err
		}
		end = d.off + d.length
		src := io.NewSectionReader(fl.f, d.off, d.length)
		if _, err := io.CopyBuffer(io.NewOffsetWriter(fl.old, d.off), src, buf); err != nil {
			return err
		}
	}
	return fl.old.Sync()
}

// clearRange makes a range of f read as zeros, with or without space behind it.
func clearRange(f *os.File, off, length int64, p sdk.Preallocation) error {
	if length <= 0 {
		return nil
	}
	if p != sdk.PreallocFull {
		err := punch(f, off, length)
		if err == nil && p == sdk.PreallocFalloc {
			err = allocate(f, off, length)
		}
		if err == nil || !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return writeZeros(context.Background(), f, off, length)
}

// preallocate reserves the space of the new file f.
func preallocate(ctx context.Context, f *os.File, length int64, p sdk.Preallocation) error {
	if p == sdk.PreallocOff || length == 0 {
		return nil
	}
	text := "Could not preallocate new data"
	if p == sdk.PreallocFull {
		text = "Could not write zeros for preallocation"
	}
	// Reserved in one piece even when zeros follow: the file system can lay it
	// out well, and a lack of space shows at once.
	err := allocate(f, 0, length)
	if err != nil && !errors.Is(err, errors.ErrUnsupported) {
		return &errno.Error{Text: text, Err: err}
	}
	if err != nil || p == sdk.PreallocFull {
		if err := writeZeros(ctx, f, 0, length); err != nil {
			return &errno.Error{Text: text, Err: err}
		}
	}
	return nil
}

func writeZeros(ctx context.Context, f *os.File, off, length int64) error {
	zeros := make([]byte, chunk)
	for length > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.WriteAt(zeros[:min(length, chunk)], off)
		if err != nil {
			return err
		}
		off, length = off+int64(n), length-int64(n)
	}
	return nil
}

// nextData returns the next run of data of f at or after off; start is size
// where there is none.
func nextData(f *os.File, off, size int64) (start, end int64, err error) {
	err = control(f, func(fd int) error {
		if start, err = unix.Seek(fd, off, unix.SEEK_DATA); err != nil {
			return err
		}
		end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
		return err
	})
	switch {
	case err == nil:
		return start, min(end, size), nil
	case errors.Is(err, unix.ENXIO):
		return size, size, nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, errors.ErrUnsupported):
		return off, size, nil
	}
	return 0, 0, err
}

package formattest

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/instar-img/instar/sdk"
)

// MemFile returns a file of which b is the content. Reads alias b: a test may
// change its bytes between calls. Writes and Truncate work on a copy of their
// own once the file has to grow.
func MemFile(b []byte) sdk.File { return &memFile{b: b} }

// ReadOnly returns f without the right to write: every attempt is an error that
// matches ErrWritten.
func ReadOnly(f sdk.File) sdk.File { return readOnly{f} }

// ErrWritten is what a file opened for reading returns when it is written.
var ErrWritten = errors.New("formattest: write to a file opened for reading")

// maxMemFile bounds what a MemFile may grow to: a plugin that sets a length out
// of a corrupt header must not exhaust the test's memory.
const maxMemFile = 1 << 30

type memFile struct {
	mu sync.RWMutex
	b  []byte
}

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("formattest: read at negative offset %d", off)
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	if off >= int64(len(f.b)) {
		return 0, io.EOF
	}
	n := copy(p, f.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off > maxMemFile || int64(len(p)) > maxMemFile-off {
		return 0, fmt.Errorf("formattest: write of %d bytes at %d", len(p), off)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.grow(off + int64(len(p)))
	return copy(f.b[off:], p), nil
}

func (f *memFile) grow(size int64) {
	if size > int64(len(f.b)) {
		f.b = append(f.b, make([]byte, size-int64(len(f.b)))...)
	}
}

func (f *memFile) Size() (int64, error) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return int64(len(f.b)), nil
}

func (f *memFile) Truncate(size int64) error {
	if size < 0 || size > maxMemFile {
		return fmt.Errorf("formattest: truncate to %d", size)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if size < int64(len(f.b)) {
		f.b = f.b[:size:size]
	}
	f.grow(size)
	return nil
}

func (f *memFile) Sync() error { return nil }

type readOnly struct{ sdk.File }

func (readOnly) WriteAt([]byte, int64) (int, error) { return 0, ErrWritten }
func (readOnly) Truncate(int64) error               { return ErrWritten }

package formattest

import (
	"errors"
	"sync"

	"github.com/instar-img/instar/sdk"
)

// ErrFault is what a Faulty file returns when it fails.
var ErrFault = errors.New("formattest: injected fault")

// Faults counts the operations on a set of files and fails one of them.
type Faults struct {
	mu sync.Mutex
	// Read, Write: which operation fails, counted from 1; 0: none. A write
	// operation is a WriteAt or Sync: that a length cannot be set is no fault on
	// devices.
	Read, Write int
	// Reads, Writes are the operations so far.
	Reads, Writes int
}

// File returns f with its operations counted and failed.
func (c *Faults) File(f sdk.File) sdk.File { return faulty{f, c} }

func (c *Faults) read() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Reads++; c.Reads == c.Read {
		return ErrFault
	}
	return nil
}

func (c *Faults) write() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.Writes++; c.Writes == c.Write {
		return ErrFault
	}
	return nil
}

type faulty struct {
	sdk.File
	faults *Faults
}

func (f faulty) ReadAt(p []byte, off int64) (int, error) {
	if err := f.faults.read(); err != nil {
		return 0, err
	}
	return f.File.ReadAt(p, off)
}

func (f faulty) WriteAt(p []byte, off int64) (int, error) {
	if err := f.faults.write(); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f faulty) Sync() error {
	if err := f.faults.write(); err != nil {
		return err
	}
	return f.File.Sync()
}

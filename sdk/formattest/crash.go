package formattest

import (
	"fmt"
	"slices"
	"sync"

	"github.com/instar-img/instar/sdk"
)

// Recorder keeps the order in which files are written, so that a test can look
// at what a crash would have left.
type Recorder struct {
	mu  sync.Mutex
	ops []operation
}

type operation struct {
	kind byte // 'w'rite, 't'runcate, 's'ync
	off  int64
	data []byte
}

func (op operation) String() string {
	switch op.kind {
	case 'w':
		return fmt.Sprintf("write of %#x bytes at %#x", len(op.data), op.off)
	case 't':
		return fmt.Sprintf("truncation to %#x", op.off)
	}
	return "sync"
}

// File returns f with its writes recorded. One Recorder serves one file.
func (r *Recorder) File(f sdk.File) sdk.File { return recorded{f, r} }

func (r *Recorder) add(op operation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, op)
}

type recorded struct {
	sdk.File
	log *Recorder
}

func (f recorded) WriteAt(p []byte, off int64) (int, error) {
	f.log.add(operation{'w', off, slices.Clone(p)})
	return f.File.WriteAt(p, off)
}

func (f recorded) Truncate(size int64) error {
	f.log.add(operation{kind: 't', off: size})
	return f.File.Truncate(size)
}

func (f recorded) Sync() error {
	f.log.add(operation{kind: 's'})
	return f.File.Sync()
}

// Crashes calls visit with every state in which a crash could have left a file
// that held before: each prefix of what was done to it, whole and with any one
// operation since the last sync missing. state is visit's to keep.
func (r *Recorder) Crashes(before []byte, visit func(what string, state []byte)) {
	synced := 0
	for n := 0; n <= len(r.ops); n++ {
		visit(fmt.Sprintf("after %d of %d operations", n, len(r.ops)), r.replay(before, n, -1))
		if n < len(r.ops) && r.ops[n].kind == 's' {
			synced = n + 1
		}
		for missing := synced; missing < n-1; missing++ {
			if r.ops[missing].kind != 's' {
				visit(fmt.Sprintf("after %d of %d operations without the %s", n, len(r.ops), r.ops[missing]), r.replay(before, n, missing))
			}
		}
	}
}

func (r *Recorder) replay(before []byte, n, missing int) []byte {
	f := MemFile(slices.Clone(before)).(*memFile)
	for i, op := range r.ops[:n] {
		if i == missing {
			continue
		}
		var err error
		switch op.kind {
		case 'w':
			_, err = f.WriteAt(op.data, op.off)
		case 't':
			err = f.Truncate(op.off)
		}
		if err != nil {
			panic(err) // it went well the first time
		}
	}
	return f.b
}

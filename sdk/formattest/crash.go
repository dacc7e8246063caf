package formattest

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"

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

// Crash is a state in which a crash could have left a file.
type Crash struct {
	What  string // what was done to the file, and what of that is missing
	Lost  bool   // something is missing that was done before something else
	State []byte
}

// Crashes calls visit with every state in which a crash could have left a file
// that held before: each prefix of what was done to it, whole, with any one
// operation since the last sync missing, and with all writes since then missing
// but the last. The state is visit's to keep.
func (r *Recorder) Crashes(before []byte, visit func(Crash)) {
	synced := 0
	for n := 0; n <= len(r.ops); n++ {
		what := fmt.Sprintf("after %d of %d operations", n, len(r.ops))
		visit(Crash{what, false, r.replay(before, n, func(int) bool { return false })})
		if n > 0 && r.ops[n-1].kind == 's' {
			synced = n
		}
		for missing := synced; missing < n-1; missing++ {
			state := r.replay(before, n, func(i int) bool { return i == missing })
			visit(Crash{what + " without the " + r.ops[missing].String(), true, state})
		}
		if n-synced > 2 {
			state := r.replay(before, n, func(i int) bool { return i >= synced && i < n-1 && r.ops[i].kind == 'w' })
			visit(Crash{what + " without the writes before the last", true, state})
		}
	}
}

// replay does n operations, but for the missing ones.
func (r *Recorder) replay(before []byte, n int, missing func(i int) bool) []byte {
	f := MemFile(slices.Clone(before)).(*memFile)
	for i, op := range r.ops[:n] {
		if missing(i) {
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

// Overwrite writes into an image that holds something, and looks at what a crash
// on the way would have left.
type Overwrite struct {
	Format sdk.Format
	Before []byte    // the image, in one file
	Below  []byte    // what the guest reads where the image has nothing; nil: zeros
	Runs   []sdk.Run // are filled with the byte 3, one after the other
	Zeros  sdk.Run   // becomes zeros then
	// Compressed encodes the runs instead of placing them.
	Compressed bool
}

// Crashes wants every state to be an image in which each byte is old or new, and
// the content to be the new one when nothing is lost. visit sees each state, too.
// It returns how many there were.
func (o Overwrite) Crashes(t testing.TB, visit func(Crash)) (states int) {
	t.Helper()
	old, err := ReadState(o.Format, o.Before, o.Below)
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Clone(old)
	var log Recorder
	if err := o.write(log.File(MemFile(slices.Clone(o.Before))), want); err != nil {
		t.Fatal(err)
	}
	var last []byte
	log.Crashes(o.Before, func(c Crash) {
		states++
		got, err := ReadState(o.Format, c.State, o.Below)
		if err != nil {
			t.Errorf("%s: %v", c.What, err)
			return
		}
		for i := range got {
			if got[i] != old[i] && got[i] != want[i] {
				t.Errorf("%s: byte %#x is %d, was %d and became %d", c.What, i, got[i], old[i], want[i])
				break
			}
		}
		visit(c)
		if !c.Lost {
			last = got
		}
	})
	if !slices.Equal(last, want) {
		t.Error("nothing lost, and yet the content is not the new one")
	}
	return states
}

// write writes to the image in file, and to content, the guest's view of it.
func (o Overwrite) write(file sdk.File, content []byte) error {
	ctx := context.Background()
	img, err := o.Format.Open(ctx, sdk.OpenRequest{ReadWrite: true, Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}})
	if err != nil {
		return err
	}
	w := img.(sdk.Writer)
	info, err := w.BeginWrite(ctx, sdk.WriteRequest{Compressed: o.Compressed})
	if err != nil {
		return err
	}
	for _, run := range o.Runs {
		copy(content[run.Offset:], bytes.Repeat([]byte{3}, int(run.Length)))
		if o.Compressed {
			var units []sdk.Unit
			for off := run.Offset; off < run.Offset+run.Length; off += info.Unit {
				units = append(units, sdk.Unit{Offset: off, Data: content[off:][:info.Unit]})
			}
			if err := w.Encode(ctx, units); err != nil {
				return err
			}
			continue
		}
		places, err := w.Place(ctx, []sdk.Run{run})
		if err != nil {
			return err
		}
		for _, p := range places {
			if _, err := file.WriteAt(bytes.Repeat([]byte{3}, int(p.Length)), p.HostOffset); err != nil {
				return err
			}
		}
	}
	if err := w.Zero(ctx, []sdk.Run{o.Zeros}); err != nil {
		return err
	}
	clear(content[o.Zeros.Offset : o.Zeros.Offset+o.Zeros.Length])
	return w.Finish(ctx)
}

// openState opens the image in a file that holds state, for reading.
func openState(f sdk.Format, state []byte, check bool) (sdk.Image, []sdk.NamedFile, error) {
	files := []sdk.NamedFile{{Role: sdk.RoleMain, File: ReadOnly(MemFile(state))}}
	img, err := f.Open(context.Background(), sdk.OpenRequest{Files: files, Check: check})
	return img, files, err
}

// ReadState returns what the guest reads of the image in a file that holds
// state, over below.
func ReadState(f sdk.Format, state, below []byte) ([]byte, error) {
	ctx := context.Background()
	img, files, err := openState(f, state, false)
	if err != nil {
		return nil, err
	}
	info, err := img.Info(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]byte, info.VirtualSize)
	copy(out, below)
	return out, readOver(ctx, img, files, 0, out)
}

// CheckState checks the image in a file that holds state, and returns what was
// found.
func CheckState(f sdk.Format, state []byte) (*sdk.CheckResult, []string, error) {
	img, _, err := openState(f, state, true)
	if err != nil {
		return nil, nil, err
	}
	var found []string
	r, err := img.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Message: func(s string) { found = append(found, s) }})
	return r, found, err
}

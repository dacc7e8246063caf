package formattest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/instar-img/instar/sdk"
)

// Recorder keeps the order in which the files of an image are written, so that a
// test can look at what a crash would have left.
type Recorder struct {
	mu     sync.Mutex
	before [][]byte
	ops    []operation
}

type operation struct {
	kind byte // 'w'rite, 't'runcate, 's'ync
	file int
	off  int64
	data []byte
}

func (op operation) String() string {
	text := "sync"
	switch op.kind {
	case 'w':
		text = fmt.Sprintf("write of %#x bytes at %#x", len(op.data), op.off)
	case 't':
		text = fmt.Sprintf("truncation to %#x", op.off)
	}
	if op.file > 0 {
		text += fmt.Sprintf(" of file %d", op.file)
	}
	return text
}

// File returns f with its writes recorded, as the next file of the image. What
// it holds now is on stable storage.
func (r *Recorder) File(f sdk.File) sdk.File {
	size, err := f.Size()
	b := make([]byte, max(size, 0))
	if err == nil && size > 0 {
		_, err = f.ReadAt(b, 0)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		panic(err) // a MemFile, or a file of the test's own
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before = append(r.before, b)
	return recorded{f, r, len(r.before) - 1}
}

func (r *Recorder) add(op operation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ops = append(r.ops, op)
}

// Mark returns how many operations there have been.
func (r *Recorder) Mark() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.ops)
}

type recorded struct {
	sdk.File
	log  *Recorder
	file int
}

func (f recorded) WriteAt(p []byte, off int64) (int, error) {
	f.log.add(operation{'w', f.file, off, slices.Clone(p)})
	return f.File.WriteAt(p, off)
}

func (f recorded) Truncate(size int64) error {
	f.log.add(operation{kind: 't', file: f.file, off: size})
	return f.File.Truncate(size)
}

func (f recorded) Sync() error {
	f.log.add(operation{kind: 's', file: f.file})
	return f.File.Sync()
}

// Crash is a state in which a crash could have left the files of an image.
type Crash struct {
	What string // what was done to the files, and what of that is missing
	Done int    // how many operations were begun
	// Lost: something is missing that was done before something else, as after a
	// power cut. A process that is killed loses nothing, but for the end of the
	// write that it was in.
	Lost   bool
	State  []byte   // the main file
	Others [][]byte // the further files
}

// sectorSize is what a disk writes whole or not at all.
const sectorSize = 512

// part is what is left of an operation.
type part struct {
	gone bool
	// keep, where not nil, says which sectors of a write are there: of the grid on
	// the file, by how many sectors after the first one written.
	keep func(sector, sectors int) bool
}

// tears are the ways in which a write of several sectors may be cut.
var tears = []struct {
	what string
	keep func(i, n int) bool
}{
	{"its first sector alone", func(i, _ int) bool { return i == 0 }},
	{"its first half alone", func(i, n int) bool { return i < (n+1)/2 }},
	{"all of it but the last sector", func(i, n int) bool { return i < n-1 }},
	{"all of it but the first sector", func(i, _ int) bool { return i > 0 }},
	{"every second sector of it", func(i, _ int) bool { return i%2 == 1 }},
}

const (
	// singles is how many operations are missing alone at each point, at most:
	// random ones where there are more.
	singles = 12
	// subsets is how many random choices of what is lost are tried at each point.
	subsets = 3
)

// Crashes calls visit with the states in which a crash could have left the files:
// each prefix of what was done to them, whole; with the last write torn at its
// sectors; and of what was done to a file since its last sync any one operation
// missing (a sample, where there are many), all writes but the last, and random
// ones, missing or torn. The states
// are visit's to keep.
func (r *Recorder) Crashes(visit func(Crash)) {
	rng := rand.New(rand.NewPCG(1, uint64(len(r.ops))))
	for n := 0; n <= len(r.ops); n++ {
		what := fmt.Sprintf("after %d of %d operations", n, len(r.ops))
		see := func(what string, lost bool, left func(i int) part) {
			states := r.replay(n, left)
			visit(Crash{what, n, lost, states[0], states[1:]})
		}
		whole := func(int) part { return part{} }
		see(what, false, whole)
		if n == 0 {
			continue
		}
		last := r.ops[n-1]
		if sectors := last.sectors(); sectors > 1 {
			for i, tear := range tears {
				if sectors == 2 && i > 0 && i < 3 {
					continue // the same as the first
				}
				lost := tear.keep(sectors-1, sectors) // a write ends early, or its sectors are reordered
				see(what+", of the "+last.String()+" "+tear.what, lost, func(i int) part {
					if i == n-1 {
						return part{keep: tear.keep}
					}
					return part{}
				})
			}
		}
		loose := r.loose(n)
		for _, k := range rng.Perm(len(loose))[:min(len(loose), singles)] {
			if missing := loose[k]; missing < n-1 {
				see(what+" without the "+r.ops[missing].String(), true, func(i int) part { return part{gone: i == missing} })
			}
		}
		if len(loose) < 3 {
			continue
		}
		see(what+" without the writes before the last", true, func(i int) part {
			return part{gone: i < n-1 && r.ops[i].kind == 'w' && slices.Contains(loose, i)}
		})
		for range subsets {
			fate := map[int]part{}
			var text []string
			for _, i := range loose {
				switch rng.IntN(4) {
				case 0:
					fate[i] = part{gone: true}
					text = append(text, fmt.Sprint("not ", i))
				case 1:
					if r.ops[i].sectors() > 1 {
						t := tears[rng.IntN(len(tears))]
						fate[i] = part{keep: t.keep}
						text = append(text, fmt.Sprint("of ", i, " ", t.what))
					}
				}
			}
			see(what+": "+strings.Join(text, ", "), true, func(i int) part { return fate[i] })
		}
	}
}

// loose returns which of the first n operations no sync has made last.
func (r *Recorder) loose(n int) []int {
	synced := make([]int, len(r.before))
	for i, op := range r.ops[:n] {
		if op.kind == 's' {
			synced[op.file] = i
		}
	}
	var out []int
	for i, op := range r.ops[:n] {
		if op.kind != 's' && i >= synced[op.file] {
			out = append(out, i)
		}
	}
	return out
}

// sectors is how many sectors a write touches.
func (op operation) sectors() int {
	if op.kind != 'w' || len(op.data) == 0 {
		return 0
	}
	return int((op.off+int64(len(op.data))-1)/sectorSize-op.off/sectorSize) + 1
}

// replay does what is left of n operations.
func (r *Recorder) replay(n int, left func(i int) part) [][]byte {
	files := make([]*memFile, len(r.before))
	for i, b := range r.before {
		files[i] = MemFile(slices.Clone(b)).(*memFile)
	}
	for i, op := range r.ops[:n] {
		p := left(i)
		if p.gone {
			continue
		}
		var err error
		switch f := files[op.file]; {
		case op.kind == 't':
			err = f.Truncate(op.off)
		case op.kind == 'w' && p.keep == nil:
			_, err = f.WriteAt(op.data, op.off)
		case op.kind == 'w':
			for at := 0; at < len(op.data) && err == nil; {
				sector := (op.off + int64(at)) / sectorSize
				end := min(len(op.data), int((sector+1)*sectorSize-op.off))
				if p.keep(int(sector-op.off/sectorSize), op.sectors()) {
					_, err = f.WriteAt(op.data[at:end], op.off+int64(at))
				}
				at = end
			}
		}
		if err != nil {
			panic(err) // it went well the first time
		}
	}
	states := make([][]byte, len(files))
	for i, f := range files {
		states[i] = f.b
	}
	return states
}

// Overwrite writes into an image that holds something, and looks at what a crash
// on the way would have left.
type Overwrite struct {
	Format sdk.Format
	Before []byte    // the image's main file
	Others [][]byte  // its further files, in the order of its references
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
	old, err := ReadState(o.Format, o.Below, o.Before, o.Others...)
	if err != nil {
		t.Fatal(err)
	}
	want := slices.Clone(old)
	var log Recorder
	var files []sdk.File
	for _, b := range append([][]byte{o.Before}, o.Others...) {
		files = append(files, log.File(MemFile(slices.Clone(b))))
	}
	if err := o.write(files, want); err != nil {
		t.Fatal(err)
	}
	var last []byte
	log.Crashes(func(c Crash) {
		states++
		got, err := ReadState(o.Format, o.Below, c.State, c.Others...)
		if err != nil {
			t.Errorf("%s: %v", c.What, err)
			return
		}
		if i := strange(got, old, want); i >= 0 {
			t.Errorf("%s: byte %#x is %d, was %d and became %d", c.What, i, got[i], old[i], want[i])
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

// strange returns where got is neither old nor new, -1 where that is nowhere.
func strange(got, old, new []byte) int {
	if len(got) != len(old) || len(got) != len(new) {
		return min(len(got), len(old), len(new)) - 1
	}
	const chunk = 4096
	for at := 0; at < len(got); at += chunk {
		end := min(at+chunk, len(got))
		if bytes.Equal(got[at:end], old[at:end]) || bytes.Equal(got[at:end], new[at:end]) {
			continue
		}
		for i := at; i < end; i++ {
			if got[i] != old[i] && got[i] != new[i] {
				return i
			}
		}
	}
	return -1
}

// write writes to the image in files, and to content, the guest's view of it.
func (o Overwrite) write(all []sdk.File, content []byte) error {
	ctx := context.Background()
	img, files, err := openFiles(o.Format, all, sdk.OpenRequest{ReadWrite: true})
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
			if _, err := files[p.File].File.WriteAt(bytes.Repeat([]byte{3}, int(p.Length)), p.HostOffset); err != nil {
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

// Fresh makes an image and writes into it, as create and convert do, and looks at
// what a crash on the way would have left.
type Fresh struct {
	Format     sdk.Format
	Options    string
	Size       int64
	Compressed bool
	// Stream: the format has no tables before its end, and nothing can be read
	// before the image is whole.
	Stream bool
}

// Crashes wants the image to be whole when nothing is missing, and from when it
// was made on, whatever of the operations had happened when the process was
// killed, to hold at each byte zero or what is written (convert -n). In every
// state it must be survived. visit sees each state, with whether the image had
// been made. It returns how many there were.
func (o Fresh) Crashes(t testing.TB, visit func(c Crash, made bool)) (states int) {
	t.Helper()
	plan, err := TryPlan(t, o.Format, t.TempDir(), "image", o.Size, o.Options, func(req *sdk.CreateRequest) {
		reproducible(req)
		req.Compressed = o.Compressed
	})
	if err != nil {
		t.Fatal(err)
	}
	var log Recorder
	var files []sdk.File
	var named []sdk.NamedFile
	for _, want := range plan.Info().Files {
		f := MemFile(nil)
		if err := f.Truncate(want.Length); err != nil {
			t.Fatal(err)
		}
		files = append(files, log.File(f))
		named = append(named, sdk.NamedFile{Role: want.Role, File: files[len(files)-1]})
	}
	if err := plan.Emit(context.Background(), named); err != nil {
		t.Fatal(err)
	}
	made := log.Mark()
	content, err := o.write(files)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files { // the core does, before it gives names
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	zeros := make([]byte, len(content))
	log.Crashes(func(c Crash) {
		states++
		got, err := ReadState(o.Format, nil, c.State, c.Others...)
		switch whole := !c.Lost && c.Done == log.Mark(); {
		case whole && (err != nil || !bytes.Equal(got, content)):
			t.Errorf("%s: content differs (%v)", c.What, err)
		case c.Lost || c.Done < made || o.Stream:
		case err != nil:
			t.Errorf("%s: %v", c.What, err)
		default:
			if i := strange(got, zeros, content); i >= 0 {
				t.Errorf("%s: byte %#x is %d, neither zero nor %d", c.What, i, got[i], content[i])
			}
		}
		visit(c, c.Done >= made)
	})
	return states
}

// write fills the image as the core does: places are asked for ahead of reading
// where the format allows that, many at once, and those that nothing was written
// to are given back before more is asked for, and at the end.
func (o Fresh) write(all []sdk.File) (content []byte, err error) {
	ctx := context.Background()
	img, files, err := openFiles(o.Format, all, sdk.OpenRequest{ReadWrite: true})
	if err != nil {
		return nil, err
	}
	w := img.(sdk.Writer)
	info, err := w.BeginWrite(ctx, sdk.WriteRequest{Compressed: o.Compressed, Reproducible: true})
	if err != nil {
		return nil, err
	}
	image, err := img.Info(ctx)
	if err != nil {
		return nil, err
	}
	content = make([]byte, image.VirtualSize)
	// Not more than some 32 pieces, of whole units.
	piece := info.Unit * max(image.VirtualSize/info.Unit/32, 1)
	pieces := (image.VirtualSize + piece - 1) / piece
	run := func(i int64) sdk.Run {
		return sdk.Run{Offset: i * piece, Length: min(piece, image.VirtualSize-i*piece)}
	}
	// Of the pieces half hold something; the last does.
	held := func(i int64) bool { return i%4 < 2 || i == pieces-1 }
	for i := range pieces {
		if r := run(i); held(i) {
			copy(content[r.Offset:], pattern(uint64(i), int(r.Length)))
		}
	}
	const batch = 8
	var back []sdk.Run
	for first := int64(0); first < pieces; first += batch {
		var runs []sdk.Run
		var encode []sdk.Unit
		for i := first; i < min(first+batch, pieces); i++ {
			r := run(i)
			for off := r.Offset; held(i) && off < r.Offset+r.Length; off += info.Unit {
				encode = append(encode, sdk.Unit{Offset: off, Data: content[off:][:min(info.Unit, r.Offset+r.Length-off)]})
			}
			if held(i) || info.Ahead {
				runs = append(runs, r)
			}
			if !held(i) && info.Ahead {
				back = append(back, r)
			}
		}
		if o.Compressed || info.EncodeOnly {
			if err := w.Encode(ctx, encode); err != nil {
				return nil, err
			}
			continue
		}
		places, err := w.Place(ctx, runs)
		if err != nil {
			return nil, err
		}
		for _, p := range places {
			for off := p.Offset; off < p.Offset+p.Length; {
				r := run(off / piece)
				n := min(r.Offset+r.Length, p.Offset+p.Length) - off
				if held(off / piece) {
					if _, err := files[p.File].File.WriteAt(content[off:][:n], p.HostOffset+off-p.Offset); err != nil {
						return nil, err
					}
				}
				off += n
			}
		}
		if len(back) > 0 && first > 0 {
			if err := w.Zero(ctx, back); err != nil {
				return nil, err
			}
			back = nil
		}
	}
	if len(back) > 0 {
		if err := w.Zero(ctx, back); err != nil {
			return nil, err
		}
	}
	return content, w.Finish(ctx)
}

// openFiles opens an image and attaches its further files, in the order of its
// references. A backing file is none of them.
func openFiles(f sdk.Format, all []sdk.File, req sdk.OpenRequest) (sdk.Image, []sdk.NamedFile, error) {
	ctx := context.Background()
	files := []sdk.NamedFile{{Role: sdk.RoleMain, File: all[0]}}
	req.Files, req.Name = files, "image"
	img, err := f.Open(ctx, req)
	if err != nil || len(all) == 1 {
		return img, files, err
	}
	info, err := img.Info(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, ref := range info.References {
		if ref.Kind != sdk.RefBacking && len(files) < len(all) {
			files = append(files, sdk.NamedFile{Role: ref.Role, File: all[len(files)]})
		}
	}
	return img, files, img.(sdk.Attacher).Attach(ctx, files[1:])
}

// openState opens the image in files that hold states, for reading.
func openState(f sdk.Format, states [][]byte, check bool) (sdk.Image, []sdk.NamedFile, error) {
	var all []sdk.File
	for _, b := range states {
		all = append(all, ReadOnly(MemFile(b)))
	}
	return openFiles(f, all, sdk.OpenRequest{Check: check})
}

// ReadState returns what the guest reads, over below, of the image in a main file
// that holds state, and others that hold others.
func ReadState(f sdk.Format, below, state []byte, others ...[]byte) ([]byte, error) {
	ctx := context.Background()
	img, files, err := openState(f, append([][]byte{state}, others...), false)
	if err != nil {
		return nil, err
	}
	info, err := img.Info(ctx)
	if err != nil {
		return nil, err
	}
	if info.VirtualSize > maxMemFile {
		return nil, fmt.Errorf("disk of %d bytes: %w", info.VirtualSize, sdk.ErrTooBig)
	}
	out := make([]byte, info.VirtualSize)
	copy(out, below)
	return out, readOver(ctx, img, files, 0, out)
}

// CheckState checks the image in files that hold the states, and returns what was
// found.
func CheckState(f sdk.Format, state []byte, others ...[]byte) (*sdk.CheckResult, []string, error) {
	img, _, err := openState(f, append([][]byte{state}, others...), true)
	if err != nil {
		return nil, nil, err
	}
	var found []string
	r, err := img.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Message: func(s string) { found = append(found, s) }})
	return r, found, err
}

package copier

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/client"
)

// disk is a source made of known content.
type disk struct {
	content []byte
	extents []Extent
	unit    int64
	batch   int
}

func (d *disk) source() *Source {
	return &Source{Size: int64(len(d.content)), Unit: d.unit, Map: func(ctx context.Context, off, length int64, yield func([]Extent) bool) error {
		var out []Extent
		for _, e := range d.extents {
			from, to := max(e.Offset, off), min(e.Offset+e.Length, off+length)
			if from >= to {
				continue
			}
			part := e.from(from - e.Offset)
			part.Length = to - from
			if out = append(out, part); len(out) >= d.batch {
				if !yield(out) {
					return nil
				}
				out = out[:0]
			}
		}
		if len(out) > 0 {
			yield(out)
		}
		return nil
	}}
}

var ones = bytes.Repeat([]byte{0xff}, 4<<20)

// xorDecoder decodes what is stored inverted.
type xorDecoder struct{ file *os.File }

func (x *xorDecoder) Decode(_ context.Context, e sdk.Extent, dst []byte) error {
	if int64(len(dst)) != e.Length {
		return fmt.Errorf("%d bytes for %d", len(dst), e.Length)
	}
	if _, err := x.file.ReadAt(dst, e.HostOffset); err != nil {
		return err
	}
	subtle.XORBytes(dst, dst, ones[:len(dst)])
	return nil
}

// windowDecoder decodes into windows, of its own only.
type windowDecoder struct {
	xorDecoder
	mu      sync.Mutex
	windows []*client.Window
}

func (d *windowDecoder) NewWindow(size int) (*client.Window, error) {
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil, err
	}
	w := &client.Window{Mem: mem}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.windows = append(d.windows, w)
	return w, nil
}

func (d *windowDecoder) DecodeWindow(ctx context.Context, w *client.Window, items []client.DecodeItem) ([]error, error) {
	d.mu.Lock()
	mine := slices.Contains(d.windows, w)
	d.mu.Unlock()
	if !mine {
		return nil, errors.New("another's window")
	}
	errs := make([]error, len(items))
	for i, it := range items {
		errs[i] = d.Decode(ctx, it.Extent, w.Mem[it.WindowOffset:][:it.Extent.Length])
	}
	return errs, nil
}

// newDisk makes a disk of random extents of all kinds.
func newDisk(t *testing.T, r *rand.Rand, size, unit int64) *disk {
	t.Helper()
	d := &disk{content: make([]byte, size), unit: unit, batch: 1 + r.IntN(40)}
	plain, err := os.Create(filepath.Join(t.TempDir(), "plain"))
	if err != nil {
		t.Fatal(err)
	}
	packed, err := os.Create(filepath.Join(t.TempDir(), "packed"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { plain.Close(); packed.Close() })
	decoders := []sdk.Decoder{&xorDecoder{packed}, &windowDecoder{xorDecoder: xorDecoder{packed}}, &windowDecoder{xorDecoder: xorDecoder{packed}}}
	host := int64(0)
	for pos := int64(0); pos < size; {
		n := min(1+r.Int64N(1<<uint(9+r.IntN(13))), size-pos)
		if r.IntN(2) == 0 {
			n = min((n+4095)&^4095, size-pos)
		}
		e := Extent{Offset: pos, Length: n, Kind: Kind(r.IntN(3)), Allocated: true}
		b := d.content[pos : pos+n]
		switch e.Kind {
		case Data:
			if r.IntN(4) != 0 { // else zeros that only reading shows
				fill(r, b)
				clear(b[len(b)/3 : len(b)/2])
			}
			e.File, e.HostOffset = plain, host+pos%4096
			if _, err := plain.WriteAt(b, e.HostOffset); err != nil {
				t.Fatal(err)
			}
			host = (e.HostOffset + n + 4095) &^ 4095
		case Encoded:
			fill(r, b)
			inverted := make([]byte, n)
			subtle.XORBytes(inverted, b, ones[:n])
			at := pos
			if _, err := packed.WriteAt(inverted, at); err != nil {
				t.Fatal(err)
			}
			whole := sdk.Extent{Offset: pos, Length: n, Kind: sdk.Encoded, HostOffset: at, EncodedLength: n}
			e.Decoder, e.Encoded = decoders[r.IntN(len(decoders))], whole
			if cut := n / 2; cut > 0 && r.IntN(4) == 0 { // in two parts
				first := e
				first.Length = cut
				d.extents = append(d.extents, first)
				e = e.from(cut)
			}
		}
		d.extents = append(d.extents, e)
		pos += n
	}
	return d
}

func fill(r *rand.Rand, b []byte) {
	x := r.Uint64() | 1
	for len(b) >= 8 {
		binary.LittleEndian.PutUint64(b, x)
		x = x*6364136223846793005 + 1442695040888963407
		b = b[8:]
	}
	for i := range b {
		b[i] = byte(x>>(8*i)) | 1
	}
}

// fakeTarget is a format with units of any size, which checks what it is asked.
type fakeTarget struct {
	t          *testing.T
	unit, size int64
	readsZero  bool
	encodeOnly bool
	ahead      bool // places are taken back, in any order
	inPlace    bool
	files      []*os.File
	fresh      bool
	old        []byte // what is read where nothing was stored, nil: zeros

	mu       sync.Mutex
	r        *rand.Rand
	next     []int64
	units    map[int64]place
	last     int64 // where the last request ended
	finished bool
	placed   int64
	spare    []place // given back
	back     int64   // bytes given back
}

type place struct {
	file int
	host int64
	data []byte // encoded
	zero bool
}

func newTarget(t *testing.T, r *rand.Rand, size, unit int64, files int) *fakeTarget {
	f := &fakeTarget{t: t, unit: unit, size: size, readsZero: true, fresh: true, units: map[int64]place{}, r: r, next: make([]int64, files)}
	for i := range files {
		file, err := os.Create(filepath.Join(t.TempDir(), fmt.Sprint("target", i)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { file.Close() })
		f.files = append(f.files, file)
	}
	return f
}

// soil makes the files hold old content that must not show.
func (f *fakeTarget) soil() {
	f.fresh = false
	junk := bytes.Repeat([]byte{0xAA}, 1<<20)
	for _, file := range f.files {
		for off := int64(0); off < 2*f.size+f.unit; off += 1 << 20 {
			if _, err := file.WriteAt(junk, off); err != nil {
				f.t.Fatal(err)
			}
		}
	}
}

func (f *fakeTarget) target() *Target {
	return &Target{Writer: f, Files: f.files, Size: f.size, Fresh: f.fresh}
}

func (f *fakeTarget) BeginWrite(context.Context, sdk.WriteRequest) (sdk.WriteInfo, error) {
	return sdk.WriteInfo{Unit: f.unit, ReadsZero: f.readsZero, EncodeOnly: f.encodeOnly, Ahead: f.ahead, InPlace: f.inPlace}, nil
}

// each checks a run and calls do for its units.
func (f *fakeTarget) each(what string, r sdk.Run, do func(off, length int64)) {
	if r.Offset%f.unit != 0 || r.Length <= 0 || r.Offset+r.Length > f.size || (r.Offset+r.Length)%f.unit != 0 && r.Offset+r.Length != f.size {
		f.t.Errorf("%s of %+v: units of %d, disk of %d", what, r, f.unit, f.size)
	}
	if r.Offset < f.last {
		f.t.Errorf("%s of %+v after one that ended at %d", what, r, f.last)
	}
	f.last = r.Offset + r.Length
	for off := r.Offset; off < r.Offset+r.Length; off += f.unit {
		if _, ok := f.units[off]; ok {
			f.t.Errorf("%s of unit %d, which has been written", what, off)
		}
		do(off, min(f.unit, r.Offset+r.Length-off))
	}
}

func (f *fakeTarget) Place(_ context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.inPlace {
		f.t.Errorf("asked to place %v", runs)
	}
	var out []sdk.Placement
	for _, r := range runs {
		f.each("placing", r, func(off, length int64) {
			file := f.r.IntN(len(f.files))
			host := f.next[file]
			if n := len(f.spare); n > 0 {
				file, host = f.spare[n-1].file, f.spare[n-1].host
				f.spare = f.spare[:n-1]
			} else {
				f.next[file] += f.unit
			}
			f.units[off] = place{file: file, host: host}
			f.placed += length
			if n := len(out); n > 0 && out[n-1].File == file && out[n-1].Offset+out[n-1].Length == off && out[n-1].HostOffset+out[n-1].Length == host {
				out[n-1].Length += length
			} else {
				out = append(out, sdk.Placement{Offset: off, Length: length, File: file, HostOffset: host})
			}
		})
	}
	return out, nil
}

func (f *fakeTarget) Zero(_ context.Context, runs []sdk.Run) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, r := range runs {
		if f.ahead && r.Offset < f.last {
			f.takeBack(r)
			continue
		}
		f.each("zeroing", r, func(off, length int64) { f.units[off] = place{zero: true} })
	}
	return nil
}

// takeBack frees places into which nothing may have been written.
func (f *fakeTarget) takeBack(r sdk.Run) {
	for off := r.Offset; off < r.Offset+r.Length; off += f.unit {
		p, ok := f.units[off]
		if !ok || p.zero {
			f.t.Errorf("unit %d, which has no place, is given back", off)
			continue
		}
		b := make([]byte, f.unit)
		if _, err := f.files[p.file].ReadAt(b, p.host); err != nil && !errors.Is(err, io.EOF) {
			f.t.Error(err)
		}
		if !isZero(b) {
			f.t.Errorf("unit %d, in which something was written, is given back", off)
		}
		delete(f.units, off)
		f.spare = append(f.spare, p)
		f.back += f.unit
	}
}

func (f *fakeTarget) Encode(_ context.Context, units []sdk.Unit) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, u := range units {
		if int64(len(u.Data)) != min(f.unit, f.size-u.Offset) {
			f.t.Errorf("encoding %d bytes at %d", len(u.Data), u.Offset)
		}
		f.each("encoding", sdk.Run{Offset: u.Offset, Length: int64(len(u.Data))}, func(off, length int64) {
			f.units[off] = place{data: bytes.Clone(u.Data)}
		})
	}
	return nil
}

func (f *fakeTarget) Finish(context.Context) error {
	f.finished = true
	return nil
}

// content is what the target's disk reads as.
func (f *fakeTarget) content() []byte {
	out := make([]byte, f.size)
	copy(out, f.old)
	if f.inPlace {
		clear(out)
		if _, err := f.files[0].ReadAt(out, 0); err != nil && !errors.Is(err, io.EOF) {
			f.t.Error(err)
		}
	}
	for off, p := range f.units {
		b := out[off:min(off+f.unit, f.size)]
		clear(b)
		switch {
		case p.data != nil:
			copy(b, p.data)
		case !p.zero:
			if _, err := f.files[p.file].ReadAt(b, p.host); err != nil && !errors.Is(err, io.EOF) {
				f.t.Error(err)
			}
		}
	}
	return out
}

func (f *fakeTarget) holds(content []byte) {
	f.t.Helper()
	if !f.finished {
		f.t.Error("not finished")
	}
	got := f.content()
	if !bytes.Equal(got[:len(content)], content) || !isZero(got[len(content):]) {
		for i := range got {
			if i >= len(content) && got[i] != 0 || i < len(content) && got[i] != content[i] {
				f.t.Fatalf("content differs from byte %d on", i)
			}
		}
	}
}

// Whatever the units, the kinds of extents and the way of writing, the target
// reads as the source.
func TestCopyKeepsContent(t *testing.T) {
	for seed := range uint64(96) {
		r := rand.New(rand.NewPCG(seed, 1))
		unit := []int64{512, 4096, 65536, 1 << 20, 2 << 20, 3 << 19, 8 << 20, 65536}[r.IntN(8)]
		size := 1 + r.Int64N(6<<20)
		opts := Options{Sparse: []int64{0, 512, 4096, 4096, 65536, 16 << 20}[r.IntN(6)], Workers: 1 + r.IntN(4)}
		mode := []string{"fresh", "fresh", "soiled", "backed", "is zero", "encoded", "encode only", "encoded, backed", "ahead", "ahead", "ahead", "in place"}[r.IntN(12)]
		t.Run(fmt.Sprintf("%d: %s, unit %d, size %d, sparse %d", seed, mode, unit, size, opts.Sparse), func(t *testing.T) {
			d := newDisk(t, r, size, []int64{0, 65536, 2 << 20}[r.IntN(3)])
			f := newTarget(t, r, size+r.Int64N(3)*r.Int64N(5<<20), unit, 1+r.IntN(3))
			switch mode {
			case "soiled":
				f.readsZero = false
				f.soil()
				f.old = bytes.Repeat([]byte{0xAA}, int(f.size))
			case "is zero":
				f.readsZero = false
				opts.TargetIsZero = true
				f.soil()
			case "backed", "encoded, backed":
				f.readsZero = false
				base := newDisk(t, r, 1+r.Int64N(f.size), 0)
				n := min(len(base.content), len(d.content))
				if n > 1<<20 {
					// A part that both have, stored apart.
					share(t, d, base, 1<<18, int64(n)-1<<19)
				}
				f.old = base.content
				opts.Base = base.source()
				opts.Compressed = mode != "backed"
			case "encoded":
				opts.Compressed = true
			case "encode only":
				f.encodeOnly = true
			case "ahead":
				f.ahead = true
			case "in place":
				f.inPlace = true
			}
			opts.Offload = r.IntN(3) == 0
			var mu sync.Mutex
			done := int64(0)
			opts.Progress = func(n, total int64) {
				mu.Lock()
				defer mu.Unlock()
				done = max(done, n)
				if n > total || total != f.size {
					t.Errorf("progress %d of %d", n, total)
				}
			}
			if _, err := Copy(context.Background(), d.source(), f.target(), opts); err != nil {
				t.Fatal(err)
			}
			f.holds(d.content)
			if done != f.size {
				t.Errorf("progress ended at %d of %d", done, f.size)
			}
		})
	}
}

// share makes the range of b hold what a has there.
func share(t *testing.T, a, b *disk, off, length int64) {
	t.Helper()
	copy(b.content[off:off+length], a.content[off:off+length])
	file, err := os.Create(filepath.Join(t.TempDir(), "shared"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	if _, err := file.WriteAt(b.content, 0); err != nil {
		t.Fatal(err)
	}
	b.extents = []Extent{{Length: int64(len(b.content)), Kind: Data, File: file, Allocated: true}}
}

// Units of zeros are not stored, nor those that the base has.
func TestCopyStoresNoMoreThanNeeded(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const unit, size = 65536, 8 << 20
	content := make([]byte, size)
	fill(r, content[1<<20:1<<20+100])
	fill(r, content[4<<20-1:4<<20+1])
	d := rawDisk(t, content)
	f := newTarget(t, r, size, unit, 1)
	stats, err := Copy(context.Background(), d.source(), f.target(), Options{Sparse: DefaultSparse, NoClone: true})
	if err != nil {
		t.Fatal(err)
	}
	f.holds(content)
	if f.placed != 3*unit || stats.Written != 3*4096 {
		t.Errorf("placed %d, wrote %+v", f.placed, stats)
	}

	base := rawDisk(t, content)
	changed := slices.Clone(content)
	changed[5<<20] ^= 1
	clear(changed[4<<20 : 4<<20+1])
	f = newTarget(t, r, size, unit, 1)
	f.readsZero, f.old = false, content
	if _, err := Copy(context.Background(), rawDisk(t, changed).source(), f.target(), Options{Sparse: DefaultSparse, Base: base.source()}); err != nil {
		t.Fatal(err)
	}
	f.holds(changed)
	if f.placed != unit || !f.units[4<<20].zero {
		t.Errorf("over a base: placed %d, unit that became zeros %+v", f.placed, f.units[4<<20])
	}

	// Holes of the source stay holes, whatever the least run of zeros.
	f = newTarget(t, r, size, 4096, 1)
	holes := rawDisk(t, content)
	first := holes.extents[0]
	first.Length = 1<<20 + 4096
	last := holes.extents[0].from(4<<20 - 4096)
	last.Length = 8192
	holes.extents = []Extent{first, {Offset: first.Length, Length: last.Offset - first.Length}, last,
		{Offset: 4<<20 + 4096, Length: size - 4<<20 - 4096}}
	if _, err := Copy(context.Background(), holes.source(), f.target(), Options{Sparse: 64 << 20, NoClone: true}); err != nil {
		t.Fatal(err)
	}
	f.holds(content)
	if want := int64(4096 + 8192); f.placed != want {
		t.Errorf("large runs of zeros: placed %d, want %d", f.placed, want)
	}

	// What is the same storage is not even read.
	same := base.source()
	base.extents[0].File.Close()
	f = newTarget(t, r, size, unit, 1)
	f.readsZero, f.old = false, content
	if _, err := Copy(context.Background(), same, f.target(), Options{Sparse: DefaultSparse, Base: base.source()}); err != nil {
		t.Fatal(err)
	}
	f.holds(content)
	if f.placed != 0 {
		t.Errorf("over itself: placed %d", f.placed)
	}
}

// Behind the source's end old content stays, in its last unit too.
func TestCopyKeepsTail(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for _, unit := range []int64{512, 65536, 8 << 20} {
		old := make([]byte, 20<<20)
		fill(r, old)
		content := make([]byte, 3<<20+512)
		fill(r, content[:1<<20])
		f := newTarget(t, r, int64(len(old)), unit, 1)
		f.readsZero, f.fresh, f.old = false, false, old
		dst := f.target()
		dst.Old = rawDisk(t, old).source()
		var total int64
		progress := func(_, n int64) { total = n }
		if _, err := Copy(context.Background(), rawDisk(t, content).source(), dst, Options{Sparse: DefaultSparse, Workers: 1, Progress: progress}); err != nil {
			t.Fatal(err)
		}
		f.holds(append(content, old[len(content):]...))
		if want := (int64(len(content)) + unit - 1) / unit * unit; total != want {
			t.Errorf("units of %d: %d bytes in all, want %d", unit, total, want)
		}
	}
}

// What is placed before it is read and turns out to be zeros is given back, and
// where there is much of that nothing is placed ahead any more.
func TestCopyAhead(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	const unit, size = 65536, 64 << 20
	content := make([]byte, size)
	for off := 0; off < size; off += 2 << 20 {
		fill(r, content[off:off+1<<20])
	}
	for _, c := range []struct {
		name  string
		zeros int64 // that are given back, at least
		most  int64
		opts  Options
	}{
		{"much", wasteful, wasteful + 2*aheadSize + 64<<20/wastefulShare, Options{Sparse: DefaultSparse, NoClone: true}},
		{"reproducible", 0, 0, Options{Sparse: DefaultSparse, NoClone: true, Reproducible: true}},
	} {
		f := newTarget(t, r, size, unit, 1)
		f.ahead = true
		if _, err := Copy(context.Background(), rawDisk(t, content).source(), f.target(), c.opts); err != nil {
			t.Fatal(err)
		}
		f.holds(content)
		if f.back < c.zeros || f.back > c.most {
			t.Errorf("%s: %d bytes given back, want %d to %d", c.name, f.back, c.zeros, c.most)
		}
		if got := f.placed - f.back; got != size/2 {
			t.Errorf("%s: %d bytes placed and kept, want %d", c.name, got, size/2)
		}
	}
}

// rawDisk is a disk of one file.
func rawDisk(t *testing.T, content []byte) *disk {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "raw"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	if _, err := file.WriteAt(content, 0); err != nil {
		t.Fatal(err)
	}
	return &disk{content: content, batch: 100, extents: []Extent{{Length: int64(len(content)), Kind: Data, File: file, Allocated: true}}}
}

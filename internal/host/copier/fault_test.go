package copier

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk"
)

var errBroken = errors.New("broken")

// brokenTarget fails or lies in one of its methods.
type brokenTarget struct {
	*fakeTarget
	how    string
	cancel context.CancelFunc
}

func (b *brokenTarget) BeginWrite(ctx context.Context, req sdk.WriteRequest) (sdk.WriteInfo, error) {
	info, err := b.fakeTarget.BeginWrite(ctx, req)
	switch b.how {
	case "begin":
		err = errBroken
	case "no unit":
		info.Unit = 0
	case "negative unit":
		info.Unit = -65536
	}
	return info, err
}

func (b *brokenTarget) Place(ctx context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	p, err := b.fakeTarget.Place(ctx, runs)
	last := len(p) - 1
	switch b.how {
	case "place":
		err = errBroken
	case "nothing placed":
		p = nil
	case "too little":
		p[last].Length--
	case "too much":
		p = append(p, p[last])
	case "elsewhere":
		p[0].Offset += 512
	case "no such file":
		p[last].File = len(b.files)
	case "negative file":
		p[last].File = -1
	case "negative offset":
		p[0].HostOffset = -4096
	case "vast offset":
		p[0].HostOffset = 1<<63 - 1
	case "cancel":
		b.cancel()
	}
	return p, err
}

func (b *brokenTarget) Zero(ctx context.Context, runs []sdk.Run) error {
	if b.how == "zero" {
		return errBroken
	}
	return b.fakeTarget.Zero(ctx, runs)
}

func (b *brokenTarget) Encode(ctx context.Context, units []sdk.Unit) error {
	if b.how == "encode" {
		return errBroken
	}
	return b.fakeTarget.Encode(ctx, units)
}

func (b *brokenTarget) Finish(ctx context.Context) error {
	if b.how == "finish" {
		return errBroken
	}
	return b.fakeTarget.Finish(ctx)
}

// Whatever a target does, Copy ends with an error.
func TestTargetsThatFailOrLie(t *testing.T) {
	for how, want := range map[string]error{
		"begin": errBroken, "place": errBroken, "zero": errBroken, "encode": errBroken, "finish": errBroken,
		"no unit": sdk.ErrInvalid, "negative unit": sdk.ErrInvalid, "cancel": context.Canceled,
		"nothing placed": sdk.ErrCorrupt, "too little": sdk.ErrCorrupt, "too much": sdk.ErrCorrupt, "elsewhere": sdk.ErrCorrupt,
		"no such file": sdk.ErrCorrupt, "negative file": sdk.ErrCorrupt, "negative offset": sdk.ErrCorrupt, "vast offset": sdk.ErrCorrupt,
	} {
		t.Run(how, func(t *testing.T) {
			r := rand.New(rand.NewPCG(1, 1))
			d := newDisk(t, r, 5<<20, 0)
			f := newTarget(t, r, 6<<20, 65536, 2)
			f.readsZero, f.fresh = how != "zero", how != "zero"
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			target := f.target()
			target.Writer = &brokenTarget{fakeTarget: f, how: how, cancel: cancel}
			_, err := Copy(ctx, d.source(), target, Options{Sparse: DefaultSparse, Compressed: how == "encode"})
			if !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
			if f.finished {
				t.Error("finished all the same")
			}
		})
	}
}

// Sources that lie about their extents.
func TestSourcesThatLie(t *testing.T) {
	content := make([]byte, 1<<20)
	content[5] = 1
	raw := rawDisk(t, content).extents[0]
	at := func(off, length int64) Extent {
		e := raw
		e.Offset, e.Length = off, length
		return e
	}
	beyond := raw
	beyond.Kind, beyond.Decoder, beyond.Encoded = Encoded, &xorDecoder{raw.File}, sdk.Extent{Length: 512}
	vast := beyond
	vast.Encoded.Length = 1 << 40
	for name, extents := range map[string][]Extent{
		"beyond the end":                {at(0, 2<<20)},
		"negative offset":               {at(-512, 1024)},
		"empty":                         {at(0, 0), at(0, 1<<20)},
		"negative length":               {at(0, -1)},
		"overflow":                      {at(1<<20-512, 1<<63-1)},
		"encoded, shorter than it says": {beyond},
		"encoded, vast":                 {vast},
		"a byte each":                   bytewise(raw),
	} {
		src := &Source{Size: 1 << 20, Map: func(_ context.Context, _, _ int64, yield func([]Extent) bool) error {
			yield(extents)
			return nil
		}}
		f := newTarget(t, rand.New(rand.NewPCG(1, 1)), 1<<20, 65536, 1)
		if _, err := Copy(context.Background(), src, f.target(), Options{Sparse: DefaultSparse}); !errors.Is(err, sdk.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	f := newTarget(t, rand.New(rand.NewPCG(1, 1)), 512, 512, 1)
	if _, err := Copy(context.Background(), rawDisk(t, content).source(), f.target(), Options{}); !errors.Is(err, sdk.ErrTooBig) {
		t.Errorf("larger than the target: %v", err)
	}
	failing := &Source{Size: 1 << 20, Map: func(context.Context, int64, int64, func([]Extent) bool) error { return errBroken }}
	f = newTarget(t, rand.New(rand.NewPCG(1, 1)), 1<<20, 512, 1)
	if _, err := Copy(context.Background(), failing, f.target(), Options{}); !errors.Is(err, errBroken) {
		t.Errorf("failing map: %v", err)
	}
}

// bytewise maps a disk in extents of a byte.
func bytewise(e Extent) []Extent {
	var out []Extent
	for off := range e.Length {
		part := e.from(off)
		part.Length = 1
		out = append(out, part)
	}
	return out
}

func TestReadAndWriteErrors(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	d := newDisk(t, r, 5<<20, 0)
	i := slices.IndexFunc(d.extents, func(e Extent) bool { return e.Kind == Data })
	good := d.extents[i].File
	d.extents[i].File = unreadable(t)
	f := newTarget(t, r, 5<<20, 65536, 1)
	_, err := Copy(context.Background(), d.source(), f.target(), Options{Sparse: DefaultSparse})
	if !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "error while reading at byte") || f.finished {
		t.Errorf("%v", err)
	}
	d.extents[i].File = good
	f = newTarget(t, r, 5<<20, 65536, 1)
	target := f.target()
	if target.Files[0], err = os.Open(os.DevNull); err != nil {
		t.Fatal(err)
	}
	defer target.Files[0].Close()
	_, err = Copy(context.Background(), d.source(), target, Options{Sparse: DefaultSparse})
	if !errors.Is(err, unix.EBADF) || !strings.Contains(err.Error(), "error while writing at byte") || f.finished {
		t.Errorf("%v", err)
	}
}

// brokenDecoder cannot decode at some offsets.
type brokenDecoder struct{ xorDecoder }

func (b *brokenDecoder) Decode(ctx context.Context, e sdk.Extent, dst []byte) error {
	if e.Offset >= 1<<20 {
		return errBroken
	}
	return b.xorDecoder.Decode(ctx, e, dst)
}

// With salvage what cannot be read is zeros, and all the rest is there.
func TestSalvage(t *testing.T) {
	content := make([]byte, 3<<20)
	fill(rand.New(rand.NewPCG(1, 1)), content)
	d := rawDisk(t, content)
	whole := d.extents[0]
	cut := func(off, length int64) Extent {
		e := whole.from(off)
		e.Length = length
		return e
	}
	bad := cut(100<<10, 2048)
	bad.File = unreadable(t)
	encoded := cut(1<<20, 4096)
	encoded.Kind, encoded.Decoder, encoded.Encoded, encoded.Skip = Encoded, &brokenDecoder{xorDecoder{whole.File}}, sdk.Extent{Offset: 1 << 20, Length: 4096}, 0
	d.extents = []Extent{cut(0, 100<<10), bad, cut(100<<10+2048, 1<<20-100<<10-2048), encoded, cut(1<<20+4096, 2<<20-4096)}

	var mu sync.Mutex
	var lost []sdk.Run
	opts := Options{Sparse: DefaultSparse, Salvage: func(off, length int64, err error) {
		mu.Lock()
		defer mu.Unlock()
		if !errors.Is(err, unix.EBADF) && !errors.Is(err, errBroken) {
			t.Errorf("%v", err)
		}
		lost = append(lost, sdk.Run{Offset: off, Length: length})
	}}
	f := newTarget(t, rand.New(rand.NewPCG(1, 1)), 3<<20, 65536, 1)
	if _, err := Copy(context.Background(), d.source(), f.target(), opts); err != nil {
		t.Fatal(err)
	}
	clear(content[100<<10:][:2048])
	clear(content[1<<20:][:4096])
	f.holds(content)
	slices.SortFunc(lost, func(a, b sdk.Run) int { return int(a.Offset - b.Offset) })
	var runs []sdk.Run
	for _, l := range lost {
		runs = join(runs, l.Offset, l.Length)
	}
	if !slices.Equal(runs, []sdk.Run{{Offset: 100 << 10, Length: 2048}, {Offset: 1 << 20, Length: 4096}}) {
		t.Errorf("lost %v", lost)
	}
}

func TestRateLimit(t *testing.T) {
	l := limiter{rate: 1 << 20}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := l.wait(ctx, 1<<30); err != nil {
		t.Errorf("the first is let through: %v", err)
	}
	if err := l.wait(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("after 1024 seconds' worth: %v", err)
	}
	free := limiter{}
	if err := free.wait(ctx, 1<<40); err != nil {
		t.Errorf("no limit: %v", err)
	}
	r := rand.New(rand.NewPCG(3, 3))
	d := newDisk(t, r, 3<<20, 0)
	f := newTarget(t, r, 3<<20, 65536, 1)
	if _, err := Copy(context.Background(), d.source(), f.target(), Options{Sparse: DefaultSparse, Rate: 1 << 30}); err != nil {
		t.Fatal(err)
	}
	f.holds(d.content)
}

func TestStream(t *testing.T) {
	for seed := range uint64(8) {
		r := rand.New(rand.NewPCG(seed, 5))
		d := newDisk(t, r, 1+r.Int64N(5<<20), 0)
		var out bytes.Buffer
		if err := Stream(context.Background(), d.source(), &out, Options{}); err != nil || !bytes.Equal(out.Bytes(), d.content) {
			t.Errorf("%d bytes of %d, %v", out.Len(), len(d.content), err)
		}
	}
	d := rawDisk(t, make([]byte, 40<<20))
	if err := Stream(context.Background(), d.source(), brokenWriter{}, Options{}); !errors.Is(err, errBroken) {
		t.Errorf("%v", err)
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

// Several sources, parts of them and padding read as they should.
func TestConcatSlicePad(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 9))
	a, b, c := newDisk(t, r, 70001, 0), newDisk(t, r, 1<<20+3, 0), newDisk(t, r, 1, 0)
	content := slices.Concat(a.content, b.content, c.content)
	all := Pad(Concat(a.source(), b.source(), c.source()), int64(len(content))+5000)
	content = append(content, make([]byte, 5000)...)
	for range 30 {
		off := r.Int64N(int64(len(content)))
		n := 1 + r.Int64N(int64(len(content))-off)
		var out bytes.Buffer
		if err := Stream(context.Background(), Slice(all, off, n), &out, Options{}); err != nil || !bytes.Equal(out.Bytes(), content[off:off+n]) {
			t.Errorf("%d bytes from %d: %d, %v", n, off, out.Len(), err)
		}
	}
	var out bytes.Buffer
	if err := Stream(context.Background(), Slice(all, 0, 0), &out, Options{}); err != nil || out.Len() != 0 {
		t.Errorf("nothing: %d, %v", out.Len(), err)
	}
}

// On a file system that can, blocks are shared, and only whole ones.
func TestCloneOnXFS(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a file system")
	}
	if _, err := exec.LookPath("mkfs.xfs"); err != nil {
		t.Skip("mkfs.xfs is missing (Debian package xfsprogs)")
	}
	dir := t.TempDir()
	at := filepath.Join(dir, "mnt")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	img := filepath.Join(dir, "image")
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, 400<<20); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"mkfs.xfs", "-q", "-m", "reflink=1", img}, {"mount", "-o", "loop", img, at}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Skipf("%v does not work here: %v: %s", args, err, out)
		}
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	// Files of the test lie there, and are closed before it is unmounted.
	t.Setenv("TMPDIR", at)
	t.Run("copies", func(t *testing.T) {
		for seed := range uint64(12) {
			r := rand.New(rand.NewPCG(seed, 11))
			unit := []int64{4096, 65536, 1 << 20, 8 << 20, 512}[r.IntN(5)]
			d := newDisk(t, r, 1+r.Int64N(12<<20), 0)
			raw := rawDisk(t, d.content)
			for _, src := range []*disk{d, raw} {
				f := newTarget(t, r, int64(len(d.content))+r.Int64N(1<<20), unit, 2)
				stats, err := Copy(context.Background(), src.source(), f.target(), Options{Sparse: DefaultSparse})
				if err != nil {
					t.Fatal(err)
				}
				f.holds(d.content)
				if src == raw && unit >= 4096 && len(d.content) > 8192 && stats.Cloned == 0 {
					t.Errorf("seed %d, unit %d: %+v", seed, unit, stats)
				}
			}
		}
	})
}

// The work is that of the data, not of the size of the disk.
func TestSparseDiskOfTerabytes(t *testing.T) {
	const size = 4 << 40
	content := make([]byte, 1<<20)
	fill(rand.New(rand.NewPCG(1, 1)), content)
	raw := rawDisk(t, content).extents[0]
	src := &Source{Size: size, Map: func(_ context.Context, off, length int64, yield func([]Extent) bool) error {
		var batch []Extent
		for i := range int64(200) {
			e := raw
			e.Offset = i * (size / 200) / 4096 * 4096
			batch = append(batch, e)
		}
		yield(batch)
		return nil
	}}
	w := &countingWriter{info: sdk.WriteInfo{Unit: 65536, ReadsZero: true}}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	stats, err := Copy(context.Background(), src, &Target{Writer: w, Files: []*os.File{null}, Size: size, Fresh: true}, Options{Sparse: DefaultSparse, NoClone: true})
	if err != nil || stats.Written != 200<<20 {
		t.Errorf("%+v, %v", stats, err)
	}
}

type countingWriter struct {
	info sdk.WriteInfo
	next int64
}

func (w *countingWriter) BeginWrite(context.Context, sdk.WriteRequest) (sdk.WriteInfo, error) {
	return w.info, nil
}

func (w *countingWriter) Place(_ context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	var out []sdk.Placement
	for _, r := range runs {
		out = append(out, sdk.Placement{Offset: r.Offset, Length: r.Length, HostOffset: w.next})
		w.next += r.Length
	}
	return out, nil
}

func (w *countingWriter) Zero(context.Context, []sdk.Run) error    { return nil }
func (w *countingWriter) Encode(context.Context, []sdk.Unit) error { return io.ErrUnexpectedEOF }
func (w *countingWriter) Finish(context.Context) error             { return nil }

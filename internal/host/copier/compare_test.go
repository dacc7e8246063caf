package copier

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// restore lays out content in another way.
func restore(t *testing.T, r *rand.Rand, content []byte) *disk {
	t.Helper()
	d := newDisk(t, r, int64(len(content)), 65536)
	raw := rawDisk(t, content)
	var out []Extent
	for _, e := range d.extents {
		e = Extent{Offset: e.Offset, Length: e.Length, Kind: Data, File: raw.extents[0].File, HostOffset: e.Offset, Allocated: true}
		if isZero(content[e.Offset : e.Offset+e.Length]) {
			e = Extent{Offset: e.Offset, Length: e.Length}
		}
		out = append(out, e)
	}
	return &disk{content: content, extents: out, batch: d.batch}
}

func TestCompare(t *testing.T) {
	for seed := range uint64(40) {
		r := rand.New(rand.NewPCG(seed, 7))
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			a := newDisk(t, r, 1+r.Int64N(6<<20), []int64{0, 65536, 2 << 20}[r.IntN(3)])
			b := restore(t, r, a.content)
			opts := CompareOptions{}
			var last atomic.Int64
			opts.Progress = func(done, total int64) {
				if last.Store(max(done, last.Load())); done > total {
					t.Errorf("progress %d of %d", done, total)
				}
			}
			if diff, err := Compare(context.Background(), a.source(), b.source(), opts); err != nil || diff.Verdict != Identical {
				t.Fatalf("the same content: %+v, %v", diff, err)
			}
			if last.Load() != int64(len(a.content)) {
				t.Errorf("progress ended at %d of %d", last.Load(), len(a.content))
			}
			opts.Progress = nil
			// Several differences: the first counts.
			other := slices.Clone(a.content)
			first := int64(len(other))
			for range 1 + r.IntN(3) {
				at := r.Int64N(int64(len(other)))
				other[at] ^= byte(1 + r.IntN(255))
				first = min(first, at)
			}
			diff, err := Compare(context.Background(), restore(t, r, other).source(), a.source(), opts)
			if err != nil || diff != (Comparison{DifferentContent, first &^ 511}) {
				t.Errorf("got %+v, %v, want %d", diff, err, first&^511)
			}
			// Beyond the end of the shorter are zeros.
			longer := append(slices.Clone(a.content), make([]byte, 700000)...)
			if diff, err := Compare(context.Background(), a.source(), restore(t, r, longer).source(), opts); err != nil || diff.Verdict != Identical {
				t.Errorf("zeros at the end: %+v, %v", diff, err)
			}
			longer[len(longer)-1] = 1
			if diff, err := Compare(context.Background(), restore(t, r, longer).source(), a.source(), opts); err != nil || diff != (Comparison{DifferentContent, int64(len(longer)-1) &^ 511}) {
				t.Errorf("data at the end: %+v, %v", diff, err)
			}
		})
	}
}

func TestCompareStrict(t *testing.T) {
	content := make([]byte, 1<<20)
	content[0], content[900000] = 1, 1
	raw := rawDisk(t, content)
	thin := &disk{content: content, batch: 10, extents: []Extent{
		{Length: 65536, Kind: Data, File: raw.extents[0].File, Allocated: true, Located: true},
		{Offset: 65536, Length: 1<<20 - 65536 - 524288},
		{Offset: 524288, Length: 524288, Kind: Data, File: raw.extents[0].File, HostOffset: 524288, Allocated: true, Located: true},
	}}
	raw.located()
	if diff, err := Compare(context.Background(), raw.source(), thin.source(), CompareOptions{}); err != nil || diff.Verdict != Identical {
		t.Errorf("%+v, %v", diff, err)
	}
	strict := CompareOptions{Strict: true}
	if diff, err := Compare(context.Background(), raw.source(), thin.source(), strict); err != nil || diff != (Comparison{DifferentStatus, 65536}) {
		t.Errorf("%+v, %v", diff, err)
	}
	if diff, err := Compare(context.Background(), thin.source(), thin.source(), strict); err != nil || diff.Verdict != Identical {
		t.Errorf("with itself: %+v, %v", diff, err)
	}
	// A difference in content before one in status is what is found.
	changed := slices.Clone(content)
	changed[600] = 7
	if diff, err := Compare(context.Background(), rawDisk(t, changed).located().source(), thin.source(), strict); err != nil || diff != (Comparison{DifferentContent, 512}) {
		t.Errorf("%+v, %v", diff, err)
	}
	if diff, err := Compare(context.Background(), rawDisk(t, make([]byte, 512)).source(), thin.source(), strict); err != nil || diff.Verdict != DifferentSize {
		t.Errorf("sizes: %+v, %v", diff, err)
	}
}

func (d *disk) located() *disk {
	for i := range d.extents {
		d.extents[i].Located = true
	}
	return d
}

// unreadable is a descriptor from which nothing can be read.
func unreadable(t *testing.T) *os.File {
	t.Helper()
	f, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestCompareReadError(t *testing.T) {
	good := rawDisk(t, make([]byte, 1<<20))
	bad := rawDisk(t, make([]byte, 1<<20))
	bad.extents[0].File = unreadable(t)
	for i, sources := range [][2]*disk{{bad, good}, {good, bad}} {
		_, err := Compare(context.Background(), sources[0].source(), sources[1].source(), CompareOptions{})
		var ce *CompareError
		if !errors.As(err, &ce) || ce.Second != (i == 1) || ce.Map || !errors.Is(err, unix.EBADF) {
			t.Errorf("%v", err)
		}
	}
}

func TestCompareCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	d := rawDisk(t, make([]byte, 1<<20))
	if _, err := Compare(ctx, d.source(), rawDisk(t, make([]byte, 1<<20)).source(), CompareOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/sdk"
)

// fake is an image with a fixed map.
type fake struct{ extents []sdk.Extent }

func (f *fake) Info(context.Context) (*sdk.Info, error) { return nil, nil }
func (f *fake) Close() error                            { return nil }

func (f *fake) Map(_ context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	for _, e := range f.extents {
		from, to := max(e.Offset, off), min(e.Offset+e.Length, off+length)
		if from >= to {
			continue
		}
		if e.HostOffset >= 0 && e.Kind != sdk.Encoded {
			e.HostOffset += from - e.Offset
		}
		if e.Kind != sdk.Encoded {
			e.Offset, e.Length = from, to-from
		}
		if !yield([]sdk.Extent{e}) {
			return nil
		}
	}
	return nil
}

// layer makes a layer of lines "LENGTH KIND HOST".
func layer(t *testing.T, path, lines string) *Layer {
	t.Helper()
	f := &fake{}
	var at int64
	for _, line := range strings.Split(strings.TrimSpace(lines), ";") {
		var length, host int64
		var kind string
		if _, err := fmt.Sscan(line, &length, &kind, &host); err != nil {
			t.Fatal(err)
		}
		e := sdk.Extent{Offset: at, Length: length, HostOffset: host}
		switch kind {
		case "absent":
		case "zero":
			e.Kind = sdk.Zero
		case "data":
			e.Kind = sdk.Data
		case "sparse":
			e.Kind, e.Sparse = sdk.Data, true
		case "encoded":
			e.Kind, e.EncodedLength = sdk.Encoded, 7
		default:
			t.Fatal(kind)
		}
		f.extents = append(f.extents, e)
		at += length
	}
	return &Layer{
		Path: path, Image: f, Info: &sdk.Info{VirtualSize: at}, Files: []File{{Role: sdk.RoleMain, Path: path}},
		Plugin: &discover.Plugin{Manifest: sdk.Manifest{Name: "fake"}},
	}
}

// mapped collects a chain's map as lines.
func mapped(t *testing.T, c *Chain, off, length int64) []string {
	t.Helper()
	var out []string
	at := off
	err := c.Map(context.Background(), off, length, func(batch []Extent) bool {
		for _, e := range batch {
			if e.Offset != at || e.Length <= 0 {
				t.Errorf("extent at %d, %d bytes, where %d is next", e.Offset, e.Length, at)
			}
			at = e.Offset + e.Length
			out = append(out, fmt.Sprintf("%d+%d %d@%d depth %d", e.Offset, e.Length, e.Kind, e.HostOffset, e.Depth))
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	if at != off+length {
		t.Errorf("the map ends at %d, not %d", at, off+length)
	}
	return out
}

func TestMapOfChain(t *testing.T) {
	top := layer(t, "top", "10 absent -1; 10 data 100; 10 zero -1; 10 zero 300; 60 absent -1")
	mid := layer(t, "mid", "5 data 50; 25 absent -1; 20 encoded 400; 10 absent -1")
	base := layer(t, "base", "5 data 0; 5 data 90; 40 data 95; 5 absent -1")
	for _, c := range []struct {
		name        string
		chain       *Chain
		off, length int64
		want        []string
	}{
		{"one layer", &Chain{Layers: []*Layer{base}}, 0, 55, []string{
			"0+5 2@0 depth 0", "5+45 2@90 depth 0", "50+5 0@-1 depth 0", // neighbours joined
		}},
		{"all", &Chain{Layers: []*Layer{top, mid, base}}, 0, 100, []string{
			"0+5 2@50 depth 1", "5+5 2@90 depth 2", "10+10 2@100 depth 0", "20+10 1@-1 depth 0", "30+10 1@300 depth 0",
			"40+10 3@400 depth 1",
			"50+5 0@-1 depth 2", // nobody
			"55+5 0@-1 depth 1", // the lowest is too short
			"60+40 0@-1 depth 0",
		}},
		{"a part", &Chain{Layers: []*Layer{top, mid, base}}, 3, 10, []string{
			"3+2 2@53 depth 1", "5+5 2@90 depth 2", "10+3 2@100 depth 0",
		}},
		{"inside an encoded extent", &Chain{Layers: []*Layer{mid}}, 35, 5, []string{"35+5 3@400 depth 0"}},
		{"nothing", &Chain{Layers: []*Layer{top}}, 100, 0, nil},
	} {
		if diff := cmp.Diff(c.want, mapped(t, c.chain, c.off, c.length)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}
}

// A plugin cannot send the core to a file that is not there.
func TestMapRefusesForeignFiles(t *testing.T) {
	l := layer(t, "x", "10 data 0")
	l.Image.(*fake).extents[0].File = 1
	c := &Chain{Layers: []*Layer{l}}
	if err := c.Map(context.Background(), 0, 10, func([]Extent) bool { return true }); err == nil {
		t.Error("no error")
	}
	l.Image.(*fake).extents[0] = sdk.Extent{Length: 10, Kind: sdk.Data, HostOffset: 1<<63 - 5}
	if err := c.Map(context.Background(), 0, 10, func([]Extent) bool { return true }); err == nil {
		t.Error("no error of an offset that overflows")
	}
	l.Image.(*fake).extents[0] = sdk.Extent{Length: 5, Kind: sdk.Zero, HostOffset: -1}
	if err := c.Map(context.Background(), 0, 10, func([]Extent) bool { return true }); err == nil {
		t.Error("no error of a map that ends early")
	}
}

func TestMapStops(t *testing.T) {
	c := &Chain{Layers: []*Layer{layer(t, "x", strings.TrimSuffix(strings.Repeat("1 zero -1; 1 absent -1;", mapBatch), ";"))}}
	calls := 0
	if err := c.Map(context.Background(), 0, 2*mapBatch, func([]Extent) bool { calls++; return false }); err != nil || calls != 1 {
		t.Errorf("%d calls, %v", calls, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := c.Map(ctx, 0, 2*mapBatch, func([]Extent) bool { return true }); err == nil {
		t.Error("a cancelled map is complete")
	}
}

func TestSplitHolesAndUnits(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const block = 64 << 10
	// A hole, data, a hole, and nothing beyond.
	if _, err := f.WriteAt(make([]byte, block), block); err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(4 * block); err != nil {
		t.Fatal(err)
	}
	if pos, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA); err != nil || pos != block {
		t.Skipf("NOT TESTED: the file system under %s has no holes (%d, %v)", path, pos, err)
	}
	l := layer(t, path, fmt.Sprintf("%d sparse 0", 6*block))
	l.Files[0].File = f
	c := &Chain{Layers: []*Layer{l}}
	var got []string
	err = c.Map(context.Background(), 0, 6*block, SplitHoles(func(batch []Extent) bool {
		for _, e := range batch {
			got = append(got, fmt.Sprintf("%d+%d hole %t", e.Offset/block, e.Length/block, e.Hole))
		}
		return true
	}))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"0+1 hole true", "1+1 hole false", "2+4 hole true"}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	// Units are counted once, also where several extents lie in one.
	for unit, want := range map[int64]int64{block: 1, block / 4: 4, 4 * block: 1, 8 * block: 1} {
		if n, err := c.allocatedUnits(context.Background(), unit); err != nil || n != want {
			t.Errorf("units of %d: %d %v, want %d", unit, n, err, want)
		}
	}
	many := &Chain{Layers: []*Layer{layer(t, "x", "3 data 0; 1 zero -1; 3 data 10; 9 absent -1; 1 data 50; 3 zero -1")}}
	if n, err := many.allocatedUnits(context.Background(), 8); err != nil || n != 2 {
		t.Errorf("%d units, %v, want 2", n, err)
	}
}

package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// writing opens an image for writing.
func writing(t *testing.T, path string, compressed bool) (*image, *os.File, sdk.WriteInfo) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	im, err := New().Open(context.Background(), sdk.OpenRequest{
		Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: sdk.NewFile(f)}}, ReadWrite: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	info, err := im.(*image).BeginWrite(context.Background(), sdk.WriteRequest{Compressed: compressed})
	if err != nil {
		t.Fatal(err)
	}
	return im.(*image), f, info
}

// randomContent fills b with runs of noise, of text and of one byte.
func randomContent(r *rand.Rand, b []byte) {
	for len(b) > 0 {
		n := min(len(b), 1+r.IntN(40000))
		switch r.IntN(3) {
		case 0:
			for i := range b[:n] {
				b[i] = byte(r.Uint32())
			}
		case 1:
			copy(b[:n], bytes.Repeat([]byte(fmt.Sprintf("instar %d ", r.IntN(1000))), n/8+1))
		case 2:
			clear(b[:n])
		}
		b = b[n:]
	}
}

// overwrite replaces random parts of an image through the Writer and of want,
// its content.
func overwrite(t *testing.T, r *rand.Rand, path string, want []byte, compressed bool) {
	t.Helper()
	ctx := context.Background()
	im, f, info := writing(t, path, compressed)
	size := int64(len(want))
	for off := int64(0); off < size; {
		n := min(size-off, (1+r.Int64N(6))*info.Unit)
		run := sdk.Run{Offset: off, Length: n}
		part := want[off : off+n]
		off += n
		switch r.IntN(4) {
		case 0: // leave it
		case 1:
			if err := im.Zero(ctx, []sdk.Run{run}); err != nil {
				t.Fatal(err)
			}
			clear(part)
		default:
			randomContent(r, part)
			if compressed {
				var units []sdk.Unit
				for at := int64(0); at < n; at += info.Unit {
					units = append(units, sdk.Unit{Offset: run.Offset + at, Data: part[at:min(at+info.Unit, n)]})
				}
				if err := im.Encode(ctx, units); err != nil {
					t.Fatal(err)
				}
				continue
			}
			list, err := im.Place(ctx, []sdk.Run{run})
			if err != nil {
				t.Fatal(err)
			}
			at := run.Offset
			for _, p := range list {
				if p.Offset != at || p.HostOffset%info.Unit != 0 {
					t.Fatalf("placement %+v, expected offset %#x", p, at)
				}
				if _, err := f.WriteAt(want[p.Offset:p.Offset+p.Length], p.HostOffset); err != nil {
					t.Fatal(err)
				}
				at += p.Length
			}
			if at != run.Offset+n {
				t.Fatalf("placements end at %#x, the run at %#x", at, run.Offset+n)
			}
		}
	}
	if err := im.Finish(ctx); err != nil {
		t.Fatal(err)
	}
}

// sameContent reads an image with qemu-img and checks it: no leaks are left.
func sameContent(t *testing.T, path string, want []byte) {
	t.Helper()
	formattest.Oracle(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
	raw := path + ".raw"
	formattest.Oracle(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
	defer os.Remove(raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		i := 0
		for i < min(len(got), len(want)) && got[i] == want[i] {
			i++
		}
		t.Fatalf("%s: %d bytes, want %d; they differ from %#x on", filepath.Base(path), len(got), len(want), i)
	}
}

var writeOptions = []string{
	"", "compat=0.10", "cluster_size=512", "cluster_size=512,refcount_bits=64", "cluster_size=4k,refcount_bits=1",
	"extended_l2=on,cluster_size=16k", "compression_type=zstd", "cluster_size=4k,compression_type=zstd,refcount_bits=2",
	"preallocation=metadata,cluster_size=16k", "preallocation=falloc,cluster_size=4k", "lazy_refcounts=on", "cluster_size=2M",
}

func TestWriteFresh(t *testing.T) {
	for n, opts := range writeOptions {
		t.Run(strings.ReplaceAll(opts, "=", "-"), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(n), 11))
			for _, compressed := range []bool{false, true} {
				dir := memoryDir(t)
				want := make([]byte, 3<<20+r.Int64N(100)*512)
				path := formattest.Create(t, New(), dir, "a.qcow2", int64(len(want)), opts)
				overwrite(t, r, path, want, compressed)
				sameContent(t, path, want)
				// Again, in the other way: everything old must go.
				overwrite(t, r, path, want, !compressed)
				sameContent(t, path, want)
			}
		})
	}
}

// TestWriteOverContent writes into images that qemu made, with snapshots,
// bitmaps, compressed clusters and backing files.
func TestWriteOverContent(t *testing.T) {
	for n, opts := range checkOptions {
		t.Run(strings.ReplaceAll(opts, "=", "-"), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(n), 13))
			for round := range 4 {
				dir := memoryDir(t)
				path := richImage(t, r, dir, opts, round%2 == 1)
				if round >= 2 { // an overlay
					qemuImage(t, r, dir, "top.qcow2", opts, formattest.Open(t, New(), path, false).Info.VirtualSize, "a.qcow2")
					path = filepath.Join(dir, "top.qcow2")
				}
				raw := filepath.Join(dir, "raw")
				formattest.Oracle(t, "qemu-img", "convert", "-O", "raw", path, raw)
				want, err := os.ReadFile(raw)
				if err != nil {
					t.Fatal(err)
				}
				snapshots := map[string][]byte{}
				for _, s := range formattest.Open(t, New(), path, false).Info.Snapshots {
					formattest.Oracle(t, "qemu-img", "convert", "-l", s.Name, "-O", "raw", path, raw)
					if snapshots[s.Name], err = os.ReadFile(raw); err != nil {
						t.Fatal(err)
					}
				}
				overwrite(t, r, path, want, round%2 == 0)
				sameContent(t, path, want)
				for name, want := range snapshots {
					formattest.Oracle(t, "qemu-img", "convert", "-l", name, "-O", "raw", path, raw)
					if got, err := os.ReadFile(raw); err != nil || !bytes.Equal(got, want) {
						t.Errorf("snapshot %s changed (%v)", name, err)
					}
				}
			}
		})
	}
}

// TestPlaceContiguous: runs lie in a row in the file, whatever tables they need.
func TestPlaceContiguous(t *testing.T) {
	dir := memoryDir(t)
	path := formattest.Create(t, New(), dir, "a.qcow2", 1<<30, "cluster_size=4k")
	im, _, _ := writing(t, path, false)
	for i := range int64(8) {
		list, err := im.Place(context.Background(), []sdk.Run{{Offset: i << 27, Length: 1 << 27}})
		if err != nil || len(list) != 1 {
			t.Fatalf("run %d: %d placements, %v", i, len(list), err)
		}
	}
	if err := im.Finish(context.Background()); err != nil {
		t.Fatal(err)
	}
	formattest.Oracle(t, "qemu-img", "check", "-q", path)
}

// TestRewriteStaysSmall: an image that is written over again and again uses the
// space of what it replaces.
func TestRewriteStaysSmall(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	for _, opts := range []string{"", "cluster_size=4k"} {
		path := formattest.Create(t, New(), memoryDir(t), "a.qcow2", 8<<20, opts)
		want := make([]byte, 8<<20)
		var first int64
		for round := range 8 {
			randomContent(r, want)
			im, f, info := writing(t, path, true)
			var units []sdk.Unit
			for off := int64(0); off < 8<<20; off += info.Unit {
				units = append(units, sdk.Unit{Offset: off, Data: want[off : off+info.Unit]})
			}
			if err := im.Encode(context.Background(), units); err != nil {
				t.Fatal(err)
			}
			if err := im.Finish(context.Background()); err != nil {
				t.Fatal(err)
			}
			size := fileLength(t, f)
			if first == 0 {
				first = size
			} else if size > first*3/2 {
				t.Fatalf("%s: %d bytes after round %d, %d after the first", opts, size, round, first)
			}
		}
		sameContent(t, path, want)
	}
}

func TestWriteErrors(t *testing.T) {
	ctx := context.Background()
	path := formattest.Create(t, New(), t.TempDir(), "a.qcow2", 1<<20+512, "")
	im, _, _ := writing(t, path, false)
	for _, r := range []sdk.Run{{Offset: 512, Length: 65536}, {Offset: 0, Length: 512}, {Offset: 0, Length: 0}, {Offset: 1 << 20, Length: 65536}, {Offset: -65536, Length: 65536}, {Offset: 1 << 62, Length: 65536}} {
		if _, err := im.Place(ctx, []sdk.Run{r}); err == nil {
			t.Errorf("place %+v succeeded", r)
		}
		if err := im.Zero(ctx, []sdk.Run{r}); err == nil {
			t.Errorf("zero %+v succeeded", r)
		}
	}
	if err := im.Encode(ctx, []sdk.Unit{{Offset: 0, Data: make([]byte, 131072)}}); err == nil {
		t.Error("encoding two clusters as one succeeded")
	}
	if err := im.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	if err := im.Finish(ctx); err == nil {
		t.Error("second Finish succeeded")
	}
	formattest.Oracle(t, "qemu-img", "check", "-q", path)
}

// TestBitmaps copies bitmaps from images that qemu made, as convert does.
func TestBitmaps(t *testing.T) {
	ctx := context.Background()
	for n, opts := range []string{"", "cluster_size=512", "cluster_size=4k"} {
		t.Run(strings.ReplaceAll(opts, "=", "-"), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(n), 17))
			dir := memoryDir(t)
			const size = 40<<20 + 512
			from := filepath.Join(dir, "from.qcow2")
			formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", from, fmt.Sprint(size))
			for _, b := range [][2]string{{"fine", "512"}, {"coarse", "1M"}, {"usual", "65536"}} {
				formattest.Oracle(t, "qemu-img", "bitmap", "--add", "-g", b[1], from, b[0])
			}
			qemuWrites(t, r, from, size, 60)
			formattest.Oracle(t, "qemu-img", "bitmap", "--disable", from, "coarse")
			formattest.Oracle(t, "qemu-img", "bitmap", "--add", from, "empty")

			want := formattest.Open(t, New(), from, false)
			path := formattest.Create(t, New(), dir, "to.qcow2", size, opts)
			im, _, _ := writing(t, path, false)
			source := want.Image.(*image)
			for _, b := range want.Info.Bitmaps {
				if err := im.WriteBitmap(ctx, b, nil); err != nil {
					t.Fatal(err)
				}
				err := source.ReadBitmap(ctx, b.Name, func(runs []sdk.Run) bool {
					if err := im.WriteBitmap(ctx, b, runs); err != nil {
						t.Error(err)
					}
					return true
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			if err := im.Finish(ctx); err != nil {
				t.Fatal(err)
			}
			formattest.Oracle(t, "qemu-img", "check", "-q", path)
			// qemu copies them again: what it reads is what it wrote itself.
			for _, from := range []string{from, path} {
				formattest.Oracle(t, "qemu-img", "convert", "--bitmaps", "-O", "qcow2", from, from+".again")
			}
			a, b := formattest.Open(t, New(), from+".again", false), formattest.Open(t, New(), path+".again", false)
			if fmt.Sprint(a.Info.Bitmaps) != fmt.Sprint(b.Info.Bitmaps) || len(a.Info.Bitmaps) != 4 {
				t.Errorf("bitmaps %v, want %v", b.Info.Bitmaps, a.Info.Bitmaps)
			}
			for _, bm := range a.Info.Bitmaps {
				x, y := bitmapRuns(t, a, bm.Name), bitmapRuns(t, b, bm.Name)
				if x != y || (x == "[]") != (bm.Name == "empty") {
					t.Errorf("%s: %.300s, want %.300s", bm.Name, y, x)
				}
			}
		})
	}
}

// TestReadBitmap reads a bitmap whose content is known.
func TestReadBitmap(t *testing.T) {
	path := filepath.Join(memoryDir(t), "a.qcow2")
	formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "1G")
	formattest.Oracle(t, "qemu-img", "bitmap", "--add", "-g", "512", path, "b")
	formattest.Oracle(t, "qemu-io", "-c", "write -q 512 512", "-c", "write -q 512k 3k", "-c", "write -q 300M 1M", "-c", "write -q 1073741312 512", path)
	want := "[{512 512} {524288 3072} {314572800 1048576} {1073741312 512}]"
	if got := bitmapRuns(t, formattest.Open(t, New(), path, false), "b"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	im := openImage(t, path)
	if err := im.ReadBitmap(context.Background(), "c", nil); !errors.Is(err, sdk.ErrNotFound) {
		t.Errorf("bitmap that is not there: %v", err)
	}
}

func bitmapRuns(t *testing.T, o *formattest.Opened, name string) string {
	t.Helper()
	all := []sdk.Run{}
	err := o.Image.(*image).ReadBitmap(context.Background(), name, func(runs []sdk.Run) bool {
		all = append(all, runs...)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(all)
}

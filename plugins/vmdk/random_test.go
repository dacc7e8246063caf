package vmdk

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// Images that qemu-io worked on at random, and overlays over them, are mapped,
// read and checked as by qemu-img; then our writer works on them, and qemu-img
// reads what it left.
func TestRandomImages(t *testing.T) {
	seeds := uint64(24)
	if testing.Short() {
		seeds = 6
	}
	options := []string{
		"subformat=monolithicSparse", "zeroed_grain=on", "subformat=twoGbMaxExtentSparse",
		"subformat=monolithicFlat", "subformat=twoGbMaxExtentFlat", "subformat=twoGbMaxExtentSparse,zeroed_grain=on",
	}
	for seed := range seeds {
		opts := options[seed%uint64(len(options))]
		t.Run(fmt.Sprintf("%d/%s", seed, opts), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 5))
			dir := t.TempDir()
			size := (1 + rng.Int64N(12<<20/512)) * 512
			path := filepath.Join(dir, "x.vmdk")
			formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", opts, path, fmt.Sprint(size))
			disk := make([]byte, size)
			qemuIO(t, rng, path, disk)
			o := formattest.Open(t, New(), path, false)
			if !bytes.Equal(o.Read(0, size), disk) {
				t.Error("content differs")
			}
			sameMap(t, o, path)
			sameInfo(t, o, path)
			cleanCheck(t, path)

			work(t, rng, path, disk)
			raw := filepath.Join(dir, "raw")
			writeFile(t, raw, disk)
			formattest.Oracle(t, "qemu-img", "compare", "-f", "raw", "-F", "vmdk", raw, path)
			formattest.Oracle(t, "qemu-img", "check", path)
			cleanCheck(t, path)
			if o := formattest.Open(t, New(), path, false); !bytes.Equal(o.Read(0, size), disk) {
				t.Error("content differs after our writer")
			} else {
				sameMap(t, o, path)
			}

			// qemu-img goes on where we stopped.
			qemuIO(t, rng, path, disk)
			if got := formattest.Open(t, New(), path, false).Read(0, size); !bytes.Equal(got, disk) {
				t.Error("content differs after qemu-io on our image")
			}
			cleanCheck(t, path)
		})
	}
}

// qemuIO writes and zeroes at random, in the image and in disk.
func qemuIO(t *testing.T, rng *rand.Rand, path string, disk []byte) {
	t.Helper()
	args := []string{"-f", "vmdk"}
	for range 12 {
		off := rng.Int64N(int64(len(disk))/512) * 512
		n := min(1+rng.Int64N(400), (int64(len(disk))-off)/512) * 512
		if rng.IntN(3) == 0 {
			args = append(args, "-c", fmt.Sprintf("write -z %d %d", off, n))
			clear(disk[off : off+n])
			continue
		}
		v := byte(1 + rng.IntN(255))
		args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", v, off, n))
		for i := range disk[off : off+n] {
			disk[off+int64(i)] = v
		}
	}
	formattest.Oracle(t, "qemu-io", append(args, path)...)
}

// work places, zeroes and encodes at random through our writer.
func work(t *testing.T, rng *rand.Rand, path string, disk []byte) {
	t.Helper()
	ctx := context.Background()
	o := formattest.Open(t, New(), path, true)
	w := o.Image.(sdk.Writer)
	wi, err := w.BeginWrite(ctx, sdk.WriteRequest{})
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(disk))
	step := max(wi.Unit, 64<<10)
	for off := int64(0); off < size; off += step {
		n := min(step*(1+rng.Int64N(3)), size-off)
		part := disk[off : off+n]
		run := []sdk.Run{{Offset: off, Length: n}}
		switch rng.IntN(6) {
		case 0:
			if err := w.Zero(ctx, run); err != nil {
				t.Fatal(err)
			}
			clear(part)
		case 1:
			for i := range part {
				part[i] = byte(rng.Uint32())
			}
			places, err := w.Place(ctx, run)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range places {
				if _, err := o.Files[p.File].File.WriteAt(disk[p.Offset:p.Offset+p.Length], p.HostOffset); err != nil {
					t.Fatal(err)
				}
			}
		case 2:
			for i := range part {
				part[i] = byte(off >> 16)
			}
			var units []sdk.Unit
			for at := int64(0); at < n; at += wi.Unit {
				units = append(units, sdk.Unit{Offset: off + at, Data: part[at:min(at+wi.Unit, n)]})
			}
			if err := w.Encode(ctx, units); err != nil {
				t.Fatal(err)
			}
		}
		off += n - min(n, step)
	}
	if err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
}

// FuzzWrite works on damaged images: errors are welcome, panics and writes
// before BeginWrite are not.
func FuzzWrite(f *testing.F) {
	for _, opts := range []string{"", "zeroed_grain=on", "subformat=streamOptimized"} {
		path, err := formattest.CreateAs(f, New(), f.TempDir(), "x", 1<<20, opts, func(r *sdk.CreateRequest) { r.Reproducible = true })
		if err != nil {
			f.Fatal(err)
		}
		b := stat(f, path).head
		f.Add(b)
		if opts == "" {
			formattest.Write(f, New(), path, map[int64][]byte{0: []byte("data")}, false)
			f.Add(stat(f, path).head)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ctx := t.Context()
		img, err := New().Open(ctx, sdk.OpenRequest{
			Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.MemFile(bytes.Clone(b))}}, ReadWrite: true,
		})
		if err != nil {
			return
		}
		info, err := img.Info(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if info.AllocationUnit > 1<<20 || info.VirtualSize > 1<<40 {
			return // the test would be busy with grains
		}
		w := img.(sdk.Writer)
		wi, err := w.BeginWrite(ctx, sdk.WriteRequest{})
		if err != nil {
			return
		}
		run := func(i int64) []sdk.Run {
			off := i * wi.Unit
			return []sdk.Run{{Offset: off, Length: min(wi.Unit, info.VirtualSize-off)}}
		}
		places, err := w.Place(ctx, run(0))
		if err == nil && (len(places) == 0 || places[0].HostOffset < sectorSize) {
			t.Fatalf("placed at %+v", places)
		}
		_ = w.Zero(ctx, run(0))
		if info.VirtualSize > wi.Unit {
			_ = w.Encode(ctx, []sdk.Unit{{Offset: wi.Unit, Data: make([]byte, run(1)[0].Length)}})
		}
		_ = w.Finish(ctx)
	})
}

package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// content is a disk with runs of data, compressible and not, between zeros.
func content(seed uint64, size int64) (disk []byte, runs map[int64][]byte) {
	rng := rand.New(rand.NewPCG(seed, 7))
	disk = make([]byte, size)
	runs = make(map[int64][]byte)
	for range 12 {
		off := rng.Int64N(size)
		n := min(1+rng.Int64N(300<<10), size-off)
		b := disk[off : off+n]
		switch rng.IntN(3) {
		case 0:
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
		case 1:
			copy(b, bytes.Repeat([]byte(fmt.Sprintf("line %d\n", rng.Uint32())), len(b)/6))
		default:
			for i := range b {
				b[i] = 0x5a
			}
		}
		runs[off] = b
	}
	return disk, runs
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// What we write is read by us, by qemu-img and by 7z.
func TestWriteIsReadByOthers(t *testing.T) {
	for _, opts := range []string{
		"subformat=monolithicSparse", "subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse",
		"subformat=twoGbMaxExtentFlat", "subformat=streamOptimized", "zeroed_grain=on", "grain_size=8k",
		"grain_size=2M", "subformat=streamOptimized,grain_size=8k", "subformat=streamOptimized,grain_size=1M",
	} {
		for seed, size := range []int64{512, 1<<20 + 512, 9<<20 - 1024} {
			t.Run(fmt.Sprintf("%s/%d", opts, size), func(t *testing.T) {
				dir := t.TempDir()
				disk, runs := content(uint64(seed), size)
				raw := filepath.Join(dir, "disk.raw")
				writeFile(t, raw, disk)
				path := formattest.Create(t, New(), dir, "x.vmdk", size, opts)
				formattest.Write(t, New(), path, runs, strings.Contains(opts, "stream"))
				o := formattest.Open(t, New(), path, false)
				if !bytes.Equal(o.Read(0, size), disk) {
					t.Error("content differs")
				}
				formattest.Oracle(t, "qemu-img", "compare", "-f", "raw", "-F", "vmdk", raw, path)
				formattest.Oracle(t, "qemu-img", "check", path)
				sameInfo(t, o, path)
				sameMap(t, o, path)
				cleanCheck(t, path)
				formattest.Oracle(t, "vmdkinfo", path)
				if strings.Contains(opts, "Flat") || strings.Contains(opts, "grain_size") {
					return // which 7z does not open
				}
				out := t.TempDir()
				formattest.Oracle(t, "7z", "x", "-tvmdk", "-o"+out, path)
				entries, err := os.ReadDir(out)
				if err != nil || len(entries) != 1 {
					t.Fatalf("7z: %v, %v", entries, err)
				}
				got, err := os.ReadFile(filepath.Join(out, entries[0].Name()))
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, disk) {
					t.Error("7z reads other content")
				}
			})
		}
	}
}

// What qemu-img and qemu-io write we read, map and check as they do.
func TestReadWhatQEMUWrites(t *testing.T) {
	for _, opts := range []string{
		"subformat=monolithicSparse", "subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse",
		"subformat=twoGbMaxExtentFlat", "subformat=streamOptimized", "zeroed_grain=on",
	} {
		for seed, size := range []int64{512, 1<<20 + 512, 9<<20 - 1024} {
			t.Run(fmt.Sprintf("%s/%d", opts, size), func(t *testing.T) {
				dir := t.TempDir()
				disk, _ := content(uint64(seed)+100, size)
				raw, path := filepath.Join(dir, "disk.raw"), filepath.Join(dir, "x.vmdk")
				writeFile(t, raw, disk)
				formattest.Oracle(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", opts, raw, path)
				if strings.HasPrefix(opts, "zeroed") && size > 1<<20 {
					formattest.Oracle(t, "qemu-io", "-f", "vmdk", "-c", "write -z 0 128k", path)
					clear(disk[:128<<10])
				}
				o := formattest.Open(t, New(), path, false)
				if !bytes.Equal(o.Read(0, size), disk) {
					t.Error("content differs")
				}
				sameInfo(t, o, path)
				sameMap(t, o, path)
				cleanCheck(t, path)
			})
		}
	}
}

// Runs may lie on both sides of the border between two files.
func TestSplitBorder(t *testing.T) {
	for _, sub := range []string{twoGbMaxExtentSparse, twoGbMaxExtentFlat} {
		dir := t.TempDir()
		path := formattest.Create(t, New(), dir, "x.vmdk", 4<<30+512, "subformat="+sub)
		data := bytes.Repeat([]byte("border"), 100<<10)
		formattest.Write(t, New(), path, map[int64][]byte{2<<30 - 1000: data, 4 << 30: data[:512]}, false)
		o := formattest.Open(t, New(), path, false)
		if !bytes.Equal(o.Read(2<<30-1000, int64(len(data))), data) || !bytes.Equal(o.Read(4<<30, 512), data[:512]) {
			t.Errorf("%s: content differs", sub)
		}
		sameMap(t, o, path)
		raw := filepath.Join(dir, "part")
		formattest.Oracle(t, "qemu-img", "dd", "-f", "vmdk", "-O", "raw", "bs=512",
			fmt.Sprintf("count=%d", 2<<30/512+2048), fmt.Sprintf("skip=%d", 2<<30/512-2), "if="+path, "of="+raw)
		got, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[24:24+len(data)], data) {
			t.Errorf("%s: qemu-img reads other content", sub)
		}
	}
}

// mapEntry is what qemu-img map prints.
type mapEntry struct {
	Start, Length int64
	Zero, Data    bool
	Present       bool
	Compressed    bool
	Offset        *int64
	Filename      string
}

// sameMap compares Map with qemu-img map, but for holes of files, which only
// the core looks for.
func sameMap(t *testing.T, o *formattest.Opened, path string) {
	t.Helper()
	var theirs []mapEntry
	if err := json.Unmarshal([]byte(formattest.Oracle(t, "qemu-img", "map", "--output=json", path)), &theirs); err != nil {
		t.Fatal(err)
	}
	join := func(list []mapEntry) (out []mapEntry) {
		for _, e := range list {
			e.Filename = ""
			if n := len(out); n > 0 {
				last := &out[n-1]
				if last.Data == e.Data && last.Zero == e.Zero && last.Present == e.Present && (last.Offset == nil) == (e.Offset == nil) &&
					(e.Offset == nil || *last.Offset+last.Length == *e.Offset) {
					last.Length += e.Length
					continue
				}
			}
			out = append(out, e)
		}
		return out
	}
	for i := range theirs {
		if theirs[i].Data {
			theirs[i].Zero = false // a hole
		}
	}
	var ours []mapEntry
	for _, e := range o.Map() {
		m := mapEntry{Start: e.Offset, Length: e.Length}
		switch e.Kind {
		case sdk.Absent:
			m.Zero = true
		case sdk.Zero:
			m.Zero, m.Present = true, true
		case sdk.Data:
			m.Data, m.Present = true, true
			host := e.HostOffset
			m.Offset = &host
		case sdk.Encoded:
			m.Data, m.Present = true, true
		}
		ours = append(ours, m)
	}
	if d := cmp.Diff(join(theirs), join(ours)); d != "" {
		t.Errorf("map (-qemu-img +ours):\n%s", d)
	}
}

// findings runs check and returns its messages.
func findings(t testing.TB, path string) (*sdk.CheckResult, []string) {
	t.Helper()
	o, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{Check: true})
	if err != nil {
		t.Fatal(err)
	}
	var messages []string
	res, err := o.Image.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Message: func(m string) { messages = append(messages, m) }})
	if err != nil {
		t.Fatal(err)
	}
	return res, messages
}

func cleanCheck(t *testing.T, path string) {
	t.Helper()
	if res, messages := findings(t, path); *res != (sdk.CheckResult{}) {
		t.Errorf("check: %+v %q", *res, messages)
	}
}

// A second run of writing keeps what it does not touch, takes no new space for
// what it replaces, and changes the CID.
func TestWriteAgain(t *testing.T) {
	for _, opts := range []string{"", "zeroed_grain=on", "subformat=twoGbMaxExtentSparse", "subformat=monolithicFlat"} {
		t.Run(opts, func(t *testing.T) {
			dir := t.TempDir()
			const size = 9 << 20
			disk, runs := content(3, size)
			path := formattest.Create(t, New(), dir, "x.vmdk", size, opts)
			formattest.Write(t, New(), path, runs, false)
			before := totalSize(t, dir)
			cid := formattest.Open(t, New(), path, false).Info.Identity[cidKey]

			o := formattest.Open(t, New(), path, true)
			w := o.Image.(sdk.Writer)
			ctx := context.Background()
			wi, err := w.BeginWrite(ctx, sdk.WriteRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if wi.ReadsZero {
				t.Error("an image with data says that it reads as zeros")
			}
			var first *sdk.Extent
			for _, e := range o.Map() {
				if e.Kind == sdk.Data && e.Length >= 2*wi.Unit {
					first = &e
					break
				}
			}
			at := first.Offset
			places, err := w.Place(ctx, []sdk.Run{{Offset: at, Length: wi.Unit}})
			if err != nil {
				t.Fatal(err)
			}
			if len(places) != 1 || places[0].HostOffset != first.HostOffset {
				t.Errorf("replaced grain goes to %+v, was at %+v", places, first)
			}
			data := bytes.Repeat([]byte{0x77}, int(wi.Unit))
			if _, err := o.Files[places[0].File].File.WriteAt(data, places[0].HostOffset); err != nil {
				t.Fatal(err)
			}
			copy(disk[at:], data)
			if err := w.Zero(ctx, []sdk.Run{{Offset: at + wi.Unit, Length: wi.Unit}}); err != nil {
				t.Fatal(err)
			}
			clear(disk[at+wi.Unit : at+2*wi.Unit])
			if err := w.Finish(ctx); err != nil {
				t.Fatal(err)
			}
			o = formattest.Open(t, New(), path, false)
			if !bytes.Equal(o.Read(0, size), disk) {
				t.Error("content differs")
			}
			if got := totalSize(t, dir); got > before+8 { // a CID may be longer
				t.Errorf("files grew from %d to %d", before, got)
			}
			if o.Info.Identity[cidKey] == cid {
				t.Error("the CID did not change")
			}
			sameInfo(t, o, path)
			cleanCheck(t, path)
		})
	}
}

// Zeros hide what a backing file holds, however the overlay stores them.
func TestZeroOverBacking(t *testing.T) {
	for _, opts := range []string{"", "zeroed_grain=on", "subformat=streamOptimized", "subformat=twoGbMaxExtentSparse"} {
		t.Run(opts, func(t *testing.T) {
			dir := t.TempDir()
			base := formattest.Create(t, New(), dir, "base.vmdk", 1<<20, "")
			old := bytes.Repeat([]byte{0xaa}, 1<<20)
			formattest.Write(t, New(), base, map[int64][]byte{0: old}, false)
			path := formattest.Create(t, New(), dir, "top.vmdk", formattest.NoSize, strings.TrimPrefix(opts+",backing_file=base.vmdk", ","))
			o := formattest.Open(t, New(), path, true)
			w := o.Image.(sdk.Writer)
			ctx := context.Background()
			wi, err := w.BeginWrite(ctx, sdk.WriteRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if wi.ReadsZero {
				t.Error("an overlay says that it reads as zeros")
			}
			if err := w.Zero(ctx, []sdk.Run{{Offset: 128 << 10, Length: 64 << 10}, {Offset: 960 << 10, Length: 64 << 10}}); err != nil {
				t.Fatal(err)
			}
			if err := w.Finish(ctx); err != nil {
				t.Fatal(err)
			}
			want := bytes.Clone(old)
			clear(want[128<<10 : 192<<10])
			clear(want[960<<10:])
			raw := filepath.Join(dir, "raw")
			writeFile(t, raw, want)
			formattest.Oracle(t, "qemu-img", "compare", "-f", "raw", raw, path)
			cleanCheck(t, path)
		})
	}
}

// streamOptimized files have what VMware's tools look for.
func TestStreamLayout(t *testing.T) {
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "x.vmdk", 100<<20, "subformat=streamOptimized")
	data := bytes.Repeat([]byte("abcdefgh"), 8<<10)
	formattest.Write(t, New(), path, map[int64][]byte{0: data, 40 << 20: data, 99 << 20: data}, true)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var head, foot sparseHeader
	if err := head.decode(b); err != nil {
		t.Fatal(err)
	}
	if err := foot.decode(b[len(b)-1024:]); err != nil {
		t.Fatal(err)
	}
	if head.gdOffset != gdAtEnd || foot.gdOffset == gdAtEnd || head.overhead != 128 || head.flags != flagNewlineTest|flagCompressed|flagMarkers {
		t.Errorf("header %+v, footer %+v", head, foot)
	}
	// Walk the markers: grains and tables one after the other.
	var kinds []uint32
	grains := map[uint64]bool{}
	for at := int(head.overhead) * sectorSize; at < len(b); {
		var m marker
		if err := m.decode(b[at:]); err != nil {
			t.Fatal(err)
		}
		if m.size != 0 {
			grains[m.value] = true
			at += (grainMarkerSize + int(m.size) + sectorSize - 1) / sectorSize * sectorSize
			continue
		}
		kinds = append(kinds, m.kind)
		at += sectorSize + int(m.value)*sectorSize
	}
	if d := cmp.Diff([]uint32{markerGrainTable, markerGrainTable, markerGrainTable, markerGrainDirectory, markerFooter, markerEndOfStream}, kinds); d != "" {
		t.Errorf("markers (-want +got):\n%s", d)
	}
	if !grains[0] || !grains[40<<20/512] || !grains[99<<20/512] || len(grains) != 3 {
		t.Errorf("grains %v", grains)
	}
	if gd := binary.LittleEndian.Uint32(b[foot.gdOffset*512+4:]); gd == 0 {
		t.Error("directory lacks the second table")
	}
}

func TestStreamIsReproducible(t *testing.T) {
	var first []byte
	for range 2 {
		dir := t.TempDir()
		_, runs := content(11, 9<<20)
		path, err := formattest.CreateAs(t, New(), dir, "x", 9<<20, "subformat=streamOptimized", func(r *sdk.CreateRequest) { r.Reproducible = true })
		if err != nil {
			t.Fatal(err)
		}
		formattest.Write(t, New(), path, runs, true)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if first != nil && !bytes.Equal(first, b) {
			t.Error("two files of the same content differ")
		}
		first = b
	}
}

func TestWriteRefuses(t *testing.T) {
	ctx := context.Background()
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "x.vmdk", 1<<20, "subformat=streamOptimized")
	o := formattest.Open(t, New(), path, false)
	w := o.Image.(sdk.Writer)
	if _, err := w.Place(ctx, []sdk.Run{{Length: 65536}}); err == nil {
		t.Error("place without begin: no error")
	}
	if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); !errors.Is(err, sdk.ErrReadOnly) {
		t.Errorf("begin of an image opened for reading: %v", err)
	}
	formattest.Write(t, New(), path, map[int64][]byte{0: make([]byte, 512)}, true)
	o = formattest.Open(t, New(), path, true)
	if _, err := o.Image.(sdk.Writer).BeginWrite(ctx, sdk.WriteRequest{}); err == nil || !errors.Is(err, sdk.ErrUnsupported) {
		t.Errorf("begin of a stream with data: %v", err)
	}
	path = formattest.Create(t, New(), dir, "y.vmdk", 1<<20, "")
	w = formattest.Open(t, New(), path, true).Image.(sdk.Writer)
	if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
		t.Fatal(err)
	}
	for _, r := range []sdk.Run{{Offset: 512, Length: 65536}, {Offset: 0, Length: 512}, {Offset: 1 << 20, Length: 65536}, {Offset: 0, Length: 2 << 20}, {Offset: -65536, Length: 65536}} {
		if _, err := w.Place(ctx, []sdk.Run{r}); !errors.Is(err, sdk.ErrInvalid) {
			t.Errorf("place %+v: %v", r, err)
		}
	}
}

// Compressed writing into images that do not compress stores grains as they
// are, as qemu-img convert -c does. Flat extents are not written so.
func TestEncodeIntoSparse(t *testing.T) {
	dir := t.TempDir()
	disk, runs := content(5, 3<<20)
	flat := formattest.Create(t, New(), dir, "flat", 3<<20, "subformat=monolithicFlat")
	w := formattest.Open(t, New(), flat, true).Image.(sdk.Writer)
	if _, err := w.BeginWrite(context.Background(), sdk.WriteRequest{Compressed: true}); !errors.Is(err, sdk.ErrUnsupported) {
		t.Errorf("monolithicFlat: %v", err)
	}
	for _, sub := range []string{monolithicSparse, twoGbMaxExtentSparse} {
		path := formattest.Create(t, New(), dir, sub, 3<<20, "subformat="+sub)
		formattest.Write(t, New(), path, runs, true)
		if !bytes.Equal(formattest.Open(t, New(), path, false).Read(0, 3<<20), disk) {
			t.Errorf("%s: content differs", sub)
		}
	}
}

// Tables beyond those kept in memory are written on the way.
func TestManyTables(t *testing.T) {
	const n = maxTables + 100
	path := formattest.Create(t, New(), t.TempDir(), "x.vmdk", n*(32<<20), "")
	o := formattest.Open(t, New(), path, true)
	w := o.Image.(sdk.Writer)
	ctx := context.Background()
	if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
		t.Fatal(err)
	}
	for i := range int64(n) {
		if _, err := w.Place(ctx, []sdk.Run{{Offset: i * (32 << 20), Length: 64 << 10}}); err != nil {
			t.Fatal(err)
		}
		if kept := len(o.Image.(*image).writer.extents[0].tables); kept > maxTables {
			t.Fatalf("%d tables in memory", kept)
		}
	}
	if err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	o = formattest.Open(t, New(), path, false)
	found := 0
	for _, e := range o.Map() {
		if e.Kind == sdk.Data {
			found++
		}
	}
	if found != n {
		t.Errorf("%d grains of %d", found, n)
	}
	cleanCheck(t, path)
	formattest.Oracle(t, "qemu-img", "check", path)
}

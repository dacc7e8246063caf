package vmdk

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

var (
	sampleHeader = sparseHeader{version: 1, flags: 3, capacity: 0x28000000000, grainSize: 128, descriptorOffset: 1, descriptorSize: 20,
		tableEntries: 512, rgdOffset: 21, gdOffset: 26, overhead: 128, uncleanShutdown: 1, newlines: newlineTest, compression: 1}
	sampleCOWD     = cowdHeader{version: 1, flags: 2, capacity: 4096, grainSize: 1, gdOffset: 4, directoryEntries: 1, freeSector: 99, parentName: "p.vmdk"}
	sampleSE       = seSparseHeader{version: seSparseVersion, capacity: 8, grainSize: 8, tableSize: 64, directory: [2]uint64{2, 1}, grains: [2]uint64{9, 10}}
	sampleVolatile = seSparseVolatile{freeTable: 1, nextSequence: 2}
)

func TestHeadersRoundTrip(t *testing.T) {
	var h sparseHeader
	if err := h.decode(sampleHeader.append(nil)); err != nil || h != sampleHeader {
		t.Errorf("%+v, %v", h, err)
	}
	var c cowdHeader
	if err := c.decode(sampleCOWD.append(nil)); err != nil || c != sampleCOWD {
		t.Errorf("%+v, %v", c, err)
	}
	var s seSparseHeader
	if err := s.decode(sampleSE.append(nil)); err != nil || s != sampleSE {
		t.Errorf("%+v, %v", s, err)
	}
	var v seSparseVolatile
	if err := v.decode(sampleVolatile.append(nil)); err != nil || v != sampleVolatile {
		t.Errorf("%+v, %v", v, err)
	}
	want := marker{value: 1 << 40, kind: markerFooter}
	var m marker
	if err := m.decode(want.append(nil)); err != nil || m != want {
		t.Errorf("%+v, %v", m, err)
	}
	for name, b := range map[string][]byte{
		"hosted": sampleHeader.append(nil), "cowd": sampleCOWD.append(nil), "seSparse": sampleSE.append(nil), "volatile": sampleVolatile.append(nil),
	} {
		if len(b)%sectorSize != 0 {
			t.Errorf("%s: %d bytes are not whole sectors", name, len(b))
		}
		if h.decode(b[:20]) == nil || c.decode(b[:20]) == nil || s.decode(b[:20]) == nil || v.decode(b[:20]) == nil || m.decode(b[:9]) == nil {
			t.Errorf("%s: a cut one is accepted", name)
		}
	}
}

func TestDescriptorRoundTrip(t *testing.T) {
	want := descriptor{cid: 0xabc, parentCID: 0x12345678, createType: "custom", parentHint: "../base.vmdk", hasParentHint: true, extents: []extentLine{
		{access: accessReadWrite, sectors: 1, kind: typeSparse, name: "a b"},
		{access: accessReadOnly, sectors: 2, kind: typeFlat, name: "c", offset: 7},
		{access: accessNone, sectors: 3, kind: typeZero},
		{access: accessReadWrite, sectors: 4, kind: typeVMFS, name: "d"},
	}}
	b := want.append(nil, []string{`ddb.adapterType = "ide"`})
	var got descriptor
	if err := got.decode(b); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmp.AllowUnexported(descriptor{}, extentLine{})); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	b, err := replaceCID(b, 0xffee)
	if err != nil {
		t.Fatal(err)
	}
	want.cid = 0xffee
	if err := got.decode(b); err != nil || got.cid != 0xffee || got.parentCID != want.parentCID {
		t.Errorf("after replaceCID: %+v, %v", got, err)
	}
	if crlf, err := replaceCID([]byte("CID=1\r\nparentCID=2\r\n"), 3); err != nil || string(crlf) != "CID=00000003\r\nparentCID=2\r\n" {
		t.Errorf("%q, %v", crlf, err)
	}
	if _, err := replaceCID([]byte("parentCID=2\n"), 3); err == nil {
		t.Error("replaceCID without CID: no error")
	}
}

// What measure promises is enough for content that does not compress.
func TestMeasureStream(t *testing.T) {
	const size = 9<<20 + 512
	for _, opts := range []string{"subformat=streamOptimized", "subformat=streamOptimized,grain_size=8k", "subformat=streamOptimized,grain_size=2M"} {
		dir := t.TempDir()
		plan, err := formattest.TryPlan(t, New(), dir, "x", size, opts, nil)
		if err != nil {
			t.Fatal(err)
		}
		unit := plan.Info().AllocationUnit
		res, err := plan.(sdk.Measurer).Measure(context.Background(), sdk.MeasureRequest{AllocatedUnits: size/unit + 1})
		if err != nil {
			t.Fatal(err)
		}
		if res.Required != res.FullyAllocated {
			t.Errorf("%s: %+v for a full disk", opts, res)
		}
		path := formattest.Create(t, New(), dir, "x", size, opts)
		formattest.Write(t, New(), path, map[int64][]byte{0: noise(size)}, true)
		fi, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if fi.Size() > res.Required || fi.Size() < size {
			t.Errorf("%s: file of %d bytes, measured %d", opts, fi.Size(), res.Required)
		}
	}
}

// noise is content that does not compress.
func noise(n int) []byte {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x >> 32)
	}
	return b
}

func FuzzDecodeSparseHeader(f *testing.F) {
	f.Add(sampleHeader.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h, again sparseHeader
		if h.decode(b) != nil {
			return
		}
		if err := again.decode(h.append(nil)); err != nil || again != h {
			t.Fatalf("%+v, %+v, %v", h, again, err)
		}
		if h.validate(1<<40) == nil && (h.directoryEntries() <= 0 || h.directoryEntries() > maxDirectory) {
			t.Fatalf("directory of %d entries", h.directoryEntries())
		}
	})
}

func FuzzDecodeCOWD(f *testing.F) {
	f.Add(sampleCOWD.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h, again cowdHeader
		if h.decode(b) != nil {
			return
		}
		if err := again.decode(h.append(nil)); err != nil || len(h.parentName) < 1024 && again != h {
			t.Fatalf("%+v, %+v, %v", h, again, err)
		}
		_ = h.validate(1 << 40)
	})
}

func FuzzDecodeSESparse(f *testing.F) {
	f.Add(sampleSE.append(nil))
	f.Add(sampleVolatile.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h seSparseHeader
		if h.decode(b) == nil {
			if out := h.append(nil); !bytes.Equal(out, b[:len(out)]) {
				t.Fatalf("%x", out)
			}
			_ = h.validate(1 << 40)
		}
		var v seSparseVolatile
		if v.decode(b) == nil {
			if out := v.append(nil); !bytes.Equal(out, b[:len(out)]) {
				t.Fatalf("%x", out)
			}
			_ = v.validate(1 << 40)
		}
	})
}

func FuzzDecodeMarker(f *testing.F) {
	f.Add((&marker{value: 4, kind: markerGrainTable}).append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m, again marker
		if m.decode(b) != nil {
			return
		}
		if err := again.decode(m.append(nil)); err != nil || again != m {
			t.Fatalf("%+v, %+v, %v", m, again, err)
		}
	})
}

func FuzzDecodeDescriptor(f *testing.F) {
	f.Add(descriptorText("vmfs", `RW 1 VMFS "x"`))
	f.Add(descriptorText("custom", `RW 1 FLAT "x" 8`, `RDONLY 7 ZERO`, `NOACCESS 9 SPARSE "y"`))
	f.Add([]byte("CID=1\r\nparentCID=ffffffff\r\ncreateType=\"x\"\r\nparentFileNameHint=\"y\"\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var d, again descriptor
		if d.decode(b) != nil {
			return
		}
		for _, e := range d.extents {
			if e.sectors <= 0 || e.offset < 0 {
				t.Fatalf("%+v", e)
			}
		}
		if !quotable(d.createType) || !quotable(d.parentHint) {
			return
		}
		out := d.append(nil, nil)
		if err := again.decode(out); err != nil {
			t.Fatalf("%q: %v", out, err)
		}
		if diff := cmp.Diff(d.extents, again.extents, cmp.AllowUnexported(extentLine{})); diff != "" || again.cid != d.cid || again.parentHint != d.parentHint {
			t.Fatalf("%q: %s", out, diff)
		}
		if changed, err := replaceCID(out, 5); err != nil || again.decode(changed) != nil || again.cid != 5 {
			t.Fatalf("%q: %v", changed, err)
		}
	})
}

// FuzzOpen does with arbitrary files what the verbs do: nothing may panic, hang
// or break what Map and Decode promise.
func FuzzOpen(f *testing.F) {
	dir := f.TempDir()
	for i, opts := range []string{"", "zeroed_grain=on", "subformat=streamOptimized", "subformat=twoGbMaxExtentSparse"} {
		name := string(rune('a' + i))
		path, err := formattest.CreateAs(f, New(), dir, name, 1<<20, opts, func(r *sdk.CreateRequest) { r.Reproducible = true })
		if err != nil {
			f.Fatal(err)
		}
		formattest.Write(f, New(), path, map[int64][]byte{0: []byte("some data"), 512 << 10: []byte("more")}, i == 2)
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		var extent []byte
		if i == 3 {
			if extent, err = os.ReadFile(filepath.Join(dir, name+"-s001")); err != nil {
				f.Fatal(err)
			}
		}
		f.Add(b, extent)
	}
	f.Add(descriptorText("vmfsSparse", `RW 4096 VMFSSPARSE "x"`), cowdExtent(4096, 1, map[int][]byte{3: make([]byte, 512)}))
	f.Add(descriptorText("seSparse", `RW 4096 SESPARSE "x"`), seSparseExtent(4096, map[int][]byte{3: make([]byte, 4096)}))
	f.Add(descriptorText("custom", `RW 1 FLAT "x" 0`, `RW 1 ZERO`, `RW 2 FLAT "x" 1`), make([]byte, 1024))
	f.Fuzz(func(t *testing.T, main, extent []byte) {
		ctx := t.Context()
		for _, check := range []bool{false, true} {
			files := []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.ReadOnly(formattest.MemFile(main))}}
			img, err := New().Open(ctx, sdk.OpenRequest{Files: files, Check: check})
			if err != nil {
				continue
			}
			info, err := img.Info(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range info.References {
				if r.Kind == sdk.RefExtent {
					files = append(files, sdk.NamedFile{Role: r.Role, File: formattest.ReadOnly(formattest.MemFile(extent))})
				}
			}
			if img.(sdk.Attacher).Attach(ctx, files[1:]) != nil {
				continue
			}
			if info, err = img.Info(ctx); err != nil {
				t.Fatal(err)
			}
			if info.VirtualSize < 0 {
				t.Fatalf("virtual size %d", info.VirtualSize)
			}
			decoded := 0
			at := int64(0)
			n := min(info.VirtualSize, 256<<20)
			_ = img.Map(ctx, 0, n, func(batch []sdk.Extent) bool {
				for _, e := range batch {
					if e.Offset != at || e.Length <= 0 || e.Length > n-at {
						t.Fatalf("extent %+v at %#x of %#x", e, at, n)
					}
					at += e.Length
					if e.Kind == sdk.Data || e.Kind == sdk.Encoded {
						length := e.Length
						if e.Kind == sdk.Encoded {
							length = e.EncodedLength
						}
						size, err := files[e.File].File.Size()
						if err != nil || e.HostOffset < 0 || length < 0 || e.HostOffset > size || length > size-e.HostOffset {
							t.Fatalf("extent %+v outside a file of %#x bytes", e, size)
						}
					}
					if e.Kind == sdk.Encoded && decoded < 4 {
						decoded++
						_ = img.(sdk.Decoder).Decode(ctx, e, make([]byte, e.Length))
					}
				}
				return len(batch) < mapBatch
			})
			if info.VirtualSize <= n {
				if _, err := img.(sdk.Checker).Check(ctx, sdk.CheckRequest{}); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

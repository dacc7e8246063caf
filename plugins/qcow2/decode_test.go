package qcow2

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

func TestHeaderRoundTrip(t *testing.T) {
	for _, h := range []header{
		{version: 2, backingOffset: 200, backingSize: 7, clusterBits: 16, size: 1 << 40, crypt: 1, l1Size: 5, l1Offset: 0x30000,
			reftableOffset: 0x10000, reftableClusters: 1, snapshotCount: 2, snapshotsOffset: 0x50000, refcountOrder: 4, length: headerV2Length},
		{version: 3, clusterBits: 9, size: 512, l1Size: 1, l1Offset: 0x600, reftableOffset: 0x200, reftableClusters: 3,
			incompatible: incompatExtendedL2 | incompatCompression, compatible: 1, autoclear: 3, refcountOrder: 6, length: headerLength, compression: 1},
		{version: 3, clusterBits: 12, refcountOrder: 0, length: headerV3Minimum},
		{version: 3, clusterBits: 12, refcountOrder: 0, length: 120, unknown: []byte("whatever")},
	} {
		b := h.append(nil)
		if len(b) != int(h.length) {
			t.Errorf("%+v: %d bytes", h, len(b))
		}
		var got header
		if err := got.decode(append(b, make([]byte, 400)...)); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, h) {
			t.Errorf("%+v, want %+v", got, h)
		}
	}
}

func TestStructuresRoundTrip(t *testing.T) {
	s := snapshot{l1Offset: 0x40000, l1Size: 7, id: "12", name: "a name", dateSec: 3, dateNsec: 4, vmClockNsec: 5, vmStateSize: 1 << 33,
		hasDiskSize: true, diskSize: 1 << 30, hasIcount: true, icount: 9, extraSize: 27, unknown: []byte("abc")}
	b := s.append(nil)
	var got snapshot
	if n, err := got.decode(b); err != nil || n != int64(len(b)) || !reflect.DeepEqual(got, s) {
		t.Errorf("snapshot %+v, %d of %d, %v", got, n, len(b), err)
	}
	e := bitmapEntry{tableOffset: 0x50000, tableSize: 3, flags: bitmapAuto, kind: 1, granularityBits: 16, name: "bitmap", extra: []byte{}}
	b = e.append(nil)
	var bm bitmapEntry
	if n, err := bm.decode(b); err != nil || n != int64(len(b)) || bm.name != e.name || bm.tableSize != 3 || bm.granularityBits != 16 {
		t.Errorf("bitmap %+v, %d of %d, %v", bm, n, len(b), err)
	}
	ext := []extension{{extBackingFormat, []byte("qcow2")}, {extFeatures, featureTable()}, {0x12345678, []byte{}}}
	b = nil
	for _, x := range ext {
		b = appendExtension(b, x)
	}
	if got, err := decodeExtensions(append(b, make([]byte, 8)...)); err != nil || !reflect.DeepEqual(got, ext) {
		t.Errorf("extensions %v, %v", got, err)
	}
	x := bitmapsExtension{3, 96, 0x70000}
	var gx bitmapsExtension
	if err := gx.decode(x.append(nil)); err != nil || gx != x {
		t.Errorf("bitmaps extension %+v, %v", gx, err)
	}
	c := cryptoExtension{0x10000, 4096}
	var gc cryptoExtension
	if err := gc.decode(c.append(nil)); err != nil || gc != c {
		t.Errorf("crypto extension %+v, %v", gc, err)
	}
}

func TestRefcountWidths(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for order := range uint32(7) {
		block := make([]byte, 512)
		n := int64(len(block)) * 8 >> order
		want := make([]uint64, n)
		for range 3 * n {
			i, v := r.Int64N(n), r.Uint64()&refcountMax(order)
			setRefcount(block, i, order, v)
			want[i] = v
		}
		for i, v := range want {
			if got := refcountAt(block, int64(i), order); got != v {
				t.Fatalf("width %d, entry %d: %d, want %d", 1<<order, i, got, v)
			}
		}
	}
}

func TestCompressedEntry(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for bits := uint32(minClusterBits); bits <= maxClusterBits; bits++ {
		g := newGeometry(bits, false, 4)
		for range 200 {
			off, n := r.Int64N(1<<45), 1+r.Int64N(g.clusterSize-1)
			gotOff, gotLen := g.compressedRange(l2Entry{desc: g.compressedEntry(off, n)})
			if gotOff != off || gotLen < n || gotLen >= n+512 || (gotOff+gotLen)%512 != 0 {
				t.Fatalf("cluster bits %d: %#x+%#x became %#x+%#x", bits, off, n, gotOff, gotLen)
			}
		}
	}
}

func TestSpans(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 3))
	for range 200 {
		var s spans
		var want [64]bool
		for range 40 {
			a, b := r.Int64N(64), r.Int64N(65)
			set := r.IntN(2) == 0
			if set {
				s.add(a, b)
			} else {
				s.remove(a, b)
			}
			for i := a; i < b; i++ {
				want[i] = set
			}
			for i := range want {
				if s.has(int64(i)) != want[i] {
					t.Fatalf("%v: member %d is %t", s, i, !want[i])
				}
			}
			for i := 1; i < len(s); i++ {
				if s[i-1].end >= s[i].start {
					t.Fatalf("%v is not merged", s)
				}
			}
		}
	}
}

// TestDecodeStops: what a compressed cluster holds beyond the cluster is never
// looked at, what is missing is an error.
func TestDecodeStops(t *testing.T) {
	for _, useZstd := range []bool{false, true} {
		var big encoder
		if err := big.init(useZstd, 1<<20); err != nil {
			t.Fatal(err)
		}
		src := bytes.Repeat([]byte("instar"), 1<<20/6+1)[:1<<20]
		data, err := big.compress(big.get(), src)
		if err != nil || data == nil {
			t.Fatal(err)
		}
		im := &image{g: newGeometry(12, false, 4), size: 1 << 20}
		if useZstd {
			im.h.compression = compressionZstd
		}
		file := formattest.MemFile(append(bytes.Clone(data), make([]byte, 1024)...))
		im.main, im.files = file, []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}
		e := sdk.Extent{Length: 4096, Kind: sdk.Encoded, EncodedLength: int64(len(data)) + 100}
		dst := make([]byte, 4096)
		err = im.Decode(context.Background(), e, dst)
		if useZstd {
			// One frame says how long it is: longer than a cluster.
			if err == nil {
				t.Error("zstd: a megabyte in a cluster of 4096 bytes was decoded")
			}
		} else if err != nil || !bytes.Equal(dst, src[:4096]) {
			t.Errorf("deflate: %v", err)
		}
		e.EncodedLength = 12
		if err := im.Decode(context.Background(), e, dst); err == nil {
			t.Errorf("zstd %t: truncated data were decoded", useZstd)
		}
	}
}

func FuzzDecodeHeader(f *testing.F) {
	f.Add((&header{version: 3, clusterBits: 16, length: headerLength}).append(nil))
	f.Add((&header{version: 2, clusterBits: 9}).append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var h header
		if h.decode(b) != nil || h.validate() != nil || h.validateTables(true) != nil {
			return
		}
		if h.version == 3 && h.length > headerLength && int64(h.length) > int64(len(b)) || h.length > headerV3Minimum && h.length < headerLength {
			return
		}
		if b2 := h.append(nil); len(b) >= len(b2) && h.version == 3 {
			var again header
			if err := again.decode(b2); err != nil || !reflect.DeepEqual(again, h) {
				t.Errorf("%+v, then %+v, %v", h, again, err)
			}
		}
	})
}

func FuzzDecodeStructures(f *testing.F) {
	f.Add((&snapshot{id: "1", name: "n", hasIcount: true}).append(nil))
	f.Add((&bitmapEntry{name: "b", tableSize: 1, granularityBits: 16, kind: 1, tableOffset: 0x10000}).append(nil))
	f.Add(appendExtension(nil, extension{extFeatures, featureTable()}))
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x20, 0, 1, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var s snapshot
		if n, err := s.decode(b); err == nil && n > int64(len(b))+7 {
			t.Errorf("snapshot of %d bytes in %d", n, len(b))
		}
		if list, err := decodeBitmaps(b, uint32(len(b)/32), newGeometry(16, false, 4), 1<<30); err == nil && len(list) != len(b)/32 {
			t.Errorf("%d bitmaps", len(list))
		}
		if ext, err := decodeExtensions(b); err == nil && len(ext) > len(b)/8 {
			t.Errorf("%d extensions in %d bytes", len(ext), len(b))
		}
		var l luksHeader
		if l.decode(b) == nil {
			l.facts()
		}
		if n, err := zstdFrame(b); err == nil && (n <= 0 || n > len(b)) {
			t.Errorf("zstd frame of %d bytes in %d", n, len(b))
		}
		var x bitmapsExtension
		_ = x.decode(b)
		_ = unsupportedFeature(1<<63, b)
	})
}

// FuzzOpen changes a small image and looks at all of it. The changes are
// applied over a sound image, so that they reach deep.
func FuzzOpen(f *testing.F) {
	var bases [][]byte
	for _, opts := range []string{"cluster_size=512", "cluster_size=512,compat=0.10", "cluster_size=16k,extended_l2=on"} {
		bases = append(bases, emitted(f, opts))
	}
	f.Add(0, []byte{0, 0, 24, 1})
	f.Add(1, []byte{0, 0x60, 3, 0x40, 2, 0, 1, 2})
	f.Add(2, []byte{0, 72, 7, 0x10})
	f.Fuzz(func(t *testing.T, base int, changes []byte) {
		b := bytes.Clone(bases[uint(base)%uint(len(bases))])
		for len(changes) >= 4 {
			at := (int(changes[0])<<16 | int(changes[1])<<8 | int(changes[2])) % len(b)
			b[at] = changes[3]
			changes = changes[4:]
		}
		ctx := context.Background()
		files := []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.MemFile(b)}}
		if im, err := New().Open(ctx, sdk.OpenRequest{Files: files}); err == nil {
			info, err := im.Info(ctx)
			if err != nil {
				t.Fatal(err)
			}
			size := min(info.VirtualSize, 1<<24)
			next, n := int64(0), 0
			err = im.Map(ctx, 0, size, func(list []sdk.Extent) bool {
				for _, e := range list {
					if e.Offset != next || e.Length <= 0 || e.Offset+e.Length > size {
						t.Fatalf("extent %+v after %#x", e, next)
					}
					if e.Kind == sdk.Encoded && e.Length <= 1<<21 && n < 20 {
						_ = im.(sdk.Decoder).Decode(ctx, e, make([]byte, e.Length))
						n++
					}
					next += e.Length
				}
				return true
			})
			if err == nil && next != size {
				t.Fatalf("map ends at %#x of %#x", next, size)
			}
		}
		for _, fix := range []sdk.Fix{sdk.FixNone, sdk.FixAll} {
			im, err := New().Open(ctx, sdk.OpenRequest{Files: files, Check: true, ReadWrite: fix != sdk.FixNone})
			if err != nil {
				return
			}
			messages := 0
			if _, err := im.(sdk.Checker).Check(ctx, sdk.CheckRequest{Fix: fix, Message: func(string) { messages++ }}); err != nil {
				return
			}
			if size, _ := files[0].File.Size(); size > 1<<26 {
				return // grown to where a refcount block should be
			}
		}
	})
}

// emitted returns a small image with some content.
func emitted(t testing.TB, opts string) []byte {
	t.Helper()
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "a.qcow2", 300<<10, opts)
	formattest.Write(t, New(), path, map[int64][]byte{0: bytes.Repeat([]byte("x"), 3000), 200 << 10: bytes.Repeat([]byte("y"), 100)}, false)
	formattest.Write(t, New(), path, map[int64][]byte{64 << 10: bytes.Repeat([]byte("z"), 40000)}, true)
	b, err := os.ReadFile(filepath.Join(dir, "a.qcow2"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// FuzzWrite writes into damaged images: an error or success, and what was said
// to be written can be read back.
func FuzzWrite(f *testing.F) {
	var bases [][]byte
	for _, opts := range []string{"cluster_size=512", "cluster_size=512,compat=0.10", "cluster_size=16k,extended_l2=on"} {
		bases = append(bases, emitted(f, opts))
	}
	f.Add(0, []byte{})
	f.Add(1, []byte{0, 0x60, 3, 0x40, 2, 0, 1, 2})
	f.Add(2, []byte{0, 72, 7, 0x10})
	f.Fuzz(func(t *testing.T, base int, changes []byte) {
		b := bytes.Clone(bases[uint(base)%uint(len(bases))])
		for len(changes) >= 4 {
			at := (int(changes[0])<<16 | int(changes[1])<<8 | int(changes[2])) % len(b)
			b[at] = changes[3]
			changes = changes[4:]
		}
		ctx := context.Background()
		file := formattest.MemFile(b)
		open := func(rw bool) (sdk.Image, error) {
			return New().Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}, ReadWrite: rw})
		}
		img, err := open(true)
		if err != nil {
			return
		}
		im := img.(*image)
		info, err := im.BeginWrite(ctx, sdk.WriteRequest{})
		if err != nil || im.size < 8*info.Unit {
			return
		}
		places, err := im.Place(ctx, []sdk.Run{{Offset: 0, Length: 2 * info.Unit}})
		if err != nil {
			return
		}
		for _, p := range places {
			if p.HostOffset < 0 || p.HostOffset%info.Unit != 0 || p.Length <= 0 {
				t.Fatalf("placement %+v", p)
			}
			if p.HostOffset > 1<<24 {
				return // a file that long is not for memory
			}
			if _, err := file.WriteAt(bytes.Repeat([]byte{0xa5}, int(p.Length)), p.HostOffset); err != nil {
				return
			}
		}
		unit := bytes.Repeat([]byte("unit"), int(info.Unit/4))
		if im.Zero(ctx, []sdk.Run{{Offset: 2 * info.Unit, Length: info.Unit}}) != nil ||
			im.Encode(ctx, []sdk.Unit{{Offset: 3 * info.Unit, Data: unit}}) != nil || im.Finish(ctx) != nil {
			return
		}
		if size, _ := file.Size(); size > 1<<26 {
			return
		}
		if _, err := open(false); err != nil {
			t.Fatalf("image was written and does not open: %v", err)
		}
	})
}

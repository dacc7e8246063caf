package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// bounded fails the test when f takes long or much memory.
func bounded(t *testing.T, f func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	f()
	runtime.ReadMemStats(&after)
	if after.HeapSys > before.HeapSys+128<<20 {
		t.Errorf("the heap grew by %d MiB", (after.HeapSys-before.HeapSys)>>20)
	}
	if d := time.Since(start); d > time.Minute { // seconds on an idle machine
		t.Errorf("took %v", d)
	}
}

func openBytes(b []byte, req sdk.OpenRequest) (sdk.Image, error) {
	req.Files = []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.MemFile(b)}}
	return New().Open(context.Background(), req)
}

func put32(b []byte, off int, v uint32) { binary.BigEndian.PutUint32(b[off:], v) }
func put64(b []byte, off int, v uint64) { binary.BigEndian.PutUint64(b[off:], v) }

func TestHostileHeaders(t *testing.T) {
	base := emitted(t, "cluster_size=64k")
	for _, c := range []struct {
		name  string
		edit  func(b []byte)
		class error
		text  string
	}{
		{"no magic", func(b []byte) { b[0] = 0 }, sdk.ErrNotFormat, "not in qcow2 format"},
		{"version 1", func(b []byte) { put32(b, 4, 1) }, sdk.ErrUnsupported, "version 1"},
		{"version 4", func(b []byte) { put32(b, 4, 4) }, sdk.ErrUnsupported, "version 4"},
		{"cluster bits 0", func(b []byte) { put32(b, 20, 0) }, sdk.ErrCorrupt, "2^0"},
		{"cluster bits 8", func(b []byte) { put32(b, 20, 8) }, sdk.ErrCorrupt, "2^8"},
		{"cluster bits 33", func(b []byte) { put32(b, 20, 33) }, sdk.ErrCorrupt, "2^33"},
		{"cluster bits 2^32-1", func(b []byte) { put32(b, 20, 1<<32-1) }, sdk.ErrCorrupt, "2^4294967295"},
		{"L1 table too large", func(b []byte) { put32(b, 36, 1<<32-1) }, sdk.ErrTooBig, "Active L1 table too large"},
		{"L1 table misaligned", func(b []byte) { put64(b, 40, 0x30200) }, sdk.ErrCorrupt, "Active L1 table offset invalid"},
		{"L1 table at the end of all", func(b []byte) { put64(b, 40, 1<<64-1<<16) }, sdk.ErrCorrupt, "Active L1 table offset invalid"},
		{"disk of 2^63-1 bytes", func(b []byte) { put64(b, 24, 1<<63-1) }, sdk.ErrTooBig, "Image is too big"},
		{"disk larger than its L1 table", func(b []byte) { put64(b, 24, 1<<40) }, sdk.ErrCorrupt, "L1 table is too small"},
		{"disk of 2^64-1 bytes", func(b []byte) { put64(b, 24, 1<<64-1) }, sdk.ErrTooBig, "Image is too big"},
		{"refcount order 7", func(b []byte) { put32(b, 96, 7) }, sdk.ErrCorrupt, "may not exceed 64 bits"},
		{"refcount order 2^32-1", func(b []byte) { put32(b, 96, 1<<32-1) }, sdk.ErrCorrupt, "may not exceed 64 bits"},
		{"no refcount table", func(b []byte) { put32(b, 56, 0) }, sdk.ErrCorrupt, "does not contain a reference count table"},
		{"refcount table too large", func(b []byte) { put32(b, 56, 1<<32-1) }, sdk.ErrTooBig, "Reference count table too large"},
		{"header too short", func(b []byte) { put32(b, 100, 72) }, sdk.ErrCorrupt, "header too short"},
		{"header too long", func(b []byte) { put32(b, 100, 1<<32-1) }, sdk.ErrCorrupt, "exceeds cluster size"},
		{"extension too long", func(b []byte) { put32(b, 116, 1<<32-1) }, sdk.ErrCorrupt, "Header extension too large"},
		{"backing file far away", func(b []byte) { put64(b, 8, 1<<40) }, sdk.ErrCorrupt, "Invalid backing file offset"},
		{"backing file name too long", func(b []byte) { put64(b, 8, 1024); put32(b, 16, 1024) }, sdk.ErrCorrupt, "Backing file name too long"},
		{"too many snapshots", func(b []byte) { put32(b, 60, 65537) }, sdk.ErrTooBig, "Snapshot table too large"},
		{"snapshots past the end", func(b []byte) { put32(b, 60, 5); put64(b, 64, 1<<40) }, sdk.ErrCorrupt, "snapshot table at 0x10000000000"},
		{"snapshots past all files", func(b []byte) { put32(b, 60, 5); put64(b, 64, 1<<63-1<<20) }, sdk.ErrCorrupt, "snapshot table at 0x7ffffffffff00000"},
		{"unknown feature", func(b []byte) { put64(b, 72, 1<<40) }, sdk.ErrUnsupported, "Unknown incompatible feature: 10000000000"},
		{"unknown feature with a name", func(b []byte) { put64(b, 72, 1<<5); b[120+1] = 5; copy(b[122:], "time travel\x00") }, sdk.ErrUnsupported, "time travel"},
		{"compression type 2", func(b []byte) { b[104] = 2; put64(b, 72, incompatCompression) }, sdk.ErrUnsupported, "unknown compression type: 2"},
		{"compression type without its flag", func(b []byte) { b[104] = 1 }, sdk.ErrCorrupt, "must be set"},
		{"encryption method 3", func(b []byte) { put32(b, 32, 3) }, sdk.ErrUnsupported, "encryption method 3"},
		{"LUKS without a header", func(b []byte) { put32(b, 32, 2) }, sdk.ErrCorrupt, "Missing CRYPTO header"},
		{"data file without a name", func(b []byte) { put64(b, 72, incompatDataFile) }, sdk.ErrCorrupt, "'data-file' is required"},
	} {
		b := bytes.Clone(base)
		c.edit(b)
		bounded(t, func() {
			_, err := openBytes(b, sdk.OpenRequest{})
			if !errors.Is(err, c.class) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%s: %v, want %q", c.name, err, c.text)
			}
		})
	}
	// As many as there can be, nearly all behind the end, are no more work than that.
	past := bytes.Clone(base)
	put32(past, 60, maxSnapshots)
	put64(past, 64, uint64(len(base)-1<<16))
	bounded(t, func() {
		img, err := openBytes(past, sdk.OpenRequest{})
		if err != nil {
			t.Errorf("snapshots past the end: %v", err)
		} else if n := len(img.(*image).snapshots); n != maxSnapshots {
			t.Errorf("snapshots past the end: %d", n)
		}
	})
	b := bytes.Clone(base)
	put64(b, 72, incompatCorrupt)
	if _, err := openBytes(b, sdk.OpenRequest{ReadWrite: true}); !errors.Is(err, sdk.ErrReadOnly) {
		t.Errorf("corrupt image opened for writing: %v", err)
	}
	if _, err := openBytes(b, sdk.OpenRequest{}); err != nil {
		t.Errorf("corrupt image opened for reading: %v", err)
	}
}

// TestSharedTables: an L1 table whose entries all lead to one L2 table makes a
// disk of exabytes out of a few megabytes.
func TestSharedTables(t *testing.T) {
	const clusterBits, l1 = 21, 4 << 20
	h := header{version: 3, clusterBits: clusterBits, size: l1 << 39, l1Size: l1, l1Offset: 4 << clusterBits,
		reftableOffset: 1 << clusterBits, reftableClusters: 1, refcountOrder: 4, length: headerLength}
	b := make([]byte, 24<<clusterBits)
	copy(b, h.append(nil))
	put64(b, 1<<clusterBits, 2<<clusterBits)
	for i := range l1 {
		put64(b, 4<<clusterBits+8*i, 3<<clusterBits|flagCopied)
	}
	for i := range 1 << 18 {
		put64(b, 3<<clusterBits+8*i, 23<<clusterBits|flagCopied)
	}
	ctx := context.Background()
	bounded(t, func() {
		im, err := openBytes(b, sdk.OpenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		err = im.Map(ctx, 0, l1<<39, func([]sdk.Extent) bool { return true })
		if !errors.Is(err, sdk.ErrCorrupt) {
			t.Errorf("map: %v", err)
		}
		if im, err = openBytes(b, sdk.OpenRequest{Check: true}); err != nil {
			t.Fatal(err)
		}
		if _, err := im.(sdk.Checker).Check(ctx, sdk.CheckRequest{}); !errors.Is(err, sdk.ErrCorrupt) {
			t.Errorf("check: %v", err)
		}
	})
}

// TestHostileClusters: entries that lead into metadata, beyond the end, or to
// bombs.
func TestHostileClusters(t *testing.T) {
	ctx := context.Background()
	base := emitted(t, "cluster_size=4k")
	im, err := openBytes(base, sdk.OpenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	first, err := im.(*image).l1Entry(0)
	if err != nil {
		t.Fatal(err)
	}
	table := int(first & offsetMask)
	for name, entry := range map[string]uint64{
		"header":          flagCopied,
		"L1 table":        im.(*image).h.l1Offset | flagCopied,
		"itself":          uint64(table) | flagCopied,
		"another cluster": binary.BigEndian.Uint64(base[table+50*8:]),
		"beyond the end":  1<<40 | flagCopied,
	} {
		if entry&^uint64(flagCopied) == 0 {
			continue // offset 0 is no cluster
		}
		b := bytes.Clone(base)
		put64(b, table, entry)
		im, err := openBytes(b, sdk.OpenRequest{Check: true})
		if err != nil {
			t.Fatal(err)
		}
		res, err := im.(sdk.Checker).Check(ctx, sdk.CheckRequest{})
		if err != nil || res.Corruptions == 0 {
			t.Errorf("L2 entry into %s: %+v, %v", name, res, err)
		}
	}
	for name, entry := range map[string]uint64{
		"beyond the end": flagCompressed | 1<<40,
		"in the header":  flagCompressed,
		"at 2^57":        flagCompressed | 1<<57,
	} {
		b := bytes.Clone(base)
		put64(b, table, entry)
		im, err := openBytes(b, sdk.OpenRequest{})
		if err != nil {
			t.Fatal(err)
		}
		var extents []sdk.Extent
		if err := im.Map(ctx, 0, 4096, func(e []sdk.Extent) bool { extents = append(extents, e...); return true }); err != nil {
			t.Fatal(err)
		}
		if len(extents) != 1 || extents[0].Kind != sdk.Encoded {
			t.Fatalf("%s: %+v", name, extents)
		}
		if err := im.(sdk.Decoder).Decode(ctx, extents[0], make([]byte, 4096)); err == nil {
			t.Errorf("compressed cluster %s was decoded", name)
		}
	}
}

// TestZstdWindow: a frame may ask for a window of gigabytes.
func TestZstdWindow(t *testing.T) {
	im := &image{g: newGeometry(16, false, 4)}
	// Window descriptor: exponent 31-10, then one raw block of 4 bytes.
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 4<<3 | 1, 0, 0, 1, 2, 3, 4}
	bounded(t, func() {
		_ = im.unzstd(make([]byte, 65536), frame) // an error or not, without the memory
	})
	// A block of one byte repeated: 2 MiB out of 13 bytes.
	bomb := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58}
	for range 100 {
		bomb = append(bomb, 0x02, 0x00, 0x10, 'x') // 128 KiB each, not the last
	}
	bomb = append(bomb, 0x03, 0x00, 0x10, 'x')
	bounded(t, func() {
		if err := im.unzstd(make([]byte, 65536), bomb); err == nil {
			t.Error("a bomb was decoded")
		}
	})
}

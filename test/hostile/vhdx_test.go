//go:build linux

package hostile

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"testing"
	"unicode/utf16"

	"github.com/instar-img/instar/sdk/ondisk"
)

const mib = 1 << 20

// vhdxImage is an empty VHDX disk of 4 MiB in blocks of 1 MiB, whose parts tests
// bend: log at 1 MiB, block table at 2, metadata at 3.
type vhdxImage struct {
	logGUID               ondisk.GUID
	logLength, logOffset  uint64
	regions               []vhdxRegion
	regionCount           uint32
	blockSize, flags      uint32
	size                  uint64
	logical, physical     uint32
	items                 []vhdxItem // beside those every image has
	itemOffset, itemCount uint32     // of the first item; of all, 0: as it is
	log                   []byte
	table                 []uint64
}

type vhdxRegion struct {
	guid             string
	offset           uint64
	length, required uint32
}

type vhdxItem struct {
	guid  string
	value []byte
}

func newVHDX() *vhdxImage {
	return &vhdxImage{
		logLength: mib, logOffset: mib, blockSize: mib, size: 4 * mib, logical: 512, physical: 4096,
		regions: []vhdxRegion{{"2dc27766-f623-4200-9d64-115e9bfd4a08", 2 * mib, mib, 1}, {"8b7ca206-4790-4b9a-b8fe-575f050f886e", 3 * mib, mib, 1}},
	}
}

// seal gives a structure its CRC-32C.
func sealVHDX(b []byte) {
	binary.LittleEndian.PutUint32(b[4:], 0)
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

func (v *vhdxImage) bytes() []byte {
	out := make([]byte, 5*mib)
	copy(out, "vhdxfile")
	guid := func(n byte) (g ondisk.GUID) { g[0] = n; return g }
	for i, at := range []int{64 << 10, 128 << 10} {
		h := out[at:][:4096]
		copy(h, le([]byte("head"), uint32(0), uint64(i+1), guid(1), guid(2), v.logGUID, uint16(0), uint16(1), uint32(v.logLength), v.logOffset))
		sealVHDX(h)
	}
	for _, at := range []int{192 << 10, 256 << 10} {
		r := out[at:][:64<<10]
		n := v.regionCount
		if n == 0 {
			n = uint32(len(v.regions))
		}
		copy(r, le([]byte("regi"), uint32(0), n, uint32(0)))
		for i, e := range v.regions {
			copy(r[16+32*i:], le(ondisk.ParseGUID(e.guid), e.offset, e.length, e.required))
		}
		sealVHDX(r)
	}
	copy(out[mib:2*mib], v.log)
	for i, e := range v.table {
		binary.LittleEndian.PutUint64(out[2*mib+8*i:], e)
	}
	items := append([]vhdxItem{
		{"caa16737-fa36-4d43-b3b6-33f0aa44e76b", le(v.blockSize, v.flags)},
		{"2fa54224-cd1b-4876-b211-5dbed83bf4b8", le(v.size)},
		{"beca12ab-b2e6-4523-93ef-c309e000c746", le(guid(3))},
		{"8141bf1d-a96f-4709-ba47-f233a8faab5f", le(v.logical)},
		{"cda348c7-445d-4471-9cc9-e9885251c556", le(v.physical)},
	}, v.items...)
	m := out[3*mib:][:mib]
	n := uint32(len(items))
	if v.itemCount > 0 {
		n = v.itemCount
	}
	copy(m, le([]byte("metadata"), uint16(0), uint16(n)))
	at := uint32(64 << 10)
	for i, e := range items {
		off := at
		if i == 0 && v.itemOffset > 0 {
			off = v.itemOffset
		}
		copy(m[32+32*i:], le(ondisk.ParseGUID(e.guid), off, uint32(len(e.value)), uint32(4)))
		copy(m[at:], e.value)
		at += uint32(len(e.value)+7) &^ 7
	}
	return out
}

// parent makes the image differ from a disk of that name.
func (v *vhdxImage) parent(name string) *vhdxImage {
	v.flags = 2
	pairs := []string{"parent_linkage", "{00000002-0000-0000-0000-000000000000}", "relative_path", name}
	var text, entries []byte
	start := 20 + 12*len(pairs)/2
	var places [][2]int
	for _, p := range pairs {
		at := len(text)
		for _, u := range utf16.Encode([]rune(p)) {
			text = binary.LittleEndian.AppendUint16(text, u)
		}
		places = append(places, [2]int{start + at, len(text) - at})
	}
	for i := 0; i < len(places); i += 2 {
		k, val := places[i], places[i+1]
		entries = append(entries, le(uint32(k[0]), uint32(val[0]), uint16(k[1]), uint16(val[1]))...)
	}
	locator := le(ondisk.ParseGUID("b04aefb7-d19e-4a81-b789-25b8e9445913"), uint16(0), uint16(len(pairs)/2))
	v.items = append(v.items, vhdxItem{"a8d35f2d-b30b-454d-abf7-d3d84834ab0c", slices.Concat(locator, entries, text)})
	return v
}

// logEntry is a sector of a log, for the log that is called 7.
func logEntry(length, tail uint32, sequence uint64, descriptors uint32, more ...byte) []byte {
	b := make([]byte, max(4096, min(int(length), 64<<10)))
	copy(b, le([]byte("loge"), uint32(0), length, tail, sequence, descriptors, uint32(0), ondisk.GUID{7}, uint64(4*mib), uint64(4*mib)))
	copy(b[64:], more)
	sealVHDX(b)
	return b
}

// zeroing is a descriptor that makes a range of the file zeros.
func zeroing(offset, length, sequence uint64) []byte {
	return le([]byte("zero"), uint32(0), length, offset, sequence)
}

func vhdxCases() []hostile {
	var out []hostile
	add := func(name, refuse string, bend func(*vhdxImage)) {
		v := newVHDX()
		bend(v)
		out = append(out, hostile{name: name, bytes: v.bytes(), refuse: refuse, format: "vhdx", few: true})
	}
	log := func(name, refuse string, entries ...[]byte) {
		add("26 log "+name, refuse, func(v *vhdxImage) { v.logGUID, v.log = ondisk.GUID{7}, slices.Concat(entries...) })
	}
	repeat := func(n int, entry func(i int) []byte) []byte {
		var b []byte
		for i := range n {
			b = append(b, entry(i)...)
		}
		return b
	}
	add("25 regions 2^32-1", "all", func(v *vhdxImage) { v.regionCount = 1<<32 - 1 })
	add("25 regions 2048", "all", func(v *vhdxImage) { v.regionCount = 2048 })
	add("25 regions overlap", "all", func(v *vhdxImage) { v.regions[0].offset = v.regions[1].offset })
	add("25 region over the log", "all", func(v *vhdxImage) { v.regions[0].offset = mib })
	add("25 region over the header", "all", func(v *vhdxImage) { v.regions[0].offset = 0 })
	add("25 region past the end", "all", func(v *vhdxImage) { v.regions[0].offset = 1 << 40 })
	add("25 region at 2^64-1M", "all", func(v *vhdxImage) { v.regions[0].offset = 1<<64 - mib })
	add("25 region of 4 GiB", "all", func(v *vhdxImage) { v.regions[1].length = 1<<32 - mib })
	add("25 region of 0", "all", func(v *vhdxImage) { v.regions[0].length = 0 })
	add("25 no metadata region", "all", func(v *vhdxImage) { v.regions = v.regions[:1] })
	add("25 unknown required region", "all", func(v *vhdxImage) {
		v.regions = append(v.regions, vhdxRegion{"00000001-0000-0000-0000-000000000000", 4 * mib, mib, 1})
	})
	add("25 item outside", "all", func(v *vhdxImage) { v.itemOffset = mib - 4 })
	add("25 item at 2^32-8", "all", func(v *vhdxImage) { v.itemOffset = 1<<32 - 8 })
	add("25 item in the table", "all", func(v *vhdxImage) { v.itemOffset = 32 })
	add("25 items 65535", "all", func(v *vhdxImage) { v.itemCount = 65535 })

	log("of zeros", "", nil)
	log("entry of 0", "all", logEntry(0, 0, 1, 0))
	log("entry of 2^32-1", "all", logEntry(1<<32-4096, 0, 1, 0))
	log("descriptors 2^32-1", "all", logEntry(4096, 0, 1, 1<<32-1))
	log("sequence 0", "all", logEntry(4096, 0, 0, 0))
	log("tail outside", "all", logEntry(4096, 1<<31, 1, 0))
	log("tail between sectors", "all", logEntry(4096, 100, 1, 0))
	log("that never ends", "", repeat(256, func(i int) []byte { return logEntry(4096, 0, uint64(i+1), 0) }))
	log("all of one sequence", "", repeat(256, func(int) []byte { return logEntry(4096, 0, 1, 0) }))
	log("backwards", "", repeat(256, func(i int) []byte { return logEntry(4096, 0, uint64(256-i), 0) }))
	log("at the last sequence", "", logEntry(4096, 0, 1<<64-1, 0))
	log("each its own tail", "", repeat(256, func(i int) []byte { return logEntry(4096, uint32(i)<<12, uint64(i+1), 0) }))
	log("zeros to 2^64", "", logEntry(4096, 0, 1, 1, zeroing(4*mib, 1<<64-4096, 1)...))
	log("zeros over the header", "", logEntry(4096, 0, 1, 1, zeroing(0, mib, 1)...))
	log("zeros far away", "", logEntry(4096, 0, 1, 1, zeroing(1<<60, 4096, 1)...))
	log("zeros of terabytes, often", "", logEntry(4096, 0, 1, 126, bytes.Repeat(zeroing(4*mib, 1<<40, 1), 126)...))
	add("26 log of 4 GiB", "all", func(v *vhdxImage) { v.logGUID, v.logLength = ondisk.GUID{7}, 1<<32-mib })
	add("26 log over the header", "all", func(v *vhdxImage) { v.logGUID, v.logOffset = ondisk.GUID{7}, 0 })
	add("26 log past the end", "all", func(v *vhdxImage) { v.logGUID, v.logOffset = ondisk.GUID{7}, 1<<50 })
	add("26 log of no length", "", func(v *vhdxImage) { v.logGUID, v.logLength = ondisk.GUID{7}, 0 })

	// Cases of our own. Block and sector sizes, and entries of the table that nobody
	// bounded, are CVE-2014-0148.
	for _, n := range []uint32{0, 3, 1 << 19, 1 << 29, 1 << 31} {
		add(fmt.Sprint("block size ", n), "all", func(v *vhdxImage) { v.blockSize = n })
	}
	add("size 2^63", "all", func(v *vhdxImage) { v.size = 1 << 63 })
	add("size 65 TiB", "all", func(v *vhdxImage) { v.size = 65 << 40 })
	add("size beyond the table", "all", func(v *vhdxImage) { v.size = 1 << 40 })
	add("sector 0", "all", func(v *vhdxImage) { v.logical = 0 })
	add("sector 2^31", "all", func(v *vhdxImage) { v.logical = 1 << 31 })
	add("parent without locator", "all", func(v *vhdxImage) { v.flags = 2 })
	add("parent locator of 65535", "all", func(v *vhdxImage) {
		v.parent("x")
		binary.LittleEndian.PutUint16(v.items[0].value[18:], 65535)
	})
	add("parent name outside", "all", func(v *vhdxImage) {
		v.parent("x")
		binary.LittleEndian.PutUint32(v.items[0].value[24:], 1<<31)
	})
	add("block past the end", "", func(v *vhdxImage) { v.table = []uint64{1<<50 | 6} })
	add("block at 2^64", "", func(v *vhdxImage) { v.table = []uint64{1<<64 - mib | 6} })
	add("block is the header", "", func(v *vhdxImage) { v.table = []uint64{6} })
	add("block is the table", "", func(v *vhdxImage) { v.table = []uint64{2*mib | 6, 2*mib | 6} })
	add("blocks shared", "", func(v *vhdxImage) { v.table = []uint64{4*mib | 6, 4*mib | 6, 4*mib | 6} })
	add("block state 4", "", func(v *vhdxImage) { v.table = []uint64{4} })
	add("block reserved bits", "", func(v *vhdxImage) { v.table = []uint64{4*mib | 0xffff8 | 6} })
	return out
}

// TestVHDX are cases 25 and 26, through the built programs.
func TestVHDX(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "image", newVHDX().bytes())
	for _, words := range [][]string{{"check", "image"}, {"convert", "-O", "raw", "image", "out"}, {"inspect", "image"}} {
		if r := (command{Argv: words, Dir: dir}).run(t); r.Code != 0 {
			t.Fatalf("the image to be bent is no good: %s: %s%s", words, r.Stdout, r.Stderr)
		}
	}
	for _, h := range vhdxCases() {
		t.Run(h.name, h.survive)
	}
}

package vmdk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// descriptorText is a descriptor of a create type and extent lines.
func descriptorText(createType string, lines ...string) []byte {
	return []byte("# Disk DescriptorFile\nversion=1\nCID=11223344\nparentCID=ffffffff\ncreateType=\"" + createType +
		"\"\n\n# Extent description\n" + strings.Join(lines, "\n") + "\n\n#DDB\nddb.adapterType = \"lsilogic\"\n")
}

// cowdExtent makes an ESX server sparse extent of the grains given, by index.
func cowdExtent(sectors, grainSectors uint32, grains map[int][]byte) []byte {
	tables := uint32((uint64(sectors) + uint64(grainSectors)*cowdTableEntries - 1) / (uint64(grainSectors) * cowdTableEntries))
	h := cowdHeader{version: 1, flags: 3, capacity: sectors, grainSize: grainSectors, gdOffset: 4, directoryEntries: tables}
	b := h.append(nil)
	b = append(b, make([]byte, (tables*4+511)/512*512)...)
	gd := b[cowdHeaderSize:]
	for i := range grains {
		table := i / cowdTableEntries
		if binary.LittleEndian.Uint32(gd[table*4:]) == 0 {
			binary.LittleEndian.PutUint32(gd[table*4:], uint32(len(b)/512))
			b = append(b, make([]byte, cowdTableEntries*4)...)
			gd = b[cowdHeaderSize:]
		}
		at := int(binary.LittleEndian.Uint32(gd[table*4:]))*512 + i%cowdTableEntries*4
		binary.LittleEndian.PutUint32(b[at:], uint32(len(b)/512))
		b = append(b, grains[i]...)
		gd = b[cowdHeaderSize:]
	}
	return b
}

// seSparseExtent makes a seSparse extent of grains, by index; nil is a zero
// grain.
func seSparseExtent(sectors uint64, grains map[int][]byte) []byte {
	tables := (sectors + seSparseGrainSectors*seSparseTableEntries - 1) / (seSparseGrainSectors * seSparseTableEntries)
	directory := (tables*8 + 511) / 512
	h := seSparseHeader{
		version: seSparseVersion, capacity: sectors, grainSize: seSparseGrainSectors, tableSize: seSparseTableSectors,
		volatileOffset: 1, volatileSize: 1,
		directory: [2]uint64{2, directory},
		tables:    [2]uint64{2 + directory, tables * seSparseTableSectors},
		grains:    [2]uint64{2 + directory + tables*seSparseTableSectors, uint64(len(grains)) * seSparseGrainSectors},
	}
	b := h.append(nil)
	b = (&seSparseVolatile{}).append(b)
	b = append(b, make([]byte, h.grains[0]*512-uint64(len(b)))...)
	next := uint64(0)
	for i, data := range grains {
		table := i / seSparseTableEntries
		binary.LittleEndian.PutUint64(b[1024+table*8:], seSparseTableValid|uint64(table))
		at := b[int(h.tables[0])*512+i*8:]
		if data == nil {
			binary.LittleEndian.PutUint64(at, seSparseZero)
			continue
		}
		binary.LittleEndian.PutUint64(at, seSparseAllocated|next>>12|next&0xfff<<48)
		b = append(b, data...)
		next++
	}
	return b
}

// sparseFile reads an extent of an image that create makes.
func sparseFile(t *testing.T, size int64, runs map[int64][]byte) []byte {
	t.Helper()
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "x", size, "subformat=twoGbMaxExtentSparse")
	formattest.Write(t, New(), path, runs, false)
	b, err := os.ReadFile(filepath.Join(dir, "x-s001"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Layouts that create does not make, read as qemu-img reads them.
func TestLayouts(t *testing.T) {
	fill := func(v byte, n int) []byte { return bytes.Repeat([]byte{v}, n) }
	flat := append(fill(1, 64<<10), fill(2, 64<<10)...)
	for _, tt := range []struct {
		name  string
		text  []byte
		files map[string][]byte
		want  []byte
		// alone: qemu-img cannot open it.
		alone bool
	}{
		{
			name: "vmfs", text: descriptorText("vmfs", `RW 256 VMFS "x-flat.vmdk"`),
			files: map[string][]byte{"x-flat.vmdk": flat}, want: flat,
		},
		{
			name: "flat with offset, twice", text: descriptorText("twoGbMaxExtentFlat", `RW 128 FLAT "f" 128`, `RW 128 FLAT "f" 0`),
			files: map[string][]byte{"f": flat}, want: append(fill(2, 64<<10), fill(1, 64<<10)...),
		},
		{
			name:  "vmfsSparse",
			text:  descriptorText("vmfsSparse", `RW 40960 VMFSSPARSE "x-delta.vmdk"`),
			files: map[string][]byte{"x-delta.vmdk": cowdExtent(40960, 1, map[int][]byte{0: fill(7, 512), 4097: fill(8, 512), 40959: fill(9, 512)})},
			want: func() []byte {
				b := make([]byte, 40960*512)
				copy(b, fill(7, 512))
				copy(b[4097*512:], fill(8, 512))
				copy(b[40959*512:], fill(9, 512))
				return b
			}(),
		},
		{
			name:  "seSparse",
			text:  descriptorText("seSparse", `RW 65537 SESPARSE "x-sesparse.vmdk"`),
			files: map[string][]byte{"x-sesparse.vmdk": seSparseExtent(65537, map[int][]byte{1: fill(7, 4096), 2: nil, 4096: fill(8, 4096), 8192: fill(9, 4096)})},
			want: func() []byte {
				b := make([]byte, 65537*512)
				copy(b[4096:], fill(7, 4096))
				copy(b[4096*4096:], fill(8, 4096))
				copy(b[8192*4096:], fill(9, 4096))
				return b
			}(),
		},
		{
			name:  "sparse and flat",
			text:  descriptorText("twoGbMaxExtentSparse", `RW 256 SPARSE "s"`, `RW 256 FLAT "f" 0`),
			files: map[string][]byte{"s": sparseFile(t, 128<<10, map[int64][]byte{64 << 10: fill(3, 64<<10)}), "f": flat},
			want:  append(append(make([]byte, 64<<10), fill(3, 64<<10)...), flat...),
		},
		{
			name:  "carriage returns",
			text:  bytes.ReplaceAll(descriptorText("monolithicFlat", `RW 256 FLAT "f" 0`), []byte("\n"), []byte("\r\n")),
			files: map[string][]byte{"f": flat}, want: flat,
		},
		{
			name: "zero extent", text: descriptorText("twoGbMaxExtentFlat", `RW 128 ZERO`, `RW 256 FLAT "f" 0`),
			files: map[string][]byte{"f": flat}, want: append(make([]byte, 64<<10), flat...), alone: true,
		},
		{
			name: "read-only extent", text: descriptorText("twoGbMaxExtentFlat", `RDONLY 256 FLAT "f" 0`),
			files: map[string][]byte{"f": flat}, want: flat, alone: true,
		},
		{
			name: "monolithicSparse beside its descriptor", text: descriptorText("monolithicSparse", `RW 256 SPARSE "s"`),
			files: map[string][]byte{"s": sparseFile(t, 128<<10, map[int64][]byte{0: fill(3, 64<<10)})},
			want:  append(fill(3, 64<<10), make([]byte, 64<<10)...), alone: true,
		},
		{
			name: "old name of a type", text: descriptorText("2gbMaxExtentFlat", `RW 256 FLAT "f" 0`),
			files: map[string][]byte{"f": flat}, want: flat, alone: true,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "x.vmdk")
			writeFile(t, path, tt.text)
			for name, b := range tt.files {
				writeFile(t, filepath.Join(dir, name), b)
			}
			o := formattest.Open(t, New(), path, false)
			if !bytes.Equal(o.Read(0, o.Info.VirtualSize), tt.want) {
				t.Error("content differs")
			}
			cleanCheck(t, path)
			if tt.alone {
				return
			}
			raw := filepath.Join(dir, "raw")
			writeFile(t, raw, tt.want)
			formattest.Oracle(t, "qemu-img", "compare", "-f", "raw", "-F", "vmdk", raw, path)
			sameInfo(t, o, path)
			sameMap(t, o, path)
		})
	}
}

// An ESX server extent without descriptor, which qemu-img does not open.
func TestCOWDAlone(t *testing.T) {
	data := bytes.Repeat([]byte{5}, 512)
	b := cowdExtent(4096, 1, map[int][]byte{17: data})
	path := filepath.Join(t.TempDir(), "x.vmdk")
	writeFile(t, path, b)
	o := formattest.Open(t, New(), path, false)
	if !bytes.Equal(o.Read(17*512, 512), data) || o.Info.VirtualSize != 4096*512 {
		t.Error("content differs")
	}
	h := cowdHeader{version: 1, capacity: 4096, grainSize: 1, gdOffset: 4, directoryEntries: 1, parentName: "base.vmdk"}
	copy(b, h.append(nil))
	writeFile(t, path, b)
	o = formattest.Open(t, New(), path, false)
	if len(o.Info.References) != 1 || o.Info.References[0].Name != "base.vmdk" {
		t.Errorf("references %+v", o.Info.References)
	}
}

// What the file of an old writer lacks of its last grain reads as zeros.
func TestFileEndsInsideGrain(t *testing.T) {
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "x.vmdk", 1<<20, "")
	formattest.Write(t, New(), path, map[int64][]byte{0: bytes.Repeat([]byte{1}, 1000)}, false)
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, fi.Size()-64<<10+1000); err != nil {
		t.Fatal(err)
	}
	o := formattest.Open(t, New(), path, false)
	if got := o.Read(0, 1<<20); !bytes.Equal(got, append(bytes.Repeat([]byte{1}, 1000), make([]byte, 1<<20-1000)...)) {
		t.Error("content differs")
	}
	cleanCheck(t, path)
}

// A footer may be followed by nothing; everything before it counts.
func TestFooter(t *testing.T) {
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "x.vmdk", 1<<20, "subformat=streamOptimized")
	formattest.Write(t, New(), path, map[int64][]byte{0: {1}}, true)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(b []byte) []byte{
		"cut":          func(b []byte) []byte { return b[:len(b)-512] },
		"magic":        func(b []byte) []byte { b[len(b)-1024] = 0; return b },
		"marker":       func(b []byte) []byte { b[len(b)-1536+12] = 9; return b },
		"end":          func(b []byte) []byte { b[len(b)-512+12] = 1; return b },
		"points again": func(b []byte) []byte { copy(b[len(b)-1024:], b[:512]); return b },
	} {
		writeFile(t, path, edit(bytes.Clone(b)))
		if _, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{}); err == nil || err.Error() != "Invalid footer" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNotAttached(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x.vmdk")
	writeFile(t, path, descriptorText("monolithicFlat", `RW 256 FLAT "missing" 0`))
	o := formattest.Open(t, New(), path, false)
	if o.Info.VirtualSize != 128<<10 {
		t.Errorf("virtual size %d", o.Info.VirtualSize)
	}
	if _, err := o.TryRead(0, 512); !errors.Is(err, sdk.ErrNotAttached) {
		t.Errorf("read: %v", err)
	}
	res, messages := findings(t, path)
	if res.CheckErrors != 1 {
		t.Errorf("check: %+v %q", res, messages)
	}
}

// Names are reported as they stand: what may be opened the core decides
// (adversarial case 22).
func TestHostileNamesAreData(t *testing.T) {
	for _, name := range []string{"/etc/passwd", "../secret", "nbd://host/x", `json:{'driver':'file'}`, "a\x1b[31mb"} {
		path := filepath.Join(t.TempDir(), "x.vmdk")
		writeFile(t, path, descriptorText("monolithicFlat", `RW 1 FLAT "`+name+`" 0`))
		img, err := New().Open(t.Context(), sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.MemFile(descriptorText("monolithicFlat", `RW 1 FLAT "`+name+`" 0`))}}, Name: "x.vmdk"})
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		info, err := img.Info(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		want := []sdk.Reference{{Kind: sdk.RefExtent, Role: "extents:0", Name: name, Required: true}}
		if d := cmp.Diff(want, info.References); d != "" {
			t.Errorf("%q (-want +got):\n%s", name, d)
		}
		err = img.Map(t.Context(), 0, 512, func([]sdk.Extent) bool { return true })
		if !errors.Is(err, sdk.ErrNotAttached) {
			t.Errorf("%q: map without the file: %v", name, err)
		}
	}
}

// Adversarial case 23 and its like.
func TestHostileHeaders(t *testing.T) {
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "x.vmdk", 1<<20, "")
	sound, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		edit func(*sparseHeader)
		want string
	}{
		{"capacity 0", func(h *sparseHeader) { h.capacity = 0 }, "descriptor"},
		{"capacity 0 without descriptor", func(h *sparseHeader) { h.capacity, h.descriptorOffset = 0, 0 }, "Sparse extent without capacity"},
		{"capacity 2^63", func(h *sparseHeader) { h.capacity = 1 << 63 }, "Capacity of 9223372036854775808 sectors is too big"},
		{"capacity 2^54", func(h *sparseHeader) { h.capacity = 1 << 53 }, "L1 size too big"},
		{"grain size 0", func(h *sparseHeader) { h.grainSize = 0 }, "L1 entry size is invalid"},
		{"grain size 3", func(h *sparseHeader) { h.grainSize = 3 }, "Invalid granularity of 3 sectors, a power of two is needed"},
		{"grain size 2^40", func(h *sparseHeader) { h.grainSize = 1 << 40 }, "Invalid granularity, image may be corrupt"},
		{"compressed grains of 1 GiB", func(h *sparseHeader) { h.grainSize, h.compression = 1<<21, 1 }, "Compressed grains of 1073741824 bytes, at most 8388608 are supported"},
		{"table of 0", func(h *sparseHeader) { h.tableEntries = 0 }, "L1 entry size is invalid"},
		{"table of 513", func(h *sparseHeader) { h.tableEntries = 513 }, "L2 table size too big"},
		{"version 4", func(h *sparseHeader) { h.version = 4 }, "Unsupported VMDK version 4"},
		{"compression 2", func(h *sparseHeader) { h.compression = 2 }, "Unsupported compression algorithm 2"},
		{"overhead 2^60", func(h *sparseHeader) { h.overhead = 1 << 40 }, "File truncated, expecting at least 562949953421312 bytes"},
		{"directory beyond the end", func(h *sparseHeader) { h.gdOffset = 4096 }, "grain directory at sector 4096 beyond end of file of 65536 bytes"},
		{"directory at the end", func(h *sparseHeader) { h.gdOffset = 128 }, "Grain directory of 1 entries at 0x10000 beyond end of file 0x10000"},
		{"footer missing", func(h *sparseHeader) { h.gdOffset = gdAtEnd }, "Invalid footer"},
		{"descriptor beyond the end", func(h *sparseHeader) { h.descriptorOffset = 1 << 50 }, "Descriptor of 20 sectors at sector 1125899906842624, the file has 65536 bytes"},
		{"descriptor of 1 GiB", func(h *sparseHeader) { h.descriptorSize = 1 << 21 }, "Descriptor of 2097152 sectors at sector 1, the file has 65536 bytes"},
		{"no descriptor", func(h *sparseHeader) { h.descriptorOffset = 0 }, "The file is one of the extents of a VMDK image: open the image's descriptor file instead"},
	} {
		b := bytes.Clone(sound)
		var h sparseHeader
		if err := h.decode(b); err != nil {
			t.Fatal(err)
		}
		tt.edit(&h)
		copy(b, h.append(nil))
		writeFile(t, path, b)
		if tt.name == "capacity 0" {
			tt.want = "" // what the descriptor says counts, and its extent is the file itself
		}
		o, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{})
		switch {
		case err == nil:
			if _, err := o.TryRead(0, 512); err == nil {
				t.Errorf("%s: accepted", tt.name)
			}
		case tt.want != "" && err.Error() != tt.want:
			t.Errorf("%s: %q, want %q", tt.name, err, tt.want)
		case !errors.Is(err, sdk.ErrCorrupt) && !errors.Is(err, sdk.ErrUnsupported):
			t.Errorf("%s: %v is of no class", tt.name, err)
		}
	}
}

func TestHostileDescriptors(t *testing.T) {
	big := append(descriptorText("monolithicFlat", `RW 1 FLAT "x" 0`), make([]byte, 2<<20)...)
	for _, tt := range []struct {
		name string
		text []byte
		want string
	}{
		{"2 MiB", big, "invalid VMDK image descriptor"},
		{"no type", []byte("# Disk DescriptorFile\nCID=1\n"), "invalid VMDK image descriptor"},
		{"no cid", []byte("# Disk DescriptorFile\ncreateType=\"vmfs\"\nRW 1 VMFS \"x\"\n"), "VMDK image descriptor without CID"},
		{"bad cid", []byte("# Disk DescriptorFile\ncreateType=\"vmfs\"\nCID=123456789\n"), `VMDK image descriptor with the CID "123456789"`},
		{"no extents", descriptorText("monolithicFlat"), "VMDK image descriptor without extents"},
		{"device", descriptorText("fullDevice", `RW 1 FLAT "/dev/sda" 0`), "Unsupported image type 'fullDevice'"},
		{"raw device map", descriptorText("vmfsRawDeviceMap", `RW 1 VMFS "x"`), "Unsupported image type 'vmfsRawDeviceMap'"},
		{"raw device", descriptorText("vmfs", `RW 1 VMFSRDM "x"`), "Unsupported extent type 'VMFSRDM'"},
		{"negative offset", descriptorText("monolithicFlat", `RW 1 FLAT "x" -1`), `Invalid extent line: RW 1 FLAT "x" -1`},
		{"no offset", descriptorText("monolithicFlat", `RW 1 FLAT "x"`), `Invalid extent line: RW 1 FLAT "x"`},
		{"no name", descriptorText("monolithicFlat", `RW 1 FLAT`), `Invalid extent line: RW 1 FLAT`},
		{"open quote", descriptorText("monolithicFlat", `RW 1 FLAT "x 0`), `Invalid extent line: RW 1 FLAT "x 0`},
		{"negative sectors", descriptorText("monolithicFlat", `RW -1 FLAT "x" 0`), `Invalid extent line: RW -1 FLAT "x" 0`},
		{"2^63 sectors", descriptorText("monolithicFlat", `RW 9223372036854775807 FLAT "x" 0`), "Extent 0 of 9223372036854775807 sectors is too big"},
		{"sum", descriptorText("twoGbMaxExtentFlat", `RW 18014398509481983 FLAT "x" 0`, `RW 18014398509481983 FLAT "y" 0`), "Extents up to 1 are too big"},
		{"hint", []byte("# Disk DescriptorFile\ncreateType=\"vmfs\"\nCID=1\nparentFileNameHint=\"x\n"), "VMDK image descriptor with an unterminated parentFileNameHint"},
	} {
		_, err := New().Open(t.Context(), sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.MemFile(tt.text)}}})
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// A flat extent's offset must not wrap around.
func TestHostileFlatOffset(t *testing.T) {
	for _, offset := range []string{"9223372036854775807", "18014398509481983", "1", "36028797018963968"} {
		dir := t.TempDir()
		path := filepath.Join(dir, "x.vmdk")
		writeFile(t, path, descriptorText("monolithicFlat", `RW 2 FLAT "f" `+offset))
		writeFile(t, filepath.Join(dir, "f"), make([]byte, 1024))
		o := formattest.Open(t, New(), path, false)
		if _, err := o.TryRead(0, 1024); !errors.Is(err, sdk.ErrCorrupt) {
			t.Errorf("offset %s: %v", offset, err)
		}
		if res, _ := findings(t, path); res.Corruptions != 1 {
			t.Errorf("offset %s: check %+v", offset, res)
		}
	}
}

func TestHostileSESparse(t *testing.T) {
	sound := seSparseExtent(65536, map[int][]byte{1: make([]byte, 4096)})
	for _, tt := range []struct {
		name string
		at   int
		v    uint64
		want string
	}{
		{"magic", 0, 1, "Bad const header magic: 0x0000000000000001"},
		{"version", 8, 1, "Unsupported version: 0x0000000000000001"},
		{"capacity 0", 16, 0, "seSparse extent with a capacity of 0 sectors"},
		{"capacity 2^63", 16, 1 << 63, "seSparse extent with a capacity of 9223372036854775808 sectors"},
		{"capacity", 16, 1 << 40, "Grain directory of 1 sectors is too small for 1099511627776 sectors"},
		{"grain", 24, 16, "Unsupported grain size: 16"},
		{"table", 32, 1, "Unsupported grain table size: 1"},
		{"flags", 40, 1, "Unsupported flags: 0x0000000000000001"},
		{"directory", 136, 1 << 60, "L1 size too big"},
		{"tables", 144, 1 << 60, fmt.Sprintf("seSparse structure at sector %d beyond end of file, sector %d", 1<<60, len(sound)/512)},
		{"volatile", 512, 1, "Bad volatile header magic: 0x0000000000000001"},
		{"journal", 536, 1, "Image is dirty, Replaying journal not supported"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "x.vmdk")
		writeFile(t, path, descriptorText("seSparse", `RW 65536 SESPARSE "s"`))
		b := bytes.Clone(sound)
		binary.LittleEndian.PutUint64(b[tt.at:], tt.v)
		writeFile(t, filepath.Join(dir, "s"), b)
		_, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{})
		if err == nil || !strings.HasSuffix(err.Error(), ": "+tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestCheckFindings(t *testing.T) {
	const size = 64 << 20
	create := func(t *testing.T, opts string, compressed bool) ([]byte, string, sparseHeader) {
		dir := t.TempDir()
		path := formattest.Create(t, New(), dir, "x.vmdk", size, opts)
		data := bytes.Repeat([]byte{1}, 64<<10)
		formattest.Write(t, New(), path, map[int64][]byte{0: data, 64 << 10: data, 40 << 20: data}, compressed)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		h, err := readSparseHeader(formattest.MemFile(b), int64(len(b)))
		if err != nil {
			t.Fatal(err)
		}
		return b, path, h
	}
	// entry returns the place of entry j of table i.
	entry := func(b []byte, directory uint64, i, j int) []byte {
		return b[int(binary.LittleEndian.Uint32(b[int(directory)*512+i*4:]))*512+j*4:]
	}
	le := binary.LittleEndian
	for _, tt := range []struct {
		name, opts string
		edit       func(b []byte, h sparseHeader)
		want       []string
	}{
		{"grain beyond EOF", "", func(b []byte, h sparseHeader) {
			le.PutUint32(entry(b, h.gdOffset, 0, 1), 1<<30)
			le.PutUint32(entry(b, h.rgdOffset, 0, 1), 1<<30)
		}, []string{"ERROR: cluster offset for sector 128 points after EOF"}},
		{"shared grain", "", func(b []byte, h sparseHeader) {
			copy(entry(b, h.gdOffset, 0, 1)[:4], entry(b, h.gdOffset, 0, 0)[:4])
			copy(entry(b, h.rgdOffset, 0, 1)[:4], entry(b, h.rgdOffset, 0, 0)[:4])
		}, []string{"ERROR: grain for sector 128 shares its place in the file"}},
		{"grain in metadata", "", func(b []byte, h sparseHeader) {
			le.PutUint32(entry(b, h.gdOffset, 1, 7), 21)
			le.PutUint32(entry(b, h.rgdOffset, 1, 7), 21)
		}, []string{"ERROR: grain for sector 66432 lies in metadata"}},
		{"redundant table", "", func(b []byte, h sparseHeader) { le.PutUint32(entry(b, h.rgdOffset, 1, 7), 21) },
			[]string{"ERROR: redundant grain table for sector 65536 differs"}},
		{"redundant directory", "", func(b []byte, h sparseHeader) { le.PutUint32(b[h.rgdOffset*512:], 0) },
			[]string{"ERROR: grain table for sector 0 is in one of two grain directories"}},
		{"table beyond EOF", "", func(b []byte, h sparseHeader) { le.PutUint32(b[h.gdOffset*512+4:], 1<<30) },
			[]string{"ERROR: grain table for sector 65536 points after EOF"}},
		{"shared table", "", func(b []byte, h sparseHeader) {
			copy(b[h.gdOffset*512+4:][:4], b[h.gdOffset*512:])
			copy(b[h.rgdOffset*512+4:][:4], b[h.rgdOffset*512:])
		}, []string{"ERROR: grain table for sector 65536 is another's too"}},
		{"line ends", "", func(b []byte, h sparseHeader) { b[75] = '\n' },
			[]string{"ERROR: extent 0: line ends were translated when the file was transferred"}},
		{"marker of another grain", "subformat=streamOptimized", func(b []byte, h sparseHeader) { b[128*512]++ },
			[]string{"ERROR: compressed grain for sector 0 is marked as of sector 1"}},
		{"marker too long", "subformat=streamOptimized", func(b []byte, h sparseHeader) { le.PutUint32(b[128*512+8:], 1<<30) },
			[]string{"ERROR: compressed grain for sector 0 has 1073741824 bytes, at most 4084 are there"}},
		{"grain in a table", "subformat=streamOptimized", func(b []byte, h sparseHeader) {
			le.PutUint32(entry(b, h.gdOffset, 1, 128), le.Uint32(b[h.gdOffset*512:]))
		}, []string{
			"ERROR: grain for sector 81920 shares its place in the file",
			"ERROR: compressed grain for sector 81920 has 0 bytes, at most 3060 are there",
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b, path, h := create(t, tt.opts, strings.Contains(tt.opts, "stream"))
			cleanCheck(t, path)
			tt.edit(b, h)
			writeFile(t, path, b)
			res, messages := findings(t, path)
			if tt.name == "grain in a table" || tt.name == "marker too long" {
				// The numbers of bytes depend on the compressor.
				for i := range messages {
					messages[i], _, _ = strings.Cut(messages[i], ", at most")
				}
				for i := range tt.want {
					tt.want[i], _, _ = strings.Cut(tt.want[i], ", at most")
				}
				if d := cmp.Diff(tt.want[:1], messages[:1]); d != "" {
					t.Errorf("(-want +got):\n%s", d)
				}
			} else if d := cmp.Diff(tt.want, messages); d != "" {
				t.Errorf("(-want +got):\n%s", d)
			}
			if res.Corruptions != int64(len(messages)) {
				t.Errorf("%+v for %d messages", res, len(messages))
			}
		})
	}
}

// A directory that lies beyond the end is found by check, not by a crash.
func TestCheckOfTruncated(t *testing.T) {
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "x.vmdk", 64<<20, "")
	var h sparseHeader
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.decode(b); err != nil {
		t.Fatal(err)
	}
	h.overhead = 1
	copy(b, h.append(nil))
	writeFile(t, path, b[:h.gdOffset*512])
	if _, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{}); !errors.Is(err, sdk.ErrCorrupt) {
		t.Errorf("open: %v", err)
	}
	if res, messages := findings(t, path); res.Corruptions != 1 || messages[0] != "ERROR: grain directory for sector 0 and on points after EOF" {
		t.Errorf("check: %+v %q", res, messages)
	}
}

// A directory all of whose entries are the same table takes no time.
func TestCheckOfSharedTables(t *testing.T) {
	const sectors = 1<<32 - 1
	b := cowdExtent(sectors, 1, nil)
	binary.LittleEndian.PutUint32(b[len(b)-4:], 0)
	table := uint32(len(b) / 512)
	for at := cowdHeaderSize; at+4 <= len(b); at += 4 {
		binary.LittleEndian.PutUint32(b[at:], table)
	}
	for range cowdTableEntries {
		b = binary.LittleEndian.AppendUint32(b, table+32)
	}
	b = append(b, make([]byte, 512)...)
	path := filepath.Join(t.TempDir(), "x.vmdk")
	writeFile(t, path, b)
	res, messages := findings(t, path)
	if want := int64(1<<20 - 1 + 4095); res.Corruptions != want || len(messages) != maxMessages {
		t.Errorf("%+v, want %d corruptions; %d messages", res, want, len(messages))
	}
}

// A compressed grain that inflates to more than a grain, that is cut, damaged
// or shorter than it should be.
func TestHostileGrains(t *testing.T) {
	deflate := func(n int) []byte {
		var p packer
		if err := p.pack(0, make([]byte, n), int64(n)); err != nil {
			t.Fatal(err)
		}
		return p.buf
	}
	build := func(packed []byte) *formattest.Opened {
		h := sparseHeader{version: 3, flags: flagCompressed | flagMarkers, capacity: 256, grainSize: 128, descriptorOffset: 1, descriptorSize: 20,
			tableEntries: 512, gdOffset: 21, overhead: 32, newlines: newlineTest, compression: compressDeflate}
		b := h.append(nil)
		b = append(b, descriptorText("streamOptimized")...)
		b = append(b, make([]byte, 32*512-len(b))...)
		binary.LittleEndian.PutUint32(b[21*512:], 22)
		binary.LittleEndian.PutUint32(b[22*512:], 32)
		path := filepath.Join(t.TempDir(), "x.vmdk")
		writeFile(t, path, append(b, packed...))
		return formattest.Open(t, New(), path, false)
	}
	if got := build(deflate(64<<10)).Read(100, 1000); !bytes.Equal(got, make([]byte, 1000)) {
		t.Error("a sound grain reads wrong")
	}
	for name, packed := range map[string][]byte{
		"bomb":      deflate(64<<20 + 1),
		"one more":  deflate(64<<10 + 1),
		"short":     deflate(64<<10 - 1),
		"empty":     deflate(0),
		"cut":       func() []byte { b := deflate(64 << 10); return b[:40] }(),
		"checksum":  func() []byte { b := deflate(64 << 10); b[11+binary.LittleEndian.Uint32(b[8:])]++; return b }(),
		"no stream": make([]byte, 1024),
		"noise":     append(binary.LittleEndian.AppendUint32(make([]byte, 8), 500), bytes.Repeat([]byte{0x78}, 500)...),
	} {
		if _, err := build(packed).TryRead(0, 64<<10); !errors.Is(err, sdk.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

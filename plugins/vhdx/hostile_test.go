package vhdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
	"github.com/instar-img/instar/sdk/ondisk"
)

func readFile(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// setRegions changes both copies of the region table. raw, where not nil, has
// the last word on its bytes.
func setRegions(b []byte, edit func(*regionTable), raw func([]byte)) []byte {
	b = bytes.Clone(b)
	var t regionTable
	if err := t.decode(b[regionTable1Offset:]); err != nil {
		panic(err)
	}
	edit(&t)
	table := t.append(nil)
	if raw != nil {
		raw(table)
		seal(table)
	}
	copy(b[regionTable1Offset:], table)
	copy(b[regionTable2Offset:], table)
	return b
}

func setItems(b []byte, edit func(*metadataTable)) []byte {
	b = bytes.Clone(b)
	var t metadataTable
	if err := t.decode(b[3*mib:]); err != nil {
		panic(err)
	}
	edit(&t)
	copy(b[3*mib:], t.append(nil))
	return b
}

// poke puts a little-endian number at an offset of the metadata region.
func poke[T uint16 | uint32 | uint64](b []byte, off int, v T) []byte {
	b = bytes.Clone(b)
	switch v := any(v).(type) {
	case uint16:
		binary.LittleEndian.PutUint16(b[3*mib+off:], v)
	case uint32:
		binary.LittleEndian.PutUint32(b[3*mib+off:], v)
	case uint64:
		binary.LittleEndian.PutUint64(b[3*mib+off:], v)
	}
	return b
}

func setEntry(b []byte, i int, e batEntry) []byte {
	b = bytes.Clone(b)
	binary.LittleEndian.PutUint64(b[2*mib+8*i:], uint64(e))
	return b
}

// Offsets of the values behind the metadata table, as create lays them out.
const (
	atBlockSize = metadataTableSize
	atFlags     = metadataTableSize + 4
	atSize      = metadataTableSize + 8
	atSector    = metadataTableSize + 32
)

func TestHostile(t *testing.T) {
	good := small(t, "")
	none := func(*regionTable) {}
	for _, c := range []struct {
		name string
		b    []byte
		want error
		text string // in the error
	}{
		{"sound", good, nil, ""},
		{"empty", nil, sdk.ErrNotFormat, ""},
		{"other signature", append([]byte("vhdxfilf"), good[8:]...), sdk.ErrNotFormat, ""},
		{"signature alone", good[:8], sdk.ErrCorrupt, "No valid VHDX header found"},

		{"2^32-1 regions", setRegions(good, none, func(b []byte) { binary.LittleEndian.PutUint32(b[8:], 1<<32-1) }), sdk.ErrCorrupt, "4294967295 regions"},
		{"2048 regions", setRegions(good, none, func(b []byte) { binary.LittleEndian.PutUint32(b[8:], 2048) }), sdk.ErrCorrupt, "2048 regions"},
		{"no regions", setRegions(good, func(r *regionTable) { r.regions = nil }, nil), sdk.ErrCorrupt, "region table"},
		{"overlapping regions", setRegions(good, func(r *regionTable) { r.regions[1].offset = 2 * mib }, nil), sdk.ErrCorrupt, "overlaps"},
		{"region over the log", setRegions(good, func(r *regionTable) { r.regions[0].offset = mib }, nil), sdk.ErrCorrupt, "VHDX region 1048576-2097152 overlaps with region 1048576-2097152"},
		{"region in the header section", setRegions(good, func(r *regionTable) { r.regions[0].offset = 4096 }, nil), sdk.ErrCorrupt, "region[0]"},
		{"region behind the end", setRegions(good, func(r *regionTable) { r.regions[0].offset = 1 << 40 }, nil), sdk.ErrCorrupt, "region[0]"},
		{"region offset overflows", setRegions(good, func(r *regionTable) { r.regions[0].offset = 1<<64 - mib }, nil), sdk.ErrCorrupt, "region[0]"},
		{"two tables", setRegions(good, func(r *regionTable) { r.regions[1].guid = regionBAT }, nil), sdk.ErrCorrupt, "2 block allocation tables"},
		{"unknown required region", setRegions(good, func(r *regionTable) {
			r.regions = append(r.regions, region{testGUID(1), 4 * mib, mib, 1})
		}, nil), sdk.ErrUnsupported, "region[2]"},
		{"unknown region", setRegions(good, func(r *regionTable) {
			r.regions = append(r.regions, region{testGUID(1), 4 * mib, mib, 0})
		}, nil), nil, ""},
		{"unknown region over the table", setRegions(good, func(r *regionTable) {
			r.regions = append(r.regions, region{testGUID(1), 2 * mib, mib, 0})
		}, nil), sdk.ErrCorrupt, "overlaps"},
		{"table too small", setRegions(good, func(r *regionTable) { r.regions[0].length = 16 }, nil), sdk.ErrCorrupt, "bat"},

		{"item outside its region", setItems(good, func(m *metadataTable) { m.items[0].offset = 1<<32 - 8 }), sdk.ErrCorrupt, "metadata[0]"},
		{"item ends outside its region", setItems(good, func(m *metadataTable) { m.items[0].offset = mib - 4 }), sdk.ErrCorrupt, "metadata[0]"},
		{"item inside the table", setItems(good, func(m *metadataTable) { m.items[0].offset = 32 }), sdk.ErrCorrupt, "metadata[0]"},
		{"item of 4 GiB", setItems(good, func(m *metadataTable) { m.items[0].length = 1<<32 - 1 }), sdk.ErrCorrupt, "metadata[0]"},
		{"item too short", setItems(good, func(m *metadataTable) { m.items[1].length = 4 }), sdk.ErrCorrupt, "metadata[1]"},
		{"item twice", setItems(good, func(m *metadataTable) { m.items[1].guid = itemFileParameters }), sdk.ErrCorrupt, "twice"},
		{"items overlap", setItems(good, func(m *metadataTable) { m.items[1].offset = m.items[0].offset }), sdk.ErrCorrupt, "overlap"},
		{"item missing", setItems(good, func(m *metadataTable) { m.items = m.items[:4] }), sdk.ErrCorrupt, "missing"},
		{"65535 items", poke(good, 10, uint16(65535)), sdk.ErrCorrupt, "65535 items"},
		{"unknown required item", setItems(good, func(m *metadataTable) {
			m.items = append(m.items, item{testGUID(1), metadataTableSize + 100, 4, itemIsRequired})
		}), sdk.ErrUnsupported, "metadata[5]"},
		{"user item with a system id", setItems(good, func(m *metadataTable) {
			m.items = append(m.items, item{itemVirtualSize, metadataTableSize + 100, 4, itemIsUser})
		}), nil, ""},

		{"block size 0", poke(good, atBlockSize, uint32(0)), sdk.ErrCorrupt, "block size"},
		{"block size 3 MiB", poke(good, atBlockSize, uint32(3*mib)), sdk.ErrCorrupt, "block size"},
		{"block size 2^31", poke(good, atBlockSize, uint32(1<<31)), sdk.ErrCorrupt, "block size"},
		{"sector size 0", poke(good, atSector, uint32(0)), sdk.ErrCorrupt, "sector size"},
		{"virtual size 2^64-512", poke(good, atSize, uint64(1<<64-512)), sdk.ErrCorrupt, "virtual size"},
		{"virtual size 64 TiB", poke(good, atSize, uint64(64<<40)), sdk.ErrCorrupt, "bat"},
		{"virtual size odd", poke(good, atSize, uint64(511)), nil, ""},
		{"parent without locator", poke(good, atFlags, uint32(hasParent)), sdk.ErrCorrupt, "locator"},

		{"block behind the end", setEntry(good, 0, makeEntry(blockFullyPresent, 1<<40)), sdk.ErrCorrupt, "VHDX BAT entry 0 start offset 1099511627776 points after end of file (9437184). Image has probably been truncated."},
		{"block ends behind the end", setEntry(good[:len(good)-512], 3, 0), sdk.ErrCorrupt, "VHDX BAT entry 1 end offset 9437183 points after end of file (9436672). Image has probably been truncated."},
		{"block offset overflows", setEntry(good, 0, batEntry(offsetMask|blockFullyPresent)), sdk.ErrCorrupt, "VHDX BAT entry 0 offset overflow."},
		{"block over the table", setEntry(good, 0, makeEntry(blockFullyPresent, 2*mib)), sdk.ErrCorrupt, "VHDX region 2097152-3145728 overlaps with region 2097152-3145728"},
		{"block in the headers", setEntry(good, 0, makeEntry(blockFullyPresent, 0)), sdk.ErrCorrupt, "header section"},

		{"log offset 0", setHeaders(good, func(h *header) { h.logOffset = 0 }), sdk.ErrCorrupt, "log"},
		{"log offset 2^64-1M", setHeaders(good, func(h *header) { h.logOffset = 1<<64 - mib }), sdk.ErrCorrupt, "log"},
		{"log over the table", setHeaders(good, func(h *header) { h.logOffset = 2 * mib }), sdk.ErrCorrupt, "overlaps"},
		{"log of 4 GiB", setHeaders(good, func(h *header) { h.log, h.logLength = testLog, 1<<32-mib }), sdk.ErrCorrupt, "log"},
		{"log version", setHeaders(good, func(h *header) { h.log, h.logVersion = testLog, 1 }), sdk.ErrUnsupported, "log version"},
	} {
		for _, forCheck := range []bool{false, true} {
			img, err := open(c.b, forCheck)
			if forCheck && strings.Contains(c.name, "block ") && !strings.Contains(c.name, "size") {
				// Left for Check to report.
				if err != nil {
					t.Errorf("%s: %v", c.name, err)
					continue
				}
				var messages []string
				res, err := img.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Message: func(m string) { messages = append(messages, m) }})
				if err != nil || res.Corruptions == 0 || !strings.Contains(strings.Join(messages, "\n"), c.text) {
					t.Errorf("%s: check %+v, %v, %q", c.name, res, err, messages)
				}
				continue
			}
			if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Errorf("%s: %v, want %v", c.name, err, c.want)
			} else if err != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%s: %q does not say %q", c.name, err, c.text)
			}
		}
	}
}

// A part of a sector at the end is no part of the disk. An image that holds
// something there is refused, and so is one that shall be written.
func TestPartSector(t *testing.T) {
	const tail = 9*mib - 512 // where the last sector of block 1 lies
	odd := poke(small(t, ""), atSize, uint64(2*mib-512+100))
	for _, c := range []struct {
		name      string
		at        int // of a byte that is not zero
		readWrite bool
		want      error
	}{
		{"last byte before", tail - 1, false, nil},
		{"first byte", tail, false, sdk.ErrCorrupt},
		{"last byte", tail + 99, false, sdk.ErrCorrupt},
		{"first byte behind", tail + 100, false, nil},
		{"writing", tail - 1, true, sdk.ErrCorrupt},
	} {
		b := bytes.Clone(odd)
		clear(b[8*mib:])
		b[c.at] = 1
		img, err := New().Open(context.Background(), sdk.OpenRequest{
			Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.MemFile(b)}}, ReadWrite: c.readWrite,
		})
		if !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
			continue
		}
		if err != nil {
			continue
		}
		if info, err := img.Info(context.Background()); err != nil || info.VirtualSize != 2*mib-512 {
			t.Errorf("%s: %+v, %v", c.name, info, err)
		}
	}
}

func TestSecondRegionTable(t *testing.T) {
	b := small(t, "")
	b[regionTable1Offset+20]++
	if _, err := open(b, false); err != nil {
		t.Errorf("with the first copy damaged: %v", err)
	}
	b[regionTable2Offset+20]++
	if _, err := open(b, false); !errors.Is(err, sdk.ErrCorrupt) {
		t.Errorf("with both copies damaged: %v", err)
	}
}

func TestUnreadableStates(t *testing.T) {
	b := small(t, "")
	for _, s := range []uint8{4, blockPartiallyPresent} {
		o := formattest.Open(t, New(), save(t, setEntry(b, 1, makeEntry(s, 8*mib))), false)
		if _, err := o.TryRead(mib, 1); !errors.Is(err, sdk.ErrCorrupt) {
			t.Errorf("state %d: %v", s, err)
		}
	}
	for _, s := range []uint8{blockUndefined, blockZero, blockUnmapped, blockUnmapped095} {
		o := formattest.Open(t, New(), save(t, setEntry(b, 1, makeEntry(s, 8*mib))), false)
		if got := o.Read(mib, 1)[0]; got != 0 {
			t.Errorf("state %d reads %#x", s, got)
		}
	}
}

// TestCheckAsQemu compares findings with qemu-img's, line by line.
func TestCheckAsQemu(t *testing.T) {
	good := small(t, "")
	for _, b := range [][]byte{
		good,
		setEntry(good, 0, makeEntry(blockFullyPresent, 1<<40)),
		setEntry(setEntry(good, 0, makeEntry(blockFullyPresent, 2*mib)), 2, makeEntry(blockFullyPresent, mib)),
		setEntry(good, 3, makeEntry(blockFullyPresent, 3*mib)),
		good[:len(good)-1000],
		setEntry(setEntry(good, 0, makeEntry(blockFullyPresent, 1<<50)), 2, makeEntry(blockFullyPresent, 1<<60)),
		setEntry(good, 2, batEntry(offsetMask|blockFullyPresent)),
	} {
		path := save(t, b)
		_, stderr, code := formattest.TryOracle(t, "qemu-img", "check", "-f", "vhdx", path)
		var want []string
		for _, l := range strings.Split(stderr, "\n") {
			if l = strings.TrimPrefix(l, "qemu-img: "); l != "" {
				want = append(want, l)
			}
		}
		res, messages := check(t, path, sdk.FixNone)
		if strings.Join(messages, "\n") != strings.Join(want, "\n") {
			t.Errorf("messages\n%s\nqemu-img's\n%s", strings.Join(messages, "\n"), strings.Join(want, "\n"))
		}
		if (res.Corruptions > 0) != (code == 2) || int(res.Corruptions) != len(want) {
			t.Errorf("%d corruptions, qemu-img exits %d", res.Corruptions, code)
		}
	}
}

// TestCheckMore reports what qemu-img does not look at.
func TestCheckMore(t *testing.T) {
	good := small(t, "")
	for _, c := range []struct {
		b    []byte
		want string
	}{
		{setEntry(good, 0, makeEntry(blockFullyPresent, 8*mib)), "VHDX BAT entry 1 at 8388608 overlaps with another block."},
		{setEntry(good, 1, makeEntry(blockFullyPresent, 8*mib)|8), "VHDX BAT entry 1 has reserved bits 0x8 set: its block is not aligned to 1 MiB."},
		{setEntry(good, 0, 4), "VHDX BAT entry 0 has the unknown state 4."},
		{setEntry(good, 1, makeEntry(blockPartiallyPresent, 8*mib)), "VHDX BAT entry 1 is partially present in an image without parent."},
	} {
		res, messages := check(t, save(t, c.b), sdk.FixNone)
		if res.Corruptions != 1 || len(messages) != 1 || messages[0] != c.want {
			t.Errorf("%+v %q, want %q", res, messages, c.want)
		}
	}
}

func TestDiff(t *testing.T) {
	dir := t.TempDir()
	formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=1M", filepath.Join(dir, "base.vhdx"), "4M")
	formattest.Oracle(t, "qemu-io", "-f", "vhdx", "-c", "write -P 1 0 4M", filepath.Join(dir, "base.vhdx"))
	base := formattest.Open(t, New(), filepath.Join(dir, "base.vhdx"), false)
	path := formattest.Create(t, New(), dir, "child.vhdx", formattest.NoSize, "backing_file=base.vhdx,block_size=1M")
	o := formattest.Open(t, New(), path, false)
	if len(o.Info.References) != 1 || o.Info.VirtualSize != 4*mib {
		t.Fatalf("%+v", o.Info)
	}
	ref := o.Info.References[0]
	if ref.Kind != sdk.RefBacking || ref.Name != "base.vhdx" || ref.Format != "vhdx" || ref.Identity == "" || ref.Identity != base.Info.Identity[ref.IdentityKey] {
		t.Errorf("reference %+v, parent's identity %v", ref, base.Info.Identity)
	}
	for _, key := range []string{identityDisk, identityLogicalSector, identityPhysicalSector} {
		if o.Info.Identity[key] != base.Info.Identity[key] || o.Info.Identity[key] == "" {
			t.Errorf("%s is %q, the parent's %q", key, o.Info.Identity[key], base.Info.Identity[key])
		}
	}
	if o.Info.Identity[identityDataWrite] == ref.Identity {
		t.Error("the child has its parent's data write GUID")
	}
	if m := o.Map(); len(m) != 1 || m[0].Kind != sdk.Absent {
		t.Errorf("map of a new differencing disk: %+v", m)
	}
	_, id, ok := strings.Cut(formattest.Oracle(t, "vhdiinfo", filepath.Join(dir, "base.vhdx")), "\tIdentifier\t\t: ")
	if out := formattest.Oracle(t, "vhdiinfo", path); !ok || !strings.Contains(out, "Differential") || !strings.Contains(out, "Parent identifier\t: "+strings.TrimSpace(id)) {
		t.Errorf("vhdiinfo: %s, parent %s", out, id)
	}
	// A parent that is written to is no longer the same.
	formattest.Oracle(t, "qemu-io", "-f", "vhdx", "-c", "write -P 2 0 1M", filepath.Join(dir, "base.vhdx"))
	if now := formattest.Open(t, New(), filepath.Join(dir, "base.vhdx"), false); now.Info.Identity[ref.IdentityKey] == ref.Identity {
		t.Error("the parent's identity survives a write")
	}

	formattest.Write(t, New(), path, map[int64][]byte{mib: bytes.Repeat([]byte{7}, mib)}, false)
	o = formattest.Open(t, New(), path, true)
	w := o.Image.(sdk.Writer)
	if wi, err := w.BeginWrite(context.Background(), sdk.WriteRequest{}); err != nil || wi.ReadsZero {
		t.Fatalf("%+v, %v", wi, err)
	}
	if err := w.Zero(context.Background(), []sdk.Run{{Offset: 2 * mib, Length: mib}}); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(context.Background()); err != nil {
		t.Fatal(err)
	}
	var kinds []sdk.ExtentKind
	for _, e := range formattest.Open(t, New(), path, false).Map() {
		kinds = append(kinds, e.Kind)
	}
	if want := []sdk.ExtentKind{sdk.Absent, sdk.Data, sdk.Zero, sdk.Absent}; !bytes.Equal(kindBytes(kinds), kindBytes(want)) {
		t.Errorf("kinds %v, want %v", kinds, want)
	}
	if res, messages := check(t, path, sdk.FixNone); *res != (sdk.CheckResult{}) {
		t.Errorf("check: %+v %q", res, messages)
	}
}

func kindBytes(kinds []sdk.ExtentKind) (b []byte) {
	for _, k := range kinds {
		b = append(b, byte(k))
	}
	return b
}

func TestDiffRefused(t *testing.T) {
	dir := t.TempDir()
	formattest.Create(t, New(), dir, "base.vhdx", 4*mib, "")
	for _, c := range []struct {
		opts string
		size int64
		edit func(*sdk.CreateRequest)
		text string
	}{
		{"backing_file=base.vhdx", 8 * mib, nil, "as large as its parent"},
		{"backing_file=base.vhdx,subformat=fixed", 4 * mib, nil, "differencing"},
		{"backing_file=base.vhdx,block_state_zero=on", 4 * mib, nil, "hide"},
		{"backing_file=base.vhdx", 4 * mib, func(r *sdk.CreateRequest) { r.Backing.Format = "qcow2" }, "not qcow2"},
		{"backing_file=base.vhdx", 4 * mib, func(r *sdk.CreateRequest) { r.Backing = nil }, "-u"},
		{"backing_file=base.vhdx", 4 * mib, func(r *sdk.CreateRequest) { r.BackingName = `a\b` }, "backslash"},
		{"backing_file=base.vhdx", 4 * mib, func(r *sdk.CreateRequest) { r.Backing.Identity = nil }, "id"},
		{"backing_file=base.vhdx,block_state_zero=off", 4 * mib, nil, ""},
	} {
		_, err := formattest.CreateAs(t, New(), dir, "child.vhdx", c.size, c.opts, c.edit)
		if (err == nil) != (c.text == "") || err != nil && (!errors.Is(err, sdk.ErrInvalid) || !strings.Contains(err.Error(), c.text)) {
			t.Errorf("%s: %v, want %q", c.opts, err, c.text)
		}
	}
}

// TestPartial reads a block of which the sector bitmap says what is here.
func TestPartial(t *testing.T) {
	dir := t.TempDir()
	formattest.Create(t, New(), dir, "base.vhdx", 3*mib+512, "block_size=1M")
	path := formattest.Create(t, New(), dir, "child.vhdx", formattest.NoSize, "backing_file=base.vhdx,block_size=1M")
	b := readFile(t, path)
	b = append(b, make([]byte, 9*mib-len(b))...)
	block := int64(len(b))
	b = append(b, bytes.Repeat([]byte{0x5a}, mib)...)
	bitmap := int64(len(b))
	b = append(b, make([]byte, mib)...)
	// Block 2 is the third in its chunk: its bits begin at byte 2*2048/8.
	bits := b[bitmap+2*256:]
	bits[0] = 0x0e    // sectors 1 to 3
	bits[1] = 0x80    // sector 15
	bits[2] = 0x01    // sector 16
	bits[255] = 0x80  // sector 2047
	bits[256] = 0xff  // of block 3
	b[bitmap+255] = 1 // of block 0
	g := newGeometry(&parameters{blockSize: mib, virtualSize: 3*mib + 512, logicalSector: 512, flags: hasParent})
	b = setEntry(b, 2, makeEntry(blockPartiallyPresent, block))
	whole := setEntry(b, int(g.bitmapIndex(2)), makeEntry(bitmapPresent, bitmap))
	o := formattest.Open(t, New(), save(t, whole), false)
	type run struct {
		off, n int64
		kind   sdk.ExtentKind
	}
	want := []run{
		{0, 2*mib + 512, sdk.Absent},
		{2*mib + 512, 3 * 512, sdk.Data},
		{2*mib + 4*512, 11 * 512, sdk.Absent},
		{2*mib + 15*512, 2 * 512, sdk.Data},
		{2*mib + 17*512, 2030 * 512, sdk.Absent},
		{2*mib + 2047*512, 512, sdk.Data},
		{3 * mib, 512, sdk.Absent},
	}
	got := o.Map()
	for i, e := range got {
		if i >= len(want) || e.Offset != want[i].off || e.Length != want[i].n || e.Kind != want[i].kind ||
			e.Kind == sdk.Data && e.HostOffset != block+e.Offset-2*mib {
			t.Errorf("extent %d: %+v", i, e)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d extents, want %d", len(got), len(want))
	}
	for _, r := range []struct{ off, n int64 }{{2*mib + 700, 100}, {2*mib + 100, 1000}, {2*mib + 8000, 3000}, {2*mib + 2047*512 + 5, 600}} {
		part, err := formattest.MapRange(context.Background(), o.Image, r.off, r.n)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range part {
			for _, w := range want {
				if e.Offset >= w.off && e.Offset < w.off+w.n && (e.Kind != w.kind || e.Offset+e.Length > w.off+w.n) {
					t.Errorf("%+v: %+v inside %+v", r, e, w)
				}
			}
		}
	}
	if res, messages := check(t, save(t, whole), sdk.FixNone); *res != (sdk.CheckResult{}) {
		t.Errorf("check: %+v %q", res, messages)
	}
	// Without its bitmap the block cannot be read, and a check says so.
	o = formattest.Open(t, New(), save(t, b), false)
	if _, err := o.TryRead(2*mib, 512); !errors.Is(err, sdk.ErrCorrupt) {
		t.Errorf("without bitmap: %v", err)
	}
	if res, messages := check(t, save(t, b), sdk.FixNone); res.Corruptions != 1 {
		t.Errorf("check without bitmap: %+v %q", res, messages)
	}
	// Writing the whole block makes it fully present where it is.
	written := save(t, whole)
	formattest.Write(t, New(), written, map[int64][]byte{2 * mib: bytes.Repeat([]byte{1}, mib)}, false)
	o = formattest.Open(t, New(), written, false)
	if m := o.Map(); len(m) != 3 || m[1].HostOffset != block || m[1].Length != mib {
		t.Errorf("after a write: %+v", m)
	}
}

func TestLargeSectors(t *testing.T) {
	b := poke(poke(small(t, ""), atSector, uint32(4096)), atSector+4, uint32(4096))
	o := formattest.Open(t, New(), save(t, b), false)
	if o.Info.VirtualSize != 4*mib || o.Read(mib, 1)[0] != 0x11 {
		t.Error("an image of 4 KiB sectors")
	}
	// A child has its parent's sector size.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "base.vhdx"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	child := formattest.Open(t, New(), formattest.Create(t, New(), dir, "child.vhdx", formattest.NoSize, "backing_file=base.vhdx"), false)
	if child.Info.Identity[identityLogicalSector] != "4096" {
		t.Errorf("%v", child.Info.Identity)
	}
}

// device is a file that keeps its size, full of old content.
type device struct{ sdk.File }

func (device) Truncate(int64) error { return syscall.EINVAL }

func TestDevice(t *testing.T) {
	ctx := context.Background()
	for _, opts := range []string{"block_size=1M", "block_size=1M,block_state_zero=off", "block_size=1M,subformat=fixed"} {
		f := device{formattest.MemFile(bytes.Repeat([]byte{0xee}, 20*mib))}
		files := []sdk.NamedFile{{Role: sdk.RoleMain, File: f}}
		plan, err := formattest.TryPlan(t, New(), t.TempDir(), "a", 4*mib, opts, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := plan.Emit(ctx, files); err != nil {
			t.Fatal(err)
		}
		img, err := New().Open(ctx, sdk.OpenRequest{Files: files, ReadWrite: true})
		if err != nil {
			t.Fatal(err)
		}
		w := img.(sdk.Writer)
		wi, err := w.BeginWrite(ctx, sdk.WriteRequest{})
		if err != nil || !wi.ReadsZero {
			t.Fatalf("%+v, %v", wi, err)
		}
		places, err := w.Place(ctx, []sdk.Run{{Offset: 3 * mib, Length: mib}})
		if err != nil || len(places) != 1 || places[0].HostOffset != 8*mib {
			t.Fatalf("%s: %+v, %v", opts, places, err)
		}
		if err := w.Finish(ctx); err != nil {
			t.Fatal(err)
		}
		extents, err := formattest.MapRange(ctx, img, 0, 4*mib)
		if err != nil || len(extents) != 2 || extents[1].Kind != sdk.Data {
			t.Errorf("%s: %+v, %v", opts, extents, err)
		}
		// No room for the next one than fits.
		if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
			t.Fatal(err)
		}
		if places, err = w.Place(ctx, []sdk.Run{{Offset: 0, Length: mib}}); err != nil || places[0].HostOffset != 9*mib {
			t.Errorf("%s: %+v, %v", opts, places, err)
		}
	}
	f := device{formattest.MemFile(make([]byte, 9*mib))}
	files := []sdk.NamedFile{{Role: sdk.RoleMain, File: f}}
	plan, err := formattest.TryPlan(t, New(), t.TempDir(), "a", 4*mib, "block_size=1M", nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := plan.Emit(ctx, files); err != nil {
		t.Fatal(err)
	}
	img, err := New().Open(ctx, sdk.OpenRequest{Files: files, ReadWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	w := img.(sdk.Writer)
	if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Place(ctx, []sdk.Run{{Offset: 0, Length: 4 * mib}}); !errors.Is(err, sdk.ErrTooBig) {
		t.Errorf("four blocks on a device with room for one: %v", err)
	}
}

func TestReproducible(t *testing.T) {
	create := func(name string, time int64) []byte {
		path, err := formattest.CreateAs(t, New(), t.TempDir(), name, 4*mib, "", func(r *sdk.CreateRequest) { r.Reproducible, r.Time = true, time })
		if err != nil {
			t.Fatal(err)
		}
		formattest.Write(t, New(), path, map[int64][]byte{0: {1}}, false)
		return readFile(t, path)
	}
	if !bytes.Equal(create("a", 1), create("a", 1)) {
		t.Error("the same request makes different images")
	}
	if bytes.Equal(create("a", 1), create("a", 2)) {
		t.Error("the time has no effect")
	}
	var ids guids
	seen := map[ondisk.GUID]bool{}
	for range 10 {
		g, err := ids.next()
		if err != nil || seen[g] {
			t.Fatalf("%s again, %v", g, err)
		}
		seen[g] = true
	}
}

func TestMeasure(t *testing.T) {
	for _, opts := range []string{"", "block_size=1M", "subformat=fixed", "subformat=fixed,block_state_zero=off"} {
		dir := t.TempDir()
		plan, err := formattest.TryPlan(t, New(), dir, "a", 21*mib+512, opts, nil)
		if err != nil {
			t.Fatal(err)
		}
		unit := plan.Info().AllocationUnit
		res, err := plan.(sdk.Measurer).Measure(context.Background(), sdk.MeasureRequest{AllocatedUnits: 2})
		if err != nil {
			t.Fatal(err)
		}
		path := formattest.Create(t, New(), dir, "a", 21*mib+512, opts)
		formattest.Write(t, New(), path, map[int64][]byte{0: {1}, unit: {2}}, false)
		if got := int64(len(readFile(t, path))); got != res.Required {
			t.Errorf("%q: %d bytes, measured %d", opts, got, res.Required)
		}
		path = formattest.Create(t, New(), dir, "b", 21*mib+512, opts)
		formattest.Write(t, New(), path, map[int64][]byte{0: bytes.Repeat([]byte{1}, 21*mib+512)}, false)
		if got := int64(len(readFile(t, path))); got != res.FullyAllocated {
			t.Errorf("%q: %d bytes full, measured %d", opts, got, res.FullyAllocated)
		}
	}
}

func FuzzOpen(f *testing.F) {
	good := small(f, "")
	f.Add(uint32(2*mib), []byte{6, 0, 0x80, 0}, true)
	f.Add(uint32(regionTable1Offset+8), []byte{3}, true)
	f.Add(uint32(3*mib+metadataHeaderSize), []byte{1, 2, 3}, false)
	f.Add(uint32(3*mib+atFlags), []byte{2}, false)
	f.Fuzz(func(t *testing.T, off uint32, patch []byte, check bool) {
		b := bytes.Clone(good)
		copy(b[int(off)%len(b):], patch)
		for _, at := range []int{header1Offset, header2Offset} {
			seal(b[at:][:headerSize])
		}
		for _, at := range []int{regionTable1Offset, regionTable2Offset} {
			seal(b[at:][:regionTableSize])
		}
		if err := touch(b, check); err != nil {
			t.Fatal(err)
		}
	})
}

// TestEveryBit flips each bit of the metadata, with checksums that fit.
func TestEveryBit(t *testing.T) {
	for name, b := range map[string][]byte{"plain": small(t, ""), "dirty": dirtyImage(t, true)} {
		fields := []struct{ at, n, sealed, sealLen int }{
			{0, 16, 0, 0},
			{header1Offset, 80, header1Offset, headerSize},
			{header2Offset, 80, header2Offset, headerSize},
			{regionTable1Offset, 80, regionTable1Offset, regionTableSize},
			{mib, 160, mib, 3 * sectorSize},
			{mib + 3*sectorSize, 160, mib + 3*sectorSize, 3 * sectorSize},
			{2 * mib, 40, 0, 0},
			{3 * mib, metadataHeaderSize + 6*metadataEntrySize, 0, 0},
			{3*mib + metadataTableSize, 40, 0, 0},
		}
		for _, f := range fields {
			if name == "plain" && f.at >= mib && f.at < 2*mib {
				continue
			}
			for bit := range f.n * 8 {
				at, mask := f.at+bit/8, byte(1)<<(bit%8)
				b[at] ^= mask
				saved := bytes.Clone(b[f.sealed:][:8])
				if f.sealLen > 0 {
					seal(b[f.sealed:][:f.sealLen])
				}
				for _, forCheck := range []bool{false, true} {
					if err := touch(b, forCheck); err != nil {
						t.Errorf("%s, bit %d of %#x: %v", name, bit%8, at, err)
					}
				}
				copy(b[f.sealed:], saved)
				b[at] ^= mask
			}
		}
	}
}

// touch does all that can be done with an image for reading. Errors of the image
// are none of touch.
func touch(b []byte, forCheck bool) error {
	ctx := context.Background()
	img, err := open(b, forCheck)
	if err != nil {
		return classified(err)
	}
	if _, err := img.Info(ctx); err != nil {
		return err
	}
	n := 0
	var outside error
	err = img.Map(ctx, 0, img.(*image).geo.virtualSize, func(x []sdk.Extent) bool {
		for _, e := range x {
			switch {
			case e.Kind == sdk.Data && !ondisk.Within(e.HostOffset, e.Length, int64(len(b))):
				outside = fmt.Errorf("%+v outside the file", e)
			case e.Kind == sdk.Encoded:
				if err := img.(sdk.Decoder).Decode(ctx, e, make([]byte, e.Length)); err != nil {
					outside = err
				}
			}
		}
		n += len(x)
		return outside == nil && n < 1<<16
	})
	if err = errors.Join(outside, classified(err)); err != nil || !forCheck {
		return err
	}
	_, err = img.(sdk.Checker).Check(ctx, sdk.CheckRequest{})
	return err
}

// classified drops errors that say what is wrong with the image.
func classified(err error) error {
	for _, class := range []error{sdk.ErrCorrupt, sdk.ErrUnsupported, sdk.ErrNotFormat} {
		if errors.Is(err, class) {
			return nil
		}
	}
	return err
}

package vhdx

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

func testGUID(b byte) (g ondisk.GUID) {
	for i := range g {
		g[i] = b + byte(i)
	}
	return g
}

func testHeader(sequence uint64) header {
	return header{sequence, testGUID(1), testGUID(2), testGUID(3), 0, 1, 2 * mib, mib}
}

func testRegions() regionTable {
	return regionTable{regions: []region{{regionBAT, 2 * mib, mib, 1}, {regionMetadata, 3 * mib, mib, 1}}}
}

func testParameters() parameters {
	return parameters{blockSize: 2 * mib, virtualSize: 10 * mib, diskID: testGUID(9), logicalSector: 512, physicalSector: 4096}
}

func testLocator() locator {
	return locator{locatorVHDX, []pair{{keyLinkage, braced(testGUID(7))}, {keyRelativePath, `.\bäse.vhdx`}}}
}

// structure is what every on-disk structure does.
type structure interface {
	decode([]byte) error
	append([]byte) []byte
}

func TestRoundTrip(t *testing.T) {
	h, r, l := testHeader(5), testRegions(), testLocator()
	e := logHeader{8192, 4096, 77, 3, testGUID(4), mib, 2 * mib}
	d := logDescriptor{trailing: [4]byte{1, 2, 3, 4}, leading: [8]byte{5, 6}, length: sectorSize, offset: 4096, sequence: 9}
	z := logDescriptor{zero: true, length: 8192, offset: 4096, sequence: 9}
	m := metadataTable{[]item{{itemDiskID, 65536, 16, 6}, {testGUID(8), 0, 0, 1}}}
	for _, s := range []structure{&h, &r, &l, &e, &d, &z, &m} {
		b := s.append([]byte("prefix"))[len("prefix"):]
		again := reflect.New(reflect.TypeOf(s).Elem()).Interface().(structure)
		if err := again.decode(b); err != nil {
			t.Errorf("%T: %v", s, err)
		}
		if !reflect.DeepEqual(s, again) {
			t.Errorf("%T: %+v became %+v", s, s, again)
		}
		if err := again.decode(b[:len(b)-1]); err == nil && reflect.DeepEqual(s, again) {
			t.Errorf("%T: decodes without its last byte", s)
		}
	}
}

func TestMetadataRoundTrip(t *testing.T) {
	l := testLocator()
	p := testParameters()
	b := p.append(nil, l.append(nil))
	var table metadataTable
	if err := table.decode(b); err != nil {
		t.Fatal(err)
	}
	if err := table.validate(mib); err != nil {
		t.Fatal(err)
	}
	var got parameters
	get := func(m *item) ([]byte, error) { return b[m.offset:][:m.length], nil }
	if err := got.decode(&table, get); err != nil {
		t.Fatal(err)
	}
	if got != p {
		t.Errorf("%+v became %+v", p, got)
	}
	var gotLocator locator
	raw, _ := get(table.known(itemParentLocator))
	if err := gotLocator.decode(raw); err != nil || !reflect.DeepEqual(gotLocator, l) {
		t.Errorf("%+v became %+v, %v", l, gotLocator, err)
	}
}

func TestChooseHeader(t *testing.T) {
	a, b := testHeader(5), testHeader(6)
	other := a
	other.dataWrite = testGUID(99)
	broken := a.append(nil)
	broken[100]++
	v2 := a
	v2.version = 2
	for _, c := range []struct {
		name          string
		first, second []byte
		want          int // -1: refused
	}{
		{"second is newer", a.append(nil), b.append(nil), 1},
		{"first is newer", b.append(nil), a.append(nil), 0},
		{"first is damaged", broken, a.append(nil), 1},
		{"second is damaged", a.append(nil), broken, 0},
		{"second is missing", a.append(nil), nil, 0},
		{"both are damaged", broken, broken, -1},
		{"equal, as Disk2VHD writes them", a.append(nil), a.append(nil), 0},
		{"same number, other content", a.append(nil), other.append(nil), -1},
		{"version 2", v2.append(nil), v2.append(nil), -1},
		{"empty", nil, nil, -1},
	} {
		var p headers
		err := p.choose(c.first, c.second)
		if c.want < 0 {
			if !errors.Is(err, sdk.ErrCorrupt) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err != nil || p.current != c.want {
			t.Errorf("%s: chose %d, %v, want %d", c.name, p.current, err, c.want)
		}
	}
}

func TestGeometry(t *testing.T) {
	for _, c := range []struct {
		size                   int64
		block, sector          uint32
		parent                 bool
		blocks, ratio, entries int64
	}{
		{0, 8 * mib, 512, false, 0, 512, 0},
		{512, 8 * mib, 512, false, 1, 512, 1},
		{4 << 30, 8 * mib, 512, false, 512, 512, 512},
		{4<<30 + 512, 8 * mib, 512, false, 513, 512, 514},
		{4<<30 + 512, 8 * mib, 512, true, 513, 512, 1026},
		{4 << 30, 256 * mib, 512, false, 16, 16, 16},
		{64 << 40, mib, 512, false, 1 << 26, 4096, 1<<26 + 1<<14 - 1},
		{1 << 40, mib, 4096, false, 1 << 20, 32768, 1<<20 + 31},
	} {
		p := parameters{blockSize: c.block, virtualSize: uint64(c.size), logicalSector: c.sector}
		if c.parent {
			p.flags = hasParent
		}
		g := newGeometry(&p)
		if g.blocks != c.blocks || g.ratio != c.ratio || g.entries != c.entries {
			t.Errorf("%+v: blocks %d, ratio %d, entries %d", c, g.blocks, g.ratio, g.entries)
		}
		for _, b := range []int64{0, 1, g.ratio - 1, g.ratio, g.ratio + 1, g.blocks - 1} {
			if b < 0 || b >= g.blocks {
				continue
			}
			if back, ok := g.block(g.index(b)); !ok || back != b {
				t.Errorf("%+v: block %d has entry %d, which has block %d", c, b, g.index(b), back)
			}
			if _, ok := g.block(g.bitmapIndex(b)); ok || g.bitmapIndex(b) < g.index(b) || g.bitmapIndex(b)-g.index(b) > g.ratio {
				t.Errorf("%+v: block %d has entry %d and bitmap entry %d", c, b, g.index(b), g.bitmapIndex(b))
			}
		}
		if g.blocks > 0 && !g.parent && g.index(g.blocks-1) != g.entries-1 {
			t.Errorf("%+v: last block has entry %d of %d", c, g.index(g.blocks-1), g.entries)
		}
	}
}

func TestLocatorNames(t *testing.T) {
	for _, c := range []struct {
		pairs []pair
		want  []string
	}{
		{[]pair{{keyRelativePath, `.\parent.vhdx`}}, []string{"parent.vhdx"}},
		{[]pair{{keyRelativePath, `..\..\a\parent.vhdx`}}, []string{"../../a/parent.vhdx"}},
		{[]pair{{keyRelativePath, `parent.vhdx`}, {keyWin32Path, `\\?\c:\vm\parent.vhdx`}}, []string{"parent.vhdx"}},
		{[]pair{{keyWin32Path, `\\?\c:\vm\disk.vhdx`}, {keyVolumePath, `\\?\Volume{x}\vm\parent.vhdx`}}, []string{"parent.vhdx", "disk.vhdx"}},
		{[]pair{{keyRelativePath, `\abs\parent.vhdx`}}, []string{"/abs/parent.vhdx"}},
		{[]pair{{keyRelativePath, `..`}}, nil},
		{nil, nil},
	} {
		l := locator{pairs: c.pairs}
		if got := l.names(); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v: names %q, want %q", c.pairs, got, c.want)
		}
	}
	for _, name := range []string{"base.vhdx", "../base.vhdx", "/abs/base.vhdx", "dir/base.vhdx", "bäse 💾.vhdx", ".hidden"} {
		p, err := relativePath(name)
		if err != nil {
			t.Fatal(err)
		}
		l := locator{pairs: []pair{{keyRelativePath, p}}}
		if got := l.names(); len(got) != 1 || got[0] != name {
			t.Errorf("%q is stored as %q and read as %q", name, p, got)
		}
	}
	for _, name := range []string{`a\b`, "a\x00b", "\xff", strings.Repeat("x", 40000)} {
		if _, err := relativePath(name); !errors.Is(err, sdk.ErrInvalid) {
			t.Errorf("%.10q: %v", name, err)
		}
	}
}

func TestLocatorRefused(t *testing.T) {
	good := testLocator()
	other := testLocator()
	other.kind = testGUID(1)
	for _, c := range []struct {
		name string
		l    locator
		want error
	}{
		{"good", good, nil},
		{"other kind of parent", other, sdk.ErrUnsupported},
		{"no linkage", locator{locatorVHDX, good.pairs[1:]}, sdk.ErrCorrupt},
		{"no path", locator{locatorVHDX, good.pairs[:1]}, sdk.ErrCorrupt},
		{"twice", locator{locatorVHDX, append(good.pairs[:2:2], good.pairs[0])}, sdk.ErrCorrupt},
		{"linkage is no GUID", locator{locatorVHDX, []pair{{keyLinkage, "{x}"}, good.pairs[1]}}, sdk.ErrCorrupt},
	} {
		if err := c.l.validate(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.name, err, c.want)
		}
	}
	b := good.append(nil)
	for _, off := range []int{locatorHeaderSize, locatorHeaderSize + 4, locatorHeaderSize + 8, locatorHeaderSize + 10} {
		bad := bytes.Clone(b)
		bad[off], bad[off+1] = 0xff, 0xff
		var l locator
		if err := l.decode(bad); err == nil {
			t.Errorf("offset or length at %d beyond the item is accepted", off)
		}
	}
}

func fuzz[T any, P interface {
	*T
	structure
}](f *testing.F, seeds ...structure) {
	for _, s := range seeds {
		f.Add(s.append(nil))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var a, again T
		if P(&a).decode(b) != nil {
			return
		}
		out := P(&a).append(nil)
		if err := P(&again).decode(out); err != nil {
			t.Fatalf("%+v: %v", a, err)
		}
		if !reflect.DeepEqual(a, again) {
			t.Fatalf("%+v became %+v", a, again)
		}
	})
}

func FuzzDecodeHeader(f *testing.F) { h := testHeader(1); fuzz[header](f, &h) }

func FuzzDecodeRegionTable(f *testing.F) { r := testRegions(); fuzz[regionTable](f, &r) }

func FuzzDecodeMetadataTable(f *testing.F) {
	fuzz[metadataTable](f, &metadataTable{[]item{{itemDiskID, 65536, 16, 6}}})
}

func FuzzDecodeLogHeader(f *testing.F) {
	fuzz[logHeader](f, &logHeader{8192, 4096, 77, 3, testGUID(4), mib, 2 * mib})
}

func FuzzDecodeLogDescriptor(f *testing.F) {
	fuzz[logDescriptor](f, &logDescriptor{zero: true, length: 8192, offset: 4096, sequence: 9}, &logDescriptor{length: sectorSize, offset: 4096, sequence: 9})
}

// A locator may share or overlap its strings, so only what it says is compared.
func FuzzDecodeLocator(f *testing.F) {
	l := testLocator()
	f.Add(l.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var l locator
		if l.decode(b) != nil {
			return
		}
		if l.validate() == nil && len(l.names()) == 0 {
			t.Fatal("a valid locator without names")
		}
		for _, n := range l.names() {
			if n == "" || strings.Contains(n, `\`) {
				t.Fatalf("name %q", n)
			}
		}
	})
}

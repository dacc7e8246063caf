package vhdx

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// FuzzParameters decodes the values of the metadata items, and looks at the
// geometry that follows from them.
func FuzzParameters(f *testing.F) {
	p := parameters{blockSize: mib, virtualSize: 4 * mib, logicalSector: 512, physicalSector: 4096}
	f.Add(p.append(nil, nil)[metadataTableSize:])
	p = parameters{blockSize: maxBlockSize, flags: hasParent, virtualSize: maxVirtualSize, logicalSector: 4096}
	f.Add(p.append(nil, nil)[metadataTableSize:])
	table := metadataTable{}
	if err := table.decode(p.append(nil, nil)); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var p parameters
		err := p.decode(&table, func(i *item) ([]byte, error) {
			if i == nil {
				return nil, fmt.Errorf("no item: %w", sdk.ErrCorrupt)
			}
			at := int(i.offset) - metadataTableSize
			if at+int(i.length) > len(b) {
				return nil, fmt.Errorf("item behind the end: %w", sdk.ErrCorrupt)
			}
			return b[at:][:i.length], nil
		})
		if err != nil || p.validate() != nil {
			return
		}
		g := newGeometry(&p)
		if g.blocks < 0 || g.entries < g.blocks || g.entries > maxVirtualSize/mib*2 || g.ratio <= 0 || g.blocks*g.blockSize < g.virtualSize {
			t.Errorf("%+v of %+v", g, p)
		}
		if out := p.append(nil, nil)[metadataTableSize:]; !bytes.Equal(out, b[:len(out)]) {
			t.Errorf("%x became %x", b[:len(out)], out)
		}
	})
}

// FuzzTable changes the block allocation table of a sound image.
func FuzzTable(f *testing.F) {
	base := small(f, "")
	const tableAt = 2 * mib
	f.Add(base[tableAt:][:4*entrySize])
	f.Add(ondiskEntries(makeEntry(blockFullyPresent, 0), makeEntry(blockPartiallyPresent, 1<<46), makeEntry(4, 8*mib), makeEntry(blockFullyPresent, 1<<62)))
	f.Fuzz(func(t *testing.T, b []byte) {
		image := bytes.Clone(base)
		copy(image[tableAt:][:64*entrySize], b)
		files := []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.ReadOnly(formattest.MemFile(image))}}
		for _, check := range []bool{false, true} {
			img, err := New().Open(t.Context(), sdk.OpenRequest{Files: files, Check: check})
			if err != nil {
				continue
			}
			if check {
				_, _ = img.(sdk.Checker).Check(t.Context(), sdk.CheckRequest{Message: func(string) {}})
				continue
			}
			extents, err := formattest.MapRange(t.Context(), img, 0, 4*mib)
			for _, e := range extents {
				if err == nil && e.Kind == sdk.Data && (e.HostOffset < mib || e.HostOffset%mib != e.Offset%mib) {
					t.Errorf("extent %+v", e)
				}
			}
		}
	})
}

func ondiskEntries(entries ...batEntry) []byte {
	var b []byte
	for _, e := range entries {
		for i := range 8 {
			b = append(b, byte(e>>(8*i)))
		}
	}
	return b
}

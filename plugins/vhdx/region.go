package vhdx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	regionTableSize  = 64 << 10
	regionHeaderSize = 16
	regionEntrySize  = 32
	maxRegions       = 2047
)

// region is one entry of the region table (MS-VHDX 2.2.3.2).
type region struct {
	guid     ondisk.GUID
	offset   uint64
	length   uint32
	required uint32
}

// regionTable is one of the two copies (MS-VHDX 2.2.3).
type regionTable struct {
	regions []region
}

var errNotRegionTable = errors.New("not a region table")

func (t *regionTable) decode(b []byte) error {
	if len(b) < regionTableSize {
		return ondisk.ErrShort
	}
	b = b[:regionTableSize]
	if string(b[:4]) != "regi" || !sealed(b) {
		return errNotRegionTable
	}
	n := binary.LittleEndian.Uint32(b[8:])
	if n > maxRegions {
		return fmt.Errorf("%d regions, at most %d accepted", n, maxRegions)
	}
	c := ondisk.NewCursor(b[regionHeaderSize:], binary.LittleEndian)
	t.regions = make([]region, n)
	for i := range t.regions {
		r := &t.regions[i]
		copy(r.guid[:], c.Bytes(16))
		r.offset = c.U64()
		r.length = c.U32()
		r.required = c.U32()
	}
	return c.Err()
}

func (t *regionTable) append(b []byte) []byte {
	at := len(b)
	b = append(b, "regi\x00\x00\x00\x00"...)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(t.regions)))
	b = append(b, 0, 0, 0, 0)
	for _, r := range t.regions {
		b = append(b, r.guid[:]...)
		b = binary.LittleEndian.AppendUint64(b, r.offset)
		b = binary.LittleEndian.AppendUint32(b, r.length)
		b = binary.LittleEndian.AppendUint32(b, r.required)
	}
	b = append(b, make([]byte, regionTableSize-(len(b)-at))...)
	seal(b[at:])
	return b
}

// validate checks that the regions lie inside a file of fileLen bytes, that the
// two known ones are there once, and that no other is required.
func (t *regionTable) validate(fileLen int64) error {
	var bat, metadata int
	for i, r := range t.regions {
		off, ok := ondisk.Int64(r.offset)
		if !ok || off < headerSectionEnd || !ondisk.Within(off, int64(r.length), fileLen) {
			return fmt.Errorf("region[%d]: %#x bytes at %#x, file %#x: %w", i, r.length, r.offset, fileLen, sdk.ErrCorrupt)
		}
		switch {
		case r.guid == regionBAT:
			bat++
		case r.guid == regionMetadata:
			metadata++
		case r.required&1 != 0:
			return fmt.Errorf("region[%d]: %s is required and not known: %w", i, r.guid, sdk.ErrUnsupported)
		}
	}
	if bat != 1 || metadata != 1 {
		return fmt.Errorf("region table: %d block allocation tables and %d metadata regions, want one each: %w", bat, metadata, sdk.ErrCorrupt)
	}
	return nil
}

// span is a used part of the file.
type span struct{ start, end int64 }

func (s span) overlaps(o span) bool { return s.start < o.end && o.start < s.end }

// spans are the log and the regions, the last registered first: the order in
// which qemu-img names the one that something overlaps with.
type spans []span

// layout returns the spans of a validated table and the log, or an error where
// two of them share bytes.
func (t *regionTable) layout(log span) (spans, error) {
	all := make(spans, 0, len(t.regions)+1)
	all = append(all, log)
	for _, r := range t.regions {
		all = append(all, span{int64(r.offset), int64(r.offset) + int64(r.length)})
	}
	sorted := slices.Clone(all)
	slices.SortFunc(sorted, func(a, b span) int {
		if a.start != b.start {
			return int(min(max(a.start-b.start, -1), 1))
		}
		return int(min(max(a.end-b.end, -1), 1))
	})
	end := span{}
	for _, s := range sorted {
		if s.start < end.end && s.start < s.end {
			return nil, &sdk.Error{Text: overlapText(s, end), Class: sdk.ErrCorrupt}
		}
		if s.end > end.end {
			end = s
		}
	}
	slices.Reverse(all)
	return all, nil
}

// end is the first offset behind all of them, and behind the header section.
func (all spans) end() int64 {
	end := int64(headerSectionEnd)
	for _, s := range all {
		end = max(end, s.end)
	}
	return end
}

// find returns a span that s overlaps with.
func (all spans) find(s span) (span, bool) {
	for _, r := range all {
		if s.overlaps(r) {
			return r, true
		}
	}
	return span{}, false
}

func overlapText(s, with span) string {
	return fmt.Sprintf("VHDX region %d-%d overlaps with region %d-%d", uint64(s.start), uint64(s.end), uint64(with.start), uint64(with.end))
}

// get returns a known region of a validated table.
func (t *regionTable) get(g ondisk.GUID) span {
	for _, r := range t.regions {
		if r.guid == g {
			return span{int64(r.offset), int64(r.offset) + int64(r.length)}
		}
	}
	return span{}
}

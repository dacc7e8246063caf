package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// Constants of seSparse extents, which have no public specification: what is
// not exactly as seen so far is refused.
const (
	seSparseMagic         = 0x00000000cafebabe
	seSparseVolatileMagic = 0x00000000cafecafe
	seSparseVersion       = 0x0000000200000001
	seSparseGrainSectors  = 8
	seSparseTableSectors  = 64
	seSparseTableEntries  = seSparseTableSectors * sectorSize / 8
)

// Grain directory and table entries of a seSparse extent.
const (
	seSparseTypeMask    = 0xf000000000000000
	seSparseTableValid  = 0x1000000000000000 // in the directory; the low 32 bits are a table's index
	seSparseTableMask   = 0xffffffff00000000
	seSparseUnmapped    = 0x1000000000000000 // in a table: reads as zeros
	seSparseZero        = 0x2000000000000000
	seSparseAllocated   = 0x3000000000000000
	seSparseIndexHigh   = 0x0fff000000000000 // the low 12 bits of a grain's index
	seSparseIndexLow    = 0x0000ffffffffffff // its higher bits
	seSparseIndexShift  = 12
	seSparseIndexOffset = 48
)

// seSparseHeader is the constant header of a seSparse extent, its first sector.
// Offsets and sizes are in sectors.
type seSparseHeader struct {
	version        uint64
	capacity       uint64
	grainSize      uint64
	tableSize      uint64
	flags          uint64
	reserved       [4]uint64
	volatileOffset uint64
	volatileSize   uint64
	journalHeader  [2]uint64 // offset, size, here and below
	journal        [2]uint64
	directory      [2]uint64
	tables         [2]uint64
	freeBitmap     [2]uint64
	backmap        [2]uint64
	grains         [2]uint64
	padding        [304]byte
}

func (h *seSparseHeader) fields() []*uint64 {
	return []*uint64{
		&h.version, &h.capacity, &h.grainSize, &h.tableSize, &h.flags,
		&h.reserved[0], &h.reserved[1], &h.reserved[2], &h.reserved[3],
		&h.volatileOffset, &h.volatileSize,
		&h.journalHeader[0], &h.journalHeader[1], &h.journal[0], &h.journal[1],
		&h.directory[0], &h.directory[1], &h.tables[0], &h.tables[1],
		&h.freeBitmap[0], &h.freeBitmap[1], &h.backmap[0], &h.backmap[1],
		&h.grains[0], &h.grains[1],
	}
}

func (h *seSparseHeader) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.LittleEndian)
	if magic := c.U64(); magic != seSparseMagic && c.Err() == nil {
		return &sdk.Error{Text: fmt.Sprintf("Bad const header magic: 0x%016x", magic), Class: sdk.ErrNotFormat}
	}
	for _, f := range h.fields() {
		*f = c.U64()
	}
	copy(h.padding[:], c.Bytes(len(h.padding)))
	if c.Err() != nil {
		return fmt.Errorf("seSparse header: %w", c.Err())
	}
	return nil
}

func (h *seSparseHeader) append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint64(b, seSparseMagic)
	for _, f := range h.fields() {
		b = binary.LittleEndian.AppendUint64(b, *f)
	}
	return append(b, h.padding[:]...)
}

// validate checks the header of a file of fileLen bytes.
func (h *seSparseHeader) validate(fileLen int64) error {
	switch {
	case h.version != seSparseVersion:
		return unsupported("Unsupported version: 0x%016x", h.version)
	case h.grainSize != seSparseGrainSectors:
		return unsupported("Unsupported grain size: %d", h.grainSize)
	case h.tableSize != seSparseTableSectors:
		return unsupported("Unsupported grain table size: %d", h.tableSize)
	case h.flags != 0:
		return unsupported("Unsupported flags: 0x%016x", h.flags)
	case h.reserved != [4]uint64{}:
		return unsupported("Unsupported reserved bits: 0x%016x 0x%016x 0x%016x 0x%016x",
			h.reserved[0], h.reserved[1], h.reserved[2], h.reserved[3])
	case h.padding != [304]byte{}:
		return unsupported("Unsupported non-zero const header padding")
	case h.capacity == 0 || h.capacity > (1<<63-1)/sectorSize:
		return corrupt("seSparse extent with a capacity of %d sectors", h.capacity)
	case h.directory[1] > maxDirectory*8/sectorSize:
		return corrupt("L1 size too big")
	case int64(h.directory[1])*(sectorSize/8) < ondisk.DivUp(int64(h.capacity), seSparseGrainSectors*seSparseTableEntries):
		return corrupt("Grain directory of %d sectors is too small for %d sectors", h.directory[1], h.capacity)
	}
	sectors := uint64(ondisk.DivUp(fileLen, sectorSize))
	for _, o := range []uint64{h.volatileOffset, h.directory[0], h.tables[0], h.grains[0]} {
		if o > sectors {
			return corrupt("seSparse structure at sector %d beyond end of file, sector %d", o, sectors)
		}
	}
	return nil
}

// seSparseVolatile is the volatile header of a seSparse extent, a sector.
type seSparseVolatile struct {
	freeTable     uint64
	nextSequence  uint64
	replayJournal uint64
	padding       [480]byte
}

func (h *seSparseVolatile) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.LittleEndian)
	if magic := c.U64(); magic != seSparseVolatileMagic && c.Err() == nil {
		return &sdk.Error{Text: fmt.Sprintf("Bad volatile header magic: 0x%016x", magic), Class: sdk.ErrCorrupt}
	}
	h.freeTable, h.nextSequence, h.replayJournal = c.U64(), c.U64(), c.U64()
	copy(h.padding[:], c.Bytes(len(h.padding)))
	if c.Err() != nil {
		return fmt.Errorf("seSparse volatile header: %w", c.Err())
	}
	return nil
}

func (h *seSparseVolatile) append(b []byte) []byte {
	for _, v := range []uint64{seSparseVolatileMagic, h.freeTable, h.nextSequence, h.replayJournal} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return append(b, h.padding[:]...)
}

func (h *seSparseVolatile) validate(int64) error {
	if h.replayJournal != 0 {
		return unsupported("Image is dirty, Replaying journal not supported")
	}
	if h.padding != [480]byte{} {
		return unsupported("Unsupported non-zero volatile header padding")
	}
	return nil
}

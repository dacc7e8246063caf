package vhd

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/google/uuid"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	headerSize   = 1024
	headerCookie = "cxsparse"

	minBlockSize = sectorSize
	// maxEntries fits the largest disk in blocks of 32 KiB, in a table of
	// 256 MiB. qemu's limit is 2 GiB, which takes it seconds to walk.
	maxEntries = 1 << 26

	unallocated = 0xffffffff // a BAT entry without block
)

// header is the dynamic disk header.
type header struct {
	dataOffset      uint64 // unused, all bits set
	tableOffset     uint64 // of the block allocation table
	version         uint32
	entries         uint32 // of the table
	blockSize       uint32 // of a block's data
	checksum        uint32 // as stored
	parentID        uuid.UUID
	parentTimestamp uint32 // seconds since epoch2000
	reserved1       uint32
	parentName      [512]byte // UTF-16, big-endian
	locators        [8]locator
	reserved2       [256]byte
}

// locator says where another name of the parent is stored.
type locator struct {
	platform   platform
	dataSpace  uint32
	dataLength uint32
	reserved   uint32
	dataOffset uint64
}

func (h *header) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.BigEndian)
	if string(c.Bytes(len(headerCookie))) != headerCookie {
		return &sdk.Error{Text: "Invalid header magic", Class: sdk.ErrCorrupt}
	}
	h.dataOffset = c.U64()
	h.tableOffset = c.U64()
	h.version = c.U32()
	h.entries = c.U32()
	h.blockSize = c.U32()
	h.checksum = c.U32()
	copy(h.parentID[:], c.Bytes(16))
	h.parentTimestamp = c.U32()
	h.reserved1 = c.U32()
	copy(h.parentName[:], c.Bytes(len(h.parentName)))
	for i := range h.locators {
		h.locators[i] = locator{
			platform:   platform(c.U32()),
			dataSpace:  c.U32(),
			dataLength: c.U32(),
			reserved:   c.U32(),
			dataOffset: c.U64(),
		}
	}
	copy(h.reserved2[:], c.Bytes(len(h.reserved2)))
	return c.Err()
}

// append returns the header's bytes, with h.checksum as it is.
func (h *header) append(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, headerCookie...)
	b = be.AppendUint64(b, h.dataOffset)
	b = be.AppendUint64(b, h.tableOffset)
	b = be.AppendUint32(b, h.version)
	b = be.AppendUint32(b, h.entries)
	b = be.AppendUint32(b, h.blockSize)
	b = be.AppendUint32(b, h.checksum)
	b = append(b, h.parentID[:]...)
	b = be.AppendUint32(b, h.parentTimestamp)
	b = be.AppendUint32(b, h.reserved1)
	b = append(b, h.parentName[:]...)
	for _, l := range h.locators {
		b = be.AppendUint32(b, uint32(l.platform))
		b = be.AppendUint32(b, l.dataSpace)
		b = be.AppendUint32(b, l.dataLength)
		b = be.AppendUint32(b, l.reserved)
		b = be.AppendUint64(b, l.dataOffset)
	}
	return append(b, h.reserved2[:]...)
}

// sum returns the checksum that h should have.
func (h *header) sum() uint32 {
	g := *h
	g.checksum = 0
	return checksum(g.append(nil))
}

// validate checks what reading depends on: the checksum is Check's business, as
// for qemu-img. fileLen is the file's length, virtualSize the disk's.
func (h *header) validate(fileLen, virtualSize int64) error {
	if h.blockSize < minBlockSize || bits.OnesCount32(h.blockSize) != 1 {
		return &sdk.Error{Text: fmt.Sprintf("Invalid block size %d", h.blockSize), Class: sdk.ErrCorrupt}
	}
	if h.entries > maxEntries {
		return &sdk.Error{Text: fmt.Sprintf("Max Table Entries too large (%d)", int32(h.entries)), Class: sdk.ErrCorrupt}
	}
	if int64(h.entries)*int64(h.blockSize) < virtualSize {
		return &sdk.Error{Text: "Page table too small", Class: sdk.ErrCorrupt}
	}
	off, ok := ondisk.Int64(h.tableOffset)
	if !ok || !ondisk.Within(off, 4*int64(h.entries), fileLen) {
		return fmt.Errorf("block allocation table: %#x bytes at %#x beyond end of file %#x: %w",
			4*int64(h.entries), h.tableOffset, fileLen, sdk.ErrCorrupt)
	}
	return nil
}

// bitmapSize returns the length of the bitmap before a block's data: a bit for
// each sector, in whole sectors.
func bitmapSize(blockSize int64) int64 {
	return ondisk.DivUp(blockSize/sectorSize, 8*sectorSize) * sectorSize
}

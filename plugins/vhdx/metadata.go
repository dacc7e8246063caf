package vhdx

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	metadataTableSize  = 64 << 10
	metadataHeaderSize = 32
	metadataEntrySize  = 32
	maxMetadataItems   = 2047
	maxItemLength      = mib
)

// Flags of a metadata item.
const (
	itemIsUser        = 1 << 0
	itemIsVirtualDisk = 1 << 1
	itemIsRequired    = 1 << 2
)

// item is one entry of the metadata table (MS-VHDX 2.6.1.2). Its offset counts
// from the start of the region.
type item struct {
	guid   ondisk.GUID
	offset uint32
	length uint32
	flags  uint32
}

// metadataTable is the start of the metadata region (MS-VHDX 2.6.1).
type metadataTable struct {
	items []item
}

var errNotMetadata = errors.New("not a metadata table")

func (t *metadataTable) decode(b []byte) error {
	if len(b) < metadataTableSize {
		return ondisk.ErrShort
	}
	if string(b[:8]) != "metadata" {
		return errNotMetadata
	}
	n := binary.LittleEndian.Uint16(b[10:])
	if n > maxMetadataItems {
		return fmt.Errorf("%d items, at most %d accepted", n, maxMetadataItems)
	}
	c := ondisk.NewCursor(b[metadataHeaderSize:metadataTableSize], binary.LittleEndian)
	t.items = make([]item, n)
	for i := range t.items {
		m := &t.items[i]
		copy(m.guid[:], c.Bytes(16))
		m.offset = c.U32()
		m.length = c.U32()
		m.flags = c.U32()
		c.Skip(4)
	}
	return c.Err()
}

func (t *metadataTable) append(b []byte) []byte {
	at := len(b)
	b = append(b, "metadata\x00\x00"...)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(t.items)))
	b = append(b, make([]byte, 20)...)
	for _, m := range t.items {
		b = append(b, m.guid[:]...)
		b = binary.LittleEndian.AppendUint32(b, m.offset)
		b = binary.LittleEndian.AppendUint32(b, m.length)
		b = binary.LittleEndian.AppendUint32(b, m.flags)
		b = append(b, 0, 0, 0, 0)
	}
	return append(b, make([]byte, metadataTableSize-(len(b)-at))...)
}

// known returns the item of the system with this id, nil where there is none.
func (t *metadataTable) known(g ondisk.GUID) *item {
	for i := range t.items {
		if t.items[i].guid == g && t.items[i].flags&itemIsUser == 0 {
			return &t.items[i]
		}
	}
	return nil
}

// validate checks the items against the length of their region.
func (t *metadataTable) validate(regionLen int64) error {
	var known []item
	for i, m := range t.items {
		if m.length == 0 && m.offset == 0 {
			// Present but empty.
		} else if m.length > maxItemLength || m.offset < metadataTableSize || !ondisk.Within(int64(m.offset), int64(m.length), regionLen) {
			return fmt.Errorf("metadata[%d]: %#x bytes at %#x outside the region of %#x: %w", i, m.length, m.offset, regionLen, sdk.ErrCorrupt)
		}
		need, ok := itemLength(m.guid)
		if !ok || m.flags&itemIsUser != 0 {
			if m.flags&itemIsRequired != 0 {
				return fmt.Errorf("metadata[%d]: item %s is required and not known: %w", i, m.guid, sdk.ErrUnsupported)
			}
			continue
		}
		if m.length < need {
			return fmt.Errorf("metadata[%d]: item %s has %d bytes, want %d: %w", i, m.guid, m.length, need, sdk.ErrCorrupt)
		}
		for _, o := range known {
			if o.guid == m.guid {
				return fmt.Errorf("metadata[%d]: item %s appears twice: %w", i, m.guid, sdk.ErrCorrupt)
			}
			if m.offset < o.offset+o.length && o.offset < m.offset+m.length {
				return fmt.Errorf("metadata[%d]: items %s and %s overlap: %w", i, m.guid, o.guid, sdk.ErrCorrupt)
			}
		}
		known = append(known, m)
	}
	for _, g := range []ondisk.GUID{itemFileParameters, itemVirtualSize, itemDiskID, itemLogicalSector, itemPhysicalSector} {
		if t.known(g) == nil {
			return fmt.Errorf("metadata: item %s is missing: %w", g, sdk.ErrCorrupt)
		}
	}
	return nil
}

// itemLength is the least length of a known item.
func itemLength(g ondisk.GUID) (uint32, bool) {
	switch g {
	case itemFileParameters, itemVirtualSize:
		return 8, true
	case itemDiskID:
		return 16, true
	case itemLogicalSector, itemPhysicalSector:
		return 4, true
	case itemParentLocator:
		return locatorHeaderSize, true
	}
	return 0, false
}

// Bits of parameters.flags.
const (
	leaveBlocksAllocated = 1 << 0 // a fixed disk
	hasParent            = 1 << 1 // a differencing disk
)

const (
	minBlockSize   = mib
	maxBlockSize   = 256 * mib
	maxVirtualSize = 64 << 40
)

// parameters are the values of the metadata items that every image has.
type parameters struct {
	blockSize      uint32
	flags          uint32
	virtualSize    uint64
	diskID         ondisk.GUID
	logicalSector  uint32
	physicalSector uint32
}

// decode reads the items that table names out of region, a function that
// returns their bytes.
func (p *parameters) decode(table *metadataTable, region func(*item) ([]byte, error)) error {
	get := func(g ondisk.GUID) (*ondisk.Cursor, error) {
		b, err := region(table.known(g))
		return ondisk.NewCursor(b, binary.LittleEndian), err
	}
	c, err := get(itemFileParameters)
	if err != nil {
		return err
	}
	p.blockSize, p.flags = c.U32(), c.U32()
	if c, err = get(itemVirtualSize); err != nil {
		return err
	}
	p.virtualSize = c.U64()
	if c, err = get(itemDiskID); err != nil {
		return err
	}
	copy(p.diskID[:], c.Bytes(16))
	if c, err = get(itemLogicalSector); err != nil {
		return err
	}
	p.logicalSector = c.U32()
	if c, err = get(itemPhysicalSector); err != nil {
		return err
	}
	p.physicalSector = c.U32()
	return nil
}

func (p *parameters) validate() error {
	if p.blockSize < minBlockSize || p.blockSize > maxBlockSize || !ondisk.IsPowerOfTwo(int64(p.blockSize)) {
		return fmt.Errorf("metadata: block size %d, want a power of two from 1 MiB to 256 MiB: %w", p.blockSize, sdk.ErrCorrupt)
	}
	if p.logicalSector != 512 && p.logicalSector != 4096 {
		return fmt.Errorf("metadata: logical sector size %d, want 512 or 4096: %w", p.logicalSector, sdk.ErrCorrupt)
	}
	if p.virtualSize > maxVirtualSize {
		return p.errSize()
	}
	return nil
}

// errSize refuses the virtual size.
func (p *parameters) errSize() error {
	return fmt.Errorf("metadata: virtual size %d, want a multiple of %d up to 64 TiB: %w", p.virtualSize, p.logicalSector, sdk.ErrCorrupt)
}

// append lays out the metadata region: table, then items.
func (p *parameters) append(b []byte, locator []byte) []byte {
	var values []byte
	var table metadataTable
	add := func(g ondisk.GUID, flags uint32, value []byte) {
		table.items = append(table.items, item{g, uint32(metadataTableSize + len(values)), uint32(len(value)), flags})
		values = append(values, value...)
	}
	le := binary.LittleEndian
	const disk = itemIsRequired | itemIsVirtualDisk
	add(itemFileParameters, itemIsRequired, le.AppendUint32(le.AppendUint32(nil, p.blockSize), p.flags))
	add(itemVirtualSize, disk, le.AppendUint64(nil, p.virtualSize))
	add(itemDiskID, disk, p.diskID[:])
	add(itemLogicalSector, disk, le.AppendUint32(nil, p.logicalSector))
	add(itemPhysicalSector, disk, le.AppendUint32(nil, p.physicalSector))
	if locator != nil {
		add(itemParentLocator, itemIsRequired, locator)
	}
	return append(table.append(b), values...)
}

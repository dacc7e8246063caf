package vmdk

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// cowdMagic begins an ESX server sparse extent.
const cowdMagic = "COWD"

const (
	cowdHeaderSize   = 4 * sectorSize
	cowdTableEntries = 4096
	cowdRoot         = 1 << 0 // flag: no parent
)

// cowdHeader is the header of an ESX server sparse extent (COWDisk_Header),
// also of VMware's products before Workstation 5. Offsets and sizes are in
// sectors.
type cowdHeader struct {
	version          uint32
	flags            uint32
	capacity         uint32
	grainSize        uint32
	gdOffset         uint32
	directoryEntries uint32
	freeSector       uint32
	parentName       string // of one that has a parent; set without cowdRoot
}

func (h *cowdHeader) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.LittleEndian)
	if magic := c.Bytes(4); magic == nil || string(magic) != cowdMagic {
		return fmt.Errorf("ESX sparse extent header: no magic: %w", sdk.ErrNotFormat)
	}
	h.version = c.U32()
	h.flags = c.U32()
	h.capacity = c.U32()
	h.grainSize = c.U32()
	h.gdOffset = c.U32()
	h.directoryEntries = c.U32()
	h.freeSector = c.U32()
	h.parentName = ""
	if c.Err() != nil {
		return fmt.Errorf("ESX sparse extent header: %w", c.Err())
	}
	if h.flags&cowdRoot == 0 {
		name := c.Bytes(min(1024, c.Left()))
		if i := bytes.IndexByte(name, 0); i >= 0 {
			name = name[:i]
		}
		h.parentName = string(name)
	}
	return nil
}

// append appends the header, four sectors long.
func (h *cowdHeader) append(b []byte) []byte {
	n := len(b)
	b = append(b, cowdMagic...)
	for _, v := range []uint32{h.version, h.flags, h.capacity, h.grainSize, h.gdOffset, h.directoryEntries, h.freeSector} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	if h.flags&cowdRoot == 0 {
		b = append(b, h.parentName[:min(len(h.parentName), 1023)]...)
	}
	return append(b, make([]byte, n+cowdHeaderSize-len(b))...)
}

// validate checks the header of a file of fileLen bytes but for where its grain
// directory lies.
func (h *cowdHeader) validate(int64) error {
	switch {
	case h.version != 1:
		return unsupported("Unsupported ESX sparse extent version %d", h.version)
	case h.capacity == 0:
		return corrupt("ESX sparse extent without capacity")
	case h.grainSize == 0:
		return corrupt("L1 entry size is invalid")
	case h.grainSize > maxGrainSectors:
		return corrupt("Invalid granularity, image may be corrupt")
	case h.grainSize&(h.grainSize-1) != 0:
		return corrupt("Invalid granularity of %d sectors, a power of two is needed", h.grainSize)
	case h.directoryEntries > maxDirectory:
		return corrupt("L1 size too big")
	case int64(h.directoryEntries) < ondisk.DivUp(int64(h.capacity), int64(h.grainSize)*cowdTableEntries):
		return corrupt("Grain directory of %d entries is too small for %d sectors", h.directoryEntries, h.capacity)
	}
	return nil
}

package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// sparseMagic begins a hosted sparse extent.
const sparseMagic = "KDMV"

// Flags of a hosted sparse extent.
const (
	flagNewlineTest  = 1 << 0
	flagRedundantGD  = 1 << 1
	flagZeroedGrains = 1 << 2 // a grain table entry of 1 reads as zeros
	flagCompressed   = 1 << 16
	flagMarkers      = 1 << 17
)

// gdAtEnd as the grain directory's offset says that the footer holds the
// header in force.
const gdAtEnd = ^uint64(0)

const compressDeflate = 1

// newlineTest shows whether a transfer translated line ends.
var newlineTest = [4]byte{'\n', ' ', '\r', '\n'}

// Limits of what is opened, qemu-img's.
const (
	maxGrainSectors = 0x200000         // 1 GiB
	maxDirectory    = 32 * 1024 * 1024 // entries
	maxTableEntries = 512
)

// maxCompressedGrain bounds the memory that decoding takes.
const maxCompressedGrain = 8 << 20

// sparseHeader is the header (and footer) of a hosted sparse extent
// (SparseExtentHeader). Offsets and sizes are in sectors.
type sparseHeader struct {
	version          uint32
	flags            uint32
	capacity         uint64
	grainSize        uint64
	descriptorOffset uint64
	descriptorSize   uint64
	tableEntries     uint32 // grain table entries in a grain table
	rgdOffset        uint64
	gdOffset         uint64
	overhead         uint64 // what metadata takes before the first grain
	uncleanShutdown  uint8
	newlines         [4]byte
	compression      uint16
}

// decode reads the first sector of b.
func (h *sparseHeader) decode(b []byte) error {
	if len(b) < sectorSize {
		return fmt.Errorf("sparse extent header: %w", ondisk.ErrShort)
	}
	c := ondisk.NewCursor(b[:sectorSize], binary.LittleEndian)
	if string(c.Bytes(4)) != sparseMagic {
		return fmt.Errorf("sparse extent header: no magic: %w", sdk.ErrNotFormat)
	}
	h.version = c.U32()
	h.flags = c.U32()
	h.capacity = c.U64()
	h.grainSize = c.U64()
	h.descriptorOffset = c.U64()
	h.descriptorSize = c.U64()
	h.tableEntries = c.U32()
	h.rgdOffset = c.U64()
	h.gdOffset = c.U64()
	h.overhead = c.U64()
	h.uncleanShutdown = c.U8()
	copy(h.newlines[:], c.Bytes(4))
	h.compression = c.U16()
	return c.Err()
}

// append appends the header, a sector long.
func (h *sparseHeader) append(b []byte) []byte {
	n := len(b)
	le := binary.LittleEndian
	b = append(b, sparseMagic...)
	b = le.AppendUint32(b, h.version)
	b = le.AppendUint32(b, h.flags)
	b = le.AppendUint64(b, h.capacity)
	b = le.AppendUint64(b, h.grainSize)
	b = le.AppendUint64(b, h.descriptorOffset)
	b = le.AppendUint64(b, h.descriptorSize)
	b = le.AppendUint32(b, h.tableEntries)
	b = le.AppendUint64(b, h.rgdOffset)
	b = le.AppendUint64(b, h.gdOffset)
	b = le.AppendUint64(b, h.overhead)
	b = append(b, h.uncleanShutdown)
	b = append(b, h.newlines[:]...)
	b = le.AppendUint16(b, h.compression)
	return append(b, make([]byte, n+sectorSize-len(b))...)
}

// compressed reports whether grains are deflated. Like qemu-img, it goes by the
// algorithm and not by the flag.
func (h *sparseHeader) compressed() bool { return h.compression == compressDeflate }

func corrupt(text string, args ...any) error {
	return &sdk.Error{Text: fmt.Sprintf(text, args...), Class: sdk.ErrCorrupt}
}

func unsupported(text string, args ...any) error {
	return &sdk.Error{Text: fmt.Sprintf(text, args...), Class: sdk.ErrUnsupported}
}

// validate checks the header of a file of fileLen bytes but for where its grain
// directory lies.
func (h *sparseHeader) validate(fileLen int64) error {
	switch {
	case h.version > 3:
		return unsupported("Unsupported VMDK version %d", h.version)
	case h.compression > compressDeflate:
		return unsupported("Unsupported compression algorithm %d", h.compression)
	case h.capacity == 0:
		return corrupt("Sparse extent without capacity")
	case h.tableEntries > maxTableEntries:
		return corrupt("L2 table size too big")
	case h.tableEntries == 0 || h.grainSize == 0:
		return corrupt("L1 entry size is invalid")
	case h.grainSize > maxGrainSectors:
		return corrupt("Invalid granularity, image may be corrupt")
	case h.grainSize&(h.grainSize-1) != 0:
		return corrupt("Invalid granularity of %d sectors, a power of two is needed", h.grainSize)
	case h.compressed() && h.grainSize > maxCompressedGrain/sectorSize:
		return unsupported("Compressed grains of %d bytes, at most %d are supported", h.grainSize*sectorSize, maxCompressedGrain)
	case h.capacity > (1<<63-1)/sectorSize:
		return corrupt("Capacity of %d sectors is too big", h.capacity)
	case h.directoryEntries() > maxDirectory:
		return corrupt("L1 size too big")
	case h.overhead > uint64(ondisk.DivUp(fileLen, sectorSize)):
		return corrupt("File truncated, expecting at least %d bytes", int64(h.overhead*sectorSize))
	}
	return nil
}

// directoryEntries returns the length of the grain directory, for a header
// whose capacity, grainSize and tableEntries are in bounds.
func (h *sparseHeader) directoryEntries() int64 {
	return ondisk.DivUp(int64(h.capacity), int64(h.grainSize)*int64(h.tableEntries))
}

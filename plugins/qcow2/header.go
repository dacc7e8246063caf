package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// Limits of the format and of qemu-img, whose images and refusals ours follow.
const (
	magic = 0x514649fb // "QFI\xfb"

	sectorSize     = 512
	minClusterBits = 9
	maxClusterBits = 21

	headerV2Length  = 72
	headerV3Minimum = 104
	headerLength    = 112 // as we write it: with compression_type and its padding

	maxL1Bytes       = 32 << 20
	maxLength        = 1<<63 - 1<<30 // of any image that qemu handles
	maxReftableBytes = 8 << 20
	maxSnapshots     = 65536
	maxNameLength    = 1023 // of a backing or data file

	subclusters = 32 // of a cluster with extended L2 entries
)

// Feature bits (qcow2.txt, "Header").
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	incompatKnown       = 1<<5 - 1

	compatLazyRefcounts = 1 << 0

	autoclearBitmaps     = 1 << 0
	autoclearDataFileRaw = 1 << 1
	autoclearKnown       = 1<<2 - 1
)

const (
	cryptNone = 0
	cryptAES  = 1
	cryptLUKS = 2
)

const (
	compressionZlib = 0
	compressionZstd = 1
)

// header is the fixed part of the header cluster (qcow2.txt, "Header").
type header struct {
	version          uint32
	backingOffset    uint64
	backingSize      uint32
	clusterBits      uint32
	size             uint64
	crypt            uint32
	l1Size           uint32 // entries
	l1Offset         uint64
	reftableOffset   uint64
	reftableClusters uint32
	snapshotCount    uint32
	snapshotsOffset  uint64
	incompatible     uint64
	compatible       uint64
	autoclear        uint64
	refcountOrder    uint32
	length           uint32
	compression      uint8
	unknown          []byte // fields beyond those above, kept as they are
}

// decode reads the fixed fields from the beginning of a file. Version 2
// headers get version 3's defaults.
func (h *header) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.BigEndian)
	if m := c.U32(); m != magic || c.Err() != nil {
		return &sdk.Error{Text: "Image is not in qcow2 format", Class: sdk.ErrNotFormat}
	}
	*h = header{}
	h.version = c.U32()
	h.backingOffset = c.U64()
	h.backingSize = c.U32()
	h.clusterBits = c.U32()
	h.size = c.U64()
	h.crypt = c.U32()
	h.l1Size = c.U32()
	h.l1Offset = c.U64()
	h.reftableOffset = c.U64()
	h.reftableClusters = c.U32()
	h.snapshotCount = c.U32()
	h.snapshotsOffset = c.U64()
	if c.Err() != nil {
		return &sdk.Error{Text: "Could not read qcow2 header: Invalid argument", Class: sdk.ErrCorrupt}
	}
	h.refcountOrder, h.length = 4, headerV2Length
	if h.version == 3 {
		h.incompatible = c.U64()
		h.compatible = c.U64()
		h.autoclear = c.U64()
		h.refcountOrder = c.U32()
		h.length = c.U32()
		if c.Err() != nil {
			return &sdk.Error{Text: "Could not read qcow2 header: Invalid argument", Class: sdk.ErrCorrupt}
		}
		if h.length > headerV3Minimum {
			h.compression = c.U8()
		}
		if n := int64(h.length); n > headerLength && n <= int64(len(b)) {
			h.unknown = append([]byte(nil), b[headerLength:n]...)
		}
	}
	return nil
}

// wholeSize is the disk's size in bytes up to its last whole sector, with which a
// disk ends for qemu.
func (h *header) wholeSize() uint64 { return h.size &^ (sectorSize - 1) }

// append adds the fixed fields, as long as h.length says.
func (h *header) append(b []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint32(b, magic)
	b = be.AppendUint32(b, h.version)
	b = be.AppendUint64(b, h.backingOffset)
	b = be.AppendUint32(b, h.backingSize)
	b = be.AppendUint32(b, h.clusterBits)
	b = be.AppendUint64(b, h.size)
	b = be.AppendUint32(b, h.crypt)
	b = be.AppendUint32(b, h.l1Size)
	b = be.AppendUint64(b, h.l1Offset)
	b = be.AppendUint64(b, h.reftableOffset)
	b = be.AppendUint32(b, h.reftableClusters)
	b = be.AppendUint32(b, h.snapshotCount)
	b = be.AppendUint64(b, h.snapshotsOffset)
	if h.version < 3 {
		return b
	}
	b = be.AppendUint64(b, h.incompatible)
	b = be.AppendUint64(b, h.compatible)
	b = be.AppendUint64(b, h.autoclear)
	b = be.AppendUint32(b, h.refcountOrder)
	b = be.AppendUint32(b, h.length)
	if h.length > headerV3Minimum {
		b = append(b, h.compression, 0, 0, 0, 0, 0, 0, 0)
	}
	return append(b, h.unknown...)
}

// validate checks what can be checked without reading more, in the order and
// with the words of qemu-img. It leaves the crypt method and the unknown
// incompatible features to the caller, who has the feature table for them.
func (h *header) validate() error {
	bad := func(class error, format string, args ...any) error {
		return &sdk.Error{Text: fmt.Sprintf(format, args...), Class: class}
	}
	if h.version != 2 && h.version != 3 {
		return bad(sdk.ErrUnsupported, "Unsupported qcow2 version %d", h.version)
	}
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return bad(sdk.ErrCorrupt, "Unsupported cluster size: 2^%d", h.clusterBits)
	}
	cluster := uint64(1) << h.clusterBits
	if h.version == 3 && h.length < headerV3Minimum {
		return bad(sdk.ErrCorrupt, "qcow2 header too short")
	}
	if uint64(h.length) > cluster {
		return bad(sdk.ErrCorrupt, "qcow2 header exceeds cluster size")
	}
	if h.backingOffset > cluster {
		return bad(sdk.ErrCorrupt, "Invalid backing file offset")
	}
	switch {
	case h.compression > compressionZstd:
		return bad(sdk.ErrUnsupported, "qcow2: unknown compression type: %d", h.compression)
	case h.compression == compressionZlib && h.incompatible&incompatCompression != 0:
		return bad(sdk.ErrCorrupt, "qcow2: Compression type incompatible feature bit must not be set")
	case h.compression != compressionZlib && h.incompatible&incompatCompression == 0:
		return bad(sdk.ErrCorrupt, "qcow2: Compression type incompatible feature bit must be set")
	}
	return nil
}

// validateTables checks the rest of the header, likewise.
func (h *header) validateTables(check bool) error {
	bad := func(class error, format string, args ...any) error {
		return &sdk.Error{Text: fmt.Sprintf(format, args...), Class: class}
	}
	if h.extendedL2() && h.clusterSize()/subclusters < 1<<minClusterBits {
		return bad(sdk.ErrCorrupt, "Unsupported subcluster size: %d", h.clusterSize()/subclusters)
	}
	if h.refcountOrder > 6 {
		return bad(sdk.ErrCorrupt, "Reference count entry width too large; may not exceed 64 bits")
	}
	if h.reftableClusters == 0 && !check {
		return bad(sdk.ErrCorrupt, "Image does not contain a reference count table")
	}
	if err := h.validateTable(h.reftableOffset, uint64(h.reftableClusters), uint64(h.clusterSize()), maxReftableBytes, "Reference count table"); err != nil {
		return err
	}
	if !check {
		if err := h.validateTable(h.snapshotsOffset, uint64(h.snapshotCount), snapshotFixed, snapshotFixed*maxSnapshots, "Snapshot table"); err != nil {
			return err
		}
	}
	if err := h.validateTable(h.l1Offset, uint64(h.l1Size), 8, maxL1Bytes, "Active L1 table"); err != nil {
		return err
	}
	need := h.l1Needed()
	if need > 1<<31-1 || h.size > 1<<63-1 {
		return bad(sdk.ErrTooBig, "Image is too big")
	}
	if uint64(h.l1Size) < need {
		return bad(sdk.ErrCorrupt, "L1 table is too small")
	}
	return nil
}

func (h *header) validateTable(offset, entries, entrySize, limit uint64, name string) error {
	if entries > limit/entrySize {
		return &sdk.Error{Text: name + " too large", Class: sdk.ErrTooBig}
	}
	// qemu leaves INT_MAX bytes of headroom, so that sums cannot overflow.
	if size := entries * entrySize; 1<<63-1-size < offset || offset%uint64(h.clusterSize()) != 0 {
		return &sdk.Error{Text: name + " offset invalid", Class: sdk.ErrCorrupt}
	}
	return nil
}

func (h *header) clusterSize() int64 { return 1 << h.clusterBits }
func (h *header) extendedL2() bool   { return h.incompatible&incompatExtendedL2 != 0 }
func (h *header) dataFile() bool     { return h.incompatible&incompatDataFile != 0 }
func (h *header) geometry() geometry {
	return newGeometry(h.clusterBits, h.extendedL2(), h.refcountOrder)
}

// l1Needed returns the number of L1 entries that cover the virtual size.
func (h *header) l1Needed() uint64 {
	g := h.geometry()
	n := h.size >> g.l1Shift
	if h.size&(1<<g.l1Shift-1) != 0 {
		n++
	}
	return n
}

// geometry holds the shifts that follow from cluster size, L2 entry size and
// refcount width.
type geometry struct {
	clusterBits  uint32
	clusterSize  int64
	entrySize    int64 // of an L2 entry: 8 or 16
	l2Entries    int64 // in a table
	l1Shift      uint32
	order        uint32 // log2 of the refcount width in bits
	blockEntries int64  // refcounts in a refcount block
	subSize      int64  // of a subcluster; the cluster size without extended L2
}

func newGeometry(clusterBits uint32, extended bool, order uint32) geometry {
	g := geometry{clusterBits: clusterBits, clusterSize: 1 << clusterBits, entrySize: 8, order: order}
	g.subSize = g.clusterSize
	if extended {
		g.entrySize = 16
		g.subSize /= subclusters
	}
	g.l2Entries = g.clusterSize / g.entrySize
	g.l1Shift = clusterBits + uint32(bits.TrailingZeros64(uint64(g.l2Entries)))
	g.blockEntries = g.clusterSize * 8 >> order
	return g
}

func (g *geometry) extended() bool { return g.entrySize == 16 }

// clusters returns the number of clusters that n bytes take.
func (g *geometry) clusters(n int64) int64 { return ondisk.DivUp(n, g.clusterSize) }

package qcow2

// Bits of L1 and L2 entries (qcow2.txt, "Cluster mapping").
const (
	flagCopied     = 1 << 63
	flagCompressed = 1 << 62
	flagZero       = 1 << 0

	offsetMask = 0x00fffffffffffe00

	l1Reserved = 0x7f000000000001ff
	l2Reserved = 0x3f000000000001fe
)

// l2Entry is one entry of an L2 table; sub is its subcluster bitmap, 0 without
// extended L2 entries.
type l2Entry struct{ desc, sub uint64 }

func (e l2Entry) compressed() bool  { return e.desc&flagCompressed != 0 }
func (e l2Entry) copied() bool      { return e.desc&flagCopied != 0 }
func (e l2Entry) hostOffset() int64 { return int64(e.desc & offsetMask) }

// compressedRange returns where the data of a compressed cluster lie. The end
// is that of a sector of 512 bytes: the data may end before (qcow2.txt,
// "Compressed Clusters Descriptor").
func (g *geometry) compressedRange(e l2Entry) (offset, length int64) {
	shift := 62 - (g.clusterBits - 8)
	offset = int64(e.desc & (1<<shift - 1))
	sectors := int64(e.desc>>shift&(1<<(g.clusterBits-8)-1)) + 1
	return offset, sectors*512 - offset%512
}

// compressedEntry is the inverse of compressedRange.
func (g *geometry) compressedEntry(offset, length int64) uint64 {
	shift := 62 - (g.clusterBits - 8)
	sectors := (offset+length-1)/512 - offset/512
	return flagCompressed | uint64(offset) | uint64(sectors)<<shift
}

// Subcluster bitmap: bits 0-31 say allocated, bits 32-63 say zero.
func subAllocated(sub uint64, i uint) bool { return sub>>i&1 != 0 }
func subZero(sub uint64, i uint) bool      { return sub>>(32+i)&1 != 0 }

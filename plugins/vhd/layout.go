package vhd

import "github.com/instar-img/instar/sdk/ondisk"

// layout says where new blocks go: behind each other, each with its bitmap
// before it. Aligning the data to the blocks of a file system would let copies
// share storage, and would make files larger than others write them.
type layout struct {
	blockSize int64
	bitmap    int64 // bytes before each block's data
}

// alignmentGap is less than what other programs leave between blocks in order
// to align their data.
const alignmentGap = 4096

func newLayout(blockSize int64) layout {
	return layout{blockSize: blockSize, bitmap: bitmapSize(blockSize)}
}

// next returns the host offset of the bitmap of a block placed at or after end.
func (l layout) next(end int64) int64 { return ondisk.DivUp(end, sectorSize) * sectorSize }

// end returns where the file's data ends after n blocks placed from at on. It
// is exact for sizes that a 32-bit sector number can address.
func (l layout) end(at, n int64) int64 {
	if n == 0 {
		return at
	}
	first := l.next(at)
	stride := l.next(first+l.bitmap+l.blockSize) - first
	return first + (n-1)*stride + l.bitmap + l.blockSize
}

// addressable reports whether a block whose bitmap is at off can stand in the
// block allocation table.
func addressable(off int64) bool { return off%sectorSize == 0 && off/sectorSize < unallocated }

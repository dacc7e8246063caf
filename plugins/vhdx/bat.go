package vhdx

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk/ondisk"
)

// States of a payload block (MS-VHDX 2.5.1.1). A sector bitmap block is either
// not present or, with the value of fully present, present.
const (
	blockNotPresent       = 0
	blockUndefined        = 1
	blockZero             = 2
	blockUnmapped         = 3
	blockUnmapped095      = 5 // of the specification's draft 0.95
	blockFullyPresent     = 6
	blockPartiallyPresent = 7

	bitmapPresent = 6
	bitmapSize    = mib
)

// batEntry is an entry of the block allocation table (MS-VHDX 2.5.1).
type batEntry uint64

const (
	entrySize   = 8
	stateMask   = 7
	offsetMask  = ^uint64(mib - 1)
	maxFileSize = 1 << 47 // twice the largest virtual size: what a log may make of a file
)

func makeEntry(state uint8, hostOffset int64) batEntry {
	return batEntry(uint64(hostOffset)&offsetMask | uint64(state))
}

func (e batEntry) state() uint8 { return uint8(e & stateMask) }

// offset is where the block lies in the file, in bytes, a multiple of 1 MiB.
func (e batEntry) offset() uint64 { return uint64(e) & offsetMask }

// reserved bits must be zero.
func (e batEntry) reserved() uint64 { return uint64(e) &^ offsetMask &^ stateMask }

// present reports whether the block has bytes in the file.
func (e batEntry) present() bool {
	return e.state() == blockFullyPresent || e.state() == blockPartiallyPresent
}

// geometry is how guest offsets, blocks and entries of the table relate.
type geometry struct {
	virtualSize int64
	blockSize   int64
	sector      int64 // logical sector size
	blocks      int64 // payload blocks
	ratio       int64 // payload blocks to one sector bitmap block
	entries     int64
	parent      bool
}

func newGeometry(p *parameters) geometry {
	g := geometry{
		virtualSize: int64(p.virtualSize),
		blockSize:   int64(p.blockSize),
		sector:      int64(p.logicalSector),
		parent:      p.flags&hasParent != 0,
	}
	g.blocks = ondisk.DivUp(g.virtualSize, g.blockSize)
	g.ratio = bitmapSize * 8 * g.sector / g.blockSize
	switch {
	case g.blocks == 0:
	case g.parent:
		g.entries = ondisk.DivUp(g.blocks, g.ratio) * (g.ratio + 1)
	default:
		g.entries = g.blocks + (g.blocks-1)/g.ratio
	}
	return g
}

// index returns the entry of a payload block: after each chunk of them comes
// the entry of its sector bitmap.
func (g *geometry) index(block int64) int64 { return block + block/g.ratio }

// bitmapIndex returns the entry of the sector bitmap that covers a block.
func (g *geometry) bitmapIndex(block int64) int64 {
	return block/g.ratio*(g.ratio+1) + g.ratio
}

// block returns the payload block of an entry, or false for a sector bitmap's.
func (g *geometry) block(index int64) (int64, bool) {
	chunk, in := index/(g.ratio+1), index%(g.ratio+1)
	return chunk*g.ratio + in, in != g.ratio
}

// length returns how many guest bytes a block holds: less than a whole block at
// the end of the disk.
func (g *geometry) length(block int64) int64 {
	return min(g.blockSize, g.virtualSize-block*g.blockSize)
}

// batChunk is how many entries are read at once.
const batChunk = 8192

// noBlock stands for the payload block of a sector bitmap's entry.
const noBlock = -1

// eachEntry calls f with count entries of the table from first on, and the
// payload blocks that they are for, until it returns false.
func (img *image) eachEntry(ctx context.Context, first, count int64, f func(index, block int64, e batEntry) (bool, error)) error {
	buf := make([]byte, min(count, batChunk)*entrySize)
	// Counted, not divided: there are up to 2^26 entries.
	ratio := img.geo.ratio
	block, in := first/(ratio+1)*ratio+first%(ratio+1), first%(ratio+1)
	for count > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(count, batChunk)
		if _, err := img.file.ReadAt(buf[:n*entrySize], img.bat.start+first*entrySize); err != nil {
			return fmt.Errorf("bat[%d]: %w", first, err)
		}
		for i := range n {
			b := block
			if in == ratio {
				b, in = noBlock, 0
			} else {
				block++
				in++
			}
			more, err := f(first+i, b, batEntry(binary.LittleEndian.Uint64(buf[i*entrySize:])))
			if err != nil || !more {
				return err
			}
		}
		first += n
		count -= n
	}
	return nil
}

package vhdx

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// mapBatch is how many extents are yielded at once.
const mapBatch = 4096

// extents merges runs of guest bytes and yields them in batches.
type extents struct {
	yield   func([]sdk.Extent) bool
	batch   []sdk.Extent
	stopped bool
	dirty   bool // a log may change payload
}

func (x *extents) add(e sdk.Extent) {
	if e.Length == 0 || x.stopped {
		return
	}
	if n := len(x.batch); n > 0 {
		last := &x.batch[n-1]
		if last.Kind == e.Kind && e.Kind != sdk.Encoded &&
			(last.HostOffset < 0 && e.HostOffset < 0 || last.HostOffset >= 0 && last.HostOffset+last.Length == e.HostOffset) {
			last.Length += e.Length
			return
		}
		// The last one stays behind: what follows may continue it.
		if n == mapBatch {
			tail := x.batch[n-1]
			x.stopped = !x.yield(x.batch[:n-1])
			x.batch = append(make([]sdk.Extent, 0, mapBatch), tail)
		}
	}
	x.batch = append(x.batch, e)
}

func (x *extents) flush() {
	if len(x.batch) > 0 && !x.stopped {
		x.yield(x.batch)
	}
}

// Map implements sdk.Image.
func (img *image) Map(ctx context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	if !ondisk.Within(off, length, img.geo.virtualSize) {
		return fmt.Errorf("map: %#x bytes at %#x of %#x: %w", length, off, img.geo.virtualSize, sdk.ErrInvalid)
	}
	if length == 0 {
		return nil
	}
	g := &img.geo
	end := off + length
	first, last := off/g.blockSize, (end-1)/g.blockSize
	x := &extents{yield: yield, dirty: img.file.dirty()}
	from := g.index(first)
	err := img.eachEntry(ctx, from, g.index(last)-from+1, func(_, block int64, e batEntry) (bool, error) {
		if block == noBlock {
			return true, nil
		}
		start := max(off, block*g.blockSize)
		n := min(end, (block+1)*g.blockSize) - start
		return !x.stopped, img.mapBlock(x, block, e, start, n)
	})
	x.flush()
	return err
}

// mapBlock adds the n guest bytes at start, which lie in one block.
func (img *image) mapBlock(x *extents, block int64, e batEntry, start, n int64) error {
	switch e.state() {
	case blockNotPresent:
		x.add(sdk.Extent{Offset: start, Length: n, Kind: sdk.Absent, HostOffset: -1})
		return nil
	case blockUndefined, blockZero, blockUnmapped, blockUnmapped095:
		x.add(sdk.Extent{Offset: start, Length: n, Kind: sdk.Zero, HostOffset: -1})
		return nil
	case blockFullyPresent:
	case blockPartiallyPresent:
		if img.geo.parent {
			break
		}
		fallthrough
	default:
		return fmt.Errorf("bat[%d]: block state %d: %w", img.geo.index(block), e.state(), sdk.ErrCorrupt)
	}
	host, ok := ondisk.Int64(e.offset())
	if !ok || !ondisk.Within(host, img.geo.length(block), img.file.size) {
		return fmt.Errorf("bat[%d]: block at %#x beyond end of file %#x: %w", img.geo.index(block), e.offset(), img.file.size, sdk.ErrCorrupt)
	}
	host += start - block*img.geo.blockSize
	if e.state() == blockFullyPresent {
		img.addData(x, start, host, n)
		return nil
	}
	return img.mapPartial(x, block, start, host, n)
}

// mapPartial adds what a block's sector bitmap says is here, and leaves the
// rest to the parent.
func (img *image) mapPartial(x *extents, block, start, host, n int64) error {
	g := &img.geo
	var b [entrySize]byte
	at := g.bitmapIndex(block)
	if _, err := img.file.ReadAt(b[:], img.bat.start+at*entrySize); err != nil {
		return fmt.Errorf("bat[%d]: %w", at, err)
	}
	e := batEntry(binary.LittleEndian.Uint64(b[:]))
	bitmap, ok := ondisk.Int64(e.offset())
	if e.state() != bitmapPresent || !ok || !ondisk.Within(bitmap, bitmapSize, img.file.size) {
		return fmt.Errorf("bat[%d]: sector bitmap in state %d at %#x for a partially present block: %w", at, e.state(), e.offset(), sdk.ErrCorrupt)
	}
	// The bits of this block in its chunk's bitmap, least significant first.
	perBlock := g.blockSize / g.sector
	lo := (start - block*g.blockSize) / g.sector
	hi := ondisk.DivUp(start+n-block*g.blockSize, g.sector)
	bits, err := sdk.ReadAtMost(img.file, "sector bitmap", bitmap+block%g.ratio*(perBlock/8)+lo/8, ondisk.DivUp(hi, 8)-lo/8, maxBlockSize/512/8)
	if err != nil {
		return err
	}
	get := func(s int64) bool { return bits[s/8-lo/8]>>(s%8)&1 != 0 }
	blockStart := block * g.blockSize
	for s := lo; s < hi; {
		here := get(s)
		to := s + 1
		for to < hi && get(to) == here {
			to++
		}
		from := max(start, blockStart+s*g.sector)
		length := min(start+n, blockStart+to*g.sector) - from
		if here {
			img.addData(x, from, host+from-start, length)
		} else {
			x.add(sdk.Extent{Offset: from, Length: length, Kind: sdk.Absent, HostOffset: -1})
		}
		s = to
	}
	return nil
}

// addData adds n plain bytes at host. Where a log that is not replayed changes
// them, only Decode can read them; what lies behind the end of the file until
// the log is replayed reads as zeros.
func (img *image) addData(x *extents, start, host, n int64) {
	for n > 0 {
		part := n
		var run span
		ok := false
		if x.dirty {
			run, ok = img.file.pendingIn(host, host+n)
		}
		if ok && run.start == host {
			part = run.end - run.start
			x.add(sdk.Extent{Offset: start, Length: part, Kind: sdk.Encoded, HostOffset: host, EncodedLength: part})
		} else {
			if ok {
				part = run.start - host
			}
			here := min(max(img.file.fileSize-host, 0), part)
			x.add(sdk.Extent{Offset: start, Length: here, Kind: sdk.Data, HostOffset: host, Sparse: true})
			x.add(sdk.Extent{Offset: start + here, Length: part - here, Kind: sdk.Zero, HostOffset: -1})
		}
		start, host, n = start+part, host+part, n-part
	}
}

// Decode implements sdk.Decoder: payload that the log changes.
func (img *image) Decode(_ context.Context, e sdk.Extent, dst []byte) error {
	if e.Kind != sdk.Encoded || int64(len(dst)) != e.Length || !ondisk.Within(e.HostOffset, e.Length, img.file.size) {
		return fmt.Errorf("decode: extent %+v: %w", e, sdk.ErrInvalid)
	}
	if _, err := img.file.ReadAt(dst, e.HostOffset); err != nil {
		return fmt.Errorf("decode: %#x bytes at %#x: %w", e.Length, e.HostOffset, err)
	}
	return nil
}

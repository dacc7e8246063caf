package vhd

import (
	"context"
	"errors"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// Map implements sdk.Image.
func (img *image) Map(ctx context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	if !ondisk.Within(off, length, img.size) {
		return fmt.Errorf("map %#x+%#x beyond virtual size %#x: %w", off, length, img.size, sdk.ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if length == 0 {
		return nil
	}
	m := &mapper{yield: yield}
	if img.footer.diskType == typeFixed {
		m.add(sdk.Extent{Offset: off, Length: length, Kind: sdk.Data, HostOffset: off, Sparse: true})
		m.flush()
		return nil
	}
	bs := img.blockSize()
	err := img.table(ctx, off/bs, ondisk.DivUp(off+length, bs), func(i int64, entry uint32) error {
		lo, hi := max(off, i*bs), min(off+length, (i+1)*bs)
		switch {
		case entry == unallocated:
			m.add(img.hole(lo, hi))
		case img.differencing():
			if err := img.mapSectors(m, i, entry, lo, hi); err != nil {
				return err
			}
		default:
			// Of a dynamic disk's block all sectors count, whatever its bitmap
			// says, as for qemu-img: sectors never written hold zeros.
			m.add(sdk.Extent{Offset: lo, Length: hi - lo, Kind: sdk.Data, HostOffset: img.dataAt(entry) + lo - i*bs})
		}
		if m.stopped {
			return errStop
		}
		return nil
	})
	if errors.Is(err, errStop) {
		return nil
	}
	if !m.stopped {
		m.flush()
	}
	return err
}

// errStop ends a walk that its caller has enough of.
var errStop = errors.New("stopped")

// hole is what a disk without the block holds.
func (img *image) hole(lo, hi int64) sdk.Extent {
	e := sdk.Extent{Offset: lo, Length: hi - lo, Kind: sdk.Zero, HostOffset: -1}
	if img.differencing() {
		e.Kind = sdk.Absent
	}
	return e
}

// mapSectors maps guest range [lo, hi) of block i by the block's bitmap: a set
// bit is a sector of this disk, a clear one is the parent's ("Differencing Hard
// Disk Images").
func (img *image) mapSectors(m *mapper, i int64, entry uint32, lo, hi int64) error {
	base := i * img.blockSize()
	first, last := (lo-base)/sectorSize, ondisk.DivUp(hi-base, sectorSize) // sectors of the block
	bits, err := img.readBitmap(entry, first/8, ondisk.DivUp(last, 8))
	if err != nil {
		return fmt.Errorf("block %d: %w", i, err)
	}
	present := func(s int64) bool { s -= first / 8 * 8; return bits[s/8]&(0x80>>(s%8)) != 0 }
	for s := first; s < last && !m.stopped; {
		run := s + 1
		for run < last && present(run) == present(s) {
			run++
		}
		from, to := max(lo, base+s*sectorSize), min(hi, base+run*sectorSize)
		if present(s) {
			m.add(sdk.Extent{Offset: from, Length: to - from, Kind: sdk.Data, HostOffset: img.dataAt(entry) + from - base})
		} else {
			m.add(img.hole(from, to))
		}
		s = run
	}
	return nil
}

// readBitmap reads bytes [from, to) of a block's bitmap.
func (img *image) readBitmap(entry uint32, from, to int64) ([]byte, error) {
	b, err := sdk.ReadAtMost(img.file, "sector bitmap", int64(entry)*sectorSize+from, to-from, img.bitmap)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// mapper merges extents and hands them on in batches.
type mapper struct {
	yield   func([]sdk.Extent) bool
	batch   []sdk.Extent
	stopped bool
}

const mapBatch = 4096

func (m *mapper) add(e sdk.Extent) {
	if n := len(m.batch); n > 0 {
		last := &m.batch[n-1]
		if last.Kind == e.Kind && (e.HostOffset < 0 || last.HostOffset+last.Length == e.HostOffset) {
			last.Length += e.Length
			return
		}
		if n >= mapBatch {
			m.flush()
		}
	}
	m.batch = append(m.batch, e)
}

func (m *mapper) flush() {
	if len(m.batch) > 0 && !m.stopped {
		m.stopped = !m.yield(m.batch)
	}
	m.batch = nil
}

package vhdx

import (
	"context"
	"fmt"
	"math"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// checkPlace reports what is wrong with where a payload block lies, in
// qemu-img's words.
func (img *image) checkPlace(i, block int64, e batEntry, report func(string)) {
	off := e.offset()
	size := img.file.size
	if block == noBlock || !e.present() || off >= uint64(img.regions.end()) && off <= uint64(max(size-img.geo.blockSize, 0)) {
		return
	}
	if off > uint64(math.MaxInt64-img.geo.blockSize) {
		report(fmt.Sprintf("VHDX BAT entry %d offset overflow.", i))
	}
	length := uint64(img.geo.length(block))
	switch {
	case off >= uint64(size):
		report(fmt.Sprintf("VHDX BAT entry %d start offset %d points after end of file (%d). Image has probably been truncated.", i, off, size))
	case off+length > uint64(size):
		report(fmt.Sprintf("VHDX BAT entry %d end offset %d points after end of file (%d). Image has probably been truncated.", i, off+length-1, size))
	}
	if start, ok := ondisk.Int64(off); ok && start <= math.MaxInt64-img.geo.blockSize {
		s := span{start, start + img.geo.blockSize}
		if with, ok := img.regions.find(s); ok {
			report(overlapText(s, with))
		}
	}
	if off < headerSectionEnd {
		report(fmt.Sprintf("VHDX BAT entry %d start offset %d lies in the header section.", i, off))
	}
}

// checkState reports what the specification forbids of an entry by itself.
func (img *image) checkState(i, block int64, e batEntry, report func(string)) {
	if e.reserved() != 0 {
		report(fmt.Sprintf("VHDX BAT entry %d has reserved bits %#x set: its block is not aligned to 1 MiB.", i, e.reserved()))
	}
	if block != noBlock {
		switch e.state() {
		case blockPartiallyPresent:
			if !img.geo.parent {
				report(fmt.Sprintf("VHDX BAT entry %d is partially present in an image without parent.", i))
			}
		case 4:
			report(fmt.Sprintf("VHDX BAT entry %d has the unknown state %d.", i, e.state()))
		}
		return
	}
	switch {
	case e.state() == blockNotPresent:
	case e.state() != bitmapPresent:
		report(fmt.Sprintf("VHDX BAT entry %d, a sector bitmap, has the unknown state %d.", i, e.state()))
	case !img.geo.parent:
		report(fmt.Sprintf("VHDX BAT entry %d, a sector bitmap, is present in an image without parent.", i))
	case e.offset() >= uint64(img.file.size) || e.offset()+bitmapSize > uint64(img.file.size):
		report(fmt.Sprintf("VHDX BAT entry %d, a sector bitmap at %d, points after end of file (%d). Image has probably been truncated.", i, e.offset(), img.file.size))
	default:
		s := span{int64(e.offset()), int64(e.offset()) + bitmapSize}
		if with, ok := img.regions.find(s); ok {
			report(overlapText(s, with))
		}
	}
}

// maxCheckedFile bounds the memory of the check for blocks that overlap: 64 MiB
// for a file of 512 TiB, eight times the largest disk.
const maxCheckedFile = 512 << 40

// usage marks each MiB of the file that a block takes.
type usage []uint64

func (u usage) take(s span, size int64) (free bool) {
	free = true
	for m := s.start / mib; m < ondisk.DivUp(min(s.end, size), mib); m++ {
		bit := uint64(1) << (m % 64)
		if u[m/64]&bit != 0 {
			free = false
		}
		u[m/64] |= bit
	}
	return free
}

// Check implements sdk.Checker.
func (img *image) Check(ctx context.Context, req sdk.CheckRequest) (*sdk.CheckResult, error) {
	res := &sdk.CheckResult{}
	message := func(text string) {
		if req.Message != nil {
			req.Message(text)
		}
	}
	report := func(text string) {
		res.Corruptions++
		message(text)
	}
	if img.file.dirty() {
		if req.Fix == sdk.FixNone {
			report("VHDX image contains a log that needs to be replayed.  To replay the log, check it with -r all.")
		} else {
			if !img.req.ReadWrite {
				return nil, fmt.Errorf("check: the log can be replayed only into a file opened for writing: %w", sdk.ErrReadOnly)
			}
			if err := img.file.replay(ctx, &img.headers, &guids{}); err != nil {
				return nil, err
			}
			res.CorruptionsFixed++
		}
	}
	size := img.file.size
	var used usage
	if size <= maxCheckedFile {
		used = make(usage, ondisk.DivUp(ondisk.DivUp(size, mib), 64))
	} else {
		res.CheckErrors++
		message(fmt.Sprintf("VHDX file of %d bytes is too large to look for blocks that overlap.", size))
	}
	g := &img.geo
	// Of the current chunk: a block that needs the sector bitmap.
	partial := int64(-1)
	err := img.eachEntry(ctx, 0, g.entries, func(i, block int64, e batEntry) (bool, error) {
		img.checkPlace(i, block, e, report)
		img.checkState(i, block, e, report)
		payload := block != noBlock
		length := g.blockSize
		if !payload {
			length = bitmapSize
			if partial >= 0 && e.state() == blockNotPresent {
				report(fmt.Sprintf("VHDX BAT entry %d is partially present, its sector bitmap is not.", partial))
			}
			partial = -1
		} else if g.parent && e.state() == blockPartiallyPresent {
			partial = i
		}
		if off := e.offset(); used != nil && off < uint64(size) && (payload && e.present() || !payload && e.state() == bitmapPresent) {
			if !used.take(span{int64(off), int64(off) + length}, size) {
				report(fmt.Sprintf("VHDX BAT entry %d at %d overlaps with another block.", i, off))
			}
		}
		if i%batChunk == 0 && req.Progress != nil {
			req.Progress(float64(i) / float64(g.entries))
		}
		return true, nil
	})
	return res, err
}

package vhd

import (
	"context"
	"fmt"
	"slices"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// maxChecked bounds the memory that looking for overlaps takes, 4 bytes a
// block. At the usual 2 MiB a block it is 64 TiB.
const maxChecked = 32 << 20

// region is a range of the file that holds metadata.
type region struct {
	start, end int64
	what       string
}

// metadata returns where a dynamic or differencing disk's metadata lies, but
// for its trailing footer.
func (img *image) metadata() []region {
	head := int64(img.footer.dataOffset)
	table := int64(img.header.tableOffset)
	all := []region{
		{0, footerSize, "first copy of the footer"},
		{head, head + headerSize, "dynamic disk header"},
		{table, table + 4*int64(img.header.entries), "block allocation table"},
	}
	if img.differencing() {
		for i, l := range img.header.locators {
			off, ok := ondisk.Int64(l.dataOffset)
			if ok && l.platform != platformNone && l.dataLength > 0 && ondisk.Within(off, int64(l.dataLength), img.length) {
				all = append(all, region{off, off + int64(l.dataLength), fmt.Sprintf("parent locator %d", i)})
			}
		}
	}
	return all
}

// Check implements sdk.Checker. qemu-img has no check of this format.
func (img *image) Check(ctx context.Context, req sdk.CheckRequest) (*sdk.CheckResult, error) {
	if req.Fix != sdk.FixNone {
		return nil, fmt.Errorf("repair of VHDs: %w", sdk.ErrUnsupported)
	}
	c := &checker{img: img, req: req}
	for _, err := range img.damage {
		c.corrupt("%v", err)
	}
	if img.footer.diskType != typeFixed {
		if err := c.blocks(ctx); err != nil {
			return nil, err
		}
	}
	if req.Progress != nil {
		req.Progress(1)
	}
	return &c.res, nil
}

type checker struct {
	img  *image
	req  sdk.CheckRequest
	res  sdk.CheckResult
	said int // messages so far
}

// maxMessages bounds what a check says of a table that is garbage from end to
// end. It goes on counting.
const maxMessages = 1000

func (c *checker) message(format string, args ...any) {
	c.said++
	switch {
	case c.req.Message == nil || c.said > maxMessages:
	case c.said == maxMessages:
		c.req.Message("Further findings are counted, but not listed")
	default:
		c.req.Message(fmt.Sprintf(format, args...))
	}
}

func (c *checker) corrupt(format string, args ...any) {
	c.res.Corruptions++
	c.message("ERROR "+format, args...)
}

// quiet reports whether nothing more is said: then findings are counted without
// the cost of naming them.
func (c *checker) quiet() bool { return c.said >= maxMessages }

func (c *checker) blocks(ctx context.Context) error {
	img := c.img
	if !img.tailOK {
		c.corrupt("the footer at the end of the file is missing, damaged or differs from the first copy")
	}
	// Where data may begin and must end: the trailing footer is not data.
	limit := img.length
	if img.tailOK {
		limit = img.tailFrom
	}
	c.res.TotalClusters = ondisk.DivUp(img.size, img.blockSize())
	c.res.AllocatedClusters = img.used
	c.res.ImageEndOffset = img.dataEnd + footerSize

	keep := img.used <= maxChecked
	if !keep {
		c.res.CheckErrors++
		c.message("ERROR %d blocks are too many to look for overlaps, at most %d are checked", img.used, maxChecked)
	}
	var starts []uint32
	if keep {
		starts = make([]uint32, 0, img.used)
	}
	metadata := img.metadata()
	previous := int64(-1) // end of the block before, in guest order
	err := img.table(ctx, 0, int64(img.header.entries), func(i int64, entry uint32) error {
		if entry == unallocated {
			return nil
		}
		lo, hi := int64(entry)*sectorSize, img.dataAt(entry)+img.blockSize()
		if previous >= 0 && (lo < previous || lo-previous >= alignmentGap) {
			c.res.FragmentedClusters++
		}
		previous = hi
		switch {
		case hi > limit && c.quiet():
			c.res.Corruptions++
		case hi > limit:
			c.corrupt("block %d: host range %#x to %#x beyond end of data %#x", i, lo, hi, limit)
		case i >= c.res.TotalClusters:
			c.res.Leaks++
			if !c.quiet() {
				c.message("Leaked block %d: beyond the end of the disk", i)
			}
		}
		for _, m := range metadata {
			switch {
			case lo >= m.end || m.start >= hi:
			case c.quiet():
				c.res.Corruptions++
			default:
				c.corrupt("block %d: host range %#x to %#x overlaps the %s", i, lo, hi, m.what)
			}
		}
		if keep {
			starts = append(starts, entry)
		}
		if c.req.Progress != nil && i%pageEntries == 0 {
			c.req.Progress(float64(i) / float64(img.header.entries))
		}
		return nil
	})
	if err != nil || !keep {
		return err
	}
	c.gaps(starts, limit)
	return nil
}

// gaps looks for blocks that share space and for space that no block has.
func (c *checker) gaps(starts []uint32, limit int64) {
	slices.Sort(starts)
	occupied := c.img.bitmap + c.img.blockSize()
	var meta int64
	for _, m := range c.img.metadata() {
		if len(starts) == 0 || m.start < int64(starts[0])*sectorSize {
			meta = max(meta, m.end)
		}
	}
	end := ondisk.DivUp(meta, sectorSize) * sectorSize
	leaked := func(from, to int64) {
		// Less than a block is alignment, or metadata of who knows whom.
		if n := (min(to, limit) - from) / occupied; n > 0 {
			c.res.Leaks += n
			c.message("Leaked space of %d blocks at host offset %#x", n, from)
		}
	}
	for i, s := range starts {
		lo := int64(s) * sectorSize
		switch {
		case i == 0 || lo >= end:
		case c.quiet():
			c.res.Corruptions++
		default:
			c.corrupt("two blocks share host range %#x to %#x", lo, end)
		}
		leaked(end, lo)
		end = max(end, lo+occupied)
	}
	leaked(end, limit)
}

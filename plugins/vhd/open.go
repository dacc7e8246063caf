// Package vhd reads and writes VHD images, the format of Virtual PC, Virtual
// Server and early Hyper-V, which qemu calls vpc: fixed, dynamic and
// differencing disks.
//
// Section names in comments refer to Microsoft's "Virtual Hard Disk Image
// Format Specification", version 1.0.
package vhd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// New returns the VHD format.
func New() sdk.Format { return format{} }

type format struct{}

func (format) Describe() sdk.Description { return description() }

// image is an opened VHD. Of its fields only those in writer change.
type image struct {
	file     sdk.File
	length   int64 // of the file, when it was opened
	writable bool

	footer    footer
	footerEnd int64 // of a fixed disk's data, where its footer begins
	size      int64 // virtual
	// damage is what Open tolerated: Check reports it, and writing is refused.
	damage []error

	// Of dynamic and differencing disks:
	header   header
	bitmap   int64 // bytes before each block's data
	metaEnd  int64 // where the table ends, in whole sectors
	dataEnd  int64 // where the last block ends, at least metaEnd
	used     int64 // entries of the table that have a block
	parents  []sdk.Reference
	writer   *writer
	tailOK   bool  // the trailing footer is there and says the same
	tailFrom int64 // where the trailing footer begins
}

// Open implements sdk.Format.
func (format) Open(ctx context.Context, req sdk.OpenRequest) (sdk.Image, error) {
	if len(req.Files) == 0 {
		return nil, fmt.Errorf("no file to open: %w", sdk.ErrInvalid)
	}
	if req.Snapshot != "" {
		return nil, fmt.Errorf("snapshot %q: VHD images have none: %w", req.Snapshot, sdk.ErrNotFound)
	}
	img := &image{file: req.Files[0].File, writable: req.ReadWrite}
	var err error
	if img.length, err = img.file.Size(); err != nil {
		return nil, err
	}
	if err := img.findFooter(req.Check); err != nil {
		return nil, err
	}
	img.size = int64(img.footer.virtualSectors()) * sectorSize
	if img.footer.diskType == typeFixed {
		return img, img.openFixed(req.Check)
	}
	return img, img.openBlocks(ctx, req.Check)
}

// found is what stands where a footer may be.
type found struct {
	footer footer
	at     int64
	err    error // errNoCookie, a checksum error, or why it cannot be used
}

func (img *image) footerAt(at, n int64) found {
	if at < 0 || n > img.length-at {
		return found{err: errNoCookie}
	}
	r := found{at: at}
	b, err := sdk.ReadAtMost(img.file, "VHD footer", at, n, footerSize)
	if err != nil {
		r.err = err
		return r
	}
	if r.err = r.footer.decode(b); r.err == nil {
		r.err = r.footer.validate()
	}
	return r
}

// findFooter chooses the footer to go by: the first copy, the trailing footer
// of fixed disks and of those whose first copy is broken, and among trailing
// ones the form that is a byte short of a sector. In check mode a footer with a
// wrong checksum is better than none.
func (img *image) findFooter(check bool) error {
	head := img.footerAt(0, min(footerSize, max(img.length, shortFooterSize)))
	tail := img.footerAt(img.length-footerSize, footerSize)
	if errors.Is(tail.err, errNoCookie) {
		tail = img.footerAt(img.length-shortFooterSize, shortFooterSize)
	}
	img.tailFrom = tail.at
	img.footerEnd = tail.at
	blocks := func(f found) bool { return f.footer.diskType != typeFixed }
	switch {
	case head.err == nil && blocks(head):
		img.footer = head.footer
		img.tailOK = tail.err == nil && tail.footer == head.footer
		return nil
	case tail.err == nil && blocks(tail):
		img.footer, img.tailOK = tail.footer, true
		img.damage = append(img.damage, fmt.Errorf("first copy of the footer: %w", brokenHead(head)))
		return nil
	case tail.err == nil:
		img.footer, img.tailOK = tail.footer, true
		return nil
	}
	// Neither can be trusted.
	for _, f := range []found{head, tail} {
		switch {
		case errors.Is(f.err, errNoCookie):
		case f.err == nil:
			return fmt.Errorf("fixed disk without a footer at its end: %w", sdk.ErrCorrupt)
		case check && f.footer.checksum != f.footer.sum() && f.footer.usable():
			img.footer = f.footer
			img.damage = append(img.damage, fmt.Errorf("footer at %#x: checksum %#x, computed %#x: %w", f.at, f.footer.checksum, f.footer.sum(), sdk.ErrCorrupt))
			return nil
		default:
			return f.err
		}
	}
	if img.length < shortFooterSize {
		return &sdk.Error{Text: "File too small for a VHD header", Class: sdk.ErrNotFormat}
	}
	return &sdk.Error{Text: "invalid VPC image", Class: sdk.ErrNotFormat}
}

func brokenHead(head found) error {
	if head.err == nil {
		return fmt.Errorf("disk type %s, the trailing footer has another: %w", head.footer.diskType, sdk.ErrCorrupt)
	}
	return fmt.Errorf("%w: %w", head.err, sdk.ErrCorrupt)
}

// usable reports whether a footer can be gone by but for its checksum.
func (f *footer) usable() bool {
	g := *f
	g.checksum = g.sum()
	return g.validate() == nil
}

func (img *image) openFixed(check bool) error {
	if img.size <= img.footerEnd {
		return nil
	}
	err := fmt.Errorf("fixed disk of %d bytes in a file with %d bytes of data: %w", img.size, img.footerEnd, sdk.ErrCorrupt)
	if !check {
		return err
	}
	img.damage = append(img.damage, err)
	return nil
}

// openBlocks reads the header of a dynamic or differencing disk and walks the
// block allocation table, as qemu-img does: a table that points behind the end
// of the file is a truncated image.
func (img *image) openBlocks(ctx context.Context, check bool) error {
	at, ok := ondisk.Int64(img.footer.dataOffset)
	if !ok || !ondisk.Within(at, headerSize, img.length) {
		return fmt.Errorf("dynamic disk header at %#x beyond end of file %#x: %w", img.footer.dataOffset, img.length, sdk.ErrCorrupt)
	}
	b, err := sdk.ReadAtMost(img.file, "dynamic disk header", at, headerSize, headerSize)
	if err != nil {
		return err
	}
	if err := img.header.decode(b); err != nil {
		return err
	}
	if err := img.header.validate(img.length, img.size); err != nil {
		return err
	}
	if img.header.checksum != img.header.sum() {
		img.damage = append(img.damage, fmt.Errorf("dynamic disk header: checksum %#x, computed %#x: %w", img.header.checksum, img.header.sum(), sdk.ErrCorrupt))
	}
	img.bitmap = bitmapSize(img.blockSize())
	img.metaEnd = ondisk.DivUp(int64(img.header.tableOffset)+4*int64(img.header.entries), sectorSize) * sectorSize
	if img.differencing() {
		parent, err := img.parent()
		if err != nil && !check {
			return err
		}
		if err != nil {
			img.damage = append(img.damage, err)
		} else {
			img.parents = []sdk.Reference{parent}
		}
	}
	img.dataEnd = img.metaEnd
	err = img.table(ctx, 0, int64(img.header.entries), func(_ int64, entry uint32) error {
		if entry != unallocated {
			img.used++
			img.dataEnd = max(img.dataEnd, img.dataAt(entry)+img.blockSize())
		}
		return nil
	})
	if err != nil {
		return err
	}
	if sdk.OnDevice(img.file) {
		// The device goes on after the image.
		tail := img.footerAt(img.dataEnd, footerSize)
		img.tailFrom, img.tailOK = img.dataEnd, tail.err == nil && tail.footer == img.footer
	}
	if img.dataEnd > img.length && !check {
		return &sdk.Error{
			Text:  "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.",
			Class: sdk.ErrCorrupt,
		}
	}
	return nil
}

func (img *image) blockSize() int64   { return int64(img.header.blockSize) }
func (img *image) differencing() bool { return img.footer.diskType == typeDifferencing }

// dataAt returns the host offset of the data of a table entry's block. It
// cannot overflow.
func (img *image) dataAt(entry uint32) int64 {
	return int64(entry)*sectorSize + img.bitmap
}

// table calls fn with entries [from, to) of the block allocation table.
func (img *image) table(ctx context.Context, from, to int64, fn func(i int64, entry uint32) error) error {
	buf := make([]byte, min(tableChunk, 4*(to-from)))
	for from < to {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(int64(len(buf)/4), to-from)
		at := int64(img.header.tableOffset) + 4*from
		if _, err := img.file.ReadAt(buf[:4*n], at); err != nil {
			return fmt.Errorf("block allocation table: read %#x bytes at %#x: %w", 4*n, at, err)
		}
		for i := range n {
			if err := fn(from+i, binary.BigEndian.Uint32(buf[4*i:])); err != nil {
				return err
			}
		}
		from += n
	}
	return nil
}

// Info implements sdk.Image.
func (img *image) Info(context.Context) (*sdk.Info, error) {
	info := &sdk.Info{
		VirtualSize: img.size,
		References:  img.parents,
		Identity: map[string]string{
			identityID:   img.footer.uniqueID.String(),
			identityTime: strconv.FormatUint(uint64(img.footer.timestamp), 10),
		},
	}
	if img.footer.diskType != typeFixed {
		info.AllocationUnit = img.blockSize()
	}
	return info, nil
}

// Close implements sdk.Image.
func (img *image) Close() error { return nil }

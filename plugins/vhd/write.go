package vhd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// writeUnit is the granularity of writing into blocks: that of file systems,
// rather than the block, so that zeros inside a block stay holes.
const writeUnit = 4096

// pageEntries is how many table entries are loaded and written together.
const pageEntries = 4096

// writer is the state between BeginWrite and Finish. Blocks are added behind
// the old end of the file, where everything reads as zeros, and nothing refers
// to them before Finish has written the table.
type writer struct {
	mu       sync.Mutex
	capacity int64 // of a device, whose end says nothing and which may hold anything; 0: a file
	layout   layout
	end      int64              // where the next block may begin
	firstNew int64              // bitmap of the first new block, 0 for none
	pages    map[int64][]uint32 // of the table, by first entry
	dirty    map[int64]bool
	recent   recent
	spare    []int64 // where blocks were that have been given back, oldest first
	inPlace  bool    // the image had content before
	metadata []region
	// Of differencing disks, the bitmap of the new block being written:
	current int64 // -1 for none
	entry   uint32
	bits    []byte
	// pending are the bitmaps of blocks that were there before, by entry. They
	// are written when their sectors' data are on stable storage.
	pending map[uint32][]byte
}

// BeginWrite implements sdk.Writer.
func (img *image) BeginWrite(_ context.Context, req sdk.WriteRequest) (sdk.WriteInfo, error) {
	switch {
	case !img.writable:
		return sdk.WriteInfo{}, fmt.Errorf("VHD opened for reading: %w", sdk.ErrReadOnly)
	case req.Compressed:
		return sdk.WriteInfo{}, &sdk.Error{Text: "Compression not supported for this file format", Class: sdk.ErrUnsupported}
	case len(img.damage) > 0:
		return sdk.WriteInfo{}, fmt.Errorf("damaged VHD: %w: %w", img.damage[0], sdk.ErrReadOnly)
	}
	if img.footer.diskType == typeFixed {
		// What the file holds already only the core knows.
		return sdk.WriteInfo{Unit: sectorSize, InPlace: true}, nil
	}
	img.writer = &writer{
		layout:  newLayout(img.blockSize()),
		end:     max(img.dataEnd, img.length),
		pages:   map[int64][]uint32{},
		dirty:   map[int64]bool{},
		inPlace: img.used > 0,
		current: -1,
		pending: map[uint32][]byte{},

		metadata: img.metadata(),
	}
	switch {
	case sdk.OnDevice(img.file):
		img.writer.end, img.writer.capacity = img.dataEnd, img.length
	case img.tailFrom >= img.dataEnd && img.tailOK:
		img.writer.end = img.tailFrom
	}
	empty := img.used == 0 && !img.differencing()
	return sdk.WriteInfo{Unit: writeUnit, ReadsZero: empty, Ahead: empty}, nil
}

// Place implements sdk.Writer.
func (img *image) Place(ctx context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	var places []sdk.Placement
	err := img.eachBlock(runs, func(block int64, r sdk.Run) error {
		if img.footer.diskType == typeFixed {
			places = append(places, sdk.Placement{Offset: r.Offset, Length: r.Length, HostOffset: r.Offset})
			return nil
		}
		entry, fresh, err := img.allocate(ctx, block)
		if err != nil {
			return err
		}
		img.writer.recent.add(block, r, fresh)
		places = append(places, sdk.Placement{
			Offset:     r.Offset,
			Length:     r.Length,
			HostOffset: img.dataAt(entry) + r.Offset - block*img.blockSize(),
		})
		return img.mark(block, entry, r)
	})
	return places, err
}

// Zero implements sdk.Writer. A dynamic disk's missing blocks are zeros; a
// differencing disk has no other way than to store them.
func (img *image) Zero(ctx context.Context, runs []sdk.Run) error {
	return img.eachBlock(runs, func(block int64, r sdk.Run) error {
		if img.footer.diskType == typeFixed {
			return img.zero(ctx, r.Offset, r.Length)
		}
		entry, err := img.entry(block)
		if err != nil {
			return err
		}
		fresh := false
		if entry == unallocated {
			if !img.differencing() {
				return nil
			}
			if entry, fresh, err = img.allocate(ctx, block); err != nil {
				return err
			}
		}
		if !img.writer.inPlace && !img.differencing() {
			return img.giveBack(block, entry, r)
		}
		if !fresh && !img.isNew(entry) {
			if err := img.checkEntry(block, entry); err != nil {
				return err
			}
			if err := img.zero(ctx, img.dataAt(entry)+r.Offset-block*img.blockSize(), r.Length); err != nil {
				return err
			}
		}
		return img.mark(block, entry, r)
	})
}

// Encode implements sdk.Writer: VHDs have no encoded form.
func (img *image) Encode(context.Context, []sdk.Unit) error {
	return fmt.Errorf("VHDs have no encoded form: %w", sdk.ErrUnsupported)
}

// eachBlock calls fn with the runs cut at the boundaries of blocks.
func (img *image) eachBlock(runs []sdk.Run, fn func(block int64, r sdk.Run) error) error {
	if img.footer.diskType != typeFixed {
		if img.writer == nil {
			return fmt.Errorf("write outside of BeginWrite and Finish: %w", sdk.ErrInvalid)
		}
		img.writer.mu.Lock()
		defer img.writer.mu.Unlock()
	}
	for _, r := range runs {
		if r.Length <= 0 || !ondisk.Within(r.Offset, r.Length, img.size) || r.Offset%sectorSize != 0 || r.Length%sectorSize != 0 {
			return fmt.Errorf("run %#x+%#x in a disk of %#x bytes: %w", r.Offset, r.Length, img.size, sdk.ErrInvalid)
		}
		if img.footer.diskType == typeFixed {
			if err := fn(0, r); err != nil {
				return err
			}
			continue
		}
		for at, end := r.Offset, r.Offset+r.Length; at < end; {
			block := at / img.blockSize()
			next := min(end, (block+1)*img.blockSize())
			if err := fn(block, sdk.Run{Offset: at, Length: next - at}); err != nil {
				return err
			}
			at = next
		}
	}
	return nil
}

// page returns the entries from first on, loaded once.
func (img *image) page(block int64) (page []uint32, first int64, err error) {
	w := img.writer
	first = block / pageEntries * pageEntries
	if page, ok := w.pages[first]; ok {
		return page, first, nil
	}
	n := min(pageEntries, int64(img.header.entries)-first)
	b := make([]byte, 4*n)
	if _, err := img.file.ReadAt(b, int64(img.header.tableOffset)+4*first); err != nil {
		return nil, 0, fmt.Errorf("block allocation table: read %d entries from %d: %w", n, first, err)
	}
	page = make([]uint32, n)
	for i := range page {
		page[i] = binary.BigEndian.Uint32(b[4*i:])
	}
	w.pages[first] = page
	return page, first, nil
}

func (img *image) entry(block int64) (uint32, error) {
	page, first, err := img.page(block)
	if err != nil {
		return 0, err
	}
	return page[block-first], nil
}

// allocate returns the table entry of a block, a new one where there is none.
func (img *image) allocate(ctx context.Context, block int64) (entry uint32, fresh bool, err error) {
	w := img.writer
	page, first, err := img.page(block)
	if err != nil {
		return 0, false, err
	}
	if entry = page[block-first]; entry != unallocated {
		return entry, false, img.checkEntry(block, entry)
	}
	at := w.layout.next(w.end)
	if len(w.spare) > 0 {
		at = w.spare[0]
	}
	if !addressable(at) {
		return 0, false, fmt.Errorf("block %d: no space below 2 TiB in the file: %w", block, sdk.ErrTooBig)
	}
	if end := at + img.bitmap + img.blockSize(); w.capacity > 0 {
		if end+footerSize > w.capacity {
			return 0, false, fmt.Errorf("block %d: no room at %#x on a device of %#x bytes: %w", block, at, w.capacity, sdk.ErrTooBig)
		}
		if err := img.zero(ctx, at, end-at); err != nil {
			return 0, false, fmt.Errorf("block %d: %w", block, err)
		}
	}
	// A dynamic disk's block is all its own; of a differencing disk's, the
	// sectors that are written. An old footer may lie here.
	bits := bytes.Repeat([]byte{0xff}, int(img.bitmap))
	if img.differencing() {
		clear(bits)
	}
	if _, err := img.file.WriteAt(bits, at); err != nil {
		return 0, false, fmt.Errorf("block %d: write bitmap: %w", block, err)
	}
	if len(w.spare) > 0 {
		w.spare = w.spare[1:]
	} else {
		w.end = at + img.bitmap + img.blockSize()
	}
	if w.firstNew == 0 {
		w.firstNew = at
	}
	entry = uint32(at / sectorSize)
	page[block-first] = entry
	w.dirty[first] = true
	return entry, true, nil
}

// recent knows how many bytes are placed in each of the blocks that were added
// last: places are given back soon or never.
type recent struct {
	bytes map[int64]int64 // by block
	order []int64
	end   int64 // guest offset behind what was placed last
}

const recentBlocks = 256

func (r *recent) add(block int64, run sdk.Run, fresh bool) {
	if fresh {
		if r.bytes == nil {
			r.bytes = map[int64]int64{}
		}
		if len(r.order) == recentBlocks {
			delete(r.bytes, r.order[0])
			r.order = r.order[:copy(r.order, r.order[1:])]
		}
		r.bytes[block] = 0
		r.order = append(r.order, block)
	}
	if _, ok := r.bytes[block]; ok {
		r.bytes[block] += run.Length
	}
	r.end = run.Offset + run.Length
}

// giveBack takes back a run that was placed in a block of an image that was
// empty, and in which nothing has been written: with the last of them the block.
func (img *image) giveBack(block int64, entry uint32, run sdk.Run) error {
	w := img.writer
	left, ok := w.recent.bytes[block]
	if !ok || run.Offset >= w.recent.end {
		return nil // zeros in a block that is there
	}
	if left -= run.Length; left > 0 {
		w.recent.bytes[block] = left
		return nil
	}
	delete(w.recent.bytes, block)
	page, first, err := img.page(block)
	if err != nil {
		return err
	}
	page[block-first] = unallocated
	w.spare = append(w.spare, int64(entry)*sectorSize)
	return nil
}

// compact closes the gaps that blocks given back have left: with what was placed
// last, where the end of the file does not move below them. They are few: the
// core gives back soon after it has placed.
func (img *image) compact(ctx context.Context) error {
	w := img.writer
	slices.Sort(w.spare)
	whole := img.bitmap + img.blockSize()
	for len(w.spare) > 0 {
		last := w.end - whole
		if n := len(w.spare) - 1; w.spare[n] == last {
			w.spare = w.spare[:n]
		} else {
			if err := img.moveBlock(ctx, last, w.spare[0]); err != nil {
				return err
			}
			w.spare = w.spare[1:]
		}
		w.end = last
	}
	return nil
}

// moveBlock moves the block whose bitmap is at from to a gap at to. Zeros stay
// holes.
func (img *image) moveBlock(ctx context.Context, from, to int64) error {
	w := img.writer
	for _, first := range slices.Sorted(maps.Keys(w.dirty)) {
		i := slices.Index(w.pages[first], uint32(from/sectorSize))
		if i < 0 {
			continue
		}
		b, zeros := make([]byte, writeUnit), make([]byte, writeUnit)
		for off := img.bitmap; off < img.bitmap+img.blockSize(); off += writeUnit {
			if err := ctx.Err(); err != nil {
				return err
			}
			if _, err := img.file.ReadAt(b, from+off); err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("move block %d from %#x: %w", first+int64(i), from, err)
			}
			if bytes.Equal(b, zeros) {
				continue
			}
			if _, err := img.file.WriteAt(b, to+off); err != nil {
				return fmt.Errorf("move block %d to %#x: %w", first+int64(i), to, err)
			}
		}
		w.pages[first][i] = uint32(to / sectorSize)
		return nil
	}
	return fmt.Errorf("no block at %#x: %w", from, sdk.ErrCorrupt)
}

// isNew reports whether a block was added since BeginWrite.
func (img *image) isNew(entry uint32) bool {
	return img.writer.firstNew != 0 && int64(entry)*sectorSize >= img.writer.firstNew
}

// checkEntry refuses blocks that lie on metadata: writing to them would destroy
// the image.
func (img *image) checkEntry(block int64, entry uint32) error {
	if img.isNew(entry) {
		return nil
	}
	lo, hi := int64(entry)*sectorSize, img.dataAt(entry)+img.blockSize()
	for _, m := range img.writer.metadata {
		if lo < m.end && m.start < hi {
			return fmt.Errorf("block %d: host range %#x to %#x overlaps the %s: %w", block, lo, hi, m.what, sdk.ErrCorrupt)
		}
	}
	return nil
}

// mark notes in a differencing disk's bitmap that the run's sectors are in this
// disk.
func (img *image) mark(block int64, entry uint32, r sdk.Run) error {
	if !img.differencing() {
		return nil
	}
	bits, err := img.bitmapFor(block, entry)
	if err != nil {
		return fmt.Errorf("block %d: %w", block, err)
	}
	base := block * img.blockSize()
	for s := (r.Offset - base) / sectorSize; s < (r.Offset+r.Length-base)/sectorSize; s++ {
		bits[s/8] |= 0x80 >> (s % 8)
	}
	return nil
}

// maxPending bounds the bitmaps held back, 512 bytes each for blocks of 2 MiB.
// Beyond it a crash may find sectors marked whose data never arrived.
const maxPending = 1 << 15

// bitmapFor returns the bitmap of a block, to be changed.
func (img *image) bitmapFor(block int64, entry uint32) ([]byte, error) {
	w := img.writer
	if bits, ok := w.pending[entry]; ok {
		return bits, nil
	}
	if w.current == block {
		return w.bits, nil
	}
	bits, err := img.readBitmap(entry, 0, img.bitmap)
	if err != nil {
		return nil, err
	}
	if !img.isNew(entry) {
		if len(w.pending) >= maxPending {
			if err := img.flushPending(); err != nil {
				return nil, err
			}
		}
		w.pending[entry] = bits
		return bits, nil
	}
	if err := img.flushBitmap(); err != nil {
		return nil, err
	}
	w.current, w.entry, w.bits = block, entry, bits
	return bits, nil
}

func (img *image) flushPending() error {
	w := img.writer
	for _, entry := range slices.Sorted(maps.Keys(w.pending)) {
		if _, err := img.file.WriteAt(w.pending[entry], int64(entry)*sectorSize); err != nil {
			return fmt.Errorf("write bitmap at %#x: %w", int64(entry)*sectorSize, err)
		}
	}
	clear(w.pending)
	return nil
}

func (img *image) flushBitmap() error {
	w := img.writer
	if w.current < 0 {
		return nil
	}
	if _, err := img.file.WriteAt(w.bits, int64(w.entry)*sectorSize); err != nil {
		return fmt.Errorf("block %d: write bitmap: %w", w.current, err)
	}
	w.current = -1
	return nil
}

// zero makes a host range read as zeros, and gives its space back where it can.
// What holds zeros already is left alone, so that holes stay holes.
func (img *image) zero(ctx context.Context, off, n int64) error {
	if sdk.Discard(img.file, off, n) {
		return nil
	}
	buf := make([]byte, min(n, 1<<20))
	zeros := make([]byte, len(buf))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(n, int64(len(buf)))]
		got, err := img.file.ReadAt(b, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read %#x bytes at %#x: %w", len(b), off, err)
		}
		if !bytes.Equal(b[:got], zeros[:got]) {
			if _, err := img.file.WriteAt(zeros[:got], off); err != nil {
				return fmt.Errorf("zero %#x bytes at %#x: %w", got, off, err)
			}
		}
		off, n = off+int64(len(b)), n-int64(len(b))
	}
	return nil
}

// Finish implements sdk.Writer. What refers to new data is written when the
// data and the new trailing footer are on stable storage, so that an image
// interrupted before is the old one in a longer file.
func (img *image) Finish(ctx context.Context) error {
	if img.footer.diskType == typeFixed {
		return nil // the footer is where it was
	}
	w := img.writer
	if w == nil {
		return fmt.Errorf("Finish without BeginWrite: %w", sdk.ErrInvalid)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := img.flushBitmap(); err != nil {
		return err
	}
	if err := img.compact(ctx); err != nil {
		return err
	}
	if w.firstNew != 0 {
		if w.capacity == 0 {
			if err := img.file.Truncate(w.end + footerSize); err != nil {
				return fmt.Errorf("set file length: %w", err)
			}
		}
		if _, err := img.file.WriteAt(img.footer.append(nil), w.end); err != nil {
			return fmt.Errorf("write footer: %w", err)
		}
	}
	if w.inPlace {
		if err := img.file.Sync(); err != nil {
			return err
		}
	}
	if err := img.flushPending(); err != nil {
		return err
	}
	for _, first := range slices.Sorted(maps.Keys(w.dirty)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := img.file.WriteAt(appendTable(nil, w.pages[first]), int64(img.header.tableOffset)+4*first); err != nil {
			return fmt.Errorf("write block allocation table: %w", err)
		}
	}
	img.writer = nil
	if w.firstNew == 0 {
		return nil
	}
	// What of the old footer the first new block has not overwritten.
	if n := min(w.firstNew-img.tailFrom, footerSize); img.tailOK && img.tailFrom >= img.dataEnd && n > 0 {
		if _, err := img.file.WriteAt(make([]byte, n), img.tailFrom); err != nil {
			return fmt.Errorf("clear the old footer: %w", err)
		}
	}
	if w.capacity == 0 {
		img.length = w.end + footerSize
	}
	img.tailFrom, img.dataEnd = w.end, w.end
	return nil
}

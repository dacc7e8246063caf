package vhdx

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// writer is the state of writing into an image.
//
// New blocks go to the end of the file, where no table refers to them. Finish
// writes the table: into an image that held no blocks straight away, otherwise
// through the log, so that a crash leaves the old table or the new one.
type writer struct {
	mu    sync.Mutex
	begun bool
	fresh bool // no block was present
	ids   guids
	// touched: the headers say that the content changes.
	touched bool
	// end is where the next block goes; bounded, where not 0, by a device's size.
	end, capacity int64
	grow          bool // the file's length is ours to set
	// natural is where block 0 of a fixed image lies whose blocks have their
	// place in the file, whether the table says so or not; -1 elsewhere.
	natural int64
	// spare are the host offsets of blocks given back, oldest first.
	spare []int64
	// dropped are the host offsets of blocks that the table on disk refers to until
	// Finish, to be given back to the host then: maxDropped at most.
	dropped []int64
	// pages are the sectors of the table that change, by index.
	pages map[int64]*page
}

const maxDropped = 1 << 19 // 4 MiB

const pageEntries = sectorSize / entrySize

type page struct {
	entries [pageEntries]batEntry
	changed bool
}

var errNotWriting = fmt.Errorf("write: not begun: %w", sdk.ErrInvalid)

// BeginWrite implements sdk.Writer.
func (img *image) BeginWrite(ctx context.Context, req sdk.WriteRequest) (sdk.WriteInfo, error) {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.begun:
		return sdk.WriteInfo{}, fmt.Errorf("write: begun already: %w", sdk.ErrInvalid)
	case !img.req.ReadWrite:
		return sdk.WriteInfo{}, fmt.Errorf("write: the file was opened for reading: %w", sdk.ErrReadOnly)
	case req.Compressed:
		return sdk.WriteInfo{}, &sdk.Error{Text: "Compression not supported for this file format", Class: sdk.ErrUnsupported}
	case img.bat.start%sectorSize != 0 || img.bat.end%sectorSize != 0:
		return sdk.WriteInfo{}, fmt.Errorf("write: bat from %#x to %#x, want multiples of 4096: %w", img.bat.start, img.bat.end, sdk.ErrReadOnly)
	}
	w.ids = guids{}
	if req.Reproducible {
		h := img.headers.get()
		w.ids.seed = append(h.fileWrite[:], h.dataWrite[:]...)
	}
	if err := img.file.replay(ctx, &img.headers, &w.ids); err != nil {
		return sdk.WriteInfo{}, err
	}
	// Blocks must not be shared before what they hold is superseded.
	end, present, natural, err := img.used(ctx)
	if err != nil {
		return sdk.WriteInfo{}, err
	}
	w.fresh = !present
	w.pages = map[int64]*page{}
	w.natural = -1
	w.spare, w.dropped = nil, nil
	size := img.file.fileSize
	// A device keeps its size, and its end says nothing.
	err = img.file.File.Truncate(size)
	if err != nil && !errors.Is(err, syscall.EINVAL) {
		return sdk.WriteInfo{}, err
	}
	w.grow = err == nil
	if w.grow {
		w.end = max(end, ondisk.DivUp(size, mib)*mib)
		if natural >= 0 {
			w.natural = natural
			w.end = max(w.end, natural+img.geo.blocks*img.geo.blockSize)
		}
	} else {
		w.end = end
		if w.fresh {
			w.end = max(end, img.bat.end+dataGap)
		}
		w.capacity = size
	}
	w.begun = true
	empty := w.fresh && !img.geo.parent
	return sdk.WriteInfo{Unit: img.geo.blockSize, ReadsZero: empty, Ahead: empty && w.natural < 0}, nil
}

func (img *image) fixed() bool {
	return img.params.flags&(leaveBlocksAllocated|hasParent) == leaveBlocksAllocated
}

// used returns the end of the last structure and of the last block, whether
// there is a block at all, and where block 0 of a fixed image lies of which every
// block has its place, -1 elsewhere. It refuses tables into which nothing should
// be added.
func (img *image) used(ctx context.Context) (end int64, present bool, natural int64, err error) {
	g := &img.geo
	end = img.regions.end()
	// The file ends with the disk, or with its last block.
	var starts []int64
	for _, n := range []int64{g.virtualSize, g.blocks * g.blockSize} {
		if start := img.file.fileSize - n; img.fixed() && start >= end && start%mib == 0 {
			starts = append(starts, start)
		}
	}
	err = img.eachEntry(ctx, 0, g.entries, func(i, block int64, e batEntry) (bool, error) {
		payload := block != noBlock
		length := g.blockSize
		if !payload {
			length = bitmapSize
		}
		// A block that is not present may have kept its place.
		off, ok := ondisk.Int64(e.offset())
		after := off
		if ok {
			after, ok = ondisk.Add(off, length)
		}
		if !ok || after > maxFileSize {
			if !e.present() {
				return true, nil
			}
			return false, fmt.Errorf("bat[%d]: block at %#x: %w", i, e.offset(), sdk.ErrCorrupt)
		}
		if off != 0 && e.state() != blockZero && e.state() != blockNotPresent {
			end = max(end, after)
			starts = slices.DeleteFunc(starts, func(start int64) bool { return !payload || off != start+block*g.blockSize })
		}
		present = present || e.present()
		return true, nil
	})
	if len(starts) == 0 {
		return end, present, -1, err
	}
	return end, present, starts[0], err
}

// touch marks the image as changed before the first change of guest bytes.
func (img *image) touch() error {
	w := &img.writer
	if w.touched {
		return nil
	}
	session, err := w.ids.next()
	if err != nil {
		return err
	}
	data, err := w.ids.next()
	if err != nil {
		return err
	}
	err = img.headers.update(img.file.File, !w.fresh, func(h *header) { h.fileWrite, h.dataWrite = session, data })
	w.touched = err == nil
	return err
}

// entry returns a page of the table that will be written, and the place of an
// entry in it.
func (img *image) entry(index int64) (*page, *batEntry, error) {
	w := &img.writer
	n := index / pageEntries
	p := w.pages[n]
	if p == nil {
		var b [sectorSize]byte
		if _, err := img.file.ReadAt(b[:], img.bat.start+n*sectorSize); err != nil {
			return nil, nil, fmt.Errorf("bat[%d]: %w", n*pageEntries, err)
		}
		p = &page{}
		for i := range p.entries {
			p.entries[i] = batEntry(binary.LittleEndian.Uint64(b[i*entrySize:]))
		}
		w.pages[n] = p
	}
	return p, &p.entries[index%pageEntries], nil
}

func (img *image) checkRun(r sdk.Run) error {
	g := &img.geo
	if !ondisk.Within(r.Offset, r.Length, g.virtualSize) || r.Offset%g.blockSize != 0 ||
		r.Length%g.blockSize != 0 && r.Offset+r.Length != g.virtualSize {
		return fmt.Errorf("write: %#x bytes at %#x are not whole blocks of %#x: %w", r.Length, r.Offset, g.blockSize, sdk.ErrInvalid)
	}
	return nil
}

// Place implements sdk.Writer.
func (img *image) Place(ctx context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.begun {
		return nil, errNotWriting
	}
	if err := img.touch(); err != nil {
		return nil, err
	}
	g := &img.geo
	var places []sdk.Placement
	for _, r := range runs {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := img.checkRun(r); err != nil {
			return nil, err
		}
		for off := r.Offset; off < r.Offset+r.Length; off += g.blockSize {
			host, err := img.placeBlock(off / g.blockSize)
			if err != nil {
				return nil, err
			}
			n := min(g.blockSize, r.Offset+r.Length-off)
			if last := len(places) - 1; last >= 0 && places[last].Offset+places[last].Length == off && places[last].HostOffset+places[last].Length == host {
				places[last].Length += n
				continue
			}
			places = append(places, sdk.Placement{Offset: off, Length: n, HostOffset: host})
		}
	}
	return places, img.extend()
}

// extend makes the file long enough for whole blocks, whatever of the last one
// is written: readers expect them.
func (img *image) extend() error {
	w := &img.writer
	f := img.file
	f.mu.Lock()
	defer f.mu.Unlock()
	if !w.grow || w.end <= f.fileSize {
		return nil
	}
	if err := f.File.Truncate(w.end); err != nil {
		return fmt.Errorf("write: extend the file to %#x: %w", w.end, err)
	}
	f.fileSize, f.size = w.end, w.end
	return nil
}

func (img *image) placeBlock(block int64) (int64, error) {
	w := &img.writer
	g := &img.geo
	p, e, err := img.entry(g.index(block))
	if err != nil {
		return 0, err
	}
	host := int64(e.offset())
	switch {
	case e.state() == blockFullyPresent:
		return host, nil
	case e.state() == blockPartiallyPresent && g.parent:
		// All of the block will be here: its bitmap no longer counts.
	case w.natural >= 0:
		host = w.natural + block*g.blockSize
	case len(w.spare) > 0:
		host = w.spare[0]
		w.spare = w.spare[1:]
	default:
		host = w.end
		end, ok := ondisk.Add(host, g.blockSize)
		if !ok || w.capacity > 0 && end > w.capacity {
			return 0, fmt.Errorf("write: no room for block %d at %#x of %#x: %w", block, host, w.capacity, sdk.ErrTooBig)
		}
		w.end = end
	}
	*e = makeEntry(blockFullyPresent, host)
	p.changed = true
	return host, nil
}

// Zero implements sdk.Writer.
func (img *image) Zero(ctx context.Context, runs []sdk.Run) error {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.begun {
		return errNotWriting
	}
	g := &img.geo
	for _, r := range runs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := img.checkRun(r); err != nil {
			return err
		}
		for off := r.Offset; off < r.Offset+r.Length; off += g.blockSize {
			if err := img.zeroBlock(ctx, off/g.blockSize); err != nil {
				return err
			}
		}
	}
	return nil
}

func (img *image) zeroBlock(ctx context.Context, block int64) error {
	g := &img.geo
	p, e, err := img.entry(g.index(block))
	if err != nil {
		return err
	}
	switch {
	case e.state() == blockZero || e.state() == blockNotPresent && !g.parent:
		return nil
	case e.state() == blockFullyPresent && img.fixed():
		// The blocks of a fixed image stay allocated.
		return img.zeroBytes(ctx, int64(e.offset()), g.length(block))
	case e.state() == blockFullyPresent && img.writer.fresh && !g.parent:
		// Placed since, and nothing has been written there.
		img.writer.spare = append(img.writer.spare, int64(e.offset()))
	case e.present() && len(img.writer.dropped) < maxDropped:
		img.writer.dropped = append(img.writer.dropped, int64(e.offset()))
	}
	if err := img.touch(); err != nil {
		return err
	}
	*e = makeEntry(blockZero, 0)
	p.changed = true
	return nil
}

// zeroBytes makes bytes of the file zero, and writes only those that are not.
func (img *image) zeroBytes(ctx context.Context, off, n int64) error {
	f := img.file.File
	buf, zeros := make([]byte, mib), make([]byte, mib)
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		part := min(n, mib)
		m, err := f.ReadAt(buf[:part], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if string(buf[:m]) != string(zeros[:m]) {
			if err := img.touch(); err != nil {
				return err
			}
			if _, err := f.WriteAt(zeros[:m], off); err != nil {
				return err
			}
		}
		off, n = off+part, n-part
	}
	return nil
}

// Encode implements sdk.Writer.
func (*image) Encode(context.Context, []sdk.Unit) error {
	return fmt.Errorf("write: VHDX holds no compressed blocks: %w", sdk.ErrUnsupported)
}

// Finish implements sdk.Writer.
func (img *image) Finish(ctx context.Context) error {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.begun {
		return errNotWriting
	}
	w.begun = false
	if err := img.trim(); err != nil {
		return err
	}
	var changed []int64
	for n, p := range w.pages {
		if p.changed {
			changed = append(changed, n)
		}
	}
	slices.Sort(changed)
	if len(changed) == 0 {
		return nil
	}
	if w.fresh {
		return img.writePages(ctx, changed)
	}
	if err := img.file.Sync(); err != nil {
		return err
	}
	for len(changed) > 0 {
		batch := changed[:min(len(changed), logBatch)]
		changed = changed[len(batch):]
		if err := img.logPages(ctx, batch); err != nil {
			return err
		}
	}
	for _, at := range w.dropped {
		sdk.Discard(img.file.File, at, img.geo.blockSize)
	}
	return nil
}

// trim ends the file before blocks at its end that were given back.
func (img *image) trim() error {
	w, f := &img.writer, img.file
	if !w.grow || len(w.spare) == 0 {
		return nil
	}
	slices.Sort(w.spare)
	for n := len(w.spare); n > 0 && w.spare[n-1] == w.end-img.geo.blockSize; n-- {
		w.end -= img.geo.blockSize
		w.spare = w.spare[:n-1]
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if w.end >= f.fileSize {
		return nil
	}
	if err := f.File.Truncate(w.end); err != nil {
		return fmt.Errorf("write: end the file at %#x: %w", w.end, err)
	}
	f.fileSize, f.size = w.end, w.end
	return nil
}

// logBatch is how many sectors of the table go into one entry of the log: as
// many as fit into the smallest log.
const logBatch = 253

// pageBytes returns a page as it is stored.
func (img *image) pageBytes(n int64) []byte {
	b := make([]byte, 0, sectorSize)
	for _, e := range img.writer.pages[n].entries {
		b = binary.LittleEndian.AppendUint64(b, uint64(e))
	}
	return b
}

// writePages writes pages of the table to their place, neighbours together.
func (img *image) writePages(ctx context.Context, pages []int64) error {
	var buf []byte
	first := int64(0)
	flush := func() error {
		if len(buf) == 0 {
			return nil
		}
		_, err := img.file.WriteAt(buf, img.bat.start+first*sectorSize)
		buf = buf[:0]
		return err
	}
	for i, n := range pages {
		if i > 0 && pages[i-1] != n-1 || len(buf) >= mib {
			if err := flush(); err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		if len(buf) == 0 {
			first = n
		}
		buf = append(buf, img.pageBytes(n)...)
	}
	return flush()
}

// logPages changes pages of the table at once: they are in the log, stable,
// before the first of them is touched.
func (img *image) logPages(ctx context.Context, pages []int64) error {
	f := img.file.File
	h := img.headers.get()
	logID, err := img.writer.ids.next()
	if err != nil {
		return err
	}
	entry := logHeader{
		sequence:    1,
		descriptors: uint32(len(pages)),
		log:         logID,
		flushed:     uint64(img.file.fileSize / mib * mib),
		last:        uint64(ondisk.DivUp(img.file.fileSize, mib) * mib),
	}
	entry.length = uint32((entry.descriptorSectors() + int64(len(pages))) * sectorSize)
	if entry.length > h.logLength {
		return fmt.Errorf("write: log of %#x bytes, want %#x: %w", h.logLength, entry.length, sdk.ErrReadOnly)
	}
	var data []byte
	b := entry.append(nil)
	for _, n := range pages {
		sector := img.pageBytes(n)
		d := logDescriptor{offset: uint64(img.bat.start + n*sectorSize), sequence: entry.sequence}
		copy(d.leading[:], sector)
		copy(d.trailing[:], sector[sectorSize-4:])
		b = d.append(b)
		data = appendDataSector(data, sector, entry.sequence)
	}
	b = append(b, make([]byte, entry.descriptorSectors()*sectorSize-int64(len(b)))...)
	b = append(b, data...)
	seal(b)
	// The entry first: with the id that it carries it counts only once the header
	// has that too.
	if _, err := f.WriteAt(b, int64(h.logOffset)); err != nil {
		return fmt.Errorf("write: log: %w", err)
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := img.headers.update(f, true, func(h *header) { h.log = logID }); err != nil {
		return err
	}
	if err := img.writePages(ctx, pages); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return img.headers.update(f, true, func(h *header) { h.log = noGUID })
}

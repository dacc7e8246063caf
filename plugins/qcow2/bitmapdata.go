package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// ReadBitmap implements sdk.BitmapReader. The bits lie in clusters, the first
// guest range in the least significant bit (qcow2.txt, "Bitmap data").
func (im *image) ReadBitmap(ctx context.Context, name string, yield func([]sdk.Run) bool) error {
	var e *bitmapEntry
	for i := range im.bitmaps {
		if im.bitmaps[i].name == name {
			e = &im.bitmaps[i]
		}
	}
	if e == nil {
		return fmt.Errorf("bitmap %q: %w", name, sdk.ErrNotFound)
	}
	if e.flags&bitmapInUse != 0 {
		return fmt.Errorf("bitmap %q is inconsistent: %w", name, sdk.ErrCorrupt)
	}
	g := &im.g
	size := int64(im.h.wholeSize())
	perCluster, ok := ondisk.Mul(g.clusterSize*8, 1<<e.granularityBits) // guest bytes
	if !ok {
		perCluster = 1 << 62
	}
	runs := make([]sdk.Run, 0, mapBatch)
	stopped := false
	add := func(off, length int64) {
		length = min(length, size-off)
		if length <= 0 || stopped {
			return
		}
		if n := len(runs); n > 0 && runs[n-1].Offset+runs[n-1].Length == off {
			runs[n-1].Length += length
			return
		}
		if len(runs) == cap(runs) { // the last one may go on
			last := runs[len(runs)-1]
			stopped = !yield(runs[:len(runs)-1])
			runs = append(make([]sdk.Run, 0, mapBatch), last)
		}
		runs = append(runs, sdk.Run{Offset: off, Length: length})
	}
	data := make([]byte, g.clusterSize)
	const per = tablePartSize / 8
	for i := int64(0); i < int64(e.tableSize) && !stopped; i++ {
		first := i / per * per
		part, err := im.cache.get(int64(e.tableOffset)+first*8, min(per, int64(e.tableSize)-first)*8)
		if err != nil {
			return fmt.Errorf("bitmap %q: %w", name, err)
		}
		entry := binary.BigEndian.Uint64(part[(i-first)*8:])
		off := int64(entry & offsetMask)
		if entry&^(offsetMask|1) != 0 || off != 0 && (entry&1 != 0 || off&(g.clusterSize-1) != 0) {
			return fmt.Errorf("bitmap %q: table entry %d is %#x: %w", name, i, entry, sdk.ErrCorrupt)
		}
		base, ok := ondisk.Mul(i, perCluster)
		if !ok || base >= size {
			break
		}
		switch {
		case off == 0 && entry&1 == 0:
		case off == 0:
			add(base, perCluster)
		default:
			if err := readZeros(im.main, data, off); err != nil {
				return fmt.Errorf("bitmap %q: %w", name, err)
			}
			for at := 0; at < len(data) && !stopped; at += 8 {
				for w := binary.LittleEndian.Uint64(data[at:]); w != 0; {
					bit := bits.TrailingZeros64(w)
					n := bits.TrailingZeros64(^(w >> bit))
					guest := base + int64(at*8+bit)<<e.granularityBits
					if guest >= size {
						break
					}
					add(guest, int64(n)<<e.granularityBits)
					if bit+n == 64 {
						break
					}
					w &^= (1<<n - 1) << bit
				}
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if len(runs) > 0 && !stopped {
		yield(runs)
	}
	return nil
}

// maxNewBitmapTable bounds the table of a bitmap that is in memory: with 64 KiB
// clusters it is enough for a petabyte in sectors.
const maxNewBitmapTable = 4 << 20

// newBitmap is a bitmap on its way into the image. One cluster of it is in
// memory: ranges come in ascending order.
type newBitmap struct {
	entry bitmapEntry
	table []uint64
	index int64 // table entry of data, -1 for none
	data  []byte
}

// WriteBitmap implements sdk.BitmapWriter.
func (im *image) WriteBitmap(ctx context.Context, b sdk.BitmapInfo, runs []sdk.Run) error {
	w, err := im.writing()
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	n, err := w.bitmap(b)
	if err != nil {
		return err
	}
	for _, r := range runs {
		if r.Offset < 0 || r.Length <= 0 || r.Offset > im.size || r.Length > im.size-r.Offset {
			return fmt.Errorf("bitmap %q: range %#x+%#x of a disk of %#x bytes: %w", b.Name, r.Offset, r.Length, im.size, sdk.ErrInvalid)
		}
		if err := w.setBits(n, r); err != nil {
			return w.fail(err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// bitmap returns the bitmap that b describes, making it where there is none.
func (w *writer) bitmap(b sdk.BitmapInfo) (*newBitmap, error) {
	for _, n := range w.bitmaps {
		if n.entry.name == b.Name {
			return n, nil
		}
	}
	im := w.im
	bad := func(format string, args ...any) (*newBitmap, error) {
		return nil, fmt.Errorf("bitmap %q: %w: %w", b.Name, fmt.Errorf(format, args...), sdk.ErrInvalid)
	}
	if im.h.version < 3 {
		return nil, fmt.Errorf("bitmaps in an image of version 2: %w", sdk.ErrUnsupported)
	}
	for i := range im.bitmaps {
		if im.bitmaps[i].name == b.Name {
			return bad("exists already")
		}
	}
	if b.Name == "" || len(b.Name) > maxBitmapNameSize {
		return bad("name of %d bytes", len(b.Name))
	}
	if !ondisk.IsPowerOfTwo(b.Granularity) || b.Granularity < 512 || b.Granularity > 1<<31 {
		return bad("granularity of %d bytes", b.Granularity)
	}
	if len(im.bitmaps)+len(w.bitmaps) >= maxBitmaps {
		return bad("more than %d bitmaps", maxBitmaps)
	}
	clusters := im.g.bitmapClusters(im.size, b.Granularity)
	if clusters == 0 || clusters > maxNewBitmapTable {
		return bad("table of %d entries", clusters)
	}
	n := &newBitmap{index: -1, table: make([]uint64, clusters)}
	n.entry = bitmapEntry{kind: 1, name: b.Name, tableSize: uint32(clusters), granularityBits: uint8(bits.TrailingZeros64(uint64(b.Granularity)))}
	if b.Enabled {
		n.entry.flags = bitmapAuto
	}
	w.bitmaps = append(w.bitmaps, n)
	return n, nil
}

// setBits marks a guest range as written.
func (w *writer) setBits(n *newBitmap, r sdk.Run) error {
	first := r.Offset >> n.entry.granularityBits
	last := (r.Offset + r.Length - 1) >> n.entry.granularityBits
	perCluster := w.im.g.clusterSize * 8
	for bit := first; bit <= last; {
		index := bit / perCluster
		end := min(last+1, (index+1)*perCluster)
		if err := w.bitmapPage(n, index); err != nil {
			return err
		}
		for ; bit < end; bit++ {
			if at := bit % perCluster; at%8 == 0 && end-bit >= 8 {
				n.data[at/8] = 0xff
				bit += 7
			} else {
				n.data[at/8] |= 1 << (at % 8)
			}
		}
	}
	return nil
}

// bitmapPage makes index the cluster in memory.
func (w *writer) bitmapPage(n *newBitmap, index int64) error {
	if n.index == index {
		return nil
	}
	if err := w.storeBitmapPage(n); err != nil {
		return err
	}
	if n.data == nil {
		n.data = make([]byte, w.im.g.clusterSize)
	}
	clear(n.data)
	n.index = index
	if off := int64(n.table[index] & offsetMask); off != 0 {
		return readZeros(w.im.main, n.data, off)
	}
	return nil
}

func (w *writer) storeBitmapPage(n *newBitmap) error {
	if n.index < 0 {
		return nil
	}
	if n.table[n.index] == 0 {
		c, err := w.s.alloc(1)
		if err != nil {
			return err
		}
		n.table[n.index] = uint64(c << w.im.g.clusterBits)
	}
	_, err := w.im.main.WriteAt(n.data, int64(n.table[n.index]))
	n.index = -1
	return err
}

// storeBitmaps writes the tables of the new bitmaps and a new directory.
// The header, which the caller writes, then points to it.
func (w *writer) storeBitmaps() error {
	if len(w.bitmaps) == 0 {
		return nil
	}
	im := w.im
	g := &im.g
	old, err := im.bitmapsExt()
	if err != nil {
		return err
	}
	var directory []byte
	for i := range im.bitmaps {
		directory = im.bitmaps[i].append(directory)
	}
	for _, n := range w.bitmaps {
		if err := w.storeBitmapPage(n); err != nil {
			return err
		}
		b := make([]byte, 0, len(n.table)*8)
		for _, entry := range n.table {
			b = binary.BigEndian.AppendUint64(b, entry)
		}
		c, err := w.s.alloc(g.clusters(int64(len(b))))
		if err != nil {
			return err
		}
		n.entry.tableOffset = uint64(c << g.clusterBits)
		if _, err := im.main.WriteAt(b, c<<g.clusterBits); err != nil {
			return err
		}
		directory = n.entry.append(directory)
	}
	if len(directory) > maxBitmapDirectory {
		return fmt.Errorf("bitmap directory of %d bytes: %w", len(directory), sdk.ErrTooBig)
	}
	c, err := w.s.alloc(g.clusters(int64(len(directory))))
	if err != nil {
		return err
	}
	if _, err := im.main.WriteAt(directory, c<<g.clusterBits); err != nil {
		return err
	}
	if old != nil {
		if err := w.release(int64(old.dirStart), int64(old.dirSize)); err != nil {
			return err
		}
	}
	x := bitmapsExtension{count: uint32(len(im.bitmaps) + len(w.bitmaps)), dirSize: uint64(len(directory)), dirStart: uint64(c << g.clusterBits)}
	im.setExtension(extension{extBitmaps, x.append(nil)})
	im.h.autoclear |= autoclearBitmaps
	for _, n := range w.bitmaps {
		im.bitmaps = append(im.bitmaps, n.entry)
	}
	w.newHeader = true
	return nil
}

// setExtension replaces a header extension, or puts it where qemu does: behind
// those that are known.
func (im *image) setExtension(e extension) {
	var list []extension
	at := 0
	for _, x := range im.ext {
		if x.kind == e.kind {
			continue
		}
		list = append(list, x)
		switch x.kind {
		case extBackingFormat, extDataFile, extCrypto, extFeatures:
			at = len(list)
		}
	}
	list = append(list, extension{})
	copy(list[at+1:], list[at:])
	list[at] = e
	im.ext = list
}

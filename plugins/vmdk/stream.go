package vmdk

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// With this level, and a block of its own for every blockSize bytes, files are
// within 2 % of what zlib's level 6 makes, qemu-img's, in half its time; levels
// 6 and below are 4 % and more above it, level 8 takes a third longer.
const (
	compressionLevel = 7
	blockSize        = 16 << 10
)

// streamWriter writes a streamOptimized file from front to end, as VMware
// specifies it: header, descriptor, compressed grains each behind its marker,
// every grain table behind the grains it refers to, grain directory, footer.
// (qemu-img puts directory and tables before the grains, and writes no footer.)
type streamWriter struct {
	file      sdk.File
	header    sparseHeader
	grain     int64
	entries   int64 // of a table
	tables    int64 // of the disk
	end       int64 // host offset of what comes next
	next      int64 // guest offset of the first grain that may come next
	directory []uint32
	table     []byte // the one being filled
	index     int64  // of table, -1: none
}

func newStreamWriter(img *image, e *extent, fresh bool) (*streamWriter, error) {
	s := e.sparse
	if !fresh {
		return nil, unsupported("Could not write to allocated cluster for streamOptimized")
	}
	if !s.markers {
		return nil, unsupported("compressed grains without markers can only be read")
	}
	w := &streamWriter{
		file: e.file, header: s.header, grain: s.grain, entries: s.entries, tables: s.tables,
		table: make([]byte, s.entries*s.entrySize), index: -1,
	}
	end := img.descAt + img.descLength
	h := &w.header
	h.overhead = uint64(ondisk.DivUp(ondisk.DivUp(end, sectorSize), streamOverhead) * streamOverhead)
	h.flags &^= flagRedundantGD
	h.rgdOffset, h.gdOffset = 0, gdAtEnd
	w.end = int64(h.overhead) * sectorSize
	// What create wrote behind the descriptor goes; until there is a footer the
	// file is no image.
	for _, n := range []int64{end, w.end} {
		if err := w.file.Truncate(n); err != nil {
			return nil, fmt.Errorf("a streamOptimized image needs a regular file: %w", err)
		}
	}
	_, err := w.file.WriteAt(h.append(nil), 0)
	return w, err
}

// packer deflates a grain; its buffer holds marker, data and padding.
type packer struct {
	buf []byte
}

var packers = sync.Pool{New: func() any { return new(packer) }}

// deflaters has the compressors, *zlib.Writer. They are apart from the packers
// because each takes a megabyte and as many are in use as there are processors,
// while a batch has a packer for every grain.
var deflaters sync.Pool

func deflater(to io.Writer) (*zlib.Writer, error) {
	if w, ok := deflaters.Get().(*zlib.Writer); ok {
		w.Reset(to)
		return w, nil
	}
	return zlib.NewWriterLevel(to, compressionLevel)
}

// Write appends to the buffer.
func (p *packer) Write(b []byte) (int, error) {
	p.buf = append(p.buf, b...)
	return len(b), nil
}

// pack makes the buffer hold the grain at a guest sector. The disk's last grain
// is filled up with zeros: 7-Zip takes a shorter one for damaged.
func (p *packer) pack(sector int64, data []byte, grain int64) error {
	p.buf = append(p.buf[:0], make([]byte, grainMarkerSize)...)
	w, err := deflater(p)
	if err != nil {
		return err
	}
	defer deflaters.Put(w)
	missing := grain - int64(len(data))
	for len(data) > blockSize {
		if _, err := w.Write(data[:blockSize]); err != nil {
			return err
		}
		if err := w.Flush(); err != nil {
			return err
		}
		data = data[blockSize:]
	}
	if _, err := w.Write(data); err != nil {
		return err
	}
	if missing > 0 {
		if _, err := w.Write(make([]byte, missing)); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	binary.LittleEndian.PutUint64(p.buf, uint64(sector))
	binary.LittleEndian.PutUint32(p.buf[8:], uint32(len(p.buf)-grainMarkerSize))
	if over := len(p.buf) % sectorSize; over != 0 {
		p.buf = append(p.buf, make([]byte, sectorSize-over)...)
	}
	return nil
}

// encode stores grains in order, compressing them side by side.
func (w *streamWriter) encode(units []sdk.Unit) error {
	packed := make([]*packer, len(units))
	defer func() {
		for _, p := range packed {
			if p != nil {
				packers.Put(p)
			}
		}
	}()
	if err := sdk.Parallel(len(units), func(i int) error {
		p := packers.Get().(*packer)
		packed[i] = p
		return p.pack(units[i].Offset/sectorSize, units[i].Data, w.grain)
	}); err != nil {
		return fmt.Errorf("compress: %w", err)
	}
	for i, u := range units {
		if err := w.store(u.Offset, packed[i].buf); err != nil {
			return fmt.Errorf("grain at %#x: %w", u.Offset, err)
		}
	}
	return nil
}

// store appends the packed grain of a guest offset.
func (w *streamWriter) store(off int64, packed []byte) error {
	if off%w.grain != 0 || off < w.next {
		return fmt.Errorf("want a grain from %#x on: %w", w.next, sdk.ErrInvalid)
	}
	if i := off / (w.grain * w.entries); i != w.index {
		if err := w.seal(); err != nil {
			return err
		}
		w.index = i
	}
	at := w.end
	if err := w.append(packed); err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(w.table[off/w.grain%w.entries*4:], uint32(at/sectorSize))
	w.next = off + w.grain
	return nil
}

// append writes b, whole sectors, at the end.
func (w *streamWriter) append(b []byte) error {
	if w.end/sectorSize+int64(len(b))/sectorSize > maxSectors {
		return fmt.Errorf("sector %d: a VMDK extent cannot address it: %w", w.end/sectorSize, sdk.ErrTooBig)
	}
	if _, err := w.file.WriteAt(b, w.end); err != nil {
		return err
	}
	w.end += int64(len(b))
	return nil
}

// seal writes the table being filled, if there is one.
func (w *streamWriter) seal() error {
	if w.index < 0 {
		return nil
	}
	sectors := ondisk.DivUp(int64(len(w.table)), sectorSize)
	m := marker{value: uint64(sectors), kind: markerGrainTable}
	at := w.end + sectorSize
	b := append(m.append(nil), w.table...)
	if err := w.append(append(b, make([]byte, sectors*sectorSize-int64(len(w.table)))...)); err != nil {
		return fmt.Errorf("grain table: %w", err)
	}
	w.directory = append(w.directory, make([]uint32, w.index+1-int64(len(w.directory)))...)
	w.directory[w.index] = uint32(at / sectorSize)
	clear(w.table)
	w.index = -1
	return nil
}

// zero stores zeros where a backing file might show through.
func (w *streamWriter) zero(e *extent, off, n int64, backing bool) error {
	if !backing {
		return nil
	}
	zeros := make([]byte, w.grain)
	return e.grains(off, n, func(off, n int64) error {
		return w.encode([]sdk.Unit{{Offset: off, Data: zeros[:n]}})
	})
}

// finish writes the directory and the footer, which make the file an image.
func (w *streamWriter) finish() error {
	if err := w.seal(); err != nil {
		return err
	}
	sectors := ondisk.DivUp(w.tables*4, sectorSize)
	m := marker{value: uint64(sectors), kind: markerGrainDirectory}
	if err := w.append(m.append(nil)); err != nil {
		return fmt.Errorf("grain directory: %w", err)
	}
	footer := w.header
	footer.gdOffset = uint64(w.end / sectorSize)
	const chunk = 64 << 10
	for i := int64(0); i < sectors*sectorSize/4; i += chunk / 4 {
		n := min(chunk/4, sectors*sectorSize/4-i)
		b := make([]byte, n*4)
		for j := range n {
			if i+j < int64(len(w.directory)) {
				binary.LittleEndian.PutUint32(b[j*4:], w.directory[i+j])
			}
		}
		if err := w.append(b); err != nil {
			return fmt.Errorf("grain directory: %w", err)
		}
	}
	m = marker{value: 1, kind: markerFooter}
	b := footer.append(m.append(nil))
	m = marker{kind: markerEndOfStream}
	if err := w.append(m.append(b)); err != nil {
		return fmt.Errorf("footer: %w", err)
	}
	return nil
}

package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk"
)

const mapBatch = 2048 // extents in one call of yield

// mapper collects extents.
type mapper struct {
	im      *image
	file    int // index of the file that holds guest clusters
	sparse  bool
	end     int64
	extents []sdk.Extent
	yield   func([]sdk.Extent) bool
	stopped bool
}

// add appends an extent, or continues the last one. A compressed cluster is an
// extent of its own.
func (m *mapper) add(e sdk.Extent) {
	if e.Length <= 0 || m.stopped {
		return
	}
	if n := len(m.extents); n > 0 {
		last := &m.extents[n-1]
		if last.Kind == e.Kind && last.Kind != sdk.Encoded && last.File == e.File && last.Sparse == e.Sparse &&
			(last.HostOffset < 0 && e.HostOffset < 0 || last.HostOffset >= 0 && last.HostOffset+last.Length == e.HostOffset) {
			last.Length += e.Length
			return
		}
		if n >= mapBatch {
			m.flush()
		}
	}
	m.extents = append(m.extents, e)
}

// flush yields all but nothing of the last extent, which may go on.
func (m *mapper) flush() {
	n := len(m.extents) - 1
	if n <= 0 || m.stopped {
		return
	}
	last := m.extents[n]
	if !m.yield(m.extents[:n:n]) {
		m.stopped = true
	}
	m.extents = append(make([]sdk.Extent, 0, mapBatch), last)
}

// Map walks the tables in order. Table reads are cached in parts, so memory is
// bounded whatever the image's size.
func (im *image) Map(ctx context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	if length <= 0 {
		return nil
	}
	_, file, err := im.dataFile()
	if err != nil {
		return err
	}
	tables, err := im.tableLimit()
	if err != nil {
		return err
	}
	m := &mapper{im: im, file: file, sparse: im.preallocated(), end: off + length, yield: yield}
	err = m.walk(ctx, off, tables)
	if len(m.extents) > 0 && !m.stopped {
		m.yield(m.extents)
	}
	return err
}

// walk maps [pos, m.end), by at most so many L2 tables.
func (m *mapper) walk(ctx context.Context, pos, tables int64) error {
	im := m.im
	l2Span := int64(1) << im.g.l1Shift
	for pos < m.end && !m.stopped {
		if err := ctx.Err(); err != nil {
			return err
		}
		index := pos >> im.g.l1Shift
		end := m.end
		if next := index + 1; next <= m.end>>im.g.l1Shift {
			end = min(end, next<<im.g.l1Shift)
		}
		entry, err := im.l1Entry(index)
		if err != nil {
			return err
		}
		table := int64(entry & offsetMask)
		if table == 0 {
			m.add(sdk.Extent{Offset: pos, Length: end - pos, Kind: sdk.Absent, HostOffset: -1})
			pos = end
			continue
		}
		if table&(im.g.clusterSize-1) != 0 {
			return fmt.Errorf("L2 table offset %#x unaligned (L1 index: %#x): %w", table, index, sdk.ErrCorrupt)
		}
		if tables--; tables < 0 {
			return errTooManyTables
		}
		if err := m.table(table, pos, end, pos&^(l2Span-1)); err != nil {
			return err
		}
		pos = end
	}
	return nil
}

// errTooManyTables: L1 entries share L2 tables. A small file could keep a
// reader busy for days.
var errTooManyTables = fmt.Errorf("the L1 table refers to more L2 tables than the file has clusters: %w", sdk.ErrCorrupt)

// tableLimit returns how many L2 tables an L1 table can refer to, with a few to
// spare for a file whose damage is not of that kind.
func (im *image) tableLimit() (int64, error) {
	if im.onDevice() {
		return 1 << 62, nil
	}
	size, err := im.main.Size()
	return im.g.clusters(size) + 4, err
}

// table maps [pos, end), which one L2 table covers from base on.
func (m *mapper) table(table, pos, end, base int64) error {
	g := &m.im.g
	part := min(tablePartSize, g.clusterSize)
	for pos < end && !m.stopped {
		at := (pos - base) >> g.clusterBits * g.entrySize // of the entry in the table
		first := at &^ (part - 1)
		b, err := m.im.cache.get(table+first, part)
		if err != nil {
			return fmt.Errorf("L2 table at %#x: %w", table, err)
		}
		for at -= first; at < part && pos < end; at += g.entrySize {
			e := l2Entry{desc: binary.BigEndian.Uint64(b[at:])}
			if g.extended() {
				e.sub = binary.BigEndian.Uint64(b[at+8:])
			}
			last := pos
			if !g.extended() {
				n := g.run(b[at:])
				at += (n - 1) * g.entrySize
				last += (n - 1) << g.clusterBits
			}
			next := min(end, last&^(g.clusterSize-1)+g.clusterSize)
			if next < pos { // beyond the largest offset
				next = end
			}
			if err := m.cluster(e, pos, next); err != nil {
				return fmt.Errorf("guest offset %#x: %w", pos, err)
			}
			pos = next
		}
	}
	return nil
}

// run returns how many of the entries at the start of b, at least one, are
// alike: without anything, or plain clusters that follow on each other in the
// file. Entries have no subclusters.
func (g *geometry) run(b []byte) int64 {
	desc := binary.BigEndian.Uint64(b)
	step := uint64(g.clusterSize)
	switch {
	case desc == 0:
		step = 0
	case desc&flagCompressed != 0 || desc&flagZero != 0 || desc&offsetMask == 0:
		return 1
	}
	n := 1
	for ; (n+1)*8 <= len(b); n++ {
		desc += step
		if binary.BigEndian.Uint64(b[n*8:]) != desc || step != 0 && desc&offsetMask == 0 {
			break
		}
	}
	return int64(n)
}

// cluster maps [pos, end): a part of one cluster, or a run of clusters without
// subclusters.
func (m *mapper) cluster(e l2Entry, pos, end int64) error {
	g := &m.im.g
	if e.compressed() {
		if m.im.h.dataFile() {
			return fmt.Errorf("compressed cluster with external data file: %w", sdk.ErrCorrupt)
		}
		off, n := g.compressedRange(e)
		m.add(sdk.Extent{Offset: pos, Length: end - pos, Kind: sdk.Encoded, File: m.file, HostOffset: off, EncodedLength: n})
		return nil
	}
	host := e.hostOffset()
	if host&(g.clusterSize-1) != 0 {
		return fmt.Errorf("cluster allocation offset %#x unaligned: %w", host, sdk.ErrCorrupt)
	}
	into := pos & (g.clusterSize - 1)
	allocated := host != 0 || m.im.h.dataFile() && e.copied()
	if !g.extended() {
		zero := e.desc&flagZero != 0
		allocated = allocated && (host != 0 || !zero)
		if zero && m.im.h.version < 3 {
			return fmt.Errorf("zero cluster entry in an image of version 2: %w", sdk.ErrCorrupt)
		}
		m.piece(pos, end-pos, host+into, allocated, zero, !zero)
		return nil
	}
	for pos < end {
		i := uint(into / g.subSize)
		next := min(end, pos+g.subSize-into%g.subSize)
		zero, data := subZero(e.sub, i), subAllocated(e.sub, i)
		if zero && data || data && !allocated {
			return fmt.Errorf("invalid subcluster bitmap %#x: %w", e.sub, sdk.ErrCorrupt)
		}
		m.piece(pos, next-pos, host+into, allocated, zero, data)
		into += next - pos
		pos = next
	}
	return nil
}

// piece adds a part of a cluster: zeros, or data where the cluster is
// allocated, or nothing.
func (m *mapper) piece(pos, length, host int64, allocated, zero, data bool) {
	e := sdk.Extent{Offset: pos, Length: length, HostOffset: -1}
	switch {
	case zero:
		e.Kind = sdk.Zero
		if allocated {
			e.File, e.HostOffset = m.file, host
		}
	case data && allocated:
		e.Kind, e.File, e.HostOffset, e.Sparse = sdk.Data, m.file, host, m.sparse
		if m.im.h.crypt != cryptNone {
			e.Kind, e.EncodedLength, e.Sparse = sdk.Encoded, length, false
		}
	default:
		e.Kind = sdk.Absent
		if allocated { // a subcluster without data in an allocated cluster
			e.File, e.HostOffset = m.file, host
		}
	}
	m.add(e)
}

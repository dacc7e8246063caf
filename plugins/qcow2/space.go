package qcow2

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/instar-img/instar/sdk"
)

// space hands out clusters of an existing image and keeps its refcounts. New
// clusters come from the end of the file, so that guest data lie in long runs,
// or are those that are free, were so before or have become so.
type space struct {
	im     *image
	g      geometry
	table  []int64 // offset of each refcount block, 0 for none
	blocks blockCache
	end    int64 // first cluster that was never used
	// freed are clusters that became free since, oldest first, for someOf and
	// after. Their number is bounded; the rest stays free in the image.
	freed []span
	// The refcount table as it lies in the file.
	tableOffset, tableClusters int64
	tableChanged               bool
}

// newSpace reads the refcount table and finds the end of what is in use.
func newSpace(im *image) (*space, error) {
	s := &space{im: im, g: im.g, blocks: newBlockCache(im),
		tableOffset: int64(im.h.reftableOffset), tableClusters: int64(im.h.reftableClusters)}
	b := make([]byte, s.tableClusters*s.g.clusterSize)
	if err := readZeros(im.main, b, s.tableOffset); err != nil {
		return nil, fmt.Errorf("refcount table: %w", err)
	}
	s.table = make([]int64, len(b)/8)
	size, err := im.main.Size()
	if err != nil {
		return nil, err
	}
	s.end = s.g.clusters(size)
	if im.onDevice() {
		s.end = 0 // its size says nothing about what is in use
	}
	last := int64(-1)
	for i := range s.table {
		entry := binary.BigEndian.Uint64(b[i*8:])
		off := entry & reftableMask
		if entry&reftableReserved != 0 || off&uint64(s.g.clusterSize-1) != 0 || off > 1<<62 {
			return nil, fmt.Errorf("refcount table entry %d is %#x: %w", i, entry, sdk.ErrCorrupt)
		}
		if s.table[i] = int64(off); off != 0 {
			last = int64(i)
		}
	}
	// Refcounts may reach beyond the end of the file.
	for i := last; i >= 0; i-- {
		if s.table[i] == 0 || (i+1)*s.g.blockEntries <= s.end {
			continue
		}
		block, err := s.blocks.get(s.table[i])
		if err != nil {
			return nil, err
		}
		for j := s.g.blockEntries - 1; j >= 0; j-- {
			if refcountAt(block, j, s.g.order) != 0 {
				s.end = max(s.end, i*s.g.blockEntries+j+1)
				break
			}
		}
		if s.end > i*s.g.blockEntries {
			break
		}
	}
	return s, nil
}

const maxFreed = 1 << 16 // spans

// collectFree finds the clusters below the end that are free.
func (s *space) collectFree() error {
	for c := int64(0); c < s.end && len(s.freed) < maxFreed; {
		index := c / s.g.blockEntries
		stop := min(s.end, (index+1)*s.g.blockEntries)
		var block []byte
		if index < int64(len(s.table)) && s.table[index] != 0 {
			var err error
			if block, err = s.blocks.get(s.table[index]); err != nil {
				return err
			}
		}
		for ; c < stop; c++ {
			if block == nil || refcountAt(block, c%s.g.blockEntries, s.g.order) == 0 {
				s.free(c)
			}
		}
	}
	return nil
}

// someOf takes up to n clusters in a row, with refcount 1.
func (s *space) someOf(n int64) (first, got int64, err error) {
	if len(s.freed) == 0 {
		first, err = s.alloc(n)
		return first, n, err
	}
	f := &s.freed[0]
	first, got = f.start, min(n, f.end-f.start)
	if f.start += got; f.start == f.end {
		s.freed = s.freed[1:]
	}
	return first, got, s.mark(first, got)
}

// after takes cluster c for something that goes on there, where it is the one
// that someOf would take next.
func (s *space) after(c int64) (bool, error) {
	next := s.end
	if len(s.freed) > 0 {
		next = s.freed[0].start
	}
	if next != c {
		return false, nil
	}
	_, _, err := s.someOf(1)
	return true, err
}

// free keeps a cluster that has no references any more.
func (s *space) free(c int64) {
	if n := len(s.freed); n > 0 && s.freed[n-1].end == c {
		s.freed[n-1].end++
	} else if n < maxFreed {
		s.freed = append(s.freed, span{c, c + 1})
	}
}

// trim lets the file end before clusters at its end that have become free.
func (s *space) trim() {
	slices.SortFunc(s.freed, func(a, b span) int { return cmp.Compare(a.end, b.end) })
	for n := len(s.freed); n > 0 && s.freed[n-1].end == s.end; n-- {
		s.end = s.freed[n-1].start
		s.freed = s.freed[:n-1]
	}
}

// discard gives the host the space of clusters that are free, in the tables on
// disk too. Where it cannot they stay as they are.
func (s *space) discard() {
	for _, f := range s.freed {
		sdk.Discard(s.im.main, f.start<<s.g.clusterBits, (f.end-f.start)<<s.g.clusterBits)
	}
}

// alloc takes n clusters in a row from the end, with refcount 1.
func (s *space) alloc(n int64) (int64, error) {
	if n > 1<<55>>s.g.clusterBits || s.end > 1<<55>>s.g.clusterBits {
		return 0, fmt.Errorf("host offsets beyond 2^56: %w", sdk.ErrTooBig)
	}
	first := s.end
	s.end += n
	return first, s.mark(first, n)
}

// mark gives free clusters the refcount 1.
func (s *space) mark(first, n int64) error {
	for c := first; c < first+n; {
		index := c / s.g.blockEntries
		block, err := s.block(index)
		if err != nil {
			return err
		}
		stop := min(first+n, (index+1)*s.g.blockEntries)
		for ; c < stop; c++ {
			setRefcount(block, c%s.g.blockEntries, s.g.order, 1)
		}
		if err := s.blocks.dirty(block); err != nil {
			return err
		}
	}
	return nil
}

// block returns refcount block index, making it where there is none.
func (s *space) block(index int64) ([]byte, error) {
	if index >= maxReftableBytes/8 {
		return nil, fmt.Errorf("refcount table of more than %d bytes: %w", maxReftableBytes, sdk.ErrTooBig)
	}
	for index >= int64(len(s.table)) {
		// Some more than needed, in whole clusters.
		per := s.g.clusterSize / 8
		n := divUp(max(index+1, int64(len(s.table))*3/2), per) * per
		s.table = append(s.table, make([]int64, n-int64(len(s.table)))...)
		s.tableChanged = true
	}
	if s.table[index] == 0 {
		c := s.end
		s.end++
		s.table[index] = c << s.g.clusterBits
		s.tableChanged = true
		block, err := s.blocks.fresh(s.table[index])
		if err != nil {
			return nil, err
		}
		clear(block)
		if err := s.blocks.dirty(block); err != nil {
			return nil, err
		}
		if err := s.add(c, 1); err != nil {
			return nil, err
		}
	}
	return s.blocks.get(s.table[index])
}

func (s *space) refcount(cluster int64) (uint64, error) {
	index := cluster / s.g.blockEntries
	if index >= int64(len(s.table)) || s.table[index] == 0 {
		return 0, nil
	}
	b, err := s.blocks.get(s.table[index])
	if err != nil {
		return 0, err
	}
	return refcountAt(b, cluster%s.g.blockEntries, s.g.order), nil
}

// add changes the refcount of a cluster by 1 or -1.
func (s *space) add(cluster int64, delta int) error {
	if cluster < 0 || cluster >= s.end {
		return fmt.Errorf("cluster %d beyond the end %d: %w", cluster, s.end, sdk.ErrCorrupt)
	}
	b, err := s.block(cluster / s.g.blockEntries)
	if err != nil {
		return err
	}
	i := cluster % s.g.blockEntries
	n := refcountAt(b, i, s.g.order)
	if delta > 0 && n == refcountMax(s.g.order) || delta < 0 && n == 0 {
		return fmt.Errorf("refcount %d of cluster %d, change %+d: %w", n, cluster, delta, sdk.ErrCorrupt)
	}
	setRefcount(b, i, s.g.order, n+uint64(int64(delta)))
	if delta < 0 && n == 1 {
		s.free(cluster)
	}
	return s.blocks.dirty(b)
}

// release gives up one reference to each cluster that [off, off+length) touches.
func (s *space) release(off, length int64) error {
	for c := off >> s.g.clusterBits; c <= (off+length-1)>>s.g.clusterBits; c++ {
		if err := s.add(c, -1); err != nil {
			return err
		}
	}
	return nil
}

// flush writes the refcount blocks and the table. The header's fields change in
// memory; the caller writes the header.
func (s *space) flush() error {
	if err := s.flushBlocks(); err != nil {
		return err
	}
	return s.flushTable()
}

// flushBlocks writes the refcount blocks, and finds new clusters for the table
// where it grew.
func (s *space) flushBlocks() error {
	per := s.g.clusterSize / 8
	var oldOffset, oldClusters int64
	for int64(len(s.table)) > s.tableClusters*per {
		// Allocating may make the table longer.
		oldOffset, oldClusters = s.tableOffset, s.tableClusters
		n := int64(len(s.table)) / per
		c, err := s.alloc(n)
		if err != nil {
			return err
		}
		s.tableOffset, s.tableClusters = c<<s.g.clusterBits, n
		if err := s.release(oldOffset, oldClusters<<s.g.clusterBits); err != nil {
			return err
		}
	}
	return s.blocks.flush()
}

// flushTable writes the table, which refers to the blocks.
func (s *space) flushTable() error {
	if !s.tableChanged {
		return nil
	}
	b := make([]byte, s.tableClusters*s.g.clusterSize)
	for i, off := range s.table {
		binary.BigEndian.PutUint64(b[i*8:], uint64(off))
	}
	if _, err := s.im.main.WriteAt(b, s.tableOffset); err != nil {
		return err
	}
	s.tableChanged = false
	h := &s.im.h
	h.reftableOffset, h.reftableClusters = uint64(s.tableOffset), uint32(s.tableClusters)
	return nil
}

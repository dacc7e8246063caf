package qcow2

import (
	"encoding/binary"
	"errors"
	"math"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// Offsets of header fields that are changed alone.
const (
	fieldReftable      = 48 // offset and clusters
	fieldSnapshotCount = 60
	fieldSnapshots     = 60 // count and offset
	fieldIncompatible  = 72
	fieldAutoclear     = 88
)

// markClean drops the dirty and the corrupt flag.
func (im *image) markClean() error {
	return im.setIncompatible(im.h.incompatible &^ (incompatDirty | incompatCorrupt))
}

func (im *image) setIncompatible(flags uint64) error {
	if im.h.version < 3 || flags == im.h.incompatible {
		return nil
	}
	// What the flag speaks of must be on disk before it.
	if err := im.main.Sync(); err != nil {
		return err
	}
	if _, err := im.main.WriteAt(binary.BigEndian.AppendUint64(nil, flags), fieldIncompatible); err != nil {
		return err
	}
	im.h.incompatible = flags
	return im.main.Sync()
}

func (c *checker) writeEntry(off int64, entry uint64) error {
	_, err := c.im.main.WriteAt(binary.BigEndian.AppendUint64(nil, entry), off)
	return err
}

// overlaps reports, with qemu's message, a write that would hit metadata other
// than L2 tables.
func (c *checker) overlaps(off, size int64) bool {
	h, g := &c.im.h, &c.im.g
	size = divUp(off%g.clusterSize+size, g.clusterSize) * g.clusterSize
	off -= off % g.clusterSize
	hits := func(start, length int64) bool {
		return length > 0 && start < off+size && off < start+length
	}
	what := ""
	switch {
	case off < g.clusterSize:
		what = "qcow2_header"
	case hits(int64(h.l1Offset), int64(h.l1Size)*8):
		what = "active L1 table"
	case hits(int64(h.reftableOffset), int64(len(c.reftable))*8):
		what = "refcount table"
	case hits(int64(h.snapshotsOffset), c.snapSize):
		what = "snapshot table"
	}
	for i := range c.snapshots {
		if what == "" && hits(int64(c.snapshots[i].l1Offset), int64(c.snapshots[i].l1Size)*8) {
			what = "inactive L1 table"
		}
	}
	for _, entry := range c.reftable {
		if o, ok := ondisk.Int64(entry & reftableMask); what == "" && ok && o != 0 && o <= math.MaxInt64-g.clusterSize && hits(o, g.clusterSize) {
			what = "refcount block"
		}
	}
	if x, err := c.im.bitmapsExt(); what == "" && err == nil && x != nil && hits(int64(x.dirStart), int64(x.dirSize)) {
		what = "bitmap directory"
	}
	if what == "" {
		return false
	}
	c.say("qcow2: Marking image as corrupt: Preventing invalid write on metadata (overlaps with %s); further corruption events will be suppressed", what)
	return true
}

// zeroEntry makes a misaligned L2 entry without data one that reads as zeros.
// It reports false, with a message, where that would hit other metadata.
func (c *checker) zeroEntry(e l2Entry, table int64, b []byte, at int) (bool, error) {
	if c.im.g.extended() {
		e.sub |= e.sub << 32
		e.sub &^= 1<<subclusters - 1
		e.desc = 0
		binary.BigEndian.PutUint64(b[at+8:], e.sub)
	} else {
		e.desc = flagZero
	}
	binary.BigEndian.PutUint64(b[at:], e.desc)
	if c.overlaps(table+int64(at), c.im.g.entrySize) {
		c.say("ERROR: Overlap check failed")
		c.res.CheckErrors++
		return false, errEIO
	}
	if _, err := c.im.main.WriteAt(b[at:at+int(c.im.g.entrySize)], table+int64(at)); err != nil {
		c.say("ERROR: Failed to overwrite L2 table entry: %v", err)
		return false, err
	}
	return true, nil
}

// extend makes the file long enough for a refcount block.
func (c *checker) extend(off uint64) error {
	end, ok := ondisk.Int64(off)
	if ok {
		end, ok = ondisk.Add(end, c.im.g.clusterSize)
	}
	if !ok || c.im.onDevice() {
		return errEINVAL
	}
	if end>>c.im.g.clusterBits > maxCheckClusters {
		return errEFBIG
	}
	if err := c.im.main.Truncate(end); err != nil {
		return err
	}
	c.fileLen = end
	c.clusters = max(c.clusters, end>>c.im.g.clusterBits)
	c.refs.grow(c.clusters)
	return nil
}

// readSnapshotTable reads what Open leaves out in check mode.
func (c *checker) readSnapshotTable() error {
	im := c.im
	h := &im.h
	var fixed [12]byte
	if err := readZeros(im.main, fixed[:], fieldSnapshots); err != nil {
		return err
	}
	h.snapshotCount = binary.BigEndian.Uint32(fixed[:])
	h.snapshotsOffset = binary.BigEndian.Uint64(fixed[4:])
	shortened := int64(0)
	if h.snapshotCount > maxSnapshots && c.fixErrors() {
		over := h.snapshotCount - maxSnapshots
		c.say("Discarding %d overhanging snapshots", over)
		shortened, h.snapshotCount = int64(over), maxSnapshots
	}
	if err := h.validateTable(h.snapshotsOffset, uint64(h.snapshotCount), snapshotFixed, snapshotFixed*maxSnapshots, "snapshot table"); err != nil {
		c.say("ERROR %v", err)
		if h.snapshotCount > maxSnapshots {
			c.say("You can force-remove all %d overhanging snapshots with qemu-img check -r all", h.snapshotCount-maxSnapshots)
		}
		if errors.Is(err, sdk.ErrTooBig) {
			return errEFBIG
		}
		return errEINVAL
	}
	t := snapshotTable{im: im, count: h.snapshotCount}
	if c.fixErrors() {
		t.discard = c.say
	}
	if err := t.read(c.ctx); err != nil {
		c.say("ERROR failed to read the snapshot table: %v", err)
		if hint := sdk.HintOf(err); hint != "" {
			c.say("%s", hint)
			return errEFBIG
		}
		return errEIO
	}
	c.snapshots, c.snapSize = t.list, t.size
	dropped := t.cut
	shortened += int64(h.snapshotCount - t.count)
	h.snapshotCount = t.count
	c.res.Corruptions += shortened + dropped
	if shortened > 0 {
		if _, err := im.main.WriteAt(binary.BigEndian.AppendUint32(nil, h.snapshotCount), fieldSnapshotCount); err != nil {
			return err
		}
		c.res.CorruptionsFixed += shortened
		c.res.Corruptions -= shortened
	}
	if h.version >= 3 {
		for i := range c.snapshots {
			if !c.snapshots[i].hasDiskSize {
				c.res.Corruptions++
				c.say("%s snapshot table entry %d is incomplete", c.verb(), i)
				c.snapshots[i].diskSize = h.size
			}
		}
	}
	c.snapshotFaults = c.res.Corruptions
	return nil
}

// fixSnapshotTable writes the snapshot table anew where entries had to be
// completed or cut.
func (c *checker) fixSnapshotTable() error {
	if c.snapshotFaults == 0 || !c.fixErrors() {
		return nil
	}
	im := c.im
	var b []byte
	for i := range c.snapshots {
		c.snapshots[i].hasDiskSize = true
		b = c.snapshots[i].append(b)
	}
	s, err := newSpace(im)
	if err != nil {
		return err
	}
	first, err := s.alloc(im.g.clusters(int64(len(b))))
	if err != nil {
		return err
	}
	if _, err := im.main.WriteAt(b, first<<im.g.clusterBits); err != nil {
		return err
	}
	if err := im.writeRefcounts(s); err != nil {
		return err
	}
	old := int64(im.h.snapshotsOffset)
	im.h.snapshotsOffset = uint64(first << im.g.clusterBits)
	field := binary.BigEndian.AppendUint32(nil, im.h.snapshotCount)
	if _, err := im.main.WriteAt(binary.BigEndian.AppendUint64(field, im.h.snapshotsOffset), fieldSnapshots); err != nil {
		return err
	}
	if err := im.main.Sync(); err != nil {
		return err
	}
	if c.outside(old, c.snapSize) {
		c.say("qcow2_free_clusters failed: Invalid argument") // it was not counted either
	} else if err := s.release(old, c.snapSize); err != nil {
		return err
	}
	if err := im.writeRefcounts(s); err != nil {
		return err
	}
	c.res.CorruptionsFixed += c.snapshotFaults
	c.res.Corruptions -= c.snapshotFaults
	return nil
}

// writeRefcounts writes the refcounts of s and, where the table moved, the
// header's pointer to it.
func (im *image) writeRefcounts(s *space) error {
	offset, clusters := im.h.reftableOffset, im.h.reftableClusters
	if err := s.flush(); err != nil {
		return err
	}
	if err := im.main.Sync(); err != nil {
		return err
	}
	if offset == im.h.reftableOffset && clusters == im.h.reftableClusters {
		return nil
	}
	return im.writeReftablePointer()
}

func (im *image) writeReftablePointer() error {
	b := binary.BigEndian.AppendUint64(nil, im.h.reftableOffset)
	b = binary.BigEndian.AppendUint32(b, im.h.reftableClusters)
	if _, err := im.main.WriteAt(b, fieldReftable); err != nil {
		return err
	}
	return im.main.Sync()
}

// rebuildRefcounts makes new refcount structures from the references alone, as
// qemu-img does, and then frees the old ones.
func (c *checker) rebuildRefcounts(highest *int64) error {
	c.say("Rebuilding refcount structure")
	before := c.res
	if err := c.writeNewRefcounts(); err != nil {
		return err
	}
	c.res.Corruptions, c.res.Leaks = 0, 0
	stats := c.res
	c.rebuild = false
	c.refs.reset()
	size, err := c.im.main.Size()
	if err != nil {
		return err
	}
	c.fileLen = divUp(size, 512) * 512
	if err := c.calculate(sdk.FixNone); err != nil {
		return err
	}
	// The second count must not count the statistics twice.
	c.res.AllocatedClusters, c.res.FragmentedClusters, c.res.CompressedClusters =
		stats.AllocatedClusters, stats.FragmentedClusters, stats.CompressedClusters
	saved := c.res
	c.res = sdk.CheckResult{}
	*highest = c.compare(sdk.FixLeaks)
	if c.rebuild {
		c.say("ERROR rebuilt refcount structure is still broken")
	}
	if err := c.blocks.flush(); err != nil {
		return err
	}
	fresh := c.res.Leaks
	c.res = saved
	if c.res.Corruptions < before.Corruptions {
		c.res.CorruptionsFixed += before.Corruptions - c.res.Corruptions
	}
	if c.res.Leaks < before.Leaks {
		c.res.LeaksFixed += before.Leaks - c.res.Leaks
	}
	c.res.Leaks += fresh
	return nil
}

// writeNewRefcounts places a refcount block for every stretch in use and a
// table for them, where nothing else is.
func (c *checker) writeNewRefcounts() error {
	g := &c.im.g
	var table []int64 // cluster of each block
	free := func(from, n int64) int64 {
		for start := from; ; {
			ok := true
			for i := range n {
				if c.refs.get(start+i) != 0 {
					start, ok = start+i+1, false
					break
				}
			}
			if ok {
				for i := range n {
					c.refs.inc(start + i)
				}
				return start
			}
		}
	}
	block := make([]byte, g.clusterSize)
	var search int64
	place := func(first, end int64) (grown bool, err error) {
		for cluster := first; cluster < end; cluster++ {
			if c.refs.get(cluster) == 0 {
				if c.refs.empty(cluster) {
					cluster = (cluster/countsPage+1)*countsPage - 1
				}
				continue
			}
			index := cluster / g.blockEntries
			start := index * g.blockEntries
			if index >= int64(len(table)) || table[index] == 0 {
				search = max(search, start)
				at := free(search, 1)
				search = at
				end = max(end, at+1)
				if per := g.clusterSize / 8; index >= int64(len(table)) {
					n := divUp(index+1, per) * per
					if n > maxReftableBytes/8 {
						return false, errEFBIG
					}
					table = append(table, make([]int64, n-int64(len(table)))...)
					grown = true
				}
				table[index] = at
			}
			for i := range g.blockEntries {
				setRefcount(block, i, g.order, c.refs.get(start+i))
			}
			if _, err := c.im.main.WriteAt(block, table[index]<<g.clusterBits); err != nil {
				return false, err
			}
			cluster = start + g.blockEntries - 1
		}
		return grown, c.ctx.Err()
	}
	if _, err := place(0, max(c.clusters, c.refs.n)); err != nil {
		return err
	}
	var tableCluster, tableClusters int64
	for {
		tableClusters = int64(len(table)) * 8 / g.clusterSize
		tableCluster = free(0, tableClusters)
		search = 0
		grown, err := place(tableCluster, tableCluster+tableClusters)
		if err != nil {
			return err
		}
		if !grown {
			break
		}
	}
	b := make([]byte, 0, len(table)*8)
	for _, at := range table {
		b = binary.BigEndian.AppendUint64(b, uint64(at<<g.clusterBits))
	}
	if _, err := c.im.main.WriteAt(b, tableCluster<<g.clusterBits); err != nil {
		return err
	}
	// The new structures are complete before the header points to them.
	if err := c.im.main.Sync(); err != nil {
		return err
	}
	c.im.h.reftableOffset, c.im.h.reftableClusters = uint64(tableCluster<<g.clusterBits), uint32(tableClusters)
	if err := c.im.writeReftablePointer(); err != nil {
		return err
	}
	c.blocks = newBlockCache(c.im)
	return c.readTable()
}

package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// checker is one run of Check. It finds what qemu-img check finds, in the same
// order and with the same words, because callers parse them; only clean images
// go fast.
type checker struct {
	im  *image
	ctx context.Context
	req sdk.CheckRequest
	res sdk.CheckResult

	fileLen   int64 // in whole sectors, as qemu measures files
	clusters  int64 // of the file
	refs      *counts
	reftable  []uint64
	blocks    blockCache
	rebuild   bool
	snapshots []snapshot
	snapSize  int64 // of the snapshot table, in bytes
	signaled  bool  // unaligned refcount block reported
	// snapshotFaults counts the corruptions of the snapshot table.
	snapshotFaults int64
	done           float64
}

// maxCheckClusters is INT_MAX: qemu refuses larger files.
const maxCheckClusters = 1<<31 - 1

// errno makes an error whose text is that of a C error number: what qemu-img
// prints after "Check failed: ".
func errno(text string, class error) error { return &sdk.Error{Text: text, Class: class} }

var (
	errEIO    = errno("Input/output error", sdk.ErrCorrupt)
	errEINVAL = errno("Invalid argument", sdk.ErrCorrupt)
	errEFBIG  = errno("File too large", sdk.ErrTooBig)
)

// Check implements sdk.Checker.
func (im *image) Check(ctx context.Context, req sdk.CheckRequest) (*sdk.CheckResult, error) {
	if req.Fix != sdk.FixNone && !im.readWrite {
		return nil, fmt.Errorf("repair of an image opened for reading: %w", sdk.ErrReadOnly)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	im.cache.drop()
	c := &checker{im: im, ctx: ctx, req: req}
	err := c.run()
	im.cache.drop()
	if err != nil {
		return nil, err
	}
	return &c.res, nil
}

func (c *checker) say(format string, args ...any) {
	if c.req.Message != nil {
		c.req.Message(fmt.Sprintf(format, args...))
	}
}

// progress reports a share of the work done.
func (c *checker) progress(share float64) {
	if c.req.Progress != nil && share > c.done {
		c.done = share
		c.req.Progress(share)
	}
}

func (c *checker) fixErrors() bool { return c.req.Fix == sdk.FixAll }
func (c *checker) fixLeaks() bool  { return c.req.Fix != sdk.FixNone }

// verb begins messages about what FixAll repairs.
func (c *checker) verb() string {
	if c.fixErrors() {
		return "Repairing"
	}
	return "ERROR"
}

func (c *checker) run() error {
	size, err := c.im.main.Size()
	if err != nil {
		return err
	}
	if err := c.readSnapshotTable(); err != nil {
		return err
	}
	// The flags may be repaired where the refcounts are right, whatever the
	// snapshot table is like.
	snapshots := c.res
	c.res = sdk.CheckResult{}
	if err := c.refcounts(size); err != nil {
		return err
	}
	c.res.Corruptions += snapshots.Corruptions
	c.res.CorruptionsFixed += snapshots.CorruptionsFixed
	if err := c.fixSnapshotTable(); err != nil {
		return err
	}
	if c.req.Fix != sdk.FixNone && c.res.CheckErrors == 0 && c.res.Corruptions == 0 {
		return c.im.markClean()
	}
	return nil
}

// readTable reads the refcount table, at most 8 MiB.
func (c *checker) readTable() error {
	b := make([]byte, int64(c.im.h.reftableClusters)*c.im.g.clusterSize)
	if err := readZeros(c.im.main, b, int64(c.im.h.reftableOffset)); err != nil {
		return err
	}
	c.reftable = make([]uint64, len(b)/8)
	for i := range c.reftable {
		c.reftable[i] = binary.BigEndian.Uint64(b[i*8:])
	}
	return nil
}

// refcounts compares references with refcounts and repairs the latter.
func (c *checker) refcounts(size int64) error {
	g := &c.im.g
	c.clusters = g.clusters(size)
	if c.clusters > maxCheckClusters {
		return errEFBIG
	}
	c.fileLen = divUp(size, 512) * 512
	if err := c.readTable(); err != nil {
		return err
	}
	c.blocks = newBlockCache(c.im)
	c.res.TotalClusters = g.clusters(int64(c.im.h.wholeSize()))
	c.refs = newCounts(g.order, c.clusters)
	if err := c.calculate(c.req.Fix); err != nil {
		return err
	}
	c.progress(0.5)
	before := c.res
	highest := c.compare(sdk.FixNone)
	switch {
	case c.rebuild && c.fixErrors():
		if err := c.rebuildRefcounts(&highest); err != nil {
			return err
		}
	case c.fixLeaks():
		if c.rebuild {
			c.say("ERROR need to rebuild refcount structures")
			return errEIO
		}
		if c.res.Leaks > 0 || c.res.Corruptions > 0 {
			c.res = before
			highest = c.compare(c.req.Fix)
			if err := c.blocks.flush(); err != nil {
				return err
			}
		}
	}
	c.progress(0.6)
	if err := c.copiedFlags(); err != nil {
		return err
	}
	c.res.ImageEndOffset = (highest + 1) * g.clusterSize
	c.progress(1)
	return nil
}

// reference counts a range of the file as used.
func (c *checker) reference(off, size int64) {
	if size <= 0 {
		return
	}
	if c.outside(off, size) {
		c.say("ERROR: counting reference for region exceeding the end of the file by one cluster or more: offset 0x%x size 0x%x", off, size)
		c.res.Corruptions++
		return
	}
	bits := c.im.g.clusterBits
	c.referenceClusters(off>>bits, (off+size-1)>>bits-off>>bits+1)
}

// outside reports whether a range ends behind the file. The last cluster may be cut
// by the end of the file.
func (c *checker) outside(off, size int64) bool {
	return off > math.MaxInt64-size || off+size-c.fileLen >= c.im.g.clusterSize
}

func (c *checker) referenceClusters(first, n int64) {
	for n > 0 {
		done := c.refs.incRange(first, n)
		first, n = first+done, n-done
		if n > 0 { // first is full
			c.say("ERROR: overflow cluster offset=0x%x", first<<c.im.g.clusterBits)
			c.say("Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if the image cannot be opened for writing")
			c.res.Corruptions++
			first, n = first+1, n-1
		}
	}
}

// calculate counts all references.
func (c *checker) calculate(fix sdk.Fix) error {
	h := &c.im.h
	c.reference(0, c.im.g.clusterSize)
	if err := c.tables(int64(h.l1Offset), int64(h.l1Size), true, fix); err != nil {
		return err
	}
	if h.dataFile() && len(c.snapshots) > 0 {
		c.say("ERROR %d snapshots in image with data file", len(c.snapshots))
		c.res.Corruptions++
	}
	for i := range c.snapshots {
		s := &c.snapshots[i]
		if s.l1Offset&uint64(c.im.g.clusterSize-1) != 0 {
			c.say("ERROR snapshot %s (%s) l1_offset=%#x: L1 table is not cluster aligned; snapshot table entry corrupted", s.id, s.name, s.l1Offset)
			c.res.Corruptions++
			continue
		}
		if s.l1Size > maxL1Bytes/8 {
			c.say("ERROR snapshot %s (%s) l1_size=%#x: L1 table is too large; snapshot table entry corrupted", s.id, s.name, s.l1Size)
			c.res.Corruptions++
			continue
		}
		off, ok := ondisk.Int64(s.l1Offset)
		if !ok {
			off = math.MaxInt64 - maxL1Bytes
		}
		if err := c.tables(off, int64(s.l1Size), false, fix); err != nil {
			return err
		}
	}
	c.reference(int64(h.snapshotsOffset), c.snapSize)
	c.reference(int64(h.reftableOffset), int64(len(c.reftable))*8)
	for _, e := range c.im.ext {
		if e.kind == extCrypto {
			var x cryptoExtension
			if err := x.decode(e.data); err == nil && x.length <= math.MaxInt64 {
				c.reference(int64(x.offset), int64(x.length))
			}
		}
	}
	if err := c.bitmaps(); err != nil {
		return err
	}
	return c.refcountBlocks(fix)
}

// tables counts an L1 table and what it refers to. Only the active state
// counts for the statistics.
func (c *checker) tables(off, entries int64, active bool, fix sdk.Fix) error {
	if entries == 0 {
		return nil
	}
	c.reference(off, entries*8)
	limit, err := c.im.tableLimit()
	if err != nil {
		return err
	}
	const per = tablePartSize / 8
	part := make([]byte, min(tablePartSize, entries*8))
	table := make([]byte, c.im.g.clusterSize)
	for first := int64(0); first < entries; first += per {
		n := min(per, entries-first)
		if err := readZeros(c.im.main, part[:n*8], off+first*8); err != nil {
			c.say("ERROR: I/O error in check_refcounts_l1")
			return err
		}
		for i := range n {
			entry := binary.BigEndian.Uint64(part[i*8:])
			if entry == 0 {
				continue
			}
			if entry&l1Reserved != 0 {
				c.say("ERROR found L1 entry with reserved bits set: %x", entry)
				c.res.Corruptions++
			}
			l2 := int64(entry & offsetMask)
			c.reference(l2, c.im.g.clusterSize)
			if l2&(c.im.g.clusterSize-1) != 0 {
				c.say("ERROR l2_offset=%x: Table is not cluster aligned; L1 entry corrupted", l2)
				c.res.Corruptions++
			}
			if limit--; limit < 0 {
				c.res.Corruptions++
				c.say("ERROR %v", errTooManyTables)
				return errTooManyTables
			}
			if err := c.table(l2, table, active, fix); err != nil {
				return err
			}
			if err := c.ctx.Err(); err != nil {
				return err
			}
		}
		if active {
			c.progress(0.5 * float64(first+n) / float64(entries))
		}
	}
	return nil
}

// table counts what an L2 table refers to.
func (c *checker) table(off int64, b []byte, active bool, fix sdk.Fix) error {
	g := &c.im.g
	if err := readZeros(c.im.main, b, off); err != nil {
		c.say("ERROR: I/O error in check_refcounts_l2")
		return err
	}
	dataFile, extended := c.im.h.dataFile(), g.extended()
	step := int(g.entrySize)
	next := int64(0) // where the cluster would continue the last one
	end := c.fileLen + g.clusterSize
	for i := 0; i < len(b); i += step {
		desc := binary.BigEndian.Uint64(b[i:])
		// Clusters in a row, the usual content, are counted in one go.
		if !extended && !dataFile && desc != 0 && desc&^(flagCopied|offsetMask) == 0 && desc&uint64(g.clusterSize-1) == 0 {
			n, last := int64(1), desc
			for j := i + step; j < len(b); j += step {
				d := binary.BigEndian.Uint64(b[j:])
				if d != last+uint64(g.clusterSize) {
					break
				}
				n, last = n+1, d
			}
			host := int64(desc & offsetMask)
			if host != 0 && host+n*g.clusterSize < end && last&offsetMask >= desc&offsetMask {
				if active {
					c.res.AllocatedClusters += n
					if next != 0 && host != next {
						c.res.FragmentedClusters++
					}
				}
				next = host + n*g.clusterSize
				c.referenceClusters(host>>g.clusterBits, n)
				i += int(n-1) * step
				continue
			}
		}
		if desc == 0 && !extended {
			continue
		}
		e := l2Entry{desc: desc}
		if extended {
			e.sub = binary.BigEndian.Uint64(b[i+8:])
		}
		stop, err := c.entry(e, off, b, i, active, fix, &next)
		if stop || err != nil {
			return err
		}
	}
	return nil
}

// entry checks one L2 entry. It reports true where the rest of the table must
// not be looked at.
func (c *checker) entry(e l2Entry, table int64, b []byte, at int, active bool, fix sdk.Fix, next *int64) (stop bool, err error) {
	g := &c.im.g
	index := at / int(g.entrySize)
	if e.compressed() {
		mask := uint64(1)<<(62-(g.clusterBits-8)) - 1
		if e.copied() {
			c.say("ERROR: coffset=0x%x: copied flag must never be set for compressed clusters", e.desc&mask)
			e.desc &^= flagCopied
			c.res.Corruptions++
		}
		if c.im.h.dataFile() {
			c.say("ERROR compressed cluster %d with data file, entry=0x%x", index, e.desc)
			c.res.Corruptions++
			return false, nil
		}
		if e.sub != 0 {
			c.say("ERROR compressed cluster %d with non-zero subcluster allocation bitmap, entry=0x%x", index, e.desc)
			c.res.Corruptions++
			return false, nil
		}
		c.reference(g.compressedRange(e))
		if active {
			c.res.AllocatedClusters++
			c.res.CompressedClusters++
			c.res.FragmentedClusters++
		}
		return false, nil
	}
	if e.desc&l2Reserved != 0 {
		c.say("ERROR found l2 entry with reserved bits set: %x", e.desc)
		c.res.Corruptions++
	}
	host := e.hostOffset()
	if !c.allocated(e) {
		if e.desc&flagZero != 0 && !g.extended() {
			return false, nil
		}
		if e.sub&(1<<subclusters-1) != 0 {
			c.res.Corruptions++
			c.say("ERROR: Unallocated cluster has non-zero subcluster allocation map")
		}
		return false, nil
	}
	if e.sub>>32&e.sub != 0 {
		c.res.Corruptions++
		c.say("ERROR offset=%x: Allocated cluster has corrupted subcluster allocation bitmap", host)
	}
	if host&(g.clusterSize-1) != 0 {
		c.res.Corruptions++
		data := e.desc&flagZero == 0
		if g.extended() {
			data = e.sub&(1<<subclusters-1) != 0
		}
		if data {
			c.say("ERROR offset=%x: Data cluster is not properly aligned; L2 entry corrupted.", host)
		} else {
			word := "ERROR"
			if fix == sdk.FixAll {
				word = "Repairing"
			}
			c.say("%s offset=%x: Preallocated cluster is not properly aligned; L2 entry corrupted.", word, host)
			if fix == sdk.FixAll {
				if fixed, err := c.zeroEntry(e, table, b, at); err != nil || !fixed {
					return true, err
				}
				c.res.Corruptions--
				c.res.CorruptionsFixed++
				return false, nil
			}
		}
	}
	if active {
		c.res.AllocatedClusters++
		if *next != 0 && host != *next {
			c.res.FragmentedClusters++
		}
	}
	*next = host + g.clusterSize
	if !c.im.h.dataFile() {
		c.reference(host, g.clusterSize)
	}
	return false, nil
}

// allocated reports whether a standard descriptor has a cluster.
func (c *checker) allocated(e l2Entry) bool {
	if e.hostOffset() != 0 {
		return true
	}
	zero := e.desc&flagZero != 0 && !c.im.g.extended()
	return !zero && c.im.h.dataFile() && e.copied()
}

// bitmaps counts the bitmap directory and the bitmaps' clusters.
func (c *checker) bitmaps() error {
	x, err := c.im.bitmapsExt()
	if err != nil {
		return err
	}
	if x == nil {
		return nil
	}
	c.reference(int64(x.dirStart), int64(x.dirSize))
	list, err := c.im.readBitmaps()
	if err != nil {
		c.res.Corruptions++
		return errEINVAL
	}
	part := make([]byte, tablePartSize)
	for _, e := range list {
		c.reference(int64(e.tableOffset), int64(e.tableSize)*8)
		for first := int64(0); first < int64(e.tableSize); first += tablePartSize / 8 {
			n := min(tablePartSize/8, int64(e.tableSize)-first)
			if err := readZeros(c.im.main, part[:n*8], int64(e.tableOffset)+first*8); err != nil {
				return err
			}
			for i := range n {
				entry := binary.BigEndian.Uint64(part[i*8:])
				off := int64(entry & offsetMask)
				if entry&^(offsetMask|1) != 0 || off != 0 && (entry&1 != 0 || off&(c.im.g.clusterSize-1) != 0) {
					c.res.Corruptions++
					return errEINVAL
				}
				if off != 0 {
					c.reference(off, c.im.g.clusterSize)
				}
			}
		}
	}
	return c.ctx.Err()
}

const (
	reftableMask     = 0xfffffffffffffe00
	reftableReserved = 0x1ff
)

// refcountBlocks counts the refcount blocks themselves.
func (c *checker) refcountBlocks(fix sdk.Fix) error {
	g := &c.im.g
	for i, entry := range c.reftable {
		off := entry & reftableMask
		if entry&reftableReserved != 0 {
			c.say("ERROR refcount table entry %d has reserved bits set", i)
			c.res.Corruptions++
			c.rebuild = true
			continue
		}
		if off&uint64(g.clusterSize-1) != 0 {
			c.say("ERROR refcount block %d is not cluster aligned; refcount table entry corrupted", i)
			c.res.Corruptions++
			c.rebuild = true
			continue
		}
		cluster := int64(off >> g.clusterBits)
		if cluster >= max(c.clusters, c.refs.n) {
			c.res.Corruptions++
			if fix != sdk.FixAll {
				c.say("ERROR refcount block %d is outside image", i)
				continue
			}
			c.say("Repairing refcount block %d is outside image", i)
			if err := c.extend(off); err != nil {
				c.rebuild = true
				c.say("ERROR could not resize image: %v", err)
				continue
			}
			c.res.Corruptions--
			c.res.CorruptionsFixed++
			c.reference(int64(off), g.clusterSize)
			continue
		}
		if off == 0 {
			continue
		}
		c.reference(int64(off), g.clusterSize)
		if n := c.refs.get(cluster); n != 1 {
			c.say("ERROR refcount block %d refcount=%d", i, n)
			c.res.Corruptions++
			c.rebuild = true
		}
	}
	return nil
}

// onDisk returns the refcount of a cluster as the image has it.
func (c *checker) onDisk(cluster int64) (uint64, error) {
	index := cluster / c.im.g.blockEntries
	if index >= int64(len(c.reftable)) {
		return 0, nil
	}
	b, err := c.block(index)
	if b == nil || err != nil {
		return 0, err
	}
	return refcountAt(b, cluster%c.im.g.blockEntries, c.im.g.order), nil
}

// block returns refcount block i, nil for none.
func (c *checker) block(i int64) ([]byte, error) {
	off := c.reftable[i] & reftableMask
	if off == 0 {
		return nil, nil
	}
	if off&uint64(c.im.g.clusterSize-1) != 0 {
		if !c.signaled {
			c.signaled = true
			corrupt := "Image is corrupt: %s; further non-fatal corruption events will be suppressed"
			if c.req.Fix != sdk.FixNone {
				corrupt = "Marking image as corrupt: %s; further corruption events will be suppressed"
			}
			index := "0"
			if i != 0 {
				index = fmt.Sprintf("%#x", i)
			}
			c.say("qcow2: "+corrupt, fmt.Sprintf("Refblock offset %#x unaligned (reftable index: %s)", off, index))
		}
		return nil, errEIO
	}
	n, ok := ondisk.Int64(off)
	if !ok {
		return nil, errEIO
	}
	return c.blocks.get(n)
}

// compare reports where refcounts and references differ, repairs what fix
// says, and returns the last cluster in use.
func (c *checker) compare(fix sdk.Fix) (highest int64) {
	g := &c.im.g
	total := max(c.clusters, c.refs.n)
	for first := int64(0); first < total; {
		// One stretch: within a refcount block and a page of counts.
		index := first / g.blockEntries
		n := min(total, (index+1)*g.blockEntries, (first/countsPage+1)*countsPage) - first
		var b []byte
		var err error
		if index < int64(len(c.reftable)) {
			b, err = c.block(index)
		}
		if err == nil && b == nil && c.refs.empty(first) {
			first += n
			continue
		}
		if err == nil && c.equal(b, first, n, &highest) {
			first += n
			continue
		}
		for i := first; i < first+n; i++ {
			if err != nil {
				c.say("Can't get refcount for cluster %d: %v", i, err)
				c.res.CheckErrors++
				continue
			}
			have := uint64(0)
			if b != nil {
				have = refcountAt(b, i%g.blockEntries, g.order)
			}
			want := c.refs.get(i)
			if have > 0 || want > 0 {
				highest = i
			}
			if have != want {
				c.mismatch(i, have, want, b, fix)
			}
		}
		first += n
		if c.ctx.Err() != nil {
			return highest // the caller asks again soon
		}
	}
	return highest
}

// equal compares a stretch of 16-bit refcounts, which nearly all images have,
// with the counts, and moves highest where they are equal.
func (c *checker) equal(b []byte, first, n int64, highest *int64) bool {
	if b == nil || c.im.g.order != 4 || c.refs.isWide || first+n > c.refs.n {
		return false
	}
	have := b[first%c.im.g.blockEntries*2:][:n*2]
	want := c.refs.narrow[first/countsPage]
	last := int64(-1)
	if want == nil {
		for i := range have {
			if have[i] != 0 {
				return false
			}
		}
		return true
	}
	want = want[first%countsPage:][:n]
	for i, w := range want {
		if binary.BigEndian.Uint16(have[2*i:]) != w {
			return false
		}
		if w != 0 {
			last = int64(i)
		}
	}
	if last >= 0 {
		*highest = first + last
	}
	return true
}

func (c *checker) mismatch(cluster int64, have, want uint64, b []byte, fix sdk.Fix) {
	var fixed *int64
	switch {
	case have == 0:
		c.rebuild = true
	case have > want && fix != sdk.FixNone:
		fixed = &c.res.LeaksFixed
	case have < want && fix == sdk.FixAll:
		fixed = &c.res.CorruptionsFixed
	}
	word := "Leaked"
	if fixed != nil {
		word = "Repairing"
	} else if have < want {
		word = "ERROR"
	}
	c.say("%s cluster %d refcount=%d reference=%d", word, cluster, have, want)
	if fixed != nil && b != nil {
		setRefcount(b, cluster%c.im.g.blockEntries, c.im.g.order, want)
		if c.blocks.dirty(b) == nil {
			*fixed++
			return
		}
	}
	if have < want {
		c.res.Corruptions++
	} else {
		c.res.Leaks++
	}
}

// copiedFlags checks, and where it is safe repairs, the flags that say that a
// cluster has one reference.
func (c *checker) copiedFlags() error {
	g, h := &c.im.g, &c.im.h
	repair := c.fixErrors() ||
		c.fixLeaks() && c.res.CheckErrors == 0 && c.res.Corruptions == 0 && c.res.Leaks == 0
	word := "ERROR"
	if repair {
		word = "Repairing"
	}
	const per = tablePartSize / 8
	entries := int64(h.l1Size)
	part := make([]byte, min(tablePartSize, entries*8))
	table := make([]byte, g.clusterSize)
	for first := int64(0); first < entries; first += per {
		n := min(per, entries-first)
		if err := readZeros(c.im.main, part[:n*8], int64(h.l1Offset)+first*8); err != nil {
			return err
		}
		for i := range n {
			entry := binary.BigEndian.Uint64(part[i*8:])
			l2 := int64(entry & offsetMask)
			if l2 == 0 {
				continue
			}
			count, err := c.onDisk(l2 >> g.clusterBits)
			if err != nil {
				continue // reported before
			}
			if (count == 1) != (entry&flagCopied != 0) {
				c.res.Corruptions++
				c.say("%s OFLAG_COPIED L2 cluster: l1_index=%d l1_entry=%x refcount=%d", word, first+i, entry, count)
				if repair {
					if err := c.writeEntry(int64(h.l1Offset)+(first+i)*8, entry^flagCopied); err != nil {
						return err
					}
					c.res.Corruptions--
					c.res.CorruptionsFixed++
				}
			}
			if err := readZeros(c.im.main, table, l2); err != nil {
				c.say("ERROR: Could not read L2 table: %v", err)
				return err
			}
			changed := c.tableFlags(table, word, repair)
			if changed > 0 {
				if c.overlaps(l2, g.clusterSize) {
					c.say("ERROR: Could not write L2 table; metadata overlap check failed: Input/output error")
					return errEIO
				}
				if _, err := c.im.main.WriteAt(table, l2); err != nil {
					c.say("ERROR: Could not write L2 table: %v", err)
					return err
				}
				c.res.Corruptions -= changed
				c.res.CorruptionsFixed += changed
			}
			if err := c.ctx.Err(); err != nil {
				return err
			}
		}
		c.progress(0.6 + 0.4*float64(first+n)/float64(entries))
	}
	return nil
}

// tableFlags checks the flags of an L2 table and returns how many it changed.
func (c *checker) tableFlags(b []byte, word string, repair bool) (changed int64) {
	g := &c.im.g
	step := int(g.entrySize)
	for i := 0; i < len(b); i += step {
		e := l2Entry{desc: binary.BigEndian.Uint64(b[i:])}
		if e.desc == 0 || e.compressed() || !c.allocated(e) {
			continue
		}
		host := e.hostOffset()
		count, err := uint64(1), error(nil)
		if !c.im.h.dataFile() {
			// The usual: clusters in a row, each with the flag and one reference.
			if step == 8 && e.copied() {
				n := int64(1)
				for j := i + 8; j < len(b) && binary.BigEndian.Uint64(b[j:]) == e.desc+uint64(n)<<g.clusterBits; j += 8 {
					n++
				}
				if ones := c.onesFrom(host>>g.clusterBits, n); ones > 0 {
					i += int(ones-1) * 8
					continue
				}
			}
			count, err = c.onDisk(host >> g.clusterBits)
		}
		if err != nil || (count == 1) == e.copied() {
			continue
		}
		c.res.Corruptions++
		c.say("%s OFLAG_COPIED data cluster: l2_entry=%x refcount=%d", word, e.desc, count)
		if repair {
			binary.BigEndian.PutUint64(b[i:], e.desc^flagCopied)
			changed++
		}
	}
	return changed
}

// onesFrom returns how many of n clusters in a row have the refcount 1.
func (c *checker) onesFrom(cluster, n int64) int64 {
	g := &c.im.g
	index, at := cluster/g.blockEntries, cluster%g.blockEntries
	if index >= int64(len(c.reftable)) {
		return 0
	}
	b, err := c.block(index)
	if b == nil || err != nil {
		return 0
	}
	n = min(n, g.blockEntries-at)
	if g.order == 4 {
		b = b[2*at : 2*(at+n)]
		for i := int64(0); i < n; i++ {
			if b[2*i] != 0 || b[2*i+1] != 1 {
				return i
			}
		}
		return n
	}
	for i := range n {
		if refcountAt(b, at+i, g.order) != 1 {
			return i
		}
	}
	return n
}

// blockCache holds refcount blocks, at most 32 MiB or four of them.
type blockCache struct {
	im     *image
	blocks map[int64]*cachedBlock
	order  []int64 // oldest first
	limit  int
	last   *cachedBlock
}

type cachedBlock struct {
	off     int64
	buf     []byte
	changed bool
}

func newBlockCache(im *image) blockCache {
	return blockCache{im: im, blocks: map[int64]*cachedBlock{}, limit: max(4, int(40<<20/im.g.clusterSize))}
}

// get returns the block at off; what it returned before stays valid until the
// next call.
func (c *blockCache) get(off int64) ([]byte, error) {
	if c.last != nil && c.last.off == off {
		return c.last.buf, nil
	}
	if b := c.blocks[off]; b != nil {
		c.last = b
		return b.buf, nil
	}
	b, err := c.make(off)
	if err != nil {
		return nil, err
	}
	if err := readZeros(c.im.main, b.buf, off); err != nil {
		delete(c.blocks, off)
		c.order, c.last = c.order[:len(c.order)-1], nil
		return nil, errors.Join(errEIO, err)
	}
	return b.buf, nil
}

// make enters a block, in the place of the oldest where there are many.
func (c *blockCache) make(off int64) (*cachedBlock, error) {
	var buf []byte
	if len(c.order) >= c.limit {
		old := c.blocks[c.order[0]]
		if err := c.write(old); err != nil {
			return nil, err
		}
		delete(c.blocks, old.off)
		c.order = c.order[1:]
		buf = old.buf
	}
	if buf == nil {
		buf = make([]byte, c.im.g.clusterSize)
	}
	b := &cachedBlock{off: off, buf: buf}
	c.blocks[off] = b
	c.order = append(c.order, off)
	c.last = b
	return b, nil
}

// fresh is get for a block that is not in the file yet.
func (c *blockCache) fresh(off int64) ([]byte, error) {
	if _, err := c.make(off); err != nil {
		return nil, err
	}
	return c.last.buf, nil
}

// dirty marks the block that get returned last as changed.
func (c *blockCache) dirty(buf []byte) error {
	if c.last == nil || &c.last.buf[0] != &buf[0] {
		return errEIO
	}
	c.last.changed = true
	return nil
}

func (c *blockCache) write(b *cachedBlock) error {
	if !b.changed {
		return nil
	}
	b.changed = false
	_, err := c.im.main.WriteAt(b.buf, b.off)
	return err
}

// flush writes the blocks that were changed.
func (c *blockCache) flush() error {
	for _, off := range c.order {
		if err := c.write(c.blocks[off]); err != nil {
			return err
		}
	}
	return nil
}

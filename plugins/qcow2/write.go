package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/instar-img/instar/sdk"
)

// writer puts guest data into an image. New L2 tables, guest clusters and
// refcount blocks go to the end of the file; tables are cached, so memory does
// not grow with the image.
type writer struct {
	im   *image
	data int // index of the file that holds guest clusters
	old  bool

	mu      sync.Mutex
	err     error // the first failure: nothing may follow it
	s       *space
	l1      []uint64
	l1Dirty []bool // by parts of tablePartSize
	tables  map[int64]*l2Table
	order   []int64 // L1 indexes of tables, the one used last at the end
	out     batch
	pack    int64 // where the next compressed cluster begins; 0: anywhere
	encoder encoder

	released  [][2]int64 // host offset and length of what the tables on disk may refer to
	bitmaps   []*newBitmap
	newHeader bool // the whole header cluster must be written
}

type l2Table struct {
	off   int64
	buf   []byte
	dirty bool
}

// tablesCached is enough for runs that the core sends out of order from
// several goroutines, and 32 MiB at most.
const tablesCached = 16

// BeginWrite checks the image, and repairs it where it is dirty.
func (im *image) BeginWrite(ctx context.Context, req sdk.WriteRequest) (sdk.WriteInfo, error) {
	var info sdk.WriteInfo
	if !im.readWrite {
		return info, fmt.Errorf("image opened for reading: %w", sdk.ErrReadOnly)
	}
	if im.h.crypt != cryptNone {
		return info, fmt.Errorf("writing an encrypted image: %w", sdk.ErrUnsupported)
	}
	if req.Compressed && im.h.dataFile() {
		return info, fmt.Errorf("compression with an external data file: %w", sdk.ErrUnsupported)
	}
	if im.l1Offset != int64(im.h.l1Offset) {
		return info, fmt.Errorf("writing an internal snapshot: %w", sdk.ErrUnsupported)
	}
	// Refcounts say what may be written over: they must be right.
	fix := sdk.FixNone
	if im.h.incompatible&incompatDirty != 0 {
		fix = sdk.FixAll // as qemu does when it opens one
	}
	res, err := im.Check(ctx, sdk.CheckRequest{Fix: fix})
	if err != nil {
		return info, fmt.Errorf("check before writing: %w", err)
	}
	if res.CheckErrors > 0 || res.Corruptions > 0 {
		return info, fmt.Errorf("image has %d corruptions, repair it before writing: %w", res.Corruptions+res.CheckErrors, sdk.ErrReadOnly)
	}
	_, data, err := im.dataFile()
	if err != nil {
		return info, err
	}
	w := &writer{im: im, data: data, tables: map[int64]*l2Table{}, out: batch{f: im.main}}
	if w.s, err = newSpace(im); err != nil {
		return info, err
	}
	if err := w.readL1(); err != nil {
		return info, err
	}
	if err := w.encoder.init(im.h.compression == compressionZstd, im.g.clusterSize); err != nil {
		return info, err
	}
	if w.old {
		if err := w.s.collectFree(); err != nil {
			return info, err
		}
		// Until Finish a crash loses clusters, which the next writer is to find.
		if err := im.setIncompatible(im.h.incompatible | incompatDirty); err != nil {
			return info, err
		}
	}
	im.mu.Lock()
	im.writer = w
	im.mu.Unlock()
	return sdk.WriteInfo{
		Unit:      im.g.clusterSize,
		ReadsZero: im.backing == "" && !w.old,
		Ahead:     im.backing == "" && !w.old && !im.h.dataFile(),
	}, nil
}

func (im *image) writing() (*writer, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.writer == nil {
		return nil, fmt.Errorf("write without BeginWrite: %w", sdk.ErrInvalid)
	}
	return im.writer, nil
}

func (w *writer) readL1() error {
	b := make([]byte, int64(w.im.h.l1Size)*8)
	if err := readZeros(w.im.main, b, w.im.l1Offset); err != nil {
		return fmt.Errorf("L1 table: %w", err)
	}
	w.l1 = make([]uint64, w.im.h.l1Size)
	for i := range w.l1 {
		w.l1[i] = binary.BigEndian.Uint64(b[i*8:])
		w.old = w.old || w.l1[i] != 0
	}
	w.l1Dirty = make([]bool, divUp(int64(len(b)), tablePartSize))
	return nil
}

// fail remembers the first error, after which the tables may be wrong.
func (w *writer) fail(err error) error {
	if w.err == nil {
		w.err = err
	}
	return err
}

// table returns the L2 table of an L1 index for writing: one that nothing else
// refers to.
func (w *writer) table(index int64) (*l2Table, error) {
	if t := w.tables[index]; t != nil {
		if last := len(w.order) - 1; w.order[last] != index {
			for i, x := range w.order {
				if x == index {
					copy(w.order[i:], w.order[i+1:])
					w.order[last] = index
					break
				}
			}
		}
		return t, nil
	}
	if index >= int64(len(w.l1)) {
		return nil, fmt.Errorf("L1 index %d of %d: %w", index, len(w.l1), sdk.ErrInvalid)
	}
	t := &l2Table{}
	if len(w.order) >= tablesCached {
		oldest := w.order[0]
		// What was placed so long ago the core has written.
		if w.old && w.tables[oldest].dirty {
			if err := w.inOrder(w.s.flushBlocks, w.s.flushTable, w.writeHeader); err != nil {
				return nil, err
			}
		}
		if err := w.store(w.tables[oldest]); err != nil {
			return nil, err
		}
		t.buf = w.tables[oldest].buf
		delete(w.tables, oldest)
		w.order = w.order[:copy(w.order, w.order[1:])]
	} else {
		t.buf = make([]byte, w.im.g.clusterSize)
	}
	g := &w.im.g
	entry := w.l1[index]
	t.off = int64(entry & offsetMask)
	shared := false
	if t.off == 0 {
		clear(t.buf)
	} else {
		if t.off&(g.clusterSize-1) != 0 {
			return nil, fmt.Errorf("L2 table offset %#x unaligned (L1 index: %#x): %w", t.off, index, sdk.ErrCorrupt)
		}
		n, err := w.s.refcount(t.off >> g.clusterBits)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, fmt.Errorf("L2 table at %#x has no refcount (L1 index: %#x): %w", t.off, index, sdk.ErrCorrupt)
		}
		shared = n > 1
		if err := w.out.flush(); err != nil { // it may hold this very table
			return nil, err
		}
		if err := readZeros(w.im.main, t.buf, t.off); err != nil {
			return nil, err
		}
	}
	if t.off == 0 || shared {
		c, _, err := w.s.someOf(1)
		if err != nil {
			return nil, err
		}
		if shared {
			if err := w.release(t.off, g.clusterSize); err != nil {
				return nil, err
			}
		}
		t.off, t.dirty = c<<g.clusterBits, true
		w.l1[index] = uint64(t.off) | flagCopied
		w.l1Dirty[index*8/tablePartSize] = true
	}
	w.tables[index] = t
	w.order = append(w.order, index)
	return t, nil
}

// store writes a table that changed.
func (w *writer) store(t *l2Table) error {
	if !t.dirty {
		return nil
	}
	t.dirty = false
	return w.out.write(t.off, t.buf)
}

// get and set access the entry of a guest cluster.
func (w *writer) get(t *l2Table, cluster int64) l2Entry {
	at := cluster % w.im.g.l2Entries * w.im.g.entrySize
	e := l2Entry{desc: binary.BigEndian.Uint64(t.buf[at:])}
	if w.im.g.extended() {
		e.sub = binary.BigEndian.Uint64(t.buf[at+8:])
	}
	return e
}

func (w *writer) set(t *l2Table, cluster int64, e l2Entry) {
	at := cluster % w.im.g.l2Entries * w.im.g.entrySize
	binary.BigEndian.PutUint64(t.buf[at:], e.desc)
	if w.im.g.extended() {
		binary.BigEndian.PutUint64(t.buf[at+8:], e.sub)
	}
	t.dirty = true
}

// drop gives up the host space of an entry.
func (w *writer) drop(e l2Entry) error {
	switch {
	case w.im.h.dataFile():
		return nil
	case e.compressed():
		return w.release(w.im.g.compressedRange(e))
	case e.hostOffset() != 0:
		return w.release(e.hostOffset(), w.im.g.clusterSize)
	}
	return nil
}

// release gives up host space. Until the tables on disk no longer refer to it
// its refcounts stay, and nothing else may take it.
func (w *writer) release(off, length int64) error {
	if !w.old {
		return w.s.release(off, length)
	}
	w.released = append(w.released, [2]int64{off, length})
	return nil
}

// ready returns the error after which nothing may follow. It also bounds the
// memory for what is given up: each call adds a batch of the core's at most.
func (w *writer) ready() error {
	if w.err == nil && len(w.released) >= maxReleased {
		w.err = w.commit()
	}
	return w.err
}

const maxReleased = 1 << 19 // 8 MiB

// reusable reports whether the cluster of e may be written over in place.
func (w *writer) reusable(e l2Entry) (bool, error) {
	if e.compressed() || e.hostOffset() == 0 {
		return false, nil
	}
	if e.hostOffset()&(w.im.g.clusterSize-1) != 0 {
		return false, fmt.Errorf("cluster offset %#x unaligned: %w", e.hostOffset(), sdk.ErrCorrupt)
	}
	n, err := w.s.refcount(e.hostOffset() >> w.im.g.clusterBits)
	if err == nil && n == 0 {
		err = fmt.Errorf("cluster at %#x has no refcount: %w", e.hostOffset(), sdk.ErrCorrupt)
	}
	return n == 1, err
}

// bounds checks a run and returns its clusters.
func (w *writer) bounds(r sdk.Run) (first, end int64, err error) {
	g := &w.im.g
	if r.Offset < 0 || r.Length <= 0 || r.Offset > w.im.size || r.Length > w.im.size-r.Offset ||
		r.Offset&(g.clusterSize-1) != 0 || (r.Offset+r.Length)&(g.clusterSize-1) != 0 && r.Offset+r.Length != w.im.size {
		return 0, 0, fmt.Errorf("run %#x+%#x is not of whole clusters of a disk of %#x bytes: %w", r.Offset, r.Length, w.im.size, sdk.ErrInvalid)
	}
	return r.Offset >> g.clusterBits, divUp(r.Offset+r.Length, g.clusterSize), nil
}

// Place implements sdk.Writer. The tables of a run are made before its
// clusters, so that those lie in a row.
func (im *image) Place(_ context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	w, err := im.writing()
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.ready(); err != nil {
		return nil, err
	}
	var list []sdk.Placement
	for _, r := range runs {
		first, end, err := w.bounds(r)
		if err != nil {
			return nil, err
		}
		if list, err = w.place(list, first, end); err != nil {
			return nil, w.fail(err)
		}
		// The last cluster of the disk may be cut.
		list[len(list)-1].Length -= end<<im.g.clusterBits - (r.Offset + r.Length)
	}
	return list, nil
}

func (w *writer) place(list []sdk.Placement, first, end int64) ([]sdk.Placement, error) {
	g := &w.im.g
	for c := first; c < end; c = (c/g.l2Entries + 1) * g.l2Entries {
		if _, err := w.table(c / g.l2Entries); err != nil {
			return nil, err
		}
	}
	add := func(cluster, host, n int64) {
		p := sdk.Placement{Offset: cluster << g.clusterBits, Length: n << g.clusterBits, File: w.data, HostOffset: host}
		if k := len(list); k > 0 && list[k-1].Offset+list[k-1].Length == p.Offset && list[k-1].HostOffset+list[k-1].Length == host {
			list[k-1].Length += p.Length
			return
		}
		list = append(list, p)
	}
	all := uint64(0) // subclusters
	if g.extended() {
		all = 1<<subclusters - 1
	}
	for c := first; c < end; {
		t, err := w.table(c / g.l2Entries)
		if err != nil {
			return nil, err
		}
		e := w.get(t, c)
		if w.im.h.dataFile() { // guest and host offsets are the same there
			w.set(t, c, l2Entry{uint64(c)<<g.clusterBits | flagCopied, all})
			add(c, c<<g.clusterBits, 1)
			c++
			continue
		}
		ok, err := w.reusable(e)
		if err != nil {
			return nil, err
		}
		if ok {
			w.set(t, c, l2Entry{uint64(e.hostOffset()) | flagCopied, all})
			add(c, e.hostOffset(), 1)
			c++
			continue
		}
		// Everything up to the next reusable cluster gets new space.
		n := int64(1)
		for c+n < end {
			t, err := w.table((c + n) / g.l2Entries)
			if err != nil {
				return nil, err
			}
			if ok, err := w.reusable(w.get(t, c+n)); err != nil {
				return nil, err
			} else if ok {
				break
			}
			n++
		}
		host, n, err := w.s.someOf(n)
		if err != nil {
			return nil, err
		}
		add(c, host<<g.clusterBits, n)
		for i := range n {
			t, err := w.table((c + i) / g.l2Entries)
			if err != nil {
				return nil, err
			}
			old := w.get(t, c+i)
			w.set(t, c+i, l2Entry{uint64(host+i)<<g.clusterBits | flagCopied, all})
			if err := w.drop(old); err != nil {
				return nil, err
			}
		}
		c += n
	}
	return list, nil
}

// Zero implements sdk.Writer.
func (im *image) Zero(ctx context.Context, runs []sdk.Run) error {
	w, err := im.writing()
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.ready(); err != nil {
		return err
	}
	for _, r := range runs {
		first, end, err := w.bounds(r)
		if err != nil {
			return err
		}
		for c := first; c < end; {
			next := min(end, (c/im.g.l2Entries+1)*im.g.l2Entries)
			if err := w.zero(c, next); err != nil {
				return w.fail(err)
			}
			if err := ctx.Err(); err != nil {
				return w.fail(err)
			}
			c = next
		}
	}
	return nil
}

// zero makes the clusters [first, end) of one L2 table read as zeros.
func (w *writer) zero(first, end int64) error {
	g := &w.im.g
	index := first / g.l2Entries
	flag := w.im.h.version >= 3
	// In a raw data file guest clusters must be what the tables say they are.
	if w.im.h.dataFile() {
		return w.writeZeros(first, end)
	}
	if w.im.backing == "" && index < int64(len(w.l1)) && w.l1[index]&offsetMask == 0 {
		return nil // absent already
	}
	if w.im.backing != "" && !flag {
		return w.writeZeros(first, end)
	}
	t, err := w.table(index)
	if err != nil {
		return err
	}
	var zero l2Entry
	if w.im.backing != "" {
		if zero.desc = flagZero; g.extended() {
			zero = l2Entry{sub: (1<<subclusters - 1) << 32}
		}
	}
	for c := first; c < end; c++ {
		old := w.get(t, c)
		if old == zero {
			continue
		}
		w.set(t, c, zero)
		if err := w.drop(old); err != nil {
			return err
		}
	}
	return nil
}

// writeZeros writes zeros where there is no flag for them.
func (w *writer) writeZeros(first, end int64) error {
	f, _, err := w.im.dataFile()
	if err != nil {
		return err
	}
	list, err := w.place(nil, first, end)
	if err != nil {
		return err
	}
	zeros := make([]byte, min(1<<20, (end-first)<<w.im.g.clusterBits))
	for _, p := range list {
		length := min(p.Length, w.im.size-p.Offset)
		for off := int64(0); off < length; off += int64(len(zeros)) {
			if _, err := f.WriteAt(zeros[:min(int64(len(zeros)), length-off)], p.HostOffset+off); err != nil {
				return err
			}
		}
	}
	return nil
}

// Encode compresses the units side by side and then places them in their order.
// A cluster that does not get smaller is stored plain.
func (im *image) Encode(ctx context.Context, units []sdk.Unit) error {
	w, err := im.writing()
	if err != nil {
		return err
	}
	if im.h.dataFile() {
		return fmt.Errorf("compression with an external data file: %w", sdk.ErrUnsupported)
	}
	for _, u := range units {
		if first, end, err := w.bounds(sdk.Run{Offset: u.Offset, Length: int64(len(u.Data))}); err != nil {
			return err
		} else if end != first+1 {
			return fmt.Errorf("unit of %d bytes at %#x: %w", len(u.Data), u.Offset, sdk.ErrInvalid)
		}
	}
	buffers := make([]*encodeBuffer, len(units))
	outs := make([][]byte, len(units))
	defer func() {
		for _, b := range buffers {
			if b != nil {
				w.encoder.put(b)
			}
		}
	}()
	err = sdk.Parallel(len(units), func(i int) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		buffers[i] = w.encoder.get()
		var err error
		outs[i], err = w.encoder.compress(buffers[i], units[i].Data)
		return err
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.ready(); err != nil {
		return err
	}
	out := batch{f: im.main} // packed clusters follow each other
	for i, u := range units {
		if w.err != nil {
			return w.err
		}
		// What is encoded is written here, not by the core: what it replaces can be
		// given up, and taken again, before the file has grown by a quarter.
		if n := int64(len(w.released)); n > 0 && n >= w.s.end/4 {
			err := out.flush()
			if err == nil {
				err = w.commit()
			}
			if err != nil {
				return w.fail(err)
			}
		}
		cluster := u.Offset >> im.g.clusterBits
		if outs[i] == nil {
			list, err := w.place(nil, cluster, cluster+1)
			if err == nil {
				err = out.write(list[0].HostOffset, u.Data)
			}
			if err != nil {
				return w.fail(err)
			}
			continue
		}
		host, err := w.placeBytes(cluster, int64(len(outs[i])))
		if err == nil {
			err = out.write(host, outs[i])
		}
		if err != nil {
			return w.fail(err)
		}
	}
	if err := out.flush(); err != nil {
		return w.fail(err)
	}
	return nil
}

// placeBytes makes room for n compressed bytes of a guest cluster.
func (w *writer) placeBytes(cluster, n int64) (int64, error) {
	host, err := w.allocBytes(n)
	if err != nil {
		return 0, err
	}
	t, err := w.table(cluster / w.im.g.l2Entries)
	if err != nil {
		return 0, err
	}
	old := w.get(t, cluster)
	w.set(t, cluster, l2Entry{desc: w.im.g.compressedEntry(host, n)})
	return host, w.drop(old)
}

// allocBytes packs compressed clusters one after the other. Each refers to
// every host cluster that it touches.
func (w *writer) allocBytes(n int64) (int64, error) {
	g := &w.im.g
	off := w.pack
	if off != 0 {
		last := off >> g.clusterBits
		count, err := w.s.refcount(last)
		if err != nil {
			return 0, err
		}
		fits := n <= g.clusterSize-off%g.clusterSize
		if count == 0 || count == refcountMax(g.order) {
			fits, off = true, 0
		}
		if !fits {
			ok, err := w.s.after(last + 1)
			if err != nil {
				return 0, err
			}
			if !ok {
				off = 0
			}
		}
		if off != 0 {
			if err := w.s.add(last, 1); err != nil {
				return 0, err
			}
		}
	}
	if off == 0 {
		c, _, err := w.s.someOf(1)
		if err != nil {
			return 0, err
		}
		off = c << g.clusterBits
	}
	if limit := int64(1) << (62 - (g.clusterBits - 8)); off+n > limit || off+n >= 1<<56 {
		return 0, fmt.Errorf("compressed cluster at %#x: %w", off, sdk.ErrTooBig)
	}
	w.pack = off + n
	if w.pack%g.clusterSize == 0 {
		w.pack = 0
	}
	return off, nil
}

// Finish implements sdk.Writer: tables, refcounts, L1 table, header.
func (im *image) Finish(context.Context) error {
	w, err := im.writing()
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return w.err
	}
	if err := w.finish(); err != nil {
		return w.fail(err)
	}
	im.cache.drop()
	im.mu.Lock()
	im.writer, im.sparseOK = nil, false
	im.mu.Unlock()
	w.encoder.close()
	return nil
}

func (w *writer) finish() error {
	im := w.im
	if err := w.staleBitmaps(); err != nil {
		return err
	}
	if err := w.storeBitmaps(); err != nil {
		return err
	}
	if !w.old {
		w.s.trim()
	}
	if err := w.commit(); err != nil {
		return err
	}
	if w.old {
		w.s.discard()
	}
	// Whole clusters, as 7z wants them: those that were placed and hold nothing at
	// their end are not in the file yet.
	size, err := im.main.Size()
	if err != nil {
		return err
	}
	if end := w.s.end << im.g.clusterBits; size < end && !im.onDevice() {
		if err := im.main.Truncate(end); err != nil {
			return err
		}
	}
	return im.setIncompatible(im.h.incompatible &^ incompatDirty)
}

// commit makes the tables on disk refer to what was placed. Over old content a
// crash leaves the old content or the new one, and lost clusters at worst: data and
// refcounts are there first, then what finds the refcounts, L2 tables, L1 table;
// what these no longer refer to is free then.
func (w *writer) commit() error {
	return w.inOrder(w.s.flushBlocks, w.s.flushTable, w.writeHeader, w.storeTables, w.writeL1, w.freeReleased)
}

// inOrder takes steps, and over old content each is on disk before the next.
func (w *writer) inOrder(steps ...func() error) error {
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
		if err := w.syncOld(); err != nil {
			return err
		}
	}
	return nil
}

// syncOld waits for what was written where there is content to lose.
func (w *writer) syncOld() error {
	if !w.old {
		return nil
	}
	if w.im.h.dataFile() {
		data, _, err := w.im.dataFile()
		if err != nil {
			return err
		}
		if err := data.Sync(); err != nil {
			return err
		}
	}
	return w.im.main.Sync()
}

// storeTables writes the L2 tables that changed.
func (w *writer) storeTables() error {
	for _, index := range w.order {
		if err := w.store(w.tables[index]); err != nil {
			return err
		}
	}
	return w.out.flush()
}

// freeReleased takes back the references to what was given up.
func (w *writer) freeReleased() error {
	if len(w.released) == 0 {
		return nil
	}
	for _, r := range w.released {
		if err := w.s.release(r[0], r[1]); err != nil {
			return err
		}
	}
	w.released = nil
	return w.s.flush()
}

// writeHeader writes what changed of the header, or all of it.
func (w *writer) writeHeader() error {
	im := w.im
	autoclear := im.h.autoclear
	im.h.autoclear &= autoclearKnown
	if w.newHeader {
		b, err := encodeHeader(im.h, im.ext, im.backing)
		if err != nil {
			return err
		}
		_, err = im.main.WriteAt(b, 0)
		return err
	}
	b := binary.BigEndian.AppendUint64(nil, im.h.reftableOffset)
	b = binary.BigEndian.AppendUint32(b, im.h.reftableClusters)
	if _, err := im.main.WriteAt(b, fieldReftable); err != nil {
		return err
	}
	if im.h.version < 3 || autoclear == im.h.autoclear {
		return nil
	}
	_, err := im.main.WriteAt(binary.BigEndian.AppendUint64(nil, im.h.autoclear), fieldAutoclear)
	return err
}

func (w *writer) writeL1() error {
	var b []byte
	const per = tablePartSize / 8
	for part, dirty := range w.l1Dirty {
		if !dirty {
			continue
		}
		b = b[:0]
		for _, e := range w.l1[part*per : min((part+1)*per, len(w.l1))] {
			b = binary.BigEndian.AppendUint64(b, e)
		}
		if _, err := w.im.main.WriteAt(b, w.im.l1Offset+int64(part)*tablePartSize); err != nil {
			return err
		}
		w.l1Dirty[part] = false
	}
	return nil
}

// staleBitmaps sets all bits of the bitmaps that record writes: more than was
// written, but nothing is missed.
func (w *writer) staleBitmaps() error {
	im := w.im
	for _, e := range im.bitmaps {
		if e.flags&bitmapAuto == 0 || e.flags&bitmapInUse != 0 {
			continue
		}
		part := make([]byte, tablePartSize)
		for first := int64(0); first < int64(e.tableSize); first += tablePartSize / 8 {
			b := part[:min(tablePartSize, (int64(e.tableSize)-first)*8)]
			at := int64(e.tableOffset) + first*8
			if err := readZeros(im.main, b, at); err != nil {
				return err
			}
			for i := 0; i < len(b); i += 8 {
				if off := int64(binary.BigEndian.Uint64(b[i:]) & offsetMask); off != 0 {
					if err := w.release(off, im.g.clusterSize); err != nil {
						return err
					}
				}
				binary.BigEndian.PutUint64(b[i:], 1) // all ones, no cluster
			}
			if _, err := im.main.WriteAt(b, at); err != nil {
				return err
			}
		}
	}
	return nil
}

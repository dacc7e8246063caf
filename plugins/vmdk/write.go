package vmdk

import (
	"bytes"
	"context"
	"crypto/rand"
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

// maxTables is how many grain tables are kept in memory for all files of an
// image: 8 MiB of them.
const maxTables = 4096

// writer is the state of writing into an image. New grains go to the end of
// their file. Tables are kept until Finish or until there are too many; in an
// image that held data before, what they refer to is synced first.
type writer struct {
	mu      sync.Mutex
	begun   bool
	req     sdk.WriteRequest
	backing bool
	fresh   bool // no grain was allocated, no flat extent
	layout  *layout
	extents []*extentWriter // by extent; nil for those that are not sparse
	tables  int             // in memory
	stream  *streamWriter   // nil but for streamOptimized
}

// extentWriter allocates the grains of a sparse extent.
type extentWriter struct {
	e      *extent
	fresh  bool
	end    int64   // host offset of the next new grain
	spare  []int64 // host offsets of grains given back, oldest first
	exists int64   // length of the file before
	tables map[int64]*tableBuffer
	writer *writer
}

// tableBuffer is a grain table in memory.
type tableBuffer struct {
	at, redundant int64 // host offsets of its copies, redundant 0: none
	entries       []byte
	changed       bool
}

var errNotWriting = fmt.Errorf("write: not begun: %w", sdk.ErrInvalid)

// BeginWrite implements sdk.Writer.
func (img *image) BeginWrite(ctx context.Context, req sdk.WriteRequest) (sdk.WriteInfo, error) {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	l := img.layout.Load()
	switch {
	case w.begun:
		return sdk.WriteInfo{}, fmt.Errorf("write: begun already: %w", sdk.ErrInvalid)
	case !img.readWrite:
		return sdk.WriteInfo{}, fmt.Errorf("write: the files were opened for reading: %w", sdk.ErrReadOnly)
	}
	w.req, w.layout, w.backing, w.fresh = req, l, img.desc.hasParentHint, true
	w.extents = make([]*extentWriter, len(l.extents))
	unit := int64(sectorSize)
	for i, e := range l.extents {
		switch {
		case e.file == nil || e.line.access == accessReadOnly:
			return sdk.WriteInfo{}, fmt.Errorf("write: extent %d (%s) cannot be written: %w", i, e.line.name, sdk.ErrReadOnly)
		case e.sparse == nil && req.Compressed:
			return sdk.WriteInfo{}, unsupported(noCompression)
		case e.sparse == nil:
			w.fresh = false
			continue
		case e.sparse.kind != sparseMagic:
			return sdk.WriteInfo{}, fmt.Errorf("write: extent %d: %s extents can only be read: %w", i, e.line.kind, sdk.ErrReadOnly)
		case e.sparse.compressed && len(l.extents) > 1:
			return sdk.WriteInfo{}, fmt.Errorf("write: extent %d: compressed extents of a split image can only be read: %w", i, sdk.ErrReadOnly)
		}
		x, err := e.newWriter(ctx, w)
		if err != nil {
			return sdk.WriteInfo{}, fmt.Errorf("write: extent %d: %w", i, err)
		}
		w.extents[i] = x
		w.fresh = w.fresh && x.fresh
		unit = max(unit, e.sparse.grain)
	}
	for i, e := range l.extents {
		if e.start%unit != 0 {
			return sdk.WriteInfo{}, fmt.Errorf("write: extent %d begins inside a grain: %w", i, sdk.ErrUnsupported)
		}
	}
	info := sdk.WriteInfo{Unit: unit, ReadsZero: w.fresh && !w.backing, Ahead: w.fresh && !w.backing}
	if l.extents[0].sparse != nil && l.extents[0].sparse.compressed {
		var err error
		if w.stream, err = newStreamWriter(img, l.extents[0], w.fresh); err != nil {
			return sdk.WriteInfo{}, fmt.Errorf("write: %w", err)
		}
		info.EncodeOnly, info.Ahead = true, false
	}
	w.begun = true
	return info, nil
}

func (e *extent) newWriter(ctx context.Context, w *writer) (*extentWriter, error) {
	s := e.sparse
	x := &extentWriter{e: e, exists: e.fileSize, fresh: true, tables: make(map[int64]*tableBuffer), writer: w}
	end := max(s.overhead, sectorSize)
	if e.fileSize > s.overhead {
		// A device is longer than what it holds: look for the end.
		var err error
		if end, err = x.scan(ctx, end); err != nil {
			return nil, err
		}
	}
	var ok bool
	if x.end, ok = ondisk.AlignUp(end, s.grain); !ok {
		return nil, fmt.Errorf("file of %d bytes: %w", e.fileSize, sdk.ErrTooBig)
	}
	return x, nil
}

// scan returns the end of the last table or grain, end at least, and finds out
// whether there are grains.
func (x *extentWriter) scan(ctx context.Context, end int64) (int64, error) {
	s := x.e.sparse
	table := make([]byte, s.entries*s.entrySize)
	for i := range s.tables {
		if i%256 == 0 {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
		}
		at, err := s.table(i)
		if err != nil {
			return 0, err
		}
		if at == 0 {
			continue
		}
		end = max(end, at+int64(len(table)))
		if s.redundant != 0 {
			other, err := s.tableIn(s.redundant, i)
			if err != nil {
				return 0, err
			}
			end = max(end, other+int64(len(table)))
		}
		if err := s.cache.read("grain table", table, at); err != nil {
			return 0, fmt.Errorf("grain directory entry %d: %w", i, err)
		}
		for j := range s.entries {
			g, err := s.entry(table, j)
			if err != nil {
				return 0, err
			}
			if g.zero || g.host != 0 {
				x.fresh = false
			}
			if g.host >= x.e.fileSize {
				return 0, fmt.Errorf("grain at %#x beyond end of file %#x: %w", g.host, x.e.fileSize, sdk.ErrCorrupt)
			}
			if g.host != 0 {
				end = max(end, g.host+s.grain)
			}
		}
	}
	return end, nil
}

// split calls f for each part of a run that lies in one extent.
func (w *writer) split(r sdk.Run, f func(i int, off, n int64) error) error {
	l := w.layout
	if r.Length <= 0 || !ondisk.Within(r.Offset, r.Length, l.size) {
		return fmt.Errorf("run %#x+%#x of %#x: %w", r.Offset, r.Length, l.size, sdk.ErrInvalid)
	}
	for i := l.find(r.Offset); r.Length > 0; i++ {
		e := l.extents[i]
		n := min(r.Length, e.start+e.length-r.Offset)
		if n <= 0 {
			continue
		}
		if err := f(i, r.Offset-e.start, n); err != nil {
			return fmt.Errorf("extent %d: %w", i, err)
		}
		r.Offset, r.Length = r.Offset+n, r.Length-n
	}
	return nil
}

// grains calls f for each grain of a range of a sparse extent, which must be
// whole grains but for the extent's end.
func (e *extent) grains(off, n int64, f func(off, n int64) error) error {
	g := e.sparse.grain
	if off%g != 0 || n%g != 0 && off+n != e.length {
		return fmt.Errorf("%#x+%#x is not in grains of %#x: %w", off, n, g, sdk.ErrInvalid)
	}
	for end := off + n; off < end; off += g {
		if err := f(off, min(g, end-off)); err != nil {
			return err
		}
	}
	return nil
}

// Place implements sdk.Writer.
func (img *image) Place(_ context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.begun {
		return nil, errNotWriting
	}
	if w.stream != nil {
		return nil, fmt.Errorf("place: grains are compressed: %w", sdk.ErrUnsupported)
	}
	var places []sdk.Placement
	for _, r := range runs {
		if err := w.split(r, func(i int, off, n int64) error {
			return w.place(i, off, n, &places)
		}); err != nil {
			return nil, fmt.Errorf("place: %w", err)
		}
	}
	return places, nil
}

// place appends where n bytes at off of extent i go.
func (w *writer) place(i int, off, n int64, places *[]sdk.Placement) error {
	e := w.layout.extents[i]
	add := func(off, n, host int64) {
		if k := len(*places); k > 0 {
			last := &(*places)[k-1]
			if last.File == e.index && last.Offset+last.Length == e.start+off && last.HostOffset+last.Length == host {
				last.Length += n
				return
			}
		}
		*places = append(*places, sdk.Placement{Offset: e.start + off, Length: n, File: e.index, HostOffset: host})
	}
	if e.sparse == nil {
		at, err := e.flatOffset()
		if err != nil {
			return err
		}
		add(off, n, at+off)
		return nil
	}
	return e.grains(off, n, func(off, n int64) error {
		host, err := w.extents[i].allocate(off)
		if err != nil {
			return err
		}
		add(off, n, host)
		return nil
	})
}

// Zero implements sdk.Writer.
func (img *image) Zero(ctx context.Context, runs []sdk.Run) error {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.begun {
		return errNotWriting
	}
	for _, r := range runs {
		if err := w.split(r, func(i int, off, n int64) error {
			e := w.layout.extents[i]
			switch {
			case e.sparse == nil:
				at, err := e.flatOffset()
				if err != nil {
					return err
				}
				return zeroFlat(ctx, e.file, at+off, n)
			case w.stream != nil:
				return w.stream.zero(e, off, n, w.backing)
			}
			return e.grains(off, n, func(off, _ int64) error { return w.extents[i].zero(off, w.backing) })
		}); err != nil {
			return fmt.Errorf("zero: %w", err)
		}
	}
	return nil
}

// zeroFlat makes a range read as zeros, and gives its space back where it can.
// What is zero already is left alone, so that holes stay holes.
func zeroFlat(ctx context.Context, f sdk.File, at, n int64) error {
	if sdk.Discard(f, at, n) {
		return nil
	}
	buf := make([]byte, min(n, 1<<20))
	zeros := make([]byte, len(buf))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		k := min(n, int64(len(buf)))
		got, err := f.ReadAt(buf[:k], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("read %#x bytes at %#x: %w", k, at, err)
		}
		if !bytes.Equal(buf[:got], zeros[:got]) {
			if _, err := f.WriteAt(zeros[:got], at); err != nil {
				return fmt.Errorf("zero %#x bytes at %#x: %w", got, at, err)
			}
		}
		at, n = at+k, n-k
	}
	return nil
}

// Encode implements sdk.Writer. Only streamOptimized images compress; the
// others store units as they are, as for qemu-img.
func (img *image) Encode(_ context.Context, units []sdk.Unit) error {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.begun {
		return errNotWriting
	}
	if w.stream != nil {
		for _, u := range units {
			if err := w.split(sdk.Run{Offset: u.Offset, Length: int64(len(u.Data))}, func(int, int64, int64) error { return nil }); err != nil {
				return fmt.Errorf("encode: %w", err)
			}
		}
		return w.stream.encode(units)
	}
	for _, u := range units {
		var places []sdk.Placement
		if err := w.split(sdk.Run{Offset: u.Offset, Length: int64(len(u.Data))}, func(i int, off, n int64) error {
			return w.place(i, off, n, &places)
		}); err != nil {
			return fmt.Errorf("encode: %w", err)
		}
		for _, p := range places {
			e := w.layout.extents[w.layout.find(p.Offset)]
			if _, err := e.file.WriteAt(u.Data[p.Offset-u.Offset:][:p.Length], p.HostOffset); err != nil {
				return fmt.Errorf("encode %#x: %w", u.Offset, err)
			}
		}
	}
	return nil
}

// Finish implements sdk.Writer.
func (img *image) Finish(context.Context) error {
	w := &img.writer
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.begun {
		return errNotWriting
	}
	w.begun = false
	if w.stream != nil {
		return w.stream.finish()
	}
	for i, x := range w.extents {
		if x == nil {
			continue
		}
		if err := x.finish(); err != nil {
			return fmt.Errorf("finish: extent %d: %w", i, err)
		}
	}
	if w.fresh {
		return nil
	}
	if err := img.changeCID(w.req.Reproducible); err != nil {
		return fmt.Errorf("finish: %w", err)
	}
	return nil
}

// changeCID gives the image a new content id, as any writer must whose image
// may have overlays.
func (img *image) changeCID(reproducible bool) error {
	if reproducible || img.descAt < 0 {
		return nil
	}
	length := img.descLength
	if length == 0 {
		length = img.mainSize - img.descAt
	}
	text, err := sdk.ReadAtMost(img.main, "descriptor", img.descAt, length, maxDescriptor)
	if err != nil {
		return err
	}
	if img.descLength != 0 {
		if i := bytes.IndexByte(text, 0); i >= 0 {
			text = text[:i]
		}
	}
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		return err
	}
	if text, err = replaceCID(text, usableCID(binary.LittleEndian.Uint32(b[:]))); err != nil {
		return err
	}
	if img.descLength == 0 {
		if _, err := img.main.WriteAt(text, img.descAt); err != nil {
			return err
		}
		return img.main.Truncate(img.descAt + int64(len(text)))
	}
	if int64(len(text)) > img.descLength {
		return fmt.Errorf("descriptor: no room for a new CID: %w", sdk.ErrTooBig)
	}
	text = append(text, make([]byte, img.descLength-int64(len(text)))...)
	_, err = img.main.WriteAt(text, img.descAt)
	return err
}

// table returns the table of a grain, in memory.
func (x *extentWriter) table(off int64) (t *tableBuffer, j int64, err error) {
	s := x.e.sparse
	i := off / (s.grain * s.entries)
	j = off / s.grain % s.entries
	if t = x.tables[i]; t != nil {
		return t, j, nil
	}
	if x.writer.tables >= maxTables {
		for _, other := range x.writer.extents {
			if other == nil {
				continue
			}
			if err := other.flush(); err != nil {
				return nil, 0, err
			}
		}
	}
	t = &tableBuffer{entries: make([]byte, s.entries*s.entrySize)}
	if t.at, err = s.table(i); err != nil {
		return nil, 0, err
	}
	if s.redundant != 0 {
		if t.redundant, err = s.tableIn(s.redundant, i); err != nil {
			return nil, 0, err
		}
	}
	if t.at == 0 {
		err = x.addTable(i, t)
	} else {
		err = s.cache.read("grain table", t.entries, t.at)
	}
	if err != nil {
		return nil, 0, err
	}
	x.tables[i] = t
	x.writer.tables++
	return t, j, nil
}

// addTable makes room for a table that the directories do not have yet, and
// enters it there.
func (x *extentWriter) addTable(i int64, t *tableBuffer) error {
	s := x.e.sparse
	size := ondisk.DivUp(int64(len(t.entries)), sectorSize) * sectorSize
	directories := []int64{s.directory}
	if s.redundant != 0 && t.redundant == 0 {
		directories = append(directories, s.redundant)
	}
	for k, directory := range directories {
		at := x.end
		if at/sectorSize+size/sectorSize >= maxSectors {
			return fmt.Errorf("grain table at %#x: %w", at, sdk.ErrTooBig)
		}
		x.end += size
		if k == 0 {
			t.at = at
		} else {
			t.redundant = at
		}
		if _, err := x.e.file.WriteAt(make([]byte, size), at); err != nil {
			return err
		}
		entry := binary.LittleEndian.AppendUint32(nil, uint32(at/sectorSize))
		if _, err := x.e.file.WriteAt(entry, directory+i*s.entrySize); err != nil {
			return err
		}
	}
	x.end = ondisk.DivUp(x.end, s.grain) * s.grain
	s.cache.drop()
	return nil
}

// allocate returns where the grain at off lies, making a place for it where it
// has none.
func (x *extentWriter) allocate(off int64) (int64, error) {
	s := x.e.sparse
	t, j, err := x.table(off)
	if err != nil {
		return 0, err
	}
	g, err := s.entry(t.entries, j)
	if err != nil {
		return 0, err
	}
	if g.host != 0 {
		if _, err := x.e.hostRange("grain", g.host, sectorSize); err != nil || g.host < max(s.overhead, sectorSize) {
			return 0, fmt.Errorf("grain of %#x lies at %#x: %w", off, g.host, sdk.ErrCorrupt)
		}
		return g.host, nil
	}
	host := x.end
	if len(x.spare) > 0 {
		host = x.spare[0]
		x.spare = x.spare[1:]
	} else {
		if (host+s.grain)/sectorSize > maxSectors {
			return 0, fmt.Errorf("grain at %#x: a VMDK extent cannot address it: %w", host, sdk.ErrTooBig)
		}
		x.end += s.grain
	}
	binary.LittleEndian.PutUint32(t.entries[j*4:], uint32(host/sectorSize))
	t.changed = true
	return host, nil
}

// zero makes the grain at off read as zeros.
func (x *extentWriter) zero(off int64, backing bool) error {
	s := x.e.sparse
	t, j, err := x.table(off)
	if err != nil {
		return err
	}
	g, err := s.entry(t.entries, j)
	if err != nil {
		return err
	}
	absent := g.host == 0 && !g.zero
	switch {
	case g.zero || absent && !backing:
		return nil
	case x.writer.fresh && !backing:
		// Placed since, and nothing has been written there.
		x.spare = append(x.spare, g.host)
		binary.LittleEndian.PutUint32(t.entries[j*4:], 0)
		t.changed = true
		return nil
	case s.zeroed:
		binary.LittleEndian.PutUint32(t.entries[j*4:], 1)
		t.changed = true
		return nil
	}
	host, err := x.allocate(off)
	if err != nil {
		return err
	}
	if absent && host >= x.exists {
		return nil // behind what was the end of the file
	}
	if sdk.Discard(x.e.file, host, s.grain) {
		return nil
	}
	_, err = x.e.file.WriteAt(make([]byte, s.grain), host)
	return err
}

// flush writes the tables that changed.
func (x *extentWriter) flush() error {
	if len(x.tables) == 0 {
		return nil
	}
	if !x.fresh {
		if err := x.e.file.Sync(); err != nil {
			return err
		}
	}
	for _, i := range slices.Sorted(maps.Keys(x.tables)) {
		t := x.tables[i]
		if !t.changed {
			continue
		}
		for _, at := range []int64{t.redundant, t.at} {
			if at == 0 {
				continue
			}
			if _, err := x.e.file.WriteAt(t.entries, at); err != nil {
				return fmt.Errorf("grain table at %#x: %w", at, err)
			}
		}
	}
	x.writer.tables -= len(x.tables)
	clear(x.tables)
	x.e.sparse.cache.drop()
	return nil
}

// finish writes the tables and gives the file its length: whole grains.
func (x *extentWriter) finish() error {
	slices.Sort(x.spare)
	for n := len(x.spare); n > 0 && x.spare[n-1] == x.end-x.e.sparse.grain; n-- {
		x.end -= x.e.sparse.grain
		x.spare = x.spare[:n-1]
	}
	size, err := x.e.file.Size()
	if err != nil {
		return err
	}
	if x.end > size {
		if err := x.e.file.Truncate(x.end); err != nil {
			return err
		}
	}
	return x.flush()
}

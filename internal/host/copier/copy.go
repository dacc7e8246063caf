package copier

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/client"
)

// DefaultSparse is convert's -S where the user does not say.
const DefaultSparse = 4096

// Target is a disk to be written.
type Target struct {
	Writer sdk.Writer
	// Files by index of sdk.Placement.File.
	Files []*os.File
	Size  int64
	// Fresh: what is not written of the files reads as zeros.
	Fresh bool
	// Old, where not nil, is what the disk holds. It is kept behind the source's
	// end, where there are zeros otherwise.
	Old *Source
}

// Options say how to copy.
type Options struct {
	// Sparse is the least run of zeros, in bytes, that is not written. 0 writes
	// every byte (-S 0).
	Sparse int64
	// Compressed stores units encoded.
	Compressed   bool
	Reproducible bool
	// TargetIsZero: the target reads as zeros already (--target-is-zero).
	TargetIsZero bool
	// NoClone reads and writes what could be shared with the source.
	NoClone bool
	// Offload has the file system copy what it cannot share (-C): nobody looks
	// for zeros then.
	Offload bool
	// Base is what the target's backing file holds: units equal to it are not
	// stored. Nil where the target has none.
	Base *Source
	// Workers is how many reads and writes are under way at a time; 0: 2.
	Workers int
	// Rate limits writing, in bytes each second; 0: no limit.
	Rate int64
	// Salvage, where not nil, is told what could not be read; zeros are stored
	// for it. It may be called from several goroutines.
	Salvage func(off, length int64, err error)
	// Progress is told how much of the disk is done. It may be called from
	// several goroutines.
	Progress func(done, total int64)
	// BeforeFinish, where not nil, is called when all content is written and the
	// target's tables are not.
	BeforeFinish func(context.Context) error
}

// Stats counts what Copy did, in bytes.
type Stats struct {
	Written int64 // copied
	Cloned  int64 // shared with the source
	Encoded int64 // given to the target's encoder
}

const (
	// cellSize is how much is read at a time. Cells lie on a grid.
	cellSize = 1 << 20
	maxCell  = 4 << 20
	// inFlight bounds the memory for cells.
	inFlight = 24 << 20
	// cloneSize bounds what is shared by one step.
	cloneSize   = 256 << 20
	clonePieces = 4096
	// defaultWorkers was the fastest on two cores.
	defaultWorkers = 2
	// aheadSize is how much is placed by one call before it is read.
	aheadSize = 16 << 20
	// wasteful is how much that was placed ahead may turn out to be zeros before
	// nothing is placed ahead any more, and wastefulShare its part of the whole.
	wasteful      = 4 << 20
	wastefulShare = 4
)

// step is a part of the work, in the order of the disk.
type step struct {
	kind        stepKind
	off, length int64
	pieces      []Extent // not zero, ascending; zeros between them
	base        []Extent // of Options.Base over the range

	slot   *slot
	ready  chan struct{} // closed when read
	whole  bool          // all of it must be written
	ahead  bool          // placed before it is read, and then read and written in one go
	data   []sdk.Run     // what must be written
	zeros  []sdk.Run     // units that are zeros where the base has something else
	places []sdk.Placement
	probe  chan struct{} // closed when done, where somebody waits for that
}

type stepKind uint8

const (
	stepRead  stepKind = iota // read, and write what is not zero
	stepClone                 // share
	stepZero                  // make zeros
)

type copy_ struct {
	src     *Source
	dst     *Target
	opts    Options
	info    sdk.WriteInfo
	end     int64 // guest offset up to which the target is written
	encode  bool
	window  client.WindowEncoder // where the encoder shares a window
	explode bool                 // zeros must be made: the target does not read so
	big     bool                 // units are larger than cells, and must be written whole
	cell    int64

	ctx    context.Context
	cancel context.CancelCauseFunc
	reader *reader
	limit  limiter
	plain  *pool
	pools  *windowPools
	steps  chan *step
	moves  chan *step // placed ahead
	writes sync.WaitGroup
	ahead  ahead
	clones cloner
	carry  []sdk.Placement // of the unit that the last step ended in

	limits   []int64 // of host offsets in the target's files
	reserves []bool  // the target's files whose blocks are allocated before they are written

	done                     atomic.Int64
	written, cloned, encoded atomic.Int64
}

// Copy writes the content of src to dst, from BeginWrite to Finish. After an
// error the target is not valid.
func Copy(ctx context.Context, src *Source, dst *Target, opts Options) (Stats, error) {
	if src.Size > dst.Size {
		return Stats{}, fmt.Errorf("the target holds %d bytes, the source has %d: %w", dst.Size, src.Size, sdk.ErrTooBig)
	}
	if opts.Workers <= 0 {
		opts.Workers = defaultWorkers
	}
	info, err := dst.Writer.BeginWrite(ctx, sdk.WriteRequest{Compressed: opts.Compressed, Reproducible: opts.Reproducible})
	if err != nil {
		return Stats{}, err
	}
	if info.Unit <= 0 {
		return Stats{}, fmt.Errorf("the target has units of %d bytes: %w", info.Unit, sdk.ErrInvalid)
	}
	c := &copy_{src: src, dst: dst, opts: opts, info: info, steps: make(chan *step, 64), moves: make(chan *step)}
	c.encode = opts.Compressed || info.EncodeOnly
	// A format without metadata cannot know what a file held: ours are new.
	c.explode = opts.Base != nil || !(info.ReadsZero || opts.TargetIsZero || dst.Fresh)
	if info.InPlace && len(dst.Files) == 0 {
		return Stats{}, fmt.Errorf("the target writes in place, into no file: %w", sdk.ErrInvalid)
	}
	if err := c.keepTail(ctx); err != nil {
		return Stats{}, err
	}
	c.ahead.begin(c)
	c.reader = newReader(opts.Workers, opts.Salvage)
	c.limit.rate = opts.Rate
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	defer c.cancel(nil)
	if err := c.bounds(); err != nil {
		return Stats{}, err
	}
	if err := c.memory(); err != nil {
		return Stats{}, err
	}
	defer c.release()
	c.clones.any = opts.Offload
	c.clones.off = opts.NoClone || c.encode || !dst.Fresh || c.explode || opts.Rate > 0 || opts.Sparse == 0 || opts.Sparse != DefaultSparse && !opts.Offload

	go func() {
		defer close(c.steps)
		if err := c.plan(); err != nil {
			c.fail(err)
		}
	}()
	for range opts.Workers {
		c.writes.Go(c.mover)
	}
	c.sequence()
	close(c.moves)
	c.writes.Wait()
	if err := context.Cause(c.ctx); err != nil {
		return c.stats(), err
	}
	if err := c.giveBack(c.ahead.rest(info.Unit, dst.Size)); err != nil {
		return c.stats(), err
	}
	if opts.BeforeFinish != nil {
		if err := opts.BeforeFinish(ctx); err != nil {
			return c.stats(), err
		}
	}
	if err := dst.Writer.Finish(ctx); err != nil {
		return c.stats(), err
	}
	c.progress(c.end - c.done.Load())
	return c.stats(), nil
}

// keepTail decides where writing ends. Where old content is kept, what the last
// unit holds of it becomes a part of the source.
func (c *copy_) keepTail(ctx context.Context) error {
	c.end = c.dst.Size
	if c.dst.Old == nil {
		return nil
	}
	c.end = roundUp(c.src.Size, c.info.Unit, c.dst.Size)
	length := c.end - c.src.Size
	if length == 0 {
		return nil
	}
	var tail []Extent // mapped before anything changes
	most := int(c.info.Unit/sector) + 1
	err := c.dst.Old.Map(ctx, c.src.Size, length, func(batch []Extent) bool {
		tail = append(tail, batch...)
		return len(tail) <= most
	})
	if err == nil && len(tail) > most {
		err = fmt.Errorf("more than %d extents in the target's unit at guest offset %#x: %w", most, c.src.Size, sdk.ErrCorrupt)
	}
	if err != nil {
		return err
	}
	for i := range tail {
		tail[i].Offset -= c.src.Size
	}
	c.src = Concat(c.src, &Source{Size: length, Unit: c.src.Unit, Map: func(_ context.Context, off, length int64, yield func([]Extent) bool) error {
		yield(tail) // all of it: Concat asks for no less
		return nil
	}})
	return nil
}

func (c *copy_) stats() Stats {
	return Stats{Written: c.written.Load(), Cloned: c.cloned.Load(), Encoded: c.encoded.Load()}
}

// fail ends the work with its first error.
func (c *copy_) fail(err error) { c.cancel(err) }

func (c *copy_) progress(n int64) {
	if done := c.done.Add(n); c.opts.Progress != nil && n > 0 {
		c.opts.Progress(done, c.end)
	}
}

// Room for what a format stores beside the data: beyond the disk's size as much
// again, and these.
const (
	roomUnits = 4
	roomBytes = 64 << 20
)

// bounds decides how far into the files a target may place data: no format
// needs more than this, and a file of exabytes is no image.
func (c *copy_) bounds() error {
	add := func(a, b int64) int64 {
		if b > math.MaxInt64-a {
			return math.MaxInt64
		}
		return a + b
	}
	room := add(add(c.dst.Size, c.dst.Size), roomBytes)
	for range roomUnits {
		room = add(room, c.info.Unit)
	}
	for _, f := range c.dst.Files {
		length, err := f.Seek(0, io.SeekEnd) // of devices too
		if err != nil {
			return err
		}
		c.limits = append(c.limits, add(length, room))
		c.reserves = append(c.reserves, c.dst.Fresh && reserves(f))
	}
	return nil
}

// memory decides on the size of cells and makes the pool of their memory.
func (c *copy_) memory() error {
	c.cell = cellSize
	for _, unit := range []int64{c.src.Unit, c.info.Unit} {
		if unit > c.cell && unit <= maxCell {
			c.cell = unit
		}
	}
	if c.encode && c.info.Unit > maxEncoded {
		return fmt.Errorf("the target encodes units of %d bytes: %w", c.info.Unit, sdk.ErrTooBig)
	}
	if c.encode || c.info.Unit <= maxCell {
		// Cells are whole units.
		c.cell = (max(c.cell, c.info.Unit) + c.info.Unit - 1) / c.info.Unit * c.info.Unit
	} else if c.big = c.explode || !c.dst.Fresh; c.big && c.info.Unit%c.cell != 0 {
		return fmt.Errorf("the target has units of %d bytes: %w", c.info.Unit, sdk.ErrUnsupported)
	}
	n := int(max(inFlight/c.cell, 2))
	c.pools = newWindowPools(max(n/2, 2), c.cell)
	c.reader.scratch = newWindowPools(2, c.cell)
	if c.encode {
		if we, ok := c.dst.Writer.(client.WindowEncoder); ok {
			c.window = we
			var err error
			c.plain, err = newWindowPool(we, n, c.cell)
			return err
		}
	}
	c.plain = newPool(n, c.cell)
	return nil
}

func (c *copy_) release() {
	c.pools.close()
	c.reader.scratch.close()
	_ = c.plain.close() // memory that goes with the process anyway
}

// slotFor waits for memory for the pieces: in the window of their decoder
// where there is one, unless the encoder's must be used.
func (c *copy_) slotFor(pieces []Extent) (*slot, error) {
	if c.window == nil {
		for i := range pieces {
			if wd, ok := pieces[i].Decoder.(client.WindowDecoder); ok && pieces[i].Kind == Encoded {
				return c.pools.get(c.ctx, wd)
			}
		}
	}
	return c.plain.get(c.ctx)
}

// plan cuts the source into steps.
func (c *copy_) plan() error {
	var base *cursor
	if c.opts.Base != nil {
		base = c.opts.Base.walk(c.ctx)
		defer base.stop()
	}
	p := &planner{copy_: c, base: base}
	if c.src.Size > 0 {
		var failed error
		err := c.src.Map(c.ctx, 0, c.src.Size, func(batch []Extent) bool {
			for i := range batch {
				if failed = p.add(batch[i]); failed != nil {
					return false
				}
			}
			return true
		})
		if failed != nil {
			return failed
		}
		if err != nil {
			return err
		}
	}
	return p.end()
}

// planner gathers extents into steps.
type planner struct {
	*copy_
	base *cursor
	ids  fileIDs
	cur  *step // the cell being gathered
	next int64 // where the first cell lies that has no step yet
	run  *step // clones being gathered

	group    []*step // cells of the unit being gathered, where units are big
	groupOff int64
}

// add takes the next extent of the source.
func (p *planner) add(e Extent) error {
	if e.Length <= 0 || e.Offset < 0 || e.Offset > p.src.Size-e.Length {
		return fmt.Errorf("extent of %d bytes at guest offset %#x of a disk of %d: %w", e.Length, e.Offset, p.src.Size, sdk.ErrCorrupt)
	}
	if e.Kind == Zero {
		return nil // what no step covers is zeros
	}
	for {
		off := e.Offset / p.cell * p.cell
		if p.cur == nil || p.cur.off != off {
			if err := p.flush(); err != nil {
				return err
			}
			p.cur = &step{off: off, length: min(p.cell, p.copy_.end-off)}
		}
		n := min(e.Length, off+p.cell-e.Offset)
		part := e
		part.Length = n
		if len(p.cur.pieces) >= p.mostPieces() {
			return fmt.Errorf("more than %d extents in %d bytes at guest offset %#x: %w", len(p.cur.pieces), p.cell, off, sdk.ErrCorrupt)
		}
		p.cur.pieces = append(p.cur.pieces, part)
		if n == e.Length {
			return nil
		}
		e = e.from(n)
	}
}

// mostPieces bounds the extents of a cell, and so the memory that a plugin can
// make us use: no format maps less than a sector, but several sources may meet
// in a cell.
func (c *copy_) mostPieces() int { return int(c.cell/sector) + 1024 }

// flush makes a step of the current cell.
func (p *planner) flush() error {
	s := p.cur
	if s == nil {
		return nil
	}
	p.cur = nil
	if p.big {
		unit := s.off / p.info.Unit * p.info.Unit
		if len(p.group) > 0 && p.groupOff != unit {
			if err := p.flushGroup(); err != nil {
				return err
			}
		}
		p.group, p.groupOff = append(p.group, s), unit
		return nil
	}
	if err := p.gap(s.off); err != nil {
		return err
	}
	p.next = s.off + s.length
	if p.base != nil {
		skip, err := p.against(s)
		if skip || err != nil {
			p.progress(s.length)
			return err
		}
	}
	switch p.clones.may(s.pieces) {
	case cloneYes:
		r := p.run
		if r != nil && (r.off+r.length != s.off || s.off+s.length-r.off > cloneSize || len(r.pieces) >= clonePieces) {
			if err := p.flushRun(); err != nil {
				return err
			}
			r = nil
		}
		if r == nil {
			s.kind = stepClone
			p.run = s
			return nil
		}
		r.length += s.length
		for _, e := range s.pieces {
			last := &r.pieces[len(r.pieces)-1]
			if last.File == e.File && last.Offset+last.Length == e.Offset && last.HostOffset+last.Length == e.HostOffset {
				last.Length += e.Length
			} else {
				r.pieces = append(r.pieces, e)
			}
		}
		return nil
	case cloneUnknown:
		if err := p.flushRun(); err != nil {
			return err
		}
		s.kind, s.probe = stepClone, make(chan struct{})
		if err := p.emit(s); err != nil {
			return err
		}
		select {
		case <-s.probe:
			return nil
		case <-p.ctx.Done():
			return p.ctx.Err()
		}
	}
	return p.emitRead(s)
}

// flushGroup makes steps of all cells of a big unit, of which some hold data.
func (p *planner) flushGroup() error {
	group := p.group
	p.group = nil
	if len(group) == 0 {
		return nil
	}
	if err := p.gap(p.groupOff); err != nil {
		return err
	}
	end := p.copy_.end
	if end-p.groupOff > p.info.Unit {
		end = p.groupOff + p.info.Unit
	}
	p.next = end
	var cells []*step
	same := p.base != nil
	for off := p.groupOff; off < end; off += p.cell {
		s := &step{off: off, length: min(p.cell, end-off)}
		if len(group) > 0 && group[0].off == off {
			s, group = group[0], group[1:]
		}
		s.whole = true
		if p.base != nil {
			equal, err := p.against(s)
			if err != nil {
				return err
			}
			same = same && equal
			s.base = nil // the content decides nothing
		}
		cells = append(cells, s)
	}
	if same {
		p.progress(end - p.groupOff)
		return nil
	}
	for _, s := range cells {
		if err := p.emitRead(s); err != nil {
			return err
		}
	}
	return nil
}

func (p *planner) flushRun() error {
	r := p.run
	p.run = nil
	if r == nil {
		return nil
	}
	return p.emit(r)
}

// gap deals with the zeros before off.
func (p *planner) gap(off int64) error {
	if off <= p.next {
		return nil
	}
	from := p.next
	p.next = off
	switch {
	case p.opts.Sparse == 0:
		for at := from; at < off; at += p.cell {
			if err := p.emitRead(&step{off: at, length: min(p.cell, off-at)}); err != nil {
				return err
			}
		}
		return nil
	case p.base != nil:
		return p.zeroAgainst(from, off)
	case p.explode:
		return p.emitZero(from, off)
	}
	p.progress(off - from)
	return nil
}

func (p *planner) emitZero(from, to int64) error {
	if err := p.flushRun(); err != nil {
		return err
	}
	return p.emit(&step{kind: stepZero, off: from, length: to - from})
}

// against finds the base's extents for a step, and reports whether both are
// the same stored bytes, or zeros, all over.
func (p *planner) against(s *step) (bool, error) {
	same := true
	i := 0
	for pos := s.off; pos < s.off+s.length; {
		b, err := p.base.at(pos)
		if err != nil {
			return false, err
		}
		b.Length = min(b.Length, s.off+s.length-pos)
		if len(s.base) >= p.mostPieces() {
			return false, fmt.Errorf("more than %d extents in %d bytes of the backing file at guest offset %#x: %w", len(s.base), s.length, s.off, sdk.ErrCorrupt)
		}
		s.base = append(s.base, b)
		// Step through the pieces under b.
		for end := pos + b.Length; pos < end && same; {
			for i < len(s.pieces) && s.pieces[i].Offset+s.pieces[i].Length <= pos {
				i++
			}
			rest := b.from(pos - b.Offset)
			switch {
			case i == len(s.pieces):
				same, pos = rest.Kind == Zero, end
			case s.pieces[i].Offset > pos:
				same, pos = rest.Kind == Zero, min(end, s.pieces[i].Offset)
			default:
				e := s.pieces[i].from(pos - s.pieces[i].Offset)
				same, pos = e.sameBytes(&rest, &p.ids), min(end, e.Offset+e.Length)
			}
		}
		pos = b.Offset + b.Length
	}
	return same, nil
}

// zeroAgainst makes zeros of [from, to) where the base has something else.
func (p *planner) zeroAgainst(from, to int64) error {
	var runs []sdk.Run
	for pos := from; pos < to; {
		b, err := p.base.at(pos)
		if err != nil {
			return err
		}
		end := min(to, pos+b.Length)
		if b.Kind != Zero {
			// Whole units; what else they hold is zeros too.
			first := max(pos/p.info.Unit*p.info.Unit, from)
			runs = join(runs, first, roundUp(end, p.info.Unit, to)-first)
		}
		pos = end
		if len(runs) >= clonePieces || pos >= to {
			for _, r := range runs {
				if err := p.emitZero(r.Offset, r.Offset+r.Length); err != nil {
					return err
				}
			}
			runs = runs[:0]
		}
	}
	p.progress(to - from)
	return nil
}

// end flushes what is left, and deals with the zeros up to the target's end.
func (p *planner) end() error {
	if err := p.flush(); err != nil {
		return err
	}
	if err := p.flushGroup(); err != nil {
		return err
	}
	if err := p.gap(p.copy_.end); err != nil {
		return err
	}
	return p.flushRun()
}

// emit hands a step to the sequencer.
func (c *copy_) emit(s *step) error {
	if s.ready == nil {
		s.ready = closed
	}
	select {
	case c.steps <- s:
		return nil
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
}

var closed = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// emitRead hands over a step whose content is read meanwhile.
func (p *planner) emitRead(s *step) error {
	if err := p.flushRun(); err != nil {
		return err
	}
	if s.ahead = p.ahead.on.Load() && !hasEncoded(s.pieces); s.ahead {
		return p.emit(s)
	}
	var err error
	if s.slot, err = p.slotFor(s.pieces); err != nil {
		return err
	}
	var base *slot
	if s.base != nil {
		if base, err = p.slotFor(s.base); err != nil {
			return err
		}
	}
	s.ready = make(chan struct{})
	if err := p.emit(s); err != nil {
		return err
	}
	go func() {
		defer close(s.ready)
		if err := p.read(s, base); err != nil {
			p.fail(err)
		}
	}()
	return nil
}

// read reads a step and finds out what of it must be written.
func (c *copy_) read(s *step, base *slot) error {
	if err := c.reader.read(c.ctx, s.slot, s.off, s.length, s.pieces); err != nil {
		return err
	}
	return c.examine(s, base)
}

// examine finds out what must be written of a step that has been read.
func (c *copy_) examine(s *step, base *slot) error {
	buf := s.slot.mem[:s.length]
	switch {
	case c.opts.Sparse == 0 || s.whole:
		s.data = []sdk.Run{{Offset: s.off, Length: s.length}}
	case base != nil:
		defer base.put()
		if err := c.reader.read(c.ctx, base, s.off, s.length, s.base); err != nil {
			return err
		}
		s.data, s.zeros = differing(buf, base.mem[:s.length], s.off, c.info.Unit)
	default:
		// What the map calls zeros is none of Sparse's business.
		s.data = s.data[:0]
		for _, r := range c.occupied(s) {
			s.data = nonzero(s.data, buf[r.Offset-s.off:][:r.Length], r.Offset, min(c.opts.Sparse, c.cell))
		}
	}
	return nil
}

// units grows runs to whole units, cut by the end of the disk.
func (c *copy_) units(runs []sdk.Run) []sdk.Run {
	var out []sdk.Run
	for _, r := range runs {
		first := r.Offset / c.info.Unit * c.info.Unit
		out = join(out, first, roundUp(r.Offset+r.Length, c.info.Unit, c.dst.Size)-first)
	}
	return out
}

// roundUp returns n rounded up to a multiple of unit, at most limit.
func roundUp(n, unit, limit int64) int64 {
	rest := n % unit
	if rest == 0 {
		return n
	}
	if up := unit - rest; up < limit-n {
		return n + up
	}
	return limit
}

// sequence takes the steps in order and gives them their places.
func (c *copy_) sequence() {
	var held *step // read from c.steps, not yet part of a batch
	for {
		s := held
		held = nil
		if s == nil {
			var ok bool
			if s, ok = <-c.steps; !ok {
				return
			}
		}
		<-s.ready
		if c.ctx.Err() != nil {
			c.drain(s)
			return
		}
		batch := []*step{s}
		// As many more as are ready, so that one call serves them.
		total, most := s.length, c.batchSize()
		if s.ahead {
			most = min(most, aheadSize)
		}
		for s.kind != stepZero && s.probe == nil && total < most {
			next, ok := c.ready()
			if !ok {
				break
			}
			if next.kind == stepZero || next.probe != nil || !isClosed(next.ready) {
				held = next
				break
			}
			batch = append(batch, next)
			total += next.length
		}
		if c.ctx.Err() != nil {
			// A failed read has closed ready without filling the step.
			for _, s := range batch {
				c.finish(s)
			}
			continue
		}
		var err error
		switch {
		case s.kind == stepZero:
			err = c.zero(s)
		case c.encode:
			err = c.encodeBatch(batch)
		default:
			err = c.placeBatch(batch)
		}
		if err != nil {
			c.fail(err)
		}
	}
}

// batchSize is how much is placed, or encoded, by one call: half of the memory,
// so that the other half can be filled meanwhile. How many steps are ready
// depends on timing, and where a plugin puts its tables on what it is asked for
// at once: a reproducible output is placed step by step.
func (c *copy_) batchSize() int64 {
	switch {
	case c.opts.Reproducible:
		return 0
	case c.encode:
		return inFlight / 3
	}
	return cloneSize
}

// ready returns the next step if there is one already.
func (c *copy_) ready() (*step, bool) {
	select {
	case s, ok := <-c.steps:
		return s, ok
	default:
		return nil, false
	}
}

func isClosed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// drain lets go of what is left after an error.
func (c *copy_) drain(s *step) {
	c.finish(s)
	for s := range c.steps {
		<-s.ready
		c.finish(s)
	}
}

// finish gives back what a step holds.
func (c *copy_) finish(s *step) {
	if s.slot != nil {
		s.slot.put()
		s.slot = nil
	}
	if s.probe != nil {
		close(s.probe)
	}
}

// zero makes zeros of a range of whole units.
func (c *copy_) zero(s *step) error {
	defer c.finish(s)
	if c.opts.Base == nil {
		c.progress(s.length)
	}
	return c.dst.Writer.Zero(c.ctx, []sdk.Run{{Offset: s.off, Length: s.length}})
}

// placeBatch finds places for what the steps hold and begins to write it.
func (c *copy_) placeBatch(batch []*step) error {
	var want, zero []sdk.Run
	for _, s := range batch {
		if s.kind == stepClone || s.ahead {
			s.data = c.occupied(s)
		}
		units := c.units(s.data)
		c.ahead.placed(c, s, units)
		for _, u := range units {
			want = join(want, u.Offset, u.Length)
		}
		zero = append(zero, c.without(s, units)...)
		if !c.dst.Fresh && !s.ahead {
			s.data = within(units, s.off, s.length)
		}
	}
	places, err := c.place(want, zero)
	if err != nil {
		for _, s := range batch {
			c.finish(s)
		}
		return err
	}
	for _, s := range batch {
		s.places = overlap(places, s.off, s.length)
		if s.ahead {
			c.moves <- s
			continue
		}
		c.writes.Go(func() {
			defer c.finish(s)
			if err := c.write(s); err != nil {
				c.fail(err)
				return
			}
			c.progress(s.length)
		})
	}
	return nil
}

// occupied returns the parts of a step that are not known to be zeros.
func (c *copy_) occupied(s *step) []sdk.Run {
	if c.opts.Sparse == 0 {
		return []sdk.Run{{Offset: s.off, Length: s.length}}
	}
	var out []sdk.Run
	for i := range s.pieces {
		out = join(out, s.pieces[i].Offset, s.pieces[i].Length)
	}
	return out
}

// without returns the whole units of a step that must be made zeros, beside
// those that are written.
func (c *copy_) without(s *step, units []sdk.Run) []sdk.Run {
	if c.opts.Base != nil || !c.explode || c.opts.Sparse == 0 || c.big {
		return s.zeros
	}
	var out []sdk.Run
	pos := s.off
	for _, u := range units {
		if u.Offset > pos {
			out = append(out, sdk.Run{Offset: pos, Length: u.Offset - pos})
		}
		pos = u.Offset + u.Length
	}
	if end := s.off + s.length; end > pos {
		out = append(out, sdk.Run{Offset: pos, Length: end - pos})
	}
	return out
}

// place asks for places, and makes zeros, in the order of the disk. The places
// of units that an earlier step began are kept.
func (c *copy_) place(want, zero []sdk.Run) ([]sdk.Placement, error) {
	places := append([]sdk.Placement(nil), c.carry...)
	if n := len(c.carry); n > 0 && len(want) > 0 {
		if end := c.carry[n-1].Offset + c.carry[n-1].Length; want[0].Offset < end {
			if cut := end - want[0].Offset; cut >= want[0].Length {
				want = want[1:]
			} else {
				want[0].Offset, want[0].Length = end, want[0].Length-cut
			}
		}
	}
	for len(want) > 0 || len(zero) > 0 {
		n := len(want)
		if len(zero) > 0 {
			for n = 0; n < len(want) && want[n].Offset < zero[0].Offset; n++ {
			}
		}
		if n > 0 {
			if err := c.giveBack(c.ahead.take()); err != nil {
				return nil, err
			}
			got, err := c.ask(want[:n])
			if err != nil {
				return nil, err
			}
			places = append(places, got...)
			want = want[n:]
		}
		n = len(zero)
		if len(want) > 0 {
			for n = 0; n < len(zero) && zero[n].Offset < want[0].Offset; n++ {
			}
		}
		if n > 0 {
			if err := c.dst.Writer.Zero(c.ctx, zero[:n]); err != nil {
				return nil, err
			}
			zero = zero[n:]
		}
	}
	// The next step may be in the last unit too.
	c.carry = c.carry[:0]
	if n := len(places); n > 0 && c.info.Unit > c.cell {
		last := places[n-1]
		from := (last.Offset + last.Length - 1) / c.info.Unit * c.info.Unit
		for _, p := range places {
			if p.Offset+p.Length > from {
				c.carry = append(c.carry, p)
			}
		}
	}
	return places, nil
}

// ask asks the target for places.
func (c *copy_) ask(runs []sdk.Run) ([]sdk.Placement, error) {
	if c.info.InPlace {
		places := make([]sdk.Placement, len(runs))
		for i, r := range runs {
			places[i] = sdk.Placement{Offset: r.Offset, Length: r.Length, HostOffset: r.Offset}
		}
		return places, nil
	}
	places, err := c.dst.Writer.Place(c.ctx, runs)
	if err != nil {
		return nil, err
	}
	return places, c.covers(runs, places)
}

// covers checks that a plugin has placed just what it was asked to place, in
// files that it has.
func (c *copy_) covers(runs []sdk.Run, places []sdk.Placement) error {
	i := 0
	for _, r := range runs {
		for pos := r.Offset; pos < r.Offset+r.Length; i++ {
			if i == len(places) {
				return fmt.Errorf("target placed less than it was asked to, up to guest offset %#x: %w", pos, sdk.ErrCorrupt)
			}
			p := places[i]
			if p.Offset != pos || p.Length <= 0 || p.Length > r.Offset+r.Length-pos || p.File < 0 || p.File >= len(c.dst.Files) || p.HostOffset < 0 || p.HostOffset > c.limits[p.File]-p.Length {
				return fmt.Errorf("target placed guest offset %#x at %+v: %w", pos, p, sdk.ErrCorrupt)
			}
			pos += p.Length
		}
	}
	if i != len(places) {
		return fmt.Errorf("target placed more than it was asked to: %w", sdk.ErrCorrupt)
	}
	return nil
}

// overlap returns the placements that touch a range.
func overlap(places []sdk.Placement, off, length int64) []sdk.Placement {
	for len(places) > 0 && places[0].Offset+places[0].Length <= off {
		places = places[1:]
	}
	n := 0
	for n < len(places) && places[n].Offset < off+length {
		n++
	}
	return places[:n]
}

// within cuts runs to a range.
func within(runs []sdk.Run, off, length int64) []sdk.Run {
	var out []sdk.Run
	for _, r := range runs {
		from, to := max(r.Offset, off), min(r.Offset+r.Length, off+length)
		if from < to {
			out = append(out, sdk.Run{Offset: from, Length: to - from})
		}
	}
	return out
}

// each calls do with the parts of a run and where they go.
func each(r sdk.Run, places []sdk.Placement, do func(off, length int64, p *sdk.Placement, host int64) error) error {
	for i := range places {
		p := &places[i]
		from, to := max(r.Offset, p.Offset), min(r.Offset+r.Length, p.Offset+p.Length)
		if from >= to {
			if p.Offset >= r.Offset+r.Length {
				break
			}
			continue
		}
		if err := do(from, to-from, p, p.HostOffset+from-p.Offset); err != nil {
			return err
		}
	}
	return nil
}

// write puts what a step holds in its places.
func (c *copy_) write(s *step) error {
	if s.kind == stepClone {
		return c.clone(s)
	}
	c.reader.work <- struct{}{}
	defer func() { <-c.reader.work }()
	return c.put(s)
}

// put is write of what was read, for a caller who has one of the places at work.
func (c *copy_) put(s *step) error {
	places := s.places
	for _, r := range s.data {
		if err := c.limit.wait(c.ctx, r.Length); err != nil {
			return err
		}
		for len(places) > 0 && places[0].Offset+places[0].Length <= r.Offset {
			places = places[1:]
		}
		err := each(r, places, func(off, length int64, p *sdk.Placement, host int64) error {
			return c.pwrite(p.File, s.slot.mem[off-s.off:][:length], host, off)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// pwrite writes b, which lies at a guest offset, to host in a file of the target.
func (c *copy_) pwrite(file int, b []byte, host, guest int64) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	f := c.dst.Files[file]
	if c.reserves[file] && len(b) >= worthReserving {
		reserve(f, host, int64(len(b)))
	}
	if _, err := f.WriteAt(b, host); err != nil {
		return fmt.Errorf("error while writing at byte %d: %w", guest, cause(err))
	}
	c.written.Add(int64(len(b)))
	return nil
}

// encodeBatch gives the steps' units to the encoder.
func (c *copy_) encodeBatch(batch []*step) error {
	defer func() {
		for _, s := range batch {
			c.progress(s.length)
			c.finish(s)
		}
	}()
	var zero []sdk.Run
	var units []sdk.Unit
	var items []client.EncodeItem
	n := int64(0)
	flush := func() error {
		if n == 0 {
			return nil
		}
		if err := c.limit.wait(c.ctx, n); err != nil {
			return err
		}
		var err error
		if c.window != nil {
			err = c.window.EncodeWindow(c.ctx, batch[0].slot.window, items)
		} else {
			err = c.dst.Writer.Encode(c.ctx, units)
		}
		c.encoded.Add(n)
		units, items, n = units[:0], items[:0], 0
		return err
	}
	for _, s := range batch {
		runs := c.units(s.data)
		zero = c.without(s, runs)
		for _, r := range runs {
			for len(zero) > 0 && zero[0].Offset < r.Offset {
				if err := flush(); err != nil {
					return err
				}
				if err := c.dst.Writer.Zero(c.ctx, zero[:1]); err != nil {
					return err
				}
				zero = zero[1:]
			}
			for off := r.Offset; off < r.Offset+r.Length; off += c.info.Unit {
				length := min(c.info.Unit, r.Offset+r.Length-off)
				at := int(off - s.off)
				if c.window != nil {
					items = append(items, client.EncodeItem{Offset: off, Length: int(length), WindowOffset: s.slot.offset + at})
				} else {
					units = append(units, sdk.Unit{Offset: off, Data: s.slot.mem[at:][:length]})
				}
				n += length
			}
		}
		if len(zero) > 0 {
			if err := flush(); err != nil {
				return err
			}
			if err := c.dst.Writer.Zero(c.ctx, zero); err != nil {
				return err
			}
		}
	}
	return flush()
}

// differing returns the units of b that are not equal to those of base: those
// that hold something, and those of zeros.
func differing(b, base []byte, off, unit int64) (data, zeros []sdk.Run) {
	for pos := int64(0); pos < int64(len(b)); {
		n := min(unit-(off+pos)%unit, int64(len(b))-pos)
		switch part := b[pos : pos+n]; {
		case bytes.Equal(part, base[pos:pos+n]):
		case isZero(part):
			zeros = join(zeros, off+pos, n)
		default:
			data = join(data, off+pos, n)
		}
		pos += n
	}
	return data, zeros
}

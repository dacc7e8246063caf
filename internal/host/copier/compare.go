package copier

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/instar-img/instar/sdk/client"
)

// Difference is the first one between two disks.
type Difference struct {
	Offset int64 // guest offset, of a sector where content differs
	// Status: the content is the same so far, but one disk stores what the
	// other does not (CompareOptions.Strict).
	Status bool
}

// CompareOptions say how to compare.
type CompareOptions struct {
	// Strict takes a range for different too that only one disk stores, or that
	// they store in different ways.
	Strict  bool
	Workers int // 0: 2
	// Progress is told how much of the larger disk is done. It may be called
	// from several goroutines.
	Progress func(done, total int64)
}

// ReadError says which of the compared disks could not be read.
type ReadError struct {
	Disk   int // 0: the first, 1: the second
	Offset int64
	Err    error
}

func (e *ReadError) Error() string {
	return fmt.Sprintf("offset %d of disk %d: %v", e.Offset, e.Disk+1, e.Err)
}
func (e *ReadError) Unwrap() error { return e.Err }

// compareCell is how much is compared at a time: two of them stay in a core's
// cache.
const compareCell = 256 << 10

// pair is a range of both disks.
type pair struct {
	off, length int64
	pieces      [2][]Extent
}

type comparison struct {
	src   [2]*Source
	opts  CompareOptions
	total int64
	cell  int64
	ids   fileIDs

	ctx    context.Context
	cancel context.CancelCauseFunc
	reader *reader
	pools  *windowPools
	work   chan *pair
	// first is where the first difference found so far lies: nothing beyond it
	// matters.
	first  atomic.Int64
	status int64 // where the first difference in status lies
	done   atomic.Int64
}

// Compare returns the first difference between a and b, or nil. Beyond its end
// a disk reads as zeros.
func Compare(ctx context.Context, a, b *Source, opts CompareOptions) (*Difference, error) {
	if opts.Workers <= 0 {
		opts.Workers = defaultWorkers
	}
	c := &comparison{src: [2]*Source{a, b}, opts: opts, total: max(a.Size, b.Size), cell: compareCell}
	for _, s := range c.src {
		if s.Unit > c.cell && s.Unit <= maxCell {
			c.cell = (s.Unit + c.cell - 1) / c.cell * c.cell
		}
	}
	c.first.Store(c.total)
	c.status = c.total
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	defer c.cancel(nil)
	c.reader = newReader(opts.Workers, nil)
	c.reader.scratch = newWindowPools(opts.Workers, c.cell)
	c.pools = newWindowPools(2*opts.Workers, c.cell)
	defer c.reader.scratch.close()
	defer c.pools.close()

	c.work = make(chan *pair, 64)
	var workers sync.WaitGroup
	for range opts.Workers {
		workers.Add(1)
		go func() {
			defer workers.Done()
			c.compare()
		}()
	}
	if err := c.plan(); err != nil {
		c.cancel(err)
	}
	close(c.work)
	workers.Wait()
	if err := context.Cause(c.ctx); err != nil {
		return nil, err
	}
	first := c.first.Load()
	switch {
	case first < c.total && first < c.status:
		return &Difference{Offset: first}, nil
	case c.status < c.total:
		return &Difference{Offset: c.status, Status: true}, nil
	}
	c.progress(c.total - c.done.Load())
	return nil, nil
}

func (c *comparison) progress(n int64) {
	if done := c.done.Add(n); c.opts.Progress != nil && n > 0 {
		c.opts.Progress(done, c.total)
	}
}

// plan walks both maps and hands out what must be read.
func (c *comparison) plan() error {
	var walks [2]*cursor
	for i, s := range c.src {
		walks[i] = s.walk(c.ctx)
		defer walks[i].stop()
	}
	var cur *pair
	flush := func() error {
		if cur == nil {
			return nil
		}
		select {
		case c.work <- cur:
			cur = nil
			return nil
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
	skipped := int64(0)
	for pos := int64(0); pos < c.first.Load(); {
		if err := c.ctx.Err(); err != nil {
			return context.Cause(c.ctx)
		}
		var e [2]Extent
		for i, w := range walks {
			var err error
			if e[i], err = w.at(pos); err != nil {
				return &ReadError{Disk: i, Offset: pos, Err: err}
			}
		}
		n := min(e[0].Length, e[1].Length, c.total-pos)
		if c.opts.Strict && (e[0].Kind != e[1].Kind || e[0].Allocated != e[1].Allocated || e[0].Located != e[1].Located) {
			c.status = pos
			break
		}
		if e[0].Kind == Zero && e[1].Kind == Zero || e[0].sameBytes(&e[1], &c.ids) {
			if skipped += n; skipped >= progressStep {
				c.progress(skipped)
				skipped = 0
			}
			pos += n
			continue
		}
		off := pos / c.cell * c.cell
		if cur != nil && cur.off != off {
			if err := flush(); err != nil {
				return err
			}
		}
		if cur == nil {
			cur = &pair{off: off}
		}
		n = min(n, off+c.cell-pos)
		cur.length = pos + n - off
		for i := range e {
			if e[i].Length = n; e[i].Kind != Zero {
				cur.pieces[i] = append(cur.pieces[i], e[i])
			}
		}
		pos += n
	}
	c.progress(skipped)
	return flush()
}

// progressStep is how much is passed over before progress is told of it.
const progressStep = 64 << 20

// compare takes pairs until there are none.
func (c *comparison) compare() {
	var slots [2]*slot
	for i := range slots {
		slots[i] = &slot{mem: make([]byte, c.cell), pool: &pool{}}
	}
	for p := range c.work {
		if c.ctx.Err() != nil || p.off >= c.first.Load() {
			continue
		}
		at, err := c.differs(p, slots)
		if err != nil {
			c.cancel(err)
			continue
		}
		if at >= 0 {
			for old := c.first.Load(); at < old && !c.first.CompareAndSwap(old, at); old = c.first.Load() {
			}
		}
		read := int64(0)
		for _, e := range p.pieces[0] {
			read += e.Length
		}
		c.progress(read)
	}
}

// differs returns the sector in which a pair differs, or -1.
func (c *comparison) differs(p *pair, plain [2]*slot) (int64, error) {
	slots := plain
	for i := range slots {
		for j := range p.pieces[i] {
			e := &p.pieces[i][j]
			if wd, ok := e.Decoder.(client.WindowDecoder); ok && e.Kind == Encoded {
				s, err := c.pools.get(c.ctx, wd)
				if err != nil {
					return 0, err
				}
				defer s.put()
				slots[i] = s
				break
			}
		}
		if err := c.reader.read(c.ctx, slots[i], p.off, p.length, p.pieces[i]); err != nil {
			return 0, &ReadError{Disk: i, Offset: p.off, Err: err}
		}
	}
	a, b := slots[0].mem[:p.length], slots[1].mem[:p.length]
	if bytes.Equal(a, b) {
		return -1, nil
	}
	for off := int64(0); ; off += sector {
		n := min(off+sector, p.length)
		if !bytes.Equal(a[off:n], b[off:n]) {
			return p.off + off, nil
		}
	}
}

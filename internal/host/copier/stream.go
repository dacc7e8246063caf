package copier

import (
	"context"
	"fmt"
	"io"

	"github.com/instar-img/instar/sdk"
)

// Stream writes the content of src to w, in order, zeros and all. Cells are
// read ahead as far as the memory for them goes.
func Stream(ctx context.Context, src *Source, w io.Writer, opts Options) error {
	c := &copy_{src: src, opts: opts, info: sdk.WriteInfo{Unit: sector}, steps: make(chan *step, 64)}
	workers := opts.Workers
	if workers <= 0 {
		workers = defaultWorkers
	}
	c.reader = newReader(workers, opts.Salvage)
	c.limit.rate = opts.Rate
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	defer c.cancel(nil)
	if err := c.memory(); err != nil {
		return err
	}
	defer c.release()
	go func() {
		defer close(c.steps)
		if err := c.cells(); err != nil {
			c.fail(err)
		}
	}()
	zeros := make([]byte, c.cell)
	for s := range c.steps {
		<-s.ready
		if c.ctx.Err() == nil {
			if err := c.writeCell(w, s, zeros); err != nil {
				c.fail(err)
			}
		}
		c.finish(s)
	}
	return context.Cause(c.ctx)
}

// cells makes a step of each cell of the source, in order.
func (c *copy_) cells() error {
	p := &planner{copy_: c}
	walk := c.src.walk(c.ctx)
	defer walk.stop()
	for off := int64(0); off < c.src.Size; off += c.cell {
		s := &step{off: off, length: min(c.cell, c.src.Size-off), ready: closed}
		for pos := off; pos < off+s.length; {
			e, err := walk.at(pos)
			if err != nil {
				return err
			}
			e.Length = min(e.Length, off+s.length-pos)
			if e.Kind != Zero {
				s.pieces = append(s.pieces, e)
			}
			pos += e.Length
		}
		if len(s.pieces) > 0 {
			var err error
			if s.slot, err = c.slotFor(s.pieces); err != nil {
				return err
			}
			s.ready = make(chan struct{})
		}
		if err := p.emit(s); err != nil {
			return err
		}
		if s.slot != nil {
			go func() {
				defer close(s.ready)
				if err := c.reader.read(c.ctx, s.slot, s.off, s.length, s.pieces); err != nil {
					c.fail(err)
				}
			}()
		}
	}
	return nil
}

// writeCell writes what a step has read.
func (c *copy_) writeCell(w io.Writer, s *step, zeros []byte) error {
	if err := c.limit.wait(c.ctx, s.length); err != nil {
		return err
	}
	b := zeros[:s.length]
	if s.slot != nil {
		b = s.slot.mem[:s.length]
	}
	if _, err := w.Write(b); err != nil {
		return fmt.Errorf("error while writing at byte %d: %w", s.off, err)
	}
	if done := c.done.Add(s.length); c.opts.Progress != nil {
		c.opts.Progress(done, c.src.Size)
	}
	return nil
}

// Pad is s with zeros after it up to size.
func Pad(s *Source, size int64) *Source {
	if size <= s.Size {
		return s
	}
	return &Source{Size: size, Unit: s.Unit, Map: func(ctx context.Context, off, length int64, yield func([]Extent) bool) error {
		end := off + length
		if off < s.Size {
			stopped := false
			err := s.Map(ctx, off, min(end, s.Size)-off, func(b []Extent) bool {
				stopped = !yield(b)
				return !stopped
			})
			if err != nil || stopped {
				return err
			}
			off = s.Size
		}
		if off < end {
			yield([]Extent{{Offset: off, Length: end - off}})
		}
		return nil
	}}
}

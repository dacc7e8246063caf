package copier

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/instar-img/instar/sdk/client"
)

// CompareOptions say how to compare.
type CompareOptions struct {
	// Strict wants equal sizes, and each range stored in the same way.
	Strict bool
	// Progress is told how much of the disks is done. It may be called from
	// several goroutines.
	Progress func(done, total int64)
}

// Verdict is what Compare found.
type Verdict uint8

const (
	Identical        Verdict = iota // beyond the end of the shorter one the other is all zeros
	DifferentSize                   // Strict: nothing else was looked at
	DifferentStatus                 // Strict: one stores a range otherwise than the other
	DifferentContent                // at Comparison.Offset, rounded down to a sector
)

// Comparison is the outcome of Compare.
type Comparison struct {
	Verdict Verdict
	Offset  int64 // guest offset of the first difference
}

// CompareError is a failure to read one of the two disks.
type CompareError struct {
	Second bool
	Map    bool // where its bytes lie could not be told
	Offset int64
	Err    error
}

func (e *CompareError) Error() string { return fmt.Sprintf("guest offset %d: %v", e.Offset, e.Err) }
func (e *CompareError) Unwrap() error { return e.Err }

// bare is err without the place that a reader puts before it: CompareError says
// that itself.
func bare(err error) error {
	if inner := errors.Unwrap(err); inner != nil && strings.HasPrefix(err.Error(), "error while reading at byte ") {
		return inner
	}
	return err
}

const (
	// compareSize is how much of each disk is compared at a time.
	compareSize = 1 << 20
	// compareStep is how much of it is looked at in one go: two such buffers
	// stay in a core's cache.
	compareStep = 1 << 20
	// comparePieces bounds the extents of one step.
	comparePieces = 4096
)

// span is a range of both disks whose bytes must be looked at.
type span struct {
	off, length int64
	looked      int64       // bytes of it that must be looked at
	sides       [2][]Extent // not zero, ascending; zeros between them
}

// Compare compares two disks. Ranges that both maps call zero, and those that
// are the same bytes of the same file, are not read. It stops at the first
// difference. Errors of reading are *CompareError.
func Compare(ctx context.Context, a, b *Source, opts CompareOptions) (Comparison, error) {
	if opts.Strict && a.Size != b.Size {
		return Comparison{Verdict: DifferentSize}, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &comparison{
		total: max(a.Size, b.Size), opts: opts, spans: make(chan *span, 2*defaultWorkers),
		reader: newReader(defaultWorkers, nil), cell: compareSize,
	}
	for _, s := range []*Source{a, b} {
		if s.Unit > c.cell && s.Unit <= maxCell {
			c.cell = s.Unit
		}
	}
	c.reader.scratch = newWindowPools(2, c.cell)
	defer c.reader.scratch.close()
	for i := range c.pools {
		c.pools[i] = sidePools{plain: newPool(defaultWorkers, c.cell), windows: newWindowPools(defaultWorkers, c.cell)}
		defer c.pools[i].windows.close()
	}
	var workers sync.WaitGroup
	for range defaultWorkers {
		workers.Go(func() {
			for s := range c.spans {
				c.compare(ctx, s)
			}
		})
	}
	err := c.plan(ctx, a, b)
	close(c.spans)
	workers.Wait()
	if f := c.found; f != nil {
		return f.result, f.err
	}
	if err == nil {
		err = ctx.Err() // the workers have left out what came after
	}
	return Comparison{}, err
}

// comparison is a Compare under way.
type comparison struct {
	total  int64
	opts   CompareOptions
	spans  chan *span
	cell   int64 // the grid on which spans lie
	reader *reader
	pools  [2]sidePools
	files  fileIDs

	mu    sync.Mutex
	done  int64
	found *finding
}

// sidePools is the memory for one of the disks: a worker holds at most one slot
// of each side.
type sidePools struct {
	plain   *pool
	windows *windowPools
}

// finding ends a comparison. Of several the one at the lowest offset counts:
// all before it has been given to the workers.
type finding struct {
	off    int64
	result Comparison
	err    error
}

func (c *comparison) find(f finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.found == nil || f.off < c.found.off {
		c.found = &f
	}
}

// before reports whether a range can still matter.
func (c *comparison) before(off int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.found == nil || off < c.found.off
}

func (c *comparison) progress(n int64) {
	c.mu.Lock()
	c.done += n
	done := c.done
	c.mu.Unlock()
	if c.opts.Progress != nil && n > 0 {
		c.opts.Progress(done, c.total)
	}
}

// plan walks both maps side by side and gives what must be read to the workers.
func (c *comparison) plan(ctx context.Context, a, b *Source) error {
	cursors := [2]*cursor{a.walk(ctx), b.walk(ctx)}
	for _, cur := range cursors {
		defer cur.stop()
	}
	var s *span
	flush := func() error {
		if s == nil {
			return nil
		}
		next := s
		s = nil
		select {
		case c.spans <- next:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	skipped := int64(0) // not yet told of
	for pos := int64(0); pos < c.total && c.before(pos); {
		var e [2]Extent
		for i, cur := range cursors {
			var err error
			if e[i], err = cur.at(pos); err != nil {
				if ctx.Err() == nil {
					c.find(finding{off: pos, err: &CompareError{Second: i == 1, Map: true, Offset: pos, Err: err}})
				}
				return errors.Join(ctx.Err(), flush())
			}
		}
		n := min(e[0].Length, e[1].Length, c.total-pos)
		if c.opts.Strict && e[0].status() != e[1].status() {
			c.find(finding{off: pos, result: Comparison{Verdict: DifferentStatus, Offset: pos}})
			break
		}
		if e[0].Kind == Zero && e[1].Kind == Zero || e[0].sameBytes(&e[1], &c.files) {
			pos += n
			if skipped += n; skipped >= c.total/256 {
				c.progress(skipped)
				skipped = 0
			}
			continue
		}
		if s != nil && (pos/c.cell != s.off/c.cell || len(s.sides[0])+len(s.sides[1]) >= comparePieces) {
			if err := flush(); err != nil {
				return err
			}
		}
		if s == nil {
			s = &span{off: pos / sector * sector}
		}
		n = min(n, c.cell-pos%c.cell)
		for i := range e {
			if e[i].Kind != Zero {
				e[i].Length = n
				s.sides[i] = append(s.sides[i], e[i])
			}
		}
		// What is passed over inside a span is in neither list, and so equal.
		pos += n
		s.length = pos - s.off
		s.looked += n
	}
	if err := flush(); err != nil {
		return err
	}
	c.progress(skipped)
	return nil
}

// compare looks at the bytes of a span: where none are encoded a cacheful at a
// time.
func (c *comparison) compare(ctx context.Context, s *span) {
	step := int64(compareStep)
	for i := range s.sides {
		if hasEncoded(s.sides[i]) {
			step = s.length
		}
	}
	for off := s.off; off < s.off+s.length; off += step {
		if !c.before(off) || !c.compareStep(ctx, s, off, min(step, s.off+s.length-off)) {
			return
		}
	}
	c.progress(s.looked)
}

// compareStep compares a part of a span, and reports whether it is equal.
func (c *comparison) compareStep(ctx context.Context, s *span, off, length int64) bool {
	var data [2][]byte
	for i := range s.sides {
		pieces := cut(s.sides[i], off, length)
		if len(pieces) == 0 {
			continue
		}
		slot, err := c.pools[i].get(ctx, pieces)
		if err == nil {
			defer slot.put()
			err = c.reader.read(ctx, slot, off, length, pieces)
		}
		if err != nil {
			if ctx.Err() == nil {
				c.find(finding{off: off, err: &CompareError{Second: i == 1, Offset: pieces[0].Offset, Err: bare(err)}})
			}
			return false
		}
		data[i] = slot.mem[:length]
	}
	if data[0] == nil && data[1] == nil {
		return true
	}
	if at := firstDifference(data[0], data[1]); at >= 0 {
		at := off + int64(at)
		c.find(finding{off: at, result: Comparison{Verdict: DifferentContent, Offset: at}})
		return false
	}
	return true
}

func hasEncoded(pieces []Extent) bool {
	for i := range pieces {
		if pieces[i].Kind == Encoded {
			return true
		}
	}
	return false
}

// cut returns the parts of pieces that lie in a range.
func cut(pieces []Extent, off, length int64) []Extent {
	var out []Extent
	for _, e := range pieces {
		from, to := max(e.Offset, off), min(e.Offset+e.Length, off+length)
		if from < to {
			e = e.from(from - e.Offset)
			e.Length = to - from
			out = append(out, e)
		}
	}
	return out
}

// get returns memory for pieces: shared with their decoder, where they have one.
func (p *sidePools) get(ctx context.Context, pieces []Extent) (*slot, error) {
	for i := range pieces {
		if d, ok := pieces[i].Decoder.(client.WindowDecoder); ok && pieces[i].Kind == Encoded {
			return p.windows.get(ctx, d)
		}
	}
	return p.plain.get(ctx)
}

// firstDifference returns the offset of the first sector in which a and b
// differ, -1 where there is none. A nil slice stands for zeros.
func firstDifference(a, b []byte) int {
	switch {
	case a == nil:
		a, b = b, nil
		fallthrough
	case b == nil:
		if isZero(a) {
			return -1
		}
	case bytes.Equal(a, b):
		return -1
	}
	for at := 0; at < len(a); at += sector {
		end := min(at+sector, len(a))
		if b == nil && !isZero(a[at:end]) || b != nil && !bytes.Equal(a[at:end], b[at:end]) {
			return at
		}
	}
	return -1
}

// status is what Strict compares of an extent.
type status struct {
	kind               Kind
	allocated, located bool
	data               bool
}

func (e *Extent) status() status {
	return status{kind: e.Kind, allocated: e.Allocated, located: e.Located, data: e.Read}
}

package copier

import (
	"os"
	"sync"

	"github.com/instar-img/instar/sdk"
)

const (
	// cloneAlign is the block size to which shared ranges are aligned: that of
	// the file systems that can share.
	cloneAlign = 4096
	// worthSharing is the mean length of runs from which sharing them is
	// faster than copying.
	worthSharing = 32 << 10
)

// cloner knows which files can share their blocks with the target.
type cloner struct {
	off   bool
	any   bool // the file system copies what it cannot share
	mu    sync.Mutex
	works map[*os.File]bool
}

type cloneAnswer uint8

const (
	cloneNo cloneAnswer = iota
	cloneYes
	cloneUnknown // nobody has tried
)

// may reports whether the pieces of a cell can be shared.
func (c *cloner) may(pieces []Extent) cloneAnswer {
	if c.off || len(pieces) == 0 {
		return cloneNo
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.any {
		for i := range pieces {
			if pieces[i].Kind != Data {
				return cloneNo
			}
		}
		return cloneYes
	}
	answer := cloneYes
	total := int64(0)
	for i := range pieces {
		p := &pieces[i]
		if p.Kind != Data || p.Offset%cloneAlign != 0 || p.HostOffset%cloneAlign != 0 {
			return cloneNo
		}
		works, tried := c.works[p.File]
		if tried && !works {
			return cloneNo
		}
		if !tried {
			answer = cloneUnknown
		}
		total += p.Length
	}
	if total/int64(len(pieces)) < worthSharing {
		return cloneNo
	}
	return answer
}

// hope reports whether f may be tried: nobody has in vain.
func (c *cloner) hope(f *os.File) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	works, tried := c.works[f]
	return works || !tried
}

func (c *cloner) learn(f *os.File, works bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.works == nil {
		c.works = map[*os.File]bool{}
	}
	c.works[f] = works
}

// clone shares the blocks of a step's pieces with their places, and copies
// what cannot be shared.
func (c *copy_) clone(s *step) error {
	for i := range s.pieces {
		p := &s.pieces[i]
		places := overlap(s.places, p.Offset, p.Length)
		err := each(sdk.Run{Offset: p.Offset, Length: p.Length}, places, func(off, length int64, at *sdk.Placement, host int64) error {
			part := p.from(off - p.Offset)
			part.Length = length
			return c.share(part, at.File, host)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// share shares the bytes of e, or copies them, to host in a file of the target.
func (c *copy_) share(e Extent, file int, host int64) error {
	f := c.dst.Files[file]
	if n := e.Length / cloneAlign * cloneAlign; n > 0 && host%cloneAlign == 0 && e.HostOffset%cloneAlign == 0 && c.clones.hope(e.File) {
		c.reader.work <- struct{}{}
		err := cloneRange(f, host, e.File, e.HostOffset, n)
		<-c.reader.work
		c.clones.learn(e.File, err == nil)
		if err == nil {
			c.cloned.Add(n)
			e = e.from(n)
			host += n
		}
	} else if n > 0 {
		c.clones.learn(e.File, false)
	}
	if c.opts.Offload {
		c.reader.work <- struct{}{}
		n := copyRange(f, host, e.File, e.HostOffset, e.Length)
		<-c.reader.work
		c.written.Add(n)
		e = e.from(n)
		host += n
	}
	if e.Length == 0 {
		return nil
	}
	slot, err := c.plain.get(c.ctx)
	if err != nil {
		return err
	}
	defer slot.put()
	for e.Length > 0 {
		part := e
		part.Length = min(e.Length, int64(len(slot.mem)))
		if err := c.reader.read(c.ctx, slot, part.Offset, part.Length, []Extent{part}); err != nil {
			return err
		}
		for _, r := range nonzero(nil, slot.mem[:part.Length], part.Offset, DefaultSparse) {
			c.reader.work <- struct{}{}
			err := c.pwrite(file, slot.mem[r.Offset-part.Offset:][:r.Length], host+r.Offset-part.Offset, r.Offset)
			<-c.reader.work
			if err != nil {
				return err
			}
		}
		e = e.from(part.Length)
		host += part.Length
	}
	return nil
}

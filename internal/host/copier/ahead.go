package copier

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/instar-img/instar/sdk"
)

// ahead keeps the accounts of what is placed before anybody knows that it holds
// anything but zeros. One who has the place can write what it reads while that
// is in a cache; what turns out to be zeros is given back.
type ahead struct {
	on    atomic.Bool // place the next step ahead
	takes bool        // the target takes places back; where it writes in place there are none

	mu           sync.Mutex
	total, zeros int64          // bytes placed ahead, and given back of them
	back         []sdk.Run      // to be given back
	used         map[int64]bool // units larger than cells, by guest offset: something was written there
}

// begin decides whether to place ahead at all. What is reproducible must not
// depend on which of two goroutines gives back first.
func (a *ahead) begin(c *copy_) {
	a.takes = c.info.Ahead && !c.info.InPlace && c.dst.Fresh && !c.opts.Reproducible
	a.on.Store(!c.encode && !c.explode && (c.info.InPlace || a.takes))
}

// placed notes what units a step has places for. Those of units that several
// cells share are given back when the last is known.
func (a *ahead) placed(c *copy_, s *step, units []sdk.Run) {
	if !a.takes {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if s.ahead {
		for _, u := range units {
			a.total += u.Length
		}
	}
	if c.info.Unit > c.cell {
		a.use(c, units, !s.ahead)
	}
}

// use notes that units are placed and, where written, that they hold something.
func (a *ahead) use(c *copy_, units []sdk.Run, written bool) {
	if a.used == nil {
		a.used = map[int64]bool{}
	}
	for _, u := range units {
		for off := u.Offset; off < u.Offset+u.Length; off += c.info.Unit {
			a.used[off] = a.used[off] || written
		}
	}
}

// moved notes what of the units asked for a step that was placed ahead has data.
func (a *ahead) moved(c *copy_, asked, data []sdk.Run) {
	if !a.takes {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c.info.Unit > c.cell {
		a.use(c, data, true)
		return
	}
	for _, r := range asked {
		for pos := r.Offset; pos < r.Offset+r.Length; {
			for len(data) > 0 && data[0].Offset+data[0].Length <= pos {
				data = data[1:]
			}
			end := r.Offset + r.Length
			if len(data) > 0 && data[0].Offset < end {
				end = data[0].Offset
			}
			if end > pos {
				a.back = append(a.back, sdk.Run{Offset: pos, Length: end - pos})
				a.zeros += end - pos
			}
			if len(data) == 0 || data[0].Offset >= r.Offset+r.Length {
				break
			}
			pos = data[0].Offset + data[0].Length
		}
	}
	if a.zeros > wasteful && a.zeros > a.total/wastefulShare {
		a.on.Store(false)
	}
}

// take returns what is to be given back, ascending.
func (a *ahead) take() []sdk.Run {
	a.mu.Lock()
	defer a.mu.Unlock()
	runs := a.back
	a.back = nil
	slices.SortFunc(runs, func(x, y sdk.Run) int { return cmp.Compare(x.Offset, y.Offset) })
	return runs
}

// rest is take when all is written.
func (a *ahead) rest(unit, size int64) []sdk.Run {
	for off, used := range a.used {
		if !used {
			a.back = append(a.back, sdk.Run{Offset: off, Length: min(unit, size-off)})
		}
	}
	return a.take()
}

// mover reads what was placed ahead, and writes it while it is in a cache.
func (c *copy_) mover() {
	var mine *slot
	for s := range c.moves {
		if mine == nil {
			mine = &slot{mem: make([]byte, c.cell)}
		}
		if err := c.move(s, mine); err != nil {
			c.fail(err)
		} else {
			c.progress(s.length)
		}
		s.slot = nil
		c.finish(s)
	}
}

// move reads a step into mine and writes it.
func (c *copy_) move(s *step, mine *slot) error {
	asked := c.units(s.data)
	s.slot, s.data = mine, nil
	c.reader.work <- struct{}{}
	defer func() { <-c.reader.work }()
	if err := c.reader.fill(c.ctx, mine.mem[:s.length], s.off, s.pieces); err != nil {
		return err
	}
	if err := c.examine(s, nil); err != nil {
		return err
	}
	c.ahead.moved(c, asked, c.units(s.data))
	return c.put(s)
}

// giveBack gives places back in which nothing has been written, nor will be.
func (c *copy_) giveBack(runs []sdk.Run) error {
	if len(runs) == 0 {
		return nil
	}
	return c.dst.Writer.Zero(c.ctx, runs)
}

package copier

import (
	"context"
	"fmt"
	"sync"

	"github.com/instar-img/instar/sdk/client"
)

// slot is the memory for one cell of the disk.
type slot struct {
	mem    []byte
	window *client.Window // that mem is a part of; nil for plain memory
	offset int            // of mem in the window
	pool   *pool
}

// pool hands out slots, and so bounds memory and what is in flight. The slot
// given back last is handed out first: it may still be in a cache.
type pool struct {
	tokens chan struct{} // as many as slots are free
	mu     sync.Mutex
	free   []*slot
	// make makes a slot when there are fewer than may be; nil where all are made.
	make  func() *slot
	close func() error
	// decoder is what the slots' window is shared with, where it is a decoder.
	decoder client.WindowDecoder
}

func emptyPool(n int) *pool {
	p := &pool{tokens: make(chan struct{}, n)}
	for range n {
		p.tokens <- struct{}{}
	}
	return p
}

// newPool returns a pool of n slots of size bytes of plain memory.
func newPool(n int, size int64) *pool {
	p := emptyPool(n)
	p.make = func() *slot { return &slot{mem: make([]byte, size), pool: p} }
	p.close = func() error { return nil }
	return p
}

// windowMaker makes windows shared with one plugin.
type windowMaker interface {
	NewWindow(size int) (*client.Window, error)
}

// newWindowPool returns a pool of n slots that are parts of one window.
func newWindowPool(m windowMaker, n int, size int64) (*pool, error) {
	w, err := m.NewWindow(n * int(size))
	if err != nil {
		return nil, err
	}
	if len(w.Mem) < n*int(size) {
		return nil, fmt.Errorf("window of %d bytes, %d wanted", len(w.Mem), n*int(size))
	}
	p := emptyPool(n)
	p.close = w.Close
	for i := range n {
		at := i * int(size)
		p.free = append(p.free, &slot{mem: w.Mem[at : at+int(size) : at+int(size)], window: w, offset: at, pool: p})
	}
	return p, nil
}

// get waits for a slot.
func (p *pool) get(ctx context.Context) (*slot, error) {
	select {
	case <-p.tokens:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	n := len(p.free)
	if n == 0 {
		return p.make(), nil
	}
	s := p.free[n-1]
	p.free = p.free[:n-1]
	return s, nil
}

// put gives a slot back.
func (s *slot) put() {
	s.pool.mu.Lock()
	s.pool.free = append(s.pool.free, s)
	s.pool.mu.Unlock()
	s.pool.tokens <- struct{}{}
}

// windowPools are pools in windows shared with decoders, made when needed.
type windowPools struct {
	n    int
	size int64
	mu   sync.Mutex
	of   map[client.WindowDecoder]*pool
}

func newWindowPools(n int, size int64) *windowPools {
	return &windowPools{n: n, size: size, of: map[client.WindowDecoder]*pool{}}
}

// get waits for a slot in a window of d's.
func (w *windowPools) get(ctx context.Context, d client.WindowDecoder) (*slot, error) {
	w.mu.Lock()
	p := w.of[d]
	if p == nil {
		var err error
		if p, err = newWindowPool(d, w.n, w.size); err != nil {
			w.mu.Unlock()
			return nil, err
		}
		p.decoder = d
		w.of[d] = p
	}
	w.mu.Unlock()
	return p.get(ctx)
}

func (w *windowPools) close() {
	for _, p := range w.of {
		_ = p.close() // memory that goes with the process anyway
	}
}

package vmdk

import (
	"fmt"
	"io"
	"sync"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	pageSize = 64 << 10
	maxPages = 32
)

// tableCache reads small pieces of a file through a few pages of memory, so
// that neighbouring grain tables cost one read.
type tableCache struct {
	file sdk.File
	size int64 // of the file when it was opened

	mu    sync.Mutex
	pages map[int64]*page
	clock uint64
}

type page struct {
	data []byte
	used uint64
}

func newTableCache(f sdk.File, size int64) *tableCache {
	return &tableCache{file: f, size: size, pages: make(map[int64]*page)}
}

// read fills dst from off. What lies beyond the end of the file is corrupt;
// what names the structure.
func (c *tableCache) read(what string, dst []byte, off int64) error {
	if !ondisk.Within(off, int64(len(dst)), c.size) {
		return fmt.Errorf("%s: %#x bytes at %#x beyond end of file %#x: %w", what, len(dst), off, c.size, sdk.ErrCorrupt)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(dst) > 0 {
		p, err := c.page(off / pageSize)
		if err != nil {
			return fmt.Errorf("%s: read at %#x: %w", what, off, err)
		}
		in := off % pageSize
		if in >= int64(len(p.data)) {
			return fmt.Errorf("%s: %#x beyond end of file: %w", what, off, sdk.ErrCorrupt)
		}
		n := copy(dst, p.data[in:])
		dst, off = dst[n:], off+int64(n)
	}
	return nil
}

func (c *tableCache) page(n int64) (*page, error) {
	c.clock++
	if p := c.pages[n]; p != nil {
		p.used = c.clock
		return p, nil
	}
	var p *page
	if len(c.pages) < maxPages {
		p = &page{data: make([]byte, pageSize)}
	} else {
		oldest := int64(-1)
		for k, q := range c.pages {
			if oldest < 0 || q.used < c.pages[oldest].used {
				oldest = k
			}
		}
		p = c.pages[oldest]
		delete(c.pages, oldest)
	}
	got, err := c.file.ReadAt(p.data[:pageSize], n*pageSize)
	if err != nil && err != io.EOF {
		return nil, err
	}
	p.data, p.used = p.data[:got], c.clock
	c.pages[n] = p
	return p, nil
}

// drop forgets what was read, and takes note of the file's length.
func (c *tableCache) drop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.pages)
	if size, err := c.file.Size(); err == nil {
		c.size = size
	}
}

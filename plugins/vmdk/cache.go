package vmdk

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// Tables are read through maxPages of memory: 4 MiB for all files of an image.
const (
	pageSize = 64 << 10
	maxPages = 64
)

// pageCache holds the pages of an image's files that were read last.
type pageCache struct {
	mu    sync.Mutex
	pages map[pageKey]*page
	clock uint64
}

type pageKey struct {
	file *tableCache
	n    int64
}

type page struct {
	data []byte
	used uint64
}

func newPageCache() *pageCache { return &pageCache{pages: make(map[pageKey]*page)} }

// tableCache reads small pieces of a file through pages, so that neighbouring
// grain tables cost one read.
type tableCache struct {
	file  sdk.File
	size  int64 // of the file when it was opened, or last changed
	cache *pageCache
}

// read fills dst from off. What lies beyond the end of the file is corrupt;
// what names the structure.
func (t *tableCache) read(what string, dst []byte, off int64) error {
	c := t.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	if !ondisk.Within(off, int64(len(dst)), t.size) {
		return fmt.Errorf("%s: %#x bytes at %#x beyond end of file %#x: %w", what, len(dst), off, t.size, sdk.ErrCorrupt)
	}
	for len(dst) > 0 {
		p, err := c.page(pageKey{t, off / pageSize})
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

func (c *pageCache) page(key pageKey) (*page, error) {
	c.clock++
	if p := c.pages[key]; p != nil {
		p.used = c.clock
		return p, nil
	}
	var p *page
	if len(c.pages) < maxPages {
		p = &page{data: make([]byte, pageSize)}
	} else {
		var oldest pageKey
		for k, q := range c.pages {
			if p == nil || q.used < p.used {
				oldest, p = k, q
			}
		}
		delete(c.pages, oldest)
	}
	got, err := key.file.file.ReadAt(p.data[:pageSize], key.n*pageSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	p.data, p.used = p.data[:got], c.clock
	c.pages[key] = p
	return p, nil
}

// drop forgets what was read of the file, and takes note of its length.
func (t *tableCache) drop() {
	c := t.cache
	c.mu.Lock()
	defer c.mu.Unlock()
	for k := range c.pages {
		if k.file == t {
			delete(c.pages, k)
		}
	}
	if size, err := t.file.Size(); err == nil {
		t.size = size
	}
}

package vmdk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	// checkWindow is how many slots of a file are remembered at once: 64 MiB of
	// memory. Larger files are gone over again for each window.
	checkWindow = 64 << 20 * 8
	maxMessages = 1000
)

// checker goes over the tables of an image.
type checker struct {
	img      *image
	req      sdk.CheckRequest
	res      sdk.CheckResult
	messages int
}

// Check implements sdk.Checker. It finds what qemu-img does, goes on after it,
// and finds besides: grains shared or inside metadata, tables beyond the end,
// redundant tables that differ, compressed grains whose marker is wrong, flat
// extents cut short.
func (img *image) Check(ctx context.Context, req sdk.CheckRequest) (*sdk.CheckResult, error) {
	if req.Fix != sdk.FixNone {
		return nil, fmt.Errorf("repair: %w", sdk.ErrUnsupported)
	}
	c := &checker{img: img, req: req}
	l := img.layout.Load()
	for i, e := range l.extents {
		done := func(part float64) {
			if req.Progress != nil {
				req.Progress((float64(i) + part) / float64(len(l.extents)))
			}
		}
		if err := c.extent(ctx, i, e, done); err != nil {
			return nil, err
		}
		done(1)
	}
	return &c.res, nil
}

func (c *checker) say(text string, args ...any) {
	c.messages++
	switch {
	case c.req.Message == nil || c.messages > maxMessages:
	case c.messages == maxMessages:
		c.req.Message("more findings are counted, but not shown")
	default:
		c.req.Message(fmt.Sprintf(text, args...))
	}
}

func (c *checker) corrupt(text string, args ...any) {
	c.res.Corruptions++
	if c.messages >= maxMessages {
		return // damaged images have millions
	}
	c.say("ERROR: "+text, args...)
}

func (c *checker) extent(ctx context.Context, i int, e *extent, done func(float64)) error {
	switch {
	case e.zero() || e.line.access == accessNone:
		return nil
	case e.file == nil:
		c.res.CheckErrors++
		c.say("ERROR: extent %d: file %q is not available", i, e.line.name)
		return nil
	case e.sparse == nil:
		at, err := e.flatOffset()
		if err == nil {
			_, err = e.hostRange("flat extent", at, e.length)
		}
		if err != nil {
			c.corrupt("extent %d: %v", i, err)
		}
		return nil
	}
	s := e.sparse
	if s.kind == sparseMagic && s.header.flags&flagNewlineTest != 0 && s.header.newlines != newlineTest {
		c.corrupt("extent %d: line ends were translated when the file was transferred", i)
	}
	slot := s.grain
	if s.compressed {
		slot = sectorSize
	}
	slots := ondisk.DivUp(e.fileSize, slot)
	p := &pass{
		checker: c, e: e, first: true, slot: slot,
		seen: make([]uint64, ondisk.DivUp(min(slots, checkWindow), 64)),
	}
	var err error
	if p.shared, err = s.findShared(ctx); err != nil {
		return fmt.Errorf("extent %d: %w", i, err)
	}
	passes := max(1, ondisk.DivUp(slots, checkWindow))
	for n := range passes {
		err = p.run(ctx, func(part float64) { done((float64(n) + part) / float64(passes)) })
		if err != nil {
			return fmt.Errorf("extent %d: %w", i, err)
		}
		clear(p.seen)
		if p.shared != nil {
			clear(p.shared.met)
		}
		p.from += checkWindow
		p.first = false
	}
	return nil
}

// pass goes over the tables of a sparse extent once. Every pass looks for
// shared slots of the file in one window; the first for everything else.
type pass struct {
	*checker
	e     *extent
	first bool
	slot  int64 // bytes of the file for each bit of seen
	from  int64 // slot of the first bit
	seen  []uint64
	// shared is not nil where directory entries refer to the same tables.
	shared *sharedTables
}

// sharedTables knows which tables a pass has met. Each is gone over once: a
// small file could otherwise keep a check busy for days.
type sharedTables struct {
	keys []uint32 // of all tables, ascending
	met  []uint64 // bits by index of keys
}

// tableKey is a number for the grain table at a host offset.
func (s *sparseExtent) tableKey(at int64) uint32 {
	if s.kind == seSparse {
		return uint32((at - s.tablesAt) / (seSparseTableSectors * sectorSize))
	}
	return uint32(at / sectorSize)
}

// presentTables returns how many entries of the grain directory lie in the file.
func (s *sparseExtent) presentTables() int64 {
	return min(s.tables, max(0, s.cache.size-s.directory)/s.entrySize)
}

// findShared returns nil where every table is referred to once.
func (s *sparseExtent) findShared(ctx context.Context) (*sharedTables, error) {
	tables := s.presentTables()
	keys := make([]uint32, 0, tables)
	for i := range tables {
		if i%4096 == 0 {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
		}
		at, err := s.table(i)
		switch {
		case errors.Is(err, sdk.ErrCorrupt):
			continue // found again, and reported, later
		case err != nil:
			return nil, err
		case at != 0:
			keys = append(keys, s.tableKey(at))
		}
	}
	slices.Sort(keys)
	n := len(keys)
	if keys = slices.Compact(keys); len(keys) == n {
		return nil, nil
	}
	return &sharedTables{keys: keys, met: make([]uint64, (len(keys)+63)/64)}, nil
}

// again reports whether the table was met before.
func (t *sharedTables) again(key uint32) bool {
	i, _ := slices.BinarySearch(t.keys, key)
	was := t.met[i/64]&(1<<(i%64)) != 0
	t.met[i/64] |= 1 << (i % 64)
	return was
}

// taken marks the slot of a host offset, and reports whether it was marked
// before; false outside the window.
func (p *pass) taken(host int64) bool {
	i := host/p.slot - p.from
	if i < 0 || i >= int64(len(p.seen))*64 {
		return false
	}
	was := p.seen[i/64]&(1<<(i%64)) != 0
	p.seen[i/64] |= 1 << (i % 64)
	return was
}

// guestSector returns the sector of the disk at which grain j of table i
// begins.
func (p *pass) guestSector(i, j int64) int64 {
	s := p.e.sparse
	return (p.e.start + (i*s.entries+j)*s.grain) / sectorSize
}

func (p *pass) run(ctx context.Context, done func(float64)) error {
	s := p.e.sparse
	wanted := min(s.tables, ondisk.DivUp(p.e.length, s.grain*s.entries))
	tables := min(wanted, s.presentTables())
	if p.first && tables < wanted {
		p.corrupt("grain directory for sector %d and on points after EOF", p.guestSector(tables, 0))
	}
	redundant := p.first && s.redundant != 0
	if redundant && !ondisk.Within(s.redundant, tables*s.entrySize, s.cache.size) {
		p.corrupt("redundant grain directory points after EOF")
		redundant = false
	}
	table := make([]byte, s.entries*s.entrySize)
	spare := make([]byte, len(table))
	for i := range tables {
		if i%256 == 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			done(float64(i) / float64(tables))
		}
		at, err := s.table(i)
		if err == nil && at != 0 && p.shared != nil && p.shared.again(s.tableKey(at)) {
			if p.first {
				p.corrupt("grain table for sector %d is another's too", p.guestSector(i, 0))
			}
			continue
		}
		if err == nil && !ondisk.Within(at, int64(len(table)), s.cache.size) {
			if p.first {
				p.corrupt("grain table for sector %d points after EOF", p.guestSector(i, 0))
			}
			continue
		}
		if err == nil && at != 0 {
			err = s.cache.read("grain table", table, at)
		}
		if err != nil {
			if !errors.Is(err, sdk.ErrCorrupt) {
				return err
			}
			if p.first {
				p.corrupt("grain table for sector %d: %v", p.guestSector(i, 0), err)
			}
			continue
		}
		if redundant {
			if err := p.redundant(i, at, table, spare); err != nil {
				return err
			}
		}
		if at == 0 {
			continue
		}
		// Where slots are smaller than tables, tables have slots of their own.
		if p.slot == sectorSize && p.taken(at) {
			p.corrupt("grain table for sector %d shares its place in the file", p.guestSector(i, 0))
		}
		if err := p.table(i, table); err != nil {
			return err
		}
	}
	return nil
}

// redundant compares the second copy of a table.
func (p *pass) redundant(i, at int64, table, spare []byte) error {
	s := p.e.sparse
	other, err := s.tableIn(s.redundant, i)
	if err == nil && other == at {
		return nil
	}
	switch {
	case err != nil:
	case other == 0 || at == 0:
		p.corrupt("grain table for sector %d is in one of two grain directories", p.guestSector(i, 0))
		return nil
	case !ondisk.Within(other, int64(len(spare)), s.cache.size):
		p.corrupt("redundant grain table for sector %d points after EOF", p.guestSector(i, 0))
		return nil
	default:
		err = s.cache.read("redundant grain table", spare, other)
	}
	switch {
	case errors.Is(err, sdk.ErrCorrupt):
		p.corrupt("redundant grain table for sector %d: %v", p.guestSector(i, 0), err)
	case err != nil:
		return err
	case !bytes.Equal(table, spare):
		p.corrupt("redundant grain table for sector %d differs", p.guestSector(i, 0))
	}
	return nil
}

func (p *pass) table(i int64, table []byte) error {
	s := p.e.sparse
	for j := range min(s.entries, ondisk.DivUp(p.e.length, s.grain)-i*s.entries) {
		g, err := s.entry(table, j)
		if err != nil {
			if p.first {
				p.corrupt("grain for sector %d: %v", p.guestSector(i, j), err)
			}
			continue
		}
		if g.zero || g.host == 0 {
			continue
		}
		if g.host >= p.e.fileSize {
			if p.first {
				p.corrupt("cluster offset for sector %d points after EOF", p.guestSector(i, j))
			}
			continue
		}
		if p.taken(g.host) {
			p.corrupt("grain for sector %d shares its place in the file", p.guestSector(i, j))
		}
		if !p.first {
			continue
		}
		if g.host < max(s.overhead, sectorSize) {
			p.corrupt("grain for sector %d lies in metadata", p.guestSector(i, j))
			continue
		}
		if s.compressed && s.markers {
			if err := p.marker(i, j, g.host); err != nil {
				return err
			}
		}
	}
	return nil
}

// marker checks what stands before a compressed grain.
func (p *pass) marker(i, j, host int64) error {
	s := p.e.sparse
	var b [16]byte
	err := readFull(p.e.file, b[:], host)
	if errors.Is(err, sdk.ErrCorrupt) {
		p.corrupt("compressed grain for sector %d: %v", p.guestSector(i, j), err)
		return nil
	}
	if err != nil {
		return err
	}
	var m marker
	if err := m.decode(b[:]); err != nil {
		return err
	}
	most := min(s.encodedMax(), p.e.fileSize-host) - grainMarkerSize
	lba := (i*s.entries + j) * s.grain / sectorSize
	switch {
	case m.size == 0 || int64(m.size) > most:
		p.corrupt("compressed grain for sector %d has %d bytes, at most %d are there", p.guestSector(i, j), m.size, most)
	case m.value != uint64(lba) && m.value != uint64(p.guestSector(i, j)):
		p.corrupt("compressed grain for sector %d is marked as of sector %d", p.guestSector(i, j), m.value)
	}
	return nil
}

package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"
	"sort"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// mapBatch is how many extents are yielded at once.
const mapBatch = 4096

// Map implements sdk.Image.
func (img *image) Map(ctx context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	l := img.layout.Load()
	if !ondisk.Within(off, length, l.size) {
		return fmt.Errorf("map %#x+%#x of %#x: %w", off, length, l.size, sdk.ErrInvalid)
	}
	m := merger{yield: yield}
	end := off + length
	for i := l.find(off); i < len(l.extents) && off < end; i++ {
		e := l.extents[i]
		n := min(end, e.start+e.length) - off
		if n <= 0 {
			continue
		}
		more, err := e.mapRange(ctx, off-e.start, n, &m)
		if err != nil {
			m.flush()
			return fmt.Errorf("extent %d: %w", i, err)
		}
		if !more {
			return nil
		}
		off += n
	}
	m.flush()
	return nil
}

// find returns the index of the extent that holds a guest offset.
func (l *layout) find(off int64) int {
	return sort.Search(len(l.extents), func(i int) bool {
		return off < l.extents[i].start+l.extents[i].length
	})
}

// merger joins extents that continue each other and yields them in batches.
type merger struct {
	yield func([]sdk.Extent) bool
	batch []sdk.Extent
}

// add reports whether more are wanted.
func (m *merger) add(x sdk.Extent) bool {
	if n := len(m.batch); n > 0 {
		last := &m.batch[n-1]
		if last.Kind == x.Kind && x.Kind != sdk.Encoded && last.Sparse == x.Sparse &&
			(last.HostOffset < 0 && x.HostOffset < 0 ||
				last.HostOffset >= 0 && last.File == x.File && last.HostOffset+last.Length == x.HostOffset) {
			last.Length += x.Length
			return true
		}
		if n == mapBatch {
			// The last may still grow.
			tail := m.batch[n-1]
			if !m.yield(m.batch[:n-1]) {
				return false
			}
			m.batch = append(make([]sdk.Extent, 0, mapBatch), tail)
		}
	}
	m.batch = append(m.batch, x)
	return true
}

func (m *merger) flush() {
	if len(m.batch) > 0 {
		m.yield(m.batch)
	}
}

// mapRange maps n bytes at off of the extent, n at least 1. It reports whether
// more are wanted.
func (e *extent) mapRange(ctx context.Context, off, n int64, m *merger) (bool, error) {
	switch {
	case e.zero():
		return m.add(sdk.Extent{Offset: e.start + off, Length: n, Kind: sdk.Zero, HostOffset: -1}), nil
	case e.line.access == accessNone:
		return false, fmt.Errorf("%s: access denied by the descriptor: %w", e.line.name, sdk.ErrNotAttached)
	case e.file == nil:
		return false, fmt.Errorf("%s: %w", e.line.name, sdk.ErrNotAttached)
	case e.sparse == nil:
		return e.mapFlat(off, n, m)
	}
	return e.mapSparse(ctx, off, n, m)
}

// hostRange checks that n bytes at a host offset lie in the file. A file may
// end inside its last sector: what is missing of that reads as zeros.
func (e *extent) hostRange(what string, host, n int64) (present int64, err error) {
	end, _ := ondisk.AlignUp(e.fileSize, sectorSize)
	if !ondisk.Within(host, n, end) {
		return 0, fmt.Errorf("%s: %#x bytes at %#x beyond end of file %#x: %w", what, n, host, e.fileSize, sdk.ErrCorrupt)
	}
	return max(0, min(n, e.fileSize-host)), nil
}

// flatOffset returns where a flat extent begins in its file, in bytes.
func (e *extent) flatOffset() (int64, error) {
	off, ok := ondisk.Mul(e.line.offset, sectorSize)
	if _, fits := ondisk.Add(off, e.length); !ok || !fits {
		return 0, fmt.Errorf("%s: flat extent at sector %d: %w", e.line.name, e.line.offset, sdk.ErrCorrupt)
	}
	return off, nil
}

func (e *extent) mapFlat(off, n int64, m *merger) (bool, error) {
	at, err := e.flatOffset()
	if err != nil {
		return false, err
	}
	present, err := e.hostRange(e.line.name, at+off, n)
	if err != nil {
		return false, err
	}
	x := sdk.Extent{Offset: e.start + off, Length: present, Kind: sdk.Data, File: e.index, HostOffset: at + off, Sparse: true}
	return addPresent(m, x, n), nil
}

// addPresent adds x, and zeros for what is missing of n bytes.
func addPresent(m *merger, x sdk.Extent, n int64) bool {
	if x.Length > 0 && !m.add(x) {
		return false
	}
	if x.Length < n {
		return m.add(sdk.Extent{Offset: x.Offset + x.Length, Length: n - x.Length, Kind: sdk.Zero, HostOffset: -1})
	}
	return true
}

func (e *extent) mapSparse(ctx context.Context, off, n int64, m *merger) (bool, error) {
	s := e.sparse
	span := s.grain * s.entries // what a table covers
	table := make([]byte, s.entries*s.entrySize)
	for end := off + n; off < end; {
		i := off / span
		stop := min(end, (i+1)*span)
		if i%64 == 0 {
			if err := ctx.Err(); err != nil {
				return false, err
			}
		}
		at, err := s.table(i)
		if err != nil {
			return false, err
		}
		if at == 0 {
			if !m.add(sdk.Extent{Offset: e.start + off, Length: stop - off, Kind: sdk.Absent, HostOffset: -1}) {
				return false, nil
			}
			off = stop
			continue
		}
		if err := s.cache.read("grain table", table, at); err != nil {
			return false, fmt.Errorf("grain directory entry %d: %w", i, err)
		}
		for off < stop {
			j := off / s.grain % s.entries
			next := min(stop, off-off%s.grain+s.grain)
			g, err := s.entry(table, j)
			if err != nil {
				return false, fmt.Errorf("grain table %d, entry %d: %w", i, j, err)
			}
			more, err := e.addGrain(off, next-off, g, m)
			if err != nil {
				return false, fmt.Errorf("grain table %d, entry %d: %w", i, j, err)
			}
			if !more {
				return false, nil
			}
			off = next
		}
	}
	return true, nil
}

// addGrain adds n bytes at off of the extent, all in the grain g.
func (e *extent) addGrain(off, n int64, g grain, m *merger) (bool, error) {
	s := e.sparse
	x := sdk.Extent{Offset: e.start + off, Length: n, HostOffset: -1}
	switch {
	case g.zero:
		x.Kind = sdk.Zero
	case g.host == 0:
		x.Kind = sdk.Absent
	case s.compressed:
		if g.host >= e.fileSize {
			return false, fmt.Errorf("compressed grain at %#x beyond end of file %#x: %w", g.host, e.fileSize, sdk.ErrCorrupt)
		}
		// How long it really is stands before it, and is not worth a read.
		x.Kind, x.File, x.HostOffset = sdk.Encoded, e.index, g.host
		x.EncodedLength = min(s.encodedMax(), e.fileSize-g.host)
	default:
		x.Kind, x.File, x.HostOffset = sdk.Data, e.index, g.host+off%s.grain
		if g.host >= e.fileSize {
			return false, fmt.Errorf("grain at %#x beyond end of file %#x: %w", g.host, e.fileSize, sdk.ErrCorrupt)
		}
		// Some writers end the file with the last byte of data.
		x.Length = max(0, min(n, e.fileSize-x.HostOffset))
		return addPresent(m, x, n), nil
	}
	return m.add(x), nil
}

// encodedMax is the most bytes that a compressed grain takes, with its marker:
// as much as qemu-img reads.
func (s *sparseExtent) encodedMax() int64 { return 2 * s.grain }

// grain is where a grain lies.
type grain struct {
	zero bool  // reads as zeros
	host int64 // offset, 0: the grain is absent
}

// table returns the host offset of grain table i, 0 where there is none.
func (s *sparseExtent) table(i int64) (int64, error) { return s.tableIn(s.directory, i) }

func (s *sparseExtent) tableIn(directory, i int64) (int64, error) {
	var b [8]byte
	at := b[:s.entrySize]
	if i < 0 || i >= s.tables {
		return 0, fmt.Errorf("grain directory entry %d of %d: %w", i, s.tables, sdk.ErrCorrupt)
	}
	if err := s.cache.read("grain directory", at, directory+i*s.entrySize); err != nil {
		return 0, err
	}
	v := binary.LittleEndian.Uint64(b[:])
	switch {
	case s.kind != seSparse:
		return int64(v) * sectorSize, nil
	case v == 0:
		return 0, nil
	case v&seSparseTableMask != seSparseTableValid:
		return 0, fmt.Errorf("grain directory entry %d: unknown value %#x: %w", i, v, sdk.ErrCorrupt)
	}
	host, ok := ondisk.Add(s.tablesAt, int64(v&^seSparseTableMask)*seSparseTableSectors*sectorSize)
	if !ok {
		return 0, fmt.Errorf("grain directory entry %d: %#x: %w", i, v, sdk.ErrCorrupt)
	}
	return host, nil
}

// entry decodes entry j of a grain table.
func (s *sparseExtent) entry(table []byte, j int64) (grain, error) {
	if s.kind != seSparse {
		v := binary.LittleEndian.Uint32(table[j*4:])
		if v == 1 && s.zeroed {
			return grain{zero: true}, nil
		}
		return grain{host: int64(v) * sectorSize}, nil
	}
	v := binary.LittleEndian.Uint64(table[j*8:])
	switch v & seSparseTypeMask {
	case 0:
		if v == 0 {
			return grain{}, nil
		}
	case seSparseUnmapped, seSparseZero:
		return grain{zero: true}, nil
	case seSparseAllocated:
		index := v&seSparseIndexHigh>>seSparseIndexOffset | v&seSparseIndexLow<<seSparseIndexShift
		off, ok := ondisk.Mul(int64(index), s.grain)
		if host, fits := ondisk.Add(s.grainsAt, off); ok && fits {
			return grain{host: host}, nil
		}
	}
	return grain{}, fmt.Errorf("unknown value %#x: %w", v, sdk.ErrCorrupt)
}

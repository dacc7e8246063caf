package vhdx

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// storage is the file as it will be once its log is replayed: what the log
// changes is laid over what the file holds. Writes go to the file itself.
type storage struct {
	sdk.File

	mu       sync.RWMutex
	fileSize int64 // of the file
	size     int64 // after replay
	pending  map[int64]logSector
	sorted   []int64 // the keys of pending: offsets in the file
}

// logSector is a sector that the log holds.
type logSector struct {
	data     int64 // offset in the file of its data sector; 0: zeros
	leading  [8]byte
	trailing [4]byte
}

func newStorage(f sdk.File) (*storage, error) {
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	// Half a sector at the end counts as a whole one, as it does for qemu-img.
	whole, ok := ondisk.AlignUp(size, 512)
	if !ok {
		return nil, fmt.Errorf("file of %d bytes: %w", size, sdk.ErrTooBig)
	}
	return &storage{File: f, fileSize: size, size: whole}, nil
}

// Size is the length after replay.
func (s *storage) Size() (int64, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.size, nil
}

// dirty reports whether a log has to be replayed.
func (s *storage) dirty() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.pending != nil
}

func (s *storage) ReadAt(p []byte, off int64) (int, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.pending == nil {
		return s.File.ReadAt(p, off)
	}
	if off < 0 || off >= s.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), s.size-off))
	whole := p[:n]
	m, err := s.File.ReadAt(whole, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return m, err
	}
	clear(whole[m:])
	var sector [sectorSize]byte
	i, _ := slices.BinarySearch(s.sorted, off-off%sectorSize)
	for ; i < len(s.sorted) && s.sorted[i] < off+int64(n); i++ {
		at := s.sorted[i]
		if err := s.sector(at, sector[:]); err != nil {
			return 0, err
		}
		if at >= off {
			copy(whole[at-off:], sector[:])
		} else {
			copy(whole, sector[off-at:])
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// sector fills dst with a pending sector.
func (s *storage) sector(at int64, dst []byte) error {
	l := s.pending[at]
	if l.data == 0 {
		clear(dst)
		return nil
	}
	if _, err := s.File.ReadAt(dst, l.data); err != nil {
		return fmt.Errorf("log: data sector at %#x: %w", l.data, err)
	}
	copy(dst, l.leading[:])
	copy(dst[sectorSize-4:], l.trailing[:])
	return nil
}

// lay lays the entries of a log's active sequence over the file.
func (s *storage) lay(log *ring, entries []logEntry) error {
	newest := entries[len(entries)-1]
	if newest.flushed > uint64(s.fileSize) {
		return fmt.Errorf("log: file is truncated: %d bytes, was at least %d: %w", s.fileSize, newest.flushed, sdk.ErrCorrupt)
	}
	if newest.last > maxFileSize {
		return fmt.Errorf("log: last file offset %#x, at most %#x accepted: %w", newest.last, int64(maxFileSize), sdk.ErrCorrupt)
	}
	pending := map[int64]logSector{}
	size := max(s.fileSize, int64(newest.last))
	area := span{log.offset, log.offset + log.length}
	put := func(d *logDescriptor, data int64) error {
		off, ok := ondisk.Int64(d.offset)
		length, ok2 := ondisk.Int64(d.length)
		end, ok3 := ondisk.Add(off, length)
		if !ok || !ok2 || !ok3 || end > maxFileSize {
			return fmt.Errorf("log: descriptor for %#x bytes at %#x, file of at most %#x accepted: %w", d.length, d.offset, int64(maxFileSize), sdk.ErrCorrupt)
		}
		// The file identifier and the headers are not updated through the log, nor
		// is the log itself.
		if target := (span{off, end}); off < regionTable1Offset || target.overlaps(area) {
			return fmt.Errorf("log: descriptor for %#x bytes at %#x overlaps the headers or the log: %w", d.length, d.offset, sdk.ErrCorrupt)
		}
		if length/sectorSize > maxLogSectors {
			return fmt.Errorf("log: descriptor for %#x bytes, at most 1 GiB accepted: %w", d.length, sdk.ErrUnsupported)
		}
		for at := off; at < end; at += sectorSize {
			pending[at] = logSector{data, d.leading, d.trailing}
		}
		if len(pending) > maxLogSectors {
			return fmt.Errorf("log: changes more than %d sectors: %w", maxLogSectors, sdk.ErrUnsupported)
		}
		size = max(size, end)
		return nil
	}
	for _, e := range entries {
		data := e.descriptorSectors()
		for i := range int64(e.descriptors) {
			at := logHeaderSize + i*logDescriptorSize
			b, err := log.sector(e.offset + at/sectorSize*sectorSize)
			if err != nil {
				return err
			}
			var d logDescriptor
			if err := d.decode(b[at%sectorSize:]); err != nil {
				return fmt.Errorf("log: %w", err)
			}
			from := int64(0)
			if !d.zero {
				from = log.offset + (e.offset+data*sectorSize)%log.length
				data++
			}
			if err := put(&d, from); err != nil {
				return err
			}
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending, s.size = pending, size
	s.sorted = make([]int64, 0, len(pending))
	for at := range pending {
		s.sorted = append(s.sorted, at)
	}
	slices.Sort(s.sorted)
	return nil
}

// pendingIn returns the first run of pending sectors inside [start, end), cut
// to it.
func (s *storage) pendingIn(start, end int64) (span, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	i, _ := slices.BinarySearch(s.sorted, start-start%sectorSize)
	if i == len(s.sorted) || s.sorted[i] >= end {
		return span{}, false
	}
	run := span{max(s.sorted[i], start), s.sorted[i] + sectorSize}
	for i++; i < len(s.sorted) && s.sorted[i] == run.end; i++ {
		run.end += sectorSize
	}
	run.end = min(run.end, end)
	return run, true
}

// replay writes what the log holds into the file and marks the log as empty.
// A crash before that leaves the log, and with it the same content.
func (s *storage) replay(ctx context.Context, h *headers, ids *guids) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pending == nil {
		return nil
	}
	session, err := ids.next()
	if err != nil {
		return err
	}
	if err := h.update(s.File, true, func(h *header) { h.fileWrite = session }); err != nil {
		return err
	}
	if s.size > s.fileSize {
		if err := s.File.Truncate(s.size); err != nil {
			return fmt.Errorf("log: extend the file: %w", err)
		}
		s.fileSize = s.size
	}
	var sector [sectorSize]byte
	for i, at := range s.sorted {
		if i%batChunk == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := s.sector(at, sector[:]); err != nil {
			return err
		}
		if _, err := s.File.WriteAt(sector[:], at); err != nil {
			return fmt.Errorf("log: replay: %w", err)
		}
	}
	if err := s.File.Sync(); err != nil {
		return err
	}
	if err := h.update(s.File, true, func(h *header) { h.log = noGUID }); err != nil {
		return err
	}
	s.pending, s.sorted = nil, nil
	return nil
}

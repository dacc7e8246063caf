package server

import (
	"context"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk"
)

// window is memory shared with the core, mapped once and kept: the core names
// it by the ticket it was sent with.
type window struct{ mem []byte }

// maxWindow bounds what the core may ask to map.
const maxWindow = 1 << 30

func (s *Server) window(ctx context.Context, ticket uint32) (*window, error) {
	s.windowMu.Lock()
	defer s.windowMu.Unlock()
	if w, ok := s.windows[ticket]; ok {
		return w, nil
	}
	f, err := s.files.Take(ctx, ticket)
	if err != nil {
		return nil, fmt.Errorf("window: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("window: %w", err)
	}
	if fi.Size() <= 0 || fi.Size() > maxWindow {
		return nil, fmt.Errorf("window of %d bytes, at most %d accepted: %w", fi.Size(), maxWindow, sdk.ErrInvalid)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("window: mmap: %w", err)
	}
	w := &window{mem: mem}
	s.windows[ticket] = w
	return w, nil
}

// slice returns length bytes at off.
func (w *window) slice(off, length int64) ([]byte, error) {
	if off < 0 || length < 0 || off > int64(len(w.mem)) || length > int64(len(w.mem))-off {
		return nil, fmt.Errorf("%d bytes at %d beyond window of %d: %w", length, off, len(w.mem), sdk.ErrInvalid)
	}
	return w.mem[off : off+length : off+length], nil
}

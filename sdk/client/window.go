package client

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/internal/wire"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// Window is memory shared with one plugin: what must be transformed passes
// through it. Its parts are the caller's to hand out.
type Window struct {
	Mem    []byte
	ticket uint32
}

// WindowDecoder is implemented by images that decode into a window, many
// extents a call.
type WindowDecoder interface {
	sdk.Decoder
	NewWindow(size int) (*Window, error)
	// DecodeWindow decodes each item's extent to its place in the window. The
	// errors are the items', nil for those decoded.
	DecodeWindow(ctx context.Context, w *Window, items []DecodeItem) ([]error, error)
}

// WindowEncoder is implemented by images that encode from a window.
type WindowEncoder interface {
	sdk.Writer
	NewWindow(size int) (*Window, error)
	EncodeWindow(ctx context.Context, w *Window, items []EncodeItem) error
}

// DecodeItem is an extent and the place of its guest bytes in the window.
type DecodeItem struct {
	Extent       sdk.Extent
	WindowOffset int
}

// EncodeItem is a unit in the window.
type EncodeItem struct {
	Offset       int64 // guest offset
	Length       int
	WindowOffset int
}

// NewWindow makes memory that both sides see.
func (f *Format) NewWindow(size int) (*Window, error) {
	file, err := anonymousFile(int64(size))
	if err != nil {
		return nil, fmt.Errorf("window of %d bytes: %w", size, err)
	}
	defer file.Close()
	mem, err := unix.Mmap(int(file.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("window of %d bytes: mmap: %w", size, err)
	}
	ticket, err := f.files.SendFile(file)
	if err != nil {
		_ = unix.Munmap(mem) // the error that matters is SendFile's
		return nil, fmt.Errorf("window: %w", err)
	}
	return &Window{Mem: mem, ticket: ticket}, nil
}

// Close unmaps the core's side. The plugin's goes with the plugin.
func (w *Window) Close() error { return unix.Munmap(w.Mem) }

// unlinkedFile is anonymousFile where there is no memfd.
func unlinkedFile(size int64) (*os.File, error) {
	f, err := os.CreateTemp("", "instar-window-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	if err := f.Truncate(size); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// NewWindow makes memory shared with the image's plugin.
func (m *Image) NewWindow(size int) (*Window, error) { return m.format.NewWindow(size) }

// DecodeWindow implements WindowDecoder.
func (m *Image) DecodeWindow(ctx context.Context, w *Window, items []DecodeItem) ([]error, error) {
	req := &pb.DecodeExtentsRequest{Image: m.id, Window: w.ticket, Extents: make([]*pb.EncodedExtent, len(items))}
	for i, it := range items {
		e := &it.Extent
		req.Extents[i] = &pb.EncodedExtent{
			Offset: e.Offset, Length: e.Length, File: int32(e.File),
			HostOffset: e.HostOffset, EncodedLength: e.EncodedLength, WindowOffset: int64(it.WindowOffset),
		}
	}
	r, err := m.format.rpc.DecodeExtents(ctx, req)
	if err != nil {
		return nil, wire.FromStatus(err)
	}
	errs := make([]error, len(items))
	for _, f := range r.GetFailed() {
		if i := int(f.GetIndex()); i >= 0 && i < len(errs) {
			errs[i] = wire.FromDetail(f.GetText(), f.GetDetail())
		}
	}
	return errs, nil
}

// EncodeWindow implements WindowEncoder.
func (m *Image) EncodeWindow(ctx context.Context, w *Window, items []EncodeItem) error {
	req := &pb.EncodeUnitsRequest{Image: m.id, Window: w.ticket, Units: make([]*pb.EncodeUnit, len(items))}
	for i, it := range items {
		req.Units[i] = &pb.EncodeUnit{Offset: it.Offset, Length: int64(it.Length), WindowOffset: int64(it.WindowOffset)}
	}
	_, err := m.format.rpc.EncodeUnits(ctx, req)
	return wire.FromStatus(err)
}

// withScratch calls f with a window of at least size bytes that is kept with
// the image, for calls that bring memory of their own.
func (m *Image) withScratch(size int, f func(*Window) error) error {
	m.scratchMu.Lock()
	defer m.scratchMu.Unlock()
	if m.scratch == nil || len(m.scratch.Mem) < size {
		w, err := m.NewWindow(max(size, 2<<20))
		if err != nil {
			return err
		}
		if m.scratch != nil {
			_ = m.scratch.Close() // replaced; nothing to be done about a failed unmap
		}
		m.scratch = w
	}
	return f(m.scratch)
}

// Decode implements sdk.Decoder, for single extents.
func (m *Image) Decode(ctx context.Context, e sdk.Extent, dst []byte) error {
	return m.withScratch(len(dst), func(w *Window) error {
		errs, err := m.DecodeWindow(ctx, w, []DecodeItem{{Extent: e}})
		if err != nil {
			return err
		}
		copy(dst, w.Mem)
		return errs[0]
	})
}

// Encode implements sdk.Writer.
func (m *Image) Encode(ctx context.Context, units []sdk.Unit) error {
	size := 0
	items := make([]EncodeItem, len(units))
	for i, u := range units {
		items[i] = EncodeItem{Offset: u.Offset, Length: len(u.Data), WindowOffset: size}
		size += len(u.Data)
	}
	return m.withScratch(size, func(w *Window) error {
		for i, u := range units {
			copy(w.Mem[items[i].WindowOffset:], u.Data)
		}
		return m.EncodeWindow(ctx, w, items)
	})
}

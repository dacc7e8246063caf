package copier

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/client"
)

// sector is the smallest part of a disk that is given up on.
const sector = 512

// maxEncoded bounds an encoded extent: no format has larger units that are
// decoded whole.
const maxEncoded = 64 << 20

// reader reads extents into memory.
type reader struct {
	work chan struct{} // as many as may read or write at a time
	// salvage, where not nil, is told what could not be read, and zeros are
	// taken for it.
	salvage func(off, length int64, err error)
	// scratch is where is decoded what cannot be decoded in place.
	scratch *windowPools
}

func newReader(workers int, salvage func(off, length int64, err error)) *reader {
	return &reader{work: make(chan struct{}, workers), salvage: salvage}
}

// read fills s.mem[:length] with the guest range that begins at off. pieces
// are its extents; between them are zeros.
func (r *reader) read(ctx context.Context, s *slot, off, length int64, pieces []Extent) error {
	r.work <- struct{}{}
	err := r.fill(ctx, s.mem[:length], off, pieces)
	<-r.work
	if err != nil {
		return err
	}
	return r.decode(ctx, s, off, pieces)
}

// fill is read but for what must be decoded, for a caller who has one of the
// places at work.
func (r *reader) fill(ctx context.Context, buf []byte, off int64, pieces []Extent) error {
	end := int64(0) // of what is filled
	for i := range pieces {
		clear(buf[end : pieces[i].Offset-off])
		end = pieces[i].Offset - off + pieces[i].Length
		if p := &pieces[i]; p.Kind == Zero {
			clear(buf[p.Offset-off : end])
		}
	}
	clear(buf[end:])
	for i := range pieces {
		if p := &pieces[i]; p.Kind == Data {
			if err := r.pread(p, buf[p.Offset-off:][:p.Length]); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			break
		}
	}
	return ctx.Err()
}

// cause is err without the name of the file, which the user did not ask for by
// that name.
func cause(err error) error {
	var pe *os.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// pread reads the bytes of p.
func (r *reader) pread(p *Extent, dst []byte) error {
	n, err := p.File.ReadAt(dst, p.HostOffset)
	if err == nil || errors.Is(err, io.EOF) {
		clear(dst[n:])
		return nil
	}
	if r.salvage == nil {
		return fmt.Errorf("error while reading at byte %d: %w", p.Offset+int64(n), cause(err))
	}
	// What can be read of it is read, a sector at a time.
	for at := n &^ (sector - 1); at < len(dst); at += sector {
		part := dst[at:min(at+sector, len(dst))]
		n, err := p.File.ReadAt(part, p.HostOffset+int64(at))
		clear(part[n:])
		if err != nil && !errors.Is(err, io.EOF) {
			r.salvage(p.Offset+int64(at), int64(len(part)), cause(err))
		}
	}
	return nil
}

// decode fills in the encoded pieces: those of window decoders many a call.
func (r *reader) decode(ctx context.Context, s *slot, off int64, pieces []Extent) error {
	var windowed []*Extent
	for i := range pieces {
		p := &pieces[i]
		if p.Kind != Encoded {
			continue
		}
		if p.Skip < 0 || p.Encoded.Length > maxEncoded || p.Length > p.Encoded.Length-p.Skip {
			return fmt.Errorf("encoded extent at guest offset %#x, %d bytes long, does not hold %d bytes from %d: %w", p.Encoded.Offset, p.Encoded.Length, p.Length, p.Skip, sdk.ErrCorrupt)
		}
		if _, ok := p.Decoder.(client.WindowDecoder); ok && p.Encoded.Length <= int64(len(s.mem)) {
			windowed = append(windowed, p)
			continue
		}
		if err := r.decodeOne(ctx, p, s.mem[p.Offset-off:][:p.Length]); err != nil {
			return err
		}
	}
	for len(windowed) > 0 {
		decoder := windowed[0].Decoder.(client.WindowDecoder)
		var mine, others []*Extent
		for _, p := range windowed {
			if p.Decoder == windowed[0].Decoder {
				mine = append(mine, p)
			} else {
				others = append(others, p)
			}
		}
		windowed = others
		if err := r.decodeWindow(ctx, s, off, decoder, mine); err != nil {
			return err
		}
	}
	return nil
}

// decodeWindow decodes pieces of one decoder: in place where s is in its
// window and they are whole, else through a window of its own.
func (r *reader) decodeWindow(ctx context.Context, s *slot, off int64, d client.WindowDecoder, pieces []*Extent) error {
	var items []client.DecodeItem
	var inPlace, rest []*Extent
	for _, p := range pieces {
		if s.pool.decoder == d && p.Skip == 0 && p.Length == p.Encoded.Length {
			inPlace = append(inPlace, p)
			items = append(items, client.DecodeItem{Extent: p.Encoded, WindowOffset: s.offset + int(p.Offset-off)})
		} else {
			rest = append(rest, p)
		}
	}
	if len(items) > 0 {
		failed, err := d.DecodeWindow(ctx, s.window, items)
		if err != nil {
			return err
		}
		for i, p := range inPlace {
			if err := r.failed(ctx, p, s.mem[p.Offset-off:][:p.Length], failed[i]); err != nil {
				return err
			}
		}
	}
	if len(rest) == 0 {
		return nil
	}
	tmp, err := r.scratch.get(ctx, d)
	if err != nil {
		return err
	}
	defer tmp.put()
	for len(rest) > 0 {
		items, used, n := items[:0], int64(0), 0
		for ; n < len(rest) && used+rest[n].Encoded.Length <= int64(len(tmp.mem)); n++ {
			items = append(items, client.DecodeItem{Extent: rest[n].Encoded, WindowOffset: tmp.offset + int(used)})
			used += rest[n].Encoded.Length
		}
		failed, err := d.DecodeWindow(ctx, tmp.window, items)
		if err != nil {
			return err
		}
		for i, p := range rest[:n] {
			dst := s.mem[p.Offset-off:][:p.Length]
			copy(dst, tmp.mem[int64(items[i].WindowOffset-tmp.offset)+p.Skip:])
			if err := r.failed(ctx, p, dst, failed[i]); err != nil {
				return err
			}
		}
		rest = rest[n:]
	}
	return nil
}

// decodeOne decodes a piece into memory that is not shared.
func (r *reader) decodeOne(ctx context.Context, p *Extent, dst []byte) error {
	if p.Skip == 0 && p.Length == p.Encoded.Length {
		return r.failed(ctx, p, dst, p.Decoder.Decode(ctx, p.Encoded, dst))
	}
	whole := make([]byte, p.Encoded.Length)
	err := p.Decoder.Decode(ctx, p.Encoded, whole)
	copy(dst, whole[p.Skip:])
	return r.failed(ctx, p, dst, err)
}

// failed deals with the error of a decoder.
func (r *reader) failed(ctx context.Context, p *Extent, dst []byte, err error) error {
	if err == nil {
		return nil
	}
	if r.salvage == nil || ctx.Err() != nil {
		return fmt.Errorf("error while reading at byte %d: %w", p.Offset, err)
	}
	clear(dst)
	r.salvage(p.Offset, p.Length, err)
	return nil
}

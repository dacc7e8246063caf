package image

import (
	"context"
	"fmt"

	"github.com/instar-img/instar/sdk"
)

// Extent is a run of a chain: what a guest range holds, and where it lies.
type Extent struct {
	Offset int64 // guest offset
	Length int64
	Kind   sdk.ExtentKind // Absent: no layer holds it, it reads as zeros
	Depth  int            // index of the layer that decided
	// File holds HostOffset, nil where HostOffset is -1.
	File       *File
	HostOffset int64
	// Encoded is the layer's whole extent, of which this may be a part.
	Encoded sdk.Extent
	// Sparse and Raw are sdk.Extent's. Hole: the host range is a hole of its file
	// and reads as zeros (after SplitHoles).
	Sparse, Raw, Hole bool
}

// Zero reports whether the range reads as zeros without a look at the files.
func (e *Extent) Zero() bool { return e.Kind == sdk.Absent || e.Kind == sdk.Zero || e.Hole }

// continues reports whether b is the rest of the run that a began.
func (e *Extent) continues(b *Extent) bool {
	if e.Kind != b.Kind || e.Depth != b.Depth || e.File != b.File || e.Sparse != b.Sparse || e.Offset+e.Length != b.Offset {
		return false
	}
	if e.Kind == sdk.Encoded {
		return false
	}
	return e.HostOffset == b.HostOffset || (e.HostOffset >= 0 && e.HostOffset+e.Length == b.HostOffset)
}

// VirtualSize is the guest-visible size of the image.
func (c *Chain) VirtualSize() int64 { return c.Layers[0].Info.VirtualSize }

// mapBatch is how many extents Map collects before it hands them on.
const mapBatch = 4096

// Map calls yield with the extents of the guest range [off, off+length), all
// layers merged: ascending, contiguous, non-empty, neighbours that continue
// each other joined. It stops early without error when yield returns false.
// Before an error comes what lies before the damage.
//
// A range that no layer holds has the depth of the last layer asked: the last
// of all, or the one whose backing file is too short to reach there.
func (c *Chain) Map(ctx context.Context, off, length int64, yield func([]Extent) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	end := off + length
	cursors := make([]*cursor, len(c.Layers))
	for i, l := range c.Layers {
		cursors[i] = &cursor{ctx: ctx, layer: l, end: min(end, l.Info.VirtualSize)}
		defer cursors[i].close()
	}
	var out []Extent
	var err error
	for pos := off; pos < end; {
		var e Extent
		if e, err = c.at(cursors, pos, end); err != nil {
			break
		}
		if n := len(out); n > 0 && out[n-1].continues(&e) {
			out[n-1].Length += e.Length
		} else {
			if n >= mapBatch {
				// The last extent may go on: it is kept for the next batch.
				if !yield(out[:n-1]) {
					return nil
				}
				out = append(out[:0], out[n-1])
			}
			out = append(out, e)
		}
		pos = e.Offset + e.Length
	}
	if len(out) > 0 && !yield(out) {
		return nil
	}
	return err
}

// at returns the extent that begins at pos, cut where any layer that was asked
// changes its mind.
func (c *Chain) at(cursors []*cursor, pos, end int64) (Extent, error) {
	depth := 0
	for {
		raw, err := cursors[depth].at(pos)
		if err != nil {
			return Extent{}, err
		}
		end = min(end, raw.Offset+raw.Length)
		last := depth+1 == len(c.Layers)
		if raw.Kind == sdk.Absent && !last {
			below := c.Layers[depth+1].Info.VirtualSize
			if pos < below {
				end = min(end, below)
				depth++
				continue
			}
		}
		return c.extent(depth, raw, pos, end-pos)
	}
}

// extent makes a chain's extent of a part of a layer's.
func (c *Chain) extent(depth int, raw sdk.Extent, pos, length int64) (Extent, error) {
	e := Extent{Offset: pos, Length: length, Kind: raw.Kind, Depth: depth, HostOffset: -1, Sparse: raw.Sparse, Raw: raw.Raw}
	if raw.HostOffset < 0 {
		return e, nil
	}
	layer := c.Layers[depth]
	if raw.File < 0 || raw.File >= len(layer.Files) {
		return e, fmt.Errorf("%s: plugin %s put guest offset %#x into file %d of %d", layer.Path, layer.Format(), pos, raw.File, len(layer.Files))
	}
	e.File = &layer.Files[raw.File]
	if raw.Kind == sdk.Encoded {
		e.Encoded, e.HostOffset = raw, raw.HostOffset
		return e, nil
	}
	e.HostOffset = raw.HostOffset + pos - raw.Offset
	if e.HostOffset < 0 || e.HostOffset+length < 0 {
		return e, fmt.Errorf("%s: plugin %s put guest offset %#x at a host offset that overflows", layer.Path, layer.Format(), pos)
	}
	return e, nil
}

// cursor walks one layer's map forward.
type cursor struct {
	ctx   context.Context
	layer *Layer
	end   int64 // of the range of interest in this layer

	batch  []sdk.Extent
	i      int
	stream chan []sdk.Extent
	done   chan struct{}
	cancel context.CancelFunc
	err    error // valid when stream is closed
}

// skipAhead is the distance, in guest bytes, over which a stream is read on
// rather than begun anew.
const skipAhead = 256 << 20

// at returns the extent that holds pos, cut to begin there.
func (c *cursor) at(pos int64) (sdk.Extent, error) {
	for {
		for c.i < len(c.batch) {
			e := c.batch[c.i]
			if pos < e.Offset+e.Length {
				return e, nil
			}
			c.i++
		}
		if c.stream != nil && len(c.batch) > 0 {
			if last := c.batch[len(c.batch)-1]; pos-(last.Offset+last.Length) > skipAhead {
				c.close()
			}
		}
		if c.stream == nil {
			c.open(pos)
		}
		batch, ok := <-c.stream
		if !ok {
			if c.err != nil {
				return sdk.Extent{}, c.err
			}
			return sdk.Extent{}, fmt.Errorf("%s: plugin %s has no map at guest offset %#x", c.layer.Path, c.layer.Format(), pos)
		}
		c.batch, c.i = batch, 0
	}
}

// open starts a stream at pos.
func (c *cursor) open(pos int64) {
	var ctx context.Context
	ctx, c.cancel = context.WithCancel(c.ctx)
	stream, done := make(chan []sdk.Extent, 1), make(chan struct{})
	c.stream, c.done, c.batch, c.i = stream, done, nil, 0
	go func() {
		defer close(done)
		defer close(stream)
		err := c.layer.Image.Map(ctx, pos, c.end-pos, func(extents []sdk.Extent) bool {
			select {
			case stream <- append([]sdk.Extent(nil), extents...):
				return true
			case <-ctx.Done():
				return false
			}
		})
		if err != nil && ctx.Err() == nil {
			c.err = fmt.Errorf("%s: %w", c.layer.Path, err)
		} else if ctx.Err() != nil {
			c.err = ctx.Err()
		}
	}()
}

// close ends the stream.
func (c *cursor) close() {
	if c.stream == nil {
		return
	}
	c.cancel()
	<-c.done
	c.stream, c.batch, c.err = nil, nil, nil
}

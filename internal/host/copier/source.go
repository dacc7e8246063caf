// Package copier moves guest data: convert and dd, and the comparison of
// images. It knows no formats: a source is a stream of extents that say where
// bytes lie, a target places runs of bytes, and what must be transformed goes
// through windows shared with the plugins.
package copier

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
)

// Kind says where the bytes of an Extent are.
type Kind uint8

const (
	Zero    Kind = iota // nowhere: it reads as zeros
	Data                // in a file
	Encoded             // in a form that only a Decoder reads
)

// Extent is a run of a source.
type Extent struct {
	Offset int64 // guest offset
	Length int64
	Kind   Kind
	// File and HostOffset of Data. Beyond the file's end are zeros.
	File       *os.File
	HostOffset int64
	// Encoded is what Decoder decodes; this extent begins Skip bytes into it.
	Decoder sdk.Decoder
	Encoded sdk.Extent
	Skip    int64
	// Allocated: some layer holds the range, be it as zeros. Located: it has a
	// place in a file, be it as zeros. Read: a file is read for it.
	Allocated, Located, Read bool
}

// from returns the part of e that begins n bytes into it.
func (e Extent) from(n int64) Extent {
	e.Offset, e.Length = e.Offset+n, e.Length-n
	e.HostOffset, e.Skip = e.HostOffset+n, e.Skip+n
	return e
}

// sameBytes reports whether a and b, which begin at one guest offset, are the
// same stored bytes. files tells whether two descriptors are of one file.
func (e *Extent) sameBytes(b *Extent, files *fileIDs) bool {
	return e.Kind == Data && b.Kind == Data && e.HostOffset == b.HostOffset && files.same(e.File, b.File)
}

// fileIDs remembers which descriptors are of one file.
type fileIDs struct{ infos map[*os.File]os.FileInfo }

func (f *fileIDs) same(a, b *os.File) bool {
	if a == b {
		return true
	}
	ai, bi := f.info(a), f.info(b)
	return ai != nil && bi != nil && os.SameFile(ai, bi)
}

func (f *fileIDs) info(file *os.File) os.FileInfo {
	fi, ok := f.infos[file]
	if !ok {
		if f.infos == nil {
			f.infos = map[*os.File]os.FileInfo{}
		}
		// A file that cannot be looked at is like no other.
		fi, _ = file.Stat()
		f.infos[file] = fi
	}
	return fi
}

// Source is a disk to be read.
type Source struct {
	Size int64
	// Unit is the allocation unit, 0 where there is none.
	Unit int64
	// Map yields the extents of a guest range: ascending, contiguous, non-empty.
	// It stops early without error when yield returns false. The slice is the
	// caller's until yield returns.
	Map func(ctx context.Context, off, length int64, yield func([]Extent) bool) error
}

// FromChain makes a source of an image with its backing files.
func FromChain(c *image.Chain) *Source {
	decoders := make([]sdk.Decoder, len(c.Layers))
	for i, l := range c.Layers {
		decoders[i], _ = sdk.As[sdk.Decoder](l.Image)
	}
	return &Source{
		Size: c.VirtualSize(),
		Unit: c.Top().Info.AllocationUnit,
		Map: func(ctx context.Context, off, length int64, yield func([]Extent) bool) error {
			var out []Extent
			var bad error
			err := c.Map(ctx, off, length, image.SplitHoles(func(in []image.Extent) bool {
				out = out[:0]
				for i := range in {
					e, err := fromImage(&in[i], decoders)
					if err != nil {
						bad = err
						return false
					}
					out = append(out, e)
				}
				return yield(out)
			}))
			return errors.Join(bad, err)
		},
	}
}

func fromImage(in *image.Extent, decoders []sdk.Decoder) (Extent, error) {
	e := Extent{Offset: in.Offset, Length: in.Length, Allocated: in.Kind != sdk.Absent}
	e.Located = in.File != nil && in.Kind != sdk.Encoded
	e.Read = in.Kind == sdk.Encoded || in.Kind == sdk.Data && (!in.Hole || !in.Raw)
	switch {
	case in.Zero():
		return e, nil
	case in.Kind == sdk.Encoded:
		e.Kind, e.Encoded, e.Skip, e.Decoder = Encoded, in.Encoded, in.Offset-in.Encoded.Offset, decoders[in.Depth]
		if e.Decoder == nil {
			return e, fmt.Errorf("encoded data at guest offset %#x, which its plugin cannot decode: %w", in.Offset, sdk.ErrUnsupported)
		}
		return e, nil
	case in.File == nil:
		return e, fmt.Errorf("data at guest offset %#x lies in a file that is not open: %w", in.Offset, sdk.ErrNotAttached)
	}
	e.Kind, e.File, e.HostOffset = Data, in.File.File, in.HostOffset
	return e, nil
}

// Concat is the sources one after the other.
func Concat(sources ...*Source) *Source {
	if len(sources) == 1 {
		return sources[0]
	}
	all := &Source{}
	for _, s := range sources {
		all.Size += s.Size
		all.Unit = max(all.Unit, s.Unit)
	}
	all.Map = func(ctx context.Context, off, length int64, yield func([]Extent) bool) error {
		start, stopped := int64(0), false
		for _, s := range sources {
			from, to := max(off-start, 0), min(off+length-start, s.Size)
			if from < to && !stopped {
				err := s.Map(ctx, from, to-from, func(batch []Extent) bool {
					for i := range batch {
						batch[i].Offset += start
					}
					stopped = !yield(batch)
					return !stopped
				})
				if err != nil {
					return err
				}
			}
			start += s.Size
		}
		return nil
	}
	return all
}

// Slice is the part of s that begins at off, length bytes of it.
func Slice(s *Source, off, length int64) *Source {
	return &Source{Size: length, Unit: s.Unit, Map: func(ctx context.Context, from, n int64, yield func([]Extent) bool) error {
		return s.Map(ctx, off+from, n, func(batch []Extent) bool {
			for i := range batch {
				batch[i].Offset -= off
			}
			return yield(batch)
		})
	}}
}

// cursor walks a source forward.
type cursor struct {
	next  func() ([]Extent, error, bool)
	stop  func()
	batch []Extent
	size  int64
}

// walk begins a walk over a whole source. Beyond its end are zeros.
func (s *Source) walk(ctx context.Context) *cursor {
	c := &cursor{size: s.Size}
	c.next, c.stop = iter.Pull2(func(yield func([]Extent, error) bool) {
		if s.Size == 0 {
			return
		}
		if err := s.Map(ctx, 0, s.Size, func(b []Extent) bool { return yield(b, nil) }); err != nil {
			yield(nil, err)
		}
	})
	return c
}

// at returns the extent that holds pos, cut to begin there. Positions ascend.
func (c *cursor) at(pos int64) (Extent, error) {
	if pos >= c.size {
		return Extent{Offset: pos, Length: 1<<63 - 1 - pos}, nil
	}
	for {
		for len(c.batch) > 0 {
			if e := c.batch[0]; pos < e.Offset+e.Length {
				return e.from(pos - e.Offset), nil
			}
			c.batch = c.batch[1:]
		}
		batch, err, ok := c.next()
		if err != nil {
			return Extent{}, err
		}
		if !ok {
			return Extent{}, fmt.Errorf("no map at guest offset %#x: %w", pos, sdk.ErrCorrupt)
		}
		c.batch = batch
	}
}

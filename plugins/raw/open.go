// Package raw is the format without metadata: guest offset and host offset are
// the same.
package raw

import (
	"context"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const sectorSize = 512

// New returns the raw format.
func New() sdk.Format { return format{} }

type format struct{}

func (format) Describe() sdk.Description { return description() }

// Open implements sdk.Format. A last partial sector counts as a whole one, as
// for qemu-img.
func (format) Open(_ context.Context, req sdk.OpenRequest) (sdk.Image, error) {
	if len(req.Files) == 0 {
		return nil, fmt.Errorf("no file to open: %w", sdk.ErrInvalid)
	}
	if req.Snapshot != "" {
		return nil, fmt.Errorf("snapshot %q: raw images have none: %w", req.Snapshot, sdk.ErrNotFound)
	}
	f := req.Files[0].File
	length, err := f.Size()
	if err != nil {
		return nil, err
	}
	if req.Guessed {
		if err := refuseForeign(f, length); err != nil {
			return nil, err
		}
	}
	size, ok := ondisk.AlignUp(length, sectorSize)
	if !ok {
		return nil, fmt.Errorf("file length %d: %w", length, sdk.ErrTooBig)
	}
	return &image{file: f, length: length, size: size, writable: req.ReadWrite}, nil
}

// image is an opened file. It has no state that changes.
type image struct {
	file     sdk.File
	length   int64 // of the file, when it was opened
	size     int64 // virtual
	writable bool
}

func (img *image) Info(context.Context) (*sdk.Info, error) {
	return &sdk.Info{VirtualSize: img.size}, nil
}

func (img *image) Close() error { return nil }

// Map implements sdk.Image: data to the end of the file, zeros to the end of
// its last sector.
func (img *image) Map(ctx context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	if !ondisk.Within(off, length, img.size) {
		return fmt.Errorf("map %#x+%#x beyond virtual size %#x: %w", off, length, img.size, sdk.ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	var extents []sdk.Extent
	if n := min(off+length, img.length) - off; n > 0 {
		extents = append(extents, sdk.Extent{Offset: off, Length: n, Kind: sdk.Data, HostOffset: off, Sparse: true, Raw: true})
	}
	if at := max(off, img.length); at < off+length {
		extents = append(extents, sdk.Extent{Offset: at, Length: off + length - at, Kind: sdk.Zero, HostOffset: at})
	}
	if len(extents) > 0 {
		yield(extents)
	}
	return nil
}

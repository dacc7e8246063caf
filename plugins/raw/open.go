// Package raw is the format without metadata: guest offset and host offset are
// the same.
package raw

import (
	"context"
	"fmt"
	"math"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
	"github.com/instar-img/instar/sdk/option"
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
	img := &image{file: f, writable: req.ReadWrite}
	return img, img.choosePart(length, req.Options)
}

// choosePart makes a part of a file of this length the disk, as the options say.
func (img *image) choosePart(length int64, options map[string]string) error {
	whole, ok := ondisk.AlignUp(length, sectorSize)
	if !ok {
		return fmt.Errorf("file length %d: %w", length, sdk.ErrTooBig)
	}
	invalid := func(format string, args ...any) error {
		return &sdk.Error{Text: fmt.Sprintf(format, args...), Class: sdk.ErrInvalid}
	}
	number := func(key string, def int64) (int64, error) {
		text, given := options[key]
		if !given {
			return def, nil
		}
		n, err := option.ParseSize(text)
		if err != nil {
			return 0, &sdk.Error{
				Text:  fmt.Sprintf("Parameter '%s' expects a non-negative number below 2^64", key),
				Hint:  "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta- and exabytes, respectively.",
				Class: sdk.ErrInvalid,
			}
		}
		return int64(min(n, math.MaxInt64)), nil
	}
	var err error
	if img.base, err = number(keyOffset, 0); err != nil {
		return err
	}
	if img.base > whole {
		return invalid("Offset (%d) cannot be greater than size of the containing file (%d)", img.base, whole)
	}
	size, err := number(keySize, whole-img.base)
	if err != nil {
		return err
	}
	if _, given := options[keySize]; given && size > whole-img.base {
		return invalid("The sum of offset (%d) and size (%d) has to be smaller or equal to the  actual size of the containing file (%d)", img.base, size, whole)
	} else if given && size%sectorSize != 0 {
		return invalid("Specified size is not multiple of 512")
	}
	img.length = max(0, min(length-img.base, size))
	if img.size, ok = ondisk.AlignUp(size, sectorSize); !ok {
		return fmt.Errorf("size %d: %w", size, sdk.ErrTooBig)
	}
	return nil
}

// image is an opened file. It has no state that changes.
type image struct {
	file     sdk.File
	base     int64 // where the disk begins in the file
	length   int64 // of the disk's part of the file, when it was opened
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
		extents = append(extents, sdk.Extent{Offset: off, Length: n, Kind: sdk.Data, HostOffset: img.base + off, Sparse: true, Raw: true})
	}
	if at := max(off, img.length); at < off+length {
		extents = append(extents, sdk.Extent{Offset: at, Length: off + length - at, Kind: sdk.Zero, HostOffset: img.base + at})
	}
	if len(extents) > 0 {
		yield(extents)
	}
	return nil
}

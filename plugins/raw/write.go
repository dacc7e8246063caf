package raw

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// BeginWrite implements sdk.Writer. What a file holds already only the core
// knows, so nothing is promised about units that are not written.
func (img *image) BeginWrite(_ context.Context, req sdk.WriteRequest) (sdk.WriteInfo, error) {
	if !img.writable {
		return sdk.WriteInfo{}, fmt.Errorf("raw image opened for reading: %w", sdk.ErrReadOnly)
	}
	if req.Compressed {
		return sdk.WriteInfo{}, &sdk.Error{Text: "Compression not supported for this file format", Class: sdk.ErrUnsupported}
	}
	return sdk.WriteInfo{Unit: sectorSize, InPlace: img.base == 0}, nil
}

func (img *image) checkRuns(runs []sdk.Run) error {
	for _, r := range runs {
		if r.Length <= 0 || !ondisk.Within(r.Offset, r.Length, img.size) {
			return fmt.Errorf("run %#x+%#x beyond virtual size %#x: %w", r.Offset, r.Length, img.size, sdk.ErrInvalid)
		}
	}
	return nil
}

// Place implements sdk.Writer.
func (img *image) Place(_ context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	if err := img.checkRuns(runs); err != nil {
		return nil, err
	}
	places := make([]sdk.Placement, len(runs))
	for i, r := range runs {
		places[i] = sdk.Placement{Offset: r.Offset, Length: r.Length, HostOffset: img.base + r.Offset}
	}
	return places, nil
}

// Zero implements sdk.Writer. It gives space back where it can; elsewhere what
// reads as zeros already is left as it is, so that holes stay holes.
func (img *image) Zero(ctx context.Context, runs []sdk.Run) error {
	if err := img.checkRuns(runs); err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	zeros := make([]byte, len(buf))
	for _, r := range runs {
		if sdk.Discard(img.file, img.base+r.Offset, r.Length) {
			continue
		}
		for at, end := img.base+r.Offset, img.base+r.Offset+r.Length; at < end; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(int64(len(buf)), end-at)
			got, err := img.file.ReadAt(buf[:n], at)
			if err != nil && !errors.Is(err, io.EOF) {
				return fmt.Errorf("read %#x bytes at %#x: %w", n, at, err)
			}
			if !bytes.Equal(buf[:got], zeros[:got]) {
				if _, err := img.file.WriteAt(zeros[:got], at); err != nil {
					return fmt.Errorf("zero %#x bytes at %#x: %w", got, at, err)
				}
			}
			at += n
		}
	}
	return nil
}

// Encode implements sdk.Writer: raw images have no encoded form.
func (img *image) Encode(context.Context, []sdk.Unit) error {
	return fmt.Errorf("raw images have no encoded form: %w", sdk.ErrUnsupported)
}

// Finish implements sdk.Writer. The file becomes as long as the disk.
func (img *image) Finish(context.Context) error {
	length, err := img.file.Size()
	if err != nil {
		return err
	}
	if length < img.base+img.size {
		return img.file.Truncate(img.base + img.size)
	}
	return nil
}

package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
)

// bitmapCopy is the persistent bitmaps that a conversion takes along.
type bitmapCopy struct {
	from    sdk.BitmapReader
	bitmaps []sdk.BitmapInfo
}

// selectBitmaps chooses the bitmaps to copy. Inconsistent ones are an error,
// or left out with a warning where skipBroken.
func selectBitmaps(sources []*image.Chain, skipBroken bool, warn func(string)) (*bitmapCopy, error) {
	if len(sources) != 1 {
		return nil, errors.New("Copying bitmaps only possible with single source")
	}
	layer := sources[0].Top()
	c := &bitmapCopy{}
	for _, b := range layer.Info.Bitmaps {
		if !b.Inconsistent {
			c.bitmaps = append(c.bitmaps, b)
			continue
		}
		if !skipBroken {
			return nil, fmt.Errorf("Cannot copy inconsistent bitmap '%s'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it", b.Name)
		}
		warn(fmt.Sprintf("Skipping inconsistent bitmap '%s'", b.Name))
	}
	if len(c.bitmaps) == 0 {
		return c, nil
	}
	var ok bool
	if c.from, ok = sdk.As[sdk.BitmapReader](layer.Image); !ok {
		return nil, fmt.Errorf("Format driver '%s' does not support bitmaps", layer.Format())
	}
	return c, nil
}

// writeTo gives a target the bitmaps.
func (c *bitmapCopy) writeTo(ctx context.Context, t *image.Target) error {
	if !t.Info.HasBitmaps {
		return fmt.Errorf("Format driver '%s' does not support bitmaps", t.Format())
	}
	to, ok := sdk.As[sdk.BitmapWriter](t.Image)
	if !ok && len(c.bitmaps) > 0 {
		return fmt.Errorf("Format driver '%s' does not support bitmaps", t.Format())
	}
	for _, b := range c.bitmaps {
		// The first call makes the bitmap, be it empty.
		if err := to.WriteBitmap(ctx, b, nil); err != nil {
			return fmt.Errorf("Failed to populate bitmap %s: %w", b.Name, err)
		}
		var failed error
		err := c.from.ReadBitmap(ctx, b.Name, func(runs []sdk.Run) bool {
			failed = to.WriteBitmap(ctx, b, runs)
			return failed == nil
		})
		if err = errors.Join(err, failed); err != nil {
			return fmt.Errorf("Failed to populate bitmap %s: %w", b.Name, err)
		}
	}
	return nil
}

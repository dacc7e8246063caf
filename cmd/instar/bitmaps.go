package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/instar-img/instar/internal/host/gate"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
)

// bitmapCopy is the persistent bitmaps that a conversion takes along.
type bitmapCopy struct {
	from    sdk.BitmapReader
	bitmaps []sdk.BitmapInfo
}

// maxBitmaps bounds what is done for one image: more than any program makes.
const maxBitmaps = 4096

// bitmapName is a bitmap's name for a message of one line.
func bitmapName(b sdk.BitmapInfo) string {
	const most = 256 // bytes
	if len(b.Name) > most {
		b.Name = b.Name[:most] + "..."
	}
	return gate.OneLine(b.Name)
}

// selectBitmaps chooses the bitmaps to copy. Inconsistent ones are an error,
// or left out with a warning where skipBroken.
func selectBitmaps(sources []*image.Chain, skipBroken bool, warn func(string)) (*bitmapCopy, error) {
	if len(sources) != 1 {
		return nil, errors.New("Copying bitmaps only possible with single source")
	}
	layer := sources[0].Top()
	if !layer.Info.HasBitmaps {
		return nil, errors.New("Source lacks bitmap support")
	}
	if n := len(layer.Info.Bitmaps); n > maxBitmaps {
		return nil, fmt.Errorf("the source has %d bitmaps, at most %d can be copied", n, maxBitmaps)
	}
	c := &bitmapCopy{}
	for _, b := range layer.Info.Bitmaps {
		if !b.Inconsistent {
			c.bitmaps = append(c.bitmaps, b)
			continue
		}
		if !skipBroken {
			return nil, fmt.Errorf("Cannot copy inconsistent bitmap '%s'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it", bitmapName(b))
		}
		warn(fmt.Sprintf("Skipping inconsistent bitmap '%s'", bitmapName(b)))
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

// check refuses a target that cannot be given the bitmaps.
func (c *bitmapCopy) check(t *image.Target) error {
	if !t.Info.HasBitmaps {
		return fmt.Errorf("Format driver '%s' does not support bitmaps", t.Format())
	}
	if _, ok := sdk.As[sdk.BitmapWriter](t.Image); !ok && len(c.bitmaps) > 0 {
		return fmt.Errorf("Format driver '%s' does not support bitmaps", t.Format())
	}
	for _, b := range c.bitmaps {
		if slices.ContainsFunc(t.Info.Bitmaps, func(old sdk.BitmapInfo) bool { return old.Name == b.Name }) {
			return fmt.Errorf("Failed to create bitmap %s: Bitmap already exists: %[1]s", bitmapName(b))
		}
	}
	return nil
}

// writeTo gives a target that check has passed the bitmaps.
func (c *bitmapCopy) writeTo(ctx context.Context, t *image.Target) error {
	to, _ := sdk.As[sdk.BitmapWriter](t.Image)
	for _, b := range c.bitmaps {
		// The first call makes the bitmap, be it empty.
		if err := to.WriteBitmap(ctx, b, nil); err != nil {
			return fmt.Errorf("Failed to populate bitmap %s: %w", bitmapName(b), err)
		}
		var failed error
		err := c.from.ReadBitmap(ctx, b.Name, func(runs []sdk.Run) bool {
			failed = to.WriteBitmap(ctx, b, runs)
			return failed == nil
		})
		if err = errors.Join(err, failed); err != nil {
			return fmt.Errorf("Failed to populate bitmap %s: %w", bitmapName(b), err)
		}
	}
	return nil
}

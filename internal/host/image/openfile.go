package image

import (
	"context"
	"fmt"
	"os"

	"github.com/instar-img/instar/internal/host/gate"
)

// OpenBackingChain is OpenBacking for a caller who reads the image: none of the
// files below it may be missing.
func (o *Opener) OpenBackingChain(ctx context.Context, path, name, format string) (*Chain, error) {
	return o.Open(ctx, gate.Resolve(path, name), Options{Format: format, Backing: true})
}

// OpenFile opens an image whose main file is open already, and takes it over.
// name stands for it in messages.
func (o *Opener) OpenFile(ctx context.Context, name string, file *os.File, opts Options) (*Chain, error) {
	opts.Name = name
	if err := o.admit(opts); err != nil {
		file.Close()
		return nil, couldNotOpen(name, err)
	}
	walk := o.Gate.NewWalk()
	fd := file.Fd()
	again := func() (*os.File, error) { return os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)) }
	layer, err := o.openTop(ctx, walk, name, file, again, opts)
	if err != nil {
		return nil, err
	}
	chain := &Chain{Layers: []*Layer{layer}}
	if opts.Backing {
		if err := o.openBackings(ctx, walk, chain, opts); err != nil {
			chain.Close()
			return nil, err
		}
	}
	return chain, nil
}

package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"

	"github.com/instar-img/instar/internal/host/copier"
)

// digest is that of the source's content. Methods of a nil digest do nothing.
type digest struct {
	name string
	hash hash.Hash
	src  *copier.Source
	left int64      // bytes of the content that the tee has not seen
	done chan error // of reading the source for it alone; nil where not begun
}

// newDigest returns the digest of that name, nil where name is empty.
func newDigest(name string, src *copier.Source) *digest {
	if name == "" {
		return nil
	}
	return &digest{name: name, hash: sha256.New(), src: src, left: src.Size}
}

// tee returns a writer to w of the whole content in order, which is hashed on
// its way. What follows the content is not.
func (d *digest) tee(w io.Writer) io.Writer {
	if d == nil {
		return w
	}
	return io.MultiWriter(w, d)
}

// Write takes the next part of the content.
func (d *digest) Write(p []byte) (int, error) {
	n := min(int64(len(p)), d.left)
	d.left -= n
	d.hash.Write(p[:n])
	return len(p), nil
}

// start begins to read the source for the digest, beside a copy with opts that
// does not go in order.
func (d *digest) start(ctx context.Context, opts copier.Options) {
	if d == nil {
		return
	}
	own := copier.Options{Workers: opts.Workers, Rate: opts.Rate}
	if opts.Salvage != nil {
		own.Salvage = func(int64, int64, error) {} // the copy tells
	}
	d.done = make(chan error, 1)
	go func() { d.done <- copier.Stream(ctx, d.src, d, own) }()
}

// wait returns when the digest is there.
func (d *digest) wait() error {
	if d == nil || d.done == nil {
		return nil
	}
	if err := <-d.done; err != nil {
		return fmt.Errorf("digest: %w", err)
	}
	return nil
}

func (d *digest) printTo(w io.Writer) error {
	if d == nil {
		return nil
	}
	_, err := fmt.Fprintf(w, "%s: %x\n", d.name, d.hash.Sum(nil))
	return err
}

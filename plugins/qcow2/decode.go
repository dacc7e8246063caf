package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/inflate"
)

// decoders are what an image's Decode calls share.
type decoders struct {
	pool sync.Pool // *clusterBuffers
	once sync.Once
	zstd *zstd.Decoder
	err  error
}

// clusterBuffers serve one decompression at a time.
type clusterBuffers struct {
	in  []byte // compressed bytes
	out []byte // one cluster, with room for zstdSlack behind it
}

// zstdSlack is how far behind the end of what it decodes the zstd decoder likes
// to write: it copies a third faster then than to the byte.
const zstdSlack = 32

// Decode inflates the cluster that e lies in. It stops at the cluster's size
// whatever the compressed data say.
func (im *image) Decode(ctx context.Context, e sdk.Extent, dst []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if im.h.crypt != cryptNone {
		return fmt.Errorf("encrypted cluster at %#x: %w", e.HostOffset, sdk.ErrUnsupported)
	}
	into := e.Offset & (im.g.clusterSize - 1)
	if e.Kind != sdk.Encoded || e.Length != int64(len(dst)) || into+e.Length > im.g.clusterSize ||
		e.HostOffset < 0 || e.EncodedLength <= 0 || e.EncodedLength > 2*im.g.clusterSize+512 {
		return fmt.Errorf("extent %+v is not a compressed cluster: %w", e, sdk.ErrInvalid)
	}
	f, _, err := im.dataFile()
	if err != nil {
		return err
	}
	d, _ := im.decoders.pool.Get().(*clusterBuffers)
	if d == nil {
		d = &clusterBuffers{}
	}
	defer im.decoders.pool.Put(d)
	if int64(cap(d.in)) < e.EncodedLength {
		d.in = make([]byte, e.EncodedLength)
	}
	d.in = d.in[:e.EncodedLength]
	// The last sector may be cut by the end of the file.
	n, err := f.ReadAt(d.in, e.HostOffset)
	if err != nil && (!errors.Is(err, io.EOF) || n == 0) {
		return fmt.Errorf("compressed cluster at %#x: %w", e.HostOffset, err)
	}
	out, whole := dst, e.Length == im.g.clusterSize && im.h.compression != compressionZstd
	if !whole {
		if d.out == nil {
			d.out = make([]byte, im.g.clusterSize, im.g.clusterSize+zstdSlack)
		}
		out = d.out
	}
	if im.h.compression == compressionZstd {
		err = im.unzstd(out, d.in[:n])
	} else {
		err = inflate.Fill(out, d.in[:n])
	}
	if err != nil {
		return fmt.Errorf("compressed cluster at %#x: %w: %w", e.HostOffset, err, sdk.ErrCorrupt)
	}
	if !whole {
		copy(dst, out[into:])
	}
	return nil
}

// unzstd fills out from zstd frames, and may write into what out has room for
// behind that. What follows the last one in its sector
// belongs to another cluster.
func (im *image) unzstd(out, in []byte) error {
	d := &im.decoders
	d.once.Do(func() {
		d.zstd, d.err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true),
			// The limit holds for windows too, which may be larger than the
			// cluster: 8 MiB is what every decoder must take (RFC 8878, 3.1.1.1.2).
			zstd.WithDecoderMaxMemory(8<<20))
	})
	if d.err != nil {
		return d.err
	}
	filled := 0
	for filled < len(out) {
		n, err := zstdFrame(in)
		if err != nil {
			return err
		}
		b, err := d.zstd.DecodeAll(in[:n], out[filled:filled])
		if err != nil {
			return err
		}
		if len(b) == 0 {
			return io.ErrUnexpectedEOF
		}
		if len(b) > len(out)-filled {
			return fmt.Errorf("zstd frame is larger than the cluster")
		}
		filled += len(b)
		in = in[n:]
	}
	return nil
}

// zstdFrame returns the length of the frame that b begins with (RFC 8878,
// 3.1.1).
func zstdFrame(b []byte) (int, error) {
	short := fmt.Errorf("zstd frame: %w", io.ErrUnexpectedEOF)
	if len(b) < 6 {
		return 0, short
	}
	if !bytes.Equal(b[:4], []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		return 0, fmt.Errorf("zstd frame: no magic")
	}
	descriptor := b[4]
	single := descriptor>>5&1 != 0
	n := 5 + [4]int{0, 1, 2, 4}[descriptor&3]
	if single {
		n += [4]int{1, 2, 4, 8}[descriptor>>6]
	} else {
		n += 1 + [4]int{0, 2, 4, 8}[descriptor>>6]
	}
	for {
		if len(b)-n < 3 {
			return 0, short
		}
		block := int(b[n]) | int(b[n+1])<<8 | int(b[n+2])<<16
		n += 3
		size := block >> 3
		switch block >> 1 & 3 {
		case 1: // one byte, repeated
			size = 1
		case 3:
			return 0, fmt.Errorf("zstd frame: reserved block type")
		}
		if size > len(b)-n {
			return 0, short
		}
		n += size
		if block&1 != 0 {
			break
		}
	}
	if descriptor>>2&1 != 0 { // checksum
		n += 4
	}
	if n > len(b) {
		return 0, short
	}
	return n, nil
}

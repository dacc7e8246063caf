package qcow2

import (
	"errors"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// deflateWindow is the window of the deflate streams in qcow2 images: readers
// are entitled to provide no more.
const deflateWindow = 4096

// encoder compresses clusters, many at a time.
type encoder struct {
	clusterSize int64
	pool        sync.Pool // *encodeBuffer
	zstd        *zstd.Encoder
}

// encodeBuffer takes the compressed bytes of one cluster and refuses more than
// are worth it.
type encodeBuffer struct {
	out   []byte
	in    []byte // a whole cluster, where the disk ends within
	flate *flate.Writer
}

var errIncompressible = errors.New("does not get smaller")

func (b *encodeBuffer) Write(p []byte) (int, error) {
	if len(b.out)+len(p) > cap(b.out) {
		return 0, errIncompressible
	}
	b.out = append(b.out, p...)
	return len(p), nil
}

func (e *encoder) init(useZstd bool, clusterSize int64) error {
	e.clusterSize = clusterSize
	if !useZstd {
		return nil
	}
	var err error
	e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(int(max(clusterSize, zstd.MinWindowSize))), zstd.WithLowerEncoderMem(true))
	return err
}

func (e *encoder) close() {
	if e.zstd != nil {
		_ = e.zstd.Close() // nothing was streamed
	}
}

func (e *encoder) get() *encodeBuffer {
	if b, ok := e.pool.Get().(*encodeBuffer); ok {
		return b
	}
	return &encodeBuffer{out: make([]byte, 0, e.clusterSize-1)}
}

func (e *encoder) put(b *encodeBuffer) { e.pool.Put(b) }

// compress returns src in compressed form, nil where that is not smaller than
// a cluster. What is missing of a cluster counts as zeros.
func (e *encoder) compress(b *encodeBuffer, src []byte) ([]byte, error) {
	if int64(len(src)) < e.clusterSize {
		if b.in == nil {
			b.in = make([]byte, e.clusterSize)
		}
		clear(b.in[copy(b.in, src):])
		src = b.in
	}
	if e.zstd != nil {
		b.out = e.zstd.EncodeAll(src, b.out[:0])
		if int64(len(b.out)) >= e.clusterSize {
			return nil, nil
		}
		return b.out, nil
	}
	b.out = b.out[:0]
	if b.flate == nil {
		var err error
		if b.flate, err = flate.NewWriterWindow(b, deflateWindow); err != nil {
			return nil, err
		}
	} else {
		b.flate.Reset(b)
	}
	_, err := b.flate.Write(src)
	if err == nil {
		err = b.flate.Close()
	}
	if errors.Is(err, errIncompressible) {
		return nil, nil
	}
	return b.out, err
}

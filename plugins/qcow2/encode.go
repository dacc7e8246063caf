package qcow2

import (
	"errors"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// deflateLevel makes images about as small as qemu-img's. Small clusters need a
// deeper search for that. It takes all of deflate's window, which readers have:
// qcow2.txt asks for deflate as it is, and qemu's own smaller window does not
// bind its inflater, which has the whole cluster before it.
func deflateLevel(clusterSize int64) int {
	if clusterSize < 64<<10 {
		return 7
	}
	return 6
}

// encoder compresses clusters, many at a time.
type encoder struct {
	clusterSize int64
	pool        sync.Pool // *encodeBuffer
	flate       sync.Pool // *flate.Writer: large, and few are in use at a time
	zstd        *zstd.Encoder
}

// encodeBuffer takes the compressed bytes of one cluster and refuses more than
// are worth it.
type encodeBuffer struct {
	out []byte
	in  []byte // a whole cluster, where the disk ends within
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
	e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderCRC(false),
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
	w, _ := e.flate.Get().(*flate.Writer)
	if w == nil {
		var err error
		if w, err = flate.NewWriter(b, deflateLevel(e.clusterSize)); err != nil {
			return nil, err
		}
	} else {
		w.Reset(b)
	}
	_, err := w.Write(src)
	if err == nil {
		err = w.Close()
	}
	e.flate.Put(w)
	if errors.Is(err, errIncompressible) {
		return nil, nil
	}
	return b.out, err
}

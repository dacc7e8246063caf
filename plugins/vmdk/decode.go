package vmdk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zlib"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// inflater is what decoding a grain needs, kept for the next one.
type inflater struct {
	packed []byte // marker and deflated bytes
	plain  []byte // of a grain that is wanted in part
	source bytes.Reader
	zlib   io.ReadCloser
}

var inflaters = sync.Pool{New: func() any { return new(inflater) }}

// Decode implements sdk.Decoder.
func (img *image) Decode(_ context.Context, x sdk.Extent, dst []byte) error {
	l := img.layout.Load()
	if x.Kind != sdk.Encoded || x.Length != int64(len(dst)) || x.Length <= 0 || !ondisk.Within(x.Offset, x.Length, l.size) {
		return fmt.Errorf("decode %#x+%#x: %w", x.Offset, x.Length, sdk.ErrInvalid)
	}
	i := l.find(x.Offset)
	e := l.extents[i]
	s := e.sparse
	if s == nil || !s.compressed || x.File != e.index {
		return fmt.Errorf("decode %#x: not a compressed grain: %w", x.Offset, sdk.ErrInvalid)
	}
	skip := (x.Offset - e.start) % s.grain
	if x.Length > s.grain-skip || x.Offset+x.Length > e.start+e.length {
		return fmt.Errorf("decode %#x+%#x: more than a grain: %w", x.Offset, x.Length, sdk.ErrInvalid)
	}
	inf := inflaters.Get().(*inflater)
	defer inflaters.Put(inf)
	if err := inf.decode(e, x.HostOffset, skip, dst); err != nil {
		return fmt.Errorf("extent %d: compressed grain at %#x: %w", i, x.HostOffset, err)
	}
	return nil
}

// decode fills dst with what follows the first skip bytes of the grain at a
// host offset.
func (inf *inflater) decode(e *extent, host, skip int64, dst []byte) error {
	packed, err := inf.read(e, host)
	if err != nil {
		return err
	}
	grain := e.sparse.grain
	out := dst
	if int64(len(dst)) < grain {
		if int64(cap(inf.plain)) < grain {
			inf.plain = make([]byte, grain)
		}
		out = inf.plain[:grain]
	}
	n, err := inf.inflate(packed, out)
	if err != nil {
		return err
	}
	if int64(n) < skip+int64(len(dst)) {
		return fmt.Errorf("%d bytes, want %d: %w", n, skip+int64(len(dst)), sdk.ErrCorrupt)
	}
	if int64(len(dst)) < grain {
		copy(dst, out[skip:])
	}
	return nil
}

// read returns the deflated bytes of the grain at a host offset, and what
// follows them where the image has no markers.
func (inf *inflater) read(e *extent, host int64) ([]byte, error) {
	s := e.sparse
	most := min(s.encodedMax(), e.fileSize-host)
	if host < 0 || most <= grainMarkerSize {
		return nil, fmt.Errorf("beyond end of file %#x: %w", e.fileSize, sdk.ErrCorrupt)
	}
	if int64(cap(inf.packed)) < most {
		inf.packed = make([]byte, most)
	}
	b := inf.packed[:most]
	// Half a grain is enough for most.
	first := most
	if s.markers {
		first = min(most, s.grain/2+sectorSize)
	}
	if err := readFull(e.file, b[:first], host); err != nil {
		return nil, err
	}
	if !s.markers {
		return b, nil
	}
	var m marker
	if err := m.decode(b[:16]); err != nil {
		return nil, err
	}
	n := grainMarkerSize + int64(m.size)
	if m.size == 0 || n > most {
		return nil, fmt.Errorf("marker says %d bytes, %d at most are there: %w", m.size, most-grainMarkerSize, sdk.ErrCorrupt)
	}
	if n > first {
		if err := readFull(e.file, b[first:n], host+first); err != nil {
			return nil, err
		}
	}
	return b[grainMarkerSize:n], nil
}

// readFull fills b from off.
func readFull(f sdk.File, b []byte, off int64) error {
	if n, err := f.ReadAt(b, off); n < len(b) {
		if err == nil || errors.Is(err, io.EOF) {
			err = fmt.Errorf("%#x bytes at %#x beyond end of file: %w", len(b), off, sdk.ErrCorrupt)
		}
		return err
	}
	return nil
}

// inflate fills out as far as the stream goes, and refuses one that goes on.
func (inf *inflater) inflate(packed, out []byte) (int, error) {
	inf.source.Reset(packed)
	var err error
	if inf.zlib == nil {
		inf.zlib, err = zlib.NewReader(&inf.source)
	} else {
		err = inf.zlib.(zlib.Resetter).Reset(&inf.source, nil)
	}
	if err != nil {
		return 0, corruptStream(err)
	}
	n, err := io.ReadFull(inf.zlib, out)
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF) && inf.ended():
		// Checked to its end, and shorter than the grain: the disk's last.
		return n, nil
	case err != nil:
		return 0, corruptStream(err)
	}
	var more [1]byte
	if k, err := inf.zlib.Read(more[:]); k != 0 {
		return 0, fmt.Errorf("more than a grain of %d bytes: %w", len(out), sdk.ErrCorrupt)
	} else if !errors.Is(err, io.EOF) {
		return 0, corruptStream(err)
	}
	return n, nil
}

// ended reports whether the stream ended as it should: a reader that found it
// sound goes on saying EOF, one that ran out of bytes says unexpected EOF.
func (inf *inflater) ended() bool {
	var more [1]byte
	_, err := inf.zlib.Read(more[:])
	return err == io.EOF
}

func corruptStream(err error) error {
	if err == nil {
		err = io.ErrNoProgress
	}
	return fmt.Errorf("%w: %w", err, sdk.ErrCorrupt)
}

package vmdk

import (
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk/ondisk"
)

// Types of markers in a streamOptimized extent.
const (
	markerEndOfStream    = 0
	markerGrainTable     = 1
	markerGrainDirectory = 2
	markerFooter         = 3
)

// grainMarkerSize is what stands before a compressed grain: its guest sector
// and the number of deflated bytes.
const grainMarkerSize = 12

// marker announces metadata in a streamOptimized extent, in a sector of its
// own. A size other than 0 makes it a grain marker, whose value is the grain's
// guest sector, and whose data begins where the type would stand.
type marker struct {
	value uint64 // sectors of metadata that follow
	size  uint32 // bytes of compressed data, 0 for metadata
	kind  uint32
}

func (m *marker) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.LittleEndian)
	m.value, m.size, m.kind = c.U64(), c.U32(), c.U32()
	if c.Err() != nil {
		return fmt.Errorf("marker: %w", c.Err())
	}
	return nil
}

// append appends a metadata marker, a sector long.
func (m *marker) append(b []byte) []byte {
	n := len(b)
	b = binary.LittleEndian.AppendUint64(b, m.value)
	b = binary.LittleEndian.AppendUint32(b, m.size)
	b = binary.LittleEndian.AppendUint32(b, m.kind)
	return append(b, make([]byte, n+sectorSize-len(b))...)
}

// validate checks that m is a metadata marker of the kind wanted.
func (m *marker) validate(kind uint32) error {
	if m.size != 0 || m.kind != kind {
		return fmt.Errorf("marker of type %d, size %d, want type %d", m.kind, m.size, kind)
	}
	return nil
}

package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	bitmapFixed        = 24
	maxBitmaps         = 65535
	maxBitmapDirectory = 1024 * 65535
	maxBitmapTable     = 0x8000000 // entries
	maxBitmapNameSize  = 1023

	bitmapInUse = 1 << 0
	bitmapAuto  = 1 << 1
)

// bitmapEntry is an entry of the bitmap directory (qcow2.txt, "Bitmap
// directory").
type bitmapEntry struct {
	tableOffset     uint64
	tableSize       uint32 // entries
	flags           uint32
	kind            uint8
	granularityBits uint8
	name            string
	extra           []byte
}

// decode reads one entry and returns its length, with padding.
func (e *bitmapEntry) decode(b []byte) (int64, error) {
	c := ondisk.NewCursor(b, binary.BigEndian)
	e.tableOffset = c.U64()
	e.tableSize = c.U32()
	e.flags = c.U32()
	e.kind = c.U8()
	e.granularityBits = c.U8()
	nameSize := int(c.U16())
	extraSize := c.U32()
	if c.Err() == nil && int64(extraSize) > int64(c.Left()) {
		return 0, fmt.Errorf("bitmap directory entry: %w", ondisk.ErrShort)
	}
	e.extra = append([]byte(nil), c.Bytes(int(extraSize))...)
	e.name = string(c.Bytes(nameSize))
	if c.Err() != nil {
		return 0, fmt.Errorf("bitmap directory entry: %w", c.Err())
	}
	return (int64(c.Offset()) + 7) &^ 7, nil
}

func (e *bitmapEntry) append(b []byte) []byte {
	be := binary.BigEndian
	start := len(b)
	b = be.AppendUint64(b, e.tableOffset)
	b = be.AppendUint32(b, e.tableSize)
	b = be.AppendUint32(b, e.flags)
	b = append(b, e.kind, e.granularityBits)
	b = be.AppendUint16(b, uint16(len(e.name)))
	b = be.AppendUint32(b, uint32(len(e.extra)))
	b = append(b, e.extra...)
	b = append(b, e.name...)
	return append(b, make([]byte, -(len(b)-start)&7)...)
}

// validate checks what qemu checks before it uses an entry.
func (e *bitmapEntry) validate(g geometry, virtualSize uint64) error {
	fail := e.tableSize == 0 || e.tableSize > maxBitmapTable ||
		e.tableOffset == 0 || e.tableOffset%uint64(g.clusterSize) != 0 || e.tableOffset >= 1<<56 ||
		e.granularityBits > 31 || e.granularityBits < 9 ||
		e.flags&^(bitmapInUse|bitmapAuto) != 0 || e.name == "" || len(e.name) > maxBitmapNameSize || e.kind != 1
	if !fail && e.flags&bitmapInUse == 0 {
		// An inconsistent bitmap may have any length.
		bits := divUp(int64(virtualSize), 1<<e.granularityBits)
		fail = divUp(divUp(bits, 8), g.clusterSize) != int64(e.tableSize)
	}
	if fail {
		return &sdk.Error{Text: fmt.Sprintf("Bitmap '%s' doesn't satisfy the constraints", e.name), Class: sdk.ErrCorrupt}
	}
	return nil
}

// decodeBitmaps reads the bitmap directory, with the words of qemu where it
// refuses one.
func decodeBitmaps(b []byte, count uint32, g geometry, virtualSize uint64) ([]bitmapEntry, error) {
	bad := func(text string) ([]bitmapEntry, error) {
		return nil, &sdk.Error{Text: text, Class: sdk.ErrCorrupt}
	}
	var list []bitmapEntry
	for len(b) > 0 {
		if uint32(len(list)) == count && len(b) >= bitmapFixed {
			return bad("More bitmaps found than specified in header extension")
		}
		var e bitmapEntry
		n, err := e.decode(b)
		if err != nil || n > int64(len(b)) {
			return bad("Broken bitmap directory")
		}
		if len(e.extra) > 0 {
			return bad("Bitmap extra data is not supported")
		}
		if err := e.validate(g, virtualSize); err != nil {
			return nil, err
		}
		list = append(list, e)
		b = b[n:]
	}
	if uint32(len(list)) != count {
		return bad("Less bitmaps found than specified in header extension")
	}
	return list, nil
}

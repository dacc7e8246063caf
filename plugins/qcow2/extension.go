package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// Types of header extensions (qcow2.txt, "Header extensions").
const (
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatures      = 0x6803f857
	extCrypto        = 0x0537be77
	extBitmaps       = 0x23852875
	extDataFile      = 0x44415441
)

// extension is one header extension: its data without padding.
type extension struct {
	kind uint32
	data []byte
}

// decodeExtensions reads extensions up to the end marker or the end of b, the
// bytes between the header and the backing file name.
func decodeExtensions(b []byte) ([]extension, error) {
	var list []extension
	for off := int64(0); int64(len(b))-off >= 8; {
		kind := binary.BigEndian.Uint32(b[off:])
		length := int64(binary.BigEndian.Uint32(b[off+4:]))
		off += 8
		if kind == extEnd {
			return list, nil
		}
		if length > int64(len(b))-off {
			return list, &sdk.Error{Text: "Header extension too large", Class: sdk.ErrCorrupt}
		}
		list = append(list, extension{kind, b[off : off+length]})
		off += (length + 7) &^ 7
	}
	return list, nil
}

// appendExtension adds one extension, padded to eight bytes.
func appendExtension(b []byte, e extension) []byte {
	b = binary.BigEndian.AppendUint32(b, e.kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(e.data)))
	b = append(b, e.data...)
	return append(b, make([]byte, -len(e.data)&7)...)
}

// feature is one row of the feature name table.
type feature struct {
	kind, bit byte // kind: 0 incompatible, 1 compatible, 2 autoclear
	name      string
}

// knownFeatures lists the features in the order in which qemu-img writes them.
var knownFeatures = [...]feature{
	{0, 0, "dirty bit"},
	{0, 1, "corrupt bit"},
	{0, 2, "external data file"},
	{0, 3, "compression type"},
	{0, 4, "extended L2 entries"},
	{1, 0, "lazy refcounts"},
	{2, 0, "bitmaps"},
	{2, 1, "raw external data"},
}

const featureRow = 48

func featureTable() []byte {
	b := make([]byte, featureRow*len(knownFeatures))
	for i, f := range knownFeatures {
		row := b[i*featureRow:]
		row[0], row[1] = f.kind, f.bit
		copy(row[2:featureRow], f.name)
	}
	return b
}

// unsupportedFeature names the unknown incompatible features of an image with
// the help of its own feature table.
func unsupportedFeature(mask uint64, table []byte) error {
	text := ""
	add := func(name string) {
		if text != "" {
			text += ", "
		}
		text += name
	}
	for len(table) >= featureRow {
		row := table[:featureRow]
		table = table[featureRow:]
		if row[0] == 0 && row[1] < 64 && mask&(1<<row[1]) != 0 {
			name := row[2:]
			for i, c := range name {
				if c == 0 {
					name = name[:i]
					break
				}
			}
			add(string(name))
			mask &^= 1 << row[1]
		}
	}
	if mask != 0 {
		add(fmt.Sprintf("Unknown incompatible feature: %x", mask))
	}
	return &sdk.Error{Text: "Unsupported qcow2 feature(s): " + text, Class: sdk.ErrUnsupported}
}

// cryptoExtension points to the LUKS header.
type cryptoExtension struct{ offset, length uint64 }

func (e *cryptoExtension) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.BigEndian)
	e.offset, e.length = c.U64(), c.U64()
	return c.Err()
}

func (e *cryptoExtension) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, e.offset)
	return binary.BigEndian.AppendUint64(b, e.length)
}

// bitmapsExtension points to the bitmap directory.
type bitmapsExtension struct {
	count             uint32
	dirSize, dirStart uint64
}

const bitmapsExtensionSize = 24

func (e *bitmapsExtension) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.BigEndian)
	e.count = c.U32()
	if c.U32() != 0 && c.Err() == nil {
		return fmt.Errorf("bitmaps extension: reserved field is not zero: %w", sdk.ErrCorrupt)
	}
	e.dirSize, e.dirStart = c.U64(), c.U64()
	return c.Err()
}

func (e *bitmapsExtension) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, e.count)
	b = binary.BigEndian.AppendUint32(b, 0)
	b = binary.BigEndian.AppendUint64(b, e.dirSize)
	return binary.BigEndian.AppendUint64(b, e.dirStart)
}

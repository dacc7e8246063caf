package vhd

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	sectorSize = 512
	footerSize = 512
	// shortFooterSize is what versions of Virtual PC before 2004 wrote.
	shortFooterSize = 511

	cookie = "conectix"

	// epoch2000 is 2000-01-01 00:00 UTC, from which time stamps count.
	epoch2000 = 946684800

	noOffset = 1<<64 - 1 // footer.dataOffset of fixed disks
)

// diskType is the footer's "Disk Type".
type diskType uint32

const (
	typeFixed        diskType = 2
	typeDynamic      diskType = 3
	typeDifferencing diskType = 4
)

func (t diskType) String() string {
	switch t {
	case typeFixed:
		return "fixed"
	case typeDynamic:
		return "dynamic"
	case typeDifferencing:
		return "differencing"
	}
	return fmt.Sprintf("type %d", uint32(t))
}

// creator is the footer's "Creator Application".
type creator [4]byte

var (
	creatorQEMU = creator{'q', 'e', 'm', 'u'} // size by geometry
	creatorQEM2 = creator{'q', 'e', 'm', '2'} // size as stored
)

// sizeByGeometry reports whether images of this creator are as large as their
// geometry: what is stored as their size is larger than what their guests see.
func (c creator) sizeByGeometry() bool {
	switch string(c[:]) {
	case "vpc ", "vs  ", "qemu":
		return true
	}
	return false
}

// footer is the hard disk footer. It ends every image; dynamic and differencing
// disks begin with a copy of it.
type footer struct {
	features       uint32
	version        uint32
	dataOffset     uint64 // of the dynamic header
	timestamp      uint32 // seconds since epoch2000
	creator        creator
	creatorVersion uint32
	creatorOS      [4]byte
	originalSize   uint64
	currentSize    uint64
	geometry       geometry
	diskType       diskType
	checksum       uint32 // as stored
	uniqueID       uuid.UUID
	savedState     uint8
	reserved       [427]byte
}

// decode parses a footer of footerSize or shortFooterSize bytes. It checks the
// cookie alone.
func (f *footer) decode(b []byte) error {
	if len(b) == shortFooterSize {
		b = append(b[:len(b):len(b)], 0)
	}
	c := ondisk.NewCursor(b, binary.BigEndian)
	if string(c.Bytes(len(cookie))) != cookie {
		return errNoCookie
	}
	f.features = c.U32()
	f.version = c.U32()
	f.dataOffset = c.U64()
	f.timestamp = c.U32()
	copy(f.creator[:], c.Bytes(4))
	f.creatorVersion = c.U32()
	copy(f.creatorOS[:], c.Bytes(4))
	f.originalSize = c.U64()
	f.currentSize = c.U64()
	f.geometry = geometry{cylinders: c.U16(), heads: c.U8(), sectors: c.U8()}
	f.diskType = diskType(c.U32())
	f.checksum = c.U32()
	copy(f.uniqueID[:], c.Bytes(16))
	f.savedState = c.U8()
	copy(f.reserved[:], c.Bytes(len(f.reserved)))
	return c.Err()
}

// errNoCookie is internal: where one footer is missing, another is looked for.
var errNoCookie = errors.New("no VHD footer")

// append returns the footer's bytes, with f.checksum as it is.
func (f *footer) append(b []byte) []byte {
	be := binary.BigEndian
	b = append(b, cookie...)
	b = be.AppendUint32(b, f.features)
	b = be.AppendUint32(b, f.version)
	b = be.AppendUint64(b, f.dataOffset)
	b = be.AppendUint32(b, f.timestamp)
	b = append(b, f.creator[:]...)
	b = be.AppendUint32(b, f.creatorVersion)
	b = append(b, f.creatorOS[:]...)
	b = be.AppendUint64(b, f.originalSize)
	b = be.AppendUint64(b, f.currentSize)
	b = be.AppendUint16(b, f.geometry.cylinders)
	b = append(b, f.geometry.heads, f.geometry.sectors)
	b = be.AppendUint32(b, uint32(f.diskType))
	b = be.AppendUint32(b, f.checksum)
	b = append(b, f.uniqueID[:]...)
	b = append(b, f.savedState)
	return append(b, f.reserved[:]...)
}

// sum returns the checksum that f should have.
func (f *footer) sum() uint32 {
	g := *f
	g.checksum = 0
	return checksum(g.append(nil))
}

// checksum is the ones' complement of the sum of the bytes. The field that
// holds it counts as zero.
func checksum(b []byte) uint32 {
	var sum uint32
	for _, x := range b {
		sum += uint32(x)
	}
	return ^sum
}

func (f *footer) validate() error {
	if f.checksum != f.sum() {
		return &sdk.Error{Text: "Incorrect header checksum", Class: sdk.ErrCorrupt}
	}
	switch f.diskType {
	case typeFixed, typeDynamic, typeDifferencing:
	default:
		return fmt.Errorf("VHD footer: disk type %d, accepted are 2, 3 and 4: %w", uint32(f.diskType), sdk.ErrUnsupported)
	}
	if f.virtualSectors() > maxSectors {
		return &sdk.Error{Text: "The image size is too large for file format 'vpc'", Class: sdk.ErrTooBig}
	}
	return nil
}

// virtualSectors returns the disk's size by the rules of its creator.
func (f *footer) virtualSectors() uint64 {
	if f.creator.sizeByGeometry() && f.geometry.total() != maxGeometry {
		return uint64(f.geometry.total())
	}
	return f.currentSize / sectorSize
}

package vhdx

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	mib = 1 << 20
	// sectorSize is the unit of the log, and of what it updates.
	sectorSize = 4096

	signature = "vhdxfile"

	header1Offset      = 64 << 10
	header2Offset      = 128 << 10
	headerSize         = 4096
	regionTable1Offset = 192 << 10
	regionTable2Offset = 256 << 10
	// headerSectionEnd is the first offset at which anything else may lie.
	headerSectionEnd = mib
)

// header is one of the two copies (MS-VHDX 2.2.2).
type header struct {
	sequence   uint64
	fileWrite  ondisk.GUID
	dataWrite  ondisk.GUID
	log        ondisk.GUID // zero: the log is empty
	logVersion uint16
	version    uint16
	logLength  uint32
	logOffset  uint64
}

var errNotHeader = errors.New("not a header")

func (h *header) decode(b []byte) error {
	if len(b) < headerSize {
		return ondisk.ErrShort
	}
	b = b[:headerSize]
	if string(b[:4]) != "head" || !sealed(b) {
		return errNotHeader
	}
	c := ondisk.NewCursor(b[8:], binary.LittleEndian)
	h.sequence = c.U64()
	copy(h.fileWrite[:], c.Bytes(16))
	copy(h.dataWrite[:], c.Bytes(16))
	copy(h.log[:], c.Bytes(16))
	h.logVersion = c.U16()
	h.version = c.U16()
	h.logLength = c.U32()
	h.logOffset = c.U64()
	if h.version != 1 {
		return errNotHeader
	}
	return c.Err()
}

func (h *header) append(b []byte) []byte {
	at := len(b)
	b = append(b, "head\x00\x00\x00\x00"...)
	b = binary.LittleEndian.AppendUint64(b, h.sequence)
	b = append(b, h.fileWrite[:]...)
	b = append(b, h.dataWrite[:]...)
	b = append(b, h.log[:]...)
	b = binary.LittleEndian.AppendUint16(b, h.logVersion)
	b = binary.LittleEndian.AppendUint16(b, h.version)
	b = binary.LittleEndian.AppendUint32(b, h.logLength)
	b = binary.LittleEndian.AppendUint64(b, h.logOffset)
	b = append(b, make([]byte, headerSize-(len(b)-at))...)
	seal(b[at:])
	return b
}

// validate checks where the log lies in a file of fileLen bytes.
func (h *header) validate(fileLen int64) error {
	if h.logOffset < headerSectionEnd || h.logOffset%mib != 0 {
		return fmt.Errorf("header: log at %#x, want a multiple of 1 MiB behind the header section: %w", h.logOffset, sdk.ErrCorrupt)
	}
	if h.log == noGUID {
		return nil
	}
	if h.logVersion != 0 {
		return fmt.Errorf("header: log version %d, only 0 is known: %w", h.logVersion, sdk.ErrUnsupported)
	}
	if h.logLength%mib != 0 {
		return fmt.Errorf("header: log length %#x, want a multiple of 1 MiB: %w", h.logLength, sdk.ErrCorrupt)
	}
	off, ok := ondisk.Int64(h.logOffset)
	if !ok || !ondisk.Within(off, int64(h.logLength), fileLen) {
		return fmt.Errorf("header: log of %#x bytes at %#x beyond end of file %#x: %w", h.logLength, h.logOffset, fileLen, sdk.ErrCorrupt)
	}
	return nil
}

// headers is the pair, of which one is current.
type headers struct {
	at      [2]header
	current int
}

// choose makes the current header of two copies, nil where one cannot be read.
func (p *headers) choose(first, second []byte) error {
	err1 := p.at[0].decode(first)
	err2 := p.at[1].decode(second)
	switch {
	case err1 != nil && err2 != nil:
		return &sdk.Error{Text: "No valid VHDX header found", Class: sdk.ErrCorrupt}
	case err2 != nil:
		p.current = 0
	case err1 != nil:
		p.current = 1
	case p.at[0].sequence > p.at[1].sequence:
		p.current = 0
	case p.at[1].sequence > p.at[0].sequence:
		p.current = 1
	case p.at[0] != p.at[1]:
		return &sdk.Error{Text: "No valid VHDX header found", Class: sdk.ErrCorrupt}
	default:
		// Disk2VHD writes two equal headers.
		p.current = 0
	}
	return nil
}

func (p *headers) get() *header { return &p.at[p.current] }

// update writes a successor of the current header over the other one, twice, so
// that both copies hold it (MS-VHDX 2.2.2.1). Where sync is set, each copy is
// stable before the next is touched.
func (p *headers) update(f sdk.File, sync bool, edit func(*header)) error {
	for i := range 2 {
		next := *p.get()
		next.sequence++
		if i == 0 {
			edit(&next)
		}
		other := 1 - p.current
		off := int64(header1Offset)
		if other == 1 {
			off = header2Offset
		}
		if _, err := f.WriteAt(next.append(nil), off); err != nil {
			return fmt.Errorf("header %d: %w", other+1, err)
		}
		if sync {
			if err := f.Sync(); err != nil {
				return fmt.Errorf("header %d: %w", other+1, err)
			}
		}
		p.at[other] = next
		p.current = other
	}
	return nil
}

package vhdx

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	logHeaderSize     = 64
	logDescriptorSize = 32
	// maxLogSectors bounds how many sectors of the file one log may change: 1 GiB,
	// twice the largest block allocation table.
	maxLogSectors = 1 << 18
)

// logHeader begins an entry of the log (MS-VHDX 2.3.1.1).
type logHeader struct {
	length      uint32 // of the entry
	tail        uint32 // offset in the log of the first entry still needed
	sequence    uint64
	descriptors uint32
	log         ondisk.GUID
	flushed     uint64 // file length that was stable
	last        uint64 // file length that holds all structures
}

var errNotLogEntry = errors.New("not a log entry")

func (h *logHeader) decode(b []byte) error {
	if len(b) < logHeaderSize {
		return ondisk.ErrShort
	}
	if string(b[:4]) != "loge" {
		return errNotLogEntry
	}
	c := ondisk.NewCursor(b[8:logHeaderSize], binary.LittleEndian)
	h.length = c.U32()
	h.tail = c.U32()
	h.sequence = c.U64()
	h.descriptors = c.U32()
	c.Skip(4)
	copy(h.log[:], c.Bytes(16))
	h.flushed = c.U64()
	h.last = c.U64()
	return c.Err()
}

func (h *logHeader) append(b []byte) []byte {
	le := binary.LittleEndian
	b = append(b, "loge\x00\x00\x00\x00"...)
	b = le.AppendUint32(b, h.length)
	b = le.AppendUint32(b, h.tail)
	b = le.AppendUint64(b, h.sequence)
	b = le.AppendUint32(b, h.descriptors)
	b = append(b, 0, 0, 0, 0)
	b = append(b, h.log[:]...)
	b = le.AppendUint64(b, h.flushed)
	return le.AppendUint64(b, h.last)
}

// descriptorSectors is how many sectors the header and its descriptors take.
func (h *logHeader) descriptorSectors() int64 {
	return ondisk.DivUp(logHeaderSize+int64(h.descriptors)*logDescriptorSize, sectorSize)
}

// validate checks the header against a log of logLen bytes with the id log.
func (h *logHeader) validate(logLen int64, log ondisk.GUID) error {
	switch {
	case h.log != log:
		return fmt.Errorf("log id %s, want %s", h.log, log)
	case h.length == 0 || h.length%sectorSize != 0 || int64(h.length) > logLen:
		return fmt.Errorf("length %#x", h.length)
	case h.tail%sectorSize != 0 || int64(h.tail) >= logLen:
		return fmt.Errorf("tail %#x", h.tail)
	case h.sequence == 0:
		return errors.New("sequence number 0")
	case h.descriptorSectors()*sectorSize > int64(h.length):
		return fmt.Errorf("%d descriptors in %#x bytes", h.descriptors, h.length)
	}
	return nil
}

// logDescriptor says what an entry changes: one sector, or a range that becomes
// zero (MS-VHDX 2.3.1.2 and 2.3.1.3).
type logDescriptor struct {
	zero     bool
	trailing [4]byte // the last bytes of the sector
	leading  [8]byte // the first bytes of the sector
	length   uint64  // of the zeros
	offset   uint64  // in the file
	sequence uint64
}

var errNotDescriptor = errors.New("not a log descriptor")

func (d *logDescriptor) decode(b []byte) error {
	if len(b) < logDescriptorSize {
		return ondisk.ErrShort
	}
	*d = logDescriptor{}
	switch string(b[:4]) {
	case "zero":
		d.zero = true
		d.length = binary.LittleEndian.Uint64(b[8:])
	case "desc":
		copy(d.trailing[:], b[4:])
		copy(d.leading[:], b[8:])
		d.length = sectorSize
	default:
		return errNotDescriptor
	}
	d.offset = binary.LittleEndian.Uint64(b[16:])
	d.sequence = binary.LittleEndian.Uint64(b[24:])
	return nil
}

func (d *logDescriptor) append(b []byte) []byte {
	if d.zero {
		b = append(b, "zero\x00\x00\x00\x00"...)
		b = binary.LittleEndian.AppendUint64(b, d.length)
	} else {
		b = append(b, "desc"...)
		b = append(b, d.trailing[:]...)
		b = append(b, d.leading[:]...)
	}
	b = binary.LittleEndian.AppendUint64(b, d.offset)
	return binary.LittleEndian.AppendUint64(b, d.sequence)
}

// validate checks that the descriptor belongs to the entry with this sequence
// number.
func (d *logDescriptor) validate(sequence uint64) error {
	if d.sequence != sequence || d.offset%sectorSize != 0 || d.length%sectorSize != 0 {
		return fmt.Errorf("descriptor for %#x bytes at %#x, sequence %d of %d", d.length, d.offset, d.sequence, sequence)
	}
	return nil
}

// appendDataSector appends the log's form of a sector: its first 8 and last 4
// bytes are in the descriptor (MS-VHDX 2.3.1.4).
func appendDataSector(b, sector []byte, sequence uint64) []byte {
	b = append(b, "data"...)
	b = binary.LittleEndian.AppendUint32(b, uint32(sequence>>32))
	b = append(b, sector[8:sectorSize-4]...)
	return binary.LittleEndian.AppendUint32(b, uint32(sequence))
}

func dataSectorValid(b []byte, sequence uint64) bool {
	return string(b[:4]) == "data" &&
		binary.LittleEndian.Uint32(b[4:]) == uint32(sequence>>32) &&
		binary.LittleEndian.Uint32(b[sectorSize-4:]) == uint32(sequence)
}

// ring reads the log, a circular buffer, sector by sector.
type ring struct {
	file   sdk.File
	offset int64 // of the log in the file
	length int64
	buf    []byte
	at     int64 // offset in the log of buf
}

const ringBuffer = 256 << 10

// sector returns the sector at off in the log, valid until the next call.
func (r *ring) sector(off int64) ([]byte, error) {
	off %= r.length
	if r.buf == nil || off < r.at || off >= r.at+int64(len(r.buf)) {
		n := min(ringBuffer, r.length-off)
		if int64(cap(r.buf)) < n {
			r.buf = make([]byte, n)
		}
		r.buf = r.buf[:n]
		r.at = off
		if _, err := r.file.ReadAt(r.buf, r.offset+off); err != nil {
			r.buf = r.buf[:0]
			return nil, fmt.Errorf("log: read %#x bytes at %#x: %w", n, r.offset+off, err)
		}
	}
	return r.buf[off-r.at:][:sectorSize], nil
}

// logEntry is a valid entry and where it lies in the log.
type logEntry struct {
	logHeader
	offset int64
}

// entry reads the entry at off. It returns false where there is no valid one;
// ours tells whether one with the id log begins there, valid or not.
//
// Sectors inside a valid entry cannot begin another one, as each of them begins
// with the signature of a descriptor or of a data sector. Nor can those that an
// invalid one was followed through. A scan of the log is thus linear.
func (r *ring) entry(ctx context.Context, off int64, log ondisk.GUID) (e logEntry, valid, ours bool, err error) {
	b, err := r.sector(off)
	if err != nil {
		return e, false, false, err
	}
	e.offset = off % r.length
	if e.decode(b) != nil {
		return e, false, false, nil
	}
	ours = e.log == log
	if e.logHeader.validate(r.length, log) != nil {
		return e, false, ours, nil
	}
	want := binary.LittleEndian.Uint32(b[checksumOffset:])
	sum := crc(crc(crc(0, b[:checksumOffset]), noChecksum[:]), b[checksumOffset+4:])
	left := int64(e.descriptors)
	data := int64(0)
	sectors := int64(e.length) / sectorSize
	for i := range sectors {
		if i > 0 {
			if b, err = r.sector(off + i*sectorSize); err != nil {
				return e, false, ours, err
			}
			sum = crc(sum, b)
		}
		if i >= e.descriptorSectors() {
			if !dataSectorValid(b, e.sequence) {
				return e, false, ours, nil
			}
			continue
		}
		if i == 0 {
			if err := ctx.Err(); err != nil {
				return e, false, ours, err
			}
			b = b[logHeaderSize:]
		}
		for ; left > 0 && len(b) > 0; left-- {
			var d logDescriptor
			if d.decode(b) != nil || d.validate(e.sequence) != nil {
				return e, false, ours, nil
			}
			if !d.zero {
				data++
			}
			b = b[logDescriptorSize:]
		}
	}
	return e, sum == want && e.descriptorSectors()+data == sectors, ours, nil
}

// active returns the entries that have to be replayed (MS-VHDX 2.3.3), none
// where nothing was ever logged under this id.
func (r *ring) active(ctx context.Context, log ondisk.GUID) ([]logEntry, error) {
	var best []logEntry
	logged := false
	for tail := int64(0); tail < r.length; {
		var current []logEntry
		head, taken := tail, int64(0)
		for taken < r.length {
			e, valid, ours, err := r.entry(ctx, head, log)
			if err != nil {
				return nil, err
			}
			logged = logged || ours
			if !valid || len(current) > 0 && e.sequence != current[len(current)-1].sequence+1 {
				break
			}
			if taken += int64(e.length); taken > r.length {
				break
			}
			current = append(current, e)
			head += int64(e.length)
		}
		if len(current) == 0 {
			tail += sectorSize
			continue
		}
		tail = head
		newest := current[len(current)-1]
		for i, e := range current {
			if e.offset != int64(newest.tail) {
				continue
			}
			if best == nil || newest.sequence > best[len(best)-1].sequence {
				best = current[i:]
			}
			break
		}
	}
	if best == nil && logged {
		return nil, fmt.Errorf("log: no valid sequence of entries: %w", sdk.ErrCorrupt)
	}
	return best, nil
}

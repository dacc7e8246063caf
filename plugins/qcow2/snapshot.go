package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	snapshotFixed      = 40
	snapshotExtraKnown = 24
	snapshotExtraMax   = 1024
	snapshotsMaxBytes  = 1024 * maxSnapshots
)

// snapshot is an entry of the snapshot table (qcow2.txt, "Snapshots").
type snapshot struct {
	l1Offset    uint64
	l1Size      uint32 // entries
	id, name    string
	dateSec     uint32
	dateNsec    uint32
	vmClockNsec uint64
	vmStateSize uint64
	hasDiskSize bool
	diskSize    uint64
	hasIcount   bool
	icount      uint64
	extraSize   uint32 // as stored
	unknown     []byte // extra data beyond what we know
}

// decode reads one entry and returns its length, with padding.
func (s *snapshot) decode(b []byte) (int64, error) {
	c := ondisk.NewCursor(b, binary.BigEndian)
	*s = snapshot{}
	s.l1Offset = c.U64()
	s.l1Size = c.U32()
	idSize, nameSize := int(c.U16()), int(c.U16())
	s.dateSec = c.U32()
	s.dateNsec = c.U32()
	s.vmClockNsec = c.U64()
	s.vmStateSize = uint64(c.U32())
	s.extraSize = c.U32()
	if c.Err() == nil && s.extraSize > snapshotExtraMax {
		return 0, fmt.Errorf("%d bytes of extra data: %w", s.extraSize, sdk.ErrTooBig)
	}
	extra := c.Bytes(int(s.extraSize))
	id, name := c.Bytes(idSize), c.Bytes(nameSize)
	if c.Err() != nil {
		return 0, fmt.Errorf("snapshot: %w", c.Err())
	}
	if len(extra) >= 8 {
		s.vmStateSize = binary.BigEndian.Uint64(extra)
	}
	if len(extra) >= 16 {
		s.hasDiskSize, s.diskSize = true, binary.BigEndian.Uint64(extra[8:])
	}
	if len(extra) >= snapshotExtraKnown {
		s.hasIcount, s.icount = true, binary.BigEndian.Uint64(extra[16:])
		s.unknown = append([]byte(nil), extra[snapshotExtraKnown:]...)
	}
	s.id, s.name = cString(id), cString(name)
	return (int64(c.Offset()) + 7) &^ 7, nil
}

// snapshotTable reads the entries of the table, as qemu does: those that lie
// behind the end of the file are zeros, and empty.
type snapshotTable struct {
	im    *image
	count uint32 // entries there should be; less where some were discarded
	// discard, where not nil, says what of the table is passed over. Without it
	// that is an error.
	discard func(format string, args ...any)

	list []snapshot
	size int64 // of the table in the file, in bytes
	cut  int64 // entries whose extra data was cut
}

// The most that a table takes is snapshotsMaxBytes, with the discarded parts of it
// what qemu counts in an int.
func (t *snapshotTable) read(ctx context.Context) error {
	start := int64(t.im.h.snapshotsOffset)
	off, length := start, int64(0) // length is without what is discarded
	fixed := make([]byte, snapshotFixed)
	for i := uint32(0); i < t.count; i++ {
		before := off
		off, length = (off+7)&^7, (length+7)&^7
		if err := t.at(fixed, off); err != nil {
			return err
		}
		extra := int64(binary.BigEndian.Uint32(fixed[36:]))
		names := int64(binary.BigEndian.Uint16(fixed[12:])) + int64(binary.BigEndian.Uint16(fixed[14:]))
		keep := extra
		if extra > snapshotExtraMax {
			if t.discard == nil {
				return &sdk.Error{
					Text:  fmt.Sprintf("Too much extra metadata in snapshot table entry %d", i),
					Hint:  "You can force-remove this extra metadata with qemu-img check -r all",
					Class: sdk.ErrTooBig,
				}
			}
			t.discard("Discarding too much extra metadata in snapshot table entry %d (%d > %d)", i, extra, snapshotExtraMax)
			t.cut++
			keep = snapshotExtraMax
		}
		// Read it as if it had no more extra data than is kept.
		b := append(make([]byte, 0, snapshotFixed+keep+names), fixed...)[:snapshotFixed+keep+names]
		if err := t.at(b[snapshotFixed:snapshotFixed+keep], off+snapshotFixed); err != nil {
			return err
		}
		if err := t.at(b[snapshotFixed+keep:], off+snapshotFixed+extra); err != nil {
			return err
		}
		binary.BigEndian.PutUint32(b[36:], uint32(keep))
		var s snapshot
		if _, err := s.decode(b); err != nil {
			return err
		}
		off += snapshotFixed + extra + names
		length += snapshotFixed + keep + names
		if length > snapshotsMaxBytes || off-start > math.MaxInt32 {
			left := t.count - i
			if t.discard == nil {
				return &sdk.Error{
					Text:  "Snapshot table is too big",
					Hint:  fmt.Sprintf("You can force-remove all %d overhanging snapshots with qemu-img check -r all", left),
					Class: sdk.ErrTooBig,
				}
			}
			t.discard("Discarding %d overhanging snapshots (snapshot table is too big)", left)
			t.count, off = i, before
			break
		}
		t.list = append(t.list, s)
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	if t.count > 0 {
		t.size = off - start
	}
	return nil
}

// at reads a part of the table.
func (t *snapshotTable) at(b []byte, off int64) error {
	var err error
	if off > maxLength-int64(len(b)) {
		err = errEIO
	} else {
		err = readZeros(t.im.main, b, off)
	}
	if err != nil {
		return fmt.Errorf("Failed to read snapshot table: %w", err)
	}
	return nil
}

// append adds the entry with its padding, with as much extra data as it had,
// and at least the 16 bytes that version 3 wants.
func (s *snapshot) append(b []byte) []byte {
	be := binary.BigEndian
	var extra []byte
	extra = be.AppendUint64(extra, s.vmStateSize)
	extra = be.AppendUint64(extra, s.diskSize)
	if s.hasIcount {
		extra = be.AppendUint64(extra, s.icount)
		extra = append(extra, s.unknown...)
	}
	start := len(b)
	b = be.AppendUint64(b, s.l1Offset)
	b = be.AppendUint32(b, s.l1Size)
	b = be.AppendUint16(b, uint16(len(s.id)))
	b = be.AppendUint16(b, uint16(len(s.name)))
	b = be.AppendUint32(b, s.dateSec)
	b = be.AppendUint32(b, s.dateNsec)
	b = be.AppendUint64(b, s.vmClockNsec)
	if s.vmStateSize <= 0xffffffff {
		b = be.AppendUint32(b, uint32(s.vmStateSize))
	} else {
		b = be.AppendUint32(b, 0)
	}
	b = be.AppendUint32(b, uint32(len(extra)))
	b = append(b, extra...)
	b = append(b, s.id...)
	b = append(b, s.name...)
	return append(b, make([]byte, -(len(b)-start)&7)...)
}

// info returns the snapshot as the core knows it. Images that do not store the
// disk's size had no way to change it.
func (s *snapshot) info(virtualSize uint64) sdk.Snapshot {
	size, icount := virtualSize, int64(-1)
	if s.hasDiskSize {
		size = s.diskSize
	}
	if s.hasIcount {
		icount = int64(s.icount)
	}
	return sdk.Snapshot{
		ID: s.id, Name: s.name,
		VMStateSize: int64(s.vmStateSize),
		DateSec:     int64(s.dateSec), DateNsec: int64(s.dateNsec),
		VMClockNsec: int64(s.vmClockNsec),
		Icount:      icount,
		DiskSize:    int64(size),
	}
}

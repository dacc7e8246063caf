package qcow2

import (
	"encoding/binary"
	"fmt"

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
	s.id, s.name = string(id), string(name)
	return (int64(c.Offset()) + 7) &^ 7, nil
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

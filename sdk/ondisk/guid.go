package ondisk

import (
	"encoding/binary"

	"github.com/google/uuid"
)

// GUID is a UUID in the byte order of Microsoft's structures: its first three
// fields little-endian.
type GUID [16]byte

// ParseGUID makes a GUID of its text form. It panics on anything else: for
// constants.
func ParseGUID(s string) GUID { return FromUUID(uuid.MustParse(s)) }

// FromUUID returns u in GUID byte order.
func FromUUID(u uuid.UUID) (g GUID) {
	binary.LittleEndian.PutUint32(g[0:], binary.BigEndian.Uint32(u[0:]))
	binary.LittleEndian.PutUint16(g[4:], binary.BigEndian.Uint16(u[4:]))
	binary.LittleEndian.PutUint16(g[6:], binary.BigEndian.Uint16(u[6:]))
	copy(g[8:], u[8:])
	return g
}

// UUID returns g in network byte order.
func (g GUID) UUID() uuid.UUID {
	return uuid.UUID(FromUUID(uuid.UUID(g)))
}

// String returns the usual text form, lower case, without braces.
func (g GUID) String() string { return g.UUID().String() }

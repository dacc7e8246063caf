package qcow2

import (
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	luksHeaderSize = 592
	luksSlots      = 8
	luksActive     = 0x00ac71f3
	luksSector     = 512
)

// luksHeader is what `info` shows of a LUKS version 1 header (LUKS On-Disk
// Format Specification 1.2.3, "PHDR").
type luksHeader struct {
	cipher, mode, hash string
	payloadSector      uint32
	keyBytes           uint32
	iterations         uint32
	uuid               string
	slots              [luksSlots]luksSlot
}

type luksSlot struct {
	active    bool
	iters     uint32
	keySector uint32
	stripes   uint32
}

func (l *luksHeader) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.BigEndian)
	text := func(n int) string {
		s := string(c.Bytes(n))
		if i := strings.IndexByte(s, 0); i >= 0 {
			s = s[:i]
		}
		return s
	}
	if m := string(c.Bytes(6)); m != "LUKS\xba\xbe" {
		return fmt.Errorf("LUKS header: no magic: %w", sdk.ErrCorrupt)
	}
	if v := c.U16(); v != 1 {
		return fmt.Errorf("LUKS header: version %d: %w", v, sdk.ErrUnsupported)
	}
	l.cipher, l.mode, l.hash = text(32), text(32), text(32)
	l.payloadSector, l.keyBytes = c.U32(), c.U32()
	c.Skip(20 + 32) // master key digest and its salt
	l.iterations = c.U32()
	l.uuid = text(40)
	for i := range l.slots {
		s := &l.slots[i]
		s.active = c.U32() == luksActive
		s.iters = c.U32()
		c.Skip(32)
		s.keySector, s.stripes = c.U32(), c.U32()
	}
	return c.Err()
}

// facts returns format-specific's "encrypt".
func (l *luksHeader) facts() []sdk.Fact {
	mode, ivgen, _ := strings.Cut(l.mode, "-")
	ivgen, ivhash, hasHash := strings.Cut(ivgen, ":")
	keyBits := uint64(l.keyBytes) * 8
	if mode == "xts" {
		keyBits /= 2
	}
	slots := make([]sdk.Fact, luksSlots)
	for i, s := range l.slots {
		f := []sdk.Fact{sdk.BoolFact("active", s.active)}
		if s.active {
			f = append(f, sdk.UintFact("iters", uint64(s.iters)))
		}
		f = append(f, sdk.UintFact("key-offset", uint64(s.keySector)*luksSector))
		if s.active {
			f = append(f, sdk.UintFact("stripes", uint64(s.stripes)))
		}
		slots[i] = sdk.ObjectFact("", f...)
	}
	var facts []sdk.Fact
	facts = append(facts, sdk.StringFact("ivgen-alg", ivgen))
	facts = append(facts,
		sdk.StringFact("hash-alg", l.hash),
		sdk.BoolFact("detached-header", false), // qcow2 has no other place for it
		sdk.StringFact("cipher-alg", fmt.Sprintf("%s-%d", l.cipher, keyBits)),
		sdk.StringFact("uuid", l.uuid))
	if hasHash {
		facts = append(facts, sdk.StringFact("ivgen-hash-alg", ivhash))
	}
	return append(facts,
		sdk.StringFact("format", "luks"),
		sdk.StringFact("cipher-mode", mode),
		sdk.ListFact("slots", slots...),
		sdk.UintFact("payload-offset", uint64(l.payloadSector)*luksSector),
		sdk.UintFact("master-key-iters", uint64(l.iterations)))
}

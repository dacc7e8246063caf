package vhdx

import (
	"crypto/rand"
	"hash/fnv"
	"strings"

	"github.com/google/uuid"

	"github.com/instar-img/instar/sdk/ondisk"
)

// Regions (MS-VHDX 2.2.3) and metadata items (2.6.2) are known by GUIDs.
var (
	regionBAT      = ondisk.ParseGUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
	regionMetadata = ondisk.ParseGUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")

	itemFileParameters = ondisk.ParseGUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
	itemVirtualSize    = ondisk.ParseGUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
	itemDiskID         = ondisk.ParseGUID("beca12ab-b2e6-4523-93ef-c309e000c746")
	itemLogicalSector  = ondisk.ParseGUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
	itemPhysicalSector = ondisk.ParseGUID("cda348c7-445d-4471-9cc9-e9885251c556")
	itemParentLocator  = ondisk.ParseGUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

	locatorVHDX = ondisk.ParseGUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
)

var noGUID ondisk.GUID

// braced is how a parent locator and Info.Identity write a GUID.
func braced(g ondisk.GUID) string { return "{" + g.String() + "}" }

// parseBraced reads what braced wrote, in any case.
func parseBraced(s string) (ondisk.GUID, bool) {
	if len(s) != 38 || s[0] != '{' || s[37] != '}' {
		return noGUID, false
	}
	u, err := uuid.Parse(strings.ToLower(s[1:37]))
	if err != nil {
		return noGUID, false
	}
	return ondisk.FromUUID(u), true
}

// guids makes the ids of one image or one session of writing.
type guids struct {
	// seed is what the ids depend on; nil makes them random.
	seed []byte
	n    byte
}

func (g *guids) next() (ondisk.GUID, error) {
	var u uuid.UUID
	if g.seed == nil {
		if _, err := rand.Read(u[:]); err != nil {
			return noGUID, err
		}
	} else {
		g.n++
		h := fnv.New128a()
		_, _ = h.Write(g.seed)
		_, _ = h.Write([]byte{g.n})
		h.Sum(u[:0])
	}
	u[6] = u[6]&0x0f | 0x40 // version 4
	u[8] = u[8]&0x3f | 0x80 // RFC 4122
	return ondisk.FromUUID(u), nil
}

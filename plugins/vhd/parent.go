package vhd

import (
	"encoding/binary"
	"fmt"
	"path"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// platform is a locator's "Platform Code".
type platform uint32

const (
	platformNone     platform = 0
	platformRelative platform = 'W'<<24 | '2'<<16 | 'r'<<8 | 'u' // UTF-16LE, Windows, relative
	platformAbsolute platform = 'W'<<24 | '2'<<16 | 'k'<<8 | 'u' // UTF-16LE, Windows, absolute
	platformMac      platform = 'M'<<24 | 'a'<<16 | 'c'<<8 | 'X' // UTF-8, a file URL
)

// maxLocator bounds a parent's name: the longest that Windows has, in UTF-16.
const maxLocator = 1 << 16

// identity keys of Info.Identity.
const (
	identityID   = "unique-id"
	identityTime = "timestamp"
)

// parent returns the reference of a differencing disk to its parent. Names are
// given with forward slashes, whatever system wrote them: the relative one
// first, then the absolute, then the bare file name.
func (img *image) parent() (sdk.Reference, error) {
	ref := sdk.Reference{
		Kind:        sdk.RefBacking,
		Format:      name,
		Required:    true,
		IdentityKey: identityID,
		Identity:    img.header.parentID.String(),
	}
	var names []string
	add := func(s string) {
		if s != "" && !slices.Contains(names, s) {
			names = append(names, s)
		}
	}
	for _, want := range []platform{platformRelative, platformAbsolute, platformMac} {
		for i, l := range img.header.locators {
			if l.platform != want || l.dataLength == 0 {
				continue
			}
			s, err := img.locatorName(l)
			if err != nil {
				// The other names may do; check reports this one.
				img.damage = append(img.damage, fmt.Errorf("parent locator %d: %w", i, err))
				continue
			}
			add(s)
		}
	}
	add(slashed(decodeUTF16(img.header.parentName[:], binary.BigEndian)))
	if len(names) == 0 {
		return ref, fmt.Errorf("differencing disk without a parent's name: %w", sdk.ErrCorrupt)
	}
	ref.Name, ref.Alternatives = names[0], names[1:]
	return ref, nil
}

func (img *image) locatorName(l locator) (string, error) {
	off, ok := ondisk.Int64(l.dataOffset)
	if !ok {
		return "", fmt.Errorf("offset %#x: %w", l.dataOffset, sdk.ErrCorrupt)
	}
	b, err := sdk.ReadAtMost(img.file, "name", off, int64(l.dataLength), maxLocator)
	if err != nil {
		return "", err
	}
	if l.platform == platformMac {
		s, _, _ := strings.Cut(string(b), "\x00")
		return strings.TrimPrefix(s, "file://localhost"), nil
	}
	return slashed(decodeUTF16(b, binary.LittleEndian)), nil
}

// decodeUTF16 decodes up to a terminating zero.
func decodeUTF16(b []byte, order binary.ByteOrder) string {
	var u []uint16
	for ; len(b) >= 2; b = b[2:] {
		c := order.Uint16(b)
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	return string(utf16.Decode(u))
}

func encodeUTF16(s string, order binary.AppendByteOrder) []byte {
	var b []byte
	for _, c := range utf16.Encode([]rune(s)) {
		b = order.AppendUint16(b, c)
	}
	return b
}

// slashed turns a Windows path into ours: .\a\b.vhd is a/b.vhd.
func slashed(s string) string {
	return strings.TrimPrefix(strings.ReplaceAll(s, `\`, "/"), "./")
}

// setParent stores the name of the parent in h and returns what its locator
// points to, to be written at off.
func (h *header) setParent(parent string, off int64) ([]byte, error) {
	if strings.Contains(parent, `\`) {
		return nil, fmt.Errorf("parent's name %q: a backslash would be read as a separator: %w", parent, sdk.ErrInvalid)
	}
	h.parentName = [512]byte{}
	bare := encodeUTF16(path.Base(parent), binary.BigEndian)
	if len(bare) > len(h.parentName) {
		return nil, fmt.Errorf("parent's file name of %d UTF-16 units, at most %d accepted: %w",
			len(bare)/2, len(h.parentName)/2, sdk.ErrInvalid)
	}
	copy(h.parentName[:], bare)
	l := locator{platform: platformAbsolute, dataOffset: uint64(off)}
	stored := parent
	if !path.IsAbs(parent) {
		l.platform = platformRelative
		stored = `.\` + strings.ReplaceAll(parent, "/", `\`)
	}
	b := encodeUTF16(stored, binary.LittleEndian)
	if len(b) > maxLocator {
		return nil, fmt.Errorf("parent's name of %d UTF-16 units, at most %d accepted: %w",
			len(b)/2, maxLocator/2, sdk.ErrInvalid)
	}
	l.dataLength = uint32(len(b))
	// The specification counts sectors here, Windows bytes. Readers go by the
	// length.
	space, _ := ondisk.AlignUp(int64(len(b)), sectorSize)
	l.dataSpace = uint32(space)
	h.locators = [8]locator{l}
	return append(b, make([]byte, space-int64(len(b)))...), nil
}

package vhdx

import (
	"encoding/binary"
	"fmt"
	"path"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

const (
	locatorHeaderSize = 20
	locatorEntrySize  = 12
	maxLocatorEntries = 64
)

// Keys of a VHDX parent locator (MS-VHDX 2.6.2.6.3).
const (
	keyLinkage      = "parent_linkage"
	keyRelativePath = "relative_path"
	keyVolumePath   = "volume_path"
	keyWin32Path    = "absolute_win32_path"
)

// locator is the parent locator item (MS-VHDX 2.6.2.6): pairs in their order.
type locator struct {
	kind  ondisk.GUID
	pairs []pair
}

type pair struct{ key, value string }

func (l *locator) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.LittleEndian)
	copy(l.kind[:], c.Bytes(16))
	c.Skip(2)
	n := int(c.U16())
	if c.Err() != nil {
		return c.Err()
	}
	if n > maxLocatorEntries {
		return fmt.Errorf("%d entries, at most %d accepted", n, maxLocatorEntries)
	}
	l.pairs = make([]pair, 0, n)
	for i := range n {
		keyOff, valueOff := c.U32(), c.U32()
		keyLen, valueLen := c.U16(), c.U16()
		if c.Err() != nil {
			return c.Err()
		}
		key, err := utf16Text(b, keyOff, keyLen)
		if err != nil {
			return fmt.Errorf("key %d: %w", i, err)
		}
		value, err := utf16Text(b, valueOff, valueLen)
		if err != nil {
			return fmt.Errorf("value %d: %w", i, err)
		}
		l.pairs = append(l.pairs, pair{key, value})
	}
	return nil
}

func utf16Text(b []byte, off uint32, length uint16) (string, error) {
	if length == 0 || length%2 != 0 || !ondisk.Within(int64(off), int64(length), int64(len(b))) {
		return "", fmt.Errorf("%d bytes at %#x of %#x", length, off, len(b))
	}
	units := make([]uint16, length/2)
	for i := range units {
		units[i] = binary.LittleEndian.Uint16(b[int(off)+2*i:])
	}
	for _, u := range units {
		if u == 0 {
			return "", fmt.Errorf("text at %#x holds a NUL", off)
		}
	}
	return string(utf16.Decode(units)), nil
}

func appendUTF16(b []byte, s string) []byte {
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

func (l *locator) append(b []byte) []byte {
	b = append(b, l.kind[:]...)
	b = append(b, 0, 0)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(l.pairs)))
	text := []byte{}
	start := locatorHeaderSize + locatorEntrySize*len(l.pairs)
	for _, p := range l.pairs {
		keyOff := start + len(text)
		text = appendUTF16(text, p.key)
		valueOff := start + len(text)
		text = appendUTF16(text, p.value)
		b = binary.LittleEndian.AppendUint32(b, uint32(keyOff))
		b = binary.LittleEndian.AppendUint32(b, uint32(valueOff))
		b = binary.LittleEndian.AppendUint16(b, uint16(valueOff-keyOff))
		b = binary.LittleEndian.AppendUint16(b, uint16(start+len(text)-valueOff))
	}
	return append(b, text...)
}

func (l *locator) get(key string) string {
	for _, p := range l.pairs {
		if p.key == key {
			return p.value
		}
	}
	return ""
}

// validate checks that the locator names and identifies a VHDX parent.
func (l *locator) validate() error {
	if l.kind != locatorVHDX {
		return fmt.Errorf("parent locator: type %s, only VHDX parents are known: %w", l.kind, sdk.ErrUnsupported)
	}
	seen := map[string]bool{}
	for _, p := range l.pairs {
		if seen[p.key] {
			return fmt.Errorf("parent locator: key %q appears twice: %w", p.key, sdk.ErrCorrupt)
		}
		seen[p.key] = true
	}
	if _, ok := parseBraced(l.get(keyLinkage)); !ok {
		return fmt.Errorf("parent locator: %s is %q, want a GUID in braces: %w", keyLinkage, l.get(keyLinkage), sdk.ErrCorrupt)
	}
	if len(l.names()) == 0 {
		return fmt.Errorf("parent locator: no path: %w", sdk.ErrCorrupt)
	}
	return nil
}

// names returns the names of the parent, in the order in which they are to be
// tried (MS-VHDX 2.6.2.6.3). Windows' absolute paths stand for a file beside the
// image: their volumes mean nothing here.
func (l *locator) names() []string {
	var names []string
	add := func(name string) {
		for _, n := range names {
			if n == name {
				return
			}
		}
		if name != "" && name != "." && name != ".." && name != "/" {
			names = append(names, name)
		}
	}
	if rel := l.get(keyRelativePath); rel != "" {
		add(strings.TrimPrefix(strings.ReplaceAll(rel, `\`, "/"), "./"))
	}
	for _, key := range []string{keyVolumePath, keyWin32Path} {
		if abs := l.get(key); abs != "" {
			add(path.Base(strings.ReplaceAll(abs, `\`, "/")))
		}
	}
	return names
}

// relativePath is names for a name that the user gave. An absolute name keeps
// its leading separator: to Windows it is relative to the current volume.
func relativePath(name string) (string, error) {
	switch {
	case strings.Contains(name, `\`):
		return "", fmt.Errorf(`backing file %q: a VHDX parent's name cannot hold a backslash: %w`, name, sdk.ErrInvalid)
	case strings.Contains(name, "\x00") || !utf8.ValidString(name):
		return "", fmt.Errorf("backing file %q: a VHDX parent's name must be UTF-8 without NUL: %w", name, sdk.ErrInvalid)
	}
	win := strings.ReplaceAll(name, "/", `\`)
	if !strings.HasPrefix(win, `\`) && !strings.HasPrefix(win, `..\`) && !strings.HasPrefix(win, `.\`) {
		win = `.\` + win
	}
	if len(appendUTF16(nil, win)) > 0xfffe {
		return "", fmt.Errorf("backing file: name of %d bytes, at most 65534 in UTF-16: %w", len(name), sdk.ErrInvalid)
	}
	return win, nil
}

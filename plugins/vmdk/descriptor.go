package vmdk

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"github.com/instar-img/instar/sdk"
)

// maxDescriptor bounds a descriptor, in bytes: what qemu-img reads of one.
const maxDescriptor = 1<<20 - 1

// noParent as parentCID says that there is no parent.
const noParent = 0xffffffff

// Types of extents in a descriptor.
const (
	typeFlat       = "FLAT"
	typeSparse     = "SPARSE"
	typeZero       = "ZERO"
	typeVMFS       = "VMFS"
	typeVMFSSparse = "VMFSSPARSE"
	typeSESparse   = "SESPARSE"
)

// Access modes of extents.
const (
	accessReadWrite = "RW"
	accessReadOnly  = "RDONLY"
	accessNone      = "NOACCESS"
)

// extentLine is a line of a descriptor's extent description.
type extentLine struct {
	access  string
	sectors int64
	kind    string
	name    string // empty for ZERO
	offset  int64  // sectors into the file, flat extents only
}

// descriptor is the text that describes a disk, in a file of its own or inside
// a sparse extent.
type descriptor struct {
	cid, parentCID uint32
	createType     string
	parentHint     string // empty: none
	hasParentHint  bool
	extents        []extentLine
}

// supportedTypes are the create types whose extents are files. (qemu-img opens
// seven of them; the others differ in name only.)
func supportedType(createType string) bool {
	switch strings.ToLower(createType) {
	case "monolithicsparse", "monolithicflat", "streamoptimized", "custom",
		"twogbmaxextentsparse", "twogbmaxextentflat", "2gbmaxextentsparse", "2gbmaxextentflat",
		"vmfs", "vmfssparse", "vmfsthin", "vmfsthick", "vmfspreallocated", "vmfseagerzeroedthick", "sesparse":
		return true
	}
	return false
}

// decode parses a descriptor, which ends at the first NUL. Of a key that
// appears more than once the first value counts.
func (d *descriptor) decode(b []byte) error {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	*d = descriptor{parentCID: noParent}
	seen := map[string]bool{}
	for line := range bytes.Lines(b) {
		text := strings.TrimSpace(string(line))
		if text == "" || text[0] == '#' {
			continue
		}
		access, _, _ := strings.Cut(text, " ")
		switch access {
		case accessReadWrite, accessReadOnly, accessNone:
			if err := d.addExtent(text); err != nil {
				return err
			}
			continue
		}
		key, value, ok := strings.Cut(text, "=")
		if !ok {
			continue
		}
		key = strings.ToLower(strings.TrimSpace(key))
		if seen[key] {
			continue
		}
		value, ok = unquote(value)
		if err := d.set(key, value, ok); err != nil {
			return err
		}
		seen[key] = true
	}
	if !seen["createtype"] {
		return &sdk.Error{Text: "invalid VMDK image descriptor", Class: sdk.ErrNotFormat}
	}
	if !seen["cid"] {
		return corrupt("VMDK image descriptor without CID")
	}
	return nil
}

func (d *descriptor) set(key, value string, terminated bool) error {
	var err error
	switch key {
	case "cid":
		d.cid, err = parseCID(value)
	case "parentcid":
		d.parentCID, err = parseCID(value)
	case "createtype":
		d.createType = value
	case "parentfilenamehint":
		if !terminated {
			return corrupt("VMDK image descriptor with an unterminated parentFileNameHint")
		}
		d.parentHint, d.hasParentHint = value, true
	}
	return err
}

// unquote returns what stands between quotes, or all of s where there are none;
// ok is false where the closing quote is missing.
func unquote(s string) (text string, ok bool) {
	s = strings.TrimSpace(s)
	if !strings.HasPrefix(s, `"`) {
		return s, true
	}
	text, _, ok = strings.Cut(s[1:], `"`)
	return text, ok
}

func parseCID(s string) (uint32, error) {
	v, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s), "0x"), 16, 32)
	if err != nil {
		return 0, corrupt("VMDK image descriptor with the CID %q", s)
	}
	return uint32(v), nil
}

// addExtent parses a line as in
//
//	RW 4192256 SPARSE "disk-s001.vmdk"
//	RW 4192256 FLAT "disk-f001.vmdk" 0
func (d *descriptor) addExtent(text string) error {
	invalid := corrupt("Invalid extent line: %s", text)
	head, rest, quoted := strings.Cut(text, `"`)
	fields := strings.Fields(head)
	if len(fields) < 3 {
		return invalid
	}
	e := extentLine{access: fields[0], kind: fields[2]}
	var err error
	if e.sectors, err = strconv.ParseInt(fields[1], 10, 64); err != nil || e.sectors < 0 {
		return invalid
	}
	var after string
	if quoted {
		var ok bool
		if e.name, after, ok = strings.Cut(rest, `"`); !ok || e.name == "" || len(fields) != 3 {
			return invalid
		}
	} else if e.kind != typeZero {
		return invalid
	}
	tail := strings.Fields(after)
	switch e.kind {
	case typeFlat, typeVMFS:
		switch {
		case len(tail) > 0:
			if e.offset, err = strconv.ParseInt(tail[0], 10, 64); err != nil || e.offset < 0 {
				return invalid
			}
		case e.kind == typeFlat:
			return invalid
		}
	case typeSparse, typeVMFSSparse, typeSESparse:
		if len(tail) > 0 {
			return invalid
		}
	case typeZero:
	default:
		return unsupported("Unsupported extent type '%s'", e.kind)
	}
	if e.sectors > 0 {
		d.extents = append(d.extents, e)
	}
	return nil
}

// append appends the descriptor as qemu-img writes it, with the entries of the
// disk data base given.
func (d *descriptor) append(b []byte, database []string) []byte {
	b = append(b, "# Disk DescriptorFile\nversion=1\n"...)
	b = fmt.Appendf(b, "CID=%08x\nparentCID=%x\ncreateType=\"%s\"\n", d.cid, d.parentCID, d.createType)
	if d.hasParentHint {
		b = fmt.Appendf(b, "parentFileNameHint=\"%s\"", d.parentHint)
	}
	b = append(b, "\n# Extent description\n"...)
	for _, e := range d.extents {
		b = e.append(b)
	}
	b = append(b, "\n# The Disk Data Base\n#DDB\n\n"...)
	for _, line := range database {
		b = append(append(b, line...), '\n')
	}
	return b
}

func (e *extentLine) append(b []byte) []byte {
	b = fmt.Appendf(b, "%s %d %s", e.access, e.sectors, e.kind)
	if e.name != "" {
		b = fmt.Appendf(b, " \"%s\"", e.name)
	}
	if e.kind == typeFlat || e.kind == typeVMFS && e.offset != 0 {
		b = fmt.Appendf(b, " %d", e.offset)
	}
	return append(b, '\n')
}

// quotable reports whether s can stand between quotes in a descriptor.
func quotable(s string) bool { return !strings.ContainsAny(s, "\"\n\r\x00") }

// replaceCID returns the descriptor text b with its CID changed.
func replaceCID(b []byte, cid uint32) ([]byte, error) {
	for at := 0; at < len(b); {
		line := b[at:]
		if i := bytes.IndexByte(line, '\n'); i >= 0 {
			line = line[:i]
		}
		key, _, ok := bytes.Cut(line, []byte("="))
		if ok && bytes.EqualFold(bytes.TrimSpace(key), []byte("CID")) {
			end := bytes.TrimRight(line, "\r")
			out := append([]byte{}, b[:at]...)
			out = fmt.Appendf(out, "CID=%08x", cid)
			return append(out, b[at+len(end):]...), nil
		}
		at += len(line) + 1
	}
	return nil, fmt.Errorf("descriptor has no CID: %w", sdk.ErrCorrupt)
}

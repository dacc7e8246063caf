package vmdk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/instar-img/instar/sdk"
)

// Rules of Inspect, beside those of the core.
const (
	ruleSubformat  = "subformat"
	ruleExtentName = "extent-name"
	ruleDescriptor = "descriptor"
	ruleParent     = "hidden-parent"
	ruleFooter     = "footer"
)

func rules() []sdk.Rule {
	return []sdk.Rule{
		{Name: ruleSubformat, Meaning: "another type than monolithicSparse and streamOptimized"},
		{Name: ruleExtentName, Meaning: "a path, a drive, a directory or control characters for an extent's name"},
		{Name: ruleDescriptor, Meaning: "a descriptor in an unusual place, or with lines that programs may read differently"},
		{Name: ruleParent, Meaning: "a parent named where only some programs look"},
		{Name: ruleFooter, Meaning: "a streamed disk whose footer says something else than its header"},
	}
}

const (
	// descriptorAt is where the descriptor has to stand in a sparse extent:
	// qemu-img looks for a parent there whatever the header says.
	descriptorAt = sectorSize
	// parentReach is how far qemu-img looks for a parent, from there or from the
	// start of a descriptor file, if no NUL comes first.
	parentReach = 20 * sectorSize
)

// parentKey is the key of a parent's name. qemu-img takes what follows its first
// occurrence, be it in a comment or part of another key.
const parentKey = "parentFileNameHint"

var _ sdk.Inspector = (*image)(nil)

// inspection collects findings: an image may have very many.
type inspection struct {
	sdk.Inspection
	count map[string]int // by rule
}

// enough findings of one rule.
const enough = 16

func (in *inspection) find(rule, format string, args ...any) {
	if in.count[rule]++; in.count[rule] <= enough {
		in.Findings = append(in.Findings, sdk.Finding{Rule: rule, Text: fmt.Sprintf(format, args...)})
	}
}

// Inspect implements sdk.Inspector. Only a disk in a single file that holds its
// own data is what a stranger has reason to send, with a descriptor that all
// programs read alike.
func (img *image) Inspect(context.Context) (*sdk.Inspection, error) {
	in := &inspection{count: map[string]int{}}
	in.Features = []string{img.desc.createType}
	switch img.desc.createType {
	case monolithicSparse, streamOptimized:
	default:
		in.find(ruleSubformat, "a disk of type %.200q, which is not kept in one file of its own", img.desc.createType)
	}
	if img.descAt < 0 {
		return &in.Inspection, nil
	}
	length := img.descLength
	if length == 0 {
		length = img.mainSize
	}
	b, err := img.read(img.descAt, length)
	if err != nil {
		return nil, err
	}
	text, rest, _ := bytes.Cut(b, []byte{0})
	if !leftover(text, rest) {
		in.find(ruleDescriptor, "something follows the end of the descriptor")
	}
	in.text(text)
	in.lines(text, img.descAt > 0)
	if img.descAt > 0 && img.descAt != descriptorAt {
		in.find(ruleDescriptor, "the descriptor is at %#x, not %#x", img.descAt, descriptorAt)
	}
	if err := img.inspectParent(in, b); err != nil {
		return nil, err
	}
	if img.descAt > 0 {
		err = img.inspectFooter(in)
	}
	return &in.Inspection, err
}

// leftover says whether the rest behind a descriptor's text is what qemu-img
// leaves there. It writes a CID without leading zeros, and where that is shorter
// than the one before, the last bytes of the longer text stay behind the NUL of
// the shorter one: at most six, with those of earlier times among them.
func leftover(text, rest []byte) bool {
	rest = bytes.TrimRight(rest, "\x00")
	if len(rest) > len("ffffffff")-len("0")-1 {
		return false
	}
	for piece := range bytes.SplitSeq(rest, []byte{0}) {
		if !bytes.HasSuffix(text, piece) {
			return false
		}
	}
	return true
}

// read returns up to n bytes of the main file from off.
func (img *image) read(off, n int64) ([]byte, error) {
	b := make([]byte, min(n, maxDescriptor))
	got, err := img.main.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("descriptor: %w", err)
	}
	return b[:got], nil
}

// text checks the characters of a descriptor.
func (in *inspection) text(b []byte) {
	for i, c := range b {
		switch {
		case c == '\r' && i+1 < len(b) && b[i+1] == '\n', c == '\n', c == '\t':
		case c < 0x20 || c >= 0x7f:
			in.find(ruleDescriptor, "the descriptor has the byte %#02x at %d, where ASCII text is accepted", c, i)
			return
		}
	}
}

// knownKeys are those of a descriptor's header that change nothing else than
// what this program reads.
var knownKeys = [...]string{"version", "encoding", "cid", "parentcid", "isnativesnapshot", "createtype", "parentfilenamehint"}

func known(key string) bool {
	for _, k := range knownKeys {
		if k == key {
			return true
		}
	}
	return false
}

// lines checks the lines of a descriptor, embedded in the extent that it
// describes or in a file of its own.
func (in *inspection) lines(text []byte, embedded bool) {
	extents, seen := 0, map[string]bool{}
	for line := range bytes.Lines(text) {
		s := strings.TrimSpace(string(line))
		if s == "" || s[0] == '#' {
			continue
		}
		key, _, assigned := strings.Cut(s, "=")
		key = strings.ToLower(strings.TrimSpace(key))
		switch access, _, _ := strings.Cut(s, " "); {
		case access == accessReadWrite || access == accessReadOnly || access == accessNone:
			extents++
			in.extentLine(s, embedded)
		case !assigned:
			in.find(ruleDescriptor, "the line %.200q is none that a descriptor has", s)
		case strings.HasPrefix(key, "ddb."):
		case !known(key):
			in.find(ruleDescriptor, "the key %.200q is none that a descriptor has", key)
		case seen[key]:
			in.find(ruleDescriptor, "the key %q appears twice", key)
		default:
			seen[key] = true
		}
	}
	if embedded && extents != 1 {
		in.find(ruleDescriptor, "the descriptor has %d extents, a disk in one file has one", extents)
	}
}

// extentLine checks a line that Open understood.
func (in *inspection) extentLine(s string, embedded bool) {
	head, rest, _ := strings.Cut(s, `"`)
	name, after, _ := strings.Cut(rest, `"`)
	if why := badExtentName(name); why != "" {
		in.find(ruleExtentName, "extent %.200q %s", name, why)
	}
	if strings.Contains(after, `"`) {
		in.find(ruleDescriptor, "the extent line %.200q has several names", s)
	}
	if fields := strings.Fields(head); embedded && (len(fields) < 3 || fields[2] != typeSparse) {
		in.find(ruleDescriptor, "the extent line %.200q, a disk in one file is %s", s, typeSparse)
	}
}

// inspectParent looks for parents that Info does not tell of. text is the whole
// descriptor, with what follows its end.
func (img *image) inspectParent(in *inspection, text []byte) error {
	at := int64(0)
	if img.descAt > 0 {
		at = descriptorAt
	}
	seen, err := img.read(at, parentReach)
	if err != nil {
		return err
	}
	seen, _, _ = bytes.Cut(seen, []byte{0})
	hints := 0
	for _, b := range [][]byte{text, seen} {
		hints = max(hints, bytes.Count(bytes.ToLower(b), []byte(strings.ToLower(parentKey))))
	}
	expected := 0
	if img.desc.hasParentHint {
		expected = 1
		_, after, _ := bytes.Cut(seen, []byte(parentKey))
		if !bytes.HasPrefix(after, []byte(`="`+img.desc.parentHint+`"`)) {
			in.find(ruleParent, "programs differ in what they read for the parent %.200q", img.desc.parentHint)
		}
	}
	switch {
	case hints > expected:
		in.find(ruleParent, "%s appears where some programs read the name of a parent, and others none", parentKey)
	case !img.desc.hasParentHint && img.desc.parentCID != noParent:
		in.find(ruleParent, "parentCID %08x tells of a parent that has no name", img.desc.parentCID)
	}
	return nil
}

// inspectFooter compares the footer of a streamed extent with its header.
func (img *image) inspectFooter(in *inspection) error {
	b, err := sdk.ReadAtMost(img.main, "sparse extent header", 0, sectorSize, sectorSize)
	if err != nil {
		return err
	}
	var h sparseHeader
	if err := h.decode(b); err != nil {
		return err
	}
	if h.gdOffset != gdAtEnd {
		return nil
	}
	foot, err := readFooter(img.main, img.mainSize)
	if err != nil {
		in.find(ruleFooter, "%v", err)
		return nil
	}
	for _, f := range []struct {
		name         string
		header, foot uint64
	}{
		{"version", uint64(h.version), uint64(foot.version)},
		{"capacity", h.capacity, foot.capacity},
		{"grain size", h.grainSize, foot.grainSize},
		{"table size", uint64(h.tableEntries), uint64(foot.tableEntries)},
		{"descriptor place", h.descriptorOffset, foot.descriptorOffset},
		{"descriptor size", h.descriptorSize, foot.descriptorSize},
		{"compression", uint64(h.compression), uint64(foot.compression)},
	} {
		if f.header != f.foot {
			in.find(ruleFooter, "the footer's %s is %d, the header's %d", f.name, f.foot, f.header)
		}
	}
	return nil
}

// badExtentName says why no file of an image may have this name, or nothing.
func badExtentName(name string) string {
	switch {
	case strings.ContainsAny(name, `/\`):
		return "is a path, not a name"
	case name == "." || name == "..":
		return "is a directory"
	case len(name) > 1 && name[1] == ':':
		return "names a drive"
	case strings.ContainsFunc(name, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return "has control characters"
	}
	return ""
}

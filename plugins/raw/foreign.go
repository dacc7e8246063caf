package raw

import (
	"bytes"
	"fmt"
	"strings"

	"github.com/instar-img/instar/sdk"
)

// headReach is how far from the start marks are looked for, in bytes: as far as
// the second volume descriptor of an optical disc.
const headReach = 36 << 10

// tailReach is how far from the end.
const tailReach = 512

// mark is what the files of a format bear.
type mark struct {
	format string
	at     int64 // from the start, or from the end where negative
	magic  string
}

// foreignMarks are those of formats that qemu-img or others recognise and read
// as more than plain bytes. Formats with a plugin are among them: it may not be
// installed here, and be so where the image goes.
var foreignMarks = [...]mark{
	{"qcow", 0, "QFI\xfb"},
	{"QED", 0, "QED\x00"},
	{"VMDK", 0, "KDMV"},
	{"VMDK", 0, "COWD"},
	{"VHDX", 0, "vhdxfile"},
	{"VHD", 0, "conectix"},
	{"VDI", 0x40, "\x7f\x10\xda\xbe"},
	{"Parallels", 0, "WithoutFreeSpace"},
	{"Parallels", 0, "WithouFreSpacExt"},
	{"LUKS", 0, "LUKS\xba\xbe"},
	{"LUKS", 0, "SKUL\xba\xbe"},
	{"Bochs", 0, "Bochs Virtual HD Image"},
	{"cloop", 0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop"},
	{"DMG", -512, "koly"},
}

// discMarks are those of optical discs (ECMA-119, 8.1; ECMA-167, part 2, 9.1).
var discMarks = [...]mark{
	{"ISO 9660", 0x8001, "CD001"},
	{"UDF", 0x8001, "BEA01"},
	{"UDF", 0x8001, "NSR02"},
	{"UDF", 0x8001, "NSR03"},
	{"UDF", 0x8801, "NSR02"},
	{"UDF", 0x8801, "NSR03"},
}

// found returns the first of marks in a file that begins with head and ends
// with tail, empty for none.
func found(marks []mark, head, tail []byte) string {
	for _, m := range marks {
		from, at := head, m.at
		if at < 0 {
			from, at = tail, int64(len(tail))+at
		}
		if at >= 0 && at <= int64(len(from)) && bytes.HasPrefix(from[at:], []byte(m.magic)) {
			return m.format
		}
	}
	return ""
}

// refuseForeign returns an error for a file that would be read as plain bytes
// only because no plugin knows its format.
func refuseForeign(f sdk.File, length int64) error {
	if length == 0 {
		return nil
	}
	head, err := sdk.ReadAtMost(f, "start", 0, min(length, openReach), openReach)
	if err != nil {
		return err
	}
	tail, err := sdk.ReadAtMost(f, "end", max(0, length-tailReach), min(length, tailReach), tailReach)
	if err != nil {
		return err
	}
	if name := found(foreignMarks[:], head, tail); name != "" {
		return fmt.Errorf("it bears the mark of %s, which no installed plugin reads (-f raw takes it as it is): %w", name, sdk.ErrUnsupported)
	}
	return nil
}

// openReach is how far from the start foreignMarks lie, in bytes.
const openReach = 512

// isDescriptor reports whether a file that begins with head can be read as the
// descriptor of a VMDK: text, up to a NUL, with a line that only one has.
// Programs differ in what they skip before it.
func isDescriptor(head []byte) bool {
	text, _, _ := bytes.Cut(head, []byte{0})
	for line := range bytes.FieldsFuncSeq(text, func(r rune) bool { return r == '\n' || r == '\r' }) {
		s := strings.ToLower(string(bytes.TrimSpace(line[:min(len(line), 1024)])))
		key, value, ok := strings.Cut(s, "=")
		switch key = strings.TrimSpace(key); {
		case strings.HasPrefix(s, "# disk descriptorfile"), ok && key == "createtype":
			return true
		case ok && key == "version" && strings.Trim(value, " 0123456789") == "":
			return true
		}
	}
	return false
}

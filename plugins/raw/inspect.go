package raw

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/instar-img/instar/sdk"
)

// Rules of Inspect, beside those of the core. UEFI 2.10, section 5, has the
// structures.
const (
	ruleForeign    = "foreign-format"
	ruleDisc       = "optical-disc"
	ruleBootFlag   = "partition-boot-flag"
	ruleNone       = "partition-none"
	ruleOverlap    = "partition-overlap"
	ruleOutside    = "partition-outside"
	ruleProtective = "partition-protective"
	ruleGPT        = "partition-gpt"
)

func rules() []sdk.Rule {
	return []sdk.Rule{
		{Name: ruleForeign, Meaning: "the content bears the mark of another format (QED, VDI, Parallels, LUKS, a VMDK descriptor, ...)"},
		{Name: ruleDisc, Meaning: "an ISO 9660 or UDF file system, which many programs treat as a format"},
		{Name: ruleBootFlag, Meaning: "an MBR partition that is neither active nor inactive"},
		{Name: ruleNone, Meaning: "a boot sector with neither partitions nor a file system, or a partition without sectors"},
		{Name: ruleOverlap, Meaning: "partitions that share sectors, or lie over the table"},
		{Name: ruleOutside, Meaning: "a partition that ends beyond the disk"},
		{Name: ruleProtective, Meaning: "a GPT without a protective MBR, or one that is not as it has to be"},
		{Name: ruleGPT, Meaning: "a GPT whose header is missing, damaged or points outside"},
	}
}

const (
	tableAt   = 446
	entrySize = 16
	typeGPT   = 0xee
)

var _ sdk.Inspector = (*image)(nil)

// partition is an entry of the MBR. Units are sectors.
type partition struct {
	flag, kind    byte
	chs           [3]byte // where it starts: head, sector, cylinder
	start, length int64
}

func (p *partition) decode(b []byte) {
	*p = partition{flag: b[0], kind: b[4], chs: [3]byte(b[1:4]),
		start: int64(binary.LittleEndian.Uint32(b[8:])), length: int64(binary.LittleEndian.Uint32(b[12:]))}
}

// isTable reports whether programs would take the entries for a table: the code
// of a file system's boot sector may stand where it would be.
func isTable(parts []partition) bool {
	used := false
	for _, p := range parts {
		if p.flag != 0 && p.flag != 0x80 {
			return false
		}
		used = used || p.kind != 0
	}
	return used
}

// Inspect implements sdk.Inspector: the content must not be of another format,
// and what begins like a disk with partitions has to be one. Other content is
// as good as any.
func (img *image) Inspect(context.Context) (*sdk.Inspection, error) {
	in := &sdk.Inspection{}
	find := func(rule, format string, args ...any) {
		in.Findings = append(in.Findings, sdk.Finding{Rule: rule, Text: fmt.Sprintf(format, args...)})
	}
	head, err := img.read(0, headReach)
	if err != nil {
		return nil, err
	}
	tail, err := img.read(max(0, img.length-tailReach), tailReach)
	if err != nil {
		return nil, err
	}
	if name := found(foreignMarks[:], head, tail); name != "" {
		find(ruleForeign, "it bears the mark of %s", name)
	} else if isDescriptor(head) {
		find(ruleForeign, "it can be read as the descriptor of a VMDK")
	}
	if name := found(discMarks[:], head, tail); name != "" {
		in.Features = append(in.Features, name)
		find(ruleDisc, "it holds an %s file system", name)
	}
	b := make([]byte, 2*sectorSize)
	copy(b, head)
	img.sectors(b, in, find)
	return in, nil
}

// read returns up to n bytes of the file from off.
func (img *image) read(off, n int64) ([]byte, error) {
	b := make([]byte, n)
	got, err := img.file.ReadAt(b, img.base+off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:got], nil
}

// sectors checks the first two sectors, b.
func (img *image) sectors(b []byte, in *sdk.Inspection, find func(rule, format string, args ...any)) {
	header := string(b[sectorSize:sectorSize+8]) == gptSignature
	if b[510] != 0x55 || b[511] != 0xaa {
		if header {
			in.Features = append(in.Features, "GPT")
			find(ruleProtective, "a GPT without a protective MBR: programs differ in whether they read it")
		}
		return
	}
	var parts [4]partition
	protective := -1
	for i := range parts {
		parts[i].decode(b[tableAt+i*entrySize:])
		if parts[i].kind == typeGPT && protective < 0 {
			protective = i
		}
	}
	if name := volume(b, img.size); name != "" && !isTable(parts[:]) {
		in.Features = append(in.Features, name)
		return
	}
	in.Features = append(in.Features, "MBR")
	img.mbr(parts[:], protective, find)
	if protective < 0 && !header {
		return
	}
	in.Features = append(in.Features, "GPT")
	if protective < 0 {
		find(ruleProtective, "a GPT without a protective MBR: programs differ in which table they read")
	}
	img.gpt(b[sectorSize:], find)
}

// mbr checks the four entries, of which the one at protective, if any, is the
// first that announces a GPT.
func (img *image) mbr(parts []partition, protective int, find func(rule, format string, args ...any)) {
	sectors := img.size / sectorSize
	used := false
	for i, p := range parts {
		if p.flag != 0 && p.flag != 0x80 {
			find(ruleBootFlag, "partition %d has the boot flag %#02x", i+1, p.flag)
		}
		if p.kind == 0 {
			continue
		}
		used = true
		if p.length == 0 {
			find(ruleNone, "partition %d has no sectors", i+1)
		}
		if p.kind == typeGPT {
			p.protects(i, protective, sectors, find)
			continue
		}
		if protective >= 0 {
			find(ruleProtective, "partition %d beside the protective one: programs differ in which table they read", i+1)
		}
		if p.start == 0 {
			find(ruleOverlap, "partition %d begins in the partition table", i+1)
		}
		if p.start+p.length > sectors {
			find(ruleOutside, "partition %d ends at sector %d of %d", i+1, p.start+p.length, sectors)
		}
		for j, q := range parts[:i] {
			if q.kind != 0 && q.kind != typeGPT && p.start < q.start+q.length && q.start < p.start+p.length {
				find(ruleOverlap, "partitions %d and %d overlap", j+1, i+1)
			}
		}
	}
	if !used {
		find(ruleNone, "a boot sector without a partition, and not that of a file system")
	}
}

// protects checks entry i, which announces a GPT (UEFI 5.2.3).
func (p *partition) protects(i, first int, sectors int64, find func(rule, format string, args ...any)) {
	if i != first {
		find(ruleProtective, "partition %d protects a GPT as partition %d does", i+1, first+1)
	} else if i != 0 {
		find(ruleProtective, "partition %d protects the GPT, not the first", i+1)
	}
	if p.start != 1 {
		find(ruleProtective, "the protective partition begins at sector %d, not 1", p.start)
	}
	// Parted writes sector 1, UEFI wants 2.
	if p.chs != [3]byte{0, 2, 0} && p.chs != [3]byte{0, 1, 0} {
		find(ruleProtective, "the protective partition begins at head, sector and cylinder % x, not 00 02 00", p.chs[:])
	}
	// As long as the disk, or all ones where that is not known; a disk may
	// have grown since.
	if p.length != 0xffffffff && p.start+p.length > sectors {
		find(ruleOutside, "the protective partition ends at sector %d of %d", p.start+p.length, sectors)
	}
}

const (
	gptSignature = "EFI PART"
	gptHeader    = 92
)

// gpt checks the header of a GPT (UEFI 5.3.2).
func (img *image) gpt(b []byte, find func(rule, format string, args ...any)) {
	le := binary.LittleEndian
	if string(b[:8]) != gptSignature {
		find(ruleGPT, "no GPT behind the protective MBR")
		return
	}
	size := le.Uint32(b[12:])
	if size < gptHeader || size > sectorSize {
		find(ruleGPT, "GPT header of %d bytes", size)
		return
	}
	sum := append([]byte(nil), b[:size]...)
	clear(sum[16:20])
	if crc32.ChecksumIEEE(sum) != le.Uint32(b[16:]) {
		find(ruleGPT, "the GPT header's checksum is wrong")
	}
	sectors := uint64(img.size / sectorSize)
	if at := le.Uint64(b[24:]); at != 1 {
		find(ruleGPT, "the GPT header says that it is in sector %d", at)
	}
	for _, x := range []struct {
		at   int
		what string
	}{{32, "backup header"}, {40, "first usable sector"}, {48, "last usable sector"}, {72, "table"}} {
		if v := le.Uint64(b[x.at:]); v >= sectors {
			find(ruleGPT, "the GPT's %s is at sector %d of %d", x.what, v, sectors)
		}
	}
	if n, each := le.Uint32(b[80:]), le.Uint32(b[84:]); n > 4096 || each < 128 || each > 4096 {
		find(ruleGPT, "a GPT of %d entries of %d bytes", n, each)
	}
}

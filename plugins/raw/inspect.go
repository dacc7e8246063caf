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
	ruleBootFlag   = "partition-boot-flag"  // neither active nor inactive
	ruleOverlap    = "partition-overlap"    // two partitions share sectors
	ruleOutside    = "partition-outside"    // it ends beyond the disk
	ruleProtective = "partition-protective" // a protective MBR that protects something else
	ruleGPT        = "partition-gpt"        // a GPT that is damaged
)

const (
	tableAt   = 446
	entrySize = 16
	typeGPT   = 0xee
)

var _ sdk.Inspector = (*image)(nil)

// partition is an entry of the MBR. Units are sectors.
type partition struct {
	flag, kind    byte
	start, length int64
}

func (p *partition) decode(b []byte) {
	*p = partition{flag: b[0], kind: b[4],
		start: int64(binary.LittleEndian.Uint32(b[8:])), length: int64(binary.LittleEndian.Uint32(b[12:]))}
}

// Inspect implements sdk.Inspector: what begins like a disk with partitions has
// to be one. Other content is as good as any.
func (img *image) Inspect(context.Context) (*sdk.Inspection, error) {
	in := &sdk.Inspection{}
	b := make([]byte, 2*sectorSize)
	n, err := img.file.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	clear(b[n:])
	if b[510] != 0x55 || b[511] != 0xaa {
		return in, nil
	}
	if isVolume(b) {
		in.Features = append(in.Features, "file system")
		return in, nil
	}
	find := func(rule, format string, args ...any) {
		in.Findings = append(in.Findings, sdk.Finding{Rule: rule, Text: fmt.Sprintf(format, args...)})
	}
	var parts [4]partition
	protective := -1
	for i := range parts {
		parts[i].decode(b[tableAt+i*entrySize:])
		if parts[i].kind == typeGPT {
			protective = i
		}
	}
	in.Features = append(in.Features, "MBR")
	img.mbr(parts[:], protective, find)
	if protective >= 0 || string(b[sectorSize:sectorSize+8]) == gptSignature {
		in.Features = append(in.Features, "GPT")
		if protective < 0 {
			find(ruleProtective, "a GPT without a protective MBR: programs differ in which table they read")
		}
		img.gpt(b[sectorSize:], find)
	}
	return in, nil
}

// isVolume reports whether a boot sector is that of a FAT, exFAT or NTFS file
// system, whose code stands where a partition table would.
func isVolume(b []byte) bool {
	return string(b[3:11]) == "NTFS    " || string(b[3:11]) == "EXFAT   " ||
		string(b[54:57]) == "FAT" || string(b[82:87]) == "FAT32"
}

// mbr checks the four entries.
func (img *image) mbr(parts []partition, protective int, find func(rule, format string, args ...any)) {
	sectors := img.size / sectorSize
	for i, p := range parts {
		if p.flag != 0 && p.flag != 0x80 {
			find(ruleBootFlag, "partition %d has the boot flag %#02x", i+1, p.flag)
		}
		if p.kind == 0 {
			continue
		}
		if p.kind == typeGPT {
			if p.start != 1 {
				find(ruleProtective, "the protective partition begins at sector %d, not 1", p.start)
			}
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

package raw

import (
	"encoding/binary"
	"math/bits"
)

// volume returns the file system, a FAT, an NTFS or an exFAT, whose first
// sector b is, in a disk of so many bytes; empty where it is none. The names
// that such sectors bear are not enough: each field must be in its bounds.
func volume(b []byte, size int64) string {
	switch {
	case string(b[3:11]) == "NTFS    ":
		if isNTFS(b, size) {
			return "NTFS"
		}
	case string(b[3:11]) == "EXFAT   ":
		if isExFAT(b, size) {
			return "exFAT"
		}
	case isFAT(b, size):
		return "FAT"
	}
	return ""
}

// jumps reports whether b begins with a jump over the parameter block.
func jumps(b []byte) bool { return b[0] == 0xeb && b[2] == 0x90 || b[0] == 0xe9 }

// sectorBytes is the parameter block's number of bytes in a sector, 0 where it
// is none that a disk has.
func sectorBytes(b []byte) uint64 {
	n := uint64(binary.LittleEndian.Uint16(b[11:]))
	if bits.OnesCount64(n) != 1 || n < sectorSize || n > 4096 {
		return 0
	}
	return n
}

// fits reports whether a volume of n sectors lies in a disk of size bytes.
func fits(n, sector uint64, size int64) bool { return n > 0 && n <= uint64(size)/sector }

// isFAT goes by the parameter block ("FAT: General Overview of On-Disk Format",
// 1.03, "Boot Sector and BPB").
func isFAT(b []byte, size int64) bool {
	le := binary.LittleEndian
	sector, media := sectorBytes(b), b[21]
	total := uint64(le.Uint16(b[19:]))
	if total == 0 {
		total = uint64(le.Uint32(b[32:]))
	}
	tables := uint64(le.Uint16(b[22:]))
	if tables == 0 {
		tables = uint64(le.Uint32(b[36:]))
	}
	return jumps(b) && sector > 0 && bits.OnesCount8(b[13]) == 1 && le.Uint16(b[14:]) > 0 &&
		(b[16] == 1 || b[16] == 2) && (media == 0xf0 || media >= 0xf8) &&
		tables > 0 && tables < total && fits(total, sector, size)
}

// isNTFS goes by the parameter block, whose FAT fields are 0.
func isNTFS(b []byte, size int64) bool {
	le := binary.LittleEndian
	sector := sectorBytes(b)
	for _, i := range []int{14, 15, 16, 17, 18, 19, 20, 22, 23, 32, 33, 34, 35} {
		if b[i] != 0 {
			return false
		}
	}
	// Clusters are a power of two, or the negative exponent of one.
	return jumps(b) && sector > 0 && b[21] == 0xf8 && (bits.OnesCount8(b[13]) == 1 || b[13] >= 0xf0) &&
		fits(le.Uint64(b[40:]), sector, size) && fits(le.Uint64(b[48:]), sector, size)
}

// isExFAT goes by the boot sector (exFAT file system specification, 3.1).
func isExFAT(b []byte, size int64) bool {
	le := binary.LittleEndian
	for _, v := range b[11:64] {
		if v != 0 {
			return false
		}
	}
	shift := b[108]
	return jumps(b) && shift >= 9 && shift <= 12 && b[109] <= 25-shift && (b[110] == 1 || b[110] == 2) &&
		fits(le.Uint64(b[72:]), 1<<shift, size)
}

package vhdx

import (
	"encoding/binary"
	"hash/crc32"
)

// crc adds data to a CRC-32C. The table is built at first use.
func crc(sum uint32, data []byte) uint32 {
	return crc32.Update(sum, crc32.MakeTable(crc32.Castagnoli), data)
}

// Every structure that has a checksum keeps it here; it counts as zero.
const checksumOffset = 4

var noChecksum [4]byte

// checksum is the CRC-32C of b with its checksum field taken as zero.
func checksum(b []byte) uint32 {
	sum := crc(0, b[:checksumOffset])
	sum = crc(sum, noChecksum[:])
	return crc(sum, b[checksumOffset+4:])
}

func seal(b []byte) { binary.LittleEndian.PutUint32(b[checksumOffset:], checksum(b)) }

func sealed(b []byte) bool {
	return binary.LittleEndian.Uint32(b[checksumOffset:]) == checksum(b)
}

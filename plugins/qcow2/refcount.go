package qcow2

import "encoding/binary"

// refcountAt returns entry i of a refcount block whose entries are 1<<order
// bits wide (qcow2.txt, "Host cluster management").
func refcountAt(block []byte, i int64, order uint32) uint64 {
	switch order {
	case 3:
		return uint64(block[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(block[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(block[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(block[8*i:])
	}
	// Widths below a byte begin at the least significant bit.
	width := uint(1) << order
	bit := uint(i) * width
	return uint64(block[bit/8]>>(bit%8)) & (1<<width - 1)
}

func setRefcount(block []byte, i int64, order uint32, v uint64) {
	switch order {
	case 3:
		block[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(block[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(block[4*i:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(block[8*i:], v)
	default:
		width := uint(1) << order
		bit := uint(i) * width
		mask := byte(1<<width-1) << (bit % 8)
		block[bit/8] = block[bit/8]&^mask | byte(v)<<(bit%8)&mask
	}
}

// refcountMax returns the largest refcount of a width.
func refcountMax(order uint32) uint64 {
	if order == 6 {
		return 1<<64 - 1
	}
	return 1<<(1<<order) - 1
}

// refcountMetadata returns how many refcount blocks and refcount table clusters
// describe n clusters and themselves. A generous answer leaves room for half as
// many table clusters again.
func (g *geometry) refcountMetadata(n int64, generous bool) (blocks, table int64) {
	for last, sum := int64(-1), int64(0); sum != last; {
		last = sum
		blocks = divUp(n+table+blocks, g.blockEntries)
		table = divUp(blocks, g.clusterSize/8)
		sum = n + blocks + table
		if sum == last && generous {
			n += divUp(table, 2)
			sum = 0
			generous = false
		}
	}
	return blocks, table
}

func divUp(a, b int64) int64 { return (a + b - 1) / b }

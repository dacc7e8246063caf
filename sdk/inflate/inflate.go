// Package inflate decompresses raw deflate streams (RFC 1951) whose output size
// is known, in one go. Disk images compress cluster by cluster: with the whole
// input and room for the whole output at hand there is no state to keep between
// calls, no window and no copy, which makes it about twice as fast as a reader.
package inflate

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"sync"
)

var (
	// ErrCorrupt: the input is not a deflate stream.
	ErrCorrupt = errors.New("deflate stream is corrupt")
	// ErrShort: the input ends before the output is full.
	ErrShort = errors.New("deflate stream ends early")
)

var pool = sync.Pool{New: func() any { return new(decoder) }}

// Fill decompresses src until dst is full and ignores what follows. The stream
// must hold at least that much. It is safe for concurrent use.
func Fill(dst, src []byte) error {
	d := pool.Get().(*decoder)
	n, err := d.run(dst, src)
	pool.Put(d)
	if err == nil && n < len(dst) {
		err = ErrShort
	}
	return err
}

// Decode decompresses src into dst, which is at least as long as the content of
// the stream, and returns how long that is. Where dst is full before the end of
// the stream, the rest is not looked at.
func Decode(dst, src []byte) (int, error) {
	d := pool.Get().(*decoder)
	n, err := d.run(dst, src)
	pool.Put(d)
	return n, err
}

const (
	litBits  = 11 // of the first table; longer codes go on in a second
	distBits = 8
	preBits  = 7

	// As many entries as any code can need (zlib's examples/enough.c).
	litSize  = 2342
	distSize = 402

	maxCode   = 15
	numLit    = 288
	numDist   = 32
	numPre    = 19
	endSymbol = 256
)

// Entries of the tables. The low byte is the number of bits that the entry
// consumes: the code's, in a second table what is left of it, plus the extra
// bits of lengths and distances. Bits 8-12 are the number of extra bits, or of
// the bits that index a second table.
const (
	entLiteral = 1 << 31 // bits 16-23: the byte
	entSpecial = 1 << 15 // one of the following
	entSecond  = 1 << 14 // bits 16-: where the second table begins
	entEnd     = 1 << 13 // end of block
	// otherwise: no code ends here
)

type decoder struct {
	lit   [litSize]uint32
	dist  [distSize]uint32
	pre   [1 << preBits]uint32
	lens  [numLit + numDist + 138]uint8
	fixed bool // lit and dist are those of fixed blocks
}

// lengthEntry and distEntry hold base and extra bits of symbols, without codes.
var (
	lengthEntry = [29]uint32{
		3 << 16, 4 << 16, 5 << 16, 6 << 16, 7 << 16, 8 << 16, 9 << 16, 10 << 16,
		11<<16 | 1<<8, 13<<16 | 1<<8, 15<<16 | 1<<8, 17<<16 | 1<<8,
		19<<16 | 2<<8, 23<<16 | 2<<8, 27<<16 | 2<<8, 31<<16 | 2<<8,
		35<<16 | 3<<8, 43<<16 | 3<<8, 51<<16 | 3<<8, 59<<16 | 3<<8,
		67<<16 | 4<<8, 83<<16 | 4<<8, 99<<16 | 4<<8, 115<<16 | 4<<8,
		131<<16 | 5<<8, 163<<16 | 5<<8, 195<<16 | 5<<8, 227<<16 | 5<<8,
		258 << 16,
	}
	preOrder = [numPre]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}
)

// litEntry returns what a literal or length symbol means.
func litEntry(symbol int) uint32 {
	switch {
	case symbol < endSymbol:
		return entLiteral | uint32(symbol)<<16
	case symbol == endSymbol:
		return entSpecial | entEnd
	case symbol < endSymbol+1+len(lengthEntry):
		return lengthEntry[symbol-endSymbol-1]
	}
	return entSpecial
}

// distEntry returns what a distance symbol means. A distance of 32769 would not
// fit, but there is none.
func distEntry(symbol int) uint32 {
	switch {
	case symbol < 4:
		return uint32(symbol+1) << 16
	case symbol < 30:
		extra := uint32(symbol/2 - 1)
		return (1+(2+uint32(symbol&1))<<extra)<<16 | extra<<8
	}
	return entSpecial
}

func preEntry(symbol int) uint32 { return uint32(symbol) << 16 }

// build makes the table of a canonical code (RFC 1951, 3.2.2). It reports false
// for codes that are over-subscribed, and for incomplete ones but for those of
// one code of one bit, and of none.
func build(table []uint32, tableBits int, lens []uint8, entry func(int) uint32) bool {
	var count [maxCode + 1]int
	for _, n := range lens {
		count[n]++
	}
	longest := maxCode
	for longest > 0 && count[longest] == 0 {
		longest--
	}
	for i := range table[:1<<tableBits] {
		table[i] = entSpecial | 1
	}
	if longest == 0 {
		return true // any use of it is an error
	}
	var next [maxCode + 2]int // code, by length
	code := 0
	for n := 1; n <= longest; n++ {
		next[n] = code
		code = (code + count[n]) << 1
	}
	code >>= 1 // what follows the last code of the longest
	if code != 1<<longest && (code != 1 || longest != 1) {
		return false
	}
	free := 1 << tableBits // where the next second table goes
	second := -1           // the prefix that has the last one
	secondBits, secondAt := 0, 0
	// Codes ascend with their lengths and then with their symbols, and all that
	// share a prefix are neighbours in this order.
	var sorted [numLit]uint16
	var at [maxCode + 1]int
	for n, sum := 1, 0; n <= longest; n++ {
		at[n] = sum
		sum += count[n]
	}
	used := 0
	for symbol, n := range lens {
		if n != 0 {
			sorted[at[n]] = uint16(symbol)
			at[n]++
			used++
		}
	}
	for _, symbol := range sorted[:used] {
		n := int(lens[symbol])
		reversed := int(bits.Reverse16(uint16(next[n])) >> (16 - n))
		next[n]++
		e := entry(int(symbol))
		extra := e >> 8 & 31
		if e&(entLiteral|entSpecial) != 0 {
			extra = 0
		}
		if n <= tableBits {
			e |= uint32(n) + extra
			for i := reversed; i < 1<<tableBits; i += 1 << n {
				table[i] = e
			}
		} else {
			prefix := reversed & (1<<tableBits - 1)
			if prefix != second {
				// As many bits as the codes with this prefix need.
				secondBits = n - tableBits
				room := 1<<secondBits - count[n]
				for k := n + 1; room > 0 && k <= longest; k++ {
					secondBits++
					room = room<<1 - count[k]
				}
				second, secondAt = prefix, free
				free += 1 << secondBits
				if free > len(table) {
					return false
				}
				table[prefix] = entSpecial | entSecond | uint32(secondAt)<<16 | uint32(secondBits)<<8 | uint32(tableBits)
			}
			e |= uint32(n-tableBits) + extra
			for i := reversed >> tableBits; i < 1<<secondBits; i += 1 << (n - tableBits) {
				table[secondAt+i] = e
			}
		}
		count[n]-- // those of this length that are left
	}
	return true
}

// run decodes blocks until the stream ends or dst is full.
func (d *decoder) run(dst, src []byte) (int, error) {
	var (
		buf uint64 // bits not used yet, the next one lowest
		n   uint   // how many; above them buf may hold bits of the next byte
		pos int    // next byte of src
		out int
	)
	for len(dst) > 0 {
		for n < 48 && pos < len(src) {
			buf = buf&(1<<n-1) | uint64(src[pos])<<n
			pos++
			n += 8
		}
		buf &= 1<<n - 1
		if n < 3 {
			return out, ErrShort
		}
		last, kind := buf&1 != 0, buf>>1&3
		buf >>= 3
		n -= 3
		switch kind {
		case 0:
			n -= n & 7
			pos -= int(n / 8) // give whole bytes back
			buf, n = 0, 0
			if len(src)-pos < 4 {
				return out, ErrShort
			}
			length := int(binary.LittleEndian.Uint16(src[pos:]))
			if length^0xffff != int(binary.LittleEndian.Uint16(src[pos+2:])) {
				return out, ErrCorrupt
			}
			pos += 4
			take := min(length, len(src)-pos)
			copied := copy(dst[out:], src[pos:pos+take])
			out += copied
			pos += copied
			if copied < length && out < len(dst) {
				return out, ErrShort
			}
		case 1:
			if !d.fixed {
				d.buildFixed()
			}
			var err error
			if buf, n, pos, out, err = d.block(dst, src, buf, n, pos, out); err != nil || out == len(dst) {
				return out, err
			}
		case 2:
			var err error
			if buf, n, pos, err = d.readCodes(src, buf, n, pos); err != nil {
				return out, err
			}
			if buf, n, pos, out, err = d.block(dst, src, buf, n, pos, out); err != nil || out == len(dst) {
				return out, err
			}
		default:
			return out, ErrCorrupt
		}
		if last || out == len(dst) {
			return out, nil
		}
	}
	return 0, nil
}

func (d *decoder) buildFixed() {
	for i := range numLit {
		switch {
		case i < 144:
			d.lens[i] = 8
		case i < 256:
			d.lens[i] = 9
		case i < 280:
			d.lens[i] = 7
		default:
			d.lens[i] = 8
		}
	}
	build(d.lit[:], litBits, d.lens[:numLit], litEntry)
	for i := range numDist {
		d.lens[i] = 5
	}
	build(d.dist[:], distBits, d.lens[:numDist], distEntry)
	d.fixed = true
}

// readCodes reads the codes of a dynamic block (RFC 1951, 3.2.7).
func (d *decoder) readCodes(src []byte, buf uint64, n uint, pos int) (uint64, uint, int, error) {
	d.fixed = false
	refill := func() {
		for n <= 56 && pos < len(src) {
			buf |= uint64(src[pos]) << n
			pos++
			n += 8
		}
	}
	refill()
	if n < 14 {
		return buf, n, pos, ErrShort
	}
	lits, dists, pres := int(buf&31)+257, int(buf>>5&31)+1, int(buf>>10&15)+4
	buf >>= 14
	n -= 14
	if lits > 286 || dists > 30 {
		return buf, n, pos, ErrCorrupt
	}
	var preLens [numPre]uint8
	for _, symbol := range preOrder[:pres] {
		if refill(); n < 3 {
			return buf, n, pos, ErrShort
		}
		preLens[symbol] = uint8(buf & 7)
		buf >>= 3
		n -= 3
	}
	if !build(d.pre[:], preBits, preLens[:], preEntry) {
		return buf, n, pos, ErrCorrupt
	}
	for i := 0; i < lits+dists; {
		refill()
		e := d.pre[buf&(1<<preBits-1)]
		used := uint(e & 0xff)
		if e&entSpecial != 0 {
			if n < preBits && pos == len(src) {
				return buf, n, pos, ErrShort
			}
			return buf, n, pos, ErrCorrupt
		}
		if used > n {
			return buf, n, pos, ErrShort
		}
		buf >>= used
		n -= used
		symbol := e >> 16
		if symbol < 16 {
			d.lens[i] = uint8(symbol)
			i++
			continue
		}
		var value uint8
		var extra uint
		var repeat int
		switch symbol {
		case 16:
			if i == 0 {
				return buf, n, pos, ErrCorrupt
			}
			value, extra, repeat = d.lens[i-1], 2, 3
		case 17:
			extra, repeat = 3, 3
		default:
			extra, repeat = 7, 11
		}
		if extra > n {
			return buf, n, pos, ErrShort
		}
		repeat += int(buf & (1<<extra - 1))
		buf >>= extra
		n -= extra
		if i+repeat > lits+dists {
			return buf, n, pos, ErrCorrupt
		}
		for range repeat {
			d.lens[i] = value
			i++
		}
	}
	if !build(d.lit[:], litBits, d.lens[:lits], litEntry) || !build(d.dist[:], distBits, d.lens[lits:lits+dists], distEntry) {
		return buf, n, pos, ErrCorrupt
	}
	return buf, n, pos, nil
}

// fastOut is the room in the output that one round of the fast loop may fill:
// three literals, the longest match, and what copies of eight bytes overshoot.
const fastOut = 3 + 258 + 8

// block decodes the symbols of one block.
func (d *decoder) block(dst, src []byte, buf uint64, n uint, pos, out int) (uint64, uint, int, int, error) {
	lit, dist := &d.lit, &d.dist
	// While there is room on both sides, bits are taken eight bytes at a time:
	// after a refill there are 56 at least, and a length with its distance
	// needs 48 at most.
	for pos+16 <= len(src) && out+fastOut <= len(dst) {
		buf |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
		pos += int(63-n) >> 3
		n |= 56
		e := lit[buf&(1<<litBits-1)]
		if e&entLiteral != 0 {
			buf >>= e & 0x3f
			n -= uint(e & 0x3f)
			dst[out] = byte(e >> 16)
			out++
			e = lit[buf&(1<<litBits-1)]
			if e&entLiteral != 0 {
				buf >>= e & 0x3f
				n -= uint(e & 0x3f)
				dst[out] = byte(e >> 16)
				out++
				e = lit[buf&(1<<litBits-1)]
				if e&entLiteral != 0 {
					buf >>= e & 0x3f
					n -= uint(e & 0x3f)
					dst[out] = byte(e >> 16)
					out++
					continue
				}
			}
		}
		if e&entSpecial != 0 {
			if e&entSecond != 0 {
				buf >>= litBits
				n -= litBits
				e = lit[e>>16+uint32(buf)&(1<<(e>>8&31)-1)]
			}
			if e&entLiteral != 0 {
				buf >>= e & 0x3f
				n -= uint(e & 0x3f)
				dst[out] = byte(e >> 16)
				out++
				continue
			}
			if e&entEnd != 0 {
				used := uint(e & 0x3f)
				n -= used
				return buf >> used & (1<<n - 1), n, pos, out, nil
			}
			if e&entSpecial != 0 {
				return buf, n, pos, out, ErrCorrupt
			}
		}
		used := uint(e & 0x3f)
		extra := uint(e >> 8 & 31)
		length := int(e>>16) + int(buf>>(used-extra)&(1<<extra-1))
		buf >>= used
		n -= used

		if n < maxCode+13 { // a distance
			buf |= binary.LittleEndian.Uint64(src[pos:]) << (n & 63)
			pos += int(63-n) >> 3
			n |= 56
		}
		e = dist[buf&(1<<distBits-1)]
		if e&entSpecial != 0 {
			if e&entSecond == 0 {
				return buf, n, pos, out, ErrCorrupt
			}
			buf >>= distBits
			n -= distBits
			if e = dist[e>>16+uint32(buf)&(1<<(e>>8&31)-1)]; e&entSpecial != 0 {
				return buf, n, pos, out, ErrCorrupt
			}
		}
		used = uint(e & 0x3f)
		extra = uint(e >> 8 & 31)
		distance := int(e>>16) + int(buf>>(used-extra)&(1<<extra-1))
		buf >>= used
		n -= used
		if distance > out {
			return buf, n, pos, out, ErrCorrupt
		}
		from, end := out-distance, out+length
		switch {
		case distance >= 8:
			for out < end {
				binary.LittleEndian.PutUint64(dst[out:], binary.LittleEndian.Uint64(dst[from:]))
				out += 8
				from += 8
			}
		case distance == 1:
			v := uint64(dst[from]) * 0x0101010101010101
			for out < end {
				binary.LittleEndian.PutUint64(dst[out:], v)
				out += 8
			}
		default:
			for out < end {
				dst[out] = dst[from]
				out++
				from++
			}
		}
		out = end
	}
	buf &= 1<<n - 1
	// The ends of input and output.
	for out < len(dst) {
		for n <= 56 && pos < len(src) {
			buf |= uint64(src[pos]) << n
			pos++
			n += 8
		}
		e := lit[buf&(1<<litBits-1)]
		skip := uint(0)
		if e&entSpecial != 0 && e&entSecond != 0 {
			skip = litBits
			e = lit[e>>16+uint32(buf>>litBits)&(1<<(e>>8&31)-1)]
		}
		used := skip + uint(e&0x3f)
		if used > n {
			return buf, n, pos, out, ErrShort
		}
		switch {
		case e&entLiteral != 0:
			buf >>= used
			n -= used
			dst[out] = byte(e >> 16)
			out++
			continue
		case e&entSpecial != 0 && e&entEnd != 0:
			return buf >> used, n - used, pos, out, nil
		case e&entSpecial != 0:
			return buf, n, pos, out, ErrCorrupt
		}
		extra := uint(e >> 8 & 31)
		length := int(e>>16) + int(buf>>(used-extra)&(1<<extra-1))
		buf >>= used
		n -= used
		for n <= 56 && pos < len(src) {
			buf |= uint64(src[pos]) << n
			pos++
			n += 8
		}
		e = dist[buf&(1<<distBits-1)]
		skip = 0
		if e&entSpecial != 0 && e&entSecond != 0 {
			skip = distBits
			e = dist[e>>16+uint32(buf>>distBits)&(1<<(e>>8&31)-1)]
		}
		used = skip + uint(e&0x3f)
		if used > n {
			return buf, n, pos, out, ErrShort
		}
		if e&entSpecial != 0 {
			return buf, n, pos, out, ErrCorrupt
		}
		extra = uint(e >> 8 & 31)
		distance := int(e>>16) + int(buf>>(used-extra)&(1<<extra-1))
		buf >>= used
		n -= used
		if distance > out {
			return buf, n, pos, out, ErrCorrupt
		}
		for end := min(out+length, len(dst)); out < end; out++ {
			dst[out] = dst[out-distance]
		}
	}
	return buf, n, pos, out, nil
}

// Package ondisk has what decoders of untrusted structures need: cursors that
// cannot read out of bounds, builders for the way back, and arithmetic that
// reports overflow.
package ondisk

import (
	"encoding/binary"
	"errors"
	"math"
)

// ErrShort: a structure ends before its fields do.
var ErrShort = errors.New("structure is truncated")

// ErrOverflow: a computation on sizes or offsets does not fit.
var ErrOverflow = errors.New("arithmetic overflow")

// Cursor reads fields from a buffer, one after the other. After the first read
// beyond the end every read returns zero and Err returns ErrShort.
type Cursor struct {
	buf   []byte
	off   int
	order binary.ByteOrder
	short bool
}

// NewCursor returns a cursor over buf.
func NewCursor(buf []byte, order binary.ByteOrder) *Cursor { return &Cursor{buf: buf, order: order} }

func (c *Cursor) take(n int) []byte {
	if c.short || n < 0 || n > len(c.buf)-c.off {
		c.short = true
		return nil
	}
	b := c.buf[c.off : c.off+n]
	c.off += n
	return b
}

// U8, U16, U32 and U64 read one unsigned integer.
func (c *Cursor) U8() uint8 {
	if b := c.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (c *Cursor) U16() uint16 {
	if b := c.take(2); b != nil {
		return c.order.Uint16(b)
	}
	return 0
}

func (c *Cursor) U32() uint32 {
	if b := c.take(4); b != nil {
		return c.order.Uint32(b)
	}
	return 0
}

func (c *Cursor) U64() uint64 {
	if b := c.take(8); b != nil {
		return c.order.Uint64(b)
	}
	return 0
}

// Bytes returns the next n bytes, which alias the buffer.
func (c *Cursor) Bytes(n int) []byte { return c.take(n) }

// Skip passes over n bytes.
func (c *Cursor) Skip(n int) { c.take(n) }

// Offset returns the position of the next read.
func (c *Cursor) Offset() int { return c.off }

// Left returns the number of bytes not read yet.
func (c *Cursor) Left() int { return len(c.buf) - c.off }

// Err returns ErrShort once a read went beyond the end.
func (c *Cursor) Err() error {
	if c.short {
		return ErrShort
	}
	return nil
}

// Add returns a+b for non-negative a and b, or false.
func Add(a, b int64) (int64, bool) {
	if a < 0 || b < 0 || a > math.MaxInt64-b {
		return 0, false
	}
	return a + b, true
}

// Mul returns a*b for non-negative a and b, or false.
func Mul(a, b int64) (int64, bool) {
	if a < 0 || b < 0 {
		return 0, false
	}
	if a != 0 && b > math.MaxInt64/a {
		return 0, false
	}
	return a * b, true
}

// Int64 returns u as int64, or false where it does not fit.
func Int64(u uint64) (int64, bool) { return int64(u), u <= math.MaxInt64 }

// DivUp returns a/b rounded up, for a >= 0 and b > 0. It cannot overflow.
func DivUp(a, b int64) int64 {
	q := a / b
	if a%b != 0 {
		q++
	}
	return q
}

// AlignUp returns a rounded up to a multiple of b, or false.
func AlignUp(a, b int64) (int64, bool) { return Mul(DivUp(a, b), b) }

// Within reports whether [off, off+length) lies inside [0, limit).
func Within(off, length, limit int64) bool {
	return off >= 0 && length >= 0 && off <= limit && length <= limit-off
}

// IsPowerOfTwo reports whether v is 1, 2, 4, ...
func IsPowerOfTwo(v int64) bool { return v > 0 && v&(v-1) == 0 }

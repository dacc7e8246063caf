package ondisk

import (
	"encoding/binary"
	"errors"
	"math"
	"math/big"
	"testing"
)

func TestCursor(t *testing.T) {
	b := []byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	c := NewCursor(b, binary.BigEndian)
	if c.U8() != 1 || c.U16() != 0x0203 || c.U32() != 0x04050607 || c.U64() != 0x08090a0b0c0d0e0f || c.Left() != 1 || c.Err() != nil {
		t.Errorf("big-endian fields misread, at %d", c.Offset())
	}
	if c.U16() != 0 || !errors.Is(c.Err(), ErrShort) || c.U8() != 0 {
		t.Error("a read beyond the end went on")
	}
	c = NewCursor(b, binary.LittleEndian)
	c.Skip(2)
	if got := c.Bytes(2); string(got) != "\x03\x04" || c.U16() != 0x0605 {
		t.Error("little-endian fields misread")
	}
	if c.Bytes(-1) != nil || c.Err() == nil {
		t.Error("a negative length was accepted")
	}
}

func FuzzCursor(f *testing.F) {
	f.Add([]byte("abcdefgh"), []byte{1, 2, 4, 8, 200})
	f.Fuzz(func(t *testing.T, b, steps []byte) {
		c := NewCursor(b, binary.BigEndian)
		for _, s := range steps {
			before := c.Offset()
			c.Bytes(int(int8(s)))
			if c.Offset() < before || c.Offset() > len(b) || c.Left() != len(b)-c.Offset() {
				t.Fatalf("at %d of %d after a step of %d", c.Offset(), len(b), int8(s))
			}
		}
	})
}

// numbers are those at which arithmetic goes wrong.
var numbers = []int64{math.MinInt64, -1, 0, 1, 2, 511, 512, 513, 1 << 20, 1 << 31, 1 << 32, 1<<62 - 1, 1 << 62, math.MaxInt64 - 1, math.MaxInt64}

func TestArithmeticAgainstBigNumbers(t *testing.T) {
	limit := big.NewInt(math.MaxInt64)
	check := func(name string, a, b, got int64, ok bool, want *big.Int) {
		fits := a >= 0 && b >= 0 && want.Cmp(limit) <= 0
		if ok != fits || (ok && big.NewInt(got).Cmp(want) != 0) {
			t.Errorf("%s(%d, %d) = %d, %v; want %v, %v", name, a, b, got, ok, want, fits)
		}
	}
	for _, a := range numbers {
		for _, b := range numbers {
			x, y := big.NewInt(a), big.NewInt(b)
			sum, ok := Add(a, b)
			check("Add", a, b, sum, ok, new(big.Int).Add(x, y))
			product, ok := Mul(a, b)
			check("Mul", a, b, product, ok, new(big.Int).Mul(x, y))
			if a < 0 || b <= 0 {
				continue
			}
			up := new(big.Int).Div(new(big.Int).Add(x, new(big.Int).Sub(y, big.NewInt(1))), y)
			if got := DivUp(a, b); up.Cmp(big.NewInt(got)) != 0 {
				t.Errorf("DivUp(%d, %d) = %d, want %v", a, b, got, up)
			}
			aligned, ok := AlignUp(a, b)
			check("AlignUp", a, b, aligned, ok, new(big.Int).Mul(up, y))
			for _, limit := range numbers {
				end := new(big.Int).Add(x, y)
				want := limit >= 0 && end.Cmp(big.NewInt(limit)) <= 0
				if got := Within(a, b, limit); got != want {
					t.Errorf("Within(%d, %d, %d) = %v", a, b, limit, got)
				}
			}
		}
	}
	if _, ok := Int64(1 << 63); ok {
		t.Error("2^63 fits")
	}
	for _, n := range []int64{-2, 0, 3, 6} {
		if IsPowerOfTwo(n) {
			t.Errorf("%d is a power of two", n)
		}
	}
	if !IsPowerOfTwo(1) || !IsPowerOfTwo(1<<62) {
		t.Error("1 and 2^62 are no powers of two")
	}
}

func TestGUID(t *testing.T) {
	const text = "2dc27766-f623-4200-9d64-115e9bfd4a08"
	g := ParseGUID(text)
	if g.String() != text {
		t.Errorf("%s came back as %s", text, g)
	}
	if g[0] != 0x66 || g[3] != 0x2d || g[4] != 0x23 || g[6] != 0x00 || g[8] != 0x9d {
		t.Errorf("bytes % x", g)
	}
}

package inflate

import (
	"bytes"
	"compress/flate"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
)

// content makes bytes of many kinds: noise, text, runs and repeats at all
// distances.
func content(r *rand.Rand, n int) []byte {
	b := make([]byte, 0, n)
	for len(b) < n {
		switch r.IntN(5) {
		case 0:
			for range r.IntN(2000) {
				b = append(b, byte(r.Uint32()))
			}
		case 1:
			b = append(b, strings.Repeat("the quick brown fox ", 1+r.IntN(40))...)
		case 2:
			b = append(b, bytes.Repeat([]byte{byte(r.Uint32())}, r.IntN(3000))...)
		case 3:
			for range r.IntN(3000) {
				b = append(b, byte(r.ExpFloat64()*20))
			}
		case 4:
			if len(b) > 0 {
				from := r.IntN(len(b))
				b = append(b, b[from:min(len(b), from+r.IntN(400))]...)
			}
		}
	}
	return b[:n]
}

func compress(t testing.TB, level int, b []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w, err := flate.NewWriter(&buf, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func TestRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 400 {
		want := content(r, r.IntN(200000))
		for _, level := range []int{flate.HuffmanOnly, flate.NoCompression, 1, 6, 9} {
			src := compress(t, level, want)
			got := make([]byte, len(want))
			if err := Fill(got, src); err != nil || !bytes.Equal(got, want) {
				t.Fatalf("level %d, %d bytes: %v", level, len(want), err)
			}
			// With more room the end of the stream decides.
			room := make([]byte, len(want)+r.IntN(1000)+1)
			if n, err := Decode(room, src); err != nil || n != len(want) || !bytes.Equal(room[:n], want) {
				t.Fatalf("level %d: %d bytes of %d, %v", level, n, len(want), err)
			}
			if err := Fill(room, src); err == nil {
				t.Fatal("a stream that is too short filled the output")
			}
			// With less, and with other bytes behind it, too.
			if cut := r.IntN(len(want) + 1); cut > 0 {
				got := make([]byte, cut)
				if err := Fill(got, append(bytes.Clone(src), want[:r.IntN(100)%(len(want)+1)]...)); err != nil || !bytes.Equal(got, want[:cut]) {
					t.Fatalf("level %d, %d of %d bytes: %v", level, cut, len(want), err)
				}
			}
		}
	}
}

// same compares Fill with the standard library on any input.
func same(t *testing.T, src []byte, size int) {
	t.Helper()
	want := make([]byte, size)
	_, wantErr := io.ReadFull(flate.NewReader(bytes.NewReader(src)), want)
	got := make([]byte, size)
	err := Fill(got, src)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("%d bytes of % x: %v, the standard library says %v", size, clip(src), err, wantErr)
	}
	if err == nil && !bytes.Equal(got, want) {
		t.Fatalf("%d bytes of % x differ", size, clip(src))
	}
}

func clip(b []byte) []byte { return b[:min(len(b), 60)] }

// TestDamaged changes bits of streams.
func TestDamaged(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		want := content(r, 1+r.IntN(5000))
		src := compress(t, []int{flate.HuffmanOnly, 1, 6}[r.IntN(3)], want)
		for range 1 + r.IntN(3) {
			src[r.IntN(len(src))] ^= 1 << r.IntN(8)
		}
		if r.IntN(3) == 0 {
			src = src[:r.IntN(len(src)+1)]
		}
		same(t, src, len(want))
	}
}

// TestCodes tries codes at random, of which most are not valid.
func TestCodes(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 3))
	for range 20000 {
		src := make([]byte, 5+r.IntN(200))
		for i := range src {
			src[i] = byte(r.Uint32())
		}
		src[0] = src[0]&^7 | byte(r.IntN(3))<<1 | byte(r.IntN(2))
		same(t, src, 1+r.IntN(300))
	}
}

func FuzzFill(f *testing.F) {
	r := rand.New(rand.NewPCG(1, 4))
	for _, level := range []int{flate.HuffmanOnly, flate.NoCompression, 1, 9} {
		b := content(r, 3000)
		f.Add(compress(f, level, b), len(b))
	}
	f.Fuzz(func(t *testing.T, src []byte, size int) {
		if size <= 0 || size > 1<<17 {
			return
		}
		same(t, src, size)
	})
}

func BenchmarkFill(b *testing.B) {
	r := rand.New(rand.NewPCG(1, 5))
	want := content(r, 1<<16)
	src := compress(b, 6, want)
	dst := make([]byte, len(want))
	b.Run("inflate", func(b *testing.B) {
		b.SetBytes(1 << 16)
		for b.Loop() {
			if err := Fill(dst, src); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("standard", func(b *testing.B) {
		b.SetBytes(1 << 16)
		var in bytes.Reader
		in.Reset(src)
		fr := flate.NewReader(&in)
		for b.Loop() {
			in.Reset(src)
			if err := fr.(flate.Resetter).Reset(&in, nil); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(fr, dst); err != nil {
				b.Fatal(err)
			}
		}
	})
}

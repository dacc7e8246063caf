package copier

import (
	"context"
	"math/rand/v2"
	"testing"
)

// A target without metadata (raw, a fixed VHD) cannot say that it reads as
// zeros. Where its files are new it does, and no zeros are made.
func TestNewFilesNeedNoZeros(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	d := newDisk(t, r, 4<<20, 65536)
	f := newTarget(t, r, 4<<20, 512, 1)
	f.readsZero = false
	if _, err := Copy(context.Background(), d.source(), f.target(), Options{Workers: 2, Sparse: DefaultSparse}); err != nil {
		t.Fatal(err)
	}
	f.holds(d.content)
	for off, u := range f.units {
		if u.zero {
			t.Fatalf("zeros made at %#x", off)
		}
	}
}

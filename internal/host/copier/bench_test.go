package copier

import (
	"context"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk"
)

// benchSize is larger than a core's caches.
const benchSize = 128 << 20

func benchFile(b *testing.B) *Source {
	b.Helper()
	f, err := os.Create(filepath.Join(b.TempDir(), "raw"))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { f.Close() })
	chunk := make([]byte, 1<<20)
	fill(rand.New(rand.NewPCG(1, 1)), chunk)
	for off := int64(0); off < benchSize; off += 1 << 20 {
		if _, err := f.WriteAt(chunk, off); err != nil {
			b.Fatal(err)
		}
	}
	e := Extent{Length: benchSize, Kind: Data, File: f}
	return &Source{Size: benchSize, Map: func(_ context.Context, _, _ int64, yield func([]Extent) bool) error {
		yield([]Extent{e})
		return nil
	}}
}

// cpu reports user and system time, which says more than the clock on a busy
// machine.
func cpu(b *testing.B) func() {
	b.Helper()
	var before unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &before); err != nil {
		b.Fatal(err)
	}
	b.ResetTimer()
	return func() {
		b.StopTimer()
		var after unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &after); err != nil {
			b.Fatal(err)
		}
		used := after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano()
		b.ReportMetric(float64(used)/float64(b.N)/1e6, "cpu-ms/op")
	}
}

func BenchmarkCompare(b *testing.B) {
	x, y := benchFile(b), benchFile(b)
	b.SetBytes(benchSize)
	defer cpu(b)()
	for b.Loop() {
		if r, err := Compare(context.Background(), x, y, CompareOptions{}); err != nil || r.Verdict != Identical {
			b.Fatal(r, err)
		}
	}
}

func BenchmarkCopy(b *testing.B) {
	src := benchFile(b)
	f, err := os.Create(filepath.Join(b.TempDir(), "target"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	b.SetBytes(benchSize)
	defer cpu(b)()
	for b.Loop() {
		w := &countingWriter{info: sdk.WriteInfo{Unit: 65536, ReadsZero: true}}
		if _, err := Copy(context.Background(), src, &Target{Writer: w, Files: []*os.File{f}, Size: benchSize, Fresh: true}, Options{Sparse: DefaultSparse, NoClone: true}); err != nil {
			b.Fatal(err)
		}
	}
}

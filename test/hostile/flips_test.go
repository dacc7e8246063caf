//go:build linux

package hostile

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"testing"
	"time"

	"github.com/instar-img/instar/plugins/qcow2"
	"github.com/instar-img/instar/plugins/raw"
	vpc "github.com/instar-img/instar/plugins/vhd"
	"github.com/instar-img/instar/plugins/vhdx"
	"github.com/instar-img/instar/plugins/vmdk"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// allVariable has every bit flipped, not a sample of them; runsVariable says how
// many mutants of each image the built programs get.
const (
	allVariable  = "INSTAR_HOSTILE_ALL"
	runsVariable = "INSTAR_HOSTILE_N"
)

// seed makes the samples the same in every run.
const seed = 20250101

// metadataMost is how much of an image's beginning is flipped.
const metadataMost = 64 << 10

// sample is a valid image to be damaged.
type sample struct {
	name, format string
	new          func() sdk.Format
	bytes        []byte
}

// samples makes small images of all formats, with all that they can hold.
func samples(t *testing.T) []sample {
	t.Helper()
	dir := t.TempDir()
	disk := make([]byte, 1<<20)
	for _, at := range []int{0, 300 << 10, 1<<20 - 4096} {
		copy(disk[at:], bytes.Repeat([]byte(fmt.Sprint("data at ", at, " ")), 300))
	}
	copy(disk[510:], []byte{0x55, 0xaa})
	write(t, dir, "disk", disk)
	must := func(args ...string) {
		t.Helper()
		if r := (command{Argv: args, Dir: dir, CPU: 60}).start(t); r.Code != 0 {
			t.Fatalf("%s: %s", args, r.Stderr)
		}
	}
	var out []sample
	add := func(name, format string, new func() sdk.Format, more func(), args ...string) {
		t.Helper()
		must(append(append([]string{"convert", "-f", "raw", "-O", format}, args...), "disk", name)...)
		if more != nil {
			more()
		}
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, sample{name, format, new, b})
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	add("qcow2", "qcow2", qcow2.New, func() {
		formattest.Oracle(t, "qemu-img", "snapshot", "-c", "one", in("qcow2"))
		formattest.Oracle(t, "qemu-img", "bitmap", "--add", in("qcow2"), "dirty")
	}, "-o", "cluster_size=4k")
	add("qcow2-compressed", "qcow2", qcow2.New, nil, "-c", "-o", "cluster_size=4k")
	add("qcow2-zstd", "qcow2", qcow2.New, nil, "-c", "-o", "cluster_size=16k,compression_type=zstd,extended_l2=on")
	add("vmdk", "vmdk", vmdk.New, nil)
	add("vmdk-stream", "vmdk", vmdk.New, nil, "-o", "subformat=streamOptimized")
	add("vpc", "vpc", vpc.New, nil)
	add("vpc-fixed", "vpc", vpc.New, nil, "-o", "subformat=fixed")
	add("vhdx", "vhdx", vhdx.New, nil, "-o", "block_size=1M,log_size=1M")
	add("raw", "raw", raw.New, nil)
	return out
}

// allocated is how much memory was ever allocated, in bytes.
func allocated() uint64 {
	s := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64()
}

// mindful is a file whose reads must make sense: begin inside it, but for one that
// finds out where it ends.
type mindful struct {
	sdk.File
	size int64 // where reads must begin, at most
	bad  string
}

func (f *mindful) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off > f.size || off > math.MaxInt64-int64(len(p)) || len(p) > memoryMost {
		f.bad = fmt.Sprintf("read of %d bytes at %d", len(p), off)
	}
	return f.File.ReadAt(p, off)
}

// exercise does to an image all that reading verbs do, and returns what went
// wrong beyond an error.
func exercise(format sdk.Format, content []byte) (wrong string) {
	defer func() {
		if p := recover(); p != nil {
			wrong = fmt.Sprintf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	before := allocated()
	file := &mindful{File: formattest.ReadOnly(formattest.MemFile(content)), size: int64(len(content))}
	if format.Describe().Manifest.Name == "qcow2" {
		// Its tables may lie behind the end, and read as zeros there, as in qemu-img.
		file.size = math.MaxInt64
	}
	for _, check := range []bool{false, true} {
		img, err := format.Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}, Check: check, Name: "image"})
		if err != nil {
			continue
		}
		read(ctx, img, check)
		_ = img.Close() // nothing is done about it
	}
	switch used := allocated() - before; {
	case ctx.Err() != nil:
		return "it took a minute"
	case file.bad != "":
		return file.bad
	case used > memoryMost:
		return fmt.Sprintf("%d MiB were allocated", used>>20)
	}
	return ""
}

// read reads an opened image. Errors are what is expected.
func read(ctx context.Context, img sdk.Image, check bool) {
	info, err := img.Info(ctx)
	if err != nil {
		return
	}
	decoder, _ := sdk.As[sdk.Decoder](img)
	extents, decoded := 0, 0
	_ = img.Map(ctx, 0, info.VirtualSize, func(batch []sdk.Extent) bool {
		for _, e := range batch {
			if e.Kind == sdk.Encoded && decoder != nil && decoded < 3 && e.Length <= 4<<20 {
				decoded++
				_ = decoder.Decode(ctx, e, make([]byte, e.Length))
			}
		}
		extents += len(batch)
		return extents < 100_000
	})
	if c, ok := sdk.As[sdk.Checker](img); ok && check {
		_, _ = c.Check(ctx, sdk.CheckRequest{Message: func(string) {}})
	}
	if i, ok := sdk.As[sdk.Inspector](img); ok {
		_, _ = i.Inspect(ctx)
	}
}

// Case 28: every single-bit flip of the metadata, or a sample of them.
func TestFlips(t *testing.T) {
	for _, s := range samples(t) {
		t.Run(s.name, func(t *testing.T) {
			bits := min(len(s.bytes), metadataMost) * 8
			stride := 61 // an odd number, so that all bits of bytes are met
			if os.Getenv(allVariable) != "" {
				stride = 1
			}
			format := s.new()
			rng := rand.New(rand.NewPCG(seed, uint64(bits)))
			for at := rng.IntN(stride); at < bits; at += stride {
				s.bytes[at/8] ^= 1 << (at % 8)
				if wrong := exercise(format, s.bytes); wrong != "" {
					t.Errorf("bit %d of byte %#x: %s", at%8, at/8, wrong)
				}
				s.bytes[at/8] ^= 1 << (at % 8)
				if t.Failed() {
					return
				}
			}
		})
	}
}

// Case 27: every truncation, 512 bytes at a time, and what grows.
func TestTruncations(t *testing.T) {
	for _, s := range samples(t) {
		t.Run(s.name, func(t *testing.T) {
			format := s.new()
			for n := 0; n < len(s.bytes); n += 512 {
				// Of long files some lengths will do, where there is no metadata.
				behind := n > 128<<10 && len(s.bytes)-n > 64<<10 && (s.format != "vhdx" || n%mib > 16<<10)
				if behind && n%(512*17) != 0 && os.Getenv(allVariable) == "" {
					continue
				}
				if wrong := exercise(format, s.bytes[:n:n]); wrong != "" {
					t.Fatalf("cut to %d bytes: %s", n, wrong)
				}
			}
			for _, n := range []int{1, 511, 513} {
				if wrong := exercise(format, s.bytes[:min(n, len(s.bytes))]); wrong != "" {
					t.Fatalf("cut to %d bytes: %s", n, wrong)
				}
			}
		})
	}
}

// mutate damages an image in one of the ways that parsers go wrong by.
func mutate(rng *rand.Rand, content []byte) ([]byte, string) {
	b := bytes.Clone(content)
	at := rng.IntN(min(len(b), metadataMost))
	if rng.IntN(4) == 0 {
		at = len(b) - 1 - rng.IntN(min(len(b), 2048))
	}
	word := b[at&^7:]
	switch rng.IntN(5) {
	case 0, 1:
		b[at] ^= 1 << rng.IntN(8)
		return b, fmt.Sprintf("a bit of byte %#x", at)
	case 2:
		for i := range min(8, len(word)) {
			word[i] = 0xff
		}
		return b, fmt.Sprintf("ones at %#x", at&^7)
	case 3:
		clear(word[:min(8, len(word))])
		return b, fmt.Sprintf("zeros at %#x", at&^7)
	}
	n := rng.IntN(len(b))
	return b[:n], fmt.Sprintf("cut to %d", n)
}

// The built programs survive damaged images. TestVerdicts compares what they say.
func TestMutants(t *testing.T) {
	runs := 12
	if n, err := strconv.Atoi(os.Getenv(runsVariable)); err == nil {
		runs = n
	}
	for _, s := range samples(t) {
		t.Run(s.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, uint64(len(s.name))))
			dir, runtime := t.TempDir(), runtimeDir(t)
			for range runs {
				b, what := mutate(rng, s.bytes)
				write(t, dir, "image", b)
				for _, words := range [][]string{
					{"info", "-f", s.format, "image"}, {"check", "-f", s.format, "image"}, {"convert", "-f", s.format, "-O", "raw", "--timeout", "60s", "image", "out"},
				} {
					r := command{Argv: words, Dir: dir, Env: []string{"XDG_RUNTIME_DIR=" + runtime}}.run(t)
					if len(r.Crashed) > 0 {
						t.Errorf("%s: %s: a plugin died: %v\n%s", what, words, r.Crashed, clip(r.Stderr))
					}
					if words[0] != "check" && r.Code != 0 {
						r.oneLine(t)
						if _, err := os.Stat(filepath.Join(dir, "out")); err == nil {
							t.Errorf("%s: %s failed and left its output", what, words)
						}
					}
					os.Remove(filepath.Join(dir, "out"))
				}
				if t.Failed() {
					t.Fatalf("the mutant was: %s", what)
				}
			}
			noSocketDirs(t, runtime)
		})
	}
}

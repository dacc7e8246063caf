package vhd

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// session writes ascending random runs, some of them zeros, and does the same
// to model.
func session(t *testing.T, path string, model []byte, rng *rand.Rand) {
	t.Helper()
	ctx := context.Background()
	o := formattest.Open(t, New(), path, true)
	w := o.Image.(sdk.Writer)
	wi, err := w.BeginWrite(ctx, sdk.WriteRequest{})
	if err != nil {
		t.Fatal(err)
	}
	size := int64(len(model))
	for at := int64(0); ; {
		at += rng.Int64N(300<<10) / wi.Unit * wi.Unit
		if at >= size {
			break
		}
		n := min((1+rng.Int64N(40))*wi.Unit, size-at)
		run := []sdk.Run{{Offset: at, Length: n}}
		fill := byte(rng.IntN(4)) // 0: zeros
		copy(model[at:], bytes.Repeat([]byte{fill}, int(n)))
		if fill == 0 {
			if err := w.Zero(ctx, run); err != nil {
				t.Fatal(err)
			}
		} else {
			places, err := w.Place(ctx, run)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range places {
				if _, err := o.Files[0].File.WriteAt(bytes.Repeat([]byte{fill}, int(p.Length)), p.HostOffset); err != nil {
					t.Fatal(err)
				}
			}
		}
		at += n
	}
	if err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
}

// Several writers one after the other, over what is there, alternating with
// qemu: content is the model's and check is content.
func TestSessions(t *testing.T) {
	for _, opts := range []string{"", "block_size=64k", "block_size=128k,force_size=on", "subformat=fixed"} {
		t.Run(opts, func(t *testing.T) {
			dir := t.TempDir()
			rng := rand.New(rand.NewPCG(11, uint64(len(opts))))
			path := formattest.Create(t, New(), dir, "x.vhd", 7<<20, opts)
			model := make([]byte, formattest.Open(t, New(), path, false).Info.VirtualSize)
			for i := range 4 {
				session(t, path, model, rng)
				at := rng.Int64N(int64(len(model))-8192) / 512 * 512
				copy(model[at:], bytes.Repeat([]byte{9}, 8192))
				formattest.Oracle(t, "qemu-io", "-f", "vpc", "-c", fmt.Sprintf("write -P 9 %d 8192", at), path)
				if got := formattest.Open(t, New(), path, false).Read(0, int64(len(model))); !bytes.Equal(got, model) {
					t.Fatalf("session %d: content differs", i)
				}
				clean(t, path)
			}
			flat := filepath.Join(dir, "flat")
			if err := os.WriteFile(flat, model, 0o644); err != nil {
				t.Fatal(err)
			}
			formattest.Oracle(t, "qemu-img", "compare", "-f", "vpc", "-F", "raw", path, flat)

			if opts == "subformat=fixed" {
				return
			}
			child := formattest.Create(t, New(), dir, "child.vhd", formattest.NoSize, "block_size=64k,backing_file=x.vhd")
			base := formattest.Open(t, New(), path, false)
			for i := range 4 {
				session(t, child, model, rng)
				if got := overlaid(t, formattest.Open(t, New(), child, false), base); !bytes.Equal(got, model) {
					t.Fatalf("child, session %d: content differs", i)
				}
				clean(t, child)
			}
		})
	}
}

// matches applies a probe as the core does.
func matches(p sdk.Probe, b []byte) bool {
	want, err := hex.DecodeString(p.Bytes)
	if err != nil {
		return false
	}
	at := p.Offset
	if at < 0 {
		at += int64(len(b))
	}
	return at >= 0 && at+int64(len(want)) <= int64(len(b)) && bytes.Equal(b[at:at+int64(len(want))], want)
}

// Only disks that begin with a footer are found; the footer at the end makes
// any other file ambiguous (case 9 of the hostile images).
func TestProbes(t *testing.T) {
	dir := t.TempDir()
	dynamic := read(t, formattest.Create(t, New(), dir, "dynamic", 1<<20, ""))
	fixed := read(t, formattest.Create(t, New(), dir, "fixed", 1<<20, "subformat=fixed"))
	qcow2 := append([]byte("QFI\xfb\x00\x00\x00\x03"), fixed[8:]...)
	for _, tt := range []struct {
		name           string
		b              []byte
		best           int
		atStart, atEnd bool
	}{
		{"dynamic", dynamic, 100, true, true},
		{"fixed", fixed, 0, false, true},
		{"fixed, short footer", fixed[:len(fixed)-1], 0, false, true},
		{"qcow2 and fixed", qcow2, 0, false, true},
		{"zeros", make([]byte, 4096), -1, false, false},
		{"empty", nil, -1, false, false},
	} {
		best, start, end := -1, false, false
		for _, p := range New().Describe().Manifest.Probes {
			if matches(p, tt.b) {
				best = max(best, p.Score)
				start = start || p.Offset == 0
				end = end || p.Offset < 0
			}
		}
		if best != tt.best || start != tt.atStart || end != tt.atEnd {
			t.Errorf("%s: score %d, start %v, end %v", tt.name, best, start, end)
		}
	}
}

// The map of a fixed disk is one extent: whether its holes are data is what
// qemu-img says, yes.
func TestFixedMap(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 1<<20, "subformat=fixed,force_size=on")
	want := sdk.Extent{Length: 1 << 20, Kind: sdk.Data, Sparse: true}
	if got := formattest.Open(t, New(), path, false).Map(); len(got) != 1 || got[0] != want {
		t.Errorf("map %+v, want %+v", got, want)
	}
}

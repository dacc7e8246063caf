package raw

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
	"github.com/instar-img/instar/sdk/option"
)

func TestConformance(t *testing.T) {
	formattest.Run(t, New, formattest.Config{
		Options: []string{"", "preallocation=falloc", "nocow=on,extent_size_hint=1M"},
	})
}

func TestCreateRoundsUpToSectors(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 512, 513, 1<<20 - 1, 1 << 20, 2040 << 30, 1 << 43} {
		ours := formattest.Create(t, New(), t.TempDir(), "x", size, "")
		theirs := filepath.Join(t.TempDir(), "x")
		formattest.Oracle(t, "qemu-img", "create", "-f", "raw", theirs, fmt.Sprint(size))
		a, err := os.Stat(ours)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.Stat(theirs)
		if err != nil {
			t.Fatal(err)
		}
		if a.Size() != b.Size() {
			t.Errorf("size %d: file of %d bytes, qemu-img makes %d", size, a.Size(), b.Size())
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		req  sdk.CreateRequest
		want string
	}{
		{"too big", sdk.CreateRequest{Size: math.MaxInt64}, "The image size is too large for file format 'raw'"},
		{"negative", sdk.CreateRequest{Size: -1}, "size -1: invalid argument"},
		{"backing", sdk.CreateRequest{Size: 1, BackingName: "b"}, "Backing file not supported for file format 'raw'"},
		{"compressed", sdk.CreateRequest{Size: 1, Compressed: true}, "Compression not supported for this file format"},
	} {
		if _, err := New().(sdk.Creator).PlanCreate(context.Background(), tt.req); err == nil || err.Error() != tt.want {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	_, err := formattest.TryCreate(t, New(), t.TempDir(), "x", 1, "preallocation=metadata")
	var oe *option.Error
	if !errors.As(err, &oe) || err.Error() != "Unsupported preallocation mode: metadata" {
		t.Errorf("preallocation=metadata: %v", err)
	}
}

func TestPlanFollowsPreallocation(t *testing.T) {
	for mode, want := range map[string]sdk.Preallocation{
		"off": sdk.PreallocOff, "falloc": sdk.PreallocFalloc, "full": sdk.PreallocFull,
	} {
		plan, err := formattest.TryPlan(t, New(), t.TempDir(), "x", 1000, "preallocation="+mode, nil)
		if err != nil {
			t.Fatal(err)
		}
		file := plan.Info().Files[0]
		if file.Preallocation != want || file.Length != 1024 {
			t.Errorf("%s: %+v", mode, file)
		}
		res, err := plan.(sdk.Measurer).Measure(context.Background(), sdk.MeasureRequest{AllocatedUnits: 1})
		if err != nil || res != (sdk.MeasureResult{Required: 1024, FullyAllocated: 1024, Bitmaps: -1}) {
			t.Errorf("%s: measure %+v, %v", mode, res, err)
		}
	}
}

// A file that ends inside a sector reads as qemu-img reads it.
func TestPartialSector(t *testing.T) {
	content := bytes.Repeat([]byte{0xa5}, 1000)
	path := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	o := formattest.Open(t, New(), path, false)
	var theirs []struct {
		Start, Length int64
		Zero, Data    bool
		Offset        int64
	}
	if err := json.Unmarshal([]byte(formattest.Oracle(t, "qemu-img", "map", "-f", "raw", "--output=json", path)), &theirs); err != nil {
		t.Fatal(err)
	}
	ours := o.Map()
	if len(ours) != len(theirs) {
		t.Fatalf("map %+v, qemu-img's %+v", ours, theirs)
	}
	for i, e := range ours {
		w := theirs[i]
		if e.Offset != w.Start || e.Length != w.Length || e.HostOffset != w.Offset || (e.Kind == sdk.Zero) != w.Zero {
			t.Errorf("extent %d: %+v, qemu-img's %+v", i, e, w)
		}
	}
	if got := o.Read(0, 1024); !bytes.Equal(got, append(content, make([]byte, 24)...)) {
		t.Error("content differs")
	}
}

func TestZeroOverwritesOldContent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	old := bytes.Repeat([]byte{1}, 3<<20)
	if err := os.WriteFile(path, old, 0o644); err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	o := formattest.Open(t, New(), path, true)
	w := o.Image.(sdk.Writer)
	wi, err := w.BeginWrite(ctx, sdk.WriteRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if wi.ReadsZero {
		t.Error("a file with content was said to read as zeros")
	}
	if err := w.Zero(ctx, []sdk.Run{{Offset: 512, Length: 2 << 20}}); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	want := bytes.Clone(old)
	clear(want[512 : 512+2<<20])
	if got := o.Read(0, int64(len(want))); !bytes.Equal(got, want) {
		t.Error("content differs")
	}
}

func TestWriteNeedsReadWrite(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 1<<20, "")
	o := formattest.Open(t, New(), path, false)
	if _, err := o.Image.(sdk.Writer).BeginWrite(context.Background(), sdk.WriteRequest{}); !errors.Is(err, sdk.ErrReadOnly) {
		t.Errorf("BeginWrite of an image opened for reading: %v", err)
	}
	if _, err := o.Image.(sdk.Writer).Place(context.Background(), []sdk.Run{{Offset: 1 << 20, Length: 512}}); !errors.Is(err, sdk.ErrInvalid) {
		t.Errorf("Place beyond the disk: %v", err)
	}
}

// What bears another format's mark is raw only where somebody says so.
func TestOpenGuessed(t *testing.T) {
	for content, foreign := range map[string]bool{
		"QED\x00" + strings.Repeat("x", 1020):                                        true,
		strings.Repeat("\x00", 0x40) + "\x7f\x10\xda\xbe" + strings.Repeat("x", 500): true,
		strings.Repeat("x", 1024) + "koly" + strings.Repeat("\x00", 508):             true,
		strings.Repeat("x", 1024):                                                    false,
		"x":                                                                          false,
		"":                                                                           false,
	} {
		for _, guessed := range []bool{false, true} {
			file := formattest.MemFile([]byte(content))
			_, err := New().Open(context.Background(), sdk.OpenRequest{Guessed: guessed, Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}})
			if want := foreign && guessed; errors.Is(err, sdk.ErrUnsupported) != want || !want && err != nil {
				t.Errorf("%.8q, guessed %t: %v", content, guessed, err)
			}
		}
	}
}

// TestPart: whatever the options say, the disk lies in the file.
func TestPart(t *testing.T) {
	for _, c := range []struct {
		length             int64
		offset, size       string // empty: not given
		base, stored, disk int64
		fails              string
	}{
		{length: 4096, base: 0, stored: 4096, disk: 4096},
		{length: 4096, offset: "1k", base: 1024, stored: 3072, disk: 3072},
		{length: 4096, offset: "1k", size: "512", base: 1024, stored: 512, disk: 512},
		{length: 4096, offset: "4k", base: 4096},
		{length: 4096, size: "0"},
		{length: 1000, offset: "100", base: 100, stored: 900, disk: 1024},
		{length: 1000, offset: "1001", base: 1001, disk: 512}, // to the end of the last sector
		{length: 4096, offset: "4097", fails: "Offset (4097) cannot be greater"},
		{length: 4096, offset: "18446744073709551615", fails: "cannot be greater"},
		{length: 4096, offset: "512", size: "4096", fails: "The sum of offset (512) and size (4096)"},
		{length: 4096, offset: "512", size: "18446744073709551615", fails: "The sum of offset"},
		{length: 4096, size: "100", fails: "not multiple of 512"},
		{length: 4096, size: "x", fails: "Parameter 'size' expects"},
		{length: 4096, offset: "-1", fails: "Parameter 'offset' expects"},
	} {
		options := map[string]string{}
		for key, value := range map[string]string{keyOffset: c.offset, keySize: c.size} {
			if value != "" {
				options[key] = value
			}
		}
		img := &image{}
		err := img.choosePart(c.length, options)
		switch {
		case c.fails != "":
			if err == nil || !strings.Contains(err.Error(), c.fails) {
				t.Errorf("%d %v: %v, want %q", c.length, options, err, c.fails)
			}
		case err != nil || img.base != c.base || img.length != c.stored || img.size != c.disk:
			t.Errorf("%d %v: %+v, %v", c.length, options, img, err)
		}
	}
}

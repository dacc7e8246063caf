package vmdk

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

var subformats = []string{monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized}

// sizes are those that every subformat is created with, but for 0, which makes
// images that nobody opens.
var sizes = []int64{1, 511, 512, 1<<20 - 1, 1<<20 + 1, 2<<30 - 512, 2<<30 + 512, 5 << 30}

func TestConformance(t *testing.T) {
	cfg := formattest.Config{Sizes: sizes, CompressedOptions: []string{"subformat=streamOptimized"}}
	for _, s := range subformats {
		cfg.Options = append(cfg.Options, "subformat="+s)
	}
	cfg.Options = append(cfg.Options, "zeroed_grain=on", "grain_size=8k", "subformat=twoGbMaxExtentSparse,grain_size=1M")
	formattest.Run(t, New, cfg)
}

var cidLine = regexp.MustCompile(`(?m)^CID=[0-9a-f]+$`)

// sameBytes compares our files with qemu-img's but for the random content id.
func sameBytes(t *testing.T, ours, theirs string) {
	t.Helper()
	list := func(dir string) (names []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	a, b := list(ours), list(theirs)
	if d := cmp.Diff(b, a); d != "" {
		t.Fatalf("files (-qemu-img +ours):\n%s", d)
	}
	for _, name := range a {
		x, y := stat(t, filepath.Join(ours, name)), stat(t, filepath.Join(theirs, name))
		x.head, y.head = maskCID(x.head), maskCID(y.head)
		if x.size-x.cid != y.size-y.cid {
			t.Errorf("%s: %d bytes, qemu-img's has %d", name, x.size, y.size)
		}
		if !bytes.Equal(x.head, y.head) {
			t.Errorf("%s differs:\n%q\n%q", name, bytes.Trim(x.head, "\x00"), bytes.Trim(y.head, "\x00"))
		}
	}
}

type fileHead struct {
	size int64
	cid  int64 // length of the CID in a bare descriptor
	head []byte
}

// stat returns a file's length and its content, of files longer than 4 MiB the
// first 4 MiB.
func stat(t testing.TB, path string) fileHead {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	h := fileHead{size: fi.Size(), head: make([]byte, min(fi.Size(), 4<<20))}
	if _, err := f.ReadAt(h.head, 0); err != nil {
		t.Fatal(err)
	}
	if bytes.HasPrefix(h.head, []byte("# Disk")) {
		h.cid = int64(len(cidLine.Find(h.head)))
	}
	return h
}

// maskCID blanks the CID, which is not padded, and what padding its length
// moves.
func maskCID(b []byte) []byte {
	at := cidLine.FindIndex(b)
	if at == nil {
		return b
	}
	end := bytes.IndexByte(b[at[0]:], 0)
	if end < 0 {
		return cidLine.ReplaceAll(b, []byte("CID="))
	}
	end += at[0]
	out := cidLine.ReplaceAll(b[:end:end], []byte("CID="))
	out = append(out, make([]byte, len(b[:end])-len(out))...)
	return append(out, b[end:]...)
}

// qemuImg runs qemu-img in dir and reports whether it succeeded, and what it
// said.
func qemuImg(t testing.TB, dir string, args ...string) (string, bool) {
	t.Helper()
	old, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chdir(dir); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.Chdir(old); err != nil {
			t.Fatal(err)
		}
	}()
	stdout, stderr, code := formattest.TryOracle(t, "qemu-img", args...)
	return stdout + stderr, code == 0
}

func TestCreateEqualsQEMU(t *testing.T) {
	for _, sub := range subformats {
		for _, size := range append([]int64{0, 2040 << 30}, sizes...) {
			if size > 8<<30 && strings.HasPrefix(sub, "twoGb") {
				size = 4<<30 + 12345
			}
			for _, opts := range []string{
				"", "adapter_type=lsilogic,toolsversion=99", "adapter_type=legacyESX,compat6=on",
				"hwversion=14,adapter_type=buslogic", "zeroed_grain=on", "hwversion=,toolsversion=",
			} {
				if opts != "" && size != 1 && size != 5<<30 {
					continue
				}
				o := "subformat=" + sub
				if opts != "" {
					o += "," + opts
				}
				t.Run(fmt.Sprintf("%s/%d", o, size), func(t *testing.T) {
					ours, theirs := t.TempDir(), t.TempDir()
					text, ok := qemuImg(t, theirs, "create", "-f", "vmdk", "-o", o, "disk.a.vmdk", fmt.Sprint(size))
					_, err := formattest.TryCreate(t, New(), ours, "disk.a.vmdk", size, o)
					if ok != (err == nil) {
						t.Fatalf("ours: %v; qemu-img: %s", err, text)
					}
					if err != nil {
						if !strings.HasSuffix(strings.TrimSpace(text), ": "+err.Error()) {
							t.Errorf("%q, qemu-img says %q", err, text)
						}
						return
					}
					sameBytes(t, ours, theirs)
				})
			}
		}
	}
}

func TestCreateOverlayEqualsQEMU(t *testing.T) {
	for _, sub := range subformats {
		ours := t.TempDir()
		formattest.Create(t, New(), ours, "base.vmdk", 3<<20, "")
		theirs := t.TempDir()
		base, err := os.ReadFile(filepath.Join(ours, "base.vmdk"))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(theirs, "base.vmdk"), base, 0o644); err != nil {
			t.Fatal(err)
		}
		o := "subformat=" + sub + ",backing_file=base.vmdk,backing_fmt=vmdk"
		text, ok := qemuImg(t, theirs, "create", "-f", "vmdk", "-o", o, "top.vmdk")
		_, err = formattest.TryCreate(t, New(), ours, "top.vmdk", formattest.NoSize, o)
		if ok != (err == nil) {
			t.Fatalf("%s: ours: %v; qemu-img: %s", sub, err, text)
		}
		if err != nil {
			if !strings.HasSuffix(strings.TrimSpace(text), ": "+err.Error()) {
				t.Errorf("%s: %q, qemu-img says %q", sub, err, text)
			}
			if err := os.RemoveAll(filepath.Join(theirs, "top.vmdk")); err != nil {
				t.Fatal(err)
			}
			continue
		}
		sameBytes(t, ours, theirs)
		formattest.Oracle(t, "qemu-img", "compare", filepath.Join(ours, "base.vmdk"), filepath.Join(ours, "top.vmdk"))
	}
}

func TestCreateRefuses(t *testing.T) {
	backing := &sdk.BackingInfo{Format: "vmdk", VirtualSize: 1 << 20, Identity: map[string]string{cidKey: "12345678"}}
	for _, tt := range []struct {
		opts  string
		edit  func(*sdk.CreateRequest)
		want  string
		class error
	}{
		{opts: "compat6=on,hwversion=7", want: "compat6 cannot be enabled with hwversion set"},
		{opts: "subformat=monolithicFlat,zeroed_grain=on", want: "Flat image can't enable zeroed grain", class: sdk.ErrUnsupported},
		{opts: "subformat=monolithicFlat,grain_size=64k", want: "Flat image can't have a grain size", class: sdk.ErrUnsupported},
		{opts: "backing_fmt=raw", edit: func(r *sdk.CreateRequest) { r.BackingName, r.Backing = "b", backing },
			want: "backing_file must be a vmdk image"},
		{edit: func(r *sdk.CreateRequest) { r.BackingName = "b" },
			want: "The backing file 'b' must be readable, its content ID is needed"},
		{edit: func(r *sdk.CreateRequest) { r.BackingName, r.Backing = "b", &sdk.BackingInfo{Format: "qcow2"} },
			want: "Invalid backing file format: qcow2. Must be vmdk"},
		{edit: func(r *sdk.CreateRequest) { r.BackingName, r.Backing = "b", &sdk.BackingInfo{Format: "vmdk"} },
			want: "Failed to read parent CID"},
		{edit: func(r *sdk.CreateRequest) { r.BackingName, r.Backing = "b\"\nCID=1", backing },
			want: `"b\"\nCID=1" cannot be stored in a VMDK descriptor: it holds a quote or a line end`},
		{edit: func(r *sdk.CreateRequest) { r.BackingName, r.Backing = strings.Repeat("b", 12000), backing },
			want: "The VMDK descriptor would take 12350 bytes, at most 10240 fit", class: sdk.ErrTooBig},
		{opts: "toolsversion=a\nRW 1 FLAT \"x\" 0", want: `"a\nRW 1 FLAT \"x\" 0" cannot be stored in a VMDK descriptor: it holds a quote or a line end`},
		{opts: "subformat=monolithicFlat", edit: func(r *sdk.CreateRequest) { r.Name = "a\"b" },
			want: `"a\"b" cannot be stored in a VMDK descriptor: it holds a quote or a line end`},
		{edit: func(r *sdk.CreateRequest) { r.Size = math.MaxInt64 },
			want: "Image size of 9223372036854775807 bytes is too big for a VMDK", class: sdk.ErrTooBig},
		{edit: func(r *sdk.CreateRequest) { r.Size = 2 << 50 },
			want: "Image size of 2251799813685248 bytes is too big for a sparse VMDK with grains of 65536 bytes", class: sdk.ErrTooBig},
		{opts: "subformat=twoGbMaxExtentFlat", edit: func(r *sdk.CreateRequest) { r.Size = 1 << 60 },
			want: "Image size of 1152921504606846976 bytes is too big for files of 2 GiB", class: sdk.ErrTooBig},
	} {
		if tt.class == nil {
			tt.class = sdk.ErrInvalid
		}
		_, err := formattest.TryPlan(t, New(), t.TempDir(), "x", 1<<20, tt.opts, func(r *sdk.CreateRequest) {
			r.Reproducible = true // a content id of fixed length
			if tt.edit != nil {
				tt.edit(r)
			}
		})
		if err == nil || err.Error() != tt.want || !errors.Is(err, tt.class) {
			t.Errorf("%s: %v, want %q (%v)", tt.opts, err, tt.want, tt.class)
		}
	}
}

// A name that would break the descriptor's lines is never stored.
func TestCreateOddNames(t *testing.T) {
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "a\"\nCID=0\nb", 1<<20, "")
	o := formattest.Open(t, New(), path, false)
	if o.Info.Identity[cidKey] == "00000000" {
		t.Error("the file's name changed the CID")
	}
	formattest.Oracle(t, "qemu-img", "info", path)
	for name, want := range map[string]string{"noext": "noext-flat", ".vm": "-flat.vm", "a.b.c": "a.b-flat.c"} {
		dir := t.TempDir()
		formattest.Create(t, New(), dir, name, 1<<20, "subformat=monolithicFlat")
		if _, err := os.Stat(filepath.Join(dir, want)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestReproducible(t *testing.T) {
	var first []byte
	for range 2 {
		dir := t.TempDir()
		path, err := formattest.CreateAs(t, New(), dir, "x", 1<<20, "", func(r *sdk.CreateRequest) { r.Reproducible, r.Time = true, 1 })
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if first != nil && !bytes.Equal(first, b) {
			t.Error("two reproducible images differ")
		}
		first = b
	}
}

// infoJSON is what qemu-img info prints of an image.
type infoJSON struct {
	VirtualSize int64  `json:"virtual-size"`
	ClusterSize int64  `json:"cluster-size"`
	Backing     string `json:"backing-filename"`
	Specific    struct {
		Type string         `json:"type"`
		Data map[string]any `json:"data"`
	} `json:"format-specific"`
}

// sameInfo compares Info with what qemu-img info prints.
func sameInfo(t *testing.T, o *formattest.Opened, path string) {
	t.Helper()
	var want infoJSON
	if err := json.Unmarshal([]byte(formattest.Oracle(t, "qemu-img", "info", "--output=json", path)), &want); err != nil {
		t.Fatal(err)
	}
	got := infoJSON{VirtualSize: o.Info.VirtualSize, ClusterSize: o.Info.AllocationUnit}
	for _, r := range o.Info.References {
		if r.Kind == sdk.RefBacking {
			got.Backing = r.Name
		}
	}
	names := map[string]string{sdk.RoleMain: path}
	for _, r := range o.Info.References {
		if r.Kind == sdk.RefExtent {
			names[r.Role] = filepath.Join(filepath.Dir(path), r.Name)
		}
	}
	got.Specific.Type = o.Info.SpecificType
	got.Specific.Data = plainFacts(o.Info.Specific, names)
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("info (-qemu-img +ours):\n%s", d)
	}
}

func plainFacts(facts []sdk.Fact, names map[string]string) map[string]any {
	m := make(map[string]any)
	for _, f := range facts {
		m[f.Name] = plainFact(f, names)
	}
	return m
}

func plainFact(f sdk.Fact, names map[string]string) any {
	switch {
	case f.Bool != nil:
		return *f.Bool
	case f.Int != nil:
		return float64(*f.Int)
	case f.Uint != nil:
		return float64(*f.Uint)
	case f.String != nil:
		return *f.String
	case f.IsObject:
		return plainFacts(f.Object, names)
	case f.IsList:
		var list []any
		for _, x := range f.List {
			list = append(list, plainFact(x, names))
		}
		return list
	}
	return names[f.FileRole]
}

func TestInfoEqualsQEMU(t *testing.T) {
	for _, sub := range subformats {
		for _, size := range []int64{512, 5<<30 + 512} {
			dir := t.TempDir()
			path := filepath.Join(dir, "x.vmdk")
			formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat="+sub, path, fmt.Sprint(size))
			sameInfo(t, formattest.Open(t, New(), path, false), path)
			path = formattest.Create(t, New(), dir, "y.vmdk", size, "subformat="+sub)
			sameInfo(t, formattest.Open(t, New(), path, false), path)
			if out := formattest.Oracle(t, "vmdkinfo", path); !strings.Contains(out, "Disk type") {
				t.Errorf("vmdkinfo: %s", out)
			}
			formattest.Oracle(t, "qemu-img", "check", path)
		}
	}
}

func TestInfoOfOverlay(t *testing.T) {
	dir := t.TempDir()
	formattest.Create(t, New(), dir, "base.vmdk", 3<<20, "")
	path := formattest.Create(t, New(), dir, "top.vmdk", 4<<20, "backing_file=base.vmdk")
	o := formattest.Open(t, New(), path, false)
	sameInfo(t, o, path)
	base := formattest.Open(t, New(), filepath.Join(dir, "base.vmdk"), false)
	ref := o.Info.References[0]
	if ref.Kind != sdk.RefBacking || ref.IdentityKey != cidKey || ref.Identity != base.Info.Identity[cidKey] {
		t.Errorf("reference %+v, base %v", ref, base.Info.Identity)
	}
}

// An image of size 0 can be created and, as with qemu-img, not be opened.
func TestSizeZero(t *testing.T) {
	for _, sub := range subformats {
		path := formattest.Create(t, New(), t.TempDir(), "x.vmdk", 0, "subformat="+sub)
		if _, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{}); err == nil {
			t.Errorf("%s: opened", sub)
		}
	}
}
func TestMeasureSparse(t *testing.T) {
	for _, opts := range []string{"", "subformat=twoGbMaxExtentSparse", "subformat=monolithicFlat", "grain_size=8k"} {
		dir := t.TempDir()
		plan, err := formattest.TryPlan(t, New(), dir, "x.vmdk", 3<<30, opts, nil)
		if err != nil {
			t.Fatal(err)
		}
		unit := max(plan.Info().AllocationUnit, 512)
		res, err := plan.(sdk.Measurer).Measure(context.Background(), sdk.MeasureRequest{AllocatedUnits: 3})
		if err != nil {
			t.Fatal(err)
		}
		path := formattest.Create(t, New(), dir, "x.vmdk", 3<<30, opts)
		full := bytes.Repeat([]byte{1}, int(unit))
		formattest.Write(t, New(), path, map[int64][]byte{0: full, 1 << 30: full, 5 << 29: full}, false)
		if got := totalSize(t, dir); got != res.Required {
			t.Errorf("%s: measured %d, files have %d", opts, res.Required, got)
		}
		if want := res.Required + (3<<30/unit-3)*unit; opts != "subformat=monolithicFlat" && res.FullyAllocated != want {
			t.Errorf("%s: fully allocated %d, want %d", opts, res.FullyAllocated, want)
		}
	}
}

func totalSize(t *testing.T, dir string) (n int64) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		n += fi.Size()
	}
	return n
}

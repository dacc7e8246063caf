package vhd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// overlaid returns what a guest sees of child over its parents.
func overlaid(t *testing.T, layers ...*formattest.Opened) []byte {
	t.Helper()
	size := layers[0].Info.VirtualSize
	out := make([]byte, size)
	for i := len(layers) - 1; i >= 0; i-- {
		for _, e := range layers[i].Map() {
			if e.Kind != sdk.Absent {
				copy(out[e.Offset:], layers[i].Read(e.Offset, e.Length))
			}
		}
	}
	return out
}

func TestDifferencing(t *testing.T) {
	for _, opts := range []string{"", "block_size=64k"} {
		t.Run(opts, func(t *testing.T) {
			dir := t.TempDir()
			base := formattest.Create(t, New(), dir, "base.vhd", 10<<20, "")
			size := formattest.Open(t, New(), base, false).Info.VirtualSize
			formattest.Write(t, New(), base, map[int64][]byte{0: bytes.Repeat([]byte{1}, 5<<20)}, false)

			if opts != "" {
				opts += ","
			}
			mid := formattest.Create(t, New(), dir, "mid.vhd", formattest.NoSize, opts+"backing_file=base.vhd,backing_fmt=vpc")
			formattest.Write(t, New(), mid, map[int64][]byte{
				1<<20 + 4096:  bytes.Repeat([]byte{2}, 4096),
				4<<20 + 4096:  bytes.Repeat([]byte{3}, 2<<20),
				size - 4096*2: bytes.Repeat([]byte{4}, 4096*2),
			}, false)
			top := formattest.Create(t, New(), dir, "top.vhd", 10<<20, "backing_file=./mid.vhd")
			// Written in two goes, into a block that is there already.
			formattest.Write(t, New(), top, map[int64][]byte{1 << 20: bytes.Repeat([]byte{5}, 8192)}, false)
			formattest.Write(t, New(), top, map[int64][]byte{1<<20 + 16384: bytes.Repeat([]byte{6}, 4096)}, false)

			want := make([]byte, size)
			put := func(off int64, c byte, n int) { copy(want[off:], bytes.Repeat([]byte{c}, n)) }
			put(0, 1, 5<<20)
			put(1<<20+4096, 2, 4096)
			put(4<<20+4096, 3, 2<<20)
			// Rounded out to whole units, as the core would have filled them.
			tail := (size - 4096*2) / writeUnit * writeUnit
			clear(want[tail:])
			put(size-4096*2, 4, 4096*2)
			put(1<<20, 5, 8192)
			put(1<<20+16384, 6, 4096)

			b, m, o := formattest.Open(t, New(), base, false), formattest.Open(t, New(), mid, false), formattest.Open(t, New(), top, false)
			if got := overlaid(t, o, m, b); !bytes.Equal(got, want) {
				t.Error("content through the chain differs")
			}
			for _, path := range []string{base, mid, top} {
				clean(t, path)
			}

			for _, x := range []struct {
				o      *formattest.Opened
				parent *formattest.Opened
				name   string
			}{{m, b, "base.vhd"}, {o, m, "./mid.vhd"}} {
				if len(x.o.Info.References) != 1 {
					t.Fatalf("references %+v", x.o.Info.References)
				}
				ref := x.o.Info.References[0]
				if ref.Kind != sdk.RefBacking || ref.Name != x.name || ref.Format != "vpc" || !ref.Required {
					t.Errorf("reference %+v, want %s", ref, x.name)
				}
				if ref.Identity == "" || x.parent.Info.Identity[ref.IdentityKey] != ref.Identity {
					t.Errorf("reference wants %s=%s, the parent has %v", ref.IdentityKey, ref.Identity, x.parent.Info.Identity)
				}
			}

			// libvhdi and 7-Zip, which look for the parent beside the child.
			out := formattest.Oracle(t, "vhdiinfo", top)
			for _, want := range []string{"Differential", o.Info.References[0].Identity, "mid.vhd"} {
				if !strings.Contains(out, want) {
					t.Errorf("vhdiinfo does not show %s:\n%s", want, out)
				}
			}
			formattest.Oracle(t, "7z", "x", "-y", "-tvhd", "-o"+filepath.Join(dir, "out"), top)
			files, err := os.ReadDir(filepath.Join(dir, "out"))
			if err != nil || len(files) != 1 {
				t.Fatalf("7z: %v, %v", files, err)
			}
			if !bytes.Equal(read(t, filepath.Join(dir, "out", files[0].Name())), want) {
				t.Error("7z reads something else through the chain")
			}
		})
	}
}

func TestDifferencingZero(t *testing.T) {
	dir := t.TempDir()
	base := formattest.Create(t, New(), dir, "base.vhd", 6<<20, "force_size=on")
	formattest.Write(t, New(), base, map[int64][]byte{0: bytes.Repeat([]byte{1}, 6<<20)}, false)
	child := formattest.Create(t, New(), dir, "child.vhd", formattest.NoSize, "backing_file=base.vhd")
	ctx := context.Background()
	o := formattest.Open(t, New(), child, true)
	w := o.Image.(sdk.Writer)
	if wi, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil || wi.ReadsZero {
		t.Fatalf("begin: %+v, %v", wi, err)
	}
	if err := w.Zero(ctx, []sdk.Run{{Offset: 1 << 20, Length: 2 << 20}}); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{1}, 6<<20)
	clear(want[1<<20 : 3<<20])
	if got := overlaid(t, o, formattest.Open(t, New(), base, false)); !bytes.Equal(got, want) {
		t.Error("content differs")
	}
	clean(t, child)
}

// A child whose parent's size is no geometry's keeps that size.
func TestDifferencingSizes(t *testing.T) {
	dir := t.TempDir()
	formattest.Create(t, New(), dir, "odd.vhd", 5<<20, "force_size=on")
	child := formattest.Create(t, New(), dir, "child.vhd", formattest.NoSize, "backing_file=odd.vhd")
	if got := formattest.Open(t, New(), child, false).Info.VirtualSize; got != 5<<20 {
		t.Errorf("virtual size %d", got)
	}
	for _, tt := range []struct {
		size int64
		opts string
		want string
	}{
		{6 << 20, "backing_file=odd.vhd", "a differencing disk is as large as its parent, 5242880 bytes"},
		{1 << 20, "backing_file=odd.vhd", "a differencing disk is as large as its parent, 5242880 bytes"},
		{5 << 20, "backing_file=odd.vhd,subformat=fixed", "a differencing disk is dynamic"},
	} {
		_, err := formattest.TryCreate(t, New(), dir, "x", tt.size, tt.opts)
		if !errors.Is(err, sdk.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("size %d, %q: %v, want %q", tt.size, tt.opts, err, tt.want)
		}
	}
}

func TestDifferencingRefuses(t *testing.T) {
	good := func() sdk.CreateRequest {
		return sdk.CreateRequest{
			Size: 34816, BackingName: "b",
			Backing: &sdk.BackingInfo{Format: "vpc", VirtualSize: 34816, Identity: map[string]string{
				identityID: "00010203-0405-0607-0809-0a0b0c0d0e0f", identityTime: "5",
			}},
		}
	}
	creator := New().(sdk.Creator)
	if _, err := creator.PlanCreate(context.Background(), good()); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		edit func(*sdk.CreateRequest)
		want string
	}{
		{"not opened", func(r *sdk.CreateRequest) { r.Backing = nil }, "needs its parent's unique id"},
		{"qcow2", func(r *sdk.CreateRequest) { r.Backing.Format = "qcow2" }, "must be a VHD"},
		{"no id", func(r *sdk.CreateRequest) { r.Backing.Identity = nil }, "unique id"},
		{"no time", func(r *sdk.CreateRequest) { delete(r.Backing.Identity, identityTime) }, "time stamp"},
		{"long name", func(r *sdk.CreateRequest) { r.BackingName = strings.Repeat("x", 257) }, "257 UTF-16 units"},
		{"long path", func(r *sdk.CreateRequest) { r.BackingName = strings.Repeat("x/", 20000) + "b" }, "at most 32768"},
		{"backslash", func(r *sdk.CreateRequest) { r.BackingName = `a\b` }, "backslash"},
	} {
		req := good()
		tt.edit(&req)
		if _, err := creator.PlanCreate(context.Background(), req); !errors.Is(err, sdk.ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestParentNames(t *testing.T) {
	for _, tt := range []struct{ name, want string }{
		{"base.vhd", "base.vhd"}, {"../a/base.vhd", "../a/base.vhd"}, {"/abs/bäse \U0001f4be.vhd", "/abs/bäse \U0001f4be.vhd"},
	} {
		var h header
		stored, err := h.setParent(tt.name, 0)
		if err != nil {
			t.Fatal(err)
		}
		img := &image{header: h, file: formattest.MemFile(stored), length: int64(len(stored))}
		ref, err := img.parent()
		if err != nil || ref.Name != tt.want {
			t.Errorf("%s: read back as %+v, %v", tt.name, ref, err)
		}
	}
	// As Hyper-V and Virtual PC for Mac write them; names that cannot be read
	// are passed over.
	var file []byte
	add := func(p platform, b []byte) locator {
		l := locator{platform: p, dataLength: uint32(len(b)), dataOffset: uint64(len(file))}
		file = append(file, b...)
		return l
	}
	var h header
	h.locators[0] = add(platformMac, []byte("file://localhost/Disks/base.vhd"))
	h.locators[1] = add(platformAbsolute, encodeUTF16(`C:\Disks\base.vhd`, binary.LittleEndian))
	h.locators[2] = add(platformRelative, encodeUTF16(`.\sub\base.vhd`, binary.LittleEndian))
	h.locators[3] = locator{platform: platformRelative, dataLength: 1 << 31, dataOffset: 1 << 62}
	copy(h.parentName[:], encodeUTF16("base.vhd", binary.BigEndian))
	img := &image{header: h, file: formattest.MemFile(file)}
	ref, err := img.parent()
	if err != nil {
		t.Fatal(err)
	}
	got := append([]string{ref.Name}, ref.Alternatives...)
	if want := []string{"sub/base.vhd", "C:/Disks/base.vhd", "/Disks/base.vhd", "base.vhd"}; !reflect.DeepEqual(got, want) {
		t.Errorf("names %q, want %q", got, want)
	}
	if len(img.damage) != 1 {
		t.Errorf("damage %v", img.damage)
	}
	if _, err := (&image{}).parent(); !errors.Is(err, sdk.ErrCorrupt) {
		t.Errorf("no name at all: %v", err)
	}
}

package vhdx

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// masked returns the first MiBs of an image without what depends on chance:
// sequence numbers, ids, and the checksums over them; and without the creator.
func masked(t *testing.T, path string, n int64) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	clear(b[8:identifierSize])
	for _, off := range []int{header1Offset, header2Offset} {
		clear(b[off+4 : off+48]) // checksum, sequence, file write id, data write id
	}
	// The virtual disk id follows file parameters and virtual disk size.
	at := bytes.LastIndex(b, []byte("metadata"))
	clear(b[at+metadataTableSize+16 : at+metadataTableSize+32])
	return b
}

func info(t *testing.T, path string) map[string]any {
	t.Helper()
	m := map[string]any{}
	if err := json.Unmarshal([]byte(formattest.Oracle(t, "qemu-img", "info", "--output=json", path)), &m); err != nil {
		t.Fatal(err)
	}
	delete(m, "filename")
	delete(m, "actual-size")
	return m
}

// same creates one image with qemu-img and one with this plugin and compares
// outcome, metadata and what qemu-img says of both.
func same(t *testing.T, size int64, opts string) {
	t.Helper()
	dir := t.TempDir()
	theirs := filepath.Join(dir, "theirs")
	args := []string{"create", "-q", "-f", "vhdx"}
	if opts != "" {
		args = append(args, "-o", opts)
	}
	_, stderr, code := formattest.TryOracle(t, "qemu-img", append(args, theirs, fmt.Sprint(size))...)
	ours, err := formattest.TryCreate(t, New(), dir, "ours", size, opts)
	if (err == nil) != (code == 0) {
		t.Fatalf("size %d, %q: qemu-img exits %d (%s), we say %v", size, opts, code, strings.TrimSpace(stderr), err)
	}
	if err != nil {
		want := strings.TrimSpace(stderr)
		want = want[strings.Index(want, theirs)+len(theirs)+2:]
		if err.Error() != want {
			t.Errorf("size %d, %q: error %q, qemu-img's %q", size, opts, err, want)
		}
		return
	}
	a, err := os.Stat(theirs)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.Stat(ours)
	if err != nil {
		t.Fatal(err)
	}
	wholeBlocks := strings.Contains(opts, "fixed") && strings.Contains(opts, "zero=off")
	if a.Size() != b.Size() && !(wholeBlocks && b.Size() > a.Size()) {
		t.Fatalf("size %d, %q: %d bytes, qemu-img's %d", size, opts, b.Size(), a.Size())
	}
	n := min(a.Size(), 80*mib)
	x, y := masked(t, theirs, n), masked(t, ours, n)
	if !bytes.Equal(x, y) {
		i := 0
		for x[i] == y[i] {
			i++
		}
		t.Errorf("size %d, %q: byte %#x is %#x, qemu-img's %#x", size, opts, i, y[i], x[i])
	}
	if x, y := info(t, theirs), info(t, ours); fmt.Sprint(x) != fmt.Sprint(y) {
		t.Errorf("size %d, %q: info %v, qemu-img's image %v", size, opts, y, x)
	}
	formattest.Oracle(t, "qemu-img", "check", ours)
}

func TestCreateAsQemu(t *testing.T) {
	for _, size := range []int64{0, 1, 511, 512, mib - 1, mib, mib + 1, 2<<30 - 512, 2<<30 + 512, 100 << 30, 100<<30 + 1, 2040 << 30, 32 << 40, 32<<40 + 1, 64<<40 - 1, 64 << 40, 64<<40 + 1, 1<<63 - 1} {
		if size == 0 && testing.Short() {
			continue // 64 MiB of table by qemu-img
		}
		same(t, size, "")
	}
	for _, opts := range []string{
		"log_size=0", "log_size=1", "log_size=1500k", "log_size=3G", "log_size=4G", "log_size=4294967295", "log_size=4293918720", "log_size=4293918721",
		"block_size=1", "block_size=1M", "block_size=1500k", "block_size=3M", "block_size=256M", "block_size=257M", "block_size=512M", "block_size=5G",
		"subformat=dynamic", "subformat=fixed", "subformat=fixed,block_state_zero=off", "subformat=fixed,block_state_zero=on",
		"block_state_zero=off", "block_state_zero=on", "preallocation=off", "preallocation=falloc", "preallocation=full", "extent_size_hint=1M",
	} {
		same(t, 20*mib+512, opts)
	}
	// A table with the entries of sector bitmaps in between.
	same(t, 40<<30, "block_size=1M")
	same(t, 40<<30, "block_size=1M,subformat=fixed,block_state_zero=off")
	same(t, 64<<40, "block_size=256M,subformat=dynamic")
}

func TestCreateRandomAsQemu(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 7))
	pick := func(s ...string) string { return s[rng.IntN(len(s))] }
	for range 40 {
		var opts []string
		if rng.IntN(2) == 0 {
			opts = append(opts, "block_size="+pick("0", "1", "1M", "2M", "4097k", "32M", "100M", "128M", "300M"))
		}
		if rng.IntN(2) == 0 {
			opts = append(opts, "log_size="+pick("0", "1", "1M", "1234567", "16M", "5G"))
		}
		if rng.IntN(2) == 0 {
			opts = append(opts, "subformat="+pick("dynamic", "fixed"))
		}
		if rng.IntN(2) == 0 {
			opts = append(opts, "block_state_zero="+pick("on", "off"))
		}
		same(t, 1+rng.Int64N(1<<rng.IntN(44)), strings.Join(opts, ","))
	}
}

// TestReadQemu compares what qemu-io wrote with what we map.
func TestReadQemu(t *testing.T) {
	dir := t.TempDir()
	for _, opts := range []string{"block_size=1M", "block_size=2M,block_state_zero=off", "subformat=fixed", "subformat=fixed,block_state_zero=off"} {
		path := filepath.Join(dir, "a.vhdx")
		formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "vhdx", "-o", opts, path, "21M")
		formattest.Oracle(t, "qemu-io", "-f", "vhdx", "-c", "write -P 1 0 512", "-c", "write -P 2 5M 3M", "-c", "write -P 3 20M 1M", "-c", "write -P 4 12345344 4k", "-c", "write -z 6M 1M", path)
		raw := filepath.Join(dir, "a.raw")
		formattest.Oracle(t, "qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, raw)
		want, err := os.ReadFile(raw)
		if err != nil {
			t.Fatal(err)
		}
		o := formattest.Open(t, New(), path, false)
		if !bytes.Equal(o.Read(0, o.Info.VirtualSize), want) {
			t.Errorf("%s: content differs from qemu-img's", opts)
		}
		if o.Info.Dirty {
			t.Errorf("%s: dirty", opts)
		}
		// The map is finer than qemu-img's, and what it calls empty is.
		data := int64(0)
		for _, e := range o.Map() {
			if e.Kind == sdk.Data {
				data += e.Length
			} else if len(bytes.TrimLeft(want[e.Offset:][:e.Length], "\x00")) != 0 {
				t.Errorf("%s: %+v is not empty", opts, e)
			}
		}
		if data == 0 || data == o.Info.VirtualSize && opts != "subformat=fixed,block_state_zero=off" && opts != "subformat=fixed" {
			t.Errorf("%s: %d bytes of data", opts, data)
		}
	}
}

// TestWriteForQemu lets qemu-img, 7z and libvhdi read what we wrote.
func TestWriteForQemu(t *testing.T) {
	for _, size := range []int64{21 * mib, 21*mib + 512} {
		writeForQemu(t, size)
	}
}

func writeForQemu(t *testing.T, size int64) {
	dir := t.TempDir()
	want := make([]byte, size)
	runs := map[int64][]byte{}
	for i, r := range []struct{ off, n int64 }{{0, 512}, {3 * mib, 2 * mib}, {8*mib - 512, 1024}, {20*mib + 5, 100000}, {size - 512, 512}} {
		b := bytes.Repeat([]byte{byte(i + 1), 0x55, byte(i)}, int(r.n/3+1))[:r.n]
		runs[r.off] = b
		copy(want[r.off:], b)
	}
	raw := filepath.Join(dir, "want.raw")
	if err := os.WriteFile(raw, want, 0o644); err != nil {
		t.Fatal(err)
	}
	for i, opts := range []string{"", "block_size=1M", "block_size=1M,block_state_zero=off", "subformat=fixed", "subformat=fixed,block_state_zero=off", "subformat=fixed,preallocation=falloc", "log_size=3M,block_size=256M"} {
		name := fmt.Sprintf("%d.vhdx", i)
		path := formattest.Create(t, New(), dir, name, size, opts)
		formattest.Write(t, New(), path, runs, false)
		out := formattest.Oracle(t, "qemu-img", "compare", "-f", "raw", "-F", "vhdx", raw, path)
		if !strings.Contains(out, "Images are identical.") {
			t.Errorf("%q: compare: %s", opts, out)
		}
		if out := formattest.Oracle(t, "qemu-img", "check", path); !strings.Contains(out, "No errors") {
			t.Errorf("%q: check: %s", opts, out)
		}
		// 7z opens no image, whoever made it, whose size is not a multiple of 1 KiB.
		if size%1024 == 0 {
			if got := formattest.Oracle(t, "7z", "x", "-so", "-tVHDX", path); got != string(want) {
				t.Errorf("%q: 7z extracts something else", opts)
			}
		}
		if out := formattest.Oracle(t, "vhdiinfo", path); !strings.Contains(out, fmt.Sprintf("(%d bytes)", size)) {
			t.Errorf("%q: vhdiinfo: %s", opts, out)
		}
		// Again, over what is there: through the log.
		formattest.Write(t, New(), path, map[int64][]byte{9 * mib: bytes.Repeat([]byte{9}, 3*mib), 0: bytes.Repeat([]byte{8}, mib)}, false)
		formattest.Oracle(t, "qemu-img", "check", path)
		o := formattest.Open(t, New(), path, false)
		converted := filepath.Join(dir, "converted.raw")
		formattest.Oracle(t, "qemu-img", "convert", "-f", "vhdx", "-O", "raw", path, converted)
		got, err := os.ReadFile(converted)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, o.Read(0, size)) || got[9*mib] != 9 {
			t.Errorf("%q: qemu-img reads something else after the second write", opts)
		}
	}
}

// TestFixedIsNotDoubled: the blocks of a fixed image go where the file has room
// for them, whatever the table says of them at first.
func TestFixedIsNotDoubled(t *testing.T) {
	dir := t.TempDir()
	theirs := filepath.Join(dir, "theirs")
	formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "vhdx", "-o", "subformat=fixed,block_size=1M", theirs, "5M")
	for _, path := range []string{theirs, formattest.Create(t, New(), dir, "ours", 5*mib, "subformat=fixed,block_size=1M")} {
		before, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		// Block 3 first: each block has its own place.
		formattest.Write(t, New(), path, map[int64][]byte{3 * mib: bytes.Repeat([]byte{3}, mib)}, false)
		o := formattest.Open(t, New(), path, false)
		if m := o.Map(); len(m) != 3 || m[1].HostOffset != before.Size()-2*mib {
			t.Errorf("map %+v", m)
		}
		after, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if before.Size() != after.Size() {
			t.Errorf("%d bytes became %d", before.Size(), after.Size())
		}
		formattest.Oracle(t, "qemu-img", "check", path)
		formattest.Write(t, New(), path, map[int64][]byte{mib: bytes.Repeat([]byte{1}, mib)}, false)
		o = formattest.Open(t, New(), path, false)
		if m := o.Map(); len(m) != 5 || m[1].HostOffset != before.Size()-4*mib || o.Read(3*mib, 1)[0] != 3 {
			t.Errorf("map after the second write %+v", m)
		}
	}
}

func TestPreallocation(t *testing.T) {
	for _, c := range []struct {
		opts    string
		length  int64 // planned
		mode    sdk.Preallocation
		present bool
	}{
		{"", 0, sdk.PreallocOff, false},
		{"preallocation=falloc", 8 * mib, sdk.PreallocFalloc, false},
		{"preallocation=full", 8 * mib, sdk.PreallocFull, false},
		{"subformat=fixed", 0, sdk.PreallocOff, false},
		{"subformat=fixed,preallocation=off", 0, sdk.PreallocOff, false},
		{"subformat=fixed,preallocation=falloc,block_size=2M", 14 * mib, sdk.PreallocFalloc, true},
		{"subformat=fixed,preallocation=full,block_size=2M", 14 * mib, sdk.PreallocFull, true},
		{"subformat=fixed,preallocation=full,block_size=2M,block_state_zero=on", 13 * mib, sdk.PreallocFull, false},
	} {
		dir := t.TempDir()
		plan, err := formattest.TryPlan(t, New(), dir, "a", 5*mib, c.opts, nil)
		if err != nil {
			t.Fatal(err)
		}
		if f := plan.Info().Files[0]; f.Length != c.length || f.Preallocation != c.mode {
			t.Errorf("%q: planned %+v", c.opts, f)
		}
		path := formattest.Create(t, New(), dir, "a", 5*mib, c.opts)
		if m := formattest.Open(t, New(), path, false).Map(); (m[0].Kind == sdk.Data) != c.present {
			t.Errorf("%q: map %+v", c.opts, m)
		}
		if fi, err := os.Stat(path); err != nil || c.length != 0 && fi.Size() != c.length {
			t.Errorf("%q: %v, %v", c.opts, fi.Size(), err)
		}
		formattest.Oracle(t, "qemu-img", "check", path)
	}
}

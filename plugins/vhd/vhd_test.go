package vhd

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

func TestConformance(t *testing.T) {
	formattest.Run(t, New, formattest.Config{
		Options: []string{
			"", "force_size=on", "subformat=fixed", "subformat=fixed,force_size=on,preallocation=full",
			"block_size=64k", "block_size=16M,force_size=on,force_size_calc=current_size",
		},
	})
}

// virtualSize asks qemu-img.
func virtualSize(t *testing.T, path string) int64 {
	t.Helper()
	var info struct {
		VirtualSize int64 `json:"virtual-size"`
	}
	out := formattest.Oracle(t, "qemu-img", "info", "-f", "vpc", "--output=json", path)
	if err := json.Unmarshal([]byte(out), &info); err != nil {
		t.Fatal(err)
	}
	return info.VirtualSize
}

// anonymous clears what differs between any two images: time, unique id and
// the checksum over them, of the footer at off.
func anonymous(b []byte, off int) {
	clear(b[off+24 : off+28])
	clear(b[off+64 : off+84])
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sizesOfInterest are those around every change of the geometry's rules, and
// some between.
func sizesOfInterest() []int64 {
	const s = sectorSize
	sizes := []int64{0, 1, 511, 512, 513, 1<<20 - 1, 1 << 20, 1<<20 + 1, 2<<30 - 512, 2 << 30, 2<<30 + 512, 2040 << 30}
	for _, edge := range []int64{
		4 * 17, 17 * 4 * 1024, 17 * 16 * 1024, 31 * 16 * 1024, 63 * 16 * 1024, 65535 * 16 * 63, 65535 * 16 * 255, maxSectors - 10,
	} {
		for _, d := range []int64{-8000, -300, -2, -1, 0, 1, 2, 300, 8000} {
			if n := edge + d; n > 0 && n <= maxSectors {
				sizes = append(sizes, n*s)
			}
		}
	}
	rng := rand.New(rand.NewPCG(7, 7))
	for range 30 {
		sizes = append(sizes, rng.Int64N(1<<(20+rng.Int64N(21))))
	}
	return sizes
}

// What we create is what qemu-img creates, byte for byte.
func TestCreateEqualsQemuImg(t *testing.T) {
	dir := t.TempDir()
	ours, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
	for _, opts := range []string{"subformat=dynamic", "subformat=dynamic,force_size=on", "subformat=fixed", "subformat=fixed,force_size=on"} {
		for _, size := range sizesOfInterest() {
			if size > 300<<30 && opts != "subformat=dynamic" {
				continue
			}
			formattest.Create(t, New(), dir, "ours", size, opts)
			formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "vpc", "-o", opts, theirs, fmt.Sprint(size))
			if strings.Contains(opts, "fixed") {
				// The data are holes: the footers are what there is to compare.
				a, b := tail(t, ours), tail(t, theirs)
				anonymous(a, 0)
				anonymous(b, 0)
				if !bytes.Equal(a, b) || length(t, ours) != length(t, theirs) {
					t.Errorf("%s, size %d: footers differ\n% x\n% x", opts, size, a[:85], b[:85])
				}
				continue
			}
			a, b := read(t, ours), read(t, theirs)
			if len(a) != len(b) {
				t.Errorf("%s, size %d: %d bytes, qemu-img %d", opts, size, len(a), len(b))
				continue
			}
			for _, x := range [][]byte{a, b} {
				anonymous(x, 0)
				anonymous(x, len(x)-footerSize)
			}
			if !bytes.Equal(a, b) {
				t.Errorf("%s, size %d: metadata differ\n% x\n% x", opts, size, a[:85], b[:85])
			}
		}
	}
}

func tail(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, footerSize)
	if _, err := f.ReadAt(b, length(t, path)-footerSize); err != nil {
		t.Fatal(err)
	}
	return b
}

func length(t *testing.T, path string) int64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}

func TestCreateRefuses(t *testing.T) {
	for _, tt := range []struct {
		size int64
		opts string
		want string
	}{
		{2040<<30 + 1, "", "The image size is too large for file format 'vpc'"},
		{2040<<30 + 1, "force_size=on", "The image size is too large for file format 'vpc'"},
		{64 << 40, "subformat=fixed", "The image size is too large for file format 'vpc'"},
		{math.MaxInt64, "", "The image size is too large for file format 'vpc'"},
		{1 << 20, "subformat=foo", "Parameter 'subformat' does not accept value 'foo'"},
		{1 << 20, "subformat=FIXED", "Parameter 'subformat' does not accept value 'FIXED'"},
		{1 << 20, "preallocation=metadata", "Unsupported preallocation mode: metadata"},
		{1 << 20, "subformat=fixed,block_size=2M", "block_size with subformat fixed: a fixed disk has no blocks: invalid argument"},
		{2040 << 30, "block_size=64k", "block_size 65536 is too small for a disk of 2190433320960 bytes: too big"},
	} {
		_, err := formattest.TryCreate(t, New(), t.TempDir(), "x", tt.size, tt.opts)
		if err == nil || err.Error() != tt.want {
			t.Errorf("size %d, %q: %v, want %q", tt.size, tt.opts, err, tt.want)
		}
	}
	for _, size := range []int64{2040<<30 + 1, 64 << 40, math.MaxInt64} {
		if _, _, code := formattest.TryOracle(t, "qemu-img", "create", "-q", "-f", "vpc", filepath.Join(t.TempDir(), "x"), fmt.Sprint(size)); code == 0 {
			t.Errorf("qemu-img accepts size %d", size)
		}
	}
}

func TestReproducible(t *testing.T) {
	var made [][]byte
	for i := range 3 {
		path, err := formattest.CreateAs(t, New(), t.TempDir(), "x", 1<<20, "", func(req *sdk.CreateRequest) {
			req.Reproducible, req.Time = true, epoch2000+int64(i/2)
		})
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, read(t, path))
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Error("two reproducible images of the same request differ")
	}
	if bytes.Equal(made[0], made[2]) {
		t.Error("images of different times are the same")
	}
}

// The preallocation of a fixed disk is what was asked for; qemu-img ignores it.
func TestPlanFollowsPreallocation(t *testing.T) {
	for mode, want := range map[string]sdk.Preallocation{
		"off": sdk.PreallocOff, "falloc": sdk.PreallocFalloc, "full": sdk.PreallocFull,
	} {
		plan, err := formattest.TryPlan(t, New(), t.TempDir(), "x", 1<<20, "force_size=on,subformat=fixed,preallocation="+mode, nil)
		if err != nil {
			t.Fatal(err)
		}
		if f := plan.Info().Files[0]; f.Preallocation != want || f.Length != 1<<20+footerSize {
			t.Errorf("%s: %+v", mode, f)
		}
	}
}

// patterns writes the same runs through us and returns the runs as qemu-io
// commands that verify them.
func patterns(rng *rand.Rand, size int64) (runs map[int64][]byte, verify []string) {
	runs = map[int64][]byte{}
	for at := int64(0); at < size; {
		at += rng.Int64N(6<<20) / 4096 * 4096
		n := min(4096*(1+rng.Int64N(300)), size-at)
		if n <= 0 {
			break
		}
		pattern := byte(1 + rng.IntN(255))
		runs[at] = bytes.Repeat([]byte{pattern}, int(n))
		verify = append(verify, fmt.Sprintf("%d %d %d", pattern, at, n))
		at += n
	}
	return runs, verify
}

func TestWrittenIsReadByOthers(t *testing.T) {
	for _, opts := range []string{"", "force_size=on", "subformat=fixed,force_size=on", "block_size=64k,force_size=on", "block_size=512k", "block_size=32M"} {
		t.Run(opts, func(t *testing.T) {
			dir := t.TempDir()
			const size = 50<<20 + 1536
			path := formattest.Create(t, New(), dir, "x.vhd", size, opts)
			runs, verify := patterns(rand.New(rand.NewPCG(1, 1)), size)
			formattest.Write(t, New(), path, runs, false)

			o := formattest.Open(t, New(), path, false)
			if got := virtualSize(t, path); got != o.Info.VirtualSize {
				t.Fatalf("virtual size %d, qemu-img's %d", o.Info.VirtualSize, got)
			}
			flat := filepath.Join(dir, "x.raw")
			if err := os.WriteFile(flat, o.Read(0, o.Info.VirtualSize), 0o644); err != nil {
				t.Fatal(err)
			}
			formattest.Oracle(t, "qemu-img", "compare", "-f", "vpc", "-F", "raw", path, flat)
			for _, v := range verify {
				formattest.Oracle(t, "qemu-io", "-f", "vpc", "-r", "-c", "read -P "+v, path)
			}
			// libvhdi and 7-Zip by their own parsers.
			if out := formattest.Oracle(t, "vhdiinfo", path); !strings.Contains(out, fmt.Sprintf("(%d bytes)", o.Info.VirtualSize)) {
				t.Errorf("vhdiinfo does not show %d bytes:\n%s", o.Info.VirtualSize, out)
			}
			formattest.Oracle(t, "7z", "x", "-y", "-tvhd", "-o"+filepath.Join(dir, "out"), path)
			files, err := os.ReadDir(filepath.Join(dir, "out"))
			if err != nil || len(files) != 1 {
				t.Fatalf("7z: %v, %v", files, err)
			}
			if !bytes.Equal(read(t, filepath.Join(dir, "out", files[0].Name())), read(t, flat)) {
				t.Error("7z reads something else")
			}
			// qemu may go on writing where we stopped.
			formattest.Oracle(t, "qemu-io", "-f", "vpc", "-c", "write -P 99 0 128k", "-c", "write -P 98 49M 64k", path)
			o = formattest.Open(t, New(), path, false)
			if got := o.Read(49<<20, 64<<10); !bytes.Equal(got, bytes.Repeat([]byte{98}, 64<<10)) {
				t.Error("what qemu-io wrote after us is not read back")
			}
			clean(t, path)
		})
	}
}

func check(t *testing.T, path string) (*sdk.CheckResult, string) {
	t.Helper()
	o, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{Check: true})
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	res, err := o.Image.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Message: func(s string) { text.WriteString(s + "\n") }})
	if err != nil {
		t.Fatal(err)
	}
	return res, text.String()
}

func clean(t *testing.T, path string) {
	t.Helper()
	if res, text := check(t, path); res.Corruptions+res.Leaks+res.CheckErrors != 0 {
		t.Errorf("check: %+v\n%s", *res, text)
	}
}

func TestReadsWhatQemuWrote(t *testing.T) {
	for _, opts := range []string{"subformat=dynamic", "subformat=dynamic,force_size=on", "subformat=fixed", "subformat=fixed,force_size=on"} {
		t.Run(opts, func(t *testing.T) {
			dir := t.TempDir()
			path, flat := filepath.Join(dir, "x.vhd"), filepath.Join(dir, "x.raw")
			formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "vpc", "-o", opts, path, "20M")
			formattest.Oracle(t, "qemu-io", "-f", "vpc", "-c", "write -P 3 17M 1M", "-c", "write -P 1 512 3k", "-c", "write -P 2 5M 4M", "-c", "write -z 6M 1M", path)
			formattest.Oracle(t, "qemu-img", "convert", "-f", "vpc", "-O", "raw", path, flat)
			o := formattest.Open(t, New(), path, false)
			if got := o.Read(0, o.Info.VirtualSize); !bytes.Equal(got, read(t, flat)) {
				t.Error("content differs")
			}
			clean(t, path)

			var theirs []struct {
				Start, Length int64
				Zero, Data    bool
				Offset        *int64
			}
			out := formattest.Oracle(t, "qemu-img", "map", "-f", "vpc", "--output=json", path)
			if err := json.Unmarshal([]byte(out), &theirs); err != nil {
				t.Fatal(err)
			}
			if strings.Contains(opts, "fixed") {
				return // the core looks for the holes
			}
			ours := o.Map()
			if len(ours) != len(theirs) {
				t.Fatalf("map %+v, qemu-img's %s", ours, out)
			}
			for i, e := range ours {
				w := theirs[i]
				host := int64(-1)
				if w.Offset != nil {
					host = *w.Offset
				}
				if e.Offset != w.Start || e.Length != w.Length || e.HostOffset != host || (e.Kind == sdk.Zero) != w.Zero {
					t.Errorf("extent %d: %+v, qemu-img's %+v", i, e, w)
				}
			}

			// And we go on writing where qemu stopped.
			formattest.Write(t, New(), path, map[int64][]byte{11 << 20: bytes.Repeat([]byte{77}, 1<<20), 5 << 20: bytes.Repeat([]byte{78}, 4096)}, false)
			formattest.Oracle(t, "qemu-io", "-f", "vpc", "-r", "-c", "read -P 77 11M 1M", "-c", "read -P 78 5M 4k", "-c", "read -P 2 5124k 100k", "-c", "read -P 3 17M 1M", path)
			clean(t, path)
		})
	}
}

// sealed recomputes the checksums of the footer at off.
func sealed(b []byte, off int) {
	var f footer
	if err := f.decode(b[off:min(off+footerSize, len(b))]); err != nil {
		panic(err)
	}
	binary.BigEndian.PutUint32(b[off+64:], f.sum())
}

func sealedHeader(b []byte, off int) {
	var h header
	if err := h.decode(b[off : off+headerSize]); err != nil {
		panic(err)
	}
	binary.BigEndian.PutUint32(b[off+36:], h.sum())
}

// The size is the geometry's or the stored one, by creator. qemu-img 7.2 goes
// by geometry for creators it does not know, which cuts disks exported from
// Azure short (docs/divergences.md).
func TestSizeByCreator(t *testing.T) {
	dir := t.TempDir()
	const chs, stored = 5257216, 5 << 20
	path := formattest.Create(t, New(), dir, "x", stored, "")
	image := read(t, path)
	for _, tt := range []struct {
		creator string
		want    int64
		differs bool // from qemu-img 7.2
	}{
		{"vpc ", chs, false}, {"vs  ", chs, false}, {"qemu", chs, false},
		{"qem2", stored, false}, {"win ", stored, false}, {"d2v ", stored, false}, {"tap\x00", stored, false}, {"CTXS", stored, false},
		{"wa\x00\x00", stored, true}, {"vbox", stored, true},
	} {
		b := bytes.Clone(image)
		copy(b[28:], tt.creator)
		binary.BigEndian.PutUint64(b[48:], stored)
		sealed(b, 0)
		copy(b[len(b)-footerSize:], b[:footerSize])
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if got := formattest.Open(t, New(), path, false).Info.VirtualSize; got != tt.want {
			t.Errorf("creator %q: virtual size %d, want %d", tt.creator, got, tt.want)
		}
		if got := virtualSize(t, path); (got != tt.want) != tt.differs {
			t.Errorf("creator %q: qemu-img's virtual size %d, ours %d", tt.creator, got, tt.want)
		}
	}
}

func write(t *testing.T, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "x.vhd")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// Footers of 511 bytes, of versions before Virtual PC 2004.
func TestShortFooter(t *testing.T) {
	dir := t.TempDir()
	content := bytes.Repeat([]byte{5}, 4096)
	fixed := formattest.Create(t, New(), dir, "fixed", 1<<20, "subformat=fixed,force_size=on")
	formattest.Write(t, New(), fixed, map[int64][]byte{8192: content}, false)
	dynamic := formattest.Create(t, New(), dir, "dynamic", 1<<20, "force_size=on")
	formattest.Write(t, New(), dynamic, map[int64][]byte{8192: content}, false)
	for _, path := range []string{fixed, dynamic} {
		b := read(t, path)
		short := write(t, b[:len(b)-1])
		o := formattest.Open(t, New(), short, false)
		if o.Info.VirtualSize != 1<<20 || !bytes.Equal(o.Read(8192, 4096), content) {
			t.Errorf("%s: size %d or content is wrong", filepath.Base(path), o.Info.VirtualSize)
		}
		clean(t, short)
	}
}

func TestFirstCopyBroken(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 5<<20, "")
	content := bytes.Repeat([]byte{9}, 4096)
	formattest.Write(t, New(), path, map[int64][]byte{1 << 20: content}, false)
	whole := read(t, path)
	for name, damage := range map[string]func([]byte){
		"zeroed":   func(b []byte) { clear(b[:footerSize]) },
		"checksum": func(b []byte) { b[64] ^= 1 },
		"size":     func(b []byte) { b[50] ^= 0x40 },
	} {
		b := bytes.Clone(whole)
		damage(b)
		broken := write(t, b)
		o := formattest.Open(t, New(), broken, false)
		if !bytes.Equal(o.Read(1<<20, 4096), content) {
			t.Errorf("%s: content differs", name)
		}
		if res, text := check(t, broken); res.Corruptions != 1 || !strings.Contains(text, "first copy of the footer") {
			t.Errorf("%s: check %+v\n%s", name, *res, text)
		}
		rw := formattest.Open(t, New(), broken, true)
		if _, err := rw.Image.(sdk.Writer).BeginWrite(context.Background(), sdk.WriteRequest{}); !errors.Is(err, sdk.ErrReadOnly) {
			t.Errorf("%s: writing a damaged image: %v", name, err)
		}
	}
}

func TestCheckFinds(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 20<<20, "")
	formattest.Write(t, New(), path, map[int64][]byte{0: {1}, 4 << 20: {1}, 8 << 20: {1}}, false)
	whole := read(t, path)
	const table = footerSize + headerSize
	be := binary.BigEndian
	for _, tt := range []struct {
		name             string
		damage           func(b []byte) []byte
		corrupt, leaks   int64
		text             string
		refusedByReading bool
	}{
		{"sound", func(b []byte) []byte { return b }, 0, 0, "", false},
		{"trailing footer gone", func(b []byte) []byte { return b[:len(b)-footerSize] }, 1, 0, "footer at the end", false},
		{"trailing footer differs", func(b []byte) []byte { b[len(b)-footerSize+30] = 'x'; sealed(b, len(b)-footerSize); return b }, 1, 0, "footer at the end", false},
		{"header checksum", func(b []byte) []byte { b[footerSize+36] ^= 1; return b }, 1, 0, "dynamic disk header: checksum", false},
		{"both footers' checksums", func(b []byte) []byte { b[64] ^= 1; b[len(b)-footerSize+64] ^= 1; return b }, 2, 0, "footer at 0x0: checksum", true},
		{"entry beyond the file", func(b []byte) []byte { be.PutUint32(b[table:], 0x10000000); return b }, 1, 1, "block 0: host range 0x2000000000", true},
		{"blocks share space", func(b []byte) []byte { copy(b[table+8:table+12], b[table:]); return b }, 1, 1, "two blocks share", false},
		{"block on the header", func(b []byte) []byte { be.PutUint32(b[table:], 1); return b }, 2, 0, "overlaps the dynamic disk header", false},
		{"orphaned block", func(b []byte) []byte { be.PutUint32(b[table+16:], unallocated); return b }, 0, 1, "Leaked space of 1 blocks", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			damaged := write(t, tt.damage(bytes.Clone(whole)))
			res, text := check(t, damaged)
			if res.Corruptions != tt.corrupt || res.Leaks != tt.leaks || !strings.Contains(text, tt.text) {
				t.Errorf("%d corruptions, %d leaks, want %d, %d and %q in\n%s", res.Corruptions, res.Leaks, tt.corrupt, tt.leaks, tt.text, text)
			}
			_, err := formattest.TryOpen(t, New(), damaged, sdk.OpenRequest{})
			if (err != nil) != tt.refusedByReading {
				t.Errorf("open for reading: %v", err)
			}
		})
	}
	if res, _ := check(t, path); res.TotalClusters != 11 || res.AllocatedClusters != 3 || res.FragmentedClusters != 0 {
		t.Errorf("statistics: %+v", *res)
	}
}

// Case 24 of the hostile images, and its kin.
func TestHostile(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 20<<20, "")
	whole := read(t, path)
	be := binary.BigEndian
	const h = footerSize
	for _, tt := range []struct {
		name   string
		damage func(b []byte)
		want   string
	}{
		{"table beyond the file", func(b []byte) { be.PutUint64(b[h+16:], 1<<40) }, "beyond end of file"},
		{"table at 2^64-1", func(b []byte) { be.PutUint64(b[h+16:], math.MaxUint64) }, "beyond end of file"},
		{"block beyond the file", func(b []byte) { be.PutUint32(b[h+headerSize:], 0xfffffffe) }, "The image has been truncated"},
		{"2^32-1 entries", func(b []byte) { be.PutUint32(b[h+28:], math.MaxUint32) }, "Max Table Entries too large (-1)"},
		{"as many entries as may be", func(b []byte) { be.PutUint32(b[h+28:], maxEntries) }, "beyond end of file"},
		{"no entries", func(b []byte) { be.PutUint32(b[h+28:], 0) }, "Page table too small"},
		{"block size 0", func(b []byte) { be.PutUint32(b[h+32:], 0) }, "Invalid block size 0"},
		{"block size 256", func(b []byte) { be.PutUint32(b[h+32:], 256) }, "Invalid block size 256"},
		{"block size 3 MiB", func(b []byte) { be.PutUint32(b[h+32:], 3<<20) }, "Invalid block size 3145728"},
		{"no header magic", func(b []byte) { b[h] = 'x' }, "Invalid header magic"},
		{"header beyond the file", func(b []byte) { be.PutUint64(b[16:], math.MaxInt64) }, "beyond end of file"},
		{"disk type 9", func(b []byte) { be.PutUint32(b[60:], 9) }, "disk type 9"},
		{"2^64-1 bytes", func(b []byte) { copy(b[28:], "win "); be.PutUint64(b[48:], math.MaxUint64) }, "too large"},
	} {
		b := bytes.Clone(whole)
		tt.damage(b)
		sealed(b, 0)
		copy(b[len(b)-footerSize:], b[:footerSize])
		if b[h] == 'c' {
			sealedHeader(b, h)
		}
		file := sdk.NamedFile{Role: sdk.RoleMain, File: formattest.ReadOnly(formattest.MemFile(b))}
		_, err := New().Open(context.Background(), sdk.OpenRequest{Files: []sdk.NamedFile{file}})
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
	for _, n := range []int{0, 1, 510, 511, 512} {
		file := sdk.NamedFile{Role: sdk.RoleMain, File: formattest.ReadOnly(formattest.MemFile(make([]byte, n)))}
		if _, err := New().Open(context.Background(), sdk.OpenRequest{Files: []sdk.NamedFile{file}}); !errors.Is(err, sdk.ErrNotFormat) {
			t.Errorf("%d zeros: %v", n, err)
		}
	}
}

// A fixed disk whose footer says more than the file holds is a truncated one.
func TestFixedTruncated(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 1<<20, "subformat=fixed,force_size=on")
	b := read(t, path)
	cut := write(t, b[512<<10:])
	if _, err := formattest.TryOpen(t, New(), cut, sdk.OpenRequest{}); !errors.Is(err, sdk.ErrCorrupt) {
		t.Errorf("open: %v", err)
	}
	if res, text := check(t, cut); res.Corruptions != 1 {
		t.Errorf("check: %+v\n%s", *res, text)
	}
}

// Measure says what writing makes.
func TestMeasure(t *testing.T) {
	for _, opts := range []string{"", "block_size=64k", "block_size=512k,force_size=on", "subformat=fixed"} {
		dir := t.TempDir()
		const size = 20 << 20
		plan, err := formattest.TryPlan(t, New(), dir, "x", size, opts, nil)
		if err != nil {
			t.Fatal(err)
		}
		unit := max(plan.Info().AllocationUnit, 64<<10)
		for _, units := range []int64{0, 1, 3} {
			path := formattest.Create(t, New(), dir, "x", size, opts)
			runs := map[int64][]byte{}
			for i := range units {
				runs[i*2*unit] = []byte{1}
			}
			formattest.Write(t, New(), path, runs, false)
			if plan.Info().AllocationUnit == 0 {
				units = 0
			}
			res, err := plan.(sdk.Measurer).Measure(context.Background(), sdk.MeasureRequest{AllocatedUnits: units})
			if err != nil || res.Required != length(t, path) || res.Bitmaps != -1 {
				t.Errorf("%q, %d units: %+v, %v, the file has %d bytes", opts, units, res, err, length(t, path))
			}
		}
		path := formattest.Create(t, New(), dir, "x", size, opts)
		full := formattest.Open(t, New(), path, false).Info.VirtualSize
		formattest.Write(t, New(), path, map[int64][]byte{0: make([]byte, full)}, false)
		res, err := plan.(sdk.Measurer).Measure(context.Background(), sdk.MeasureRequest{})
		if err != nil || res.FullyAllocated != length(t, path) {
			t.Errorf("%q: %+v, %v, the full file has %d bytes", opts, res, err, length(t, path))
		}
	}
}

func TestZeroOverwritesOldContent(t *testing.T) {
	for _, opts := range []string{"", "subformat=fixed"} {
		path := formattest.Create(t, New(), t.TempDir(), "x", 8<<20, opts)
		formattest.Write(t, New(), path, map[int64][]byte{1 << 20: bytes.Repeat([]byte{1}, 2<<20)}, false)
		ctx := context.Background()
		o := formattest.Open(t, New(), path, true)
		w := o.Image.(sdk.Writer)
		if wi, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil || wi.ReadsZero {
			t.Fatalf("begin: %+v, %v", wi, err)
		}
		if err := w.Zero(ctx, []sdk.Run{{Offset: 1<<20 + 4096, Length: 6 << 20}}); err != nil {
			t.Fatal(err)
		}
		if err := w.Finish(ctx); err != nil {
			t.Fatal(err)
		}
		want := make([]byte, 8<<20)
		copy(want[1<<20:], bytes.Repeat([]byte{1}, 4096))
		if got := o.Read(0, 8<<20); !bytes.Equal(got, want) {
			t.Errorf("%q: content differs", opts)
		}
		clean(t, path)
	}
}

// Blocks that lie on metadata are read, as qemu-img does, but never written.
func TestWriteSparesMetadata(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 5<<20, "")
	formattest.Write(t, New(), path, map[int64][]byte{0: {1}}, false)
	b := read(t, path)
	binary.BigEndian.PutUint32(b[footerSize+headerSize:], 2)
	ctx := context.Background()
	o := formattest.Open(t, New(), write(t, b), true)
	w := o.Image.(sdk.Writer)
	if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
		t.Fatal(err)
	}
	runs := []sdk.Run{{Offset: 0, Length: 4096}}
	if _, err := w.Place(ctx, runs); !errors.Is(err, sdk.ErrCorrupt) {
		t.Errorf("place: %v", err)
	}
	if err := w.Zero(ctx, runs); !errors.Is(err, sdk.ErrCorrupt) {
		t.Errorf("zero: %v", err)
	}
	for _, r := range []sdk.Run{{Offset: -512, Length: 512}, {Offset: 1, Length: 512}, {Offset: 0, Length: 0}, {Offset: 5 << 20, Length: 1 << 30}, {Offset: 512, Length: math.MaxInt64}} {
		if _, err := w.Place(ctx, []sdk.Run{r}); !errors.Is(err, sdk.ErrInvalid) {
			t.Errorf("place %+v: %v", r, err)
		}
	}
}

// A table that is garbage from end to end is counted, not recited.
func TestCheckOfGarbageIsBounded(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 1<<30, "block_size=64k,force_size=on")
	b := read(t, path)
	clear(b[footerSize+headerSize : len(b)-footerSize])
	res, text := check(t, write(t, append(b, make([]byte, 1<<20)...)))
	// Every block lies on all three pieces of metadata, all but one on another
	// block, and the footer at the end is gone.
	const blocks = 1 << 30 / (64 << 10)
	if want := int64(3*blocks + blocks - 1 + 1); res.Corruptions < blocks || res.Corruptions != want {
		t.Errorf("%d corruptions, want %d", res.Corruptions, want)
	}
	if n := strings.Count(text, "\n"); n != maxMessages {
		t.Errorf("%d messages", n)
	}
}

// The largest table there may be, in a sparse file, all of it pointing at the
// header: memory and findings are bounded.
func TestLargestTable(t *testing.T) {
	if testing.Short() {
		t.Skip("reads 256 MiB of table twice")
	}
	path := formattest.Create(t, New(), t.TempDir(), "x", 16<<30, "force_size=on")
	b := read(t, path)[:footerSize+headerSize]
	binary.BigEndian.PutUint32(b[footerSize+28:], maxEntries)
	binary.BigEndian.PutUint32(b[footerSize+32:], sectorSize)
	sealedHeader(b, footerSize)
	path = write(t, b)
	if err := os.Truncate(path, 1<<30); err != nil {
		t.Fatal(err)
	}
	formattest.Open(t, New(), path, false)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	res, text := check(t, path)
	runtime.ReadMemStats(&after)
	if res.Corruptions < maxEntries || strings.Count(text, "\n") != maxMessages {
		t.Errorf("%+v, %d messages", *res, strings.Count(text, "\n"))
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 160<<20 {
		t.Errorf("%d bytes allocated", used)
	}
}

// Host offsets beyond 4 GiB.
func TestLargeFile(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 6<<30, "block_size=16M,force_size=on")
	ctx := context.Background()
	o := formattest.Open(t, New(), path, true)
	w := o.Image.(sdk.Writer)
	if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
		t.Fatal(err)
	}
	places, err := w.Place(ctx, []sdk.Run{{Offset: 0, Length: 6 << 30}})
	if err != nil {
		t.Fatal(err)
	}
	last := places[len(places)-1]
	if last.HostOffset < 5<<30 {
		t.Fatalf("last placement %+v", last)
	}
	if _, err := o.Files[0].File.WriteAt(bytes.Repeat([]byte{42}, 4096), last.HostOffset+4096); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	formattest.Oracle(t, "qemu-io", "-f", "vpc", "-r", "-c", fmt.Sprintf("read -P 42 %d 4096", last.Offset+4096), "-c", "read -P 0 5G 4096", path)
	clean(t, path)
}

// A disk of the largest size, written at its end.
func TestLargestDisk(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 2040<<30, "")
	formattest.Write(t, New(), path, map[int64][]byte{2040<<30 - 4096: bytes.Repeat([]byte{42}, 4096)}, false)
	formattest.Oracle(t, "qemu-io", "-f", "vpc", "-r", "-c", fmt.Sprintf("read -P 42 %d 4096", int64(2040<<30-4096)), path)
	clean(t, path)
}

// Random damage to the fields of a footer and a header with right checksums:
// qemu-img and we agree on what opens, and how large it is.
func TestVerdictsAreQemuImgs(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 5<<20, "")
	formattest.Write(t, New(), path, map[int64][]byte{1 << 20: {1}}, false)
	whole := read(t, path)
	rng := rand.New(rand.NewPCG(5, 5))
	// Offsets of fields that we do not mean to differ on.
	var fields []int
	for _, r := range [][2]int{{8, 16}, {16, 28}, {36, 64}, {84, 120}, {512, 520}, {528, 536}, {540, 548}, {1536, 1560}} {
		for at := r[0]; at < r[1]; at++ {
			fields = append(fields, at)
		}
	}
	opened := 0
	for range 120 {
		b := bytes.Clone(whole)
		at := fields[rng.IntN(len(fields))]
		b[at] ^= 1 << rng.IntN(8)
		sealed(b, 0)
		copy(b[len(b)-footerSize:], b[:footerSize])
		if b[footerSize] == 'c' {
			var h header
			if h.decode(b[footerSize:footerSize+headerSize]) == nil {
				sealedHeader(b, footerSize)
			}
		}
		if f := (&footer{}); f.decode(b[:footerSize]) != nil || (f.diskType != typeDynamic) {
			continue
		}
		damaged := write(t, b)
		out, stderr, code := formattest.TryOracle(t, "qemu-img", "info", "-f", "vpc", "--output=json", damaged)
		o, err := formattest.TryOpen(t, New(), damaged, sdk.OpenRequest{})
		if (code == 0) != (err == nil) {
			t.Errorf("byte %#x is %#x, was %#x: %v, qemu-img exit %d %s", at, b[at], whole[at], err, code, stderr)
			continue
		}
		if err != nil {
			continue
		}
		opened++
		if want := fmt.Sprintf("\"virtual-size\": %d,", o.Info.VirtualSize); !strings.Contains(out, want) {
			t.Errorf("byte %#x is %#x: %s, qemu-img says %s", at, b[at], want, out)
		}
	}
	if opened < 20 {
		t.Errorf("only %d images opened", opened)
	}
}

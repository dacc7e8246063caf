package qcow2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

func TestCreateErrors(t *testing.T) {
	const mib = 1 << 20
	for _, c := range []struct {
		opts, want string
		size       int64
	}{
		{"cluster_size=511", clusterSizeText, mib},
		{"cluster_size=256", clusterSizeText, mib},
		{"cluster_size=3k", clusterSizeText, mib},
		{"cluster_size=4M", clusterSizeText, mib},
		{"cluster_size=0", clusterSizeText, mib},
		{"refcount_bits=0", refcountBitsText, mib},
		{"refcount_bits=3", refcountBitsText, mib},
		{"refcount_bits=128", refcountBitsText, mib},
		{"refcount_bits=1,compat=v2", "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)", mib},
		{"lazy_refcounts=on,compat=0.10", "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)", mib},
		{"compression_type=zstd,compat=0.10", "Non-zlib compression type is only supported with compatibility level 1.1 and above (use version=v3 or greater)", mib},
		{"extended_l2=on,compat=0.10", "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)", mib},
		{"extended_l2=on,cluster_size=4096", "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes", mib},
		{"backing_fmt=raw", "Backing format cannot be used without backing file", mib},
		{"cluster_size=512", errTooLarge.Text, 1 << 40},
		{"cluster_size=2M", "Could not resize image: Image size cannot be negative", 1<<63 - 1},
		{"cluster_size=2M", "Could not resize image: offset(9223372036854775296) exceeds maximum(9223372035781033984)", 1<<63 - 512},
		{"cluster_size=2M", errTooLarge.Text, 1<<63 - 1<<30},
	} {
		_, err := formattest.TryCreate(t, New(), t.TempDir(), "a.qcow2", c.size, c.opts)
		if err == nil || err.Error() != c.want {
			t.Errorf("size %d, %s: error %q, want %q", c.size, c.opts, err, c.want)
		}
		// The texts are qemu-img's: let it say the same.
		out, qerr := qemuCreate(t, filepath.Join(t.TempDir(), "a.qcow2"), c.size, c.opts)
		if qerr == nil || !strings.Contains(out, c.want) {
			t.Errorf("size %d, %s: qemu-img says %q, want %q", c.size, c.opts, out, c.want)
		}
	}
}

func TestCreateBackingErrors(t *testing.T) {
	plan := func(name, opts string) error {
		_, err := formattest.TryPlan(t, New(), t.TempDir(), "a", 1<<20, opts, func(r *sdk.CreateRequest) { r.BackingName = name })
		return err
	}
	for _, c := range []struct {
		name, opts, want string
	}{
		{strings.Repeat("x", 1024), "", "Invalid argument"},
		{strings.Repeat("x", 500), "cluster_size=512", "No space left on device"},
		{"base", "preallocation=metadata", "Backing file and preallocation can only be used at the same time if extended_l2 is on"},
	} {
		if err := plan(c.name, c.opts); err == nil || !strings.HasSuffix(err.Error(), c.want) {
			t.Errorf("%.10s, %s: error %v, want %q", c.name, c.opts, err, c.want)
		}
	}
	if err := plan(strings.Repeat("x", 1023), ""); err != nil {
		t.Error(err)
	}
}

// qemuCreate runs qemu-img create and returns what it printed.
func qemuCreate(t testing.TB, path string, size int64, opts string) (string, error) {
	t.Helper()
	formattest.Oracle(t, "qemu-img", "--version")
	args := []string{"create", "-q", "-f", "qcow2"}
	if opts != "" {
		args = append(args, "-o", opts)
	}
	return qemuCommand(append(args, path, fmt.Sprint(size))...)
}

func qemuCommand(args ...string) (string, error) {
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	return string(out), err
}

// TestCreateEqualsQemu compares whole files with those that qemu-img makes.
// Clusters that are free again hold remains of former tables in its files and
// are not compared.
func TestCreateEqualsQemu(t *testing.T) {
	cases := []struct {
		size int64
		opts string
	}{
		{0, ""}, {1, ""}, {511, ""}, {512, ""}, {1<<20 - 1, ""}, {1<<20 + 1, ""},
		{2<<30 - 512, ""}, {2<<30 + 512, ""}, {2040 << 30, ""}, {64 << 40, ""},
		{1 << 50, "cluster_size=2M"}, {16 << 30, "cluster_size=512"}, {2 << 30, "cluster_size=512,refcount_bits=64"},
		{1 << 30, "compat=0.10"}, {1 << 30, "compat=v2,cluster_size=4k"}, {1 << 30, "compat=1.1"},
		{1 << 30, "lazy_refcounts=on,compression_type=zstd,refcount_bits=1"},
		{1 << 30, "extended_l2=on"}, {1 << 40, "extended_l2=on,cluster_size=16k"},
		{0, "preallocation=metadata"}, {0, "preallocation=falloc"},
		{1, "preallocation=metadata"}, {513, "preallocation=falloc"}, {70000, "preallocation=full"},
		{64 << 20, "preallocation=metadata,cluster_size=512"},
		{64 << 20, "preallocation=falloc,cluster_size=512"},
		{64 << 20, "preallocation=metadata,cluster_size=512,refcount_bits=64"},
		{64 << 20, "preallocation=full,cluster_size=512,refcount_bits=64"},
		{100 << 20, "preallocation=metadata,cluster_size=1k,refcount_bits=64"},
		{3 << 30, "preallocation=metadata,cluster_size=4k"},
		{100 << 20, "preallocation=falloc,cluster_size=1k,refcount_bits=8"},
		{40 << 30, "preallocation=metadata,cluster_size=2M"},
		{40 << 30, "preallocation=metadata,cluster_size=64k,extended_l2=on"},
		{2 << 30, "preallocation=metadata,cluster_size=16k,extended_l2=on,refcount_bits=64"},
		{200 << 20, "preallocation=falloc,cluster_size=16k,extended_l2=on,refcount_bits=64"},
	}
	r := rand.New(rand.NewPCG(2, 2))
	pick := func(list ...string) string { return list[r.IntN(len(list))] }
	random := 40
	if testing.Short() {
		random = 10
	}
	for range random {
		bits := 9 + r.IntN(13)
		opts := []string{fmt.Sprintf("cluster_size=%d", 1<<bits)}
		add := func(o string) {
			if o != "" {
				opts = append(opts, o)
			}
		}
		if r.IntN(4) == 0 {
			add(pick("compat=0.10", "compat=v2"))
		} else {
			add(pick("", "compat=1.1", "compat=v3"))
			add(fmt.Sprintf("refcount_bits=%d", 1<<r.IntN(7)))
			add(pick("", "lazy_refcounts=on", "lazy_refcounts=off"))
			add(pick("", "compression_type=zstd", "compression_type=zlib"))
			if bits >= 14 {
				add(pick("", "extended_l2=on"))
			}
		}
		add(pick("", "", "preallocation=off", "preallocation=metadata", "preallocation=falloc"))
		// A few thousand clusters, so that every table grows and qemu-img is quick.
		size := r.Int64N(1 << min(bits+12, 29))
		cases = append(cases, struct {
			size int64
			opts string
		}{size, strings.Join(opts, ",")})
	}
	for _, c := range cases {
		t.Run(fmt.Sprintf("%d,%s", c.size, c.opts), func(t *testing.T) {
			dir := memoryDir(t)
			want := filepath.Join(dir, "qemu.qcow2")
			if out, err := qemuCreate(t, want, c.size, c.opts); err != nil {
				t.Fatalf("qemu-img create: %s", out)
			}
			got := formattest.Create(t, New(), dir, "instar.qcow2", c.size, c.opts)
			sameImage(t, got, want)
			if c.size < 1<<36 {
				formattest.Oracle(t, "qemu-img", "check", "-q", got)
			}
		})
	}
}

// memoryDir returns a directory in which qemu-img's many fsyncs cost nothing,
// where there is one.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "instar-qcow2-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// sameImage compares two image files cluster by cluster but for free ones.
func sameImage(t *testing.T, got, want string) {
	t.Helper()
	g, w := mustOpenFile(t, got), mustOpenFile(t, want)
	im := openImage(t, want)
	gs, ws := fileLength(t, g), fileLength(t, w)
	if gs != ws {
		t.Errorf("file is %d bytes long, qemu-img's %d", gs, ws)
	}
	cluster := im.g.clusterSize
	a, b, block := make([]byte, cluster), make([]byte, cluster), make([]byte, cluster)
	index, off := int64(-1), int64(0)
	differ := 0
	for pos := int64(0); pos < ws; pos += cluster {
		// Skip what is a hole in both: preallocated files are large.
		if next := min(dataFrom(t, g, pos), dataFrom(t, w, pos)); next > pos+cluster {
			pos = next &^ (cluster - 1)
		}
		if pos >= ws {
			break
		}
		if i := pos / cluster / im.g.blockEntries; i != index {
			var err error
			if off, err = im.refcountBlock(i); err != nil {
				t.Fatal(err)
			}
			if index = i; off != 0 {
				if err := readZeros(im.main, block, off); err != nil {
					t.Fatal(err)
				}
			}
		}
		if off == 0 || refcountAt(block, pos/cluster%im.g.blockEntries, im.g.order) == 0 {
			continue
		}
		na, err := g.ReadAt(a, pos)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		nb, err := w.ReadAt(b, pos)
		if err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
		if !bytes.Equal(a[:na], b[:nb]) {
			for i := range min(na, nb) {
				if a[i] != b[i] {
					t.Errorf("cluster %d differs from byte %#x on: % x, qemu-img has % x", pos/cluster, pos+int64(i), a[i:min(i+16, na)], b[i:min(i+16, nb)])
					break
				}
			}
			if differ++; differ > 5 {
				t.FailNow()
			}
		}
	}
}

func mustOpenFile(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func fileLength(t *testing.T, f *os.File) int64 {
	t.Helper()
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return fi.Size()
}

// dataFrom returns where the first data at or after off begin.
func dataFrom(t *testing.T, f *os.File, off int64) int64 {
	t.Helper()
	pos, err := f.Seek(off, 3) // SEEK_DATA
	if err != nil {
		return 1 << 62 // ENXIO: only holes
	}
	return pos
}

func openImage(t *testing.T, path string) *image {
	t.Helper()
	return formattest.Open(t, New(), path, false).Image.(*image)
}

// TestCreateMetadataMemory makes a plan of the largest image without going
// through its clusters one by one.
func TestCreateLargePlan(t *testing.T) {
	p, err := formattest.TryPlan(t, New(), t.TempDir(), "a", 1<<50, "preallocation=metadata", nil)
	if err != nil {
		t.Fatal(err)
	}
	tables, clusters := 0, int64(0)
	end, err := p.(*plan).eachMapping(
		func(int64, int64) error { tables++; return nil },
		func(m mapping) error { clusters += m.n; return nil })
	if err != nil {
		t.Fatal(err)
	}
	if tables != 1<<21 || clusters != 1<<34 || end < 1<<50 {
		t.Errorf("%d tables, %d clusters, end %#x", tables, clusters, end)
	}
}

func TestEmitStops(t *testing.T) {
	p, err := formattest.TryPlan(t, New(), t.TempDir(), "a", 1<<30, "preallocation=metadata", nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	f := formattest.MemFile(nil)
	if err := p.Emit(ctx, []sdk.NamedFile{{Role: sdk.RoleMain, File: f}}); !errors.Is(err, context.Canceled) {
		t.Errorf("emit after cancel: %v", err)
	}
}

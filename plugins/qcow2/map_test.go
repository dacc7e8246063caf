package qcow2

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// qemuImage makes an image by qemu-img and qemu-io in dir and fills it with
// writes, zeros, discards and compressed clusters at random.
func qemuImage(t *testing.T, r *rand.Rand, dir, name, opts string, size int64, backing string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	args := []string{"create", "-q", "-f", "qcow2"}
	if opts != "" {
		args = append(args, "-o", opts)
	}
	if backing != "" {
		args = append(args, "-b", backing, "-F", "qcow2")
	}
	formattest.Oracle(t, "qemu-img", append(args, path, fmt.Sprint(size))...)
	qemuWrites(t, r, path, size, 30)
	return path
}

// qemuWrites changes an image at random.
func qemuWrites(t *testing.T, r *rand.Rand, path string, size int64, n int) {
	t.Helper()
	im := openImage(t, path)
	cluster := im.g.clusterSize
	compress := !im.h.dataFile()
	args := []string{"-f", "qcow2", "--cache=unsafe", "-d", "unmap"}
	for range n {
		off := r.Int64N(size) &^ 511
		length := min((r.Int64N(4*cluster)+512)&^511, size-off)
		if r.IntN(2) == 0 {
			off &^= cluster - 1
			length = min((r.Int64N(4)+1)*cluster, size-off)
		}
		if length == 0 {
			continue
		}
		pattern := r.IntN(255) + 1
		switch r.IntN(6) {
		case 0, 1:
			args = append(args, "-c", fmt.Sprintf("write -q -P %d %d %d", pattern, off, length))
		case 2:
			args = append(args, "-c", fmt.Sprintf("write -q -z %d %d", off, length))
		case 3:
			args = append(args, "-c", fmt.Sprintf("write -q -z -u %d %d", off, length))
		case 4:
			args = append(args, "-c", fmt.Sprintf("discard -q %d %d", off, length))
		case 5:
			off &^= cluster - 1
			if compress && off+cluster <= size {
				args = append(args, "-c", fmt.Sprintf("write -q -c -P %d %d %d", pattern, off, cluster))
			}
		}
	}
	// Compressed writes to clusters in use fail, as they should.
	cmd := exec.Command("qemu-io", append(args, path)...)
	if out, err := cmd.CombinedOutput(); err != nil && !strings.Contains(string(out), "write failed: Input/output error") {
		t.Fatalf("qemu-io: %v: %s", err, out)
	}
}

// qemuMapEntry is an entry of qemu-img map --output=json.
type qemuMapEntry struct {
	Start   int64  `json:"start"`
	Length  int64  `json:"length"`
	Present bool   `json:"present"`
	Zero    bool   `json:"zero"`
	Data    bool   `json:"data"`
	Offset  *int64 `json:"offset"`
}

func (e qemuMapEntry) String() string {
	s := fmt.Sprintf("%#x+%#x present=%t zero=%t data=%t", e.Start, e.Length, e.Present, e.Zero, e.Data)
	if e.Offset != nil {
		s += fmt.Sprintf(" offset=%#x", *e.Offset)
	}
	return s
}

// asQemuMap turns our extents of an image without backing file into what
// qemu-img map prints.
func asQemuMap(t *testing.T, extents []sdk.Extent, f *os.File) []qemuMapEntry {
	var list []qemuMapEntry
	for _, e := range extents {
		q := qemuMapEntry{Start: e.Offset, Length: e.Length}
		switch e.Kind {
		case sdk.Absent:
			q.Zero = true
		case sdk.Zero:
			q.Present, q.Zero = true, true
		case sdk.Data, sdk.Encoded:
			q.Present, q.Data = true, true
		}
		if e.Kind != sdk.Encoded && e.HostOffset >= 0 {
			off := e.HostOffset
			q.Offset = &off
		}
		if !e.Sparse {
			list = append(list, q)
			continue
		}
		for off, end := e.HostOffset, e.HostOffset+e.Length; off < end; {
			data := min(dataFrom(t, f, off), end)
			part := q
			part.Start, part.Offset = e.Offset+off-e.HostOffset, &[]int64{off}[0]
			if part.Zero = data > off; part.Zero {
				part.Length = data - off
			} else {
				hole, err := f.Seek(off, 4) // SEEK_HOLE
				if err != nil {
					t.Fatal(err)
				}
				part.Length = min(hole, end) - off
			}
			list = append(list, part)
			off += part.Length
		}
	}
	return mergeQemuMap(list)
}

// mergeQemuMap joins entries that continue each other. We do not say where the
// space of an unallocated subcluster is.
func mergeQemuMap(in []qemuMapEntry) (list []qemuMapEntry) {
	for _, q := range in {
		if !q.Present {
			q.Offset = nil
		}
		if n := len(list); n > 0 {
			last := &list[n-1]
			if last.Present == q.Present && last.Zero == q.Zero && last.Data == q.Data &&
				(last.Offset == nil && q.Offset == nil || last.Offset != nil && q.Offset != nil && *last.Offset+last.Length == *q.Offset) {
				last.Length += q.Length
				continue
			}
		}
		list = append(list, q)
	}
	return list
}

// checkMap compares our map of an image without backing file with qemu-img's.
func checkMap(t *testing.T, path string) {
	t.Helper()
	var want []qemuMapEntry
	out := formattest.Oracle(t, "qemu-img", "map", "--output=json", "-f", "qcow2", path)
	if err := json.Unmarshal([]byte(out), &want); err != nil {
		t.Fatal(err)
	}
	want = mergeQemuMap(want)
	// Not through formattest: its read-only files hide how much they take up.
	f := mustOpenFile(t, path)
	im, err := New().Open(context.Background(), sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: sdk.NewFile(f)}}})
	if err != nil {
		t.Fatal(err)
	}
	var extents []sdk.Extent
	err = im.Map(context.Background(), 0, im.(*image).size, func(e []sdk.Extent) bool {
		extents = append(extents, e...)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	formattest.Open(t, New(), path, false).Map() // the invariants
	got := asQemuMap(t, extents, f)
	for i := range max(len(got), len(want)) {
		g, w := "nothing", "nothing"
		if i < len(got) {
			g = got[i].String()
		}
		if i < len(want) {
			w = want[i].String()
		}
		if g != w {
			t.Errorf("%s: extent %d of %d: %s, qemu-img says %s", filepath.Base(path), i, len(want), g, w)
			return
		}
	}
}

// checkContent compares what Map and Decode read with what qemu-img converts.
func checkContent(t *testing.T, path string) {
	t.Helper()
	raw := path + ".raw"
	formattest.Oracle(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
	defer os.Remove(raw)
	want, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	o := formattest.Open(t, New(), path, false)
	got := o.Read(0, o.Info.VirtualSize)
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("%s: guest byte %#x is %#x, qemu-img has %#x", filepath.Base(path), i, got[i], want[i])
		}
	}
}

var mapOptions = []string{
	"", "compat=0.10", "cluster_size=512", "cluster_size=4k,refcount_bits=1", "cluster_size=2M",
	"extended_l2=on", "extended_l2=on,cluster_size=16k,compression_type=zstd",
	"compression_type=zstd", "cluster_size=4k,compression_type=zstd,refcount_bits=64",
	"preallocation=metadata,cluster_size=16k", "preallocation=metadata,extended_l2=on,cluster_size=32k",
	"lazy_refcounts=on,cluster_size=8k",
}

func TestMapEqualsQemu(t *testing.T) {
	rounds := 4
	if testing.Short() {
		rounds = 1
	}
	for _, opts := range mapOptions {
		t.Run(strings.ReplaceAll(opts, "=", "-"), func(t *testing.T) {
			for round := range rounds {
				r := rand.New(rand.NewPCG(uint64(round), 3))
				dir := memoryDir(t)
				size := int64(3<<20) + r.Int64N(64)*512
				path := qemuImage(t, r, dir, "a.qcow2", opts, size, "")
				checkMap(t, path)
				checkContent(t, path)
			}
		})
	}
}

func TestRun(t *testing.T) {
	g := newGeometry(16, false, 4)
	const plain = flagCopied | 0x50000
	for _, c := range []struct {
		name    string
		entries []uint64
		want    int64
	}{
		{"one", []uint64{plain}, 1},
		{"in a row", []uint64{plain, plain + 0x10000, plain + 0x20000, plain}, 3},
		{"nothing", []uint64{0, 0, 0, plain}, 3},
		{"another flag", []uint64{plain, (plain + 0x10000) &^ flagCopied}, 1},
		{"zero clusters", []uint64{plain | flagZero, plain + 0x10000 | flagZero}, 1},
		{"a zero cluster ends it", []uint64{plain, plain + 0x10000 | flagZero}, 1},
		{"compressed", []uint64{flagCompressed | 0x10000, flagCompressed | 0x20000}, 1},
		{"flags are not counted up", []uint64{offsetMask &^ 0xffff, 1 << 56}, 1},
		{"an external data file's first cluster", []uint64{flagCopied, flagCopied | 0x10000}, 1},
	} {
		var b []byte
		for _, e := range c.entries {
			b = binary.BigEndian.AppendUint64(b, e)
		}
		if got := g.run(b); got != c.want {
			t.Errorf("%s: %d, want %d", c.name, got, c.want)
		}
	}
}

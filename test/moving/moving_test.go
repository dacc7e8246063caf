// Package moving proves convert and dd end to end: the built programs move
// random disks between all formats, and qemu-img, 7z and the libyal tools say
// whether what came out is what went in.
package moving

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
)

// instar is the built program.
func instar(t testing.TB) string {
	t.Helper()
	p, err := filepath.Abs("../../bin/instar")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("the programs are not built (%v): run make build", err)
	}
	return p
}

// must runs a program in dir and returns what it printed.
func must(t testing.TB, dir, program string, args ...string) string {
	t.Helper()
	out, err := run(dir, program, args...)
	if err != nil {
		if p := formattest.Package(program); p != "" {
			t.Fatalf("%s %q (Debian package %s): %v\n%s", program, args, p, err, out)
		}
		t.Fatalf("%s %q: %v\n%s", program, args, err, out)
	}
	return out
}

func run(dir, program string, args ...string) (string, error) {
	cmd := exec.Command(program, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// silent runs instar, which must succeed and print nothing.
func silent(t testing.TB, dir string, args ...string) {
	t.Helper()
	if out := must(t, dir, instar(t), args...); out != "" {
		t.Fatalf("instar %q printed %q", args, out)
	}
}

// randomDisk writes a disk of runs of data, repeated bytes, zeros and holes.
func randomDisk(t testing.TB, path string, size int64, seed uint64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(seed, 1))
	for off := int64(0); off < size; {
		n := min(512*(1+r.Int64N(1<<r.IntN(11))), size-off)
		b := make([]byte, n)
		switch r.IntN(4) {
		case 0: // a hole
			off += n
			continue
		case 1: // zeros that are stored
		case 2: // compressible
			for i := range b {
				b[i] = byte(i / 100)
			}
		default:
			for i := range b {
				b[i] = byte(r.Uint32())
			}
		}
		if _, err := f.WriteAt(b, off); err != nil {
			t.Fatal(err)
		}
		off += n
	}
}

// allocated returns the disk space of files, in bytes.
func allocated(t testing.TB, paths ...string) int64 {
	t.Helper()
	var sum int64
	for _, p := range paths {
		fi, err := os.Stat(p)
		if err != nil {
			t.Fatal(err)
		}
		sum += fi.Sys().(*syscall.Stat_t).Blocks * 512
	}
	return sum
}

// target is a way to write an image.
type target struct {
	name, format string
	args         []string
	check        bool // qemu-img check knows the format
	exact        bool // sizes are kept as they are
}

var targets = []target{
	{name: "raw", format: "raw", exact: true},
	{name: "qcow2", format: "qcow2", check: true, exact: true},
	{name: "qcow2-512", format: "qcow2", args: []string{"-o", "cluster_size=512"}, check: true, exact: true},
	{name: "qcow2-2M", format: "qcow2", args: []string{"-o", "cluster_size=2M"}, check: true, exact: true},
	{name: "qcow2-subclusters", format: "qcow2", args: []string{"-o", "extended_l2=on,cluster_size=128k"}, check: true, exact: true},
	{name: "qcow2-v2", format: "qcow2", args: []string{"-o", "compat=0.10"}, check: true, exact: true},
	{name: "qcow2-refcounts-1", format: "qcow2", args: []string{"-o", "refcount_bits=1"}, check: true, exact: true},
	{name: "qcow2-prealloc", format: "qcow2", args: []string{"-o", "preallocation=metadata"}, check: true, exact: true},
	{name: "qcow2-zlib", format: "qcow2", args: []string{"-c"}, check: true, exact: true},
	{name: "qcow2-zstd", format: "qcow2", args: []string{"-c", "-o", "compression_type=zstd"}, check: true, exact: true},
	{name: "vmdk", format: "vmdk", check: true, exact: true},
	{name: "vmdk-flat", format: "vmdk", args: []string{"-o", "subformat=monolithicFlat"}, exact: true},
	{name: "vmdk-split-sparse", format: "vmdk", args: []string{"-o", "subformat=twoGbMaxExtentSparse"}, exact: true},
	{name: "vmdk-split-flat", format: "vmdk", args: []string{"-o", "subformat=twoGbMaxExtentFlat"}, exact: true},
	{name: "vmdk-stream", format: "vmdk", args: []string{"-o", "subformat=streamOptimized"}, exact: true},
	{name: "vpc", format: "vpc", args: []string{"-o", "force_size=on"}, exact: true},
	{name: "vpc-fixed", format: "vpc", args: []string{"-o", "subformat=fixed,force_size=on"}, exact: true},
	{name: "vpc-geometry", format: "vpc"},
	{name: "vhdx", format: "vhdx", check: true, exact: true},
	{name: "vhdx-1M", format: "vhdx", args: []string{"-o", "block_size=1M"}, check: true, exact: true},
	{name: "vhdx-fixed", format: "vhdx", args: []string{"-o", "subformat=fixed"}, check: true, exact: true},
}

// TestMatrix converts a random disk into every target, every target into raw
// and into another format, and compares.
func TestMatrix(t *testing.T) {
	for i, tt := range targets {
		t.Run(tt.name, func(t *testing.T) {
			// Odd sizes: no multiple of any unit, always of a sector.
			size := int64(3<<20 + 512*(1+97*i))
			dir := t.TempDir()
			randomDisk(t, filepath.Join(dir, "disk.raw"), size, uint64(i))
			to := append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...)
			silent(t, dir, append(to, "disk.raw", "ours")...)
			compare(t, dir, tt, "disk.raw", "ours")
			if tt.check {
				must(t, dir, "qemu-img", "check", "-f", tt.format, "ours")
			}
			silent(t, dir, "convert", "-f", tt.format, "-O", "raw", "ours", "back.raw")
			if tt.exact {
				must(t, dir, "cmp", "disk.raw", "back.raw")
			}
			next := targets[(i+7)%len(targets)]
			silent(t, dir, append(append([]string{"convert", "-f", tt.format, "-O", next.format}, next.args...), "ours", "next")...)
			next.exact = next.exact && tt.exact
			compare(t, dir, next, "disk.raw", "next")

			// What qemu-img writes is read the same, and is not much smaller.
			must(t, dir, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...), "disk.raw", "theirs")...)
			silent(t, dir, "convert", "-f", tt.format, "-O", "raw", "theirs", "theirs.raw")
			if tt.exact {
				must(t, dir, "cmp", "disk.raw", "theirs.raw")
			}
			notLarger(t, dir, tt.name, "ours", "theirs")
		})
	}
}

// compare has qemu-img compare a raw disk with an image of it.
func compare(t *testing.T, dir string, tt target, disk, image string) {
	t.Helper()
	out, err := run(dir, "qemu-img", "compare", "-f", "raw", "-F", tt.format, disk, image)
	if err != nil || !strings.Contains(out, "Images are identical.") {
		t.Fatalf("%s: qemu-img compare: %v\n%s", tt.name, err, out)
	}
	if tt.exact && strings.Contains(out, "Warning") {
		t.Fatalf("%s: %s", tt.name, out)
	}
}

// parts returns an image and the files that belong to it.
func parts(t *testing.T, dir, image string) []string {
	t.Helper()
	more, err := filepath.Glob(filepath.Join(dir, image+"-*"))
	if err != nil {
		t.Fatal(err)
	}
	return append(more, filepath.Join(dir, image))
}

// TestChains converts through backing files, whole and onto another base.
func TestChains(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "base.raw"), 4<<20, 1)
	must(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "mid.qcow2", "5M")
	must(t, dir, "qemu-io", "-c", "write -P 7 1M 300k", "-c", "write -z 2M 256k", "-c", "write -P 8 4608k 64k", "mid.qcow2")
	must(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "6M")
	must(t, dir, "qemu-io", "-c", "write -P 9 100k 4k", "-c", "write -z 1M 4k", "-c", "discard 3M 128k", "top.qcow2")
	for _, tt := range targets {
		silent(t, dir, append(append([]string{"convert", "-O", tt.format}, tt.args...), "top.qcow2", "out."+tt.name)...)
		out, err := run(dir, "qemu-img", "compare", "-F", tt.format, "top.qcow2", "out."+tt.name)
		if err != nil || !strings.Contains(out, "Images are identical.") {
			t.Errorf("%s: %v %s", tt.name, err, out)
		}
	}
	// Onto the middle, and onto a base that is another disk altogether.
	silent(t, dir, "convert", "-O", "qcow2", "-B", "mid.qcow2", "-F", "qcow2", "top.qcow2", "over.qcow2")
	must(t, dir, "qemu-img", "compare", "top.qcow2", "over.qcow2")
	randomDisk(t, filepath.Join(dir, "other.raw"), 7<<20, 2)
	silent(t, dir, "convert", "-O", "qcow2", "-B", "other.raw", "-F", "raw", "top.qcow2", "other.qcow2")
	must(t, dir, "qemu-img", "compare", "top.qcow2", "other.qcow2")
	for _, f := range []string{"over.qcow2", "other.qcow2"} {
		must(t, dir, "qemu-img", "check", f)
	}
}

// TestFarOffsets moves data at offsets that 32 bits do not hold, into images that
// take no more space for it.
func TestFarOffsets(t *testing.T) {
	const most = 16 << 20
	dir := t.TempDir()
	for _, disk := range []struct {
		size    string
		last    string
		targets string
	}{
		{"5T", "5497558073344", "raw qcow2 qcow2-zlib vmdk vmdk-flat vmdk-stream vhdx"},
		// The most that a VHD holds, and as many files as a split VMDK should have.
		{"2040G", "2190433255424", "vpc vpc-fixed vmdk-split-sparse vmdk-split-flat"},
	} {
		must(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "far.img", disk.size)
		must(t, dir, "qemu-io", "-c", "write -P 1 4G 64k", "-c", "write -P 2 2139023255552 1M", "-c", "write -P 3 "+disk.last+" 64k", "far.img")
		for _, tt := range targets {
			if !slices.Contains(strings.Fields(disk.targets), tt.name) {
				continue
			}
			silent(t, dir, append(append([]string{"convert", "-f", "qcow2", "-O", tt.format}, tt.args...), "far.img", "out")...)
			must(t, dir, "qemu-io", "-r", "-f", tt.format, "-c", "read -P 1 4G 64k", "-c", "read -P 2 2139023255552 1M",
				"-c", "read -P 3 "+disk.last+" 64k", "-c", "read -P 0 1T 1M", "out")
			if tt.check {
				must(t, dir, "qemu-img", "check", "-f", tt.format, "out")
			}
			if tt.format != "raw" {
				must(t, dir, instar(t), "check", "-f", tt.format, "out")
			}
			if n := allocated(t, parts(t, dir, "out")...); n > most {
				t.Errorf("%s: %d bytes for 1.2 MB of data", tt.name, n)
			}
			remove(t, dir, "out")
		}
	}
}

// TestReadByOthers has 7z, and the tools of the file systems inside, read what
// convert wrote.
func TestReadByOthers(t *testing.T) {
	want := bytes.Repeat([]byte("what the guest wrote\n"), 20000)
	for _, fs := range []struct {
		name string
		make [][]string // fs.raw, with file.txt in it
		cat  []string
	}{
		{"ext4", [][]string{{"mkfs.ext4", "-q", "-F", "-d", "tree", "fs.raw", "16M"}}, []string{"debugfs", "-R", "cat /file.txt", "back.raw"}},
		{"NTFS", [][]string{
			{"truncate", "-s", "16M", "fs.raw"},
			{"mkfs.ntfs", "-q", "-F", "-Q", "-s", "512", "-p", "0", "-H", "0", "-S", "0", "fs.raw"},
			{"ntfscp", "-q", "fs.raw", "tree/file.txt", "file.txt"},
		}, []string{"ntfscat", "back.raw", "file.txt"}},
	} {
		t.Run(fs.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Mkdir(filepath.Join(dir, "tree"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "tree", "file.txt"), want, 0o644); err != nil {
				t.Fatal(err)
			}
			for _, args := range fs.make {
				must(t, dir, args[0], args[1:]...)
			}
			readByOthers(t, dir, fs.cat, string(want))
		})
	}
}

// readByOthers converts fs.raw to each target and back; cat then prints want.
func readByOthers(t *testing.T, dir string, cat []string, want string) {
	t.Helper()
	for _, tt := range targets {
		if tt.name == "vpc-geometry" {
			continue // another size than the file system's
		}
		silent(t, dir, append(append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...), "fs.raw", "img")...)
		silent(t, dir, "convert", "-f", tt.format, "-O", "raw", "img", "back.raw")
		if got := must(t, dir, cat[0], cat[1:]...); !strings.Contains(got, want) {
			t.Errorf("%s: the file inside is not what it was", tt.name)
		}
		if tt.format == "qcow2" && !strings.Contains(tt.name, "zstd") && !strings.Contains(tt.name, "subclusters") || tt.format == "vpc" || tt.name == "vmdk" || tt.name == "vmdk-stream" || tt.format == "vhdx" {
			sevenZip(t, dir, tt, "img", "fs.raw")
		}
		remove(t, dir, "img")
	}
}

// sevenZip has 7z extract the disk inside an image and compares it.
func sevenZip(t *testing.T, dir string, tt target, image, disk string) {
	t.Helper()
	kind := map[string]string{"vpc": "VHD", "vhdx": "VHDX", "vmdk": "VMDK", "qcow2": "QCOW"}[tt.format]
	cmd := exec.Command("7z", "e", "-so", "-t"+kind, image)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("%s: 7z (Debian package p7zip-full): %v", tt.name, err)
		return
	}
	want, err := os.ReadFile(filepath.Join(dir, disk))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(out, want) {
		t.Errorf("%s: 7z reads %d bytes that are not the disk's %d", tt.name, len(out), len(want))
	}
}

// TestInPlace writes over images that hold something else, which stays behind
// the source's end.
func TestInPlace(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 4<<20, 3)
	randomDisk(t, filepath.Join(dir, "old.raw"), 5<<20, 4)
	must(t, dir, "cp", "old.raw", "want.raw")
	must(t, dir, "dd", "if=disk.raw", "of=want.raw", "bs=1M", "conv=notrunc", "status=none")
	for _, tt := range targets {
		if tt.name == "vmdk-stream" || strings.Contains(strings.Join(tt.args, " "), "-c") {
			continue // not written twice
		}
		must(t, dir, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...), "old.raw", "img")...)
		must(t, dir, "qemu-img", append(append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...), "old.raw", "theirs")...)
		if out, err := run(dir, instar(t), "convert", "-n", "-f", "raw", "-O", tt.format, "disk.raw", "img"); err != nil {
			t.Errorf("%s: %v %s", tt.name, err, out)
			continue
		}
		compare(t, dir, tt, "want.raw", "img")
		must(t, dir, "qemu-img", "convert", "-n", "-f", "raw", "-O", tt.format, "disk.raw", "theirs")
		notLarger(t, dir, tt.name, "img", "theirs")
		if tt.check {
			must(t, dir, "qemu-img", "check", "-f", tt.format, "img")
		}
	}
}

// TestInPlaceOverBacking writes into overlays that are new, and that hold something
// else: what comes out is the source, and what it has in common with the backing
// file is not stored again.
func TestInPlaceOverBacking(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "base.raw"), 8<<20, 31)
	randomDisk(t, filepath.Join(dir, "old.raw"), 8<<20, 32)
	randomDisk(t, filepath.Join(dir, "new.raw"), 8<<20, 33)
	must(t, dir, "cp", "base.raw", "disk.raw")
	must(t, dir, "dd", "if=new.raw", "of=disk.raw", "bs=1M", "skip=1", "seek=1", "count=2", "conv=notrunc", "status=none")
	must(t, dir, "dd", "if=/dev/zero", "of=disk.raw", "bs=64k", "seek=80", "count=10", "conv=notrunc", "status=none")
	must(t, dir, "cp", "base.raw", "other.raw")
	for _, tt := range []target{
		{name: "qcow2", format: "qcow2"},
		{name: "qcow2-4k", format: "qcow2", args: []string{"-o", "cluster_size=4k"}},
		{name: "qcow2-1M", format: "qcow2", args: []string{"-o", "cluster_size=1M"}},
		{name: "qcow2-extended", format: "qcow2", args: []string{"-o", "extended_l2=on,cluster_size=128k"}},
	} {
		for _, old := range []string{"base.raw", "old.raw"} {
			for _, more := range [][]string{nil, {"-c"}} {
				overlay := append(append([]string{"convert", "-f", "raw", "-O", tt.format, "-B", "base.raw", "-F", "raw"}, tt.args...), more...)
				must(t, dir, instar(t), append(overlay, old, "img")...)
				must(t, dir, instar(t), append(overlay, "disk.raw", "fresh")...)
				silent(t, dir, append(append([]string{"convert", "-n", "-f", "raw", "-O", tt.format, "-B", "base.raw", "-F", "raw"}, more...), "disk.raw", "img")...)
				compare(t, dir, tt, "disk.raw", "img")
				must(t, dir, "qemu-img", "check", "-f", tt.format, "img")
				if n, most := allocated(t, filepath.Join(dir, "img")), allocated(t, filepath.Join(dir, "fresh"))+1<<20; old == "base.raw" && n > most {
					t.Errorf("%s %v: %d bytes are stored, %d are enough", tt.name, more, n, most)
				}
			}
		}
		for _, wrong := range [][]string{{"other.raw", "raw"}, {"base.raw", "qcow2"}} {
			out, err := run(dir, instar(t), "convert", "-n", "-f", "raw", "-O", tt.format, "-B", wrong[0], "-F", wrong[1], "disk.raw", "img")
			if err == nil || !strings.Contains(out, "the output's backing file is") {
				t.Errorf("%s: %v %s", wrong, err, out)
			}
		}
	}
}

// TestInPlaceZeros writes zeros over images that are full, whose space the host
// gets back.
func TestInPlaceZeros(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "old.raw"), 8<<20, 23)
	must(t, dir, "truncate", "-s", "8M", "zero.raw")
	for _, tt := range targets {
		if tt.name == "vmdk-stream" || tt.name == "vhdx-fixed" || !tt.exact {
			continue // not written twice; not to become smaller; larger than the source
		}
		silent(t, dir, append(append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...), "old.raw", "img")...)
		silent(t, dir, "convert", "-n", "-f", "raw", "-O", tt.format, "zero.raw", "img")
		compare(t, dir, tt, "zero.raw", "img")
		if tt.format != "raw" && tt.name != "qcow2-zlib" && tt.name != "qcow2-zstd" {
			must(t, dir, instar(t), "check", "-f", tt.format, "img")
		}
		most := int64(2 << 20)
		if tt.name == "qcow2-2M" {
			most = 9 << 20 // tables of whole clusters, as with qemu-img
		}
		if n := allocated(t, parts(t, dir, "img")...); n > most {
			t.Errorf("%s: %d bytes are left", tt.name, n)
		}
		remove(t, dir, "img")
	}
}

// TestReproducible converts twice and compares every byte of every file.
func TestReproducible(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	randomDisk(t, filepath.Join(dir, "disk.raw"), 3<<20, 5)
	for _, tt := range targets {
		var sums []string
		for range 2 {
			silent(t, dir, append(append([]string{"convert", "--reproducible", "-f", "raw", "-O", tt.format}, tt.args...), "disk.raw", "img")...)
			sum := sha256.New()
			for _, p := range parts(t, dir, "img") {
				f, err := os.Open(p)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := io.Copy(sum, f); err != nil {
					t.Fatal(err)
				}
				f.Close()
				if err := os.Remove(p); err != nil {
					t.Fatal(err)
				}
			}
			sums = append(sums, fmt.Sprintf("%x", sum.Sum(nil)))
		}
		if sums[0] != sums[1] {
			t.Errorf("%s: two outputs of one input differ", tt.name)
		}
	}
}

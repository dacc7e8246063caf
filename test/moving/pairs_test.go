package moving

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
)

// TestEveryPair converts every form of an image into every other.
func TestEveryPair(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 1<<20+512*1237, 20)
	for _, from := range targets {
		source := from.name + ".img"
		silent(t, dir, append(append([]string{"convert", "-f", "raw", "-O", from.format}, from.args...), "disk.raw", source)...)
		t.Run(from.name, func(t *testing.T) {
			for _, to := range targets {
				silent(t, dir, append(append([]string{"convert", "-f", from.format, "-O", to.format}, to.args...), source, "new")...)
				to.name, to.exact = from.name+" to "+to.name, to.exact && from.exact
				compare(t, dir, to, "disk.raw", "new")
				remove(t, dir, "new")
			}
		})
	}
}

// remove removes an image and the files that belong to it.
func remove(t *testing.T, dir, image string) {
	t.Helper()
	for _, p := range parts(t, dir, image) {
		if err := os.Remove(p); err != nil {
			t.Fatal(err)
		}
	}
}

// notLarger compares the space of an image with that of qemu-img's.
func notLarger(t *testing.T, dir, what, ours, theirs string) {
	t.Helper()
	if a, b := allocated(t, parts(t, dir, ours)...), allocated(t, parts(t, dir, theirs)...); a > b+1<<20 {
		t.Errorf("%s: ours occupies %d bytes, qemu-img's %d", what, a, b)
	}
}

// TestOddSizes converts raw disks that end inside a sector, which all readers
// fill up with zeros.
func TestOddSizes(t *testing.T) {
	dir := t.TempDir()
	for _, size := range []int64{1, 511, 513, 65537, 1<<20 + 777} {
		randomDisk(t, filepath.Join(dir, "disk.raw"), size, uint64(size))
		must(t, dir, "cp", "disk.raw", "whole.raw")
		if err := os.Truncate(filepath.Join(dir, "whole.raw"), (size+511)/512*512); err != nil {
			t.Fatal(err)
		}
		for _, tt := range targets {
			tt.exact = tt.exact && tt.format != "raw"
			silent(t, dir, append(append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...), "disk.raw", "new")...)
			tt.name = fmt.Sprintf("%s of %d bytes", tt.name, size)
			compare(t, dir, tt, "whole.raw", "new")
			remove(t, dir, "new")
		}
	}
}

// TestSpace bounds the space of what -S and -B leave out by what qemu-img takes.
func TestSpace(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 6<<20, 21)
	for _, sparse := range []string{"0", "512", "4k", "64k", "1M"} {
		for _, format := range []string{"raw", "qcow2", "vmdk", "vpc", "vhdx"} {
			args := []string{"convert", "-S", sparse, "-f", "raw", "-O", format, "disk.raw"}
			silent(t, dir, append(args, "ours")...)
			must(t, dir, "qemu-img", append(args, "theirs")...)
			compare(t, dir, target{name: format + " -S " + sparse, format: format}, "disk.raw", "ours")
			notLarger(t, dir, format+" -S "+sparse, "ours", "theirs")
		}
	}
	must(t, dir, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "disk.raw", "base.qcow2")
	must(t, dir, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "7M")
	must(t, dir, "qemu-io", "-c", "write -P 3 1M 100k", "-c", "write -z 2M 128k", "-c", "write -P 4 6500k 64k", "top.qcow2")
	args := []string{"convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2"}
	silent(t, dir, append(args, "ours")...)
	must(t, dir, "qemu-img", append(args, "theirs")...)
	must(t, dir, "qemu-img", "compare", "top.qcow2", "ours")
	notLarger(t, dir, "-B", "ours", "theirs")
}

// libyal is the program that shows a format's content as a file, and the images
// that it does not read.
var libyal = map[string]struct{ program, not string }{
	"qcow2": {program: "qcowmount", not: "qcow2-zstd qcow2-subclusters"},
	"vmdk":  {program: "vmdkmount", not: "vmdk-flat vmdk-split-sparse vmdk-split-flat"},
	"vpc":   {program: "vhdimount"},
	"vhdx":  {program: "vhdimount"},
}

// TestReadByLibyal has the libyal tools read what convert wrote.
func TestReadByLibyal(t *testing.T) {
	fuse, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("the libyal tools show content through FUSE: %v", err)
	}
	fuse.Close()
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 3<<20+512*77, 22)
	if err := os.Mkdir(filepath.Join(dir, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range targets {
		tool, ok := libyal[tt.format]
		if !ok || !tt.exact || strings.Contains(" "+tool.not+" ", " "+tt.name+" ") {
			continue
		}
		silent(t, dir, append(append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...), "disk.raw", "img")...)
		if _, err := exec.LookPath(tool.program); err != nil {
			t.Fatalf("%s is missing: install Debian's %s", tool.program, formattest.Package(tool.program))
		}
		if out, err := run(dir, tool.program, "img", "mnt"); err != nil {
			t.Errorf("%s: %s: %v %s", tt.name, tool.program, err, out)
			continue
		}
		shown, err := filepath.Glob(filepath.Join(dir, "mnt", "*1"))
		if err != nil || len(shown) != 1 {
			t.Errorf("%s: %s shows %v (%v)", tt.name, tool.program, shown, err)
		} else if out, err := run(dir, "cmp", "disk.raw", shown[0]); err != nil {
			t.Errorf("%s: %s reads something else: %s", tt.name, tool.program, out)
		}
		must(t, dir, "umount", "mnt")
		remove(t, dir, "img")
	}
}

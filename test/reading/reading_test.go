//go:build linux

// Package reading compares the reading verbs of the built programs in bin with
// qemu-img 10, whose layout is the default, on images of every kind.
// test/differential does so with the installed qemu-img on random images.
package reading

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk/formattest"
)

// qemuImg10 returns the command that starts qemu-img 10 out of the root that
// .ci/qemu10-root has made.
func qemuImg10(t *testing.T) []string {
	t.Helper()
	root := os.Getenv("INSTAR_QEMU10_ROOT")
	if root == "" {
		root = "/var/tmp/instar-qemu10"
	}
	tool := filepath.Join(root, "usr/bin/qemu-img")
	if _, err := os.Stat(tool); err != nil {
		if os.Getenv("INSTAR_QEMU10_ROOT") != "" {
			t.Fatalf("INSTAR_QEMU10_ROOT has no qemu-img: %v", err)
		}
		t.Skip("NOT COMPARED with qemu-img 10: run .ci/qemu10-root as root to have one")
	}
	// Started by its own loader it needs neither chroot nor root's rights.
	loader, err := filepath.Glob(filepath.Join(root, "usr/lib/*/ld-linux-*.so.*"))
	if err != nil || len(loader) != 1 {
		t.Fatalf("%s: no loader: %v, %v", root, loader, err)
	}
	return []string{loader[0], "--library-path", filepath.Dir(loader[0]), tool}
}

// program returns the path of the built instar.
func program(t *testing.T) string {
	t.Helper()
	instar, err := filepath.Abs("../../bin/instar")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(instar); err != nil {
		t.Fatalf("%v: run `make build` first", err)
	}
	return instar
}

// outcome is what a caller sees of a command.
type outcome struct {
	Code           int
	Stdout, Stderr string
}

func run(t *testing.T, dir string, argv ...string) outcome {
	t.Helper()
	return runAs(t, dir, "10.0", argv...)
}

// runAs runs a command, instar as the given version of qemu-img.
func runAs(t *testing.T, dir, version string, argv ...string) outcome {
	t.Helper()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C", "INSTAR_QEMU_VERSION="+version)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%q: %v", argv, err)
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// images makes one image of every kind, by the installed qemu-utils.
const images = `
qemu-img create -q -f raw plain.raw 8M
qemu-io -f raw -c 'write 1M 1M' plain.raw
qemu-img create -q -f raw odd.raw 1000
qemu-img create -q -f raw empty.raw 0
qemu-img create -q -f qcow2 base.qcow2 3M
qemu-io -c 'write 0 1M' -c 'write -c 2M 64k' base.qcow2
qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2
qemu-io -c 'write 1M 64k' -c 'write -z 1536k 64k' -c 'discard 0 64k' mid.qcow2
qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2 5M
qemu-img snapshot -c one top.qcow2
qemu-img snapshot -c 'a name that is rather longer than its column' top.qcow2
qemu-img bitmap --add top.qcow2 bm
qemu-img bitmap --add --disable -g 4k top.qcow2 off
qemu-img create -q -f qcow2 -u -b ../elsewhere.raw -F raw moved.qcow2 77M
qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1G
qemu-img create -q -f qcow2 -o compression_type=zstd,extended_l2=on,refcount_bits=64,cluster_size=2M zstd.qcow2 5G
qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=on data.qcow2 1234567K
qemu-img create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 4M
qemu-img create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=aes,encrypt.key-secret=s aes.qcow2 4M
qemu-img create -q -f qcow2 -o lazy_refcounts=on dirty.qcow2 4M
sh -c "qemu-io -c 'write 0 1M' -c abort dirty.qcow2" || true
qemu-img create -q -f vmdk sparse.vmdk 9M
qemu-io -f vmdk -c 'write 1M 1M' sparse.vmdk
qemu-img create -q -f vmdk -b sparse.vmdk -F vmdk over.vmdk
qemu-img convert -O vmdk -o subformat=streamOptimized base.qcow2 stream.vmdk
qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 9M
qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentFlat split.vmdk 5G
qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse many.vmdk 21G
qemu-img create -q -f vpc dynamic.vpc 8M
qemu-io -f vpc -c 'write 1M 1M' dynamic.vpc
qemu-img create -q -f vpc -o subformat=fixed fixed.vpc 8M
qemu-img create -q -f vhdx dynamic.vhdx 8M
qemu-img create -q -f vhdx -o subformat=fixed fixed.vhdx 8M
ln -s base.qcow2 link.qcow2
`

// TestLayout10 wants every byte and exit code to be qemu-img 10's.
func TestLayout10(t *testing.T) {
	qemu := qemuImg10(t)
	instar := program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, images)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name := e.Name()
		if strings.Contains(name, "-s0") || strings.Contains(name, "-f0") {
			continue // parts of an image
		}
		t.Run(name, func(t *testing.T) {
			for _, verb := range [][]string{
				{"info"},
				{"info", "--output=json"},
				{"info", "--backing-chain"},
				{"info", "--backing-chain", "--output=json"},
				{"map"},
				{"map", "--output=json"},
				{"check"},
				{"check", "--output=json"},
				{"measure", "-O", "raw"},
				{"measure", "-O", "qcow2"},
				{"compare", "base.qcow2"},
				{"compare", "-s", name},
			} {
				if why := unlike(verb[0], name); why != "" {
					t.Logf("%s: %s", verb[0], why)
					continue
				}
				args := append(append([]string{}, verb...), name)
				want := run(t, dir, append(append([]string{}, qemu...), args...)...)
				got := run(t, dir, append([]string{instar}, args...)...)
				want.Stderr = strings.ReplaceAll(want.Stderr, "qemu-img: ", "instar: ")
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%q (-qemu-img +instar):\n%s", args, diff)
				}
			}
		})
	}
}

// unlike says why a verb may differ on an image, or returns ""
// (docs/divergences.md).
func unlike(verb, name string) string {
	switch {
	case strings.HasSuffix(name, ".vhdx") && (verb == "map" || verb == "measure" || verb == "compare"):
		return "qemu-img takes all of a VHDX for data"
	case strings.HasSuffix(name, ".vpc") && verb == "check":
		return "qemu-img cannot check VHDs"
	case verb == "check" && (name == "luks.qcow2" || name == "aes.qcow2" || name == "moved.qcow2"):
		return "a check needs neither key nor backing file"
	}
	return ""
}

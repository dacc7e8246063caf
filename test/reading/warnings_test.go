//go:build linux

package reading

import (
	"encoding/binary"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk/formattest"
)

// TestBitmapWarning: an image whose bitmaps do not count any more.
func TestBitmapWarning(t *testing.T) {
	qemuImg72(t)
	instar := program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, `
qemu-img create -q -f qcow2 three 1M
qemu-img bitmap --add three bm
qemu-img create -q -f qcow2 -o compat=0.10 two 1M
qemu-img create -q -f qcow2 -b three -F qcow2 over
`)
	put(t, filepath.Join(dir, "three"), binary.BigEndian, 88, uint64(0)) // autoclear features
	// Behind the header of version 2: bitmaps, 24 bytes of them, and the end.
	put(t, filepath.Join(dir, "two"), binary.BigEndian, 72, uint32(0x23852875), uint32(24), uint32(1), uint32(0), uint64(32), uint64(1<<20), uint64(0))
	for _, line := range []string{
		"info three", "info --output=json three", "map three", "check three", "measure -O raw three", "compare three two", "info two", "check two",
		"info --backing-chain over", "map over", "info over", "convert -O raw over out", "dd -O raw if=three of=out", "check -r all three", "info three",
	} {
		args := strings.Fields(line)
		if args[0] == "check" && args[1] == "-r" {
			// qemu-img drops the extension then, instar keeps the file as it was.
			if got := runAs(t, dir, "7.2", append([]string{instar}, args...)...); !strings.Contains(got.Stderr, "warning: a program lacking") {
				t.Errorf("%s: %+v", line, got)
			}
			continue
		}
		want, got := runAs(t, dir, "7.2", append([]string{"qemu-img"}, args...)...), runAs(t, dir, "7.2", append([]string{instar}, args...)...)
		// qemu-img ends the advice without a line end, and gives it no prefix.
		want.Stderr = strings.ReplaceAll(likeInstar(strings.ReplaceAll(want.Stderr, "to fix.", "to fix.\n")), "Some clusters", "instar: warning: Some clusters")
		want.Stderr = strings.ReplaceAll(want.Stderr, "qemu-img: ", "instar: ")
		if args[0] != "info" && !strings.Contains(want.Stderr, "warning: ") {
			t.Errorf("%s: qemu-img does not warn: %+v", line, want)
		}
		want.Stderr = strings.ReplaceAll(want.Stderr, "'instar check -r'", "'qemu-img check -r'")
		got.Stderr = strings.ReplaceAll(got.Stderr, "'instar check -r'", "'qemu-img check -r'")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-qemu-img +instar):\n%s", line, diff)
		}
	}
}

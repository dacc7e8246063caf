//go:build linux

package differential

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// changing matches what a reader prints that differs between two runs of one
// program: random ids, dates, the reader's own version.
var changing = regexp.MustCompile(`(?m)` + strings.Join([]string{
	`^\tContent identifier:.*$`,
	`^\tIdentifier\t*: .*$`,
	`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d`,
	`^(Modified|Created|Creation Time|Path|ID|Creator Application|Comment|CID|Characteristics) = .*$`,
	`^CID=.*$`,
	// a descriptor file is as long as the digits of its random id
	`^1 file, \d{3} bytes.*$`,
	`^(Physical Size = \d{3}|Total Physical Size = .*)$`,
	`^(Id|SequenceNumber|FileWriteGuid|DataWriteGuid): .*$`,
	`\d+ files, \d+ bytes.*$`,
}, "|"))

// Other readers than qemu-img have to say the same of our images as of its own,
// and to read what they can read at all.
func TestReaders(t *testing.T) {
	instar := program(t, "instar")
	for _, c := range []struct {
		format, options, name, info string
		refuse7z, refuseInfo        bool // the reader cannot read qemu-img's either
	}{
		{format: "qcow2", name: "x.qcow2", info: "qcowinfo"},
		{format: "qcow2", options: "cluster_size=4k,lazy_refcounts=on", name: "x.qcow2", info: "qcowinfo"},
		{format: "qcow2", options: "compat=0.10,cluster_size=512", name: "x.qcow2", info: "qcowinfo"},
		{format: "qcow2", options: "refcount_bits=64,preallocation=metadata", name: "x.qcow2", info: "qcowinfo"},
		{format: "qcow2", options: "extended_l2=on", name: "x.qcow2", info: "qcowinfo", refuseInfo: true},
		{format: "vmdk", name: "x.vmdk", info: "vmdkinfo"},
		{format: "vmdk", options: "adapter_type=lsilogic,zeroed_grain=on", name: "x.vmdk", info: "vmdkinfo"},
		{format: "vmdk", options: "subformat=monolithicFlat", name: "x.vmdk", info: "vmdkinfo"},
		{format: "vmdk", options: "subformat=twoGbMaxExtentSparse", name: "x.vmdk", info: "vmdkinfo"},
		{format: "vmdk", options: "subformat=twoGbMaxExtentFlat", name: "x.vmdk", info: "vmdkinfo"},
		{format: "vmdk", options: "subformat=streamOptimized", name: "x.vmdk", info: "vmdkinfo", refuse7z: true},
		{format: "vpc", name: "x.vhd", info: "vhdiinfo"},
		{format: "vpc", options: "force_size=on", name: "x.vhd", info: "vhdiinfo"},
		{format: "vpc", options: "subformat=fixed", name: "x.vhd", info: "vhdiinfo"},
		{format: "vhdx", name: "x.vhdx"},
		{format: "vhdx", options: "subformat=fixed,block_size=1M", name: "x.vhdx"},
	} {
		t.Run(c.format+","+c.options, func(t *testing.T) {
			theirs, ours := filepath.Join(t.TempDir(), "d"), filepath.Join(t.TempDir(), "d")
			for program, dir := range map[string]string{"qemu-img": theirs, instar: ours} {
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				args := []string{"create", "-q", "-f", c.format}
				if c.options != "" {
					args = append(args, "-o", c.options)
				}
				oracle(t, dir, program, append(args, c.name, "20M")...)
			}
			same := func(readable bool, reader string, args ...string) {
				t.Helper()
				want, got := run(t, theirs, reader, args...), run(t, ours, reader, args...)
				if got.code != want.code {
					t.Errorf("%s of our image: exit code %d, of qemu-img's: %d\n%s%s", reader, got.code, want.code, got.stdout, got.stderr)
				} else if readable && got.code != 0 {
					t.Errorf("%s cannot read our image:\n%s%s", reader, got.stdout, got.stderr)
				}
				diff := cmp.Diff(changing.ReplaceAllString(want.stdout, ""), changing.ReplaceAllString(got.stdout, ""))
				if diff != "" {
					t.Errorf("%s (-qemu-img's image +ours):\n%s", reader, diff)
				}
			}
			oracle(t, theirs, "qemu-img", "compare", "-f", c.format, "-F", c.format, c.name, filepath.Join(ours, c.name))
			same(!c.refuse7z, "7z", "l", "-slt", c.name)
			if c.info != "" {
				same(!c.refuseInfo, c.info, c.name)
			}
		})
	}
}

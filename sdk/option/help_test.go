package option

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestHelp(t *testing.T) {
	const want = `Supported qcow2 options:
  backing_file=<str>     - File name of a base image
  backing_fmt=<str>      - Image format of the base image
  cluster_size=<size>    - qcow2 cluster size [a power of two from 512 to 2M; default 64k]
  compat=<str>           - Compatibility level (v2 [0.10] or v3 [1.1])
  compression_type=<str> - Compression method used for image cluster compression [one of zlib, zstd; default zlib]
  data_file=<str>        - File name of an external data file [not supported yet: external data files are deferred]
  encrypt.*=<str>        - [not supported yet: encrypted images are future work]
  encryption=<bool (on/off)> - [not supported yet: encrypted images are future work]
  extended_l2=<bool (on/off)> - Extended L2 tables [default off]
  lazy_refcounts=<bool (on/off)> - Postpone refcount updates [default off]
  nocow=<bool (on/off)>  - Turn off copy-on-write (valid only on btrfs)
  preallocation=<str>    - Preallocation mode (allowed values: off, metadata, falloc, full)
  refcount_bits=<num>    - Width of a reference count entry in bits [a power of two from 1 to 64; default 16]
  size=<size>            - Virtual disk size
`
	if d := cmp.Diff(want, Help("Supported qcow2 options:", schemas["qcow2"])); d != "" {
		t.Error(d)
	}
	const own = `Options:
  a=<num>
  b=<str>                - Text [deprecated: use a; not in qemu-img]
  c=<bool (on/off)>      - [accepted, without effect]
`
	s := Schema{{Name: "c", Type: Bool, Disposition: Ignored}, {Name: "a", Type: Uint}, {Name: "b", Help: "Text", Disposition: Deprecated, Reason: "use a", Extra: true}}
	if d := cmp.Diff(own, Help("Options:", s)); d != "" {
		t.Error(d)
	}
}

// Without our notes the lines are qemu-img's.
func TestHelpIsQemuImgs(t *testing.T) {
	out, err := exec.Command("qemu-img", "create", "-f", "qcow2", "-o", "help").Output()
	if err != nil {
		t.Fatalf("qemu-img (Debian package qemu-utils): %v", err)
	}
	theirs, _, _ := strings.Cut(string(out), "\n\n")
	known := make(map[string]bool)
	for _, line := range strings.Split(theirs, "\n") {
		known[line] = true
	}
	compared := 0
	for _, line := range strings.Split(strings.TrimSuffix(Help("Supported qcow2 options:", schemas["qcow2"]), "\n"), "\n") {
		if strings.Contains(line, "encr") || strings.Contains(line, "nocow") {
			continue // a family here; listed with a file name only
		}
		if bracket := strings.Index(line, " ["); bracket > 0 && !strings.HasSuffix(line, ")") {
			line = line[:bracket]
		}
		if !known[line] {
			t.Errorf("not qemu-img's: %q", line)
		}
		compared++
	}
	if compared < 12 {
		t.Errorf("only %d lines compared", compared)
	}
}

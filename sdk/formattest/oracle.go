package formattest

import (
	"bytes"
	"errors"
	"os/exec"
	"strings"
	"testing"
)

// packages names the Debian package of each oracle.
var packages = map[string]string{
	"qemu-img":   "qemu-utils",
	"qemu-io":    "qemu-utils",
	"7z":         "p7zip-full",
	"vhdiinfo":   "libvhdi-utils",
	"vmdkinfo":   "libvmdk-utils",
	"qcowinfo":   "libqcow-utils",
	"mkfs.ext4":  "e2fsprogs",
	"mkfs.vfat":  "dosfstools",
	"debugfs":    "e2fsprogs",
	"fsck.vfat":  "dosfstools",
	"mkfs.ntfs":  "ntfs-3g",
	"vhdimount":  "libvhdi-utils",
	"qcowmount":  "libqcow-utils",
	"vmdkmount":  "libvmdk-utils",
	"guestmount": "guestmount",
}

// Oracle runs another implementation's tool and returns what it printed on
// stdout. A missing tool or a non-zero exit fails the test.
func Oracle(t testing.TB, tool string, args ...string) string {
	t.Helper()
	stdout, stderr, code := TryOracle(t, tool, args...)
	if code != 0 {
		t.Fatalf("%s %s: exit %d\n%s%s", tool, strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// TryOracle is Oracle for runs whose exit code is part of the question.
func TryOracle(t testing.TB, tool string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		pkg := packages[tool]
		if pkg == "" {
			pkg = tool
		}
		t.Fatalf("%s is not installed: apt-get install %s", tool, pkg)
	}
	var out, errOut bytes.Buffer
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.Env = append(cmd.Environ(), "LC_ALL=C")
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatalf("%s: %v", tool, err)
		}
		return out.String(), errOut.String(), exit.ExitCode()
	}
	return out.String(), errOut.String(), 0
}

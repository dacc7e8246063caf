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
	"mkfs.xfs":   "xfsprogs",
	"ntfscp":     "ntfs-3g",
	"ntfscat":    "ntfs-3g",
	"vhdimount":  "libvhdi-utils",
	"qcowmount":  "libqcow-utils",
	"vmdkmount":  "libvmdk-utils",
	"guestmount": "guestmount",
}

// Package returns the Debian package that brings an oracle, "" where it is not known.
func Package(tool string) string { return packages[tool] }

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
	if _, err := exec.LookPath(tool); err != nil {
		pkg := Package(tool)
		if pkg == "" {
			pkg = tool
		}
		t.Fatalf("%s is not installed: apt-get install %s", tool, pkg)
	}
	return runOracle(t, "", tool, args...)
}

// Script runs the lines of a script of qemu-utils' programs in dir, each by a
// shell of its own.
func Script(t testing.TB, dir, script string) {
	t.Helper()
	for line := range strings.Lines(strings.TrimSpace(script)) {
		line = strings.TrimSpace(line)
		if stdout, stderr, code := runOracle(t, dir, "sh", "-c", line); code != 0 {
			t.Fatalf("%s (Debian package qemu-utils): exit %d\n%s%s", line, code, stdout, stderr)
		}
	}
}

// cannotMeasure is what qemu-img says, now and then on a busy machine, when it
// makes a LUKS image and measures its key derivation.
const cannotMeasure = "Unable to get accurate CPU usage"

func runOracle(t testing.TB, dir, tool string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	for try := 0; ; try++ {
		var out, errOut bytes.Buffer
		cmd := exec.Command(tool, args...)
		cmd.Dir = dir
		cmd.Stdout, cmd.Stderr = &out, &errOut
		cmd.Env = append(cmd.Environ(), "LC_ALL=C")
		var exit *exec.ExitError
		if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
			t.Fatalf("%s: %v", tool, err)
		}
		code := cmd.ProcessState.ExitCode()
		if code == 0 || try == 20 || !strings.Contains(errOut.String(), cannotMeasure) {
			return out.String(), errOut.String(), code
		}
	}
}

package lock

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-img/instar/sdk"
)

func open(t *testing.T, path string, flags int) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, flags, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestModesAgainstEachOther(t *testing.T) {
	const (
		ok      = ""
		write   = `Failed to get "write" lock`
		sharedW = `Failed to get shared "write" lock`
	)
	for _, c := range []struct {
		name        string
		first, then Mode
		want        string
	}{
		{"readers share", Read, Read, ok},
		{"reader keeps writers out", Read, Write, write},
		{"reader keeps creators out", Read, Create, write},
		{"writer keeps readers out", Write, Read, sharedW},
		{"writer keeps writers out", Write, Write, write},
		{"creator keeps readers out", Create, Read, sharedW},
		{"creator keeps creators out", Create, Create, `Failed to get "resize" lock`},
		{"who looks does not mind a writer", Write, Look, ok},
		{"who looks keeps nobody out", Look, Write, ok},
		{"force-share sees no writer", Write, Share, ok},
		{"force-share locks nothing", Share, Write, ok},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x")
			a, b := open(t, path, os.O_RDWR|os.O_CREATE), open(t, path, os.O_RDWR)
			if err := Take(a, path, c.first); err != nil {
				t.Fatalf("first: %v", err)
			}
			err := Take(b, path, c.then)
			if c.want == ok {
				if err != nil {
					t.Fatalf("second: %v", err)
				}
				return
			}
			want := c.want + "\nIs another process using the image [" + path + "]?"
			var le *Error
			if !errors.As(err, &le) || err.Error() != want || !errors.Is(err, sdk.ErrInvalid) {
				t.Fatalf("second: %v, want %s", err, want)
			}
			// A refused Take leaves nothing behind, and Release gives way.
			Release(a)
			if err := Take(open(t, path, os.O_RDWR), path, Write); err != nil {
				t.Fatalf("after the first left: %v", err)
			}
		})
	}
}

func TestLockEndsWithTheDescriptor(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	a, b := open(t, path, os.O_RDWR|os.O_CREATE), open(t, path, os.O_RDONLY)
	if err := Take(a, path, Write); err != nil {
		t.Fatal(err)
	}
	if err := Take(b, path, Read); err == nil {
		t.Fatal("the lock is without effect")
	}
	a.Close()
	if err := Take(b, path, Read); err != nil {
		t.Fatalf("after Close: %v", err)
	}
}

// holdWithQEMU opens path in a qemu-io that stays until the test ends.
func holdWithQEMU(t *testing.T, path string, args ...string) {
	t.Helper()
	tool, err := exec.LookPath("qemu-io")
	if err != nil {
		t.Fatal("qemu-io is missing: install the Debian package qemu-utils")
	}
	cmd := exec.Command(tool, append(args, path)...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("qemu-io: %v", err)
		}
	})
	// The image is open when the first prompt comes.
	deadline := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer deadline.Stop()
	var seen strings.Builder
	buf := make([]byte, 256)
	for !strings.Contains(seen.String(), "qemu-io>") {
		n, err := out.Read(buf)
		seen.Write(buf[:n])
		if err != nil {
			t.Fatalf("qemu-io did not open %s: %v\n%s", path, err, seen.String())
		}
	}
}

// qemuImgError returns what qemu-img says, without prefix.
func qemuImgError(t *testing.T, prefix string, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.Command("qemu-img", args...)
	cmd.Stderr = &stderr
	if err := cmd.Run(); err == nil {
		t.Fatalf("qemu-img %v succeeded", args)
	}
	got, ok := strings.CutPrefix(strings.TrimSuffix(stderr.String(), "\n"), prefix)
	if !ok {
		t.Fatalf("qemu-img %v: %s", args, stderr.String())
	}
	return got
}

func TestSameWordsAsQEMU(t *testing.T) {
	for _, c := range []struct {
		name   string
		holder []string
		flags  int
		mode   Mode
		prefix string
		verb   []string
	}{
		{"create under a writer", nil, os.O_RDWR, Create, "qemu-img: %: ", []string{"create", "-q", "-f", "qcow2", "%", "1M"}},
		{"create under a reader", []string{"-r"}, os.O_RDWR, Create, "qemu-img: %: ", []string{"create", "-q", "-f", "qcow2", "%", "1M"}},
		{"info under a writer", nil, os.O_RDONLY, Read, "qemu-img: Could not open '%': ", []string{"info", "%"}},
		{"resize under a reader", []string{"-r"}, os.O_RDWR, Write, "qemu-img: Could not open '%': ", []string{"resize", "%", "+1M"}},
		{"resize under a writer", nil, os.O_RDWR, Write, "qemu-img: Could not open '%': ", []string{"resize", "%", "+1M"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.qcow2")
			if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "1M").CombinedOutput(); err != nil {
				t.Fatalf("qemu-img (Debian package qemu-utils): %v: %s", err, out)
			}
			holdWithQEMU(t, path, c.holder...)
			var args []string
			for _, a := range c.verb {
				args = append(args, strings.ReplaceAll(a, "%", path))
			}
			want := qemuImgError(t, strings.ReplaceAll(c.prefix, "%", path), args...)
			err := Take(open(t, path, c.flags), path, c.mode)
			if err == nil || err.Error() != want {
				t.Fatalf("got  %v\nwant %s", err, want)
			}
			if err := Take(open(t, path, os.O_RDONLY), path, Share); err != nil {
				t.Fatalf("-U: %v", err)
			}
		})
	}
}

func TestQEMURespectsOurs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.qcow2")
	if out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", path, "1M").CombinedOutput(); err != nil {
		t.Fatalf("qemu-img (Debian package qemu-utils): %v: %s", err, out)
	}
	f := open(t, path, os.O_RDWR)
	if err := Take(f, path, Read); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "info", path).CombinedOutput(); err != nil {
		t.Fatalf("a second reader: %v: %s", err, out)
	}
	qemuImgError(t, `qemu-img: Could not open '`+path+`': Failed to get "write" lock`, "resize", path, "+1M")
	Release(f)
	if err := Take(f, path, Write); err != nil {
		t.Fatal(err)
	}
	qemuImgError(t, `qemu-img: Could not open '`+path+`': Failed to get shared "write" lock`, "info", path)
}

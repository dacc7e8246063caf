//go:build linux

// Package differential compares the built programs in bin with qemu-img on
// random requests. INSTAR_DIFF_N sets how many are tried for each format,
// INSTAR_DIFF_SEED where they start.
package differential

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// perFormat is how many triples of each format a plain `go test` tries: about a
// minute in all.
const perFormat = 60

func number(t *testing.T, name string, def uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// program returns the absolute path of a program in bin.
func program(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("..", "..", "bin", name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run `make build` first", err)
	}
	return path
}

// outcome is what a caller sees of a command.
type outcome struct {
	code           int
	stdout, stderr string
}

// run runs a command in dir. Only a command that cannot be started, or does not
// end within a minute, fails the test. One that a signal ended has exit code -1.
func run(t *testing.T, dir, name string, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "INSTAR_QEMU_VERSION=7.2", "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		t.Fatalf("%s %q: %v\n%s", name, args, err, stderr.String())
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// oracle runs a command that has to succeed and returns what it printed.
func oracle(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("%v: run .ci/oracles", err)
	}
	o := run(t, dir, name, args...)
	if o.code != 0 {
		t.Fatalf("%s %q: exit code %d\n%s%s", name, args, o.code, o.stdout, o.stderr)
	}
	return o.stdout
}

// fixtures makes a directory with the backing files of the triples.
func fixtures(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, b := range backings["qcow2"] {
		oracle(t, dir, "qemu-img", "create", "-q", "-f", b.format, b.name, "3M")
	}
	return dir
}

// place makes a directory below parent that has the fixtures.
func place(t *testing.T, parent, name, fixtures string) string {
	t.Helper()
	dir := filepath.Join(parent, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, b := range backings["qcow2"] {
		if err := os.Link(filepath.Join(fixtures, b.name), filepath.Join(dir, b.name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// usable reports whether qemu-img can open an image, and qemu-io read its first
// and its last sector. There are images of which qemu-img makes only the
// descriptor, without a word.
func usable(t *testing.T, dir, format string) bool {
	t.Helper()
	info := run(t, dir, "qemu-img", "info", "-f", format, "--output=json", "image")
	if info.code != 0 {
		return false
	}
	size := virtualSize(t, info.stdout)
	if flat, err := os.Stat(filepath.Join(dir, "image-flat")); err == nil && flat.Size() < size {
		return false // what lies beyond the end reads as zeros, and cannot be written
	}
	if size < 512 {
		return true
	}
	read := run(t, dir, "qemu-io", "-r", "-f", format, "-c", "read 0 512", "-c", fmt.Sprintf("read %d 512", size-512), "image")
	return read.code == 0 && !strings.Contains(read.stdout, "failed")
}

// images lists the files that a create made, with their lengths.
func images(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "base.") {
			names = append(names, e.Name())
		}
	}
	return names
}

func TestCreate(t *testing.T) {
	seed := number(t, "INSTAR_DIFF_SEED", 1)
	count := number(t, "INSTAR_DIFF_N", perFormat)
	instar := program(t, "instar")
	base := fixtures(t)
	for _, format := range formats {
		t.Run(format, func(t *testing.T) {
			t.Parallel()
			tried, made := 0, 0
			for n := range count {
				c := generate(seed, n, format)
				t.Run(fmt.Sprint(n), func(t *testing.T) {
					tried++
					if compareCreate(t, instar, base, c) {
						made++
					}
				})
			}
			if tried >= 20 && made < tried/3 {
				t.Errorf("only %d of %d triples made an image: the generator has gone astray", made, tried)
			}
		})
	}
}

// compareCreate lets both programs make an image and compares the two. It
// reports whether there was one.
func compareCreate(t *testing.T, instar, base string, c triple) bool {
	t.Helper()
	parent := t.TempDir()
	theirs, ours := place(t, parent, "qemu", base), place(t, parent, "instar", base)
	// What went wrong is of use only with what was asked for.
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("qemu-img %q", c.args())
		}
	})

	want, got := run(t, theirs, "qemu-img", c.args()...), run(t, ours, instar, c.args()...)
	if want.code == 0 && got.code == 1 && !usable(t, theirs, c.format) {
		return false // refused, rightly (docs/divergences.md)
	}
	if want.code == 1 && got.code == 0 && c.format == "vhdx" && strings.Contains(want.stderr, "Failed to write the BAT") {
		if opened := run(t, ours, instar, "info", "image"); opened.code != 0 {
			t.Error(opened.stderr)
		}
		return true // qemu-img trips over a table without entries (docs/divergences.md)
	}
	if got.code != want.code {
		t.Fatalf("exit code %d, qemu-img's %d\n%s%s", got.code, want.code, got.stderr, want.stderr)
	}
	if want.code != 0 {
		if left := images(t, ours); len(left) > 0 {
			t.Errorf("a failed create left %v", left)
		}
		if got.stderr == "" {
			t.Error("no message")
		}
		return false
	}
	if got.stdout != want.stdout {
		t.Errorf("stdout (-qemu-img +instar):\n%s", cmp.Diff(want.stdout, got.stdout))
	}
	if got.stderr != "" {
		t.Errorf("stderr of a create that succeeded: %s", got.stderr)
	}

	files := images(t, theirs)
	if made := images(t, ours); !slices.Equal(files, made) {
		t.Fatalf("made %v, qemu-img %v", made, files)
	}
	for _, name := range files {
		where, err := differ(c, filepath.Join(theirs, name), filepath.Join(ours, name))
		if err != nil {
			t.Fatal(err)
		}
		if where != "" {
			t.Errorf("%s (qemu-img, instar): %s", name, where)
		}
	}

	info := []string{"info", "-f", c.format, "--output=json", "image"}
	wantInfo, gotInfo := run(t, theirs, "qemu-img", info...), run(t, ours, "qemu-img", info...)
	if wantInfo.code == 0 && gotInfo.code != 0 {
		t.Fatalf("qemu-img info of our image: %s", gotInfo.stderr)
	}
	if wantInfo.code != 0 { // it cannot open every image that it makes
		return true
	}
	if diff := cmp.Diff(facts(t, wantInfo.stdout), facts(t, gotInfo.stdout)); diff != "" {
		t.Errorf("qemu-img info (-of its image +of ours):\n%s", diff)
	}
	compareInfo(t, instar, ours, c.format)

	if c.format == "vmdk" && virtualSize(t, wantInfo.stdout) > 4*tib {
		return true // qemu-img reads every grain directory entry's table: minutes
	}
	check := []string{"check", "-f", c.format, "image"}
	wantCheck, gotCheck := run(t, theirs, "qemu-img", check...), run(t, ours, "qemu-img", check...)
	if gotCheck != wantCheck {
		t.Errorf("qemu-img check of our image: %+v, of its own: %+v", gotCheck, wantCheck)
	}
	if gotCheck.code != 0 && gotCheck.code != 63 {
		t.Errorf("qemu-img check: %d %s%s", gotCheck.code, gotCheck.stdout, gotCheck.stderr)
	}
	return true
}

// compareInfo checks that both programs say the same of one image.
func compareInfo(t *testing.T, instar, dir, format string) {
	t.Helper()
	for _, args := range [][]string{
		{"info", "-f", format, "image"},
		{"info", "-f", format, "--output=json", "image"},
		{"info", "image"},
	} {
		want, got := run(t, dir, "qemu-img", args...), run(t, dir, instar, args...)
		if want.code != 0 {
			continue // it cannot open every image that it makes; instar may
		}
		if got.code != 0 {
			t.Errorf("%q: exit code %d\n%s", args, got.code, got.stderr)
		} else if diff := cmp.Diff(want.stdout, got.stdout); diff != "" {
			t.Errorf("%q (-qemu-img +instar):\n%s", args, diff)
		}
	}
}

// facts parses the JSON of info and drops what is random or depends on the
// host's file system.
func facts(t *testing.T, text string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	var clean func(any)
	clean = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			for _, k := range []string{"actual-size", "cid"} {
				delete(v, k)
			}
			for _, x := range v {
				clean(x)
			}
		case []any:
			for _, x := range v {
				clean(x)
			}
		}
	}
	clean(v)
	return v
}

func virtualSize(t *testing.T, text string) int64 {
	t.Helper()
	var v struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	return v.Size
}

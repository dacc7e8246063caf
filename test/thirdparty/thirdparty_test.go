//go:build linux

// Package thirdparty shows that a plugin which instar has never heard of works
// by being there: the example of docs/plugins.md, built, put into a directory
// and used.
package thirdparty

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const name = "instar-format-boxed"

// install builds the example into a directory of its own, with its manifest
// where the test wants one.
func install(t *testing.T, manifest bool) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "plugins")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, name)
	build := exec.Command("go", "build", "-tags", "grpcnotrace", "-buildvcs=false", "-o", program, "../../examples/"+name)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	if manifest {
		text, err := exec.Command(program, "--manifest").Output()
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program+".json", text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// runner returns a function that runs bin/instar with the plugin directory.
func runner(t *testing.T, plugins string) func(args ...string) (stdout, stderr string, ok bool) {
	instar, err := filepath.Abs("../../bin/instar")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(instar); err != nil {
		t.Fatalf("%v: run `make build` first", err)
	}
	work := t.TempDir()
	return func(args ...string) (string, string, bool) {
		t.Helper()
		cmd := exec.Command(instar, args...)
		cmd.Dir = work
		cmd.Env = append(os.Environ(), "INSTAR_PLUGIN_PATH="+plugins)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		return stdout.String(), stderr.String(), err == nil
	}
}

func TestExample(t *testing.T) {
	for what, manifest := range map[string]bool{"with manifest": true, "without manifest": false} {
		t.Run(what, func(t *testing.T) {
			run := runner(t, install(t, manifest))

			out, stderr, ok := run("create", "-f", "boxed", "-o", "colour=white", "gift.box", "1M")
			if want := "Formatting 'gift.box', fmt=boxed size=1048576 colour=white\n"; !ok || out != want {
				t.Fatalf("create printed %q, want %q\n%s", out, want, stderr)
			}

			out, stderr, ok = run("info", "--output", "json", "gift.box") // found by its probe
			if !ok {
				t.Fatal(stderr)
			}
			var info struct {
				Format      string `json:"format"`
				VirtualSize int64  `json:"virtual-size"`
				Specific    struct {
					Data struct {
						Colour string `json:"box-colour"`
					} `json:"data"`
				} `json:"format-specific"`
			}
			if err := json.Unmarshal([]byte(out), &info); err != nil {
				t.Fatalf("%v in %s", err, out)
			}
			if info.Format != "boxed" || info.VirtualSize != 1<<20 || info.Specific.Data.Colour != "white" {
				t.Errorf("info: %s", out)
			}

			out, _, _ = run("info", "gift.box")
			if !strings.Contains(out, "    box colour: white\n") {
				t.Errorf("info as text: %s", out)
			}

			_, stderr, ok = run("create", "-f", "boxed", "-o", "color=white", "gift2.box", "1M")
			if ok || !strings.Contains(stderr, "colour") {
				t.Errorf("a wrong key: %q", stderr)
			}

			// It can create, and cannot write.
			for _, args := range [][]string{{"convert", "-O", "boxed", "gift.box", "x"}, {"dd", "-O", "boxed", "if=gift.box", "of=x"}} {
				_, stderr, ok = run(args...)
				if ok || !strings.Contains(stderr, `plugin boxed makes empty images and cannot write data into them (it lacks "write")`) {
					t.Errorf("%q: %q", args, stderr)
				}
			}
		})
	}
}

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// binDir holds the programs under test: `make build` makes it.
func binDir(t testing.TB) string {
	dir, err := filepath.Abs("../../bin")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "instar")); err != nil {
		t.Fatalf("the programs are not built (%v): run make build", err)
	}
	return dir
}

// TestScripts runs the scenarios under testdata/script, a folder a verb, with the built
// programs first in PATH and qemu-img behind them as the oracle.
func TestScripts(t *testing.T) {
	for _, tool := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%s is missing: install Debian's qemu-utils", tool)
		}
	}
	dir := binDir(t)
	verbs, err := os.ReadDir("testdata/script")
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range verbs {
		t.Run(verb.Name(), func(t *testing.T) {
			testscript.Run(t, testscript.Params{
				Dir: filepath.Join("testdata/script", verb.Name()),
				Setup: func(env *testscript.Env) error {
					programs := filepath.Join(env.WorkDir, ".bin")
					env.Setenv("PATH", programs+":"+os.Getenv("PATH"))
					env.Setenv("INSTAR_QEMU_VERSION", "7.2")
					env.Setenv("LC_ALL", "C")
					if err := os.Mkdir(programs, 0o755); err != nil {
						return err
					}
					// instar alone: bin/qemu-img would hide the oracle.
					return os.Symlink(filepath.Join(dir, "instar"), filepath.Join(programs, "instar"))
				},
			})
		})
	}
}

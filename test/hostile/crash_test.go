//go:build linux

package hostile

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A command that is killed at any moment leaves the old file or the new one
// under the final name, never something between.
func TestKilled(t *testing.T) {
	tries := 8 // beside those of TestKilledAtCalls
	rng := rand.New(rand.NewPCG(seed, 1))
	for _, format := range []string{"raw", "qcow2", "vmdk", "vpc", "vhdx"} {
		for _, verb := range []string{"create -q -f @ out 64M", "convert -f raw -O @ disk out", "dd -f raw -O @ bs=64k if=disk of=out"} {
			word, _, _ := strings.Cut(verb, " ")
			t.Run(format+"/"+word, func(t *testing.T) {
				dir, runtime := work(t), runtimeDir(t)
				disk := bytes.Repeat([]byte("instar! "), 32<<20/8)
				write(t, dir, "disk", disk)
				c := command{Argv: strings.Fields(strings.ReplaceAll(verb, "@", format)), Dir: dir, Env: []string{"XDG_RUNTIME_DIR=" + runtime}}
				old := []byte("what was there before")
				out := filepath.Join(dir, "out")
				// How long it takes when nobody kills it.
				write(t, dir, "out", old)
				whole := c.run(t)
				if whole.Code != 0 {
					t.Fatal(whole.Stderr)
				}
				done := 0
				for range tries {
					write(t, dir, "out", old)
					c.Kill = time.Millisecond + time.Duration(rng.Int64N(int64(whole.Wall)))
					r := c.start(t)
					if len(r.Left) > 0 {
						t.Errorf("processes %v outlived it", r.Left)
					}
					b, err := os.ReadFile(out)
					if err != nil {
						t.Errorf("after %v: %v", c.Kill, err)
						continue
					}
					if bytes.Equal(b, old) {
						continue
					}
					done++
					if word == "create" {
						if r := (command{Argv: []string{"info", "-f", format, "out"}, Dir: dir}).run(t); r.Code != 0 {
							t.Errorf("after %v: %s", c.Kill, r.Stderr)
						}
						continue
					}
					if r := (command{Argv: []string{"compare", "-f", "raw", "-F", format, "disk", "out"}, Dir: dir}).run(t); r.Code != 0 {
						t.Errorf("after %v: %s%s", c.Kill, r.Stdout, r.Stderr)
					}
				}
				t.Logf("%d of %d were complete", done, tries)
				// What the dead left in the directory is not in the way.
				c.Kill = 0
				if r := c.run(t); r.Code != 0 {
					t.Errorf("afterwards: %s", r.Stderr)
				}
				noSocketDirs(t, runtime)
			})
		}
	}
}

// The same of an image of several files, which are those of one image at each
// moment: internal/host/output kills between any two steps.
func TestKilledSeveral(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed, 3))
	for _, subformat := range []string{"monolithicFlat", "twoGbMaxExtentSparse"} {
		t.Run(subformat, func(t *testing.T) {
			dir, runtime := work(t), runtimeDir(t)
			env := []string{"XDG_RUNTIME_DIR=" + runtime}
			write(t, dir, "newer", bytes.Repeat([]byte("newer..!"), 8<<20/8))
			from := func(name string) command {
				return command{Argv: strings.Fields("-v convert -f raw -O vmdk -o subformat=" + subformat + " " + name + " out.vmdk"), Dir: dir, Env: env}
			}
			same := func(name string) bool {
				return (command{Argv: []string{"compare", "-f", "raw", "-F", "vmdk", name, "out.vmdk"}, Dir: dir, Env: env}).run(t).Code == 0
			}
			whole := from("disk").run(t)
			for range 8 {
				if r := from("disk").run(t); r.Code != 0 || strings.Contains(r.Stderr, "moved away") || !same("disk") {
					t.Fatal(r.Stderr)
				}
				c := from("newer")
				c.Kill = time.Millisecond + time.Duration(rng.Int64N(int64(whole.Wall)))
				c.start(t)
				if !same("disk") && !same("newer") {
					t.Errorf("after %v: neither the old image nor the new one: %s", c.Kill, listing(t, dir))
				}
			}
			noSocketDirs(t, runtime)
		})
	}
}

// With -n a killed convert may leave any guest content, but an image that can
// be opened, and checked without corruptions.
func TestKilledInPlace(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed, 2))
	for _, format := range []string{"qcow2", "vmdk", "vpc", "vhdx"} {
		t.Run(format, func(t *testing.T) {
			dir, runtime := work(t), runtimeDir(t)
			write(t, dir, "disk", bytes.Repeat([]byte("instar! "), 32<<20/8))
			env := []string{"XDG_RUNTIME_DIR=" + runtime}
			convert := command{Argv: []string{"convert", "-n", "-f", "raw", "-O", format, "disk", "out"}, Dir: dir, Env: env}
			make := func() {
				t.Helper()
				os.Remove(filepath.Join(dir, "out"))
				if r := (command{Argv: []string{"create", "-q", "-f", format, "out", "32M"}, Dir: dir, Env: env}).run(t); r.Code != 0 {
					t.Fatal(r.Stderr)
				}
			}
			make()
			whole := convert.run(t)
			if whole.Code != 0 {
				t.Fatal(whole.Stderr)
			}
			for range 8 {
				make()
				convert.Kill = time.Millisecond + time.Duration(rng.Int64N(int64(whole.Wall)))
				convert.start(t)
				check := command{Argv: []string{"check", "-f", format, "out"}, Dir: dir, Env: env}
				r := check.run(t)
				if r.Code == 2 && format == "vpc" && strings.Count(r.Stderr+r.Stdout, "ERROR") == 1 && strings.Contains(r.Stderr+r.Stdout, "ERROR the footer at the end") {
					// Blocks grow over the second footer, which the first one stands
					// in for until it is written anew.
					r = command{Argv: []string{"info", "-f", format, "out"}, Dir: dir, Env: env}.run(t)
				}
				if r.Code != 0 && r.Code != 3 { // leaks are allowed
					t.Errorf("after %v: check says %d: %s", convert.Kill, r.Code, fmt.Sprint(clip(r.Stdout), clip(r.Stderr)))
				}
			}
		})
	}
}

//go:build linux

package hostile

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// everyVerb makes and reads images of a format, in order.
var everyVerb = []string{
	"create -f @ new 10M", "convert -f raw -O @ disk image", "info image", "map image", "check image", "measure -O @ image",
	"compare -f raw disk image", "convert -O raw image back", "dd -O raw if=image of=part bs=64k count=3", "inspect image",
}

func work(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, "disk", bytes.Repeat([]byte("instar! "), 4<<20/8))
	return dir
}

// All works where the caller has little address space and processor time, and
// under --untrusted's limits.
func TestUnderLimits(t *testing.T) {
	for _, format := range []string{"raw", "qcow2", "vmdk", "vpc", "vhdx"} {
		for _, extra := range []string{"", "--untrusted", "--max-memory=64M"} {
			t.Run(format+extra, func(t *testing.T) {
				t.Parallel()
				dir, runtime := work(t), runtimeDir(t)
				for _, verb := range everyVerb {
					words := strings.Fields(strings.ReplaceAll(verb, "@", format))
					if extra != "" {
						words = append(words, extra)
					}
					c := command{Argv: words, Dir: dir, Env: []string{"XDG_RUNTIME_DIR=" + runtime}, AS: 1 << 30, CPU: 2}
					r := c.run(t)
					ok := r.Code == 0
					if words[0] == "check" && format == "raw" {
						ok = r.Code == 63 // it has nothing to check
					}
					if !ok {
						t.Errorf("%s: exit code %d: %s", words, r.Code, clip(r.Stderr))
					}
				}
				back, err := os.ReadFile(filepath.Join(dir, "back"))
				want, err2 := os.ReadFile(filepath.Join(dir, "disk"))
				if err != nil || err2 != nil || len(back) < len(want) || !bytes.Equal(back[:len(want)], want) || len(bytes.Trim(back[len(want):], "\x00")) > 0 {
					t.Errorf("the copy differs (%v %v)", err, err2)
				}
				noSocketDirs(t, runtime)
			})
		}
	}
}

// All works for an ordinary user, who can only read the programs.
func TestOrdinaryUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("not root: every other test shows it")
	}
	setpriv, err := exec.LookPath("setpriv")
	if err != nil {
		t.Fatal("setpriv is needed: Debian package util-linux")
	}
	base, err := os.MkdirTemp("", "hu")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	bin, dir, runtime := filepath.Join(base, "bin"), filepath.Join(base, "work"), filepath.Join(base, "run")
	for _, d := range []string{bin, dir, runtime} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	from := filepath.Dir(program(t, "instar"))
	names, err := filepath.Glob(filepath.Join(from, "instar*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(bin, filepath.Base(name)), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, "disk", bytes.Repeat([]byte("instar! "), 4<<20/8))
	const nobody = 65534
	for _, d := range []string{dir, runtime} {
		if err := os.Chown(d, nobody, nobody); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{base, bin} {
		if err := os.Chmod(d, 0o555); err != nil {
			t.Fatal(err)
		}
	}
	for _, verb := range everyVerb {
		words := strings.Fields(strings.ReplaceAll(verb, "@", "qcow2"))
		argv := append([]string{setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all", filepath.Join(bin, "instar")}, words...)
		r := command{Argv: argv, Dir: dir, Env: []string{"XDG_RUNTIME_DIR=" + runtime, "HOME=" + dir}}.run(t)
		if r.Code != 0 {
			t.Errorf("%s: exit code %d: %s", words, r.Code, clip(r.Stderr))
		}
	}
	noSocketDirs(t, runtime)
}

// INSTAR_UNTRUSTED is --untrusted, and a number that is no size is refused.
func TestPolicyFlags(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "image", newQcow().backing("disk").bytes())
	write(t, dir, "disk", make([]byte, 1<<20))
	convert := []string{"convert", "-O", "raw", "image", "out"}
	for _, on := range []string{"1", "on", "yes", "true"} {
		r := command{Argv: convert, Dir: dir, Env: []string{"INSTAR_UNTRUSTED=" + on}}.run(t)
		if on != "yes" && on != "true" || r.Code != 0 {
			r.oneLine(t)
		}
	}
	for _, off := range []string{"0", "off", ""} {
		r := command{Argv: convert, Dir: dir, Env: []string{"INSTAR_UNTRUSTED=" + off}}.run(t)
		if r.Code != 0 {
			t.Errorf("INSTAR_UNTRUSTED=%s: %s", off, r.Stderr)
		}
	}
	for _, words := range [][]string{{"--max-memory", "lots"}, {"--max-memory", "0"}, {"--max-memory", "-1"}, {"--timeout", "soon"}} {
		r := command{Argv: append([]string{"info", "image"}, words...), Dir: dir}.run(t)
		if r.Code != 1 || r.Stdout != "" {
			t.Errorf("%s: exit code %d %s", words, r.Code, r.Stdout)
		}
	}
}

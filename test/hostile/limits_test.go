//go:build linux

package hostile

import (
	"bytes"
	"encoding/binary"
	"fmt"
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

// INSTAR_UNTRUSTED is --untrusted, and what is no value of it is refused, as is
// a number that is no size.
func TestPolicyFlags(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "image", newQcow().backing("disk").bytes())
	write(t, dir, "disk", make([]byte, 1<<20))
	convert := []string{"convert", "-O", "raw", "image", "out"}
	for _, on := range []string{"1", "on", "yes", "true", "TRUE", "y"} {
		r := command{Argv: convert, Dir: dir, Env: []string{"INSTAR_UNTRUSTED=" + on}}.run(t)
		if line := r.oneLine(t); !strings.Contains(line, "references are not followed") {
			t.Errorf("INSTAR_UNTRUSTED=%s: %s", on, line)
		}
	}
	for _, odd := range []string{"enabled", "2", " 1", "1 ", "-1", "01"} {
		for _, words := range [][]string{convert, {"info", "disk"}, {"inspect", "disk"}, {"create", "-f", "raw", "new", "1M"}, {"info", "--untrusted", "disk"}} {
			r := command{Argv: words, Dir: dir, Env: []string{"INSTAR_UNTRUSTED=" + odd}}.run(t)
			if line := r.oneLine(t); !strings.Contains(line, "INSTAR_UNTRUSTED=") || !strings.Contains(line, "accepted are 1, on") || r.Stdout != "" {
				t.Errorf("INSTAR_UNTRUSTED=%q %s: %s%s", odd, words, r.Stdout, line)
			}
		}
	}
	if got := listing(t, dir); got != "disk image" {
		t.Errorf("made: %s", got)
	}
	for _, off := range []string{"0", "off", "no", "false", ""} {
		r := command{Argv: convert, Dir: dir, Env: []string{"INSTAR_UNTRUSTED=" + off}}.run(t)
		if r.Code != 0 {
			t.Errorf("INSTAR_UNTRUSTED=%s: %s", off, r.Stderr)
		}
	}
	for _, words := range [][]string{{"--max-memory", "lots"}, {"--max-memory", "0"}, {"--max-memory", "-1"}, {"--timeout", "soon"}, {"--idle-timeout", "soon"}, {"--max-output", "1G"}} {
		r := command{Argv: append([]string{"info", "image"}, words...), Dir: dir}.run(t)
		if r.Code != 1 || r.Stdout != "" {
			t.Errorf("%s: exit code %d %s", words, r.Code, r.Stdout)
		}
	}
}

// --max-output refuses by the virtual size that the output would have, before
// anything is written.
func TestMaxOutput(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "disk", make([]byte, 2<<20))
	write(t, dir, "small", make([]byte, 1<<20))
	write(t, dir, "old", []byte("old"))
	for _, words := range []string{
		"convert -O qcow2 disk out", "convert -O qcow2 disk old", "convert small disk out", "convert -n disk small",
		"convert --for azure disk out", "convert disk -", "dd if=disk of=out", "dd osize=2M if=small of=out",
		"create -f qcow2 out 2M", "create -f qcow2 -b disk -F raw out", "dd if=disk of=out bs=1k skip=1 count=1025",
		// As the format and the platform round it.
		"create -q -f vpc out 1M", "convert -O vpc small out", "convert -O vpc small old", "dd -O vpc if=small of=out", "convert --for gce small out",
	} {
		r := command{Argv: append(strings.Fields(words), "--max-output", "1M"), Dir: dir}.run(t)
		if line := r.oneLine(t); !strings.Contains(line, "--max-output allows 1048576") || r.Stdout != "" {
			t.Errorf("%s: %s", words, line)
		}
		if got := listing(t, dir); got != "disk old small" {
			t.Errorf("%s: made %s", words, got)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "old")); err != nil || string(b) != "old" {
			t.Errorf("%s: the old file is %.20q %v", words, b, err)
		}
	}
	for _, words := range []string{"convert -O qcow2 small out", "dd if=disk of=out bs=1k skip=1 count=1024", "create -f qcow2 out 1M", "convert -n disk out2 --max-output 2M"} {
		write(t, dir, "out2", make([]byte, 2<<20))
		r := command{Argv: append([]string{strings.Fields(words)[0], "--max-output", "1M"}, strings.Fields(words)[1:]...), Dir: dir}.run(t)
		if r.Code != 0 {
			t.Errorf("%s: %s", words, r.Stderr)
		}
	}
	for _, no := range []string{"-1", "lots", "1.5.2G"} {
		r := command{Argv: []string{"convert", "--max-output=" + no, "disk", "out3"}, Dir: dir}.run(t)
		if r.Code != 1 || !strings.Contains(r.Stderr, "a size is accepted") {
			t.Errorf("%s: %d %s", no, r.Code, r.Stderr)
		}
	}
}

// manySnapshots is a qcow2 whose snapshots have names of control characters, each
// of which is six bytes in JSON. Its table is about so many bytes long.
func manySnapshots(length int) []byte {
	q := newQcow()
	name := bytes.Repeat([]byte("\x1b"), 770)
	var table []byte
	n := uint64(0)
	for ; len(table) < length; n++ {
		id := fmt.Sprint(n)
		e := make([]byte, 56)
		binary.BigEndian.PutUint16(e[12:], uint16(len(id)))
		binary.BigEndian.PutUint16(e[14:], uint16(len(name)))
		binary.BigEndian.PutUint32(e[36:], 16)
		binary.BigEndian.PutUint64(e[48:], q.size)
		e = append(append(e, id...), name...)
		table = append(table, append(e, make([]byte, -len(e)&7)...)...)
	}
	q.snapshots, q.snapshotsOffset = n, 6*cluster
	q.put(6*cluster, table)
	q.length += int64(len(table)+cluster-1) / cluster * cluster
	return q.bytes()
}

// Names that fill the metadata neither fill the memory, which each run here
// checks, nor is anything left out of what is printed.
func TestMuchMetadata(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "large", manySnapshots(3500<<10))
	large := strings.Fields("large large large large large large large large")
	for _, output := range []string{"human", "json", "ndjson"} {
		for _, names := range [][]string{large[:1], large} {
			r := command{Argv: append([]string{"info", "--untrusted", "--output", output}, names...), Dir: dir, CPU: 30}.start(t)
			if r.Code != 0 || len(r.Stdout) != maxOutput || r.MaxRSS > memoryMost {
				t.Errorf("%s of %d: exit code %d, %d bytes, %d MiB of memory: %s", output, len(names), r.Code, len(r.Stdout), r.MaxRSS>>20, clip(r.Stderr))
			}
		}
	}
	// There is an end, and it is an error like any other.
	write(t, dir, "huge", manySnapshots(17<<20))
	for _, words := range []string{"info huge", "info --untrusted huge", "info --output json huge huge", "convert -O raw huge out"} {
		for _, line := range strings.SplitAfter(strings.TrimSpace(command{Argv: strings.Fields(words), Dir: dir}.run(t).Stderr), "\n") {
			if !strings.HasSuffix(strings.TrimSpace(line), "the plugin's answer is too large to be taken") {
				t.Errorf("%s: %s", words, line)
			}
		}
	}
}

//go:build linux

package hostile

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
	"github.com/instar-img/instar/test/terminal"
)

// onTerminal runs instar with a terminal for its output and returns what that
// got.
func onTerminal(t testing.TB, dir string, env []string, args ...string) string {
	t.Helper()
	screen, tty := terminal.Open(t)
	cmd := exec.Command(program(t, "instar"), args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = tty, tty
	got := make(chan string)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(screen, maxOutput)) // ends with an error when nobody has the terminal
		got <- string(b)
	}()
	err := cmd.Run()
	tty.Close()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return <-got
}

// named returns the qcow2 case of that name.
func named(t testing.TB, name string) hostile {
	t.Helper()
	for _, h := range qcowCases() {
		if h.name == name {
			return h
		}
	}
	t.Fatalf("no case %q", name)
	return hostile{}
}

// Case 16: what images and plugins say does not steer a terminal, nor pass for a
// line of instar's.
func TestTerminal(t *testing.T) {
	see := func(t *testing.T, dir string, env []string, args ...string) {
		t.Helper()
		out := onTerminal(t, dir, env, args...)
		if m := control.FindString(out); m != "" || strings.Contains(out, "\nfaked") || strings.Contains(out, "\nfile format: faked") {
			t.Errorf("%s: %q in %q", args, m, clip(out))
		}
		if out == "" && args[0] != "convert" {
			t.Errorf("%s: nothing was said", args)
		}
	}
	t.Run("image", func(t *testing.T) {
		dir := t.TempDir()
		write(t, dir, "snapshot", named(t, "16 snapshot name").bytes)
		write(t, dir, "backing", newQcow().backing("\x1b[2J\nfaked: yes\r\x07\x7f").bytes())
		write(t, dir, "vhdx", newVHDX().parent("\x1b[2J\nfaked: yes\r").bytes())
		for _, name := range []string{"snapshot", "backing", "vhdx"} {
			for _, verb := range []string{"info @", "info --output json @", "check @", "map @", "measure -O qcow2 @", "inspect @", "convert -O raw @ out", "compare @ @"} {
				see(t, dir, nil, append(strings.Fields(strings.ReplaceAll(verb, "@", name)), "--untrusted")...)
				os.Remove(filepath.Join(dir, "out"))
			}
		}
	})
	for _, lie := range []string{"info-ansi", "check-ansi", "shout-open", "shout-check", "shout-inspect", "shout-begin"} {
		t.Run(lie, func(t *testing.T) {
			l := install(t, lie)
			for _, verb := range []string{"info -f @ src", "info -f @ --output json src", "check -f @ src", "inspect -f @ src", "convert -f raw -O @ src out"} {
				env := []string{"INSTAR_PLUGIN_PATH=" + l.plugins, "XDG_RUNTIME_DIR=" + l.runtime}
				words := reached{args: verb}.words(lie)
				if words[0] == "convert" && lie != "shout-begin" {
					continue // says nothing
				}
				see(t, l.dir, env, words...)
			}
		})
	}
}

// Cases 17 and 18: check says that an image is corrupt, with the exit code of
// qemu-img.
func TestCheckSays(t *testing.T) {
	dir := t.TempDir()
	for _, h := range qcowCases() {
		if !strings.HasPrefix(h.name, "17 ") && !strings.HasPrefix(h.name, "18 ") {
			continue
		}
		path := write(t, dir, "image", h.bytes)
		r := command{Argv: []string{"check", "-f", "qcow2", "image"}, Dir: dir}.run(t)
		if r.Code != 2 || !strings.Contains(r.Stdout+r.Stderr, "errors were found on the image") {
			t.Errorf("%s: exit code %d: %s%s", h.name, r.Code, clip(r.Stdout), clip(r.Stderr))
		}
		if _, text, code := formattest.TryOracle(t, "qemu-img", "check", "-f", "qcow2", path); code != r.Code {
			t.Errorf("%s: exit code %d, qemu-img %d: %s", h.name, r.Code, code, clip(text))
		}
	}
}

// Case 19: of what a bomb would make only its cluster is made, and what is not
// one is refused, both as qemu-img does.
func TestBombs(t *testing.T) {
	for _, h := range qcowCases() {
		if !strings.HasPrefix(h.name, "19 ") {
			continue
		}
		t.Run(h.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := write(t, dir, "image", h.bytes)
			dd := []string{"dd", "-f", "qcow2", "-O", "raw", "if=image", "of=out", "bs=64k", "count=2"}
			r := command{Argv: dd, Dir: dir}.run(t)
			got, err := os.ReadFile(filepath.Join(dir, "out"))
			_, text, code := formattest.TryOracle(t, "qemu-img", "dd", "-f", "qcow2", "-O", "raw", "if="+path, "of="+filepath.Join(dir, "theirs"), "bs=64k", "count=2")
			if r.Code != code {
				t.Fatalf("exit code %d, qemu-img %d: %s%s", r.Code, code, r.Stderr, text)
			}
			if r.Code != 0 {
				r.oneLine(t)
				if err == nil {
					t.Error("it failed and left its output")
				}
				return
			}
			theirs, err2 := os.ReadFile(filepath.Join(dir, "theirs"))
			if err != nil || err2 != nil || !bytes.Equal(got, theirs) || len(got) != 2*cluster {
				t.Errorf("%d bytes, qemu-img %d (%v %v)", len(got), len(theirs), err, err2)
			}
		})
	}
}

// Case 21: an image that was not closed is repaired before it is written, as
// qemu-img does; one that is known to be corrupt is not written. Both can be read.
func TestMarked(t *testing.T) {
	for _, name := range []string{"21 dirty", "21 corrupt"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			b := named(t, name).bytes
			path := write(t, dir, "image", b)
			theirs := write(t, dir, "theirs", b)
			write(t, dir, "disk", bytes.Repeat([]byte("instar! "), cluster/8))
			if r := (command{Argv: []string{"dd", "-O", "raw", "if=image", "of=out", "bs=64k", "count=1"}, Dir: dir}).run(t); r.Code != 0 {
				t.Errorf("it cannot be read: %s", r.Stderr)
			}
			os.Remove(filepath.Join(dir, "out"))
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, b) {
				t.Errorf("it was changed by reading (%v)", err)
			}
			r := command{Argv: []string{"convert", "-n", "-f", "raw", "-O", "qcow2", "disk", "image"}, Dir: dir}.run(t)
			_, text, code := formattest.TryOracle(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", filepath.Join(dir, "disk"), theirs)
			if (r.Code == 0) != (code == 0) || (r.Code == 0) != (name == "21 dirty") {
				t.Fatalf("exit code %d, qemu-img %d: %s%s", r.Code, code, r.Stderr, text)
			}
			after, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if r.Code != 0 {
				if r.oneLine(t); !bytes.Equal(after, b) {
					t.Error("it was refused, and yet written")
				}
				return
			}
			if after[79]&1 != 0 {
				t.Error("it is still marked dirty")
			}
			formattest.Oracle(t, "qemu-img", "check", "-f", "qcow2", path)
		})
	}
}

// Case 7, for all verbs: special files are refused without waiting for anybody.
func TestSpecialFilesVerbs(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fifo", "/dev/zero", "/", "/dev/stdin"} {
		for _, image := range []bool{true, false} {
			arg := name
			if image {
				write(t, dir, "image", newQcow().backing(name).bytes())
				arg = "image"
			}
			for _, verb := range []string{"map @", "check @", "measure -O qcow2 @", "compare @ @", "dd -O raw if=@ of=out bs=64k count=4", "info --backing-chain @"} {
				words := strings.Fields(strings.ReplaceAll(verb, "@", arg))
				if image && words[0] == "check" {
					continue // looks at the image alone
				}
				command{Argv: words, Dir: dir}.run(t).oneLine(t)
				if got := listing(t, dir); got != "fifo" && got != "fifo image" {
					t.Errorf("%s left %s", words, got)
				}
			}
		}
	}
}

// Case 9, for compare: an ambiguous image is refused under --untrusted on either
// side.
func TestAmbiguousCompare(t *testing.T) {
	dir := t.TempDir()
	tail := vhd(func(_, _ []byte) {})
	write(t, dir, "both", append(newQcow().bytes(), tail[len(tail)-512:]...))
	write(t, dir, "one", newQcow().bytes())
	for _, words := range [][]string{{"both", "one"}, {"one", "both"}, {"-f", "qcow2", "one", "both"}, {"-F", "qcow2", "both", "one"}} {
		line := command{Argv: append([]string{"compare", "--untrusted"}, words...), Dir: dir}.run(t).oneLine(t)
		if !strings.Contains(line, "vpc") {
			t.Errorf("%s: %s", words, line)
		}
	}
	if r := (command{Argv: []string{"compare", "--untrusted", "-f", "qcow2", "-F", "qcow2", "both", "one"}, Dir: dir}).run(t); r.Code != 0 {
		t.Errorf("with both formats named: %s%s", r.Stdout, r.Stderr)
	}
}

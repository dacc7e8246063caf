//go:build linux

package hostile

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// liarVariable names the test plugin where it was built before.
const liarVariable = "INSTAR_TEST_LIAR"

// liar builds the test plugin, once.
var liar = sync.OnceValues(func() (string, error) {
	if path := os.Getenv(liarVariable); path != "" {
		return path, nil
	}
	dir := filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "liar")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "liar")
	build := exec.Command("go", "build", "-tags", "grpcnotrace", "-o", path, "./testdata/liar")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return path, os.Chmod(path, 0o755)
})

// lying is a directory with the liar installed as a plugin, and one to work in.
type lying struct {
	t       *testing.T
	name    string
	plugins string
	dir     string
	runtime string // of socket directories
}

func install(t *testing.T, name string) *lying {
	t.Helper()
	path, err := liar()
	if err != nil {
		t.Fatal(err)
	}
	l := &lying{t: t, name: name, plugins: filepath.Join(t.TempDir(), "plugins"), dir: t.TempDir(), runtime: runtimeDir(t)}
	if err := os.Mkdir(l.plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(l.plugins, "instar-format-"+name)
	if err := os.Symlink(path, program); err != nil {
		t.Fatal(err)
	}
	manifest, err := exec.Command(program, "--manifest").Output()
	if err != nil {
		t.Fatal(err)
	}
	write(t, l.plugins, "instar-format-"+name+".json", manifest)
	write(t, l.dir, "src", bytes.Repeat([]byte("instar! "), 1<<20/8))
	write(t, l.dir, "precious", []byte("precious"))
	write(t, l.dir, "hole", append(make([]byte, 1<<19), bytes.Repeat([]byte("instar! "), 1<<19/8)...))
	write(t, l.dir, "old", make([]byte, 1<<20))
	return l
}

func (l *lying) command(args ...string) command {
	return command{Argv: args, Dir: l.dir, Env: []string{"INSTAR_PLUGIN_PATH=" + l.plugins, "XDG_RUNTIME_DIR=" + l.runtime}}
}

func (l *lying) run(args ...string) *result {
	l.t.Helper()
	r := l.command(args...).run(l.t)
	l.clean()
	return r
}

// clean checks that a run that failed left nothing and spoilt nothing.
func (l *lying) clean() {
	l.t.Helper()
	noSocketDirs(l.t, l.runtime)
	for _, name := range strings.Fields(listing(l.t, l.dir)) {
		if name != "src" && name != "precious" && name != "hole" && name != "old" {
			l.t.Errorf("%s was left", name)
			os.Remove(filepath.Join(l.dir, name))
		}
	}
	if b, err := os.ReadFile(filepath.Join(l.dir, "precious")); err != nil || string(b) != "precious" {
		l.t.Errorf("precious is now %q (%v)", clip(string(b)), err)
	}
}

// reached is a point at which a plugin may misbehave, and a command line that
// gets there.
type reached struct {
	when string
	args string // @ is the plugin's format
}

var points = []reached{
	{"start", "info -f @ src"},
	{"describe", "info -f @ src"},
	{"open", "info -f @ src"},
	{"info", "info -f @ src"},
	{"map", "map -f @ src"},
	{"map", "convert -f @ -O raw src out"},
	{"map", "compare -f @ -F raw src src"},
	{"map", "measure -f @ -O qcow2 src"},
	{"decode", "convert -f @ -O raw src out"},
	{"decode", "dd -f @ -O raw if=src of=out"},
	{"check", "check -f @ src"},
	{"inspect", "inspect -f @ src"},
	{"plan", "create -f @ out 1M"},
	{"emit", "create -f @ out 1M"},
	{"measure", "measure -O @ --size 1M"},
	{"begin", "convert -f raw -O @ src out"},
	{"place", "convert -f raw -O @ src out"},
	{"finish", "convert -f raw -O @ src out"},
	{"encode", "convert -c -f raw -O @ src out"},
	{"attach", "map -f @ src"},
	{"attach", "convert -f @ -O raw src out"},
	{"zero", "convert -n -f raw -O @ hole old"},
	{"repair", "check -r all -f @ src"},
	{"readbitmap", "convert --bitmaps -f @ -O qcow2 src out"},
	{"writebitmap", "convert --bitmaps -f @ -O @ src out"},
	{"close", "check -f @ src src"},
}

func (p reached) words(name string) []string {
	return strings.Fields(strings.ReplaceAll(p.args, "@", name))
}

// forEach runs a test for each point.
func forEach(t *testing.T, how string, test func(t *testing.T, l *lying, p reached, words []string)) {
	for _, p := range points {
		verb, _, _ := strings.Cut(p.args, " ")
		t.Run(p.when+"/"+verb, func(t *testing.T) {
			t.Parallel()
			name := how + "-" + p.when
			test(t, install(t, name), p, p.words(name))
		})
	}
}

// A plugin that dies is named, with how it ended.
func TestDies(t *testing.T) {
	for how, want := range map[string]string{"exit": "status 3", "panic": "for no reason"} {
		t.Run(how, func(t *testing.T) {
			forEach(t, how, func(t *testing.T, l *lying, p reached, words []string) {
				r := l.run(words...)
				if p.when == "close" {
					return // the answer was there before
				}
				if p.when == "inspect" {
					if r.Code != 1 || !strings.Contains(r.Stdout, "unreadable: ") || !strings.Contains(r.Stdout, want) {
						t.Errorf("got %d: %s%s", r.Code, r.Stdout, r.Stderr)
					}
					return
				}
				line := r.oneLine(t)
				if p.when != "start" && !(strings.Contains(line, l.name) && strings.Contains(line, want)) {
					t.Errorf("got %s", line)
				}
			})
		})
	}
}

// Images that are worked on side by side share one process of their plugin, and
// it does not outlive them.
func TestOneProcess(t *testing.T) {
	l := install(t, "plain")
	for range 20 {
		r := l.run("check", "-f", "plain", "src", "src", "src", "src", "src", "src", "src", "src")
		// instar, and a plugin that it did not wait for.
		if r.Code != 0 || r.Processes > 2 {
			t.Fatalf("exit code %d, %d processes\n%s", r.Code, r.Processes, r.Stderr)
		}
	}
}

// Where a plugin hangs, --timeout ends the run, and so does an interrupt.
func TestHangs(t *testing.T) {
	t.Run("timeout", func(t *testing.T) {
		forEach(t, "hang", func(t *testing.T, l *lying, p reached, words []string) {
			r := l.run(append(words, "--timeout", "1s")...)
			if p.when == "close" && r.Code == 0 {
				return // nothing depends on the answer
			}
			if line := r.oneLine(t); !strings.Contains(line, "timed out after 1s") {
				t.Errorf("got %s", line)
			}
			if r.Wall > 30*time.Second {
				t.Errorf("took %v", r.Wall)
			}
		})
	})
	t.Run("interrupt", func(t *testing.T) {
		forEach(t, "hang", func(t *testing.T, l *lying, p reached, words []string) {
			c := l.command(words...)
			c.Interrupt = time.Second
			r := c.run(t)
			l.clean()
			if p.when == "close" && r.Code == 0 {
				return
			}
			if line := r.oneLine(t); r.Code != 130 || line != "instar: interrupted" {
				t.Errorf("got %d: %s", r.Code, line)
			}
		})
	})
}

// A plugin that leaves a request unanswered ends every verb under --untrusted,
// those that copy too, and so it does by --idle-timeout alone.
func TestIdle(t *testing.T) {
	forEach(t, "hang", func(t *testing.T, l *lying, p reached, words []string) {
		if p.when == "start" {
			return // the time to start has a limit of its own
		}
		r := l.run(append(words, "--idle-timeout", "1s")...)
		if p.when == "close" && r.Code == 0 {
			return // nothing depends on the answer
		}
		if r.Wall > 30*time.Second {
			t.Errorf("took %v", r.Wall)
		}
		want := "plugin " + l.name + " has not answered for 1s"
		if p.when == "inspect" { // its verdict is the result
			if r.Code != 1 || !strings.Contains(r.Stdout, want) || !strings.HasSuffix(r.Stdout, "\nsafe: no\n") {
				t.Errorf("got %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
			return
		}
		if line := r.oneLine(t); !strings.HasSuffix(line, want) {
			t.Errorf("got %s", line)
		}
	})
	// One that computes for ever does not answer either, one that answers now and
	// then is not idle.
	t.Run("spin", func(t *testing.T) {
		l := install(t, "spin-decode")
		c := l.command("convert", "-f", l.name, "-O", "raw", "--idle-timeout", "1s", "src", "out")
		c.CPU = 60
		r := c.start(t)
		l.clean()
		if line := r.oneLine(t); !strings.Contains(line, "has not answered for 1s") {
			t.Errorf("got %s", line)
		}
	})
	t.Run("slow", func(t *testing.T) {
		l := install(t, "slow-open")
		r := l.command("convert", "-f", l.name, "-O", "raw", "--idle-timeout", "3s", "src", "src", "src", "src", "out").run(t)
		if r.Code != 0 || r.Wall < 3*time.Second {
			t.Errorf("%d after %v: %s", r.Code, r.Wall, r.Stderr)
		}
	})
}

// Text of a plugin is shown on one line, cut, and without its control
// characters.
func TestShouts(t *testing.T) {
	forEach(t, "shout", func(t *testing.T, l *lying, p reached, words []string) {
		if p.when == "start" || p.when == "describe" || p.when == "close" {
			return // nothing it says there is heard
		}
		r := l.run(words...)
		if p.when == "inspect" { // its verdict is the result
			if r.Code != 1 || control.MatchString(r.Stdout) || !strings.HasSuffix(r.Stdout, "\nsafe: no\n") {
				t.Errorf("got %d: %q", r.Code, clip(r.Stdout))
			}
			return
		}
		r.oneLine(t)
	})
}

// What a plugin warns of is a few lines, each behind the core's own words, and so is
// its advice.
func TestWarnings(t *testing.T) {
	for _, c := range []struct {
		name  string
		lines int
	}{{"warn-many", 9}, {"warn-long", 1}, {"warn-escapes", 2}, {"hint-open", 2}} {
		l := install(t, c.name)
		for _, args := range []string{"info -f @ src", "map -f @ src", "check -f @ src", "measure -f @ -O raw src", "compare -f @ -F raw src src"} {
			r := l.run(strings.Fields(strings.ReplaceAll(args, "@", c.name))...)
			lines := strings.Split(strings.TrimSuffix(r.Stderr, "\n"), "\n")
			if len(lines) != c.lines || len(r.Stderr) > 8192 || control.MatchString(r.Stderr) || strings.Contains(r.Stderr, "\u202e") {
				t.Errorf("%s: %s: %d lines: %q", c.name, args, len(lines), clip(r.Stderr))
			}
			for i, line := range lines {
				if !strings.HasPrefix(line, "instar: ") && (i == 0 || c.name != "hint-open") {
					t.Errorf("%s: %s: %q", c.name, args, clip(line))
				}
			}
		}
	}
}

// What a plugin prints is kept from the user, and does not stop it.
func TestFlood(t *testing.T) {
	forEach(t, "flood", func(t *testing.T, l *lying, p reached, words []string) {
		r := l.command(words...).run(t)
		noSocketDirs(t, l.runtime)
		if len(r.Stderr) > 8192 {
			t.Errorf("%d bytes of noise reached the user", len(r.Stderr))
		}
		// Before the handshake noise stands where it should; inspect finds what it is of.
		if p.when != "start" && p.when != "describe" && p.when != "inspect" && r.Code != 0 {
			t.Errorf("exit code %d: %s", r.Code, clip(r.Stderr))
		}
	})
}

// A plugin that eats memory is stopped, wherever it does.
func TestEats(t *testing.T) {
	for _, extra := range []string{"--max-memory=64M", "--untrusted"} {
		for _, p := range points {
			switch p.when {
			case "start", "describe", "close":
				continue // it is not limited yet, or nobody waits for the answer
			case "open", "map", "decode", "check":
			default:
				if extra == "--untrusted" {
					continue // which limit it is makes no difference
				}
			}
			verb, _, _ := strings.Cut(p.args, " ")
			t.Run(p.when+"/"+verb+extra, func(t *testing.T) {
				l := install(t, "eat-"+p.when)
				c := l.command(append(p.words(l.name), extra)...)
				c.CPU = 30
				r := c.start(t)
				l.clean()
				if p.when == "inspect" {
					if r.Code != 1 || !strings.Contains(r.Stdout, "memory") {
						t.Errorf("got %d: %s%s", r.Code, r.Stdout, r.Stderr)
					}
				} else if line := r.oneLine(t); !strings.Contains(line, "memory") {
					t.Errorf("got %s", line)
				}
				if most := int64(450 << 20); r.MaxRSS > most {
					t.Errorf("it got %d MiB", r.MaxRSS>>20)
				}
			})
		}
	}
}

// A plugin cannot start a process.
func TestForks(t *testing.T) {
	forEach(t, "fork", func(t *testing.T, l *lying, p reached, words []string) {
		if p.when == "start" || p.when == "describe" || p.when == "close" {
			return // its error is not asked for there
		}
		r := l.run(words...)
		if p.when == "inspect" {
			if r.Code != 1 || !strings.Contains(r.Stdout, "peration not permitted") {
				t.Errorf("got %d: %s%s", r.Code, r.Stdout, r.Stderr)
			}
			return
		}
		if line := r.oneLine(t); !strings.Contains(line, "peration not permitted") {
			t.Errorf("got %s", line)
		}
	})
}

// A plugin that speaks another protocol than its manifest says is an error that
// names it, and both.
func TestUnknownMajor(t *testing.T) {
	for _, major := range []string{"0", "2", "7", "99999999999999999999", "x"} {
		t.Run(major, func(t *testing.T) {
			t.Parallel()
			l := install(t, "major-"+major)
			for _, args := range []string{"info -f @ src", "create -f @ out 1M", "convert -f raw -O @ src out"} {
				line := l.run(reached{args: args}.words(l.name)...).oneLine(t)
				if !strings.Contains(line, l.name) {
					t.Errorf("%s: %s", args, line)
				}
				if len(major) == 1 && major != "x" && !strings.Contains(line, "speaks protocol "+major+", this instar speaks 1") {
					t.Errorf("%s: %s", args, line)
				}
			}
		})
	}
}

// lies are answers that are not true: how-when, and the command lines that ask.
var lies = []struct {
	name   string
	args   string // separated by ;
	refuse bool   // all must fail
}{
	{"map-beyond", "map -f @ src; convert -f @ -O raw src out; compare -f @ -F raw src src; measure -f @ -O qcow2 src", false},
	{"map-overlap", "map -f @ src; convert -f @ -O raw src out; measure -f @ -O qcow2 src", false},
	{"map-overflow", "map -f @ src; convert -f @ -O raw src out; compare -f @ -F raw src src", true},
	{"map-file", "map -f @ src; convert -f @ -O raw src out; compare -f @ -F raw src src; measure -f @ -O qcow2 src", true},
	{"map-long", "map -f @ src; convert -f @ -O raw src out", true},
	{"map-max", "map -f @ src; convert -f @ -O raw src out", true},
	{"map-negative", "map -f @ src; convert -f @ -O raw src out", true},
	{"map-none", "map -f @ src; convert -f @ -O raw src out", true},
	{"map-short", "map -f @ src; convert -f @ -O raw src out", true},
	{"map-kind", "map -f @ src; convert -f @ -O raw src out", true},
	{"map-nowhere", "map -f @ src; convert -f @ -O raw src out", true},
	{"map-encoded", "map -f @ src; convert -f @ -O raw src out; dd -f @ -O raw if=src of=out bs=4k skip=3 count=1", false},
	{"map-huge", "map -f @ src; convert -f @ -O raw src out", false},
	{"info-negative", "info -f @ src; convert -f @ -O raw src out", true},
	{"info-max", "info -f @ src; map -f @ --timeout 2s src; convert -f @ -O raw --timeout 2s src out; measure -f @ -O qcow2 --timeout 2s src", false},
	{"info-unit", "info -f @ src; convert -f @ -O raw src out; measure -f @ -O qcow2 src", false},
	{"info-kind", "info -f @ src", true},
	{"info-many", "info -f @ src; info -f @ --output json src", false},
	{"info-big", "info -f @ src", true},
	{"info-deep", "info -f @ src; info -f @ --output json src", false},
	{"info-snapshot", "info -f @ src; info -f @ --output json src", false},
	{"info-utf8", "info -f @ src", false},
	{"check-counts", "check -f @ src; check -f @ --output json src", false},
	{"check-progress", "check -f @ src", false},
	{"measure-lie", "measure -O @ --size 1M; measure -O @ --size 1M --output json", true},
	{"plan-none", "create -f @ out 1M; convert -f raw -O @ src out; measure -O @ --size 1M", false},
	{"plan-role", "create -f @ out 1M; convert -f raw -O @ src out", true},
	{"plan-up", "create -f @ out 1M; convert -f raw -O @ src out", true},
	{"plan-absolute", "create -f @ out 1M; convert -f raw -O @ src out", true},
	{"plan-same", "create -f @ out 1M; convert -f raw -O @ src out", true},
	{"plan-dot", "create -f @ out 1M", true},
	{"plan-empty", "create -f @ out 1M", true},
	{"plan-nul", "create -f @ out 1M", true},
	{"plan-long", "create -f @ out 1M", true},
	{"plan-negative", "create -f @ out 1M; convert -f raw -O @ src out", true},
	{"plan-huge", "create -f @ out 1M; convert -f raw -O @ src out", false},
	{"plan-full", "create -f @ out 1M", true},
	{"unit-zero", "convert -f raw -O @ src out", true},
	{"unit-negative", "convert -f raw -O @ src out", true},
	{"unit-one", "convert -f raw -O @ src out; convert -c -f raw -O @ src out", false},
	{"unit-odd", "convert -f raw -O @ src out; convert -c -f raw -O @ src out", false},
	{"unit-max", "convert -f raw -O @ src out; convert -c -f raw -O @ src out", false},
	{"unit-maxexplode", "convert -f raw -O @ src out; convert -c -f raw -O @ src out", false},
	{"unit-big", "convert -f raw -O @ src out", false},
	{"unit-encode", "convert -f raw -O @ src out", true},
	{"unit-encode64", "convert -f raw -O @ src out", false},
	{"place-far", "convert -f raw -O @ src out; dd -f raw -O @ if=src of=out", true},
	{"place-beyond", "convert -f raw -O @ src out", true},
	{"place-max", "convert -f raw -O @ src out", true},
	{"place-overflow", "convert -f raw -O @ src out", true},
	{"place-negative", "convert -f raw -O @ src out", true},
	{"place-file", "convert -f raw -O @ src out", true},
	{"place-filenegative", "convert -f raw -O @ src out", true},
	{"place-short", "convert -f raw -O @ src out", true},
	{"place-long", "convert -f raw -O @ src out", true},
	{"place-other", "convert -f raw -O @ src out", true},
	{"place-none", "convert -f raw -O @ src out", true},
	{"place-twice", "convert -f raw -O @ src out", true},
	{"bitmap-granularity", "info -f @ src; convert --bitmaps -f @ -O qcow2 src out; measure -f @ -O qcow2 src", false},
	{"bitmap-zero", "info -f @ src; convert --bitmaps -f @ -O qcow2 src out; measure -f @ -O qcow2 src", false},
	{"bitmap-negative", "info -f @ src; convert --bitmaps -f @ -O qcow2 src out; measure -f @ -O qcow2 src", false},
	{"bitmap-name", "convert --bitmaps -f @ -O qcow2 src out", true},
	{"bitmap-twice", "convert --bitmaps -f @ -O qcow2 src out", false},
	{"bitmap-many", "convert --bitmaps -f @ -O qcow2 src out", false},
	{"bitmap-beyond", "convert --bitmaps -f @ -O qcow2 src out", true},
	{"bitmap-overflow", "convert --bitmaps -f @ -O qcow2 src out", true},
	{"bitmap-minus", "convert --bitmaps -f @ -O qcow2 src out", true},
	{"bitmap-length", "convert --bitmaps -f @ -O qcow2 src out", true},
	{"bitmap-back", "convert --bitmaps -f @ -O qcow2 src out", false},
	{"info-ansi", "info -f @ src; info -f @ --output json src", false},
	{"check-ansi", "check -f @ src; check -f @ --output json src", false},
}

func TestLies(t *testing.T) {
	for _, lie := range lies {
		t.Run(lie.name, func(t *testing.T) {
			t.Parallel()
			l := install(t, lie.name)
			before, err := os.ReadFile(filepath.Join(l.dir, "src"))
			if err != nil {
				t.Fatal(err)
			}
			for _, args := range strings.Split(lie.args, "; ") {
				r := l.command(reached{args: args}.words(lie.name)...).run(t)
				differ := strings.HasPrefix(args, "compare") && r.Code == 1 && r.Stderr == ""
				if (lie.refuse || r.Code != 0) && !differ {
					r.oneLine(t)
					l.clean()
				}
				os.Remove(filepath.Join(l.dir, "out"))
			}
			l.clean()
			if after, err := os.ReadFile(filepath.Join(l.dir, "src")); err != nil || !bytes.Equal(before, after) {
				t.Errorf("the source was changed (%v)", err)
			}
		})
	}
	for _, path := range []string{"/tmp/escaped-by-the-liar"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s was made", path)
		}
	}
}

// An answer that is too large is said to be, without gRPC's words.
func TestBigAnswer(t *testing.T) {
	l := install(t, "info-big")
	if line := l.run("info", "-f", "info-big", "src").oneLine(t); !strings.HasSuffix(line, "the plugin's answer is too large to be taken") {
		t.Errorf("got %s", line)
	}
}

// A plan for a file that is there is no way to spoil it.
func TestPlanExisting(t *testing.T) {
	l := install(t, "plan-existing")
	for _, args := range []string{"create -f @ out 1M", "convert -f raw -O @ src out"} {
		r := l.command(reached{args: args}.words(l.name)...).run(t)
		if r.Code != 0 {
			r.oneLine(t)
			l.clean()
		}
	}
}

// Without an end, an answer is cut short by --timeout.
func TestEndless(t *testing.T) {
	for name, args := range map[string]string{
		"map-endless":    "convert -f @ -O raw --timeout 2s src out",
		"map-empty":      "map -f @ --timeout 2s src",
		"check-endless":  "check -f @ --timeout 2s src",
		"spin-open":      "info -f @ --timeout 2s src",
		"bitmap-endless": "convert --bitmaps -f @ -O qcow2 --timeout 2s src out",
	} {
		t.Run(name, func(t *testing.T) {
			l := install(t, name)
			c := l.command(reached{args: args}.words(name)...)
			c.CPU = 60
			r := c.start(t)
			l.clean()
			if name == "check-endless" {
				// Its messages are the result, up to the end.
				_, r.Stderr, _ = strings.Cut(r.Stderr, "instar: ")
				r.Stderr = "instar: " + r.Stderr
			}
			r.oneLine(t)
			if r.MaxRSS > memoryMost {
				t.Errorf("%d MiB of memory", r.MaxRSS>>20)
			}
		})
	}
}

// What a plugin names is not opened for it under --untrusted.
func TestReferencesOfTheTakenOver(t *testing.T) {
	for _, kind := range []string{"backing", "data", "extent"} {
		t.Run(kind, func(t *testing.T) {
			l := install(t, "info-"+kind)
			secret := write(t, l.dir, "SECRET", bytes.Repeat([]byte("secret  "), 1<<17))
			opened := watch(t, secret)
			for _, args := range []string{"info -f @ src", "map -f @ src", "check -f @ src", "convert -f @ -O raw src out", "compare -f @ -F raw src src", "dd -f @ -O raw if=src of=out", "measure -f @ -O qcow2 src", "info -f @ --backing-chain src"} {
				l.command(append(reached{args: args}.words(l.name), "--untrusted")...).run(t)
				if opened() {
					t.Errorf("%s: it was opened", args)
				}
				if b, err := os.ReadFile(filepath.Join(l.dir, "out")); err == nil && bytes.Contains(b, []byte("secret")) {
					t.Errorf("%s: its content leaked", args)
				}
				os.Remove(filepath.Join(l.dir, "out"))
			}
		})
	}
}

// A plugin that is not what its manifest says is an error that names both.
func TestManifestDisagrees(t *testing.T) {
	l := install(t, "honest")
	path := filepath.Join(l.plugins, "instar-format-honest.json")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ from, to, key string }{{`"version": "1"`, `"version": "2"`, "version"}, {`"check",`, ``, "capabilities"}} {
		changed := bytes.Replace(b, []byte(c.from), []byte(c.to), 1)
		if bytes.Equal(changed, b) {
			t.Fatalf("%s is not in %s", c.from, b)
		}
		write(t, l.plugins, "instar-format-honest.json", changed)
		line := l.run("info", "-f", "honest", "src").oneLine(t)
		if !strings.Contains(line, path) || !strings.Contains(line, "other "+c.key+")") || !strings.Contains(line, filepath.Join(l.plugins, "instar-format-honest")+" ") {
			t.Errorf("got %s", line)
		}
	}
	for _, junk := range []string{"", "{", "[]", `{"name":"honest"}`, `{"name":"honest","version":"1","protocols":[7],"capabilities":["open"]}`, strings.Repeat("[", 100_000), `{"name":"../../x","version":"1","protocols":[1],"capabilities":["open"]}`} {
		write(t, l.plugins, "instar-format-honest.json", []byte(junk))
		l.run("info", "-f", "honest", "src").oneLine(t)
	}
}

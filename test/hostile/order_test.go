//go:build linux

package hostile

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// strace is where that program is, which may not be allowed to trace here.
func strace(t testing.TB) string {
	t.Helper()
	path, err := exec.LookPath("strace")
	if err != nil {
		t.Fatalf("%v: Debian package strace", err)
	}
	if out, err := exec.Command(path, "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("tracing does not work here: %v: %s", err, bytes.TrimSpace(out))
	}
	return path
}

const (
	writing    = "write,pwrite64,writev,pwritev,pwritev2,ftruncate,fallocate,copy_file_range,sendfile,ioctl"
	syncing    = "fsync,fdatasync"
	nameGiving = "link,linkat,rename,renameat,renameat2"
)

// event is a call that was traced, from where it began to where it ended in the
// order of all lines.
type event struct {
	call, args string
	begin, end int
}

var (
	traced    = regexp.MustCompile(`^(\d+) +(\w+)\((.*)$`)
	resumed   = regexp.MustCompile(`^(\d+) +<\.\.\. \w+ resumed>(.*)$`)
	onFile    = regexp.MustCompile(`^\d+<([^>]*)>`)
	unnamed   = regexp.MustCompile(`O_TMPFILE.*= (\d+)<([^>]*)>`)
	fromTo    = regexp.MustCompile(`^(?:[A-Z_0-9]+<([^>]*)>, )?"([^"]*)", (?:[A-Z_0-9]+<([^>]*)>, )?"([^"]*)"`)
	failed    = regexp.MustCompile(`= -1 E`)
	writeIoct = regexp.MustCompile(`FICLONE`)
)

// events reads what strace -f -y wrote.
func events(t testing.TB, path string) []event {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var out []event
	pending := map[string]int{}
	for i, line := range strings.Split(string(text), "\n") {
		if m := resumed.FindStringSubmatch(line); m != nil {
			if at, ok := pending[m[1]]; ok {
				out[at].args += m[2]
				out[at].end = i
				delete(pending, m[1])
			}
			continue
		}
		m := traced.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		args, unfinished := strings.CutSuffix(m[3], "<unfinished ...>")
		if unfinished {
			pending[m[1]] = len(out)
		}
		out = append(out, event{m[2], args, i, i})
	}
	return out
}

// history is what was done to a file, by lines of the trace.
type history struct {
	lastWrite int
	syncs     [][2]int
	named     int // when its name was given, 0: never
}

// files finds out what was done to the files in dir, by the name that each got.
func files(t testing.TB, all []event, dir string) map[string]*history {
	t.Helper()
	known := map[string]*history{} // by what strace calls the file
	get := func(path string) *history {
		if known[path] == nil {
			known[path] = &history{}
		}
		return known[path]
	}
	tmp, byName := map[string]string{}, map[string]*history{}
	is := func(set, call string) bool { return slices.Contains(strings.Split(set, ","), call) }
	for _, e := range all {
		if m := unnamed.FindStringSubmatch(e.args); e.call == "openat" && m != nil {
			tmp[m[1]] = m[2]
			continue
		}
		if failed.MatchString(e.args) {
			continue
		}
		if is(nameGiving, e.call) {
			m := fromTo.FindStringSubmatch(e.args)
			if m == nil {
				t.Fatalf("%s(%s is not understood", e.call, e.args)
			}
			from, to := filepath.Join(m[1], m[2]), filepath.Join(m[3], m[4])
			if fd, ok := strings.CutPrefix(m[2], "/proc/self/fd/"); ok {
				if from, ok = tmp[fd]; !ok {
					t.Fatalf("%s(%s: of a file that was not seen", e.call, e.args)
				}
			}
			if filepath.Dir(to) == dir {
				h := get(from)
				known[to] = h
				if base := filepath.Base(to); !strings.HasPrefix(base, ".") {
					h.named, byName[base] = e.begin, h
				}
			}
			continue
		}
		m := onFile.FindStringSubmatch(e.args)
		if m == nil || filepath.Dir(m[1]) != dir {
			continue
		}
		switch h := get(m[1]); {
		case is(syncing, e.call):
			h.syncs = append(h.syncs, [2]int{e.begin, e.end})
		case is(writing, e.call) && (e.call != "ioctl" || writeIoct.MatchString(e.args)):
			h.lastWrite = e.end
		}
	}
	return byName
}

// making are command lines that make a new image, @, of the disk.
var making = []struct {
	name, args string
	several    bool
}{
	{"create", "create -q -f qcow2 @ 4M", false},
	{"raw", "convert -f raw -O raw disk @", false},
	{"qcow2", "convert -f raw -O qcow2 disk @", false},
	{"qcow2 compressed", "convert -c -f raw -O qcow2 disk @", false},
	{"vmdk", "convert -f raw -O vmdk disk @", false},
	{"vmdk stream", "convert -f raw -O vmdk -o subformat=streamOptimized disk @", false},
	{"vmdk flat", "convert -f raw -O vmdk -o subformat=monolithicFlat disk @", true},
	{"vmdk split", "convert -f raw -O vmdk -o subformat=twoGbMaxExtentSparse disk @", true},
	{"vpc", "convert -f raw -O vpc disk @", false},
	{"vhdx", "convert -f raw -O vhdx disk @", false},
	{"dd", "dd -f raw -O qcow2 bs=64k if=disk of=@", false},
}

// An image gets its name when all of it is written, its main file last. Where the
// name stood for another file all is on stable storage before.
func TestNamedWhenComplete(t *testing.T) {
	tracer := strace(t)
	for _, c := range making {
		for _, replace := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s replace %v", c.name, replace), func(t *testing.T) {
				t.Parallel()
				dir, err := filepath.EvalSymlinks(work(t))
				if err != nil {
					t.Fatal(err)
				}
				log := filepath.Join(t.TempDir(), "trace")
				if replace {
					write(t, dir, "out.img", []byte("what was there before"))
				}
				words := strings.Fields(strings.ReplaceAll(c.args, "@", "out.img"))
				argv := append([]string{
					tracer, "-f", "-y", "-qq", "-s", "256", "-e", "signal=none",
					"-e", "trace=openat," + writing + "," + syncing + "," + nameGiving, "-o", log, program(t, "instar"),
				}, words...)
				if r := (command{Argv: argv, Dir: dir, CPU: 30, Env: []string{"XDG_RUNTIME_DIR=" + runtimeDir(t)}}).start(t); r.Code != 0 {
					t.Fatalf("exit code %d: %s", r.Code, clip(r.Stderr))
				}
				got := files(t, events(t, log), dir)
				main := got["out.img"]
				if main == nil || c.several != (len(got) > 1) {
					t.Fatalf("files that got names: %v", slices.Sorted(maps.Keys(got)))
				}
				for name, h := range got {
					if h.lastWrite == 0 || h.lastWrite >= h.named {
						t.Errorf("%s got its name at line %d of the trace, and was last written at %d", name, h.named, h.lastWrite)
					}
					if h.named > main.named {
						t.Errorf("%s got its name after the main file", name)
					}
					synced := slices.ContainsFunc(h.syncs, func(s [2]int) bool { return s[0] > h.lastWrite && s[1] < main.named })
					if replace && name == "out.img" && !synced {
						t.Errorf("%s took the place of a file without being synced", name)
					}
				}
			})
		}
	}
}

// A command that is killed at the call that writes, syncs or names leaves the old
// file, or the new one whole; where there was none, none or that.
func TestKilledAtCalls(t *testing.T) {
	tracer := strace(t)
	for _, c := range making {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir, runtime := work(t), runtimeDir(t)
			old := []byte("what was there before")
			words := strings.Fields(strings.ReplaceAll(c.args, "@", "out.img"))
			whole := 0
			for _, at := range []string{"pwrite64:2", "pwrite64:4", "ftruncate:1", "fsync:1", "linkat:1", "renameat:1", "renameat2:1", "unlinkat:1"} {
				for _, replace := range []bool{false, true} {
					call, when, _ := strings.Cut(at, ":")
					if replace && c.several || !replace && (call == "fsync" || strings.HasPrefix(call, "rename")) {
						continue
					}
					for _, name := range strings.Fields(listing(t, dir)) {
						if name != "disk" {
							os.Remove(filepath.Join(dir, name))
						}
					}
					if replace {
						write(t, dir, "out.img", old)
					}
					argv := append([]string{
						tracer, "-f", "-qq", "-e", "signal=none", "-e", "trace=" + call, "-e", "inject=" + call + ":signal=KILL:when=" + when,
						"-o", os.DevNull, program(t, "instar"),
					}, words...)
					r := command{Argv: argv, Dir: dir, CPU: 30, Env: []string{"XDG_RUNTIME_DIR=" + runtime}}.start(t)
					if len(r.Left) > 0 {
						t.Errorf("%s: processes %v outlived it", at, r.Left)
					}
					b, err := os.ReadFile(filepath.Join(dir, "out.img"))
					if replace && bytes.Equal(b, old) || !replace && os.IsNotExist(err) {
						continue
					}
					whole++
					judge := []string{"compare", "disk", "out.img"}
					if c.name == "create" {
						judge = []string{"check", "out.img"}
					}
					if r := (command{Argv: judge, Dir: dir}).run(t); r.Code != 0 {
						t.Errorf("killed at %s, replace %v: %s%s", at, replace, r.Stdout, r.Stderr)
					}
				}
			}
			t.Logf("%d were whole", whole)
		})
	}
}

package discover

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk"
)

// dir returns a directory that nobody else can write.
func dir(t testing.TB) string {
	t.Helper()
	d := t.TempDir()
	if err := os.Chmod(d, 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

// install puts a program into dir that is not run, with a manifest.
func install(t testing.TB, dir string, m sdk.Manifest) {
	t.Helper()
	if m.Version == "" {
		m.Version = "1"
	}
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, Prefix+m.Name)
	write(t, program, "", 0o755)
	write(t, program+".json", string(b), 0o644)
}

func write(t testing.TB, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func find(t testing.TB, dirs ...string) *Set {
	t.Helper()
	s, err := Find(Options{Dirs: dirs})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func names(s *Set) []string {
	var all []string
	for _, p := range s.Plugins() {
		all = append(all, p.Manifest.Name+" "+p.Manifest.Version)
	}
	return all
}

func TestFirstFoundWins(t *testing.T) {
	first, second := dir(t), dir(t)
	install(t, first, sdk.Manifest{Name: "b", Version: "of the first"})
	install(t, second, sdk.Manifest{Name: "b", Version: "of the second"})
	install(t, second, sdk.Manifest{Name: "a", Version: "of the second"})
	s := find(t, filepath.Join(first, "not-there"), first, second, first)
	if diff := cmp.Diff([]string{"a of the second", "b of the first"}, names(s)); diff != "" {
		t.Error(diff)
	}
	if len(s.Refused()) > 0 {
		t.Error(s.Refused())
	}
	p, err := s.ByName("b")
	if err != nil {
		t.Fatal(err)
	}
	want := Plugin{
		Manifest: sdk.Manifest{Name: "b", Version: "of the first"},
		Path:     filepath.Join(first, Prefix+"b"), ManifestPath: filepath.Join(first, Prefix+"b.json"), Dir: first,
	}
	if diff := cmp.Diff(want, *p); diff != "" {
		t.Error(diff)
	}
}

func TestUsualDirs(t *testing.T) {
	prefix := dir(t)
	bin := filepath.Join(prefix, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	real := filepath.Join(bin, "instar")
	write(t, real, "", 0o755)
	link := filepath.Join(dir(t), "qemu-img")
	if err := os.Symlink(real, link); err != nil {
		t.Fatal(err)
	}
	t.Setenv(PathVariable, "/one::/two")
	want := []string{"/one", "/two", bin, filepath.Join(prefix, "libexec/instar"), "/usr/local/libexec/instar", "/usr/libexec/instar"}
	if diff := cmp.Diff(want, usualDirs(link)); diff != "" {
		t.Error(diff)
	}
	// Without /proc a program does not know where it is.
	want = []string{"/one", "/two", "/usr/local/libexec/instar", "/usr/libexec/instar"}
	if diff := cmp.Diff(want, usualDirs("")); diff != "" {
		t.Errorf("of a program in an unknown place: %s", diff)
	}
}

func TestByName(t *testing.T) {
	d := dir(t)
	install(t, d, sdk.Manifest{Name: "new", Aliases: []string{"old", "older"}})
	install(t, d, sdk.Manifest{Name: "old"})
	s := find(t, d)
	for name, want := range map[string]string{"new": "new", "old": "old", "older": "new"} {
		if p, err := s.ByName(name); err != nil || p.Manifest.Name != want {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
	_, err := s.ByName("other")
	var missing *MissingError
	if !errors.As(err, &missing) {
		t.Fatalf("%T: %v", err, err)
	}
	if diff := cmp.Diff([]string{"new", "old"}, missing.Present); diff != "" {
		t.Error(diff)
	}
	if text := err.Error(); !strings.Contains(text, "instar-format-other") || !strings.Contains(text, "new, old") || strings.Contains(text, "\n") {
		t.Error(text)
	}
}

// What somebody else could have replaced is refused, and said.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name string
		harm func(dir, program string)
		want string
	}{
		{"directory writable by all", func(dir, _ string) { os.Chmod(dir, 0o777) }, "writable by others (mode 0777)"},
		{"directory writable by a group", func(dir, _ string) { os.Chmod(dir, 0o775) }, "writable by others"},
		{"program writable by a group", func(_, p string) { os.Chmod(p, 0o775) }, "writable by others"},
		{"manifest writable by all", func(_, p string) { os.Chmod(p+".json", 0o666) }, "writable by others"},
		{"manifest with a rule of no name", func(_, p string) {
			os.WriteFile(p+".json", []byte(`{"name":"x","rules":[{"name":"X","meaning":"y"}]}`), 0o644)
		}, `rule "X"`},
		{"manifest with a rule that steers terminals", func(_, p string) {
			os.WriteFile(p+".json", []byte(`{"name":"x","rules":[{"name":"x","meaning":"y\u001b[2J"}]}`), 0o644)
		}, `rule "x"`},
		{"manifest is no JSON", func(_, p string) { os.WriteFile(p+".json", []byte("{"), 0o644) }, "manifest: "},
		{"manifest without name", func(_, p string) { os.WriteFile(p+".json", []byte("{}"), 0o644) }, "no name"},
		{"manifest is huge", func(_, p string) { os.Truncate(p+".json", maxManifest+1) }, "larger than"},
		{"probe is no hexadecimal", func(_, p string) {
			os.WriteFile(p+".json", []byte(`{"name":"x","probes":[{"bytes":"zz","score":1}]}`), 0o644)
		}, "probe"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := dir(t)
			install(t, d, sdk.Manifest{Name: "x"})
			c.harm(d, filepath.Join(d, Prefix+"x"))
			s := find(t, d)
			if len(s.Plugins()) > 0 {
				t.Errorf("it is used: %v", names(s))
			}
			if len(s.Refused()) != 1 || !strings.Contains(s.Refused()[0].Error(), c.want) || !strings.Contains(s.Refused()[0].Error(), d) {
				t.Errorf("refused: %v", s.Refused())
			}
		})
	}
}

func TestForeignOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("giving a file to another user takes root")
	}
	d := dir(t)
	install(t, d, sdk.Manifest{Name: "x"})
	program := filepath.Join(d, Prefix+"x")
	if err := os.Chown(program, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	_, err := find(t, d).ByName("x")
	var missing *MissingError
	if !errors.As(err, &missing) || missing.Reason == nil || !strings.Contains(err.Error(), "owned by user 12345") {
		t.Errorf("got %v", err)
	}
}

// Others' files in a directory, such as bin, are no plugins and no errors.
func TestIgnores(t *testing.T) {
	d := dir(t)
	write(t, filepath.Join(d, "instar"), "", 0o755)
	write(t, filepath.Join(d, Prefix+"data"), "", 0o644)
	write(t, filepath.Join(d, Prefix+"gone.json"), `{"name":"gone"}`, 0o644)
	if err := os.Symlink("nowhere", filepath.Join(d, Prefix+"dangling")); err != nil {
		t.Fatal(err)
	}
	s := find(t, d)
	if len(s.Plugins()) > 0 || len(s.Refused()) > 0 {
		t.Errorf("%v, %v", names(s), s.Refused())
	}
	// A directory that holds no plugin may be anybody's.
	empty := t.TempDir()
	if err := os.Chmod(empty, 0o777); err != nil {
		t.Fatal(err)
	}
	if refused := find(t, empty).Refused(); len(refused) > 0 {
		t.Error(refused)
	}
}

func set(probes map[string][]sdk.Probe) *Set {
	s := &Set{}
	for name, p := range probes {
		s.plugins = append(s.plugins, &Plugin{Manifest: sdk.Manifest{Name: name, Probes: p}})
	}
	return s
}

func TestMatch(t *testing.T) {
	s := set(map[string][]sdk.Probe{
		"start":    {{Offset: 0, Bytes: "514649fb", Score: 100}},
		"later":    {{Offset: 4, Bytes: "aabb", Score: 60}, {Offset: 4, Bytes: "aa", Score: 50}},
		"end":      {{Offset: -8, Bytes: "636f6e65", Score: 90}},
		"folded":   {{Offset: 0, Bytes: "23206469736b", Score: 80, FoldCase: true}},
		"text":     {{Bytes: hex.EncodeToString([]byte("v=1\n")), Score: 70, AfterComments: true}},
		"fallback": {{Score: 1}},
	})
	if got := s.Fallback().Manifest.Name; got != "fallback" {
		t.Errorf("fallback: %s", got)
	}
	if head, tail := s.ProbeReach(); head != sdk.CommentReach || tail != 8 {
		t.Errorf("reach: %d, %d", head, tail)
	}
	for _, c := range []struct {
		head, tail string
		size       int64
		want       string
	}{
		{"QFI\xfb", "", 4, "start 100, fallback 1"},
		{"QFI\xfb\xaa\xbb", "", 6, "start 100, later 60, fallback 1"},
		{"....\xaa\xbc", "", 6, "later 50, fallback 1"},
		{"....\xaa", "", 5, "later 50, fallback 1"},
		{"....", "", 4, "fallback 1"},
		{"", "", 0, "fallback 1"},
		{"# DISK", "", 6, "folded 80, fallback 1"},
		{"# dIsK", "", 6, "folded 80, fallback 1"},
		{"\x03 disk", "", 6, "fallback 1"}, // '#' is no letter
		{"v=1\n", "", 4, "text 70, fallback 1"},
		{"#\nv=1\n", "", 6, "text 70, fallback 1"},
		{"# one\r\n#two\n  \n \r\nv=1\nv=2\n", "", 30, "text 70, fallback 1"},
		{"#v=1\n", "", 5, "fallback 1"},
		{" v=1\n", "", 5, "fallback 1"},
		{"\nv=1\n", "", 5, "fallback 1"}, // as for qemu-img, which skips spaces and comments
		{" \r \nv=1\n", "", 8, "fallback 1"},
		{"#", "", 1, "fallback 1"},
		{" ", "", 1, "fallback 1"},
		{"#" + strings.Repeat("x", sdk.CommentReach-6) + "\nv=1\n", "", 1 << 20, "text 70, fallback 1"},
		{"#" + strings.Repeat("x", sdk.CommentReach-5) + "\nv=1\n", "", 1 << 20, "fallback 1"},
		{"", "Conectix", 8, "fallback 1"},
		{"", "cone....", 8, "end 90, fallback 1"},
		{"", "......cone....", 1 << 40, "end 90, fallback 1"},
		{"cone", "cone", 4, "fallback 1"}, // shorter than the offset from the end
	} {
		var got []string
		for _, m := range s.Match([]byte(c.head), []byte(c.tail), c.size) {
			got = append(got, fmt.Sprint(m.Plugin.Manifest.Name, " ", m.Score))
		}
		if strings.Join(got, ", ") != c.want {
			t.Errorf("%q...%q of %d: %v, want %s", c.head, c.tail, c.size, got, c.want)
		}
	}
	if set(nil).Fallback() != nil {
		t.Error("a fallback from nowhere")
	}
}

// Probes come from files: none may crash or allocate without bounds.
func FuzzMatch(f *testing.F) {
	f.Add(int64(-8), "636f6e65", 90, true, false, []byte("cone...."), int64(8))
	f.Add(int64(-1<<63), "00", 1, false, false, []byte{0}, int64(1))
	f.Add(int64(0), "763d", 1, false, true, []byte("#\n  \nv="), int64(8))
	f.Fuzz(func(t *testing.T, offset int64, want string, score int, fold, after bool, content []byte, size int64) {
		s := set(map[string][]sdk.Probe{"x": {{Offset: offset, Bytes: want, Score: score, FoldCase: fold, AfterComments: after}}})
		head, tail := s.ProbeReach()
		if head < 0 || tail < 0 || head > 2<<20 || tail > 1<<20 {
			t.Fatalf("reach %d, %d", head, tail)
		}
		for _, m := range s.Match(content, content, size) {
			if m.Score != score {
				t.Fatalf("score %d", m.Score)
			}
		}
	})
}

func BenchmarkFind(b *testing.B) {
	d := dir(b)
	for _, name := range []string{"raw", "qcow2", "vmdk", "vpc", "vhdx"} {
		install(b, d, sdk.Manifest{
			Name: name, Aliases: []string{"a", "b"}, Suffixes: []string{"c"}, Protocols: []int{1},
			Capabilities: []string{"open", "create", "check", "repair", "write", "decode"},
			Probes:       []sdk.Probe{{Offset: 0, Bytes: "514649fb", Score: 100}, {Offset: -512, Bytes: "636f6e6563746978", Score: 90}},
		})
	}
	for b.Loop() {
		if s, err := Find(Options{Dirs: []string{d}}); err != nil || len(s.Plugins()) != 5 {
			b.Fatal(err)
		}
	}
}

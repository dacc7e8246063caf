package ahead

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/sdk"
)

func TestGuessOf(t *testing.T) {
	for _, c := range []struct {
		line string
		want guess
		ok   bool
	}{
		{"info --untrusted x", guess{images: 1, files: []string{"x"}, memory: UntrustedMemory}, true},
		{"inspect x", guess{images: 1, files: []string{"x"}, memory: UntrustedMemory}, true},
		{"create -f qcow2 x 1G", guess{formats: []string{"qcow2"}, files: []string{"x", "1G"}}, true},
		{"create -fqcow2 x 1G", guess{formats: []string{"qcow2"}, files: []string{"x", "1G"}}, true},
		{"create --format=vpc x 1G", guess{formats: []string{"vpc"}, files: []string{"x", "1G"}}, true},
		{"create x 1G", guess{fallback: true, files: []string{"x", "1G"}}, true},
		{"info --output json x", guess{images: 1, files: []string{"json", "x"}}, true},
		{"info", guess{}, false},
		{"check -f vhdx", guess{formats: []string{"vhdx"}}, true},
		{"info x -f", guess{images: 1, files: []string{"x"}}, true},
		{"info --help", guess{}, false},
		{"info --untrusted=1 x", guess{}, false},
		{"info --max-memory 64M x", guess{}, false},
		{"compare a b", guess{images: 2, files: []string{"a", "b"}}, true},
		{"compare -f raw -F qcow2 a b", guess{formats: []string{"raw", "qcow2"}, files: []string{"a", "b"}}, true},
		{"compare -F raw a b", guess{formats: []string{"raw"}, images: 1, files: []string{"a", "b"}}, true},
		{"convert -O qcow2 a b", guess{formats: []string{"qcow2"}, images: 1, files: []string{"a"}}, true},
		{"convert -f raw a b", guess{formats: []string{"raw"}, fallback: true, files: []string{"a"}}, true},
		{"convert", guess{}, false},
		{"dd -O vpc bs=1M if=a of=b", guess{formats: []string{"vpc"}, images: 1, files: []string{"a"}}, true},
		{"", guess{}, false},
	} {
		got, ok := guessOf(append([]string{"instar"}, strings.Fields(c.line)...), "")
		if ok != c.ok {
			t.Errorf("%s: %v", c.line, ok)
		}
		if diff := cmp.Diff(c.want, got, cmp.AllowUnexported(guess{}), cmpopts.EquateEmpty()); ok && diff != "" {
			t.Errorf("%s: %s", c.line, diff)
		}
	}
}

func TestGuessedLimit(t *testing.T) {
	for _, c := range []struct {
		value  string
		memory int64
		ok     bool
	}{{"", 0, true}, {"0", 0, true}, {"1", UntrustedMemory, true}, {"on", 0, false}} {
		g, ok := guessOf([]string{"instar", "info", "x"}, c.value)
		if ok != c.ok || g.memory != c.memory {
			t.Errorf("%q: %d, %v", c.value, g.memory, ok)
		}
	}
}

func TestGuessedPlugin(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, m := range []sdk.Manifest{
		{Name: "magic", Aliases: []string{"m"}, Probes: []sdk.Probe{{Bytes: "4d4d", Score: 100}}},
		{Name: "footed", Probes: []sdk.Probe{{Offset: -4, Bytes: "46464646", Score: 90}}},
		{Name: "rest", Probes: []sdk.Probe{{Score: 1}}},
	} {
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		program := filepath.Join(dir, discover.Prefix+m.Name)
		for name, mode := range map[string]os.FileMode{program: 0o755, program + ".json": 0o644} {
			if err := os.WriteFile(name, b, mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(name, mode); err != nil {
				t.Fatal(err)
			}
		}
	}
	set, err := discover.Find(discover.Options{Dirs: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{"m.img": "MM..", "f.img": "........FFFF", "r.img": "?", "empty.img": ""} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct{ line, want string }{
		{"create -f m x", "magic"},
		{"create x", "rest"},
		{"create -f unknown x", ""},
		{"info m.img", "magic"},
		{"info f.img", "footed"},
		{"info r.img", "rest"},
		{"info empty.img", "rest"},
		{"info --output json f.img", "footed"}, // there is no file "json"
		{"info .", ""},                         // not a file
		{"info missing.img", ""},
		{"info -f footed m.img", "footed"},
		{"compare m.img f.img", "magic footed"},
		{"compare m.img m.img", "magic"},
		{"compare -f footed f.img m.img", "footed"},
		{"convert -O footed m.img f.img", "footed magic"},
		{"convert m.img new", "magic rest"},
		{"dd if=f.img of=new", "footed rest"},
	} {
		words := strings.Fields(c.line)
		for i, w := range words {
			if strings.HasSuffix(w, ".img") || w == "." {
				name, dd := strings.CutPrefix(w, "if=")
				words[i] = filepath.Join(dir, name)
				if dd {
					words[i] = "if=" + words[i]
				}
			}
		}
		g, ok := guessOf(append([]string{"instar"}, words...), "")
		if !ok {
			t.Errorf("%s: no guess", c.line)
			continue
		}
		var names []string
		for _, p := range g.plugins(set) {
			names = append(names, p.Manifest.Name)
		}
		if got := strings.Join(names, " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.line, got, c.want)
		}
	}
}

// Without Begin nothing is ahead, and nothing waits.
func TestNotBegun(t *testing.T) {
	if Take(&discover.Plugin{}, 0) != nil {
		t.Error("a process from nowhere")
	}
	Discard()
}

// Packages are initialised in the order of their import paths, as soon as what
// they import is. One import of a package late in that order, or of one that
// takes long, and there is nothing left to overlap with.
func TestInitialisedEarly(t *testing.T) {
	list := exec.Command("go", "list", "-deps", "-tags", "grpcnotrace", ".")
	list.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	for _, late := range []string{
		"path/filepath", "os/exec", "os/signal", "net", "regexp", "text/template", "encoding/gob",
		"google.golang.org/grpc", "google.golang.org/protobuf/proto", "github.com/hashicorp/go-plugin",
		"github.com/spf13/cobra", "log/slog",
	} {
		if slices.Contains(deps, late) {
			t.Errorf("imports %s, if through others", late)
		}
	}
}

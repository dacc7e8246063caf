// Package rooms holds the rules of who may import what and of how packages
// start, as tests. It has no code.
package rooms

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/instar-img/instar"

// root is the top of the repository, seen from this package's directory.
var root = filepath.Join("..", "..")

type listed struct {
	ImportPath   string
	Name         string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

// list runs `go list -json` with the build tags of a release build.
func list(t *testing.T, patterns ...string) []listed {
	t.Helper()
	args := append([]string{"list", "-json=ImportPath,Name,Imports,TestImports,XTestImports,Deps", "-tags", "grpcnotrace"}, patterns...)
	cmd := exec.Command("go", args...)
	cmd.Dir = root
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go %s: %v", strings.Join(args, " "), err)
	}
	var pkgs []listed
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

// under reports whether package path lies in dir, a directory of the module.
func under(path, dir string) bool {
	full := module + "/" + dir
	return path == full || strings.HasPrefix(path, full+"/")
}

// pluginRoom returns FORMAT for a package in plugins/FORMAT, else "".
func pluginRoom(path string) string {
	rest, ok := strings.CutPrefix(path, module+"/plugins/")
	if !ok {
		return ""
	}
	room, _, _ := strings.Cut(rest, "/")
	return room
}

// wire lists the packages that may know protobuf types: the two halves of the
// wire and what both translate with.
var wire = []string{"sdk/client", "sdk/serve", "sdk/internal/server", "sdk/internal/wire", "sdk/formattest", "sdk/proto"}

// shared lists the leaf packages that the core and the SDK have in common.
var shared = []string{"internal/confine"}

// forbidden says why package from may not import package to, or returns "".
// It is the one statement of the import rules.
func forbidden(from, to string, test bool) string {
	if !strings.HasPrefix(to, module+"/") {
		return ""
	}
	switch room := pluginRoom(from); {
	case room != "" && pluginRoom(to) == room:
		return ""
	case room != "" && pluginRoom(to) != "":
		return "plugins do not know each other"
	case room != "" && !under(to, "sdk"):
		return "plugins import the SDK only"
	}
	switch {
	case under(to, "plugins") && !test:
		return "only a plugin's own program imports it"
	case under(from, "internal/host") && under(to, "plugins"):
		return "the core knows no formats, in tests neither"
	case slices.ContainsFunc(shared, func(dir string) bool { return under(from, dir) }):
		return "what core and SDK share depends on neither"
	case slices.ContainsFunc(shared, func(dir string) bool { return under(to, dir) }):
		return ""
	case under(from, "sdk") && (under(to, "internal") || under(to, "cmd")):
		return "the SDK does not depend on the core"
	case under(from, "internal/host") && under(to, "cmd"):
		return "the host does not depend on the command line"
	case under(to, "sdk/proto") && !slices.ContainsFunc(wire, func(dir string) bool { return under(from, dir) }):
		return "protobuf types stop in the wire's two halves"
	}
	return ""
}

func TestImports(t *testing.T) {
	for _, p := range list(t, "./...") {
		for _, to := range p.Imports {
			if why := forbidden(p.ImportPath, to, false); why != "" {
				t.Errorf("%s imports %s: %s", p.ImportPath, to, why)
			}
		}
		for _, to := range slices.Concat(p.TestImports, p.XTestImports) {
			if why := forbidden(strings.TrimSuffix(p.ImportPath, "_test"), to, true); why != "" {
				t.Errorf("a test of %s imports %s: %s", p.ImportPath, to, why)
			}
		}
	}
}

// The rules themselves, so that a rule which stops matching is noticed.
func TestForbidden(t *testing.T) {
	for _, c := range []struct {
		from, to string
		test     bool
		ok       bool
	}{
		{"plugins/qcow2", "sdk/option", false, true},
		{"plugins/qcow2/instar-format-qcow2", "plugins/qcow2", false, true},
		{"plugins/qcow2", "plugins/vmdk", false, false},
		{"plugins/qcow2", "internal/host/image", false, false},
		{"plugins/qcow2", "internal/host/image", true, false},
		{"plugins/qcow2", "sdk/proto/instar/format/v1", false, false},
		{"internal/host/image", "plugins/qcow2", true, false},
		{"internal/host/image", "sdk/client", false, true},
		{"internal/host/image", "cmd/instar/internal/render", false, false},
		{"cmd/instar", "plugins/raw", false, false},
		{"cmd/instar", "plugins/raw", true, true},
		{"cmd/instar", "sdk/proto/instar/format/v1", false, false},
		{"sdk/client", "sdk/proto/instar/format/v1", false, true},
		{"sdk/serve", "internal/host/launch", false, false},
	} {
		why := forbidden(module+"/"+c.from, module+"/"+c.to, c.test)
		if (why == "") != c.ok {
			t.Errorf("forbidden(%s, %s, test=%v) = %q, want allowed = %v", c.from, c.to, c.test, why, c.ok)
		}
	}
}

func TestPackageNames(t *testing.T) {
	for _, p := range list(t, "./...") {
		if slices.Contains([]string{"util", "utils", "common", "types", "helpers", "helper", "misc"}, p.Name) {
			t.Errorf("%s: package %s says nothing of what it holds", p.ImportPath, p.Name)
		}
	}
}

// source is a parsed Go file of the product, tests excluded.
type source struct {
	path string // from the repository's root
	file *ast.File
	fset *token.FileSet
}

func sources(t *testing.T, dirs ...string) []source {
	t.Helper()
	var files []source
	for _, dir := range dirs {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() && d.Name() == "testdata" {
				return filepath.SkipDir
			}
			if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return nil
			}
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution|parser.ParseComments)
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(root, path)
			files = append(files, source{filepath.ToSlash(rel), f, fset})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(files) == 0 {
		t.Fatalf("no Go files below %v", dirs)
	}
	return files
}

// The core offers verbs; what formats there are it learns from manifests.
func TestCoreNamesNoFormat(t *testing.T) {
	formats := map[string]bool{"raw": true, "vpc": true} // and every plugin's directory
	dirs, err := os.ReadDir(filepath.Join(root, "plugins"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		formats[d.Name()] = true
	}
	for _, s := range sources(t, "cmd", "internal") {
		ast.Inspect(s.file, func(n ast.Node) bool {
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.STRING {
				return true
			}
			text, err := strconv.Unquote(lit.Value)
			if err == nil && formats[strings.ToLower(text)] {
				t.Errorf("%s: the core names the format %q", s.fset.Position(lit.Pos()), text)
			}
			return true
		})
	}
}

// Functions called init run on every command, in the core and in the plugin
// again. The few that have to be there are listed with their reason.
func TestNoInit(t *testing.T) {
	allowed := map[string]string{ // package directory: reason
		"cmd/instar/internal/early": "starts the likely plugin while the other packages initialise",
	}
	for _, s := range sources(t, "cmd", "internal", "sdk", "plugins") {
		if ast.IsGenerated(s.file) {
			continue
		}
		dir := s.path[:strings.LastIndexByte(s.path, '/')]
		for _, decl := range s.file.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if ok && fn.Recv == nil && fn.Name.Name == "init" && allowed[dir] == "" {
				t.Errorf("%s: func init", s.fset.Position(fn.Pos()))
			}
		}
	}
}

// programs are the main packages that make build leaves in bin.
func programs(t *testing.T) []listed {
	t.Helper()
	var mains []listed
	for _, p := range list(t, "./cmd/instar", "./plugins/...") {
		if p.Name == "main" {
			mains = append(mains, p)
		}
	}
	if len(mains) < 2 {
		t.Fatalf("found %d programs", len(mains))
	}
	return mains
}

// What a program links, it initialises on each start. The frame (go-plugin in the
// core, gRPC) brings net/http and much else whatever we do; a build tag keeps its
// worst part out, and formats add nothing of that kind.
func TestProgramsLinkNoBallast(t *testing.T) {
	for _, p := range programs(t) {
		for _, dep := range p.Deps {
			switch {
			case slices.Contains([]string{"golang.org/x/net/trace", "net/http/pprof", "expvar", "github.com/google/go-cmp/cmp"}, dep):
				t.Errorf("%s links %s", p.ImportPath, dep)
			case pluginRoom(p.ImportPath) != "" && slices.Contains([]string{"net/rpc", "encoding/gob", "html/template", "google.golang.org/grpc/reflection"}, dep):
				t.Errorf("%s links %s, which package serve avoids", p.ImportPath, dep)
			case pluginRoom(p.ImportPath) != "" && under(dep, "internal") && !slices.ContainsFunc(shared, func(dir string) bool { return under(dep, dir) }):
				t.Errorf("%s links %s of the core", p.ImportPath, dep)
			case pluginRoom(p.ImportPath) != "" && strings.Contains(dep, "spf13"):
				t.Errorf("%s links %s of the command line", p.ImportPath, dep)
			case under(p.ImportPath, "cmd") && under(dep, "plugins"):
				t.Errorf("%s links %s, a format", p.ImportPath, dep)
			}
		}
	}
}

// A format parses and emits bytes: it needs no network, no processes and no
// third party's module but a codec.
func TestFormatsLinkLittle(t *testing.T) {
	for _, p := range list(t, "./plugins/...") {
		if p.Name == "main" {
			continue
		}
		for _, dep := range p.Deps {
			first, _, _ := strings.Cut(dep, "/")
			thirdParty := strings.Contains(first, ".")
			switch {
			case slices.Contains([]string{"net/http", "crypto/tls", "os/exec", "os/signal", "plugin", "testing", "text/template", "encoding/gob"}, dep):
				t.Errorf("%s links %s", p.ImportPath, dep)
			case thirdParty && !strings.HasPrefix(dep, module+"/") &&
				!strings.HasPrefix(dep, "github.com/klauspost/compress") && dep != "github.com/google/uuid" &&
				!strings.HasPrefix(dep, "golang.org/x/sys/"):
				t.Errorf("%s links %s", p.ImportPath, dep)
			}
		}
	}
}

// The manual page has every environment variable that the core reads.
func TestEnvironmentIsDocumented(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "packaging", "share"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), ".SH ENVIRONMENT")
	section, _, _ = strings.Cut(section, ".SH ")
	read := map[string]bool{"TMPDIR": true} // by os.CreateTemp
	for _, s := range sources(t, "cmd", "internal") {
		ast.Inspect(s.file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.BasicLit:
				if name, err := strconv.Unquote(n.Value); err == nil && variable.MatchString(name) {
					read[name] = true
				}
			case *ast.CallExpr:
				f, ok := n.Fun.(*ast.SelectorExpr)
				if !ok || f.Sel.Name != "Getenv" && f.Sel.Name != "LookupEnv" || len(n.Args) != 1 {
					break
				}
				if arg, ok := n.Args[0].(*ast.BasicLit); ok {
					if name, err := strconv.Unquote(arg.Value); err == nil {
						read[name] = true
					}
				}
			}
			return true
		})
	}
	if !read["INSTAR_SANDBOX"] || !read["SOURCE_DATE_EPOCH"] {
		t.Errorf("found only %v", slices.Sorted(maps.Keys(read)))
	}
	for name := range read {
		if !strings.Contains(section, ".B "+name+"\n") {
			t.Errorf("packaging/share: %s is not in the manual page's ENVIRONMENT", name)
		}
	}
}

// variable matches the names of instar's own environment variables.
var variable = regexp.MustCompile(`^INSTAR_[A-Z_]+$`)

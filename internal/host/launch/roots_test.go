package launch

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A plugin may read its runtime-roots, directories and files, beside the program
// where they are relative, and nothing else.
func TestRuntimeRoots(t *testing.T) {
	needSandbox(t)
	p := installed(t, "plain")
	elsewhere := t.TempDir()
	for _, name := range []string{
		filepath.Join(p.Dir, "plain.d", "deep", "module"), filepath.Join(p.Dir, "other"),
		filepath.Join(elsewhere, "file"), filepath.Join(elsewhere, "other"),
	} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte("content"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p.Manifest.RuntimeRoots = []string{"plain.d", filepath.Join(elsewhere, "file")}
	t.Chdir(elsewhere) // which is not what a relative one is relative to
	running, err := Start(t.Context(), p, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer running.Kill()
	for name, allowed := range map[string]bool{
		filepath.Join(p.Dir, "plain.d", "deep", "module"): true, filepath.Join(elsewhere, "file"): true,
		filepath.Join(p.Dir, "other"): false, filepath.Join(elsewhere, "other"): false,
	} {
		// Without Landlock nothing refuses files by name: see docs/security.md.
		allowed = allowed || Effective().LandlockABI == 0
		if _, err := do(t.Context(), running, "open", name); (err == nil) != allowed {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is wrong with a program that is not one static binary is said.
func TestNotStatic(t *testing.T) {
	needSandbox(t)
	script := func(t *testing.T, interpreter string, roots ...string) error {
		t.Helper()
		p := installed(t, "plain")
		if err := os.Remove(p.Path); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p.Path, []byte("#!"+interpreter+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		p.Manifest.RuntimeRoots = roots
		running, err := Start(t.Context(), p, Options{})
		if err == nil {
			running.Kill()
			t.Fatal("it started")
		}
		if errors.Is(err, fs.ErrNotExist) {
			t.Errorf("taken for a file of the caller's: %v", err)
		}
		return err
	}
	if err := script(t, "/no/such/interpreter"); !strings.Contains(err.Error(), "what runs it is not there") {
		t.Error(err)
	}
	if Effective().LandlockABI == 0 {
		return // any interpreter may run
	}
	for _, c := range []struct {
		interpreter, want string
		roots             []string
	}{
		{probe, "needs the runtime-roots of its manifest", nil},
		{probe, "runtime-roots of its manifest: landlock: /no/such/root: ", []string{"/no/such/root"}},
	} {
		if err := script(t, c.interpreter, c.roots...); !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %s", c.interpreter, err, c.want)
		}
	}
}

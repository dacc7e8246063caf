package child

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

func TestBaseDirs(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	t.Setenv("TMPDIR", "relative")
	name := "instar-" + strconv.Itoa(os.Geteuid())
	want := []string{"/run/user/7/" + name, "/dev/shm/" + name, "/tmp/" + name}
	if got := baseDirs(); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("got %v, want %v", got, want)
	}
	// A socket's path has little room.
	t.Setenv("XDG_RUNTIME_DIR", "/"+strings.Repeat("long/", 20))
	if got := baseDirs(); strings.Join(got, " ") != strings.Join(want[1:], " ") {
		t.Errorf("got %v, want %v", got, want[1:])
	}
}

func TestSocketDirs(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base")
	first, err := newSocketDirIn(base)
	if err != nil {
		t.Fatal(err)
	}
	second, err := newSocketDirIn(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{base, first.path, second.path} {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", dir, info, err)
		}
	}
	if err := os.MkdirAll(filepath.Join(first.path, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	first.remove(nil)
	if _, err := os.Stat(first.path); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", first.path, err)
	}
	if _, err := os.Stat(second.path); err != nil {
		t.Errorf("the other went with it: %v", err)
	}
	second.remove(nil)
	if _, err := os.Stat(base); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", base, err)
	}
}

// In a shared directory somebody else may have made what we would make.
func TestBaseOfOthers(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, base := range []string{open, link, file, filepath.Join(dir, "not", "there")} {
		if d, err := newSocketDirIn(base); err == nil {
			t.Errorf("%s was used", d.path)
		}
	}
}

// Swept is what no living process owns, and nothing that is not ours.
func TestSweep(t *testing.T) {
	base := t.TempDir()
	for _, name := range []string{"999999999-1", strconv.Itoa(os.Getpid()) + "-9", "1-1", "notes"} {
		if err := os.MkdirAll(filepath.Join(base, name, "plugin"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// Locked: owned by a process that this name space does not show.
	held := filepath.Join(base, "999999998-1")
	if err := os.Mkdir(held, 0o700); err != nil {
		t.Fatal(err)
	}
	lock, err := lockDir(held)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	Sweep(base)
	entries, err := os.ReadDir(base)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	want := []string{"1-1", "999999998-1", "notes", strconv.Itoa(os.Getpid()) + "-9"}
	for _, name := range want {
		if _, err := os.Stat(filepath.Join(base, name)); err != nil {
			t.Errorf("%s was swept", name)
		}
	}
	if len(left) != len(want) {
		t.Errorf("left: %v", left)
	}
}

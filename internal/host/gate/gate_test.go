package gate

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk"
)

// The numbers in names are those of the project's list of adversarial cases.

func backing(name string, alternatives ...string) sdk.Reference {
	return sdk.Reference{Kind: sdk.RefBacking, Name: name, Alternatives: alternatives}
}

func extent(name string) sdk.Reference {
	return sdk.Reference{Kind: sdk.RefExtent, Role: "extent:0", Name: name}
}

func dataFile(name string) sdk.Reference {
	return sdk.Reference{Kind: sdk.RefData, Role: sdk.RoleData, Name: name}
}

// tree makes a directory with images/top, images/base, images/sub/x and secret.
func tree(t *testing.T) (dir, top string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "images", "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"images/top", "images/base", "images/sub/x", "secret"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir, filepath.Join(dir, "images", "top")
}

func enter(t *testing.T, p *Policy, path string) *Walk {
	t.Helper()
	w := p.NewWalk()
	f, err := w.OpenMain(path, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return w
}

// content reads and closes what an open returned.
func content(t *testing.T, f *os.File, err error) string {
	t.Helper()
	if err != nil {
		t.Error(err)
		return ""
	}
	defer f.Close()
	b := make([]byte, 100)
	n, _ := f.ReadAt(b, 0)
	return string(b[:n])
}

// refused checks that err is a decision of the gate by the rule, in one line.
func refused(t *testing.T, f *os.File, err error, rule string) {
	t.Helper()
	var ge *Error
	if !errors.As(err, &ge) || !strings.Contains(ge.Rule, rule) || !errors.Is(err, sdk.ErrInvalid) {
		t.Errorf("%v, want a refusal by %q", err, rule)
	} else if strings.Contains(err.Error(), "\n") {
		t.Errorf("more than one line: %q", err)
	}
	if f != nil {
		t.Error("an open file came with the refusal")
	}
}

func TestCase1BackingAnywhere(t *testing.T) {
	dir, top := tree(t)
	for _, name := range []string{filepath.Join(dir, "secret"), "../secret"} {
		f, _, err := enter(t, &Policy{}, top).OpenReference(top, backing(name))
		if got := content(t, f, err); got != "secret" {
			t.Errorf("%s: %q", name, got)
		}
		f, _, err = enter(t, &Policy{Untrusted: true}, top).OpenReference(top, backing(name))
		refused(t, f, err, ruleUntrusted)
	}
}

func TestCase2LinksThatLeave(t *testing.T) {
	dir, top := tree(t)
	if err := os.Symlink("../secret", filepath.Join(dir, "images", "link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"link", "../../x", "base"} {
		f, _, err := enter(t, &Policy{Untrusted: true}, top).OpenReference(top, backing(name))
		refused(t, f, err, ruleUntrusted)
	}
	f, path, err := enter(t, &Policy{}, top).OpenReference(top, backing("link"))
	if got := content(t, f, err); got != "secret" || path != filepath.Join(dir, "images", "link") {
		t.Errorf("%q at %s", got, path)
	}
}

func TestCase3NamesAreNotParsed(t *testing.T) {
	dir, top := tree(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	connected := make(chan struct{})
	go func() {
		if c, err := l.Accept(); err == nil {
			c.Close()
			close(connected)
		}
	}()
	secret := filepath.Join(dir, "secret")
	for _, name := range []string{
		`json:{"driver":"file","filename":"` + secret + `"}`, "file:" + secret, "file:base", "nbd://" + l.Addr().String() + "/x", "http://" + l.Addr().String() + "/x", "fat:rw:" + dir,
	} {
		w := enter(t, &Policy{}, top)
		f, _, err := w.OpenReference(top, backing(name))
		if !errors.Is(err, fs.ErrNotExist) || f != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && err.Error() != "Could not open '"+filepath.Dir(top)+"/"+name+"': No such file or directory" {
			t.Errorf("%v", err)
		}
	}
	// One that exists is a file like any other.
	if err := os.WriteFile(filepath.Join(dir, "images", "json:{}"), []byte("odd"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, _, err := enter(t, &Policy{}, top).OpenReference(top, backing("json:{}"))
	if got := content(t, f, err); got != "odd" {
		t.Errorf("%q", got)
	}
	select {
	case <-connected:
		t.Error("a name was taken for an address")
	default:
	}
}

func TestCase4DataFile(t *testing.T) {
	dir, top := tree(t)
	f, _, err := enter(t, &Policy{}, top).OpenPart(top, dataFile(filepath.Join(dir, "secret")), true)
	if got := content(t, f, err); got != "secret" {
		t.Errorf("%q", got)
	}
	f, _, err = enter(t, &Policy{Untrusted: true}, top).OpenPart(top, dataFile("base"), false)
	refused(t, f, err, ruleUntrusted)
	f, _, err = enter(t, &Policy{}, top).OpenPart(top, dataFile("top"), false)
	refused(t, f, err, "same chain")
}

func TestCase5Cycles(t *testing.T) {
	dir, top := tree(t)
	base := filepath.Join(dir, "images", "base")
	f, _, err := enter(t, &Policy{}, top).OpenReference(top, backing("top"))
	refused(t, f, err, "cycle: "+top+" -> "+top)

	if err := os.Link(top, filepath.Join(dir, "images", "alias")); err != nil {
		t.Fatal(err)
	}
	w := enter(t, &Policy{}, top)
	f, _, err = w.OpenReference(top, backing("base"))
	content(t, f, err)
	f, _, err = w.OpenReference(base, backing("alias"))
	refused(t, f, err, "cycle: "+top+" -> "+base+" -> "+filepath.Join(dir, "images", "alias"))
}

func TestCase6Depth(t *testing.T) {
	dir := t.TempDir()
	name := func(i int) string { return filepath.Join(dir, fmt.Sprint(i)) }
	for i := range MaxDepth + 2 {
		if err := os.WriteFile(name(i), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w := enter(t, &Policy{}, name(0))
	for i := 1; i <= MaxDepth; i++ {
		f, _, err := w.OpenReference(name(i-1), backing(name(i)))
		content(t, f, err)
	}
	f, _, err := w.OpenReference(name(MaxDepth), backing(name(MaxDepth+1)))
	refused(t, f, err, "more than 200 backing files")
}

func TestCase7OnlyFilesAndBlockDevices(t *testing.T) {
	dir, top := tree(t)
	images := filepath.Dir(top)
	if err := unix.Mkfifo(filepath.Join(images, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	// The path of a socket has little room: bind relative to the directory.
	t.Chdir(images)
	l, err := net.Listen("unix", "socket")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, rule := range map[string]string{
		"fifo": "it is a FIFO, only", "socket": "it is a socket, only", "/dev/zero": "it is a character device, only", "sub": "it is a directory, only",
	} {
		f, _, err := enter(t, &Policy{}, top).OpenReference(top, backing(name))
		refused(t, f, err, rule)
		f, _, err = enter(t, &Policy{}, top).OpenPart(top, dataFile(name), true)
		refused(t, f, err, rule)
		if name[0] != '/' {
			f, _, err = enter(t, &Policy{}, top).OpenPart(top, extent(name), false)
			refused(t, f, err, rule)
		}
		for _, rw := range []bool{false, true} {
			if name == "sub" {
				if _, err := (&Policy{}).NewWalk().OpenMain(name, rw); err == nil || err.Error() != "Could not open 'sub': 'file' driver requires 'sub' to be a regular file" {
					t.Errorf("directory: %v", err)
				}
				continue
			}
			f, err = (&Policy{}).NewWalk().OpenMain(name, rw)
			refused(t, f, err, rule)
		}
	}
	_, err = (&Policy{}).NewWalk().OpenMain(filepath.Join(dir, "missing"), false)
	if err == nil || err.Error() != "Could not open '"+filepath.Join(dir, "missing")+"': No such file or directory" || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestCase22ExtentsStayInTheDirectory(t *testing.T) {
	dir, top := tree(t)
	images := filepath.Dir(top)
	for link, target := range map[string]string{
		"out": "../secret", "abs": filepath.Join(dir, "secret"), "outdir": "..", "in": "sub/x", "around": "sub/../base",
	} {
		if err := os.Symlink(target, filepath.Join(images, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"/etc/passwd", "../secret", "sub/../../secret", "out", "abs", "outdir/secret", "..", "../images/base", filepath.Join(dir, "secret")} {
		f, _, err := enter(t, &Policy{}, top).OpenPart(top, extent(name), false)
		refused(t, f, err, ruleExtent)
	}
	for name, want := range map[string]string{
		"base": "images/base", "./base": "images/base", "sub/x": "images/sub/x", "in": "images/sub/x", "around": "images/base", filepath.Join(images, "base"): "images/base",
	} {
		f, _, err := enter(t, &Policy{}, top).OpenPart(top, extent(name), true)
		if got := content(t, f, err); got != want {
			t.Errorf("%s: %q", name, got)
		}
		f, _, err = enter(t, &Policy{Untrusted: true}, top).OpenPart(top, extent(name), false)
		refused(t, f, err, ruleUntrusted)
	}
	f, _, err := enter(t, &Policy{}, top).OpenPart(top, extent("missing"), false)
	if !errors.Is(err, fs.ErrNotExist) || f != nil || err.Error() != "Could not open '"+images+"/missing': No such file or directory" {
		t.Errorf("%v", err)
	}
	// An image named without a directory lies in the current one.
	t.Chdir(images)
	f, path, err := enter(t, &Policy{}, "top").OpenPart("top", extent("base"), false)
	if got := content(t, f, err); got != "images/base" || path != "base" {
		t.Errorf("%q at %q", got, path)
	}
}

func TestAlternatives(t *testing.T) {
	dir, top := tree(t)
	w := enter(t, &Policy{}, top)
	f, path, err := w.OpenReference(top, backing("gone", "also gone", "base", "sub/x"))
	if got := content(t, f, err); got != "images/base" || path != filepath.Join(dir, "images", "base") {
		t.Errorf("%q at %q", got, path)
	}
	_, _, err = w.OpenReference(top, backing("gone", "also gone"))
	if err == nil || !strings.Contains(err.Error(), "/gone'") {
		t.Errorf("%v", err)
	}
	// A name that stands for something refused is not passed over.
	_, _, err = w.OpenReference(top, backing("sub", "base"))
	refused(t, nil, err, "directory")
}

func TestResolve(t *testing.T) {
	for _, c := range [][3]string{
		{"a", "b", "b"}, {"d/a", "b", "d/b"}, {"/d/a", "../b", "/d/../b"}, {"/a", "b", "/b"}, {"d/a", "/b", "/b"},
		{"d/a", "json:{}", "d/json:{}"}, {"d/a", "nbd://h/x", "d/nbd://h/x"}, {"d/a", "", "d/"},
	} {
		if got := Resolve(c[0], c[1]); got != c[2] {
			t.Errorf("Resolve(%q, %q) = %q, want %q", c[0], c[1], got, c[2])
		}
	}
}

func TestAmbiguous(t *testing.T) {
	if err := (&Policy{}).Ambiguous("x", []string{"a", "b"}); err != nil {
		t.Error(err)
	}
	p := &Policy{Untrusted: true}
	if err := p.Ambiguous("x", []string{"a"}); err != nil {
		t.Error(err)
	}
	refused(t, nil, p.Ambiguous("x", []string{"a", "b"}), "several formats (a, b)")
}

// Files come ready for use: blocking, and not inherited by other programs.
func TestDescriptorFlags(t *testing.T) {
	_, top := tree(t)
	w := (&Policy{}).NewWalk()
	main, err := w.OpenMain(top, true)
	if err != nil {
		t.Fatal(err)
	}
	defer main.Close()
	part, _, err := w.OpenPart(top, extent("base"), false)
	if err != nil {
		t.Fatal(err)
	}
	defer part.Close()
	if main.Name() != top {
		t.Errorf("name %q", main.Name())
	}
	for _, f := range []*os.File{main, part} {
		fl, err1 := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
		fd, err2 := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if err1 != nil || err2 != nil || fl&unix.O_NONBLOCK != 0 || fd&unix.FD_CLOEXEC == 0 {
			t.Errorf("%s: flags %#x, descriptor flags %#x, %v %v", f.Name(), fl, fd, err1, err2)
		}
	}
}

func TestMountedDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts a device")
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 8<<20); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-f", "--show", image).CombinedOutput()
	if err != nil {
		t.Skipf("losetup does not work here: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v: %s", err, out)
		}
	})
	f, err := (&Policy{}).NewWalk().OpenMain(dev, true)
	if err != nil {
		t.Fatalf("unused: %v", err)
	}
	f.Close()
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", dev).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4 (Debian package e2fsprogs): %v: %s", err, out)
	}
	at := t.TempDir()
	if out, err := exec.Command("mount", dev, at).CombinedOutput(); err != nil {
		t.Skipf("mount does not work here: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(at, 0); err != nil {
			t.Error(err)
		}
	})
	if f, err := (&Policy{}).NewWalk().OpenMain(dev, true); err == nil || err.Error() != "Could not open '"+dev+"': Device or resource busy" {
		t.Errorf("mounted, to be written: %v, %v", f, err)
	}
	f, err = (&Policy{}).NewWalk().OpenMain(dev, false)
	if err != nil {
		t.Fatalf("mounted, to be read: %v", err)
	}
	f.Close()
}

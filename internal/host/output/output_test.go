package output

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/host/lock"
	"github.com/instar-img/instar/sdk"
)

const (
	oldText = "the old content\n"
	newText = "the new content, which is longer than the old one\n"
)

// ways runs a test with unnamed temporary files and with named ones.
func ways(t *testing.T, test func(t *testing.T, opts Options)) {
	t.Helper()
	t.Run("tmpfile", func(t *testing.T) { test(t, Options{}) })
	t.Run("sibling", func(t *testing.T) { test(t, Options{noTmpfile: true}) })
}

func begin(t *testing.T, path string, opts Options) *Set {
	t.Helper()
	s, err := Begin(path, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Abort)
	return s
}

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, path, content string) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if string(b) != content {
		t.Errorf("%s holds %.60q, want %.60q", path, b, content)
	}
}

// wantFiles checks that dir holds just these.
func wantFiles(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, e := range entries {
		have = append(have, e.Name())
	}
	slices.Sort(names)
	if !slices.Equal(have, names) {
		t.Errorf("%s holds %q, want %q", dir, have, names)
	}
}

func write(t *testing.T, f *os.File, content string) {
	t.Helper()
	if _, err := f.WriteAt([]byte(content), 0); err != nil {
		t.Fatal(err)
	}
}

func commit(t *testing.T, s *Set) {
	t.Helper()
	if err := s.Commit(); err != nil {
		t.Fatal(err)
	}
}

func TestNewFile(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		path := filepath.Join(dir, "x")
		s := begin(t, path, opts)
		write(t, s.Main(), newText)
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("before Commit: %v", err)
		}
		commit(t, s)
		want(t, path, newText)
		wantFiles(t, dir, "x")
		if _, err := s.Main().Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Commit left the file open: %v", err)
		}
		s.Abort()
		want(t, path, newText)
	})
}

func TestRelativePath(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		t.Chdir(dir)
		s := begin(t, "x", opts)
		t.Chdir("/")
		write(t, s.Main(), newText)
		commit(t, s)
		want(t, filepath.Join(dir, "x"), newText)
	})
}

func TestReplace(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		path := filepath.Join(dir, "x")
		put(t, path, oldText)
		s := begin(t, path, opts)
		write(t, s.Main(), newText)
		want(t, path, oldText)
		commit(t, s)
		want(t, path, newText)
		wantFiles(t, dir, "x")
	})
}

func TestAbort(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		put(t, filepath.Join(dir, "old"), oldText)
		for _, name := range []string{"old", "new"} {
			s := begin(t, filepath.Join(dir, name), opts)
			if _, err := s.Add("extent"); err != nil {
				t.Fatal(err)
			}
			write(t, s.Main(), newText)
			s.Abort()
			if err := s.Commit(); !errors.Is(err, ErrAborted) {
				t.Errorf("Commit after Abort: %v", err)
			}
			if _, err := s.Add("late"); !errors.Is(err, ErrAborted) {
				t.Errorf("Add after Abort: %v", err)
			}
		}
		want(t, filepath.Join(dir, "old"), oldText)
		wantFiles(t, dir, "old")
	})
}

func TestSeveralFiles(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		put(t, filepath.Join(dir, "e2"), oldText)
		s := begin(t, filepath.Join(dir, "main"), opts)
		for _, name := range []string{"e1", "e2"} {
			f, err := s.Add(name)
			if err != nil {
				t.Fatal(err)
			}
			write(t, f, newText+name)
		}
		write(t, s.Main(), newText)
		wantFiles(t, dir, siblings(t, dir, "e2")...)
		commit(t, s)
		want(t, filepath.Join(dir, "main"), newText)
		want(t, filepath.Join(dir, "e1"), newText+"e1")
		want(t, filepath.Join(dir, "e2"), newText+"e2")
		wantFiles(t, dir, "main", "e1", "e2")
	})
}

// An image may have as many files as the system lets a process open.
func TestThousandsOfFiles(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	n := 2000
	if limit.Cur < uint64(n)+100 {
		t.Skipf("this process may open %d files", limit.Cur)
	}
	dir := t.TempDir()
	for range 2 { // new, then some of them replaced
		s := begin(t, filepath.Join(dir, "main"), Options{})
		for i := range n {
			if _, err := s.Add(fmt.Sprint("e", i)); err != nil {
				t.Fatal(err)
			}
		}
		commit(t, s)
		n = 500
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2001 {
		t.Errorf("%d files, %v", len(entries), err)
	}
}

// siblings returns names and the temporary files that dir holds meanwhile.
func siblings(t *testing.T, dir string, names ...string) []string {
	t.Helper()
	tmp, err := filepath.Glob(filepath.Join(dir, ".*.instar-*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range tmp {
		names = append(names, filepath.Base(n))
	}
	return names
}

// Whatever step of Commit fails, all files are as they were.
func TestCommitIsAllOrNothing(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		for _, step := range []string{"publish e1", "publish e2", "publish main"} {
			for _, existing := range [][]string{nil, {"main"}, {"e1", "main"}, {"e1", "e2", "main"}, {"e2"}} {
				dir := t.TempDir()
				for _, n := range existing {
					put(t, filepath.Join(dir, n), oldText+n)
				}
				opts.fault = func(s string) error {
					if s == step {
						return unix.ENOSPC
					}
					return nil
				}
				s := begin(t, filepath.Join(dir, "main"), opts)
				for _, name := range []string{"e1", "e2"} {
					f, err := s.Add(name)
					if err != nil {
						t.Fatal(err)
					}
					write(t, f, newText)
				}
				write(t, s.Main(), newText)
				err := s.Commit()
				if !errors.Is(err, unix.ENOSPC) || !strings.HasSuffix(err.Error(), ": No space left on device") {
					t.Errorf("%s: %v", step, err)
				}
				wantFiles(t, dir, existing...)
				for _, n := range existing {
					want(t, filepath.Join(dir, n), oldText+n)
				}
			}
		}
	})
}

// What takes the place of a file is on stable storage first, and where it does
// not get there the file stays.
func TestReplacedAfterSync(t *testing.T) {
	for _, sync := range []bool{true, false} {
		for _, existing := range []bool{true, false} {
			path := filepath.Join(t.TempDir(), "x")
			if existing {
				put(t, path, oldText)
			}
			synced := false
			s := begin(t, path, Options{Sync: sync, fault: func(step string) error {
				if step == "sync x" {
					synced = true
					return unix.EIO
				}
				return nil
			}})
			write(t, s.Main(), newText)
			err := s.Commit()
			if synced != (sync || existing) || synced != errors.Is(err, unix.EIO) {
				t.Errorf("sync %v, existing %v: synced %v, %v", sync, existing, synced, err)
			}
			if existing {
				want(t, path, oldText)
			}
		}
	}
}

func TestSomebodyElseWasFaster(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		path := filepath.Join(dir, "x")
		s := begin(t, path, opts)
		put(t, path, "theirs")
		if err := s.Commit(); !errors.Is(err, fs.ErrExist) {
			t.Errorf("new file: %v", err)
		}
		want(t, path, "theirs")

		s = begin(t, path, opts)
		if err := os.Rename(path, filepath.Join(dir, "moved")); err != nil {
			t.Fatal(err)
		}
		put(t, path, "another")
		if err := s.Commit(); !errors.Is(err, fs.ErrExist) {
			t.Errorf("replaced file: %v", err)
		}
		want(t, path, "another")
		want(t, filepath.Join(dir, "moved"), "theirs")
		wantFiles(t, dir, "x", "moved")
	})
}

func TestSymbolicLinks(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		sub := filepath.Join(dir, "sub")
		if err := os.Mkdir(sub, 0o755); err != nil {
			t.Fatal(err)
		}
		for link, target := range map[string]string{
			"rel": "sub/a", "abs": filepath.Join(sub, "b"), "two": "one", "one": "sub/../sub/c", "dangling": "sub/d",
			"loop1": "loop2", "loop2": "loop1", "nowhere": "missing/x",
		} {
			if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range []string{"a", "b", "c"} {
			put(t, filepath.Join(sub, name), oldText)
		}
		for link, name := range map[string]string{"rel": "a", "abs": "b", "two": "c", "dangling": "d"} {
			s := begin(t, filepath.Join(dir, link), opts)
			write(t, s.Main(), newText+link)
			commit(t, s)
			want(t, filepath.Join(sub, name), newText+link)
			if fi, err := os.Lstat(filepath.Join(dir, link)); err != nil || fi.Mode()&fs.ModeSymlink == 0 {
				t.Errorf("%s is no longer a link: %v %v", link, fi, err)
			}
		}
		for link, no := range map[string]unix.Errno{"loop1": unix.ELOOP, "nowhere": unix.ENOENT} {
			if _, err := Begin(filepath.Join(dir, link), opts); !errors.Is(err, no) {
				t.Errorf("%s: %v, want %v", link, err, no)
			}
		}
		wantFiles(t, sub, "a", "b", "c", "d")
	})
}

func TestRefusals(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		put(t, filepath.Join(dir, "file"), oldText)
		if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
			t.Fatal(err)
		}
		for path, text := range map[string]string{
			"missing/x":              "No such file or directory",
			"sub":                    "Is a directory",
			"sub/":                   "Is a directory",
			"new/":                   "Is a directory",
			"file/x":                 "Not a directory",
			"fifo":                   "a FIFO is not a regular file or a block device",
			strings.Repeat("n", 256): "File name too long",
		} {
			path = dir + "/" + path
			_, err := Begin(path, opts)
			if err == nil || err.Error() != "Could not create '"+path+"': "+text {
				t.Errorf("%s: %v, want %s", path, err, text)
			}
		}
		s := begin(t, filepath.Join(dir, "main"), opts)
		for _, name := range []string{"", ".", "..", "a/b", "../x", "/x", "a\x00b", "main"} {
			if _, err := s.Add(name); !errors.Is(err, sdk.ErrInvalid) {
				t.Errorf("Add(%q): %v", name, err)
			}
		}
		s.Abort()
		wantFiles(t, dir, "file", "fifo", "sub")
	})
}

func TestLongName(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		path := filepath.Join(t.TempDir(), strings.Repeat("n", 255))
		for range 2 { // new, then replaced
			s := begin(t, path, opts)
			write(t, s.Main(), newText)
			commit(t, s)
			want(t, path, newText)
		}
	})
}

func TestUmaskAndMode(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		mode := func(path string) fs.FileMode {
			fi, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			return fi.Mode().Perm()
		}
		for umask, want := range map[int]fs.FileMode{0o077: 0o600, 0o022: 0o644, 0: 0o644, 0o027: 0o640} {
			path := filepath.Join(dir, "new")
			old := unix.Umask(umask)
			s, err := Begin(path, opts)
			unix.Umask(old)
			if err != nil {
				t.Fatal(err)
			}
			commit(t, s)
			if got := mode(path); got != want {
				t.Errorf("umask %o: mode %o, want %o", umask, got, want)
			}
			os.Remove(path)
		}
		path := filepath.Join(dir, "old")
		put(t, path, oldText)
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		s := begin(t, path, opts)
		commit(t, s)
		if got := mode(path); got != 0o666 {
			t.Errorf("replaced: mode %o, want 666", got)
		}
	})
}

func TestHardLinks(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		for _, old := range []string{oldText, "", strings.Repeat(oldText, 100000)} {
			dir := t.TempDir()
			path, other := filepath.Join(dir, "x"), filepath.Join(dir, "y")
			put(t, path, old)
			if err := os.Link(path, other); err != nil {
				t.Fatal(err)
			}
			var said []string
			opts.Log = func(s string) { said = append(said, s) }
			s := begin(t, path, opts)
			if len(said) != 1 || said[0] != path+": written in place: it has other hard links" {
				t.Errorf("log: %q", said)
			}
			// Data, a hole, data, a hole.
			if err := s.Prepare(context.Background(), 0, 4<<20, sdk.PreallocOff); err != nil {
				t.Fatal(err)
			}
			write(t, s.Main(), newText)
			if _, err := s.Main().WriteAt([]byte(newText), 2<<20); err != nil {
				t.Fatal(err)
			}
			want(t, other, old)
			commit(t, s)
			content := make([]byte, 4<<20)
			copy(content, newText)
			copy(content[2<<20:], newText)
			for _, p := range []string{path, other} {
				if b, err := os.ReadFile(p); err != nil || !bytes.Equal(b, content) {
					t.Errorf("%s: %v, %d bytes", p, err, len(b))
				}
			}
			a, _ := os.Stat(path)
			b, _ := os.Stat(other)
			if !os.SameFile(a, b) {
				t.Error("the link is broken")
			}
			wantFiles(t, dir, "x", "y")
		}
	})
}

func TestHardLinksAborted(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	put(t, path, oldText)
	if err := os.Link(path, filepath.Join(dir, "y")); err != nil {
		t.Fatal(err)
	}
	s := begin(t, path, Options{})
	write(t, s.Main(), newText)
	s.Abort()
	want(t, path, oldText)
}

func TestInPlace(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	if _, err := Begin(path, Options{InPlace: true}); err == nil || err.Error() != "Could not open '"+path+"': No such file or directory" {
		t.Errorf("missing: %v", err)
	}
	put(t, path, oldText)
	s := begin(t, path, Options{InPlace: true})
	if s.Fresh(0) {
		t.Error("old content is taken for fresh")
	}
	write(t, s.Main(), "THE")
	commit(t, s)
	want(t, path, "THE"+oldText[3:])
}

func TestLockedByAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	put(t, path, oldText)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := lock.Take(f, path, lock.Read); err != nil {
		t.Fatal(err)
	}
	for _, opts := range []Options{{}, {InPlace: true}} {
		var le *lock.Error
		if _, err := Begin(path, opts); !errors.As(err, &le) {
			t.Errorf("%v", err)
		}
	}
	want(t, path, oldText)
}

func TestPrepare(t *testing.T) {
	const length = 3<<20 + 7
	blocks := func(f *os.File) int64 {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	for p, least := range map[sdk.Preallocation]int64{sdk.PreallocOff: 0, sdk.PreallocFalloc: length, sdk.PreallocFull: length} {
		s := begin(t, filepath.Join(t.TempDir(), "x"), Options{})
		if err := s.Prepare(context.Background(), 0, length, p); err != nil {
			t.Fatal(err)
		}
		fi, err := s.Main().Stat()
		if err != nil || fi.Size() != length {
			t.Errorf("%d: length %d, %v", p, fi.Size(), err)
		}
		if got := blocks(s.Main()); got < least || least == 0 && got != 0 {
			t.Errorf("%d: %d bytes allocated", p, got)
		}
		if err := s.Prepare(context.Background(), 0, -1, p); !errors.Is(err, sdk.ErrInvalid) {
			t.Errorf("negative length: %v", err)
		}
	}
}

func TestPrepareIsInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	s := begin(t, filepath.Join(t.TempDir(), "x"), Options{})
	if err := s.Prepare(ctx, 0, 1<<20, sdk.PreallocFull); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// What is preallocated in a file that cannot be replaced is so in the end.
func TestPrepareInPlace(t *testing.T) {
	const length = 2 << 20
	for _, p := range []sdk.Preallocation{sdk.PreallocFalloc, sdk.PreallocFull} {
		dir := t.TempDir()
		path := filepath.Join(dir, "x")
		put(t, path, strings.Repeat(oldText, 10000))
		if err := os.Link(path, filepath.Join(dir, "y")); err != nil {
			t.Fatal(err)
		}
		s := begin(t, path, Options{})
		if err := s.Prepare(context.Background(), 0, length, p); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Main().WriteAt([]byte(newText), 1<<20); err != nil {
			t.Fatal(err)
		}
		commit(t, s)
		content := make([]byte, length)
		copy(content[1<<20:], newText)
		if b, err := os.ReadFile(path); err != nil || !bytes.Equal(b, content) {
			t.Errorf("content: %v", err)
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil || st.Blocks*512 < length {
			t.Errorf("%d: %d blocks, %v", p, st.Blocks, err)
		}
	}
}

func TestOpenDescriptorName(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	put(t, path, oldText)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := begin(t, fmt.Sprintf("/dev/fd/%d", f.Fd()), Options{})
	write(t, s.Main(), "THE")
	commit(t, s)
	want(t, path, "THE"+oldText[3:])
}

func TestCharacterDevice(t *testing.T) {
	s := begin(t, "/dev/null", Options{})
	if s.Fresh(0) {
		t.Error("a device is taken for fresh")
	}
	write(t, s.Main(), newText)
	if err := s.Prepare(context.Background(), 0, 1, sdk.PreallocOff); err == nil || err.Error() != "Cannot grow device files" {
		t.Errorf("%v", err)
	}
	commit(t, s)
	if fi, err := os.Stat("/dev/null"); err != nil || fi.Mode()&fs.ModeCharDevice == 0 {
		t.Fatalf("/dev/null is %v, %v", fi, err)
	}
}

package output

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk"
)

// needRoot skips what only root can set up.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts file systems or sets owners and flags")
	}
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// mount mounts a new file system of a kind ("tmpfs", "ext4", "xfs", "btrfs") for
// the test and returns where.
func mount(t *testing.T, kind string, size int64) string {
	t.Helper()
	needRoot(t)
	dir := publicDir(t, 0o755)
	at := filepath.Join(dir, "mnt")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	args := []string{"-t", "tmpfs", "-o", fmt.Sprintf("size=%d", size), "instar-test", at}
	if kind != "tmpfs" {
		mkfs, err := exec.LookPath("mkfs." + kind)
		if err != nil {
			t.Skipf("mkfs.%s is missing (Debian package %s)", kind, map[string]string{"ext4": "e2fsprogs", "xfs": "xfsprogs", "btrfs": "btrfs-progs"}[kind])
		}
		image := filepath.Join(dir, "image")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, size); err != nil {
			t.Fatal(err)
		}
		run(t, mkfs, "-q", image)
		args = []string{"-o", "loop", image, at}
	}
	mountAt(t, at, args...)
	return at
}

// mountAt runs mount and unmounts what it mounted when the test ends.
func mountAt(t *testing.T, at string, args ...string) {
	t.Helper()
	if out, err := exec.Command("mount", args...).CombinedOutput(); err != nil {
		t.Skipf("mount %v does not work here: %v: %s", args, err, bytes.TrimSpace(out))
	}
	t.Cleanup(func() {
		for i := 0; ; i++ {
			err := unix.Unmount(at, 0)
			if err == nil {
				return
			}
			if !errors.Is(err, unix.EBUSY) || i == 50 {
				t.Errorf("unmount %s: %v", at, err)
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
}

const fsSize = 400 << 20 // what xfs needs at least

func TestFileSystems(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4", "xfs", "btrfs", "overlay"} {
		t.Run(kind, func(t *testing.T) {
			var dir string
			if kind == "overlay" {
				below := mount(t, "ext4", 64<<20)
				for _, d := range []string{"lower", "upper", "work", "mnt"} {
					if err := os.Mkdir(filepath.Join(below, d), 0o755); err != nil {
						t.Fatal(err)
					}
				}
				put(t, filepath.Join(below, "lower", "old"), oldText)
				dir = filepath.Join(below, "mnt")
				mountAt(t, dir, "-t", "overlay", "-o", fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", below), "overlay", dir)
			} else {
				dir = mount(t, kind, fsSize)
				dir = filepath.Join(dir, "d") // without lost+found
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			path := func(name string) string { return filepath.Join(dir, name) }
			put(t, path("old"), oldText)
			put(t, path("e1"), oldText)
			put(t, path("hard"), oldText)
			if err := os.Link(path("hard"), path("hard2")); err != nil {
				t.Fatal(err)
			}
			for _, fail := range []bool{true, false} {
				for _, name := range []string{"new", "old", "hard"} {
					opts := Options{Nocow: true, ExtentSizeHint: DefaultExtentSizeHint, Sync: true}
					opts.fault = func(step string) error {
						if fail && step == "publish "+name {
							return unix.EIO
						}
						return nil
					}
					s := begin(t, path(name), opts)
					for _, e := range []string{"e1", "e2"} {
						if _, err := s.Add(e); err != nil {
							t.Fatal(err)
						}
					}
					for i, p := range []sdk.Preallocation{sdk.PreallocOff, sdk.PreallocFalloc, sdk.PreallocFull} {
						if err := s.Prepare(context.Background(), i, 1<<20, p); err != nil {
							t.Fatal(err)
						}
						write(t, s.File(i), fmt.Sprint(newText, name, i))
					}
					err := s.Commit()
					if fail {
						if !errors.Is(err, unix.EIO) {
							t.Errorf("%s: %v", name, err)
						}
						want(t, path("old"), oldText)
						want(t, path("e1"), oldText)
						want(t, path("hard2"), oldText)
						wantFiles(t, dir, "old", "e1", "hard", "hard2")
						continue
					}
					if err != nil {
						t.Errorf("%s: %v", name, err)
					}
					for i, n := range []string{name, "e1", "e2"} {
						content := make([]byte, 1<<20)
						copy(content, fmt.Sprint(newText, name, i))
						if b, err := os.ReadFile(path(n)); err != nil || !bytes.Equal(b, content) {
							t.Errorf("%s of %s: %v", n, name, err)
						}
					}
				}
			}
			wantFiles(t, dir, "new", "old", "hard", "hard2", "e1", "e2")
		})
	}
}

// What the file system can do for an image it is asked to do.
func TestHints(t *testing.T) {
	xflags := func(path string) (x fsxattr) {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := control(f, func(fd int) error { return ioctl(fd, fsIocFsgetxattr, unsafe.Pointer(&x)) }); err != nil {
			t.Fatal(err)
		}
		return x
	}
	t.Run("xfs", func(t *testing.T) {
		path := filepath.Join(mount(t, "xfs", fsSize), "x")
		for _, hint := range []int64{4 << 20, 0} {
			s := begin(t, path, Options{ExtentSizeHint: hint})
			commit(t, s)
			if got := xflags(path).extsize; int64(got) != hint {
				t.Errorf("extent size hint %d, want %d", got, hint)
			}
		}
		var said string
		s := begin(t, path, Options{ExtentSizeHint: 4<<20 + 1, Log: func(m string) { said += m }})
		if want := path + ": extent_size_hint without effect: Invalid argument"; said != want {
			t.Errorf("said %q, want %q", said, want)
		}
		commit(t, s)
	})
	t.Run("btrfs", func(t *testing.T) {
		path := filepath.Join(mount(t, "btrfs", fsSize), "x")
		flags := func() int {
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			n, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		for _, nocow := range []bool{false, true, false} { // kept when replaced
			s := begin(t, path, Options{Nocow: nocow})
			write(t, s.Main(), newText)
			commit(t, s)
			if nocow && flags()&fsNocowFlag == 0 {
				t.Error("nocow was asked for and is not set")
			}
		}
		if flags()&fsNocowFlag == 0 {
			t.Error("nocow of the old file is lost")
		}
	})
}

// free returns the free bytes of a file system, once what was deleted is gone.
func free(t *testing.T, dir string) uint64 {
	t.Helper()
	unix.Sync()
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	return st.Bavail * uint64(st.Bsize)
}

func TestNoSpace(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		t.Run(kind, func(t *testing.T) {
			dir := mount(t, kind, 8<<20)
			dir = filepath.Join(dir, "d")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			put(t, filepath.Join(dir, "old"), oldText)
			put(t, filepath.Join(dir, "hard"), oldText)
			if err := os.Link(filepath.Join(dir, "hard"), filepath.Join(dir, "hard2")); err != nil {
				t.Fatal(err)
			}
			before := free(t, dir)
			ways(t, func(t *testing.T, opts Options) {
				for _, name := range []string{"old", "new", "hard"} {
					for text, step := range map[string]func(s *Set) error{
						"Could not preallocate new data: No space left on device": func(s *Set) error {
							if err := s.Prepare(context.Background(), 0, 16<<20, sdk.PreallocFalloc); err != nil {
								return err
							}
							return s.Commit()
						},
						"Could not write zeros for preallocation: No space left on device": func(s *Set) error {
							if err := s.Prepare(context.Background(), 0, 16<<20, sdk.PreallocFull); err != nil {
								return err
							}
							return s.Commit()
						},
						"write": func(s *Set) error {
							_, err := s.Main().WriteAt(bytes.Repeat([]byte{1}, 16<<20), 0)
							return err
						},
					} {
						s := begin(t, filepath.Join(dir, name), opts)
						err := step(s)
						if name == "hard" && text != "write" {
							text = "Could not reserve the space for '" + filepath.Join(dir, name) + "': No space left on device"
						}
						if !errors.Is(err, unix.ENOSPC) || text != "write" && err.Error() != text {
							t.Errorf("%s: %v, want %s", name, err, text)
						}
						s.Abort()
						want(t, filepath.Join(dir, "old"), oldText)
						want(t, filepath.Join(dir, "hard2"), oldText)
						wantFiles(t, dir, "old", "hard", "hard2")
						if now := free(t, dir); now+64<<10 < before {
							t.Errorf("%s: %d bytes free, %d before", name, now, before)
						}
					}
				}
			})
		})
	}
}

// A file in a small file system whose directory cannot be written is completed
// elsewhere; what does not fit then leaves it as it is.
func TestNoSpaceWhereItCannotBeReplaced(t *testing.T) {
	for _, kind := range []string{"tmpfs", "ext4"} {
		t.Run(kind, func(t *testing.T) {
			dir := mount(t, kind, 8<<20)
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "x")
			old := strings.Repeat(oldText, 50000)
			put(t, path, old)
			if err := os.Chmod(path, 0o666); err != nil {
				t.Fatal(err)
			}
			before := free(t, dir)
			asNobody(t, func() {
				s, err := Begin(path, Options{})
				if err != nil {
					t.Error(err)
					return
				}
				defer s.Abort()
				if _, err := s.Main().WriteAt(bytes.Repeat([]byte{1}, 16<<20), 0); err != nil {
					t.Error(err)
				}
				if err := s.Commit(); !errors.Is(err, unix.ENOSPC) {
					t.Errorf("%v", err)
				}
			})
			want(t, path, old)
			if now := free(t, dir); now+64<<10 < before {
				t.Errorf("%d bytes free, %d before", now, before)
			}
		})
	}
}

// asNobody runs do with the file system rights of an ordinary user.
func asNobody(t *testing.T, do func()) {
	t.Helper()
	needRoot(t)
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		defer close(done)
		// No libc call here: these change this thread alone.
		if err := unix.Setfsgid(65534); err != nil {
			done <- err
			return
		}
		if err := unix.Setfsuid(65534); err != nil {
			done <- err
			return
		}
		do()
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// publicDir is a directory that others may enter: t.TempDir is for its owner alone.
func publicDir(t *testing.T, mode fs.FileMode) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "instar-output-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, mode); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestRightsOfAnOrdinaryUser(t *testing.T) {
	needRoot(t)
	const all = fs.FileMode(0o777)
	for _, c := range []struct {
		name    string
		dirMode fs.FileMode
		mode    fs.FileMode // of the existing file, root's; 0: there is none
		log     string      // what is said, when it succeeds
		err     string
	}{
		{"new, directory closed", 0o755, 0, "", "Could not create '%s': Permission denied"},
		{"file closed", all, 0o644, "", "Could not create '%s': Permission denied"},
		{"file not readable", all, 0o622, "", "Could not create '%s': Permission denied"},
		{"directory closed", 0o755, 0o666, "%s: written in place: its directory cannot be written (Permission denied)", ""},
		{"owner cannot be kept", all, 0o666, "%s: written in place: a new file cannot be given its attributes (Operation not permitted)", ""},
		{"directory not searchable", 0o700, 0o666, "", "Could not create '%s': Permission denied"},
		{"new, directory open", all, 0, "", ""},
		{"new, directory write only", 0o733, 0, "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			ways(t, func(t *testing.T, opts Options) {
				dir := publicDir(t, c.dirMode)
				path := filepath.Join(dir, "x")
				if c.mode != 0 {
					put(t, path, oldText)
					if err := os.Chmod(path, c.mode); err != nil {
						t.Fatal(err)
					}
				}
				said := ""
				opts.Log = func(m string) { said += m }
				asNobody(t, func() {
					s, err := Begin(path, opts)
					if err == nil {
						_, err = s.Main().WriteAt([]byte(newText), 0)
						if err == nil {
							err = s.Commit()
						}
						s.Abort()
					}
					if c.err != "" {
						if err == nil || err.Error() != strings.ReplaceAll(c.err, "%s", path) {
							t.Errorf("%v", err)
						}
					} else if err != nil {
						t.Error(err)
					}
				})
				if want := strings.ReplaceAll(c.log, "%s", path); said != want {
					t.Errorf("said %q, want %q", said, want)
				}
				switch {
				case c.err == "":
					want(t, path, newText)
				case c.mode != 0:
					want(t, path, oldText)
				}
				if c.mode != 0 {
					var st unix.Stat_t
					if err := unix.Stat(path, &st); err != nil || st.Uid != 0 || fs.FileMode(st.Mode&0o777) != c.mode {
						t.Errorf("owner %d, mode %o, %v", st.Uid, st.Mode, err)
					}
				}
				left := []string{"x"}
				if c.err != "" && c.mode == 0 {
					left = nil
				}
				wantFiles(t, dir, left...)
			})
		})
	}
}

// In a sticky directory another's file cannot be replaced; whether it can be
// written is for the kernel's setting to say.
func TestStickyDirectory(t *testing.T) {
	needRoot(t)
	level, err := os.ReadFile("/proc/sys/fs/protected_regular")
	if err != nil {
		t.Skip("this kernel has no protected_regular")
	}
	dir := publicDir(t, 0o777|fs.ModeSticky)
	path := filepath.Join(dir, "x")
	put(t, path, oldText)
	// Owned by a third user: not the directory's owner, not ours.
	if err := os.Chown(path, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	f, kernel := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if kernel == nil {
		f.Close()
	}
	s, err := Begin(path, Options{})
	if err == nil {
		s.Abort()
	}
	if (err == nil) != (kernel == nil) || err != nil && !errors.Is(err, unix.EACCES) {
		t.Errorf("protected_regular %s: %v, the kernel says %v", bytes.TrimSpace(level), err, kernel)
	}
	want(t, path, oldText)
}

func TestAttributesAreKept(t *testing.T) {
	needRoot(t)
	for _, kind := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(kind, func(t *testing.T) {
			dir := mount(t, kind, fsSize)
			path := filepath.Join(dir, "x")
			put(t, path, oldText)
			run(t, "setfacl", "-m", "u:1234:rw,g:77:r", path)
			run(t, "setfacl", "-d", "-m", "u:999:rwx", dir)
			if err := os.Chown(path, 1234, 567); err != nil {
				t.Fatal(err)
			}
			big := bytes.Repeat([]byte("v"), 400)
			attrs := map[string][]byte{"user.one": []byte("1"), "user.big": big, "user.empty": {}, "security.selinux": []byte("system_u:object_r:virt_image_t:s0\x00"), "trusted.t": []byte("t")}
			for name, v := range attrs {
				if err := unix.Setxattr(path, name, v, 0); err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			acl := run(t, "getfacl", "-cpn", path)
			ways(t, func(t *testing.T, opts Options) {
				opts.Log = func(m string) { t.Error(m) }
				s := begin(t, path, opts)
				write(t, s.Main(), newText)
				commit(t, s)
				want(t, path, newText)
				var st unix.Stat_t
				if err := unix.Stat(path, &st); err != nil || st.Uid != 1234 || st.Gid != 567 {
					t.Errorf("owner %d:%d, %v", st.Uid, st.Gid, err)
				}
				if got := run(t, "getfacl", "-cpn", path); got != acl {
					t.Errorf("ACL\n%s\nwant\n%s", got, acl)
				}
				for name, v := range attrs {
					b := make([]byte, 4096)
					n, err := unix.Getxattr(path, name, b)
					if err != nil || !bytes.Equal(b[:max(n, 0)], v) {
						t.Errorf("%s: %q, %v", name, b[:max(n, 0)], err)
					}
				}
			})
			// One without an ACL does not get the directory's default one, but a
			// new file does.
			plain := filepath.Join(dir, "plain")
			put(t, plain, oldText)
			run(t, "setfacl", "-b", plain)
			for name, inherits := range map[string]bool{plain: false, filepath.Join(dir, "new"): true} {
				s := begin(t, name, Options{})
				commit(t, s)
				if got := strings.Contains(run(t, "getfacl", "-cpn", name), "user:999:"); got != inherits {
					t.Errorf("%s: default ACL %v, want %v", name, got, inherits)
				}
			}
		})
	}
}

func TestMountedOver(t *testing.T) {
	needRoot(t)
	ways(t, func(t *testing.T, opts Options) {
		dir := t.TempDir()
		path, source := filepath.Join(dir, "x"), filepath.Join(t.TempDir(), "source")
		put(t, path, "below")
		put(t, source, oldText)
		mountAt(t, path, "--bind", source, path)
		said := ""
		opts.Log = func(m string) { said += m }
		s := begin(t, path, opts)
		write(t, s.Main(), newText)
		want(t, source, oldText)
		commit(t, s)
		want(t, path, newText)
		want(t, source, newText)
		wantFiles(t, dir, "x")
		if want := path + ": written in place: it is a mount point"; said != want {
			t.Errorf("said %q, want %q", said, want)
		}
	})
}

func TestReadOnlyDirectoryWritableFile(t *testing.T) {
	needRoot(t)
	dir := mount(t, "tmpfs", 1<<20)
	path, source := filepath.Join(dir, "x"), filepath.Join(t.TempDir(), "source")
	put(t, path, "below")
	put(t, source, oldText)
	mountAt(t, path, "--bind", source, path)
	run(t, "mount", "-o", "remount,ro", dir)
	s := begin(t, path, Options{})
	write(t, s.Main(), newText)
	want(t, source, oldText)
	commit(t, s)
	want(t, source, newText)
	if _, err := Begin(filepath.Join(dir, "new"), Options{}); err == nil || !strings.HasSuffix(err.Error(), "/new': Read-only file system") {
		t.Errorf("%v", err)
	}
}

func TestInodeFlags(t *testing.T) {
	dir := mount(t, "ext4", 16<<20)
	chattr := func(flag, path string) {
		run(t, "chattr", "+"+flag, path)
		t.Cleanup(func() { run(t, "chattr", "-"+flag, path) })
	}
	ways(t, func(t *testing.T, opts Options) {
		for flag, log := range map[string]string{
			"i": "written in place: its directory cannot be written (Operation not permitted)",
			"a": "written in place: it cannot be replaced (Operation not permitted)",
		} {
			sub, err := os.MkdirTemp(dir, "")
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(sub, "x")
			put(t, path, oldText)
			chattr(flag, sub)
			if flag == "a" && opts.noTmpfile {
				// A sibling could be made there, and never removed again.
				continue
			}
			said := ""
			opts.Log = func(m string) { said += m }
			s := begin(t, path, opts)
			write(t, s.Main(), newText)
			want(t, path, oldText)
			commit(t, s)
			want(t, path, newText)
			if said != path+": "+log {
				t.Errorf("+%s: said %q", flag, said)
			}
		}
		sub, err := os.MkdirTemp(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		for _, flag := range []string{"i", "a"} {
			path := filepath.Join(sub, flag)
			put(t, path, oldText)
			chattr(flag, path)
			if _, err := Begin(path, opts); !errors.Is(err, unix.EPERM) {
				t.Errorf("file +%s: %v", flag, err)
			}
			want(t, path, oldText)
		}
	})
}

func TestBlockDevice(t *testing.T) {
	needRoot(t)
	image := filepath.Join(t.TempDir(), "image")
	put(t, image, "")
	if err := os.Truncate(image, 8<<20); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "-f", "--show", image).CombinedOutput()
	if err != nil {
		t.Skipf("losetup does not work here: %v: %s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() { run(t, "losetup", "-d", dev) })
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dev, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dev, link} {
		s := begin(t, path, Options{Nocow: true, ExtentSizeHint: DefaultExtentSizeHint, Sync: true})
		if s.Fresh(0) {
			t.Error("a device is taken for fresh")
		}
		for _, c := range []struct {
			length int64
			p      sdk.Preallocation
			want   string
		}{
			{8 << 20, sdk.PreallocOff, ""},
			{0, sdk.PreallocOff, ""},
			{8<<20 + 1, sdk.PreallocOff, "Cannot grow device files"},
			{1 << 20, sdk.PreallocFull, "Unsupported preallocation mode 'full'"},
			{1 << 20, sdk.PreallocFalloc, "Preallocation mode 'falloc' unsupported for this non-regular file"},
		} {
			got := ""
			if err := s.Prepare(context.Background(), 0, c.length, c.p); err != nil {
				got = err.Error()
			}
			if got != c.want {
				t.Errorf("%d, %d: %q, want %q", c.length, c.p, got, c.want)
			}
		}
		write(t, s.Main(), newText+path)
		commit(t, s)
		b := make([]byte, len(newText+path))
		f, err := os.Open(dev)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(b, 0); err != nil || string(b) != newText+path {
			t.Errorf("%q, %v", b, err)
		}
		f.Close()
	}
	// A mounted device is in use.
	run(t, "mkfs.ext4", "-q", "-F", dev)
	at := t.TempDir()
	mountAt(t, at, dev, at)
	if _, err := Begin(dev, Options{}); err == nil || err.Error() != "Could not create '"+dev+"': Device or resource busy" {
		t.Errorf("mounted: %v", err)
	}
}

// The test binary, started again, makes a file and waits to be killed.
func TestMain(m *testing.M) {
	if path := os.Getenv("INSTAR_OUTPUT_TEST_KILL"); path != "" {
		s, err := Begin(path, Options{})
		if err == nil {
			_, err = s.Add("extent")
		}
		if err == nil {
			_, err = s.Main().WriteAt([]byte(newText), 0)
		}
		fmt.Println("ready", err)
		time.Sleep(time.Minute)
		os.Exit(1)
	}
	if s := os.Getenv(killVariable); s != "" {
		if err := replaceAndDie(s); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestKilled(t *testing.T) {
	dir := t.TempDir()
	put(t, filepath.Join(dir, "old"), oldText)
	if s := begin(t, filepath.Join(dir, "probe"), Options{}); s.files[0].tmp != "" {
		t.Skip("this file system has no O_TMPFILE: a killed process leaves its temporary file")
	}
	for _, name := range []string{"old", "new"} {
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), "INSTAR_OUTPUT_TEST_KILL="+filepath.Join(dir, name))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, err := out.Read(b)
		if string(b[:n]) != "ready <nil>\n" {
			t.Errorf("%q, %v", b[:n], err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		want(t, filepath.Join(dir, "old"), oldText)
		wantFiles(t, dir, "old")
	}
}

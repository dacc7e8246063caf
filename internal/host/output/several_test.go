package output

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A test image of several files: the main file has the generation and the names
// of the others, each of which has the generation and its number.
var severalNames = []string{"disk-flat.x", "disk-s2.xy"}

func severalMain(generation string) string {
	return generation + " " + strings.Join(severalNames, " ")
}

// renamed is the Interim of such images.
func renamed(main, to *os.File, names map[string]string) error {
	b := make([]byte, 1000)
	n, _ := main.ReadAt(b, 0)
	for from, with := range names {
		if len(from) != len(with) {
			return errors.New("a name of another length")
		}
		b = bytes.ReplaceAll(b, []byte(from), []byte(with))
	}
	_, err := to.WriteAt(b[:n], 0)
	return err
}

// readSeveral returns the generation of the image in dir, and an error where
// its files do not belong together.
func readSeveral(dir string) (string, error) {
	b, err := os.ReadFile(filepath.Join(dir, "disk.x"))
	if err != nil {
		return "", err
	}
	words := strings.Fields(string(b))
	if len(words) != 1+len(severalNames) {
		return "", fmt.Errorf("main file %q", b)
	}
	for i, name := range words[1:] {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return "", err
		}
		if string(b) != fmt.Sprint(words[0], i) {
			return "", fmt.Errorf("%s holds %q beside a main file of generation %s", name, b, words[0])
		}
	}
	return words[0], nil
}

func putSeveral(t *testing.T, dir, generation string) {
	t.Helper()
	for i, name := range severalNames {
		put(t, filepath.Join(dir, name), fmt.Sprint(generation, i))
	}
	put(t, filepath.Join(dir, "disk.x"), severalMain(generation))
}

// replaceSeveral makes a new image in dir.
func replaceSeveral(dir, generation string, opts Options) error {
	s, err := Begin(filepath.Join(dir, "disk.x"), opts)
	if err != nil {
		return err
	}
	defer s.Abort()
	for i, name := range severalNames {
		f, err := s.Add(name)
		if err != nil {
			return err
		}
		if _, err := f.WriteAt([]byte(fmt.Sprint(generation, i)), 0); err != nil {
			return err
		}
	}
	if _, err := s.Main().WriteAt([]byte(severalMain(generation)), 0); err != nil {
		return err
	}
	return s.Commit()
}

// killVariable has the test binary replace an image and kill itself at a step:
// DIR:STEP:HOW, where HOW has letters for named temporary files (s), without an
// Interim (n) and with one that fails (f).
const killVariable = "INSTAR_OUTPUT_TEST_SEVERAL"

func severalOptions(how string) Options {
	opts := Options{noTmpfile: strings.Contains(how, "s")}
	if !strings.Contains(how, "n") {
		opts.Interim = renamed
	}
	if strings.Contains(how, "f") {
		opts.Interim = func(_, _ *os.File, _ map[string]string) error { return errors.New("no such thing") }
	}
	return opts
}

func replaceAndDie(text string) error {
	part := strings.Split(text, ":")
	at := 0
	if _, err := fmt.Sscan(part[1], &at); err != nil {
		return err
	}
	opts := severalOptions(part[2])
	opts.fault = func(string) error {
		if at--; at < 0 {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
		return nil
	}
	return replaceSeveral(part[0], "new", opts)
}

// A process that is killed at any step leaves the old image or the new one;
// where no main file can stand in meanwhile, possibly none.
func TestSeveralKilled(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"", "s", "n", "sn", "f", "sf"} {
		t.Run("how"+how, func(t *testing.T) {
			seen := map[string]int{}
			for step := 0; ; step++ {
				dir := t.TempDir()
				putSeveral(t, dir, "old")
				cmd := exec.Command(self)
				cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s:%d:%s", killVariable, dir, step, how))
				out, err := cmd.CombinedOutput()
				var exit *exec.ExitError
				killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signaled()
				if err != nil && !killed {
					t.Fatalf("step %d: %v\n%s", step, err, out)
				}
				got, err := readSeveral(dir)
				if errors.Is(err, os.ErrNotExist) && strings.ContainsAny(how, "nf") && killed {
					if _, missing := os.Lstat(filepath.Join(dir, "disk.x")); !os.IsNotExist(missing) {
						t.Errorf("step %d: %v", step, err)
					}
					got, err = "none", nil
				}
				if err != nil {
					t.Errorf("step %d: %v", step, err)
				}
				seen[got]++
				// What was left is not in the way of another try.
				if err := replaceSeveral(dir, "newer", severalOptions(how)); err != nil {
					t.Errorf("step %d, again: %v", step, err)
				}
				if got, err := readSeveral(dir); got != "newer" || err != nil {
					t.Errorf("step %d, again: %s %v", step, got, err)
				}
				want(t, filepath.Join(dir, "disk.x"), severalMain("newer"))
				if !killed {
					if got != "new" {
						t.Errorf("at the end: %s", got)
					}
					wantFiles(t, dir, append([]string{"disk.x"}, severalNames...)...)
					break
				}
			}
			t.Logf("%v", seen)
			if seen["old"] < 2 || seen["new"] < 2 || strings.ContainsAny(how, "nf") == (seen["none"] == 0) {
				t.Errorf("states %v", seen)
			}
		})
	}
}

// Whatever step fails, the old image is there again, and nothing else.
func TestSeveralFails(t *testing.T) {
	for _, how := range []string{"", "s", "n", "sf"} {
		for step := range 40 {
			dir := t.TempDir()
			putSeveral(t, dir, "old")
			opts := severalOptions(how)
			at, name := step, ""
			opts.fault = func(s string) error {
				at--
				if at == -1 && s != "temporary" && s != "published" {
					name = s
					return unix.ENOSPC
				}
				return nil
			}
			err := replaceSeveral(dir, "new", opts)
			wantFiles(t, dir, append([]string{"disk.x"}, severalNames...)...)
			got, readErr := readSeveral(dir)
			// What only helps may fail.
			helps := strings.HasPrefix(name, "second name") || strings.HasPrefix(name, "stand in")
			if failed := name != "" && !helps; readErr != nil || failed != (err != nil) || failed != (got == "old") {
				t.Errorf("%q, step %d (%s): %v, and the image is %s %v", how, step, name, err, got, readErr)
			}
			want(t, filepath.Join(dir, "disk.x"), severalMain(got))
		}
	}
}

// A further file that is a symbolic link, or has other links, is replaced all
// the same.
func TestSeveralElsewhere(t *testing.T) {
	ways(t, func(t *testing.T, opts Options) {
		for _, link := range []func(dir, path string) error{
			func(dir, path string) error {
				if err := os.Rename(path, filepath.Join(dir, "elsewhere")); err != nil {
					return err
				}
				return os.Symlink("elsewhere", path)
			},
			func(dir, path string) error { return os.Link(path, filepath.Join(dir, "elsewhere")) },
		} {
			dir := t.TempDir()
			putSeveral(t, dir, "old")
			if err := link(dir, filepath.Join(dir, severalNames[0])); err != nil {
				t.Fatal(err)
			}
			opts.Interim = renamed
			if err := replaceSeveral(dir, "new", opts); err != nil {
				t.Fatal(err)
			}
			if got, err := readSeveral(dir); got != "new" || err != nil {
				t.Errorf("%s %v", got, err)
			}
			want(t, filepath.Join(dir, "elsewhere"), "new0")
			wantFiles(t, dir, append([]string{"disk.x", "elsewhere"}, severalNames...)...)
		}
	})
}

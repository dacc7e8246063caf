//go:build linux

package moving

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/instar-img/instar/test/terminal"
)

// TestInterruptedPipe ends a run that waits for standard input, which nobody
// writes.
func TestInterruptedPipe(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT} {
		dir := t.TempDir()
		cmd := exec.Command(instar(t), "convert", "--source-size", "1G", "-", "new")
		cmd.Dir = dir
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		var stderr bytes.Buffer
		cmd.Stdin, cmd.Stderr = r, &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		r.Close()
		if _, err := w.Write(make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
		ended := time.AfterFunc(10*time.Second, func() { w.Close() })
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if !ended.Stop() {
			t.Errorf("%v: it went on", sig)
		}
		w.Close()
		if code, text := cmd.ProcessState.ExitCode(), stderr.String(); code != 130 || text != "instar: interrupted\n" {
			t.Errorf("%v: exit code %d, %q", sig, code, text)
		}
		if left := listing(t, dir); left != "" {
			t.Errorf("%v: left behind: %s", sig, left)
		}
	}
}

// line is a line of --progress json.
type line struct {
	Transferred, Total int64
	Description        string
}

// TestFetch converts what a slow server has, and looks at the progress of it.
func TestFetch(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 20<<20, 11)
	files := http.FileServer(http.Dir(dir))
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(700 * time.Millisecond)
		files.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	url := server.URL + "/disk.raw"
	out := must(t, dir, instar(t), "convert", "--progress", "json", "-f", "raw", "-O", "qcow2", url, "new")
	must(t, dir, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", "disk.raw", "new")
	fetched := 0
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var l line
		if err := d.Decode(&l); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in %s", err, out)
		}
		if l.Description == "fetch "+url {
			fetched++
		}
	}
	if fetched < 2 {
		t.Errorf("%d lines while fetching: %s", fetched, out)
	}
	if out := must(t, dir, instar(t), "convert", "-q", "--progress", "json", "-f", "raw", "-O", "qcow2", url, "new"); out != "" {
		t.Errorf("-q prints %s", out)
	}
}

// TestUserSignal asks for a line of progress, whatever is shown beside.
func TestUserSignal(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 8<<20, 12)
	for _, shown := range []string{"", "-p", "--progress=json", "-q"} {
		args := []string{"convert", "-f", "raw", "-O", "qcow2", "-r", "4M", "disk.raw", "new"}
		if shown != "" {
			args = append(args, shown)
		}
		cmd := exec.Command(instar(t), args...)
		cmd.Dir = dir
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(700 * time.Millisecond)
		if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("%q: %v", shown, err)
		}
		if !regexp.MustCompile(`^    \(\d+\.\d\d/100%\)\n$`).Match(stderr.Bytes()) {
			t.Errorf("%q: %q", shown, stderr.String())
		}
	}
}

// TestUserSignalWaiting asks dd, which waits for standard input.
func TestUserSignalWaiting(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(instar(t), "dd", "if=-", "isize=2M", "of=new")
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond)
	if err := cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	if _, err := in.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	in.Close()
	if err := cmd.Wait(); err != nil || stderr.String() != "    (50.00/100%)\n" {
		t.Errorf("%v: %q", err, stderr.String())
	}
}

// onTerminal runs instar with a terminal as its standard output, sends sig after
// a while where it is not 0, and returns what the terminal showed.
func onTerminal(t *testing.T, dir string, sig syscall.Signal, args ...string) string {
	t.Helper()
	screen, tty := terminal.Open(t)
	cmd := exec.Command(instar(t), args...)
	cmd.Dir, cmd.Stdout = dir, tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	if sig != 0 {
		time.Sleep(time.Second)
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
	}
	var shown bytes.Buffer
	_, _ = io.Copy(&shown, screen) // ends with EIO
	if err := cmd.Wait(); (err == nil) != (sig == 0) {
		t.Errorf("instar %q: %v", args, err)
	}
	return shown.String()
}

// TestBar looks at the bar on a terminal: at its end it says 100 %, and not when
// the work did not get there.
func TestBar(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 16<<20, 13)
	if shown := onTerminal(t, dir, 0, "convert", "-p", "-f", "raw", "-O", "qcow2", "disk.raw", "new"); !strings.Contains(shown, "100%") || !strings.Contains(shown, "convert new") || !strings.HasSuffix(shown, "\n") {
		t.Errorf("the bar: %q", shown)
	}
	shown := onTerminal(t, dir, syscall.SIGINT, "convert", "-p", "-f", "raw", "-O", "qcow2", "-r", "2M", "disk.raw", "new")
	if !strings.Contains(shown, "%") || strings.Contains(shown, "100%") || !strings.HasSuffix(shown, "\n") {
		t.Errorf("the bar of what was interrupted: %q", shown)
	}
}

// TestDigest compares the digests with sha256 of the content, for outputs that
// are written in order and for those that are not.
func TestDigest(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 3<<20+512, 14)
	content, err := os.ReadFile(filepath.Join(dir, "disk.raw"))
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("sha256: %x\n", sha256.Sum256(content))
	silent(t, dir, "convert", "-c", "-f", "raw", "-O", "qcow2", "disk.raw", "packed.qcow2")
	for _, args := range [][]string{{"-O", "vpc"}, {"-O", "qcow2", "-c"}, {"--for", "gce"}, {"--for", "azure"}} {
		args = append(append([]string{"convert", "--digest", "sha256"}, args...), "packed.qcow2", "new")
		if got := must(t, dir, instar(t), args...); got != want {
			t.Errorf("%q: %q, want %q", args, got, want)
		}
	}
	cmd := exec.Command(instar(t), "convert", "--digest", "sha256", "packed.qcow2", "-")
	cmd.Dir = dir
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil || stderr.String() != want || !bytes.Equal(stdout.Bytes(), content) {
		t.Errorf("to standard output: %v, %d bytes, %q", err, stdout.Len(), stderr.String())
	}
}

// TestPlatforms makes the same bytes for a platform twice, and under another name
// where the format does not store the name.
func TestPlatforms(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	randomDisk(t, filepath.Join(dir, "disk.raw"), 1<<20+512, 15)
	for _, platform := range []string{"azure", "gce", "aws", "esxi", "hyperv"} {
		make := func(name string) {
			silent(t, dir, "convert", "--reproducible", "--for", platform, "-f", "raw", "disk.raw", name)
		}
		make("a")
		must(t, dir, "cp", "a", "first")
		make("a")
		must(t, dir, "cmp", "first", "a")
		if platform != "aws" && platform != "esxi" { // a VMDK's descriptor names its file
			make("b")
			must(t, dir, "cmp", "a", "b")
		}
	}
}

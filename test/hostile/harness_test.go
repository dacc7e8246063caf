//go:build linux

// Package hostile drives the built programs in bin with images and plugins that
// mean harm, and watches what they do about it.
package hostile

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// binVariable names another directory than bin to test the programs of.
const binVariable = "INSTAR_TEST_BIN"

func TestMain(m *testing.M) {
	if s := os.Getenv(superviseVariable); s != "" {
		os.Unsetenv(superviseVariable)
		supervise(s)
		return
	}
	code := 1
	func() {
		dir, err := os.MkdirTemp("", "hostile-run")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return
		}
		defer os.RemoveAll(dir)
		// Socket directories of these tests' own: what is left in it is ours.
		os.Setenv("XDG_RUNTIME_DIR", dir)
		for _, name := range []string{"INSTAR_SANDBOX", "INSTAR_UNTRUSTED", "INSTAR_PLUGIN_PATH", "INSTAR_LOG"} {
			os.Unsetenv(name)
		}
		code = m.Run()
	}()
	os.Exit(code)
}

// program returns the absolute path of a program that was built.
func program(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv(binVariable)
	if dir == "" {
		dir = filepath.Join("..", "..", "bin")
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run `make build` first", err)
	}
	return path
}

// What every run may use at most.
const (
	cpuSeconds = 5
	memoryMost = 256 << 20
	// wallMost is generous: how long a run takes on a busy machine says nothing,
	// that it never ends does.
	wallMost = 90 * time.Second
)

// command is a run of a program under supervision.
type command struct {
	Argv      []string
	Dir       string
	Env       []string
	CPU       int           // seconds of each process
	AS        int64         // RLIMIT_AS, 0: none
	Interrupt time.Duration // after which SIGINT is sent; 0: never
	Kill      time.Duration // after which SIGKILL is sent; 0: never
}

// result is what became of it.
type result struct {
	Stdout, Stderr string
	Code           int // exit code, -1 where a signal ended it
	Signal         int
	Wall           time.Duration
	CPU            time.Duration // the most that one process used
	MaxRSS         int64         // bytes, of the process that used most
	Processes      int
	Crashed        []string // processes below it that died of their own fault
	Left           []int    // processes that outlived it
	Hang           bool
}

// run runs the command line of instar and checks what every run must keep.
func (c command) run(t testing.TB) *result {
	t.Helper()
	line := strings.Join(c.Argv, " ")
	r := c.start(t)
	if r.Hang {
		t.Fatalf("instar %s: did not end", line)
	}
	if r.CPU > cpuSeconds*time.Second {
		t.Errorf("instar %s: used %v of processor time", line, r.CPU)
	}
	if r.MaxRSS > memoryMost {
		t.Errorf("instar %s: used %d MiB of memory", line, r.MaxRSS>>20)
	}
	if len(r.Left) > 0 {
		t.Errorf("instar %s: left processes %v behind", line, r.Left)
	}
	if c.Kill == 0 && r.Signal != 0 {
		t.Errorf("instar %s: ended by signal %d", line, r.Signal)
	}
	if m := trace.FindString(r.Stdout + r.Stderr); m != "" {
		t.Errorf("instar %s: %q in its output:\n%s", line, m, clip(r.Stderr))
	}
	return r
}

// trace is what a Go program says when it crashes.
var trace = regexp.MustCompile(`(?m)^panic: |goroutine \d+ \[|runtime error:|SIGSEGV|fatal error: `)

// start runs the command without judging it.
func (c command) start(t testing.TB) *result {
	t.Helper()
	if c.CPU == 0 {
		c.CPU = cpuSeconds
	}
	if len(c.Argv) == 0 || !filepath.IsAbs(c.Argv[0]) {
		c.Argv = append([]string{program(t, "instar")}, c.Argv...)
	}
	text, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Dir = c.Dir
	cmd.Env = append(append(os.Environ(), c.Env...), superviseVariable+"="+string(text))
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("supervise %q: %v\n%s", c.Argv, err, stderr.String())
	}
	var r result
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatalf("supervise %q: %v\n%s", c.Argv, err, out.String())
	}
	return &r
}

// oneLine checks that a run failed with one clear line, and returns it.
func (r *result) oneLine(t testing.TB) string {
	t.Helper()
	if r.Code <= 0 {
		t.Errorf("exit code %d, want a failure\n%s%s", r.Code, clip(r.Stdout), clip(r.Stderr))
	}
	text := withoutWarnings(r.Stderr)
	line, rest, _ := strings.Cut(text, "\n")
	if line == "" || rest != "" || !strings.HasPrefix(line, "instar: ") || len(line) > 4096 || control.MatchString(line) {
		t.Errorf("want one clear line, got %q", clip(text))
	}
	return line
}

var control = regexp.MustCompile("[\x00-\x08\x0b-\x1f\x7f]")

func withoutWarnings(s string) string {
	var keep []string
	for _, line := range strings.SplitAfter(s, "\n") {
		if !strings.HasPrefix(line, "instar: warning: ") {
			keep = append(keep, line)
		}
	}
	return strings.Join(keep, "")
}

func clip(s string) string {
	if len(s) > 600 {
		return s[:600] + "..."
	}
	return s
}

// superviseVariable makes the test program run a command, as a process of its
// own that adopts and counts all that the command leaves.
const superviseVariable = "INSTAR_HOSTILE_SUPERVISE"

const maxOutput = 1 << 20

func supervise(text string) {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var c command
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		fail(err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		fail(err)
	}
	lower := func(resource int, n uint64) {
		var l unix.Rlimit
		if err := unix.Getrlimit(resource, &l); err != nil {
			fail(err)
		}
		l.Cur, l.Max = min(n, l.Max), min(n+1, l.Max)
		if err := unix.Setrlimit(resource, &l); err != nil {
			fail(err)
		}
	}
	var files [2]*os.File
	for i := range files {
		f, err := os.CreateTemp("", "hostile-out")
		if err != nil {
			fail(err)
		}
		os.Remove(f.Name())
		files[i] = f
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		fail(err)
	}
	lower(unix.RLIMIT_CPU, uint64(c.CPU))
	if c.AS > 0 {
		// Not on this process, which would have to live with it too.
		prlimit, err := exec.LookPath("prlimit")
		if err != nil {
			fail(fmt.Errorf("%w: Debian package util-linux", err))
		}
		c.Argv = append([]string{prlimit, fmt.Sprint("--as=", c.AS), "--"}, c.Argv...)
	}
	start := time.Now()
	pid, err := syscall.ForkExec(c.Argv[0], c.Argv, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{null.Fd(), files[0].Fd(), files[1].Fd()},
		Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		fail(err)
	}
	if c.Interrupt > 0 {
		time.AfterFunc(c.Interrupt, func() { syscall.Kill(pid, syscall.SIGINT) })
	}
	if c.Kill > 0 {
		time.AfterFunc(c.Kill, func() { syscall.Kill(pid, syscall.SIGKILL) })
	}
	r := wait(pid, start)
	for i, to := range []*string{&r.Stdout, &r.Stderr} {
		b := make([]byte, maxOutput)
		n, _ := files[i].ReadAt(b, 0)
		*to = string(b[:n])
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		fail(err)
	}
}

// wait waits for a process and all that it leaves.
func wait(pid int, start time.Time) *result {
	r := &result{Code: -1}
	running, ended := true, time.Time{}
	for {
		var status syscall.WaitStatus
		var usage syscall.Rusage
		got, err := syscall.Wait4(-1, &status, syscall.WNOHANG, &usage)
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.ECHILD:
			return r
		case got == 0:
			if running && time.Since(start) > wallMost {
				r.Hang = true
				syscall.Kill(pid, syscall.SIGKILL)
			}
			if !running && time.Since(ended) > 10*time.Second && len(r.Left) == 0 {
				r.Left = children()
				for _, p := range r.Left {
					syscall.Kill(p, syscall.SIGKILL)
				}
			}
			time.Sleep(2 * time.Millisecond)
			continue
		}
		r.Processes++
		r.MaxRSS = max(r.MaxRSS, usage.Maxrss<<10)
		r.CPU = max(r.CPU, time.Duration(usage.Utime.Nano()+usage.Stime.Nano()))
		if got == pid {
			running, ended, r.Wall = false, time.Now(), time.Since(start)
			if status.Signaled() {
				r.Signal = int(status.Signal())
			} else {
				r.Code = status.ExitStatus()
			}
		} else if status.Signaled() && status.Signal() != syscall.SIGKILL {
			r.Crashed = append(r.Crashed, status.Signal().String())
		}
	}
}

// children returns the process ids of this process's children.
func children() []int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/children", os.Getpid()))
	var pids []int
	for _, f := range strings.Fields(string(text)) {
		var n int
		if _, err := fmt.Sscan(f, &n); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}

// runtimeDir returns a place for the socket directories of one test. Its path
// is short, as paths of sockets are.
func runtimeDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "h")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// noSocketDirs checks that no run left a socket directory.
func noSocketDirs(t testing.TB, runtime string) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(runtime, "instar-*", "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("socket directories were left: %v %v", left, err)
	}
}

// listing returns the names in a directory, for a look at what a run left.
func listing(t testing.TB, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// write writes a file into dir and returns its path.
func write(t testing.TB, dir, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// watch reports whether a file is opened or read before it is called.
func watch(t testing.TB, path string) func() bool {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN|unix.IN_ACCESS|unix.IN_MODIFY); err != nil {
		t.Fatal(err)
	}
	return func() bool {
		var b [4096]byte
		n, _ := unix.Read(fd, b[:])
		return n > 0
	}
}

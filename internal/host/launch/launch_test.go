package launch

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/instar-img/instar/internal/host/child"
	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/sdk"
)

// probe is the program that all test plugins are links to.
var probe string

// probeVariable names it where it was built before.
const probeVariable = "INSTAR_TEST_PROBE"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == coreArgument {
		actAsCore(os.Args[2])
	}
	os.Exit(buildAndRun(m))
}

func buildAndRun(m *testing.M) int {
	dir, err := os.MkdirTemp("", "launch-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if probe = os.Getenv(probeVariable); probe == "" {
		probe = filepath.Join(dir, "probe")
		build := exec.Command("go", "build", "-tags", "grpcnotrace", "-o", probe,
			"github.com/instar-img/instar/sdk/internal/lock/testdata/probe")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the test plugin: %v\n%s", err, out)
			return 1
		}
	}
	// A socket directory base of the tests' own: what is left in it is ours.
	base := filepath.Join(dir, "run")
	if err := os.Mkdir(base, 0o700); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	os.Setenv("XDG_RUNTIME_DIR", base)
	os.Unsetenv(SandboxVariable)
	return m.Run()
}

// installed returns a plugin of the given name, which decides what it does.
func installed(t *testing.T, name string) *discover.Plugin {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, discover.Prefix+name)
	if err := os.Symlink(probe, program); err != nil {
		t.Fatal(err)
	}
	manifest := fmt.Sprintf(`{"name":%q,"version":"1","protocols":[1],"capabilities":[]}`, name)
	if err := os.WriteFile(program+".json", []byte(manifest), 0o644); err != nil {
		t.Fatal(err)
	}
	set, err := discover.Find(discover.Options{Dirs: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	p, err := set.ByName(name)
	if err != nil {
		t.Fatal(err, set.Refused())
	}
	return p
}

func started(t *testing.T, name string, o Options) *Process {
	t.Helper()
	p, err := Start(t.Context(), installed(t, name), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Kill()
		<-p.Done()
	})
	return p
}

func do(ctx context.Context, p *Process, args ...string) (string, error) {
	var out wrapperspb.StringValue
	err := p.Conn().Invoke(ctx, "/instar.launchtest.Probe/Do", wrapperspb.String(strings.Join(args, "\n")), &out)
	return out.GetValue(), err
}

func mustDo(t *testing.T, p *Process, args ...string) string {
	t.Helper()
	out, err := do(t.Context(), p, args...)
	if err != nil {
		t.Fatalf("%q: %v", args, p.Explain(err))
	}
	return out
}

func needSandbox(t *testing.T) {
	t.Helper()
	if !Effective().Seccomp {
		t.Skip("this kernel cannot confine plugins")
	}
}

// escapes has the plugin try what it must not be able to do, and returns what
// succeeded.
func escapes(t *testing.T, p *Process) []string {
	t.Helper()
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	for _, name := range []string{victim, victim + ".spare", victim + ".other"} {
		if err := os.WriteFile(name, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	_, port, _ := net.SplitHostPort(tcp.Addr().String())
	path := filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "listener")
	unixListener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer unixListener.Close()
	abstract := "instar-test-" + strconv.Itoa(os.Getpid())
	abstractListener, err := net.Listen("unix", "@"+abstract)
	if err != nil {
		t.Fatal(err)
	}
	defer abstractListener.Close()

	out := mustDo(t, p, "escape", "victim="+victim, "port="+port, "socket="+path, "abstract="+abstract)
	var results map[string]string
	if err := json.Unmarshal([]byte(out), &results); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var succeeded []string
	for what, failure := range results {
		if failure == "" {
			succeeded = append(succeeded, what)
		} else {
			t.Logf("%s: %s", what, failure)
		}
	}
	slices.Sort(succeeded)
	return succeeded
}

// checkWorks proves that a request and a passed file work.
func checkWorks(t *testing.T, p *Process) {
	t.Helper()
	if got := mustDo(t, p, "hello"); got != "hello" {
		t.Errorf("hello: %q", got)
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("passed"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct{ args, want string }{{"read", "passed"}, {"write", ""}} {
		ticket, err := p.SendFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if got := mustDo(t, p, step.args, strconv.Itoa(int(ticket)), "PAS"); got != step.want {
			t.Errorf("%s: %q, want %q", step.args, got, step.want)
		}
	}
	if b, err := os.ReadFile(f.Name()); err != nil || string(b) != "PASsed" {
		t.Errorf("the file holds %q, %v", b, err)
	}
}

// With Landlock of any version the first lock is the same.
func TestFirstLock(t *testing.T) {
	needSandbox(t)
	p := started(t, "plain", Options{Require: len(Effective().Missing()) == 0})
	want := []string{
		"create in its own directory", "make a Unix stream socket", "read its own program", "run itself",
	}
	if Effective().LandlockABI == 0 {
		want = append(want, "create a file", "list /", "make a directory", "make a hard link", "make a symlink",
			"make a symlink in its own directory", "read /etc/passwd", "read /proc/self/environ", "remove a file",
			"rename a file", "run /bin/true")
		slices.Sort(want)
	}
	if got := escapes(t, p); !slices.Equal(got, want) {
		t.Errorf("a plugin with the first lock can: %q\nwant: %q", got, want)
	}
	checkWorks(t, p)
}

// With Landlock or without, both locks leave nothing.
func TestBothLocks(t *testing.T) {
	needSandbox(t)
	p := started(t, "locked", Options{Require: len(Effective().Missing()) == 0})
	if got := escapes(t, p); len(got) > 0 {
		t.Errorf("a plugin with both locks can: %q", got)
	}
	checkWorks(t, p)
	t.Logf("the second lock took %s", mustDo(t, p, "lock-cost"))
}

// The attempts are real: without the sandbox they succeed.
func TestNoLock(t *testing.T) {
	t.Setenv(SandboxVariable, "off")
	p := started(t, "plain", Options{})
	got := escapes(t, p)
	for _, what := range []string{
		"read /etc/passwd", "list /", "create a file", "truncate a file", "remove a file", "change a mode",
		"connect by TCP", "send by UDP", "connect to a Unix socket", "connect to an abstract socket",
		"run /bin/true", "fork", "signal its parent", "signal a thread of its parent", "memfd_create",
		"limit its parent", "outlive its parent",
	} {
		if !slices.Contains(got, what) {
			t.Errorf("%q fails even without a sandbox", what)
		}
	}
	checkWorks(t, p)
}

func TestRequire(t *testing.T) {
	if missing := Effective().Missing(); len(missing) > 0 {
		_, err := Start(t.Context(), installed(t, "plain"), Options{Require: true})
		if err == nil || !strings.Contains(err.Error(), missing[0]) {
			t.Errorf("without %s: %v", missing[0], err)
		}
	}
	t.Setenv(SandboxVariable, "perhaps")
	if _, err := Start(t.Context(), installed(t, "plain"), Options{}); err == nil || !strings.Contains(err.Error(), "accepted") {
		t.Errorf("a wrong %s: %v", SandboxVariable, err)
	}
	t.Setenv(SandboxVariable, "off")
	mode, err := child.SandboxMode(true)
	if err != nil || mode != child.Required {
		t.Errorf("off must not weaken a caller's requirement: %v, %v", mode, err)
	}
}

// The plugin has no descriptors but its own, and no environment of the caller's.
func TestInheritsNothing(t *testing.T) {
	t.Setenv("SECRET_OF_THE_CALLER", "x")
	// As a shell's 5<file does: open without close-on-exec.
	f, err := os.Open(probe)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	leak, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(leak)
	p := startedByCore(t, leak)
	if strings.Contains(p.environment, "SECRET_OF_THE_CALLER") {
		t.Errorf("environment:\n%s", p.environment)
	}
	if strings.Contains(p.descriptors, "file") || strings.Contains(p.descriptors, "directory") {
		t.Errorf("descriptors: %s", p.descriptors)
	}
}

func TestDeaths(t *testing.T) {
	for _, c := range []struct{ request, want string }{
		{"exit", "plugin plain exited with status 3: no more work today"},
		{"panic", "plugin plain exited with status 2: panic: this is the cause"},
	} {
		t.Run(c.request, func(t *testing.T) {
			p := started(t, "plain", Options{})
			begin := time.Now()
			_, err := do(t.Context(), p, c.request)
			if err == nil {
				t.Fatal("no error")
			}
			if got := p.Explain(err).Error(); got != c.want {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
			if d := time.Since(begin); d > time.Second {
				t.Errorf("the error took %v", d)
			}
			if _, err := p.SendFile(os.Stdin); err == nil || err.Error() != c.want {
				t.Errorf("pass a file to a dead plugin: %v", err)
			}
			assertNothingLeft(t, p)
		})
	}
}

func TestKilledInMidWork(t *testing.T) {
	p := started(t, "plain", Options{})
	failed := make(chan error)
	go func() {
		_, err := do(context.WithoutCancel(t.Context()), p, "hang")
		failed <- err
	}()
	time.Sleep(20 * time.Millisecond) // it does not matter whether the request got there
	begin := time.Now()
	if err := syscall.Kill(p.child.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	err := p.Explain(<-failed)
	if d := time.Since(begin); d > time.Second {
		t.Errorf("the error took %v", d)
	}
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Status.Signal() != syscall.SIGKILL || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %v", err)
	}
}

func assertNothingLeft(t *testing.T, p *Process) {
	t.Helper()
	p.Kill()
	<-p.Done()
	if _, err := os.Stat(p.child.SocketDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket directory: %v", err)
	}
	if err := syscall.Kill(p.child.Pid(), 0); err != syscall.ESRCH {
		t.Errorf("process %d: %v", p.child.Pid(), err)
	}
}

func TestBadStarts(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"crash-at-start", "exited with status 2: panic: no reason at all"},
		{"silent", "timeout while waiting for plugin to start"},
		{"garbage", `not a plugin: it printed "hello there"`},
		{"endless-line", "not a plugin: it printed"},
		{"tcp", `it listens on tcp "127.0.0.1:1", not in its directory`},
		{"elsewhere", `it listens on unix "/run/some.sock", not in its directory`},
		{"no-socket", "its socket: no such file"},
		{"future", "speaks protocol 7, this instar speaks 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			begin := time.Now()
			_, err := Start(t.Context(), installed(t, c.name), Options{StartTimeout: 2 * time.Second})
			if err == nil {
				t.Fatal("it started")
			}
			if d := time.Since(begin); d > 5*time.Second {
				t.Errorf("the error took %v", d)
			}
			if !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000 {
				t.Errorf("got  %s\nwant %s", err, c.want)
			}
			assertNoSocketDirs(t)
		})
	}
}

// What inherits its connection is not waited for: the first request tells.
func TestBadConnections(t *testing.T) {
	for _, c := range []struct{ name, want string }{
		{"crash-at-start", "exited with status 2: panic: no reason at all"},
		{"silent", "it did not answer within 1s"},
		{"garbage", `not a plugin: it printed "hello there"`},
		{"endless-line", "not a plugin: it printed"},
		{"elsewhere", "it listens, where its manifest says that it inherits its connection"},
		{"no-http", "error reading server preface"},
		{"hangs-up", "connection error: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			plugin := installed(t, c.name)
			plugin.Manifest.Connection = sdk.ConnectionInherited
			begin := time.Now()
			p, err := Start(t.Context(), plugin, Options{StartTimeout: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			defer p.Kill()
			_, err = do(t.Context(), p, "echo")
			if status.Code(err) != codes.Unavailable {
				t.Errorf("the transport's own: %v", err)
			}
			err = p.Explain(err)
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || len(err.Error()) > 1000 {
				t.Errorf("got  %v\nwant %s", err, c.want)
			}
			if d := time.Since(begin); d > 5*time.Second {
				t.Errorf("the error took %v", d)
			}
			p.Kill()
			<-p.Done()
			assertNoSocketDirs(t)
		})
	}
}

func TestCanceledStart(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	begin := time.Now()
	if _, err := Start(ctx, installed(t, "silent"), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if d := time.Since(begin); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	assertNoSocketDirs(t)
}

func TestManifestProtocol(t *testing.T) {
	p := installed(t, "plain")
	p.Manifest.Protocols = []int{2, 3}
	_, err := Start(t.Context(), p, Options{})
	var wrong *ProtocolError
	if !errors.As(err, &wrong) || wrong.Speaks != "2 3" {
		t.Errorf("got %v", err)
	}
}

func assertNoSocketDirs(t *testing.T) {
	t.Helper()
	base := filepath.Join(os.Getenv("XDG_RUNTIME_DIR"), "instar-"+strconv.Itoa(os.Geteuid()))
	child.Sweep(base) // what cores that tests killed have left
	left, err := filepath.Glob(filepath.Join(base, "*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestNoise(t *testing.T) {
	p := started(t, "noisy", Options{})
	for range 20 {
		mustDo(t, p, "hello")
	}
	quiet := started(t, "plain", Options{})
	for _, what := range []string{"flood", "flood-stdout"} {
		if got := mustDo(t, quiet, what); got != "flooded" {
			t.Errorf("%s: got %q", what, got)
		}
	}
}

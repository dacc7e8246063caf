//go:build linux

package thirdparty

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/instar-img/instar/internal/host/child"
)

// installPython installs the example in Python, with words in the program
// replaced by others, or skips the test where its packages are not installed.
func installPython(t *testing.T, oldnew ...string) (dir string) {
	t.Helper()
	for program, of := range map[string]string{"protoc": "protobuf-compiler", "grpc_python_plugin": "protobuf-compiler-grpc"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%v (Debian package %s)", err, of)
		}
	}
	if out, err := exec.Command("/usr/bin/python3", "-I", "-c", "import grpc, google.protobuf").CombinedOutput(); err != nil {
		t.Skipf("%v: %s (Debian packages python3-grpcio, python3-protobuf)", err, bytes.TrimSpace(out))
	}
	dir = filepath.Join(t.TempDir(), "plugins")
	if out, err := exec.Command("../../examples/python/install", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	program := filepath.Join(dir, name)
	text, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(oldnew); i += 2 {
		if !bytes.Contains(text, []byte(oldnew[i])) {
			t.Fatalf("no %q in %s", oldnew[i], program)
		}
	}
	text = []byte(strings.NewReplacer(oldnew...).Replace(string(text)))
	if err := os.WriteFile(program, text, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// A plugin of which the core knows a manifest and a protocol works in the
// sandbox, with an interpreter and another gRPC than ours.
func TestPython(t *testing.T) {
	run := runner(t, installPython(t))
	works := func(want string, args ...string) {
		t.Helper()
		out, stderr, ok := run(args...)
		if !ok || !strings.Contains(out, want) {
			t.Fatalf("%q printed %q, want %q\n%s", args, out, want, stderr)
		}
	}
	fails := func(want string, args ...string) {
		t.Helper()
		_, stderr, ok := run(args...)
		if ok || !strings.Contains(stderr, want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: %q, want %q", args, stderr, want)
		}
	}
	works("Formatting 'gift.box', fmt=boxed size=1048576 colour=white\n", "create", "-f", "boxed", "-o", "colour=white", "gift.box", "1M")
	works("box colour: white\n", "info", "gift.box")
	works("box colour: white\n", "info", "--untrusted", "gift.box") // with less memory
	works("runtime root: /usr/lib\n", "plugin", "info", "boxed")
	works(`"data": true, "compressed": false, "offset": 512}`, "map", "--output", "json", "gift.box")
	works("", "convert", "-O", "raw", "gift.box", "gift.raw")
	works("Images are identical.\n", "compare", "gift.box", "gift.raw")
	works("", "convert", "-O", "qcow2", "gift.box", "gift.qcow2")
	works("Images are identical.\n", "compare", "gift.qcow2", "gift.box")
	fails("This image format does not support checks", "check", "gift.box")
	fails(`cannot write data into them (it lacks "write")`, "convert", "-O", "boxed", "gift.raw", "x")
	fails("no BOXEDIMG at the start", "info", "-f", "boxed", "gift.raw")
	works("", "dd", "-f", "raw", "-O", "raw", "bs=512", "count=9", "if=gift.box", "of=short.box")
	fails("virtual size 1048576 does not fit in a file of 4608 bytes", "info", "short.box")
	fails("9223372036854775296 bytes and a header are too many", "create", "-f", "boxed", "x", "9223372036854775296")
}

// Of the end of such a plugin the user reads the reason, in one line.
func TestPythonDies(t *testing.T) {
	const open, mapped = "        file = self.received.take(request.files[0].ticket)\n        try:\n            header =", "        yield pb.MapImageResponse("
	for _, c := range []struct{ what, old, new, want string }{
		{"raises at the start", "def main():\n", "def main():\n    raise RuntimeError('no reason')\n", "plugin boxed exited with status 1: RuntimeError: no reason"},
		{"lacks a module", "import grpc\n", "import nonesuch\n", "plugin boxed exited with status 1: ModuleNotFoundError: No module named 'nonesuch'"},
		{"raises", open, "        raise ValueError('bad\\nvalue')\n" + open, `the request to the plugin failed (Unknown: Exception calling application: bad\nvalue)`},
		{"raises in a stream", mapped, "        raise ValueError('bad value')\n" + mapped, "the request to the plugin failed (Unknown: Exception iterating responses: bad value)"},
		{"exits", mapped, "        os._exit(3)\n" + mapped, "plugin boxed exited with status 3"},
		{"crashes", mapped, "        __import__('ctypes').string_at(8)\n" + mapped, "plugin boxed was killed by signal 11"},
		{"lacks a method", "def MapImage", "def NoImage", "the request to the plugin failed (Unimplemented: Method not implemented!)"},
		{"prints first", "def main():\n", "def main():\n    print('hello', flush=True)\n", `not a plugin: it printed "hello"`},
		{"eats memory", open, "        all = [bytearray(1 << 20) for i in range(1 << 12)]\n" + open, "the request to the plugin failed (Unknown: Exception calling application: )"},
	} {
		t.Run(c.what, func(t *testing.T) {
			run := runner(t, installPython(t, c.old, c.new))
			if _, stderr, ok := run("create", "-f", "boxed", "gift.box", "1M"); !ok && strings.Contains(stderr, c.want) {
				return // it does not get further
			}
			_, stderr, ok := run("map", "--untrusted", "gift.box")
			if ok || !strings.Contains(stderr, c.want) || strings.Count(stderr, "\n") != 1 {
				t.Errorf("got %q, want %q", stderr, c.want)
			}
		})
	}
}

// What a language's run-time system needs is no way out.
func TestPythonIsConfined(t *testing.T) {
	if missing := child.Effective().Missing(); len(missing) > 0 {
		t.Skipf("this kernel cannot confine plugins: it lacks %v", missing)
	}
	const begin = "        file = self.received.take(request.files[0].ticket)\n        try:\n            header ="
	run := runner(t, installPython(t, begin, `
        escaped = []
        for attempt in [
            lambda: open("/etc/passwd"), lambda: os.listdir("/"), lambda: os.listdir(os.path.dirname(__file__)),
            lambda: open("/usr/lib/instar-test", "w"), lambda: open(__file__, "a"),
            lambda: os.posix_spawn("/usr/bin/env", ["env"], {}), lambda: os.fork(),
            lambda: socket.socket(socket.AF_INET), lambda: socket.socketpair(),
            lambda: os.kill(os.getppid(), 0), lambda: os.chmod(__file__, 0o777), lambda: os.memfd_create("x"),
        ]:
            try:
                escaped.append(str(attempt()))
            except OSError:
                escaped.append("")
        if any(escaped):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"escaped: {escaped}")
`+begin))
	if _, stderr, ok := run("create", "-f", "boxed", "gift.box", "1M"); !ok {
		t.Fatal(stderr)
	}
	if _, stderr, ok := run("info", "gift.box"); !ok {
		t.Error(stderr)
	}
}

// A plugin that hangs ends with the command.
func TestPythonHangs(t *testing.T) {
	dir := installPython(t, "        yield pb.MapImageResponse(", "        threading.Event().wait()\n        yield pb.MapImageResponse(")
	run := runner(t, dir)
	if _, stderr, ok := run("create", "-f", "boxed", "gift.box", "1M"); !ok {
		t.Fatal(stderr)
	}
	if _, stderr, ok := run("map", "--timeout", "1s", "gift.box"); ok || !strings.Contains(stderr, "timed out") {
		t.Errorf("got %q", stderr)
	}
	deadline := time.Now().Add(5 * time.Second)
	for exec.Command("pgrep", "-f", filepath.Join(dir, name)).Run() == nil {
		if time.Now().After(deadline) {
			t.Fatal("the plugin outlived the core")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

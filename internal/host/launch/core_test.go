package launch

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/instar-img/instar/internal/host/child"
	"github.com/instar-img/instar/internal/host/discover"
)

// coreArgument makes the test program act as a core that starts a plugin, says
// what it sees, and waits to be killed.
const coreArgument = "act-as-core"

type report struct {
	Pid         int
	SocketDir   string
	Environment string
	Descriptors string
	Error       string
}

func actAsCore(program string) {
	say := func(r report) {
		b, _ := json.Marshal(r)
		fmt.Println(string(b))
	}
	set, err := discover.Find(discover.Options{Dirs: []string{filepath.Dir(program)}})
	if err != nil || len(set.Plugins()) != 1 {
		say(report{Error: fmt.Sprint(err, set.Refused())})
		os.Exit(1)
	}
	ctx := context.Background()
	p, err := Start(ctx, set.Plugins()[0], Options{})
	if err != nil {
		say(report{Error: err.Error()})
		os.Exit(1)
	}
	r := report{Pid: p.child.Pid(), SocketDir: p.child.SocketDir()}
	r.Environment, err = do(ctx, p, "environment")
	if err == nil {
		r.Descriptors, err = do(ctx, p, "descriptors")
	}
	if err != nil {
		r.Error = err.Error()
	}
	say(r)
	select {}
}

type core struct {
	cmd         *exec.Cmd
	pid         int // of the plugin
	socketDir   string
	environment string
	descriptors string
}

// startCore runs a core with a plugin of the given name, through the words of
// wrapper.
func startCore(t *testing.T, name string, extra []*os.File, wrapper ...string) *core {
	t.Helper()
	p := installed(t, name)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	words := append(wrapper, self, coreArgument, p.Path)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.ExtraFiles = extra
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the core said %q: %v", line, err)
	}
	var r report
	if err := json.Unmarshal([]byte(line), &r); err != nil || r.Error != "" {
		t.Fatalf("the core said %s: %v", line, err)
	}
	return &core{cmd: cmd, pid: r.Pid, socketDir: r.SocketDir, environment: r.Environment, descriptors: r.Descriptors}
}

func startedByCore(t *testing.T, leak int) *core {
	t.Helper()
	fd, err := syscall.Dup(leak)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "leak")
	defer f.Close()
	return startCore(t, "plain", []*os.File{f})
}

// A killed core takes its plugin along, also one that would not notice, and the
// next run clears up the rest.
func TestKilledCore(t *testing.T) {
	for _, name := range []string{"plain", "locked", "deaf"} {
		t.Run(name, func(t *testing.T) {
			c := startCore(t, name, nil)
			if err := c.cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			c.cmd.Wait()
			deadline := time.Now().Add(5 * time.Second)
			for running(c.pid) {
				if time.Now().After(deadline) {
					t.Fatalf("plugin %d outlived the core", c.pid)
				}
				time.Sleep(time.Millisecond)
			}
			if _, err := os.Stat(c.socketDir); err != nil {
				t.Fatalf("a killed core cannot clear up, and yet: %v", err)
			}
			child.Sweep(filepath.Dir(c.socketDir))
			if _, err := os.Stat(c.socketDir); !os.IsNotExist(err) {
				t.Errorf("%s was not swept: %v", c.socketDir, err)
			}
		})
	}
}

// What a running core uses is not swept by another.
func TestSweepSparesTheLiving(t *testing.T) {
	c := startCore(t, "plain", nil)
	child.Sweep(filepath.Dir(c.socketDir))
	if _, err := os.Stat(c.socketDir); err != nil {
		t.Errorf("swept from under a running core: %v", err)
	}
}

// running reports whether a process runs: a zombie, which waits for whatever
// adopted it, does not.
func running(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return syscall.Kill(pid, 0) == nil
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	return !strings.HasPrefix(rest, "Z") && !strings.HasPrefix(rest, "X")
}

func TestUnderLimits(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector takes more addresses than the limit allows")
	}
	prlimit, err := exec.LookPath("prlimit")
	if err != nil {
		t.Fatal("prlimit is needed: Debian package util-linux")
	}
	startCore(t, "locked", nil, prlimit, "--as=1073741824", "--cpu=2", "--")
}

//go:build linux && (amd64 || arm64)

package child

import (
	"errors"
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/confine"
)

// The filter alone, as on a kernel whose Landlock has no scopes, keeps a plugin
// from ending other processes, and leaves Go its signal.
func TestFilterSignals(t *testing.T) {
	if !confine.HasSeccomp() {
		t.Skip("no seccomp in this kernel")
	}
	other := exec.Command("sleep", "600")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	pid := other.Process.Pid
	const noCore = 1 << 22 // a process id that there is not
	results := make(chan map[unix.Signal]error, 1)
	go func() {
		runtime.LockOSThread() // and the thread ends with the goroutine
		got := map[unix.Signal]error{}
		err := confine.NoNewPrivs()
		if err == nil {
			err = firstFilter(noCore).RestrictThread()
		}
		got[-1] = err
		for _, s := range []unix.Signal{0, unix.SIGKILL, unix.SIGTERM, unix.SIGSTOP, unix.SIGABRT, 34, unix.SIGURG} {
			got[s] = unix.Tgkill(pid, pid, s)
		}
		results <- got
	}()
	for s, err := range <-results {
		switch s {
		case -1:
			if err != nil {
				t.Fatal(err)
			}
		case unix.SIGURG:
			if err != nil {
				t.Errorf("Go's own signal: %v", err)
			}
		default:
			if !errors.Is(err, unix.EPERM) {
				t.Errorf("signal %d to another process: %v", int(s), err)
			}
		}
	}
	if err := unix.Kill(pid, 0); err != nil {
		t.Errorf("the other process: %v", err)
	}
}

//go:build linux

package reading

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/instar-img/instar/sdk/formattest"
)

// maxCheckMemory is what a check may take, core and plugin together, whatever
// the size of the disk.
const maxCheckMemory = 256 << 20

// TestCheckMemory checks an image of 1 TiB that is mapped as a whole: 128 MiB of
// L2 tables.
func TestCheckMemory(t *testing.T) {
	instar := program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, "qemu-img create -q -f qcow2 -o preallocation=metadata a.qcow2 1T")
	for _, args := range [][]string{{"check"}, {"check", "-r", "all"}, {"map", "--output=json"}, {"measure", "-O", "qcow2"}} {
		cmd := exec.Command(instar, append(args, "a.qcow2")...)
		cmd.Dir = dir
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		peaks := map[int]int64{}
		running := true
		for running {
			watch(cmd.Process.Pid, peaks)
			select {
			case err := <-done:
				if err != nil {
					t.Fatalf("%q: %v", args, err)
				}
				running = false
			case <-time.After(time.Millisecond):
			}
		}
		sum := int64(0)
		for _, n := range peaks {
			sum += n
		}
		t.Logf("%q: %d MiB in %d processes", args, sum>>20, len(peaks))
		if len(peaks) < 2 {
			t.Errorf("%q: only %d processes were seen: the plugin's memory is not measured", args, len(peaks))
		}
		if sum > maxCheckMemory {
			t.Errorf("%q: %d MiB, %d are allowed", args, sum>>20, maxCheckMemory>>20)
		}
	}
}

// watch notes the most that a process and its descendants have had resident so
// far.
func watch(pid int, peaks map[int]int64) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return // it has ended
	}
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err == nil {
				peaks[pid] = max(peaks[pid], kib<<10)
			}
		}
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return
	}
	for _, task := range tasks {
		children, err := os.ReadFile(task)
		if err != nil {
			continue
		}
		for _, child := range strings.Fields(string(children)) {
			if n, err := strconv.Atoi(child); err == nil {
				watch(n, peaks)
			}
		}
	}
}

package moving

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// failsCleanly runs instar, which must fail with one line and leave dir as it
// was: no new file, and the old output as it was.
func failsCleanly(t *testing.T, dir, output string, args ...string) string {
	t.Helper()
	before := listing(t, dir)
	old, oldErr := os.ReadFile(filepath.Join(dir, output))
	cmd := exec.Command(instar(t), args...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Run(); err == nil {
		t.Fatalf("instar %q succeeded", args)
	}
	if n := strings.Count(stderr.String(), "\n"); n != 1 {
		t.Errorf("instar %q printed %d lines of errors: %s", args, n, stderr.String())
	}
	if after := listing(t, dir); after != before {
		t.Errorf("instar %q left\n%s\nwhere there was\n%s", args, after, before)
	}
	if now, err := os.ReadFile(filepath.Join(dir, output)); (err == nil) != (oldErr == nil) || !bytes.Equal(now, old) {
		t.Errorf("instar %q changed the old output", args)
	}
	return stderr.String()
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, "\n")
}

// asRoot skips, with the reason, where mounts and loop devices are not to be had.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system and loop devices need root")
	}
}

func TestFullDisk(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	small := filepath.Join(dir, "small")
	if err := os.Mkdir(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := run(dir, "mount", "-t", "tmpfs", "-o", "size=2M", "none", small); err != nil {
		t.Skipf("no tmpfs can be mounted here: %v %s", err, out)
	}
	t.Cleanup(func() { must(t, dir, "umount", small) })
	randomDisk(t, filepath.Join(dir, "disk.raw"), 8<<20, 6)
	if err := os.WriteFile(filepath.Join(small, "old"), []byte("what was there"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range targets {
		for _, output := range []string{"new", "old"} {
			args := append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...)
			text := failsCleanly(t, small, output, append(args, "../disk.raw", output)...)
			if !strings.Contains(text, "No space left on device") {
				t.Errorf("%s: %s", tt.name, text)
			}
		}
	}
}

// TestReadError reads from a loop device that ends before its size: the kernel
// answers EIO there.
func TestReadError(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	backing := filepath.Join(dir, "backing")
	randomDisk(t, backing, 4<<20, 7)
	device := loopDevice(t, backing)
	if err := os.Truncate(backing, 2<<20); err != nil {
		t.Fatal(err)
	}
	must(t, dir, "blockdev", "--flushbufs", device)
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range targets {
		args := append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...)
		text := failsCleanly(t, work, "new", append(args, device, "new")...)
		if !strings.Contains(text, "Input/output error") {
			t.Errorf("%s: %s", tt.name, text)
		}
	}
	// What can be read is salvaged.
	text := must(t, work, instar(t), "convert", "--salvage", "-f", "raw", "-O", "qcow2", device, "saved.qcow2")
	if !strings.Contains(text, "Input/output error") {
		t.Errorf("salvage is silent about what it could not read: %s", text)
	}
	silent(t, work, "dd", "-O", "raw", "if=saved.qcow2", "of=saved.raw", "bs=1M", "count=2")
	must(t, dir, "cmp", "backing", "work/saved.raw")
	must(t, work, "qemu-io", "-r", "-c", "read -P 0 2M 2M", "saved.qcow2")
	// The digest is that of what was stored, and -q says nothing of what was not.
	text = must(t, work, instar(t), "convert", "-q", "--salvage", "--digest", "sha256", "-f", "raw", "-O", "raw", device, "saved.raw")
	sum, _, _ := strings.Cut(must(t, work, "sha256sum", "saved.raw"), " ")
	if text != "sha256: "+sum+"\n" {
		t.Errorf("the digest of what was salvaged is %q, want %s", text, sum)
	}
	failsCleanly(t, work, "digested", "convert", "--digest", "sha256", "-f", "raw", "-O", "raw", device, "digested")
}

// loopDevice makes a block device of a file.
func loopDevice(t *testing.T, file string) string {
	t.Helper()
	out, err := run(filepath.Dir(file), "losetup", "--show", "-f", file)
	if err != nil {
		t.Skipf("no loop device can be had here: %v %s", err, out)
	}
	device := strings.TrimSpace(out)
	t.Cleanup(func() { must(t, filepath.Dir(file), "losetup", "-d", device) })
	return device
}

// TestOntoDevice writes images onto a device that holds something else, and over
// them.
func TestOntoDevice(t *testing.T) {
	asRoot(t)
	const capacity = 40 << 20
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 12<<20, 16)
	randomDisk(t, filepath.Join(dir, "other.raw"), 12<<20, 17)
	backing := filepath.Join(dir, "backing")
	if err := os.WriteFile(backing, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(backing, capacity); err != nil {
		t.Fatal(err)
	}
	device := loopDevice(t, backing)
	old := bytes.Repeat([]byte("what was on it. "), capacity/16)
	holds := func(tt target, disk string) {
		t.Helper()
		if tt.format == "raw" { // which ends where the device does
			must(t, dir, "cmp", "-n", "12M", disk, device)
			return
		}
		compare(t, dir, target{name: tt.name, format: tt.format}, disk, device)
		must(t, dir, instar(t), "check", "-f", tt.format, device)
	}
	for _, tt := range targets {
		if strings.Contains(strings.Join(tt.args, " "), "subformat") && tt.name != "vhdx-fixed" {
			continue // of several files, or with an end that must be the device's
		}
		if err := os.WriteFile(device, old, 0); err != nil {
			t.Fatal(err)
		}
		silent(t, dir, append(append([]string{"convert", "-f", "raw", "-O", tt.format}, tt.args...), "disk.raw", device)...)
		holds(tt, "disk.raw")
		if strings.Contains(strings.Join(tt.args, " "), "-c") {
			continue
		}
		silent(t, dir, "convert", "-n", "-f", "raw", "-O", tt.format, "other.raw", device)
		holds(tt, "other.raw")
	}
}

// slowConvert starts a conversion that takes long, and returns when its plugins
// are at work.
func slowConvert(t *testing.T, dir string) (cmd *exec.Cmd, stderr *bytes.Buffer) {
	t.Helper()
	cmd = exec.Command(instar(t), "convert", "-f", "raw", "-O", "qcow2", "-r", "1M", "../disk.raw", "new")
	cmd.Dir = dir
	stderr = &bytes.Buffer{}
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	deadline := time.Now().Add(30 * time.Second)
	for len(children(t, cmd.Process.Pid)) < 2 {
		if time.Now().After(deadline) {
			t.Fatal("the plugins do not start")
		}
		time.Sleep(20 * time.Millisecond)
	}
	time.Sleep(300 * time.Millisecond)
	return cmd, stderr
}

// children returns the processes that a process has started.
func children(t *testing.T, pid int) []int {
	t.Helper()
	out, err := exec.Command("ps", "-o", "pid=", "--ppid", strconv.Itoa(pid)).Output()
	if err != nil {
		return nil // none
	}
	var pids []int
	for _, f := range strings.Fields(string(out)) {
		n, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, n)
	}
	return pids
}

// gone waits for processes to end.
func gone(t *testing.T, pids []int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, pid := range pids {
		for alive(pid) {
			if ctx.Err() != nil {
				t.Fatalf("process %d is still there", pid)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// alive reports whether a process runs; one that nobody has waited for does not.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return false
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(rest, "Z")
}

func TestKilled(t *testing.T) {
	dir := t.TempDir()
	randomDisk(t, filepath.Join(dir, "disk.raw"), 16<<20, 8)
	for name, kill := range map[string]func(cmd *exec.Cmd, plugins []int) error{
		"interrupt": func(cmd *exec.Cmd, _ []int) error { return cmd.Process.Signal(os.Interrupt) },
		"core":      func(cmd *exec.Cmd, _ []int) error { return cmd.Process.Kill() },
		"plugin 0":  func(_ *exec.Cmd, plugins []int) error { return syscall.Kill(plugins[0], syscall.SIGKILL) },
		"plugin 1":  func(_ *exec.Cmd, plugins []int) error { return syscall.Kill(plugins[1], syscall.SIGKILL) },
	} {
		t.Run(name, func(t *testing.T) {
			work := filepath.Join(dir, strings.ReplaceAll(name, " ", "-"))
			if err := os.Mkdir(work, 0o755); err != nil {
				t.Fatal(err)
			}
			cmd, stderr := slowConvert(t, work)
			plugins := children(t, cmd.Process.Pid)
			if len(plugins) < 2 {
				t.Fatalf("plugins %v: the conversion is over too early: %s", plugins, stderr.String())
			}
			if err := kill(cmd, plugins); err != nil {
				t.Fatal(err)
			}
			killed := time.Now()
			if err := cmd.Wait(); err == nil {
				t.Error("the conversion succeeded")
			}
			if d := time.Since(killed); d > 5*time.Second { // it would take 16
				t.Errorf("it went on for %v", d)
			}
			if name != "core" && strings.Count(stderr.String(), "\n") != 1 {
				t.Errorf("not one line: %s", stderr.String())
			}
			gone(t, plugins)
			if left := listing(t, work); left != "" {
				t.Errorf("left behind: %s", left)
			}
		})
	}
}

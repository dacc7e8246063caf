//go:build linux

// Command guest is process 1 of the machine that test/vm/run boots: it sets up what
// an init system would, runs the tests as root and as an ordinary user, each in a
// delegated control group, says how they ended on the second serial port, and
// switches the machine off.
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/confine"
)

// What test/vm/run puts on the kernel's command line comes as environment.
const (
	landlockVariable = "INSTAR_VM_LANDLOCK" // least ABI that the kernel has; 0: none
	onlyVariable     = "INSTAR_VM_ONLY"     // expression for the tests to run, empty for all
)

// passed is the last line where all went well: test/vm/run looks for it.
const passed, failed = "instar-vm: passed", "instar-vm: FAILED"

func main() {
	if os.Getpid() == 1 {
		asInit()
	}
	if err := test(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// asInit runs this program again for the tests, and waits for what loses its
// parent meanwhile, as process 1 must.
func asInit() {
	verdict := failed
	if err := prepare(); err != nil {
		fmt.Println(err)
	} else if self, err := syscall.ForkExec("/init", []string{"tests"}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
	}); err != nil {
		fmt.Println(err)
	} else if waitFor(self) {
		verdict = passed
	}
	fmt.Println(verdict)
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	select {}
}

// waitFor reports whether a child ended well.
func waitFor(child int) bool {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if err != nil && err != syscall.EINTR {
			return false
		}
		if pid == child {
			return status.Exited() && status.ExitStatus() == 0
		}
	}
}

const groups = "/sys/fs/cgroup"

// prepare mounts, sets up the loopback device and speaks to the second port, on
// which the kernel does not.
func prepare() error {
	for _, m := range []struct{ kind, on, options string }{
		{"proc", "/proc", ""}, {"sysfs", "/sys", ""}, {"devtmpfs", "/dev", ""},
		{"tmpfs", "/tmp", "mode=1777"}, {"tmpfs", "/run", "mode=755"},
		{"securityfs", "/sys/kernel/security", ""}, {"cgroup2", groups, "nsdelegate"},
	} {
		if err := os.MkdirAll(m.on, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.on, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s: %w", m.on, err)
		}
	}
	port, err := os.OpenFile("/dev/ttyS1", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	for _, fd := range []int{1, 2} {
		if err := unix.Dup2(int(port.Fd()), fd); err != nil {
			return err
		}
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, lo)
}

// user is who runs tests, and the control group that is his, as systemd gives one
// to each service and to each user.
type user struct {
	name string
	id   uint32
}

var users = []user{{"root", 0}, {"user", 1000}}

// programs are the test programs and, for those that have much that asks nothing
// of the kernel, what is run of them.
var programs = []struct {
	name, run string
	least     uint32 // user id to run it as, and above
}{
	{"child", "", 0},
	{"launch", "", 0},
	{"hostile", "^(TestMemoryGroup|TestGroupsGo|TestSandboxSaid|TestReaches)$", 0},
	{"hostile", "^TestUnderLimits$/^[a-z0-9]+$", 1000}, // every verb with every format
}

// test runs everything.
func test() error {
	if err := landlock(); err != nil {
		return err
	}
	if err := enable(groups); err != nil {
		return err
	}
	var errs []error
	for _, u := range users {
		group, err := u.delegate()
		if err != nil {
			return err
		}
		for _, p := range programs {
			if u.id < p.least {
				continue
			}
			if err := u.run(group, p.name, p.run); err != nil {
				errs = append(errs, fmt.Errorf("instar-vm: %s as %s: %w", p.name, u.name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// landlock checks that the machine is the one that is meant, by what the kernel
// says of itself and by its answer to the call.
func landlock() error {
	least, err := strconv.Atoi(os.Getenv(landlockVariable))
	if err != nil {
		return fmt.Errorf("instar-vm: %s: %w", landlockVariable, err)
	}
	modules, err := os.ReadFile("/sys/kernel/security/lsm")
	if err != nil {
		return err
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	abi := confine.LandlockABI()
	fmt.Printf("instar-vm: Linux %s, security modules %s, Landlock ABI %d\n", unix.ByteSliceToString(name.Release[:]), modules, abi)
	listed := strings.Contains(","+string(modules)+",", ",landlock,")
	if listed != (least > 0) || (abi > 0) != listed || abi < least {
		return fmt.Errorf("instar-vm: that is not Landlock %d", least)
	}
	return nil
}

// enable has a group's children counted and limited.
func enable(group string) error {
	return os.WriteFile(filepath.Join(group, "cgroup.subtree_control"), []byte("+memory +pids"), 0)
}

// delegate makes the user's part of the tree, and the group in it whose processes
// are his: a group with processes can have no limited ones below it.
func (u user) delegate() (string, error) {
	parent := filepath.Join(groups, u.name)
	group := filepath.Join(parent, "tests")
	if err := os.Mkdir(parent, 0o755); err != nil {
		return "", err
	}
	if err := enable(parent); err != nil {
		return "", err
	}
	if err := os.Mkdir(group, 0o755); err != nil {
		return "", err
	}
	for _, dir := range []string{parent, group} {
		for _, file := range []string{"", "cgroup.procs", "cgroup.threads", "cgroup.subtree_control"} {
			if err := os.Chown(filepath.Join(dir, file), int(u.id), int(u.id)); err != nil {
				return "", err
			}
		}
	}
	return group, nil
}

// run runs one test program and looks at what it left.
func (u user) run(group, name, tests string) error {
	dir, err := os.Open(group)
	if err != nil {
		return err
	}
	defer dir.Close()
	work, err := os.MkdirTemp("", "work")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if err := os.Chown(work, int(u.id), int(u.id)); err != nil {
		return err
	}
	if only := os.Getenv(onlyVariable); only != "" {
		tests = only
	}
	cmd := exec.Command(filepath.Join("/instar/tests", name+".test"), "-test.v", "-test.timeout=5m", "-test.run="+tests)
	cmd.Dir = work
	cmd.Env = []string{
		"PATH=/usr/bin:/bin", "HOME=" + work, "TMPDIR=" + work, "INSTAR_TEST_BIN=/instar/bin",
		"INSTAR_TEST_PROBE=/instar/tests/probe", "INSTAR_TEST_LIAR=/instar/tests/liar",
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()),
		Credential: &syscall.Credential{Uid: u.id, Gid: u.id},
	}
	var out bytes.Buffer
	cmd.Stdout = io.MultiWriter(os.Stdout, &out)
	cmd.Stderr = cmd.Stdout
	fmt.Printf("instar-vm: == %s as %s\n", name, u.name)
	errs := []error{cmd.Run()}
	for line := range strings.Lines(out.String()) {
		words := strings.Fields(line)
		if len(words) > 2 && words[1] == "SKIP:" {
			errs = append(errs, fmt.Errorf("%s was skipped, and nothing is missing here", words[2]))
		}
	}
	return errors.Join(append(errs, u.left(group)...)...)
}

// left looks for processes and control groups.
func (u user) left(group string) []error {
	pids, err := os.ReadFile(filepath.Join(group, "cgroup.procs"))
	errs := []error{err}
	if len(pids) > 0 {
		errs = append(errs, fmt.Errorf("processes are left: %q", pids))
	}
	names, err := filepath.Glob(filepath.Join(filepath.Dir(group), "instar-*"))
	errs = append(errs, err)
	if len(names) > 0 {
		errs = append(errs, fmt.Errorf("control groups are left: %q", names))
	}
	return errs
}

//go:build linux

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// sample is what one run took.
type sample struct {
	wall, cpu time.Duration
}

// summary holds medians over the runs.
type summary struct {
	WallMS  float64 `json:"wall-ms"`
	CPUMS   float64 `json:"cpu-ms"`
	PeakMiB float64 `json:"peak-mib"`
}

type result struct {
	Case      string  `json:"case"`
	Runs      int     `json:"runs,omitempty"`
	Instar    summary `json:"instar"`
	Qemu      summary `json:"qemu-img"`
	WallRatio float64 `json:"wall-ratio,omitempty"`
	CPURatio  float64 `json:"cpu-ratio,omitempty"`
	SizeRatio float64 `json:"size-ratio,omitempty"`
	Aim       float64 `json:"aim,omitempty"`
	Skipped   string  `json:"skipped,omitempty"`
}

// becomeSubreaper makes processes that outlive their parent children of this
// one, so that their CPU time is counted.
func becomeSubreaper() error {
	return unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
}

// once runs the commands one after the other.
func once(dir string, commands [][]string) (sample, error) {
	var total sample
	for _, args := range commands {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = dir
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		start := time.Now()
		err := cmd.Run()
		total.wall += time.Since(start)
		if err != nil {
			line, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
			return sample{}, fmt.Errorf("%s %s: %w: %s", filepath.Base(args[0]), args[1], err, line)
		}
		total.cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
		orphans, err := reap()
		if err != nil {
			return sample{}, err
		}
		total.cpu += orphans
	}
	return total, nil
}

// reap waits for processes that the last command left behind and returns their
// CPU time.
func reap() (time.Duration, error) {
	var cpu time.Duration
	for {
		var usage unix.Rusage
		_, err := unix.Wait4(-1, nil, 0, &usage)
		if errors.Is(err, unix.ECHILD) {
			return cpu, nil
		} else if errors.Is(err, unix.EINTR) {
			continue
		} else if err != nil {
			return 0, fmt.Errorf("waiting for orphans: %w", err)
		}
		cpu += time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
}

// peak runs the commands and returns the largest sum of the peak resident sizes
// of the processes that lived at one time, in bytes. Polling disturbs the run,
// so that it is not timed. (The kernel's ru_maxrss would not do: it starts from
// the size of this process.)
func peak(dir string, commands [][]string) (int64, error) {
	var most int64
	for _, args := range commands[:1] {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = dir
		if err := cmd.Start(); err != nil {
			return 0, err
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		for running := true; running; {
			select {
			case err := <-done:
				if err != nil {
					return 0, err
				}
				running = false
			default:
				most = max(most, residentPeak(cmd.Process.Pid))
				time.Sleep(200 * time.Microsecond)
			}
		}
		if _, err := reap(); err != nil {
			return 0, err
		}
	}
	return most, nil
}

// residentPeak sums VmHWM of a process and its descendants. Processes that end
// meanwhile count nothing.
func residentPeak(pid int) int64 {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	var total int64
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err == nil {
				total = kib << 10
			}
		}
	}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return total
	}
	for _, path := range tasks {
		children, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for _, child := range strings.Fields(string(children)) {
			if n, err := strconv.Atoi(child); err == nil {
				total += residentPeak(n)
			}
		}
	}
	return total
}

// measureCase prepares a case and runs both programs alternately.
func measureCase(f flags, c benchCase, dir string) result {
	r := result{Case: c.name, Aim: c.aim}
	defer os.RemoveAll(dir)
	if err := os.Mkdir(dir, 0o755); err != nil {
		r.Skipped = err.Error()
		return r
	}
	dir, cleanup, err := c.place(dir)
	if err != nil {
		r.Skipped = err.Error()
		return r
	}
	defer cleanup()
	if c.setup != nil {
		if err := c.setup(dir, f.qemu); err != nil {
			r.Skipped = err.Error()
			return r
		}
	}

	programs := []string{f.instar, f.qemu}
	samples := make([][]sample, 2)
	peaks := make([]int64, 2)
	sizes := make([]int64, 2)
	attempt := func(i int, f func(dir string, commands [][]string) error) error {
		for _, name := range c.made {
			if err := os.RemoveAll(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
		if len(c.made) > 0 {
			unix.Sync() // what the run before has left to be written and freed is not for this one to pay
		}
		return f(dir, c.commands(programs[i], i == 0))
	}

	// Warm up, and see that both can do it and do it rightly.
	for i := range programs {
		err := attempt(i, func(dir string, commands [][]string) error {
			if _, err := once(dir, commands); err != nil {
				return err
			}
			if c.verify != nil {
				if err := c.verify(dir, f.qemu); err != nil {
					return fmt.Errorf("wrong result: %w", err)
				}
			}
			for _, name := range c.made {
				var st unix.Stat_t
				if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
					return err
				}
				sizes[i] += st.Blocks * 512
			}
			return nil
		})
		if err != nil {
			r.Skipped = err.Error()
			return r
		}
		for range 3 {
			if err := attempt(i, func(dir string, commands [][]string) error {
				p, err := peak(dir, commands)
				peaks[i] = max(peaks[i], p)
				return err
			}); err != nil {
				r.Skipped = err.Error()
				return r
			}
		}
	}

	r.Runs = f.runs
	if c.long {
		r.Runs = max(3, f.runs/5)
	}
	for n := range r.Runs {
		for k := range programs {
			i := (n + k) % 2 // who begins changes from run to run
			err := attempt(i, func(dir string, commands [][]string) error {
				s, err := once(dir, commands)
				samples[i] = append(samples[i], s)
				return err
			})
			if err != nil {
				r.Skipped = err.Error()
				return r
			}
		}
	}

	r.Instar, r.Qemu = summarise(samples[0], peaks[0]), summarise(samples[1], peaks[1])
	r.WallRatio = r.Instar.WallMS / r.Qemu.WallMS
	r.CPURatio = r.Instar.CPUMS / r.Qemu.CPUMS
	if sizes[1] > 0 && c.verify != nil {
		r.SizeRatio = float64(sizes[0]) / float64(sizes[1])
	}
	return r
}

func summarise(samples []sample, peak int64) summary {
	median := func(f func(sample) time.Duration) float64 {
		var v []time.Duration
		for _, s := range samples {
			v = append(v, f(s))
		}
		slices.Sort(v)
		mid := v[len(v)/2]
		if len(v)%2 == 0 {
			mid = (mid + v[len(v)/2-1]) / 2
		}
		return float64(mid) / float64(time.Millisecond)
	}
	return summary{
		WallMS:  median(func(s sample) time.Duration { return s.wall }),
		CPUMS:   median(func(s sample) time.Duration { return s.cpu }),
		PeakMiB: float64(peak) / (1 << 20),
	}
}

//go:build linux

// Command bench measures instar against qemu-img: the two run alternately on
// the same input, and medians and their ratio are printed for wall time, CPU
// time and peak memory.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"text/tabwriter"
)

type flags struct {
	runs   int
	only   *regexp.Regexp
	json   string
	dir    string
	instar string
	qemu   string
	mib    int64
	list   bool
}

func main() {
	if err := run(os.Stdout, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, args []string) error {
	f := flags{}
	only := ""
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.IntVar(&f.runs, "runs", 15, "runs of each program for each case (long cases take fewer)")
	fs.StringVar(&only, "only", "", "run the cases whose names match this `regexp`")
	fs.StringVar(&f.json, "json", "", "write the results as JSON to `file` too")
	fs.StringVar(&f.dir, "dir", os.TempDir(), "`directory` for the images, on the file system to measure")
	fs.StringVar(&f.instar, "instar", "bin/instar", "instar `program`")
	fs.StringVar(&f.qemu, "qemu-img", "qemu-img", "qemu-img `program`")
	fs.Int64Var(&f.mib, "mib", 512, "guest `MiB` of data that convert and compare work on")
	fs.BoolVar(&f.list, "list", false, "list the cases and exit")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var err error
	if f.only, err = regexp.Compile(only); err != nil {
		return err
	}
	if f.instar, err = filepath.Abs(f.instar); err != nil {
		return err
	}
	if f.list {
		for _, c := range cases(f.mib) {
			fmt.Fprintln(out, c.name)
		}
		return nil
	}
	if err := becomeSubreaper(); err != nil {
		return err
	}

	work, err := os.MkdirTemp(f.dir, "instar-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if f.instar, err = install(f.instar, filepath.Join(work, "bin")); err != nil {
		return err
	}

	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "load average %s\n\n", strings.TrimSpace(string(load)))

	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "case\truns\twall instar\tqemu-img\tratio\taim\tcpu instar\tqemu-img\tratio\tpeak instar\tqemu-img\tsize ratio\t")
	var results []result
	for i, c := range cases(f.mib) {
		if !f.only.MatchString(c.name) {
			continue
		}
		fmt.Fprint(os.Stderr, c.name)
		r := measureCase(f, c, filepath.Join(work, fmt.Sprint(i)))
		results = append(results, r)
		printRow(w, r)
		// A run that is broken off has not been in vain.
		if r.Skipped != "" {
			fmt.Fprintf(os.Stderr, ": skipped, %s\n", r.Skipped)
		} else {
			fmt.Fprintf(os.Stderr, ": %.2f\n", r.WallRatio)
		}
		if err := writeJSON(f.json, results); err != nil {
			return err
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, r := range results {
		if r.Skipped != "" {
			fmt.Fprintf(out, "skipped %s: %s\n", r.Case, r.Skipped)
		}
	}
	fmt.Fprint(out, "\nMedians. cpu: user and system time of all processes; peak: sum of the processes'\n"+
		"peak resident sizes; size ratio: bytes allocated by instar's output over qemu-img's.\n")
	return nil
}

func writeJSON(path string, results []result) error {
	if path == "" {
		return nil
	}
	text, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}

func printRow(w io.Writer, r result) {
	if r.Skipped != "" {
		fmt.Fprintf(w, "%s\tskipped\t\t\t\t\t\t\t\t\t\t\t\n", r.Case)
		return
	}
	aim := ""
	if r.Aim > 0 {
		aim = fmt.Sprintf("%.2f", r.Aim)
		if r.WallRatio > r.Aim {
			aim += " over"
		}
	}
	size := ""
	if r.SizeRatio > 0 {
		size = fmt.Sprintf("%.3f", r.SizeRatio)
	}
	fmt.Fprintf(w, "%s\t%d\t%.1f ms\t%.1f ms\t%.2f\t%s\t%.1f ms\t%.1f ms\t%.2f\t%.1f MiB\t%.1f MiB\t%s\t\n",
		r.Case, r.Runs, r.Instar.WallMS, r.Qemu.WallMS, r.WallRatio, aim,
		r.Instar.CPUMS, r.Qemu.CPUMS, r.CPURatio, r.Instar.PeakMiB, r.Qemu.PeakMiB, size)
}

// install copies instar and the plugins beside it into a directory, as an
// installation does, and returns where instar is then. What a linker has just
// written is in the page cache in single pages, which costs a start 1 to 2 ms.
func install(instar, dir string) (string, error) {
	files, err := filepath.Glob(filepath.Join(filepath.Dir(instar), "instar-format-*"))
	if err != nil {
		return "", err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	for _, name := range append(files, instar) {
		b, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), b, 0o755); err != nil {
			return "", err
		}
	}
	return filepath.Join(dir, filepath.Base(instar)), nil
}

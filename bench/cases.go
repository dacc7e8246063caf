//go:build linux

package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// benchCase is one comparison. Commands run in a directory of its own.
type benchCase struct {
	name string
	// aim is the largest wall ratio to be content with; 0 for none.
	aim float64
	// long cases run a fifth as often.
	long bool
	// made are the files that the commands make, removed before each run.
	made []string
	// place chooses the file system: it returns the directory to work in, below
	// or at dir, and what undoes it.
	place func(dir string) (work string, cleanup func(), err error)
	// setup makes the input, with qemu-img.
	setup func(dir, qemu string) error
	// commands returns what to run; the programs may need different ones to do
	// the same work.
	commands func(program string, isInstar bool) [][]string
	// verify looks at the output of the first run of each program.
	verify func(dir, qemu string) error
}

var formats = []string{"raw", "qcow2", "vmdk", "vpc", "vhdx"}

// here works in the directory it is given.
func here(dir string) (string, func(), error) { return dir, func() {}, nil }

// onXFS works on a reflinking XFS, with room for six disks, in a loop-mounted
// file.
func onXFS(mib int64) func(dir string) (string, func(), error) {
	return func(dir string) (string, func(), error) { return mountXFS(dir, fmt.Sprint(6*mib+1024, "M")) }
}

func mountXFS(dir, size string) (string, func(), error) {
	if os.Geteuid() != 0 {
		return "", nil, errors.New("mounting an XFS needs root")
	}
	image, mount := filepath.Join(dir, "xfs"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(mount, 0o755); err != nil {
		return "", nil, err
	}
	if err := commands("", []string{"truncate", "-s", size, image},
		[]string{"mkfs.xfs", "-q", "-m", "reflink=1", image},
		[]string{"mount", "-o", "loop", image, mount}); err != nil {
		return "", nil, err
	}
	return mount, func() {
		if err := commands("", []string{"umount", mount}); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
		}
	}, nil
}

// commands runs commands of the set-up, not measured.
func commands(dir string, list ...[]string) error {
	for _, args := range list {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// verb returns commands that are the same for both programs.
func verb(args ...string) func(string, bool) [][]string {
	return func(program string, _ bool) [][]string {
		return [][]string{append([]string{program}, args...)}
	}
}

// setup runs qemu-img with each list of arguments.
func setup(list ...[]string) func(dir, qemu string) error {
	return func(dir, qemu string) error {
		for _, args := range list {
			if err := commands(dir, append([]string{qemu}, args...)); err != nil {
				return err
			}
		}
		return nil
	}
}

// content writes guest content of some MiB to path, a MiB each of noise, of
// text, of records with small numbers, and of nothing.
func content(path string, mib int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r := rand.New(rand.NewPCG(1, 2))
	words := make([]string, 5000)
	for i := range words {
		letters := make([]byte, 2+r.IntN(9))
		for j := range letters {
			letters[j] = "etaoinshrdlucmfwypvbgkjqxz"[min(r.IntN(26), r.IntN(26))]
		}
		words[i] = string(letters) + " "
	}
	common := rand.NewZipf(r, 1.1, 8, uint64(len(words)-1))
	block := make([]byte, 0, 1<<20)
	for i := range mib {
		block = block[:0]
		for len(block) < cap(block)-64 {
			switch i % 4 {
			case 0:
				block = binary.LittleEndian.AppendUint64(block, r.Uint64())
			case 1:
				block = append(block, words[common.Uint64()]...)
			case 2:
				block = binary.LittleEndian.AppendUint32(block, uint32(len(block)))
				block = binary.LittleEndian.AppendUint32(block, uint32(r.IntN(1000)))
				block = binary.LittleEndian.AppendUint64(block, uint64(r.IntN(3)))
			default:
				block = block[:cap(block)-64]
			}
		}
		if i%4 == 3 {
			continue // a hole
		}
		if _, err := f.WriteAt(block, i<<20); err != nil {
			return err
		}
	}
	return errors.Join(f.Truncate(mib<<20), f.Close())
}

func cases(mib int64) []benchCase {
	var list []benchCase
	add := func(c benchCase) {
		if c.place == nil {
			c.place = here
		}
		list = append(list, c)
	}

	for _, f := range formats {
		add(benchCase{
			name: "create " + f, aim: 1.3, made: []string{"x"},
			commands: verb("create", "-f", f, "x", "1G"),
		})
	}
	add(benchCase{
		name: "create qcow2 metadata 1T", aim: 0.3, long: true, made: []string{"x"},
		commands: verb("create", "-f", "qcow2", "-o", "preallocation=metadata", "x", "1T"),
	})
	for _, f := range formats {
		add(benchCase{
			name: "info " + f, aim: 1.7,
			setup:    setup([]string{"create", "-f", f, "x", "1G"}),
			commands: verb("info", "x"),
		})
	}
	add(benchCase{
		name: "info --backing-chain of 3", aim: 1.7,
		setup: setup(
			[]string{"create", "-f", "qcow2", "a", "1G"},
			[]string{"create", "-f", "qcow2", "-b", "a", "-F", "qcow2", "b"},
			[]string{"create", "-f", "qcow2", "-b", "b", "-F", "qcow2", "x"}),
		commands: verb("info", "--backing-chain", "x"),
	})
	add(benchCase{
		name: "info of 1000 images", aim: 0.15, long: true,
		setup: func(dir, qemu string) error {
			for i := range 1000 {
				if err := commands(dir, []string{qemu, "create", "-q", "-f", "qcow2", thousandth(i), "1G"}); err != nil {
					return err
				}
			}
			return nil
		},
		commands: func(program string, isInstar bool) [][]string {
			if isInstar {
				all := []string{program, "info", "--output", "json"}
				for i := range 1000 {
					all = append(all, thousandth(i))
				}
				return [][]string{all}
			}
			var each [][]string
			for i := range 1000 {
				each = append(each, []string{program, "info", "--output", "json", thousandth(i)})
			}
			return each
		},
	})

	mapped := setup([]string{"create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", "x", "1T"})
	for _, v := range [][]string{{"check", "x"}, {"map", "x"}, {"map", "--output=json", "x"}, {"measure", "-O", "qcow2", "x"}} {
		add(benchCase{
			name: strings.TrimSuffix(strings.Join(v, " "), " x") + " 1T mapped qcow2", aim: 0.3, long: true,
			setup: mapped, commands: verb(v...),
		})
	}

	// Larger disks than the others, so that not only start-up is compared.
	add(benchCase{
		name: "compare raw raw", aim: 0.5, long: true,
		setup: func(dir, _ string) error {
			return errors.Join(content(filepath.Join(dir, "a"), 4*mib), content(filepath.Join(dir, "b"), 4*mib))
		},
		commands: verb("compare", "a", "b"),
	})
	add(benchCase{
		name: "compare raw qcow2", aim: 0.5, long: true,
		setup: func(dir, qemu string) error {
			if err := content(filepath.Join(dir, "a"), 4*mib); err != nil {
				return err
			}
			return commands(dir, []string{qemu, "convert", "-O", "qcow2", "a", "b"})
		},
		commands: verb("compare", "-f", "raw", "-F", "qcow2", "a", "b"),
	})

	// convert makes a case of from -> to; options are for the target, prepare
	// for the source.
	convert := func(name string, aim float64, from, to string, prepare, options []string) benchCase {
		return benchCase{
			name: name, aim: aim, long: true, made: []string{"out"},
			setup: func(dir, qemu string) error {
				if err := content(filepath.Join(dir, "content"), mib); err != nil {
					return err
				}
				args := append([]string{qemu, "convert", "-f", "raw", "-O", from}, prepare...)
				return commands(dir, append(args, "content", "in"))
			},
			commands: verb(append(append([]string{"convert", "-f", from, "-O", to}, options...), "in", "out")...),
			verify: func(dir, qemu string) error {
				return commands(dir, []string{qemu, "compare", "-f", "raw", "-F", to, "content", "out"})
			},
		}
	}
	for _, f := range formats[1:] {
		add(convert("convert raw to "+f, 0.7, "raw", f, nil, nil))
		add(convert("convert "+f+" to raw", 0.7, f, "raw", nil, nil))
	}
	add(convert("convert zlib qcow2 to raw", 0.75, "qcow2", "raw", []string{"-c"}, nil))
	add(convert("convert zstd qcow2 to raw", 0.7, "qcow2", "raw", []string{"-c", "-o", "compression_type=zstd"}, nil))
	add(convert("convert -c raw to qcow2", 0.2, "raw", "qcow2", nil, []string{"-c"}))
	add(convert("convert -c zstd raw to qcow2", 0.7, "raw", "qcow2", nil, []string{"-c", "-o", "compression_type=zstd"}))
	add(convert("convert raw to streamOptimized", 0.3, "raw", "vmdk", nil, []string{"-o", "subformat=streamOptimized"}))
	for _, pair := range [][2]string{{"raw", "qcow2"}, {"qcow2", "raw"}} {
		c := convert("convert "+pair[0]+" to "+pair[1]+" on XFS", 0.1, pair[0], pair[1], nil, nil)
		c.place = onXFS(mib)
		add(c)
	}
	add(benchCase{
		name: "convert 1T sparse qcow2", aim: 0.5, long: true, made: []string{"out"},
		setup: func(dir, qemu string) error {
			args := []string{"qemu-io", "-f", "qcow2"}
			for i := range 64 {
				args = append(args, "-c", fmt.Sprintf("write -P %d %dG 1M", i+1, i*16))
			}
			return commands(dir, []string{qemu, "create", "-q", "-f", "qcow2", "in", "1T"}, append(args, "in"))
		},
		commands: verb("convert", "-f", "qcow2", "-O", "qcow2", "in", "out"),
		verify: func(dir, qemu string) error {
			return commands(dir, []string{qemu, "compare", "-f", "qcow2", "-F", "qcow2", "in", "out"})
		},
	})
	return list
}

func thousandth(i int) string { return fmt.Sprintf("%03d.qcow2", i) }

//go:build linux

package differential

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// imagesPerRun is how many chains of random images a plain `go test` reads.
const imagesPerRun = 40

// TestRead makes chains of images with qemu-img and qemu-io, and lets both
// programs read them. What they print has to be the same to the byte.
func TestRead(t *testing.T) {
	seed := number(t, "INSTAR_DIFF_SEED", 1)
	count := number(t, "INSTAR_DIFF_N", imagesPerRun)
	instar := program(t, "instar")
	for shard := range uint64(2) { // two at a time
		t.Run(fmt.Sprint("half", shard), func(t *testing.T) {
			t.Parallel()
			for n := shard; n < count; n += 2 {
				t.Run(fmt.Sprint(n), func(t *testing.T) { readOne(t, instar, seed, n) })
			}
		})
	}
}

// history makes images and remembers the commands that made them.
type history struct {
	t    *testing.T
	r    *rand.Rand
	dir  string
	log  []string
	base string // format of the lowest layer
}

func (h *history) do(name string, args ...string) {
	h.t.Helper()
	var quoted []string
	for _, a := range args {
		if strings.Contains(a, " ") {
			a = "'" + a + "'"
		}
		quoted = append(quoted, a)
	}
	h.log = append(h.log, name+" "+strings.Join(quoted, " "))
	oracle(h.t, h.dir, name, args...)
}

// try does what qemu-img may refuse.
func (h *history) try(name string, args ...string) {
	h.t.Helper()
	h.log = append(h.log, "# "+name+" "+strings.Join(args, " "))
	run(h.t, h.dir, name, args...)
}

// anyClusterSize draws from all that there are, 512 bytes to 2 MiB.
func anyClusterSize(r *rand.Rand) int64 { return 512 << r.IntN(13) }

func pick[T any](r *rand.Rand, from ...T) T { return from[r.IntN(len(from))] }

// chain makes a random image over up to three others and returns its name and
// format.
func (h *history) chain() (name, format string) {
	size := pick(h.r, int64(1), 3, 16, 40)*mib + pick(h.r, int64(0), 0, 512, 66048)
	depth := pick(h.r, 1, 1, 2, 4) // layers
	for i := range depth {
		below, belowFormat := name, format
		name = fmt.Sprintf("layer%d", i)
		args := []string{"create", "-q"}
		var options []string
		if i > 0 {
			format = "qcow2"
			args = append(args, "-b", below, "-F", belowFormat)
			if h.r.IntN(3) == 0 {
				size += pick(h.r, mib, -mib/2, 4096)
			}
		} else {
			format = pick(h.r, "qcow2", "qcow2", "qcow2", "raw", "vmdk", "vpc", "vhdx")
			h.base = format
		}
		cluster := int64(64 << 10)
		switch format {
		case "qcow2":
			if h.r.IntN(4) > 0 { // else what is usual
				cluster = anyClusterSize(h.r)
				options = append(options, fmt.Sprintf("cluster_size=%d", cluster))
			}
			switch h.r.IntN(8) {
			case 0:
				options = append(options, "compat=0.10")
			case 1:
				options = append(options, fmt.Sprintf("refcount_bits=%d", 1<<h.r.IntN(7)))
			case 2:
				options = append(options, "lazy_refcounts=on")
			case 3:
				options = append(options, "compression_type=zstd")
			case 4:
				if cluster >= 16<<10 {
					options = append(options, "extended_l2=on")
				}
			case 5:
				if i == 0 {
					options = append(options, "preallocation=metadata")
				}
			}
		case "vmdk":
			options = append(options, "subformat="+pick(h.r, "monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"))
			if h.r.IntN(3) == 0 && strings.HasSuffix(options[0], "Sparse") {
				options = append(options, "zeroed_grain=on")
			}
		case "vpc", "vhdx":
			options = append(options, "subformat="+pick(h.r, "dynamic", "fixed"))
		}
		args = append(args, "-f", format)
		if len(options) > 0 {
			args = append(args, "-o", strings.Join(options, ","))
		}
		h.do("qemu-img", append(args, name, strconv.FormatInt(size, 10))...)
		h.write(name, format, cluster, size)
	}
	return name, format
}

// write fills an image with data, zeros, holes, compressed clusters, snapshots
// and bitmaps.
func (h *history) write(name, format string, cluster, size int64) {
	// One qemu-io for each run of operations: snapshots lie between them.
	args := []string{"-f", format}
	flush := func() {
		if len(args) > 2 {
			h.try("qemu-io", append(args, name)...)
		}
		args = []string{"-f", format}
	}
	for range h.r.IntN(14) {
		length := pick(h.r, int64(512), 4096, cluster, 3*cluster, 256<<10)
		length = min(length, 8*mib, size-size%512)
		off := h.r.Int64N(size-length+1) / 512 * 512
		if h.r.IntN(2) == 0 {
			off -= off % cluster
		}
		switch h.r.IntN(9) {
		default:
			args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 1+h.r.IntN(255), off, length))
		case 0:
			args = append(args, "-c", fmt.Sprintf("write -z %d %d", off, length))
		case 1:
			args = append(args, "-c", fmt.Sprintf("write -z -u %d %d", off, length))
		case 2:
			args = append(args, "-c", fmt.Sprintf("discard %d %d", off, length))
		case 3:
			if format == "qcow2" {
				off -= off % cluster
				args = append(args, "-c", fmt.Sprintf("write -c -P %d %d %d", h.r.IntN(256), off, cluster))
			}
		case 4:
			if format == "qcow2" && h.r.IntN(2) == 0 {
				flush()
				h.try("qemu-img", "snapshot", "-c", fmt.Sprint("snap", h.r.IntN(100)), name)
			}
		case 5:
			if format == "qcow2" && h.r.IntN(3) == 0 {
				flush()
				h.try("qemu-img", "bitmap", "--add", name, fmt.Sprint("map", h.r.IntN(100)))
			}
		}
	}
	flush()
	if format == "qcow2" && h.r.IntN(8) == 0 {
		h.try("qemu-img", "resize", "-q", name, fmt.Sprintf("+%dk", 64*(1+h.r.IntN(40))))
	}
}

func readOne(t *testing.T, instar string, seed, n uint64) {
	h := &history{t: t, r: rand.New(rand.NewPCG(seed, n)), dir: t.TempDir()}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("made by:\n%s", strings.Join(h.log, "\n"))
		}
	})
	name, format := h.chain()
	info := oracle(t, h.dir, "qemu-img", "info", "--output=json", name)
	size := virtualSize(t, info)
	// Equal content, and content that differs in one place.
	h.do("qemu-img", "convert", "-O", "raw", name, "equal")
	h.do("qemu-img", "convert", "-O", "qcow2", name, "other")
	at := h.r.Int64N(max(size/512, 1)) * 512
	h.do("qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P 170 %d 512", at), "other")

	settle(t, h.dir)

	commands := [][]string{
		{"info", name},
		{"info", "--backing-chain", name},
		{"info", "--backing-chain", "--output=json", name},
		{"map", name},
		{"map", "--output=json", name},
		{"map", "--output=json", "-f", format, "-s", strconv.FormatInt(size/3/512*512, 10), "-l", strconv.FormatInt(size/4/512*512+512, 10), name},
		{"measure", "-O", "raw", name},
		{"measure", "-O", "qcow2", name},
		{"measure", "-O", "qcow2", "--output=json", "-o", fmt.Sprintf("cluster_size=%d,refcount_bits=%d", anyClusterSize(h.r), 1<<h.r.IntN(7)), name},
		{"compare", name, "equal"},
		{"compare", "-s", "-f", format, "-F", format, name, name},
		{"compare", "other", name},
		{"compare", "-p", "-q", name, "other"},
	}
	if slices.Contains([]string{"qcow2", "vmdk", "vhdx"}, format) {
		commands = append(commands, []string{"check", name}, []string{"check", "--output=json", name})
	}
	for _, args := range commands {
		if why := unlike(args, h.base); why != "" {
			continue
		}
		want, got := run(t, h.dir, "qemu-img", args...), run(t, h.dir, instar, args...)
		if got.code != want.code {
			t.Errorf("%q: exit code %d, qemu-img's %d\n%s%s", args, got.code, want.code, got.stderr, want.stderr)
		}
		if diff := cmp.Diff(want.stdout, got.stdout); diff != "" {
			t.Errorf("%q (-qemu-img +instar):\n%s", args, diff)
		}
	}
	if left, err := filepath.Glob(filepath.Join(h.dir, ".instar*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

// settle brings the files of a directory to the disk: where a file has holes
// may change when its pages are written.
func settle(t *testing.T, dir string) {
	t.Helper()
	for _, name := range images(t, dir) {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// unlike says why the outputs of a command may differ, or returns ""
// (docs/divergences.md). base is the format at the bottom of the chain.
func unlike(args []string, base string) string {
	if base == "vhdx" && (args[0] == "map" || args[0] == "measure") {
		return "qemu-img takes all of a VHDX for data"
	}
	return ""
}

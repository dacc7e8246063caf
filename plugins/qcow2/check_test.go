package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// checkOutcome is what a check says: its messages, and its counts or an error.
type checkOutcome struct {
	Messages []string
	Err      string
	Counts   sdk.CheckResult
}

func runCheck(t *testing.T, path string, fix sdk.Fix) checkOutcome {
	t.Helper()
	flag := os.O_RDONLY
	if fix != sdk.FixNone {
		flag = os.O_RDWR
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var o checkOutcome
	im, err := New().Open(context.Background(), sdk.OpenRequest{
		Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: sdk.NewFile(f)}}, ReadWrite: fix != sdk.FixNone, Check: true,
	})
	if err != nil {
		o.Err = err.Error()
		return o
	}
	res, err := im.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Fix: fix, Message: func(s string) { o.Messages = append(o.Messages, s) }})
	if err != nil {
		o.Err = err.Error()
		return o
	}
	o.Counts = *res
	return o
}

// qemuCheck is runCheck by qemu-img. A repair is followed by a second check,
// whose messages follow those of the first.
func qemuCheck(t *testing.T, path string, fix sdk.Fix) checkOutcome {
	t.Helper()
	args := []string{"check", "--output=json", "-f", "qcow2"}
	switch fix {
	case sdk.FixLeaks:
		args = append(args, "-r", "leaks")
	case sdk.FixAll:
		args = append(args, "-r", "all")
	}
	cmd := exec.Command("qemu-img", append(args, path)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	_ = cmd.Run() // the exit code says what the counts say
	var o checkOutcome
	for _, line := range strings.Split(strings.TrimRight(stderr.String(), "\n"), "\n") {
		line = strings.TrimPrefix(line, "qemu-img: ")
		if rest, ok := strings.CutPrefix(line, "Check failed: "); ok {
			o.Err = rest
			return o
		}
		if rest, ok := strings.CutPrefix(line, "Could not open '"+path+"': "); ok {
			o.Err = rest
			return o
		}
		if line != "" && line != "Check failed" { // what CheckErrors says
			o.Messages = append(o.Messages, line)
		}
	}
	var j struct {
		End          int64 `json:"image-end-offset"`
		Total        int64 `json:"total-clusters"`
		Errors       int64 `json:"check-errors"`
		Allocated    int64 `json:"allocated-clusters"`
		Fragmented   int64 `json:"fragmented-clusters"`
		Compressed   int64 `json:"compressed-clusters"`
		Corruptions  int64 `json:"corruptions"`
		CorruptFixed int64 `json:"corruptions-fixed"`
		Leaks        int64 `json:"leaks"`
		LeaksFixed   int64 `json:"leaks-fixed"`
	}
	if err := json.Unmarshal(stdout.Bytes(), &j); err != nil {
		t.Fatalf("qemu-img check: %v: %s%s", err, stdout.String(), stderr.String())
	}
	o.Counts = sdk.CheckResult{
		CheckErrors: j.Errors, Corruptions: j.Corruptions, CorruptionsFixed: j.CorruptFixed, Leaks: j.Leaks, LeaksFixed: j.LeaksFixed,
		ImageEndOffset: j.End, TotalClusters: j.Total, AllocatedClusters: j.Allocated, FragmentedClusters: j.Fragmented, CompressedClusters: j.Compressed,
	}
	return o
}

func compareOutcome(t *testing.T, what string, got, want checkOutcome) bool {
	t.Helper()
	g := strings.Join(got.Messages, "\n")
	w := strings.Join(want.Messages, "\n")
	if want.Err != "" || got.Err != "" {
		if got.Err != want.Err {
			t.Errorf("%s: error %q, qemu-img says %q\nours:\n%s\nqemu-img:\n%s", what, got.Err, want.Err, clip(g), clip(w))
			return false
		}
		return true
	}
	if g != w || got.Counts != want.Counts {
		t.Errorf("%s:\n%+v\n%s\nqemu-img says:\n%+v\n%s", what, got.Counts, clip(g), want.Counts, clip(w))
		return false
	}
	return true
}

func clip(s string) string {
	if len(s) > 1500 {
		return s[:1500] + "..."
	}
	return s
}

var checkOptions = []string{
	"", "compat=0.10", "cluster_size=512", "cluster_size=4k,refcount_bits=1", "cluster_size=4k,refcount_bits=4",
	"extended_l2=on,cluster_size=16k", "compression_type=zstd,refcount_bits=64", "cluster_size=1k,refcount_bits=8",
	"lazy_refcounts=on,cluster_size=8k", "cluster_size=2k,refcount_bits=32",
}

func TestCheckCleanEqualsQemu(t *testing.T) {
	for n, opts := range checkOptions {
		t.Run(strings.ReplaceAll(opts, "=", "-"), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(n), 5))
			for _, bitmaps := range []bool{false, true} {
				path := richImage(t, r, memoryDir(t), opts, bitmaps)
				got := runCheck(t, path, sdk.FixNone)
				compareOutcome(t, "check", got, qemuCheck(t, path, sdk.FixNone))
				if len(got.Messages) > 0 || got.Err != "" {
					t.Errorf("clean image: %+v", got)
				}
			}
		})
	}
}

// richImage makes an image with content, snapshots and bitmaps as far as its
// options allow.
//
// Not both: when qemu-img repairs an image with bitmaps, it forgets that there
// were snapshots and frees them (docs/divergences.md).
func richImage(t *testing.T, r *rand.Rand, dir, opts string, bitmaps bool) string {
	t.Helper()
	size := int64(1<<20) + r.Int64N(64)*512
	path := qemuImage(t, r, dir, "a.qcow2", opts, size, "")
	if bitmaps = bitmaps && !strings.Contains(opts, "compat=0.10"); bitmaps {
		formattest.Oracle(t, "qemu-img", "bitmap", "--add", path, "b0")
		formattest.Oracle(t, "qemu-img", "bitmap", "--add", "-g", "4096", path, "b1")
		qemuWrites(t, r, path, size, 5)
	} else if openImage(t, path).g.order >= 3 { // narrow refcounts overflow
		formattest.Oracle(t, "qemu-img", "snapshot", "-c", "one", path)
		qemuWrites(t, r, path, size, 10)
		formattest.Oracle(t, "qemu-img", "snapshot", "-c", "two", path)
		qemuWrites(t, r, path, size, 10)
	}
	return path
}

// damage changes one thing in an image's metadata.
func damage(t *testing.T, r *rand.Rand, path string) string {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [512]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		t.Fatal(err)
	}
	var h header
	if err := h.decode(b[:]); err != nil {
		t.Fatal(err)
	}
	g := h.geometry()
	entry := func(off int64) uint64 {
		var e [8]byte
		if _, err := f.ReadAt(e[:], off); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		return binary.BigEndian.Uint64(e[:])
	}
	pick := func(off, n int64) (int64, uint64) { // a non-zero entry, if luck has it
		at := off
		for range 50 {
			at = off + r.Int64N(max(n, 1))*8
			if entry(at) != 0 {
				break
			}
		}
		return at, entry(at)
	}
	at, old, what := int64(0), uint64(0), ""
	switch r.IntN(6) {
	case 0:
		at, old = pick(int64(h.l1Offset), int64(h.l1Size))
		what = "L1 entry"
	case 1, 2, 3:
		_, l1 := pick(int64(h.l1Offset), int64(h.l1Size))
		at, old = pick(int64(l1&offsetMask), g.clusterSize/8)
		what = "L2 entry"
	case 4:
		at, old = pick(int64(h.reftableOffset), g.clusterSize/8)
		what = "refcount table entry"
	case 5:
		_, block := pick(int64(h.reftableOffset), g.clusterSize/8)
		at, old = pick(int64(block), g.clusterSize/8)
		what = "refcounts"
	}
	if at < 72 || at+8 > fileLength(t, f) {
		return "nothing"
	}
	value := old
	switch r.IntN(6) {
	case 0:
		value ^= 1 << r.IntN(64)
	case 1:
		value = 0
	case 2:
		value ^= flagCopied
	case 3:
		value ^= 1 << (g.clusterBits + uint32(r.IntN(6)))
	case 4:
		value = value&^offsetMask | uint64(r.Int64N(200))<<g.clusterBits
	case 5:
		value ^= 1 << r.IntN(10)
	}
	if _, err := f.WriteAt(binary.BigEndian.AppendUint64(nil, value), at); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s at %#x: %#x instead of %#x", what, at, value, old)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCheckDamagedEqualsQemu(t *testing.T) {
	rounds := 10
	if testing.Short() {
		rounds = 3
	}
	if n, err := strconv.Atoi(os.Getenv("INSTAR_TEST_ROUNDS")); err == nil {
		rounds = n
	}
	for n, opts := range checkOptions {
		t.Run(strings.ReplaceAll(opts, "=", "-"), func(t *testing.T) {
			r := rand.New(rand.NewPCG(uint64(n), 7))
			dir := memoryDir(t)
			base := richImage(t, r, dir, opts, n%2 == 1)
			failures := 0
			for range rounds {
				damaged := filepath.Join(dir, "damaged.qcow2")
				copyFile(t, base, damaged)
				var what []string
				for range 1 + r.IntN(2) {
					what = append(what, damage(t, r, damaged))
				}
				story := strings.Join(what, ", ")
				if !compareOutcome(t, story, runCheck(t, damaged, sdk.FixNone), qemuCheck(t, damaged, sdk.FixNone)) {
					failures++
				}
				if n%2 == 1 {
					continue // with bitmaps: qemu-img rewrites them when it repairs
				}
				for _, fix := range []sdk.Fix{sdk.FixLeaks, sdk.FixAll} {
					if !compareRepair(t, dir, damaged, fmt.Sprintf("%s, fix %d", story, fix), fix) {
						failures++
					}
				}
				if failures > 3 {
					t.FailNow()
				}
			}
		})
	}
}

// compareRepair repairs copies of an image with ours and with qemu-img, and
// compares what both say and what is left to find.
func compareRepair(t *testing.T, dir, path, what string, fix sdk.Fix) bool {
	t.Helper()
	ours, theirs := filepath.Join(dir, "ours.qcow2"), filepath.Join(dir, "theirs.qcow2")
	copyFile(t, path, ours)
	copyFile(t, path, theirs)
	want := qemuCheck(t, theirs, fix)
	got := runCheck(t, ours, fix)
	if got.Err == "" && got.Counts.CorruptionsFixed+got.Counts.LeaksFixed > 0 {
		// qemu-img checks again, and prints what is left then.
		again := runCheck(t, ours, sdk.FixNone)
		got.Messages = append(got.Messages, again.Messages...)
		again.Counts.CorruptionsFixed, again.Counts.LeaksFixed = got.Counts.CorruptionsFixed, got.Counts.LeaksFixed
		got.Counts, got.Err = again.Counts, again.Err
	}
	if want.Err != "" && got.Err == "" {
		// qemu-img gives up where new refcount structures would lie over old
		// ones, or where the file would be too long for its memory.
		left := qemuCheck(t, ours, sdk.FixNone)
		if left.Err != "" || left.Counts.Leaks > 0 || left.Counts.CheckErrors > 0 {
			t.Errorf("%s: left %+v, qemu-img says %q", what, left, want.Err)
			return false
		}
		return true
	}
	if !compareOutcome(t, what, got, want) {
		return false
	}
	left, theirLeft := qemuCheck(t, ours, sdk.FixNone), qemuCheck(t, theirs, sdk.FixNone)
	// qemu-img stores bitmaps anew, elsewhere.
	left.Counts.ImageEndOffset, theirLeft.Counts.ImageEndOffset = 0, 0
	return compareOutcome(t, what+", then checked", left, theirLeft)
}

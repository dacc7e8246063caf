package render

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// TestMap splits what qemu-img shows as JSON into pieces, which must give the
// same JSON and the same table again.
func TestMap(t *testing.T) {
	dir := t.TempDir()
	formattest.Script(t, dir, `
		truncate -s 5000M base.raw
		qemu-io -f raw -c 'write 100M 3M' base.raw
		qemu-img create -q -f qcow2 -b base.raw -F raw mid.qcow2
		qemu-io -c 'write 4G 1M' -c 'write -z 1M 64k' -c 'discard 2M 64k' -c 'write 101M 64k' mid.qcow2
		qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2
		qemu-io -c 'write 0 64k' -c 'write 4G 64k' -c 'write 3000M 1M' top.qcow2
		qemu-img create -q -f qcow2 plain.qcow2 4M
		qemu-io -c 'write 0 1M' -c 'write -z 2M 64k' plain.qcow2
		qemu-img convert -c -O qcow2 plain.qcow2 packed.qcow2
		qemu-io -c 'write 3M 64k' packed.qcow2
		truncate -s 0 empty.raw
		qemu-img create -q -f vmdk a.vmdk 4M
		qemu-io -c 'write 1M 64k' a.vmdk
	`)
	chains := map[string][]string{
		"base.raw": {"base.raw"}, "mid.qcow2": {"mid.qcow2", "base.raw"}, "top.qcow2": {"top.qcow2", "mid.qcow2", "base.raw"},
		"plain.qcow2": {"plain.qcow2"}, "packed.qcow2": {"packed.qcow2"}, "empty.raw": {"empty.raw"}, "a.vmdk": {"a.vmdk"},
	}
	rng := rand.New(rand.NewSource(4))
	for _, o := range oracles(t) {
		for file, chain := range chains {
			args := []string{"map"}
			if strings.HasSuffix(file, ".raw") {
				args = append(args, "-f", "raw")
			}
			wantJSON := o.run(t, dir, append(args, "--output", "json", file)...)
			var entries []MapEntry
			for _, e := range parseMap(t, wantJSON, chain) {
				for e.Length > 0 {
					piece := e
					if rng.Intn(3) > 0 {
						piece.Length = 1 + rng.Int63n(e.Length)
					}
					entries = append(entries, piece)
					e.Start += piece.Length
					e.Offset += piece.Length
					e.Length -= piece.Length
				}
			}
			got, err := renderMap(entries, true, Style{Layout: o.layout})
			if err != nil || got != wantJSON {
				t.Errorf("qemu-img %s map %s: %v\n--- want\n%s--- got\n%s", o.name, file, err, wantJSON, got)
			}
			got, err = renderMap(entries, false, Style{Layout: o.layout})
			if file == "packed.qcow2" {
				out, qerr := exec.Command(o.argv[0], append(o.argv[1:], "map", dir+"/"+file)...).CombinedOutput()
				if qerr == nil || !errors.Is(err, ErrUnmappable) || !strings.Contains(string(out), err.Error()) {
					t.Errorf("qemu-img %s map %s: %v, qemu-img says %s", o.name, file, err, out)
				}
				continue
			}
			if want := o.run(t, dir, append(args, file)...); err != nil || got != want {
				t.Errorf("qemu-img %s map %s: %v\n--- want\n%s--- got\n%s", o.name, file, err, want, got)
			}
		}
		want := o.run(t, dir, "map", "--output", "json", "-s", "5000M", "mid.qcow2")
		var b bytes.Buffer
		if err := NewMap(&b, true, 5000<<20, Style{Layout: o.layout}).Close(); err != nil || b.String() != want {
			t.Errorf("qemu-img %s: an empty range is %s, want %s", o.name, b.String(), want)
		}
	}
}

func parseMap(t *testing.T, text string, chain []string) []MapEntry {
	t.Helper()
	var parsed []struct {
		Start, Length                   int64
		Depth                           int
		Present, Zero, Data, Compressed bool
		Offset                          *int64
	}
	if err := json.Unmarshal([]byte(text), &parsed); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	var entries []MapEntry
	for _, p := range parsed {
		e := MapEntry{Start: p.Start, Length: p.Length, Depth: p.Depth, Present: p.Present, Zero: p.Zero, Data: p.Data, Compressed: p.Compressed}
		if p.Offset != nil {
			e.HasOffset, e.Offset, e.File = true, *p.Offset, chain[p.Depth]
		}
		entries = append(entries, e)
	}
	return entries
}

func renderMap(entries []MapEntry, json bool, style Style) (string, error) {
	var b bytes.Buffer
	m := NewMap(&b, json, 0, style)
	for _, e := range entries {
		if err := m.Add(e); err != nil {
			return b.String(), err
		}
	}
	err := m.Close()
	return b.String(), err
}

func TestMapEscapesFileNames(t *testing.T) {
	e := []MapEntry{{Length: 1, Data: true, HasOffset: true, File: "a\x1b[m"}}
	got, err := renderMap(e, false, Style{Escape: true})
	if err != nil || !strings.HasSuffix(got, `a\x1b[m`+"\n") {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	formattest.Script(t, dir, `
		qemu-img create -q -f qcow2 good.qcow2 3M
		qemu-io -c 'write 0 1M' good.qcow2
		qemu-img convert -c -O qcow2 good.qcow2 packed.qcow2
		qemu-img create -q -f qcow2 empty.qcow2 3M
		qemu-img create -q -f vmdk a.vmdk 3M
		cp good.qcow2 leak.qcow2
		printf '\0\1' | dd of=leak.qcow2 bs=1 seek=$((0x20000+60)) conv=notrunc
		truncate -s 2M leak.qcow2
		cp leak.qcow2 bad.qcow2
		printf '\0\0' | dd of=bad.qcow2 bs=1 seek=$((0x20000+12)) conv=notrunc
		cp good.qcow2 worse.qcow2
		printf '\377' | dd of=worse.qcow2 bs=1 seek=$((0x30000+2)) conv=notrunc
	`)
	for _, o := range oracles(t) {
		for _, file := range []string{"good.qcow2", "packed.qcow2", "empty.qcow2", "a.vmdk", "leak.qcow2", "bad.qcow2", "worse.qcow2"} {
			for _, repair := range []bool{false, true} {
				if repair && file == "a.vmdk" {
					continue
				}
				args := []string{"check"}
				if repair {
					args = append(args, "-r", "all")
				}
				formattest.Script(t, dir, "cp "+file+" x && cp x y")
				wantJSON := o.stdout(dir, append(args, "--output", "json", "x")...)
				r := parseCheck(t, wantJSON)
				if got := CheckJSON("x", parseFormat(t, wantJSON), r); string(got) != wantJSON {
					t.Errorf("qemu-img %s %q %s:\n--- want\n%s--- got\n%s", o.name, args, file, wantJSON, got)
				}
				want := o.stdout(dir, append(args, "y")...)
				if got := RepairedText(r) + CheckText(r); got != want {
					t.Errorf("qemu-img %s %q %s:\n--- want\n%s--- got\n%s", o.name, args, file, want, got)
				}
			}
		}
	}
}

// stdout runs qemu-img whatever its exit code.
func (o oracle) stdout(dir string, args ...string) string {
	cmd := exec.Command(o.argv[0], append(append([]string{}, o.argv[1:]...), args...)...)
	cmd.Dir = dir
	out, _ := cmd.Output() // the exit code tells what the output does
	return string(out)
}

func parseFields(t *testing.T, text string) fields {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	f := fields{}
	if err := d.Decode(&f); err != nil {
		t.Fatalf("%v in %q", err, text)
	}
	return f
}

func parseFormat(t *testing.T, text string) string { return parseFields(t, text).str("format") }

func parseCheck(t *testing.T, text string) *sdk.CheckResult {
	t.Helper()
	f := parseFields(t, text)
	return &sdk.CheckResult{
		CheckErrors: f.num("check-errors", 0), ImageEndOffset: f.num("image-end-offset", 0),
		Corruptions: f.num("corruptions", 0), Leaks: f.num("leaks", 0),
		CorruptionsFixed: f.num("corruptions-fixed", 0), LeaksFixed: f.num("leaks-fixed", 0),
		TotalClusters: f.num("total-clusters", 0), AllocatedClusters: f.num("allocated-clusters", 0),
		FragmentedClusters: f.num("fragmented-clusters", 0), CompressedClusters: f.num("compressed-clusters", 0),
	}
}

func TestCheckErrorsAreCounted(t *testing.T) {
	got := CheckText(&sdk.CheckResult{CheckErrors: 2})
	if want := "\n2 internal errors have occurred during the check.\n"; got != want {
		t.Errorf("got %q", got)
	}
}

func TestMeasure(t *testing.T) {
	dir := t.TempDir()
	formattest.Script(t, dir, `
		qemu-img create -q -f qcow2 a.qcow2 3M
		qemu-img bitmap --add a.qcow2 b
	`)
	for _, o := range oracles(t) {
		for _, args := range [][]string{{"-O", "raw", "--size", "1G"}, {"-O", "qcow2", "--size", "5T"}, {"-O", "qcow2", "a.qcow2"}} {
			wantJSON := o.run(t, dir, append([]string{"measure", "--output", "json"}, args...)...)
			f := parseFields(t, wantJSON)
			r := sdk.MeasureResult{Required: f.num("required", 0), FullyAllocated: f.num("fully-allocated", 0), Bitmaps: f.num("bitmaps", -1)}
			if got := string(MeasureJSON(r)); got != wantJSON {
				t.Errorf("qemu-img %s measure %q: got %s, want %s", o.name, args, got, wantJSON)
			}
			want := o.run(t, dir, append([]string{"measure"}, args...)...)
			if got := MeasureText(r); got != want {
				t.Errorf("qemu-img %s measure %q: got %s, want %s", o.name, args, got, want)
			}
		}
	}
}

func TestCompareMessages(t *testing.T) {
	dir := t.TempDir()
	formattest.Script(t, dir, `
		qemu-img create -q -f qcow2 a.qcow2 8M
		qemu-img create -q -f qcow2 same.qcow2 8M
		qemu-img create -q -f qcow2 longer.qcow2 9M
		qemu-img create -q -f qcow2 other.qcow2 8M
		qemu-io -c 'write -P 5 1M 4k' other.qcow2
		qemu-img create -q -f qcow2 zeros.qcow2 8M
		qemu-io -c 'write -P 0 2M 64k' -c 'write -P 0 7M 64k' zeros.qcow2
		qemu-img create -q -f qcow2 more.qcow2 8M
		qemu-io -c 'write -P 0 2M 64k' -c 'write -P 0 3M 64k' -c 'write -P 0 7M 64k' more.qcow2
	`)
	for _, o := range oracles(t) {
		for _, tt := range []struct {
			args []string
			want string
		}{
			{[]string{"same.qcow2"}, ImagesIdentical},
			{[]string{"longer.qcow2"}, SizeMismatch + ImagesIdentical},
			{[]string{"-s", "longer.qcow2"}, StrictSizeMismatch},
			{[]string{"other.qcow2"}, ContentMismatch(1 << 20)},
			{[]string{"zeros.qcow2"}, ImagesIdentical},
			{[]string{"-s", "zeros.qcow2"}, StatusMismatch(0)}, // one run ends the image, the other does not
			{[]string{"-s", "more.qcow2"}, StatusMismatch(3 << 20)},
		} {
			first := "a.qcow2"
			if tt.args[len(tt.args)-1] == "more.qcow2" {
				first = "zeros.qcow2"
			}
			if got := o.stdout(dir, append([]string{"compare", first}, tt.args...)...); got != tt.want {
				t.Errorf("qemu-img %s compare %q: got %q, want %q", o.name, tt.args, got, tt.want)
			}
		}
	}
}

func TestProgress(t *testing.T) {
	var b bytes.Buffer
	p := NewProgress(&b, 1)
	for _, part := range []float64{0, 0.005, 0.02, 0.025, 0.015, 0.5, 0.4, 0.999, 1, 1, 7} {
		p.Set(part)
	}
	p.Close()
	p.Close()
	p.Set(1)
	want := strings.ReplaceAll("    (0.00/100%)R    (2.00/100%)R    (50.00/100%)R    (99.90/100%)R    (100.00/100%)R\n", "R", "\r")
	if b.String() != want {
		t.Errorf("got %q", b.String())
	}
	(*Progress)(nil).Set(1)
	(*Progress)(nil).Close()

	// qemu-img's lines have the same form.
	dir := t.TempDir()
	formattest.Script(t, dir, "qemu-img create -q -f raw a 1M\ncp a b")
	form := regexp.MustCompile(`^(    \(\d+\.\d\d/100%\)\r)+`)
	for _, o := range oracles(t) {
		out := o.run(t, dir, "compare", "-f", "raw", "-F", "raw", "-p", "a", "b")
		if form.FindString(out)+ImagesIdentical+"\n" != out {
			t.Errorf("qemu-img %s: %q", o.name, out)
		}
	}
	if got := form.FindString(want) + "\n"; got != want {
		t.Errorf("ours: %q", got)
	}
}

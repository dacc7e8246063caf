package render

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
	"github.com/instar-img/instar/sdk/option"
)

// qemu-img names the first of several options that it does not know, in the
// order of its dictionary.
func TestObjectOrder(t *testing.T) {
	first := regexp.MustCompile(`support the option '([^']*)'`)
	rng := rand.New(rand.NewSource(1))
	for _, o := range oracles(t) {
		for range 25 {
			given, obj := map[string]string{"driver": "null-co"}, new(Object)
			for len(obj.members) < 12 {
				key := make([]byte, 1+rng.Intn(14))
				for i := range key {
					key[i] = "abcdefghijklmnopqrstuvwxyz-_09"[rng.Intn(30)]
				}
				k := string(key)
				if _, dup := given[k]; dup || k == "size" || k[0] == '-' {
					continue
				}
				given[k] = "1"
				obj.Set(k, "1")
			}
			text, err := json.Marshal(given)
			if err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command(o.argv[0], append(o.argv[1:], "info", "json:"+string(text))...).CombinedOutput()
			if err == nil {
				t.Fatalf("qemu-img takes %s", text)
			}
			m := first.FindSubmatch(out)
			if m == nil {
				t.Fatalf("qemu-img says %s", out)
			}
			if got := obj.sorted(); got[0].key != string(m[1]) && got[0].bucket != bucket(string(m[1])) {
				t.Errorf("%s: %s comes first, want %s", text, got[0].key, m[1])
			}
		}
	}
}

func TestObjectReplaces(t *testing.T) {
	o := new(Object)
	o.Set("a", "1")
	o.Set("b", true)
	o.Set("a", int64(-2))
	want := map[string]any{"a": -2.0, "b": true}
	var got map[string]any
	if err := json.Unmarshal(Pretty(o), &got); err != nil || !cmp.Equal(want, got) {
		t.Errorf("got %v, %v", got, err)
	}
}

// countingWriter keeps what is written, and the longest piece.
type countingWriter struct {
	bytes.Buffer
	longest int
}

func (w *countingWriter) Write(p []byte) (int, error) {
	w.longest = max(w.longest, len(p))
	return w.Buffer.Write(p)
}

// What is written in pieces is what is made as a whole.
func TestWrittenInPieces(t *testing.T) {
	var list []any
	for i := range 5000 {
		o := new(Object)
		o.Set("name", strings.Repeat("\x1b", i%500))
		o.Set("n", int64(i))
		list = append(list, o, []any{}, true)
	}
	for _, value := range []any{list, list[0], "x", []any{}, []any{list, list}} {
		for name, f := range map[string]func(*countingWriter) error{
			"Pretty": func(w *countingWriter) error { return WritePretty(w, value) },
			"Line":   func(w *countingWriter) error { return WriteLine(w, value) },
		} {
			var w countingWriter
			want := Pretty(value)
			if name == "Line" {
				want = Line(value)
			}
			if err := f(&w); err != nil || !bytes.Equal(w.Bytes(), want) {
				t.Errorf("%s: %v, %d bytes of %d", name, err, w.Len(), len(want))
			}
			if w.longest > 2*piece {
				t.Errorf("%s: a piece of %d bytes", name, w.longest)
			}
		}
	}
	for n := range 4 {
		var w countingWriter
		a := NewArray(&w)
		for _, v := range list[:n] {
			if err := a.Add(v); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.Close(); err != nil || !bytes.Equal(w.Bytes(), Pretty(list[:n])) {
			t.Errorf("%d elements: %v %q", n, err, w.Bytes())
		}
	}
	if err := WritePretty(failing{}, list); !errors.Is(err, errFull) {
		t.Errorf("a full disk: %v", err)
	}
}

var errFull = errors.New("full")

type failing struct{}

func (failing) Write([]byte) (int, error) { return 0, errFull }

func TestObjectNewestFirstInABucket(t *testing.T) {
	byBucket := make(map[uint32]string)
	for i := 0; ; i++ {
		k := fmt.Sprint("k", i)
		if other, ok := byBucket[bucket(k)]; ok {
			o := new(Object)
			o.Set(other, "1")
			o.Set(k, "2")
			if s := o.sorted(); s[0].key != k {
				t.Errorf("%s before %s", s[0].key, s[1].key)
			}
			return
		}
		byBucket[bucket(k)] = k
	}
}

// Any bytes can be in a file name but NUL and slash.
func TestJSONStrings(t *testing.T) {
	dir := t.TempDir()
	names := []string{
		"plain", `q"uote\back`, "\x01\x1f\x7f\b\f\n\r\t", "é€😀", "\xff\xfe\x80\xbf", "\xc0\x80", "\xc1\xbf", "\xed\xa0\x80", "\xef\xbf\xbf",
		"\xef\xb7\x90", "\xe2\x82x", "\xe2\x82", "\xf4\x90\x80\x80", "\xf8\x88\x80\x80\x80", "\xfc\x84\x80\x80\x80\x80", "\xf0\x9f\x98", "\xe0\x80\xaf",
		"\xf0\x9f\xbf\xbe", "\xfd\x80", "\xf0\x80\x80\x80",
	}
	rng := rand.New(rand.NewSource(2))
	for len(names) < 60 {
		b := make([]byte, 1+rng.Intn(40))
		for i := range b {
			if b[i] = byte(1 + rng.Intn(255)); rng.Intn(2) == 0 {
				b[i] = "\xc3\xe2\xf0\xf4\xbf\x80\x9f\xed\xa0\xef"[rng.Intn(10)]
			}
		}
		names = append(names, string(b))
	}
	o := oracles(t)[0]
	line := regexp.MustCompile(`(?m)^    "filename": (.*),$`)
	for _, name := range names {
		name = strings.NewReplacer("/", "_", ":", "_").Replace(name)
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, 512), 0o600); err != nil {
			t.Fatal(err)
		}
		m := line.FindStringSubmatch(o.run(t, dir, "info", "-f", "raw", "--output", "json", name))
		if m == nil {
			t.Fatalf("%q: no file name", name)
		}
		if got := string(appendQuoted(nil, name)); got != m[1] {
			t.Errorf("%q is %s, want %s", name, got, m[1])
		}
	}
}

func FuzzQuoted(f *testing.F) {
	f.Add("a\xc0\x80\xf0\x9f\x98\x80\xff")
	f.Fuzz(func(t *testing.T, s string) {
		q := appendQuoted(nil, s)
		if !json.Valid(q) {
			t.Fatalf("%q is quoted %s", s, q)
		}
	})
}

func TestHumanSize(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "x")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	sizes := []int64{0, 512, 1024, 999 << 10, 1000 << 10, 1023 << 10, 1<<20 - 512, 1 << 20, 1<<20 + 512, 1000<<20 - 512, 10 << 30, 10<<30 + 512<<20, 1 << 40, 5<<40 + 5<<37}
	rng := rand.New(rand.NewSource(3))
	for len(sizes) < 80 {
		sizes = append(sizes, rng.Int63n(1<<(10+rng.Intn(33)))&^511)
	}
	line := regexp.MustCompile(`(?m)^virtual size: (.*)$`)
	for _, size := range sizes {
		if err := os.Truncate(file, size); err != nil {
			t.Fatal(err)
		}
		m := line.FindStringSubmatch(oracles(t)[0].run(t, dir, "info", "-f", "raw", "x"))
		if got := sizeAndBytes(size); got != m[1] {
			t.Errorf("%d is %s, want %s", size, got, m[1])
		}
	}
	for n, want := range map[uint64]string{1: "1 B", 999: "999 B", 1000: "0.977 KiB", 1<<64 - 1: "16 EiB", 1 << 60: "1 EiB"} {
		if got := humanSize(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
}

// A snapshot's times and sizes are bytes in the file, so they can be anything.
func TestSnapshotTable(t *testing.T) {
	dir := t.TempDir()
	formattest.Script(t, dir, `
		qemu-img create -q -f qcow2 s.qcow2 1M
		qemu-img snapshot -c first s.qcow2
		qemu-img snapshot -c second s.qcow2
	`)
	file := filepath.Join(dir, "s.qcow2")
	image, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	be := func(at, n int) (v int) {
		for _, c := range image[at : at+n] {
			v = v<<8 | int(c)
		}
		return v
	}
	put := func(at, n int, v uint64) {
		for i := range n {
			image[at+i] = byte(v >> (8 * (n - 1 - i)))
		}
	}
	at := be(64, 8) // the snapshot table (qcow2.txt, "Snapshots")
	for i, s := range []struct {
		seconds           uint32
		clock, vm, icount uint64
	}{
		{1, 12345678901234567, 123456789, 7},
		{4102444800, 3600*1e9*20000 + 999e6, 5 << 40, 1<<64 - 1},
	} {
		extra := be(at+36, 4)
		if extra < 24 {
			t.Fatalf("snapshot %d has %d bytes of extra data", i, extra)
		}
		put(at+16, 4, uint64(s.seconds))
		put(at+24, 8, s.clock)
		put(at+40, 8, s.vm)
		put(at+56, 8, s.icount)
		at += (40 + extra + be(at+12, 2) + be(at+14, 2) + 7) &^ 7
	}
	if err := os.WriteFile(file, image, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, o := range oracles(t) {
		text := o.run(t, dir, "info", "--output", "json", "s.qcow2")
		parsed := parseImages(t, text)[0]
		if got := string(InfoJSON(parsed, Style{Layout: o.layout})); got != text {
			t.Errorf("qemu-img %s: JSON %s, want %s", o.name, got, text)
		}
		want := o.run(t, dir, "snapshot", "-l", "s.qcow2")
		if got := SnapshotTable(parsed.Info.Snapshots, Style{Layout: o.layout}); got != want {
			t.Errorf("qemu-img %s:\n--- want\n%s--- got\n%s", o.name, want, got)
		}
	}
	if got := SnapshotTable(nil, Style{}); got != "" {
		t.Errorf("no snapshots: %q", got)
	}
}

func TestSnapshotDateInGivenZone(t *testing.T) {
	got := SnapshotTable([]sdk.Snapshot{{ID: "1", Name: "x"}}, Style{Location: time.FixedZone("", 3600)})
	if !strings.Contains(got, " 1970-01-01 01:00:00 ") {
		t.Errorf("got %s", got)
	}
}

func TestEscape(t *testing.T) {
	for in, want := range map[string]string{
		"plain é 😀":                    "plain é 😀",
		"":                             "",
		"a\x1b[31mred\n\tb\r\x7f":      `a\x1b[31mred\n\tb\x0d\x7f`,
		"\u0085\u202e\u2028\ufeff":     `\u0085\u202e\u2028\ufeff`,
		"\xff\xc3":                     `\xff\xc3`,
		"\uFFFD is a character itself": "\uFFFD is a character itself",
		"\U000e0041":                   `\U000e0041`,
	} {
		if got := Escape(in); got != want {
			t.Errorf("Escape(%q) = %s, want %s", in, got, want)
		}
	}
}

// With Escape nothing in an image reaches the terminal's state.
func TestInfoTextEscapes(t *testing.T) {
	evil := "\x1b]0;x\a\n\xff"
	m := Image{
		Filename: evil, Format: "qcow2", BackingFilename: evil, FullBackingFilename: "/" + evil, BackingFormat: evil,
		Info: &sdk.Info{
			SpecificType: "qcow2",
			Specific:     []sdk.Fact{sdk.StringFact(evil, evil), sdk.ListFact("l", sdk.StringFact("", evil)), sdk.PathFact("p", sdk.RoleData)},
			Snapshots:    []sdk.Snapshot{{ID: evil, Name: evil}},
		},
		Paths:    map[string]string{sdk.RoleData: evil},
		Children: []Child{{Name: "file", Filename: evil, Protocol: "file", Specific: []sdk.Fact{sdk.StringFact("s", evil)}}},
	}
	got := InfoText([]Image{m}, Style{Escape: true})
	if strings.ContainsAny(got, "\x1b\a") || strings.Contains(got, "\xff") || strings.Count(got, `\x1b]0;x\x07\n\xff`) != 12 {
		t.Errorf("got %d in %q", strings.Count(got, `\x1b]0;x\x07\n\xff`), got)
	}
	if raw := InfoText([]Image{m}, Style{}); strings.Count(raw, evil) != 12 {
		t.Errorf("unescaped: %q", raw)
	}
}

func FuzzEscape(f *testing.F) {
	f.Add("a\x1b\xff\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		got := Escape(s)
		for _, r := range got {
			if r < ' ' || r >= 0x7f && r < 0xa0 || r == 0x202e {
				t.Fatalf("Escape(%q) = %q", s, got)
			}
		}
		if Escape(got) != got {
			t.Fatalf("Escape(%q) = %q, which is escaped again", s, got)
		}
	})
}

func TestFormattingLine(t *testing.T) {
	dir := t.TempDir()
	qcow2 := option.Schema{
		{Name: "encryption", Type: option.Bool},
		{Name: "cluster_size", Type: option.Size, Default: "65536"},
		{Name: "extended_l2", Type: option.Bool, Default: "off"},
		{Name: "preallocation", Type: option.Enum, Allowed: []string{"off", "metadata"}},
		{Name: "compression_type", Type: option.Enum, Default: "zlib", Allowed: []string{"zlib", "zstd"}},
		{Name: "size", Type: option.Size},
		{Name: "compat", Type: option.Enum, Allowed: []string{"0.10", "1.1"}, Synonyms: map[string]string{"v2": "0.10", "v3": "1.1"}},
		{Name: "backing_file"},
		{Name: "backing_fmt"},
		{Name: "lazy_refcounts", Type: option.Bool, Default: "off"},
		{Name: "refcount_bits", Type: option.Uint, Default: "16"},
		{Name: "nocow", Type: option.Bool},
		{Name: "extent_size_hint", Type: option.Size},
	}
	vpc := option.Schema{{Name: "size", Type: option.Size}}
	for _, tt := range []struct {
		schema             option.Schema
		format, file, list string
	}{
		{vpc, "vpc", "a.vpc", "size=8M"},
		{vpc, "vpc", "it's, a \"name\".vpc", "size=8M"},
		{qcow2, "qcow2", "a.qcow2", "size=1G"},
		{qcow2, "qcow2", "b.qcow2", "size=1.5G,cluster_size=4k,compat=v3,lazy_refcounts=y,encryption=off,nocow=no"},
		{qcow2, "qcow2", "c.qcow2", "size=1M,backing_file=a,,b c,,,backing_fmt=raw,extended_l2=on"},
		{qcow2, "qcow2", "d.qcow2", "refcount_bits=0x8,preallocation=metadata,compression_type=zstd,size=1M,extent_size_hint=1M"},
	} {
		settings, _, err := option.Split(tt.list)
		if err != nil {
			t.Fatal(err)
		}
		values, err := tt.schema.Validate(tt.format, settings)
		if err != nil {
			t.Fatal(err)
		}
		want := oracles(t)[0].run(t, dir, "create", "-u", "-f", tt.format, "-o", tt.list, tt.file)
		if got := FormattingLine(tt.file, tt.format, values); got != want {
			t.Errorf("%s %s:\n got %swant %s", tt.format, tt.list, got, want)
		}
	}
}

func TestCreatedJSON(t *testing.T) {
	got := CreatedJSON(Created{
		Format: "vmdk", Filename: "a.vmdk", VirtualSize: 1 << 20, AllocationUnit: 65536,
		Options: option.Values{
			{Key: "size", Type: option.Size, Uint: 1 << 20, Set: true},
			{Key: "subformat", Type: option.Enum, String: "monolithicFlat", Text: "MONOLITHICFLAT", Set: true},
			{Key: "compat6", Type: option.Bool, Bool: true, Text: "yes"},
		},
		Files: []string{"a.vmdk", "a-flat.vmdk"},
	})
	want := map[string]any{
		"format": "vmdk", "filename": "a.vmdk", "virtual-size": 1048576.0, "allocation-unit": 65536.0,
		"options": map[string]any{"size": 1048576.0, "subformat": "monolithicFlat", "compat6": true},
		"files":   []any{"a.vmdk", "a-flat.vmdk"},
	}
	var v map[string]any
	if err := json.Unmarshal(got, &v); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, v); d != "" {
		t.Error(d)
	}
}

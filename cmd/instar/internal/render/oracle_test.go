package render

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// oracle is a qemu-img to compare with.
type oracle struct {
	name   string
	layout Layout
	argv   []string
}

// oracles returns the installed qemu-img, which must be of the 7.2 line, and
// qemu-img 10 where .ci/qemu10-root has made a root for it.
func oracles(t *testing.T) []oracle {
	t.Helper()
	path, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Fatal("qemu-img is needed (Debian package qemu-utils)")
	}
	out, err := exec.Command(path, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	all := []oracle{{"7.2", Layout72, []string{path}}}
	if !strings.Contains(string(out), "version 7.2.") {
		// Elsewhere than on Debian 12 the installed one may be newer.
		all[0].name, all[0].layout = "installed", Layout10
	}
	root := os.Getenv("INSTAR_QEMU10_ROOT")
	if root == "" {
		root = "/var/tmp/instar-qemu10"
	}
	tool := filepath.Join(root, "usr/bin/qemu-img")
	if _, err := os.Stat(tool); err != nil {
		if os.Getenv("INSTAR_QEMU10_ROOT") != "" {
			t.Fatalf("INSTAR_QEMU10_ROOT has no qemu-img: %v", err)
		}
		t.Logf("not compared with qemu-img 10: run .ci/qemu10-root as root to have one")
		return all
	}
	// Started by its own loader it needs neither chroot nor root's rights.
	loader, err := filepath.Glob(filepath.Join(root, "usr/lib/*/ld-linux-*.so.*"))
	if err != nil || len(loader) != 1 {
		t.Fatalf("%s: no loader: %v, %v", root, loader, err)
	}
	return append(all, oracle{"10", Layout10, []string{loader[0], "--library-path", filepath.Dir(loader[0]), tool}})
}

func (o oracle) run(t *testing.T, dir string, args ...string) string {
	t.Helper()
	argv := append(append([]string{}, o.argv...), args...)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("qemu-img %q: %v: %s", args, err, stderr.String())
	}
	return string(out)
}

// images makes a file of every kind that info lays out differently.
func images(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	formattest.Script(t, dir, `
		qemu-img create -q -f raw a.raw 8M
		qemu-img create -q -f raw empty.raw 0
		qemu-img create -q -f qcow2 base.qcow2 3M
		qemu-io -c 'write 0 1M' base.qcow2
		qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
		qemu-img snapshot -c one top.qcow2
		qemu-img snapshot -c 'a name that is rather longer than its column' top.qcow2
		qemu-img snapshot -c 'größer 😀' top.qcow2
		qemu-img bitmap --add top.qcow2 bm
		qemu-img bitmap --add --disable -g 4k top.qcow2 off
		qemu-img create -q -f qcow2 -b top.qcow2 -F qcow2 'name,with "odd\chars	é😀.qcow2'
		mkdir sub
		qemu-img create -q -f qcow2 -u -b ../elsewhere.raw -F raw sub/moved.qcow2 77M
		qemu-img create -q -f qcow2 -o compat=0.10 v2.qcow2 1G
		qemu-img create -q -f qcow2 -o compression_type=zstd,extended_l2=on,refcount_bits=64,cluster_size=2M zstd.qcow2 5T
		qemu-img create -q -f qcow2 -o data_file=data.raw,data_file_raw=on data.qcow2 1234567K
		qemu-img create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 4M
		qemu-img create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=aes,encrypt.key-secret=s aes.qcow2 4M
		qemu-img create -q -f qcow2 -o lazy_refcounts=on dirty.qcow2 4M
		qemu-io -c 'write 0 1M' -c abort dirty.qcow2 >/dev/null 2>&1 || true
		qemu-img create -q -f vmdk sparse.vmdk 9M
		qemu-img create -q -f vmdk -o subformat=streamOptimized stream.vmdk 9M
		qemu-img create -q -f vmdk -o subformat=monolithicFlat flat.vmdk 9M
		qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentFlat split.vmdk 5G
		qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse many.vmdk 21G
		qemu-img create -q -f vpc a.vpc 8M
		qemu-img create -q -f vpc -o subformat=fixed fixed.vpc 8M
		qemu-img create -q -f vhdx a.vhdx 8M
	`)
	return dir
}

var infoArgs = [][]string{
	{"-f", "raw", "a.raw"}, {"-f", "raw", "empty.raw"}, {"base.qcow2"}, {"top.qcow2"}, {"--backing-chain", "top.qcow2"},
	{"--backing-chain", "name,with \"odd\\chars\té😀.qcow2"}, {"--backing-chain", "base.qcow2"},
	{"sub/moved.qcow2"}, {"v2.qcow2"}, {"zstd.qcow2"}, {"data.qcow2"}, {"luks.qcow2"}, {"aes.qcow2"}, {"dirty.qcow2"},
	{"sparse.vmdk"}, {"stream.vmdk"}, {"flat.vmdk"}, {"split.vmdk"}, {"many.vmdk"},
	{"-f", "vpc", "a.vpc"}, {"-f", "vpc", "fixed.vpc"}, {"a.vhdx"},
}

// TestInfo takes apart what each qemu-img says in JSON, without its order, and
// must arrive at the same JSON and the same text.
func TestInfo(t *testing.T) {
	dir := images(t)
	for _, o := range oracles(t) {
		style := Style{Layout: o.layout}
		for _, args := range infoArgs {
			wantJSON := o.run(t, dir, append([]string{"info", "--output", "json"}, args...)...)
			wantText := o.run(t, dir, append([]string{"info"}, args...)...)

			chain := args[0] == "--backing-chain"
			parsed := parseImages(t, wantJSON)
			got := InfoArrayJSON(parsed, style)
			if !chain {
				got = InfoJSON(parsed[0], style)
			}
			if string(got) != wantJSON {
				t.Errorf("qemu-img %s info %q:\n--- want\n%s--- got\n%s", o.name, args, wantJSON, got)
			}
			if got := InfoText(parsed, style); got != wantText {
				t.Errorf("qemu-img %s info %q:\n--- want\n%s--- got\n%s", o.name, args, wantText, got)
			}
			// Every JSON document is also one line for the line-wise reader.
			if line := Line(parsed[0].Object(style)); bytes.Count(line, []byte("\n")) != 1 || !json.Valid(line) {
				t.Errorf("%q: not a line: %s", args, line)
			}
		}
	}
}

type fields map[string]any

func (f fields) str(k string) string { s, _ := f[k].(string); return s }

func (f fields) num(k string, absent int64) int64 {
	n, ok := f[k].(json.Number)
	if !ok {
		return absent
	}
	v, err := n.Int64()
	if err != nil {
		panic(err)
	}
	return v
}

func (f fields) yes(k string) bool { b, _ := f[k].(bool); return b }

func parseImages(t *testing.T, text string) []Image {
	t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
	}
	var out []Image
	for _, e := range list {
		f := fields(e.(map[string]any))
		info := &sdk.Info{
			VirtualSize: f.num("virtual-size", -1), AllocationUnit: f.num("cluster-size", 0),
			Encrypted: f.yes("encrypted"), Dirty: f.yes("dirty-flag"),
		}
		if s, ok := f["snapshots"].([]any); ok {
			for _, e := range s {
				f := fields(e.(map[string]any))
				info.Snapshots = append(info.Snapshots, sdk.Snapshot{
					ID: f.str("id"), Name: f.str("name"), VMStateSize: f.num("vm-state-size", 0),
					DateSec: f.num("date-sec", 0), DateNsec: f.num("date-nsec", 0),
					VMClockNsec: f.num("vm-clock-sec", 0)*1e9 + f.num("vm-clock-nsec", 0), Icount: f.num("icount", -1),
				})
			}
		}
		if s, ok := f["format-specific"].(map[string]any); ok {
			info.SpecificType = fields(s).str("type")
			info.Specific = parseFacts(s["data"].(map[string]any))
		}
		img := Image{
			Filename: f.str("filename"), Format: f.str("format"), ActualSize: f.num("actual-size", -1), Info: info,
			BackingFilename: f.str("backing-filename"), FullBackingFilename: f.str("full-backing-filename"),
			BackingFormat: f.str("backing-filename-format"),
		}
		if c, ok := f["children"].([]any); ok {
			for _, e := range c {
				e := fields(e.(map[string]any))
				n := fields(e["info"].(map[string]any))
				child := Child{
					Name: e.str("name"), Filename: n.str("filename"), Protocol: n.str("format"),
					Length: n.num("virtual-size", -1), ActualSize: n.num("actual-size", -1),
				}
				child.Specific = parseFacts(n["format-specific"].(map[string]any)["data"].(map[string]any))
				img.Children = append(img.Children, child)
			}
		}
		out = append(out, img)
	}
	return out
}

func parseFacts(m map[string]any) []sdk.Fact {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	facts := []sdk.Fact{}
	for _, k := range keys {
		facts = append(facts, parseFact(k, m[k]))
	}
	return facts
}

func parseFact(name string, v any) sdk.Fact {
	switch v := v.(type) {
	case bool:
		return sdk.BoolFact(name, v)
	case json.Number:
		if n, err := strconv.ParseInt(v.String(), 10, 64); err == nil {
			return sdk.IntFact(name, n)
		}
		n, err := strconv.ParseUint(v.String(), 10, 64)
		if err != nil {
			panic(err)
		}
		return sdk.UintFact(name, n)
	case string:
		return sdk.StringFact(name, v)
	case map[string]any:
		return sdk.ObjectFact(name, parseFacts(v)...)
	case []any:
		var items []sdk.Fact
		for _, e := range v {
			items = append(items, parseFact("", e))
		}
		return sdk.ListFact(name, items...)
	}
	panic(fmt.Sprintf("a %T in JSON", v))
}

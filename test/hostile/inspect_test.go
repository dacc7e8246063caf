//go:build linux

package hostile

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"testing"
)

// mbr is a disk of 1 MiB with partitions of {flag, kind, start, length}.
func mbr(parts ...[4]uint32) []byte {
	b := make([]byte, 1<<20)
	b[510], b[511] = 0x55, 0xaa
	for i, p := range parts {
		e := b[446+16*i:]
		e[0], e[4] = byte(p[0]), byte(p[1])
		binary.LittleEndian.PutUint32(e[8:], p[2])
		binary.LittleEndian.PutUint32(e[12:], p[3])
	}
	return b
}

// protected is a disk of 1 MiB with a protective MBR, as UEFI wants it.
func protected() []byte {
	b := mbr([4]uint32{0, 0xee, 1, 2047})
	copy(b[447:], []byte{0, 2, 0})
	return b
}

// gpt is a disk of 1 MiB with a GPT, bent before its sum is made.
func gpt(bend func(disk, header []byte)) []byte {
	b := protected()
	h := b[512:]
	copy(h, "EFI PART\x00\x00\x01\x00")
	le := binary.LittleEndian
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[32:], 2047)
	le.PutUint64(h[40:], 34)
	le.PutUint64(h[48:], 2014)
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 128)
	le.PutUint32(h[84:], 128)
	bend(b, h)
	le.PutUint32(h[16:], 0)
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	return b
}

// Every rule is broken by some image, named, and can be allowed by its name.
func TestInspect(t *testing.T) {
	none := func(_, _ []byte) {}
	q := func(bend func(*qcow)) []byte { i := newQcow(); bend(i); return i.bytes() }
	for _, tt := range []struct {
		name  string
		bytes []byte
		rules string // broken, in order
	}{
		{"empty", make([]byte, 1<<20), ""},
		{"mbr", mbr([4]uint32{0x80, 0x83, 63, 1000}, [4]uint32{0, 0x82, 1063, 900}), ""},
		{"mbr boot flag", mbr([4]uint32{0x42, 0x83, 63, 1000}), "partition-boot-flag"},
		{"mbr overlap", mbr([4]uint32{0, 0x83, 63, 1000}, [4]uint32{0, 0x83, 1000, 100}), "partition-overlap"},
		{"mbr at the table", mbr([4]uint32{0, 0x83, 0, 1000}), "partition-overlap"},
		{"mbr outside", mbr([4]uint32{0, 0x83, 63, 1 << 31}), "partition-outside"},
		{"mbr past 2^32", mbr([4]uint32{0, 0x83, 1<<32 - 1, 1<<32 - 1}), "partition-outside"},
		{"gpt", gpt(none), ""},
		{"gpt hybrid", gpt(func(d, _ []byte) { copy(d[462:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 63, 0, 0, 0, 1, 0, 0, 0}) }), "partition-protective"},
		{"gpt gone", protected(), "partition-gpt"},
		{"gpt without protection", gpt(func(d, _ []byte) { clear(d[446:510]) }), "partition-none partition-protective"},
		{"gpt outside", gpt(func(_, h []byte) { binary.LittleEndian.PutUint64(h[72:], 1<<63) }), "partition-gpt"},
		{"gpt entries", gpt(func(_, h []byte) { binary.LittleEndian.PutUint32(h[80:], 1<<31) }), "partition-gpt"},
		{"qcow2", newQcow().bytes(), ""},
		{"qcow2 backing", newQcow().backing("x").bytes(), "backing-file"},
		{"qcow2 data file", naming("x")["qcow2 data file"], "data-file"},
		{"qcow2 incompatible", q(func(q *qcow) { q.incompat = 1 << 20 }), "unreadable"},
		{"qcow2 compatible", q(func(q *qcow) { q.compat = 1 << 20 }), "unknown-features"},
		{"qcow2 autoclear", q(func(q *qcow) { q.autoclear = 1 << 20 }), "unknown-features"},
		{"qcow2 extension", q(func(q *qcow) { q.extend(0x12345678, []byte("what is this")) }), "unknown-extensions"},
		{"qcow2 dirty", q(func(q *qcow) { q.incompat = 1 }), "dirty"},
		{"qcow2 corrupt bit", q(func(q *qcow) { q.incompat = 2 }), "corrupt"},
		{"qcow2 shared cluster", q(func(q *qcow) { q.put64(4*cluster+8, 5*cluster|1<<63) }), "corrupt"},
		{"vmdk flat", descriptor(`RW 2048 FLAT "x-flat.vmdk" 0`), "extent-file subformat"},
		{"vmdk path", descriptor(`RW 2048 FLAT "/etc/passwd" 0`), "extent-file subformat extent-name"},
		{"vmdk up", descriptor(`RW 2048 FLAT "..\secret" 0`), "extent-file subformat extent-name"},
		{"vhd", vhd(none), ""},
		{"vhd saved state", vhd(func(f, _ []byte) { f[84] = 1 }), "saved-state"},
		{"nothing", nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			write(t, dir, "image", tt.bytes)
			judge := func(extra ...string) (rules []string, safe bool) {
				r := command{Argv: append([]string{"inspect", "--output", "json", "image"}, extra...), Dir: dir}.run(t)
				var v struct {
					Findings []struct {
						Rule, Text string
						Allowed    bool
					}
					Safe bool
				}
				if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil || r.Stderr != "" {
					t.Fatalf("%v\n%s%s", err, r.Stdout, r.Stderr)
				}
				if v.Safe != (r.Code == 0) {
					t.Errorf("safe %v with exit code %d", v.Safe, r.Code)
				}
				for _, f := range v.Findings {
					if !slices.Contains(rules, f.Rule) {
						rules = append(rules, f.Rule)
					}
				}
				return rules, v.Safe
			}
			rules, safe := judge()
			if got := strings.Join(rules, " "); got != tt.rules || safe != (tt.rules == "") {
				t.Errorf("safe %v, broken: %q, want %q", safe, got, tt.rules)
			}
			var allow []string
			for i, rule := range rules {
				if _, safe := judge(allow...); safe {
					t.Errorf("safe without --allow %s", rule)
				}
				allow = append(allow, "--allow", rule)
				if _, safe := judge(allow...); safe != (i == len(rules)-1) {
					t.Errorf("safe %v with %v", safe, allow)
				}
			}
		})
	}
}

func TestInspectAllow(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "image", newQcow().bytes())
	for _, rule := range []string{"", "Backing-File", "backing file", "*", "a\nb"} {
		line := command{Argv: []string{"inspect", "--allow", rule, "image"}, Dir: dir}.run(t).oneLine(t)
		if !strings.Contains(line, "backing-file") {
			t.Errorf("--allow %q: %s does not list the rules", rule, line)
		}
	}
	if r := (command{Argv: []string{"inspect", "-f", "vmdk", "image"}, Dir: dir}).run(t); r.Code != 1 || !strings.Contains(r.Stdout, "unexpected") {
		t.Errorf("-f vmdk: %d %s", r.Code, fmt.Sprint(r.Stdout, r.Stderr))
	}
}

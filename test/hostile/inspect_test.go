//go:build linux

package hostile

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk/formattest"
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

// hosted is a VMDK of 1 MiB in one file, with a descriptor's lines after those
// that each has.
func hosted(lines string) []byte {
	b := make([]byte, 128<<10)
	copy(b, vmdkHeader(2048, 128, 1, 20, 512, 21, 26, 128))
	for _, at := range []int{21, 26} {
		binary.LittleEndian.PutUint32(b[at*512:], uint32(at+1))
	}
	copy(b[512+bytes.IndexByte(b[512:], 0):], lines)
	return b
}

// edit puts s into b.
func edit(b []byte, at int, s string) []byte { copy(b[at:], s); return b }

// vmdkStream is a streamOptimized VMDK that instar made, with its footer bent.
func vmdkStream(t *testing.T, bend func(footer []byte)) []byte {
	t.Helper()
	dir := t.TempDir()
	write(t, dir, "disk", bytes.Repeat([]byte("instar! "), 1<<20/8))
	if r := (command{Argv: strings.Fields("convert -f raw -O vmdk -o subformat=streamOptimized disk image"), Dir: dir}).run(t); r.Code != 0 {
		t.Fatal(r.Stderr)
	}
	b, err := os.ReadFile(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	bend(b[len(b)-1024:])
	return b
}

// vhdFixed is a fixed VHD of 1 MiB that begins with content.
func vhdFixed(content []byte) []byte {
	footer := vhd(func(f, _ []byte) {
		binary.BigEndian.PutUint64(f[16:], 1<<64-1)
		binary.BigEndian.PutUint64(f[40:], 1<<20)
		binary.BigEndian.PutUint64(f[48:], 1<<20)
		binary.BigEndian.PutUint32(f[56:], 0x001e0411)
		binary.BigEndian.PutUint32(f[60:], 2)
	})[:512]
	disk := make([]byte, 1<<20)
	copy(disk, content)
	return append(disk, footer...)
}

// crc32c puts the checksum at byte 4 that structures of VHDX have.
func crc32c(b []byte) {
	clear(b[4:8])
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
}

// vhdxBy returns what instar makes with options of create.
func vhdxBy(t *testing.T, options ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	for _, args := range [][]string{{"base", "1M"}, append(options, "image", "1M")} {
		if r := (command{Argv: append([]string{"create", "-q", "-f", "vhdx"}, args...), Dir: dir}).run(t); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "image"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// vhdxLog is a VHDX whose log has an entry, which changes nothing.
func vhdxLog(t *testing.T) []byte {
	b, le := vhdxBy(t), binary.LittleEndian
	log := bytes.Repeat([]byte{7}, 16)
	for _, at := range []int{64 << 10, 128 << 10} {
		h := b[at:][:4<<10]
		copy(h[48:], log)
		crc32c(h)
		e := b[le.Uint64(h[72:]):][:4<<10]
		clear(e)
		copy(e, "loge")
		le.PutUint32(e[8:], 4<<10)
		le.PutUint64(e[16:], 1)
		copy(e[32:], log)
		le.PutUint64(e[48:], uint64(len(b)))
		le.PutUint64(e[56:], uint64(len(b)))
		crc32c(e)
	}
	return b
}

// judged is an image and what inspect must say of it.
type judged struct {
	name  string
	bytes []byte
	rules string // broken, in order
	more  string // of the command line
}

// Every rule is broken by some image, named, and can be allowed by its name.
func TestInspect(t *testing.T) {
	none := func(_, _ []byte) {}
	q := func(bend func(*qcow)) []byte { i := newQcow(); bend(i); return i.bytes() }
	flip := func(b []byte, at int) []byte { b[at] ^= 1; return b }
	tests := []judged{
		{"empty", make([]byte, 1<<20), "", ""},
		{"mbr", mbr([4]uint32{0x80, 0x83, 63, 1000}, [4]uint32{0, 0x82, 1063, 900}), "", ""},
		{"mbr boot flag", mbr([4]uint32{0x42, 0x83, 63, 1000}), "partition-boot-flag", ""},
		{"mbr overlap", mbr([4]uint32{0, 0x83, 63, 1000}, [4]uint32{0, 0x83, 1000, 100}), "partition-overlap", ""},
		{"mbr at the table", mbr([4]uint32{0, 0x83, 0, 1000}), "partition-overlap", ""},
		{"mbr outside", mbr([4]uint32{0, 0x83, 63, 1 << 31}), "partition-outside", ""},
		{"mbr past 2^32", mbr([4]uint32{0, 0x83, 1<<32 - 1, 1<<32 - 1}), "partition-outside", ""},
		{"mbr without partitions", mbr(), "partition-none", ""},
		{"mbr without sectors", mbr([4]uint32{0, 0x83, 63, 0}), "partition-none", ""},
		{"mbr called FAT", edit(mbr([4]uint32{0x42, 0x83, 63, 1000}), 54, "FAT"), "partition-boot-flag", ""},
		{"mbr called NTFS", edit(mbr([4]uint32{0x42, 0x83, 63, 1000}), 3, "NTFS    "), "partition-boot-flag", ""},
		{"gpt", gpt(none), "", ""},
		{"gpt by parted", gpt(func(d, _ []byte) { d[448] = 1 }), "", ""},
		{"gpt on a disk that has grown", gpt(func(d, _ []byte) { binary.LittleEndian.PutUint32(d[458:], 1000) }), "", ""},
		{"gpt of any size", gpt(func(d, _ []byte) { binary.LittleEndian.PutUint32(d[458:], 1<<32-1) }), "", ""},
		{"gpt hybrid", gpt(func(d, _ []byte) { copy(d[462:], []byte{0, 0, 0, 0, 0x83, 0, 0, 0, 63, 0, 0, 0, 1, 0, 0, 0}) }), "partition-protective", ""},
		{"gpt gone", protected(), "partition-gpt", ""},
		{"gpt without protection", gpt(func(d, _ []byte) { clear(d[446:510]) }), "partition-none partition-protective", ""},
		{"gpt without boot signature", gpt(func(d, _ []byte) { clear(d[446:512]) }), "partition-protective", ""},
		{"gpt protected by the third", gpt(func(d, _ []byte) { copy(d[478:], d[446:462]); clear(d[446:462]) }), "partition-protective", ""},
		{"gpt protected twice", gpt(func(d, _ []byte) { copy(d[462:], d[446:462]) }), "partition-protective", ""},
		{"gpt protected from another head", gpt(func(d, _ []byte) { copy(d[447:], "\xff\xff\xff") }), "partition-protective", ""},
		{"gpt protected outside", gpt(func(d, _ []byte) { binary.LittleEndian.PutUint32(d[458:], 1<<32-16) }), "partition-outside", ""},
		{"gpt outside", gpt(func(_, h []byte) { binary.LittleEndian.PutUint64(h[72:], 1<<63) }), "partition-gpt", ""},
		{"gpt entries", gpt(func(_, h []byte) { binary.LittleEndian.PutUint32(h[80:], 1<<31) }), "partition-gpt", ""},
		{"qed", edit(make([]byte, 1<<20), 0, "QED\x00"), "foreign-format", ""},
		{"parallels", edit(make([]byte, 1<<20), 0, "WithoutFreeSpace"), "foreign-format", ""},
		{"parallels, extended", edit(make([]byte, 1<<20), 0, "WithouFreSpacExt"), "foreign-format", ""},
		{"luks", edit(make([]byte, 1<<20), 0, "LUKS\xba\xbe"), "foreign-format", ""},
		{"vdi", edit(make([]byte, 1<<20), 64, "\x7f\x10\xda\xbe"), "foreign-format", ""},
		{"iso", edit(make([]byte, 1<<20), 0x8001, "CD001"), "optical-disc", ""},
		{"qcow", edit(make([]byte, 1<<20), 0, "QFI\xfb\x00\x00\x00\x01"), "unreadable", ""},
		{"qcow2", newQcow().bytes(), "", ""},
		{"qcow2, another expected", newQcow().bytes(), "unexpected", "-f vmdk"},
		{"qcow2, raw expected", newQcow().bytes(), "unexpected", "-f raw"},
		{"qcow2 backing", newQcow().backing("x").bytes(), "backing-file", ""},
		{"qcow2 backing without name", q(func(q *qcow) { q.backingOffset = 1024 }), "backing-offset", ""},
		{"qcow2 data file", naming("x")["qcow2 data file"], "data-file", ""},
		{"qcow2 encrypted", q(func(q *qcow) { q.crypt = 1 }), "encrypted", ""},
		{"qcow2 incompatible", q(func(q *qcow) { q.incompat = 1 << 20 }), "unreadable", ""},
		{"qcow2 compatible", q(func(q *qcow) { q.compat = 1 << 20 }), "unknown-features", ""},
		{"qcow2 autoclear", q(func(q *qcow) { q.autoclear = 1 << 20 }), "unknown-features", ""},
		{"qcow2 extension", q(func(q *qcow) { q.extend(0x12345678, []byte("what is this")) }), "unknown-extensions", ""},
		{"qcow2 dirty", q(func(q *qcow) { q.incompat = 1 }), "dirty", ""},
		{"qcow2 corrupt bit", q(func(q *qcow) { q.incompat = 2 }), "corrupt", ""},
		{"qcow2 shared cluster", q(func(q *qcow) { q.put64(4*cluster+8, 5*cluster|1<<63) }), "corrupt", ""},
		{"vmdk", hosted(""), "", ""},
		{"vmdk parent in a comment", hosted("#parentFileNameHint=\"/etc/passwd\"\n"), "hidden-parent", ""},
		{"vmdk parent without name", hosted("parentFileNameHint=\"\"\n"), "backing-file", ""},
		{"vmdk junk", hosted("what is this\n"), "descriptor", ""},
		{"vmdk of two types", hosted("createType=\"monolithicFlat\"\n"), "descriptor", ""},
		{"vmdk footer", vmdkStream(t, func(footer []byte) { footer[4] = 2 }), "footer", ""},
		{"vmdk stream", vmdkStream(t, func([]byte) {}), "", ""},
		{"vmdk flat", descriptor(`RW 2048 FLAT "x-flat.vmdk" 0`), "extent-file subformat", ""},
		{"vmdk path", descriptor(`RW 2048 FLAT "/etc/passwd" 0`), "extent-file subformat extent-name", ""},
		{"vmdk up", descriptor(`RW 2048 FLAT "..\secret" 0`), "extent-file subformat extent-name", ""},
		{"vmdk behind a comment", append([]byte("#\n   \n#"), descriptor(`RW 2 FLAT "/etc/passwd" 0`)[2:]...), "extent-file subformat extent-name", ""},
		{"vmdk behind a long comment", append([]byte("#"+strings.Repeat("x", 600)+"\n"), descriptor(`RW 2 FLAT "/etc/passwd" 0`)[22:]...), "foreign-format", ""},
		{"vhd", vhd(none), "", ""},
		{"vhd saved state", vhd(func(f, _ []byte) { f[84] = 1 }), "saved-state", ""},
		{"vhd footer", flip(vhd(none), 512+1024+2048+100), "footer corrupt", ""},
		{"vhd fixed", vhdFixed(nil), "ambiguous", ""},
		{"vhd fixed, expected", vhdFixed(nil), "", "-f vpc"},
		{"vhd fixed, by its other name", vhdFixed(nil), "", "-f vhd"},
		{"vhd fixed, raw expected", vhdFixed(nil), "ambiguous", "-f raw"},
		{"vhd fixed behind a qcow2", append(newQcow().bytes(), vhdFixed(nil)...), "ambiguous", "-f qcow2"},
		{"vhd fixed with a qed inside", vhdFixed([]byte("QED\x00")), "foreign-format", "-f vpc"},
		{"vhd fixed with an mbr inside", vhdFixed(mbr([4]uint32{0x80, 0x83, 63, 1000})), "", "-f vpc"},
		{"vhdx", vhdxBy(t), "", ""},
		{"vhdx parent", vhdxBy(t, "-b", "base", "-F", "vhdx"), "backing-file", ""},
		{"vhdx log", vhdxLog(t), "dirty corrupt", ""},
		{"nothing", nil, "", ""},
	}
	known := command{Argv: []string{"inspect", "--allow", "help"}}.run(t).Stdout
	for line := range strings.Lines(known) {
		rule := strings.Fields(line)[0]
		if !slices.ContainsFunc(tests, func(j judged) bool { return slices.Contains(strings.Fields(j.rules), rule) }) {
			t.Errorf("no image breaks %s", rule)
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			write(t, dir, "image", tt.bytes)
			judge := func(extra ...string) (rules []string, safe bool) {
				r := command{Argv: append([]string{"inspect", "--output", "json", "image"}, append(strings.Fields(tt.more), extra...)...), Dir: dir}.run(t)
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

// A name that is no rule's is an error, even where no rule is broken.
func TestInspectAllow(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "image", newQcow().bytes())
	for _, rule := range []string{"", "Backing-File", "backing file", "*", "a\nb", "unknown", "saved-states"} {
		line := command{Argv: []string{"inspect", "--allow", rule, "image"}, Dir: dir}.run(t).oneLine(t)
		if !strings.Contains(line, "backing-file") || !strings.Contains(line, "saved-state)") {
			t.Errorf("--allow %q: %s does not list the rules", rule, line)
		}
	}
	for _, args := range [][]string{{"--help"}, {"--allow", "help"}} {
		r := command{Argv: append([]string{"inspect"}, args...), Dir: dir}.run(t)
		for _, rule := range []string{"backing-file", "unknown-features", "hidden-parent", "saved-state", "partition-gpt"} {
			if r.Code != 0 || !strings.Contains(r.Stdout, "\n  "+rule+" ") {
				t.Errorf("%s does not list %s: %d\n%s", args, rule, r.Code, r.Stdout)
			}
		}
	}
}

// An image is opened once, so that what was recognised is what is judged.
func TestInspectOpensOnce(t *testing.T) {
	dir := t.TempDir()
	path := write(t, dir, "image", newQcow().bytes())
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_OPEN|unix.IN_ACCESS|unix.IN_CLOSE); err != nil {
		t.Fatal(err)
	}
	// Where it may log no plugin is started ahead, for which the file is looked at too.
	if r := (command{Argv: []string{"inspect", "image"}, Dir: dir, Env: []string{"INSTAR_LOG=error"}}).run(t); r.Code != 0 {
		t.Fatal(r.Stdout, r.Stderr)
	}
	// Events that repeat the one before are left out: there is a read between.
	var b [64 << 10]byte
	n, err := unix.Read(fd, b[:])
	if err != nil {
		t.Fatal(err)
	}
	opened := 0
	for at := 0; at+unix.SizeofInotifyEvent <= n; at += unix.SizeofInotifyEvent {
		if binary.NativeEndian.Uint32(b[at+4:])&unix.IN_OPEN != 0 {
			opened++
		}
	}
	if opened != 1 {
		t.Errorf("opened %d times", opened)
	}
}

// A rule that no manifest lists is nobody's to allow.
func TestInspectUnlistedRule(t *testing.T) {
	l := install(t, "rule")
	r := l.run("inspect", "-f", "rule", "src")
	if r.Code != 1 || !strings.Contains(r.Stdout, "unreadable: ") || !strings.Contains(r.Stdout, "made-up") {
		t.Errorf("%d %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if line := l.run("inspect", "--allow", "made-up", "-f", "rule", "src").oneLine(t); !strings.Contains(line, "made-up") {
		t.Error(line)
	}
}

// shortenCID replaces the CID of a VMDK of one file as qemu-img would with the
// number 1: what was the end of the text stays behind it.
func shortenCID(t *testing.T, image []byte) []byte {
	t.Helper()
	text, _, _ := bytes.Cut(image[512:], []byte{0})
	before, after, ok := bytes.Cut(text, []byte("\nCID="))
	_, after, end := bytes.Cut(after, []byte("\n"))
	if !ok || !end {
		t.Fatalf("%q", text)
	}
	shorter := slices.Concat(before, []byte("\nCID=1\n"), after, []byte{0})
	return slices.Concat(image[:512], shorter, image[512+len(shorter):])
}

// What people upload is safe: what instar and qemu-img make, disks with
// partitions, and file systems without.
func TestInspectHarmless(t *testing.T) {
	dir := t.TempDir()
	disk := mbr([4]uint32{0x80, 0x83, 63, 1000}, [4]uint32{0, 0x82, 1063, 900})
	copy(disk[100<<10:], bytes.Repeat([]byte("content "), 1000))
	write(t, dir, "disk", disk)
	safe := func(name string, args ...string) {
		t.Helper()
		if r := (command{Argv: append(append([]string{"inspect"}, args...), name), Dir: dir}).run(t); r.Code != 0 || !strings.HasSuffix(r.Stdout, "safe: yes\n") {
			t.Errorf("%s\n%s%s", name, r.Stdout, r.Stderr)
		}
	}
	for i, line := range []string{
		"raw", "qcow2", "qcow2 -o compat=0.10", "qcow2 -c", "qcow2 -o compression_type=zstd,extended_l2=on", "qcow2 -o lazy_refcounts=on",
		"qcow2 -o preallocation=metadata", "vmdk", "vmdk -o subformat=streamOptimized", "vmdk -o compat6=on", "vmdk -o zeroed_grain=on,adapter_type=lsilogic",
		"vpc", "vpc -o force_size=on", "vpc -o subformat=fixed", "vpc -o subformat=fixed,force_size=on", "vhdx", "vhdx -o subformat=fixed", "vhdx -o block_size=2M",
	} {
		args := append([]string{"convert", "-f", "raw", "-O"}, strings.Fields(line)...)
		format := args[4]
		ours, theirs := fmt.Sprint("ours-", i), fmt.Sprint("theirs-", i)
		if r := (command{Argv: append(args, "disk", ours), Dir: dir}).run(t); r.Code != 0 {
			t.Fatal(line, r.Stderr)
		}
		formattest.Script(t, dir, "qemu-img "+strings.Join(append(args, "disk", theirs), " "))
		// A fixed VHD is raw but for its footer, so that it has to be expected.
		safe(ours, "-f", format)
		safe(theirs, "-f", format)
		if !strings.Contains(line, "vpc -o subformat=fixed") {
			safe(ours)
			safe(theirs)
		}
		if format == "vmdk" {
			b, err := os.ReadFile(filepath.Join(dir, theirs))
			if err != nil {
				t.Fatal(err)
			}
			short := shortenCID(t, b)
			write(t, dir, "short", short)
			safe("short")
			// Anything else there is not qemu-img's.
			short[512+bytes.IndexByte(short[512:], 0)+1] ^= 0x20
			write(t, dir, "short", short)
			if r := (command{Argv: []string{"inspect", "short"}, Dir: dir}).run(t); r.Code != 1 || !strings.Contains(r.Stdout, "follows the end of the descriptor") {
				t.Errorf("%s\n%s%s", line, r.Stdout, r.Stderr)
			}
		}
	}
	for _, line := range []string{
		"mkfs.ext4 -q -F", "mkfs.xfs -q", "mkfs.btrfs -q", "mkfs.ntfs -q -F -Q", "mkfs.vfat", "mkfs.vfat -F 32", "mkfs.exfat", "mkswap",
		"parted -s @ mklabel gpt mkpart a 1MiB 50% mkpart b 50% 100%", "parted -s @ mklabel msdos mkpart primary 1MiB 50% mkpart primary 50% 100%",
		"sgdisk -n 1:0:+10M -n 2:0:0", "echo label: gpt | sfdisk -q", "printf ',50M\\n,,5\\n,50M\\n' | sfdisk -q",
	} {
		words := strings.Fields(line)
		if i := slices.Index(words, "|"); i >= 0 {
			words = words[i+1:]
		}
		if _, err := exec.LookPath(words[0]); err != nil {
			t.Logf("%s is not installed", words[0])
			continue
		}
		if err := os.Truncate(write(t, dir, "volume", nil), 300<<20); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(line, "@") {
			line += " @"
		}
		formattest.Script(t, dir, strings.ReplaceAll(line, "@", "volume"))
		safe("volume")
	}
}

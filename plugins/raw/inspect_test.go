package raw

import (
	"bytes"
	"context"
	"encoding/binary"
	"slices"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// inspect returns the rules that a file breaks, each once, and its features.
func inspect(t testing.TB, content []byte) (broken, features []string) {
	t.Helper()
	img, err := New().Open(context.Background(), sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.ReadOnly(formattest.MemFile(content))}}})
	if err != nil {
		t.Fatal(err)
	}
	in, err := img.(sdk.Inspector).Inspect(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range in.Findings {
		if !slices.ContainsFunc(rules(), func(r sdk.Rule) bool { return r.Name == f.Rule }) {
			t.Errorf("the manifest does not list %q", f.Rule)
		}
		if !slices.Contains(broken, f.Rule) {
			broken = append(broken, f.Rule)
		}
	}
	return broken, in.Features
}

// with is a megabyte with strings at offsets.
func with(parts map[int]string) []byte {
	b := make([]byte, 1<<20)
	for at, s := range parts {
		copy(b[at:], s)
	}
	return b
}

const signature = "\x55\xaa"

// fat is the first sector of a FAT volume of a megabyte.
func fat(bend func(b []byte)) []byte {
	b := with(map[int]string{0: "\xeb\x3c\x90mkfs.fat", 11: "\x00\x02\x04\x01\x00\x02\x00\x02\x00\x08\xf8\x02\x00", 54: "FAT12   ", 510: signature})
	bend(b)
	return b
}

// ntfs is the first sector of an NTFS volume of a megabyte.
func ntfs(bend func(b []byte)) []byte {
	b := with(map[int]string{0: "\xeb\x52\x90NTFS    ", 11: "\x00\x02\x08", 21: "\xf8", 40: "\xff\x07", 48: "\x04", 510: signature})
	bend(b)
	return b
}

// exfat is the first sector of an exFAT volume of a megabyte.
func exfat(bend func(b []byte)) []byte {
	b := with(map[int]string{0: "\xeb\x76\x90EXFAT   ", 72: "\x00\x08", 108: "\x09\x03\x01", 510: signature})
	bend(b)
	return b
}

// entry is an MBR entry.
func entry(flag, kind byte, start, length uint32) string {
	b := append([]byte{flag, 0, 2, 0, kind, 0xff, 0xff, 0xff}, make([]byte, 8)...)
	binary.LittleEndian.PutUint32(b[8:], start)
	binary.LittleEndian.PutUint32(b[12:], length)
	return string(b)
}

// A file system excuses from having partitions when its whole parameter block
// is one, and no table can be read in its place.
func TestVolumes(t *testing.T) {
	none := func([]byte) {}
	set := func(at int, s string) func([]byte) { return func(b []byte) { copy(b[at:], s) } }
	for _, tt := range []struct {
		name, feature string
		bytes         []byte
	}{
		{"fat", "FAT", fat(none)},
		{"fat in code", "FAT", fat(set(446, "\x42 is no flag"))},
		{"fat of 32-bit size", "FAT", fat(func(b []byte) { copy(b[19:], "\x00\x00"); copy(b[32:], "\x00\x08") })},
		{"floppy", "FAT", fat(set(21, "\xf0"))},
		{"ntfs", "NTFS", ntfs(none)},
		{"ntfs of small records", "NTFS", ntfs(set(13, "\xf6"))},
		{"exfat", "exFAT", exfat(none)},

		{"fat by name", "", with(map[int]string{54: "FAT", 510: signature})},
		{"ntfs by name", "", with(map[int]string{3: "NTFS    ", 510: signature})},
		{"exfat by name", "", with(map[int]string{3: "EXFAT   ", 510: signature})},
		{"fat without jump", "", fat(set(0, "\x00"))},
		{"fat sectors", "", fat(set(11, "\x00\x03"))},
		{"fat clusters", "", fat(set(13, "\x03"))},
		{"fat reserved", "", fat(set(14, "\x00"))},
		{"fat tables", "", fat(set(16, "\x03"))},
		{"fat outside", "", fat(set(19, "\x01\x08"))},
		{"fat size 0", "", fat(set(19, "\x00\x00"))},
		{"fat media", "", fat(set(21, "\xf7"))},
		{"fat without tables", "", fat(set(22, "\x00"))},
		{"ntfs outside", "", ntfs(set(40, "\x01\x08"))},
		{"ntfs size 2^64-1", "", ntfs(set(40, "\xff\xff\xff\xff\xff\xff\xff\xff"))},
		{"ntfs media", "", ntfs(set(21, "\x00"))},
		{"ntfs with fat fields", "", ntfs(set(16, "\x02"))},
		{"exfat outside", "", exfat(set(72, "\x01\x08"))},
		{"exfat shift", "", exfat(set(108, "\xff"))},
		{"exfat cluster", "", exfat(set(109, "\xff"))},
		{"exfat not zero", "", exfat(set(63, "\x01"))},
	} {
		broken, features := inspect(t, tt.bytes)
		if got := strings.Join(features, " "); (tt.feature != "") != (len(broken) == 0) || tt.feature != "" && got != tt.feature || tt.feature == "" && got != "MBR" {
			t.Errorf("%s: %v, broken: %v", tt.name, features, broken)
		}
	}
	// A table beside the file system is judged.
	for _, volume := range [][]byte{fat(set(446, entry(0x80, 0x83, 1, 1<<20))), ntfs(set(446, entry(0, 0x83, 0, 10)))} {
		if broken, _ := inspect(t, volume); len(broken) == 0 {
			t.Error("a table in a volume was not judged")
		}
	}
}

func TestForeign(t *testing.T) {
	for _, list := range []struct {
		marks []mark
		rule  string
	}{{foreignMarks[:], ruleForeign}, {discMarks[:], ruleDisc}} {
		for _, m := range list.marks {
			at := m.at
			if at < 0 {
				at += 1 << 20
			}
			if broken, _ := inspect(t, with(map[int]string{int(at): m.magic})); !slices.Equal(broken, []string{list.rule}) {
				t.Errorf("%s at %d: %v", m.format, m.at, broken)
			}
			if broken, _ := inspect(t, with(map[int]string{int(at) + 16: m.magic})); len(broken) > 0 {
				t.Errorf("%s elsewhere: %v", m.format, broken)
			}
		}
	}
	for text, want := range map[string]bool{
		"\nversion=1\nCID=1\n":                          true,
		"\t\r\n  Version = 1\r\n":                       true,
		"x\ncreateType=\"monolithicFlat\"\n":            true,
		"# Disk DescriptorFile\n":                       true,
		strings.Repeat("#x\n", 1000) + "version=1\n":    true,
		"#" + strings.Repeat("x", 5000) + "\nVERSION=1": true,
		"\x00version=1\n":                               false,
		"version=one\n":                                 false,
		"#!/bin/sh\necho version=1\n":                   false,
		"":                                              false,
	} {
		b := append([]byte(text), make([]byte, 512)...)
		if broken, _ := inspect(t, b); (len(broken) > 0) != want {
			t.Errorf("%.40q: %v", text, broken)
		}
	}
}

// FuzzInspect judges arbitrary content: nothing may panic, and every finding
// has a rule that the manifest lists. What has a boot signature has partitions
// or a file system, or breaks a rule.
func FuzzInspect(f *testing.F) {
	none := func([]byte) {}
	gpt := "EFI PART\x00\x00\x01\x00\x5c\x00\x00\x00"
	for _, b := range [][]byte{
		fat(none)[:1024], ntfs(none)[:1024], exfat(none)[:1024], nil, {1},
		with(map[int]string{446: entry(0x80, 0x83, 63, 100) + entry(0, 5, 163, 100), 510: signature})[:1024],
		with(map[int]string{446: entry(0, typeGPT, 1, 0xffffffff), 510: signature, 512: gpt})[:1024],
		with(map[int]string{512: gpt})[:1024],
		[]byte("#\nversion=1\ncreateType=\"x\"\n"), []byte("QED\x00"),
	} {
		f.Add(b, uint32(1<<20))
	}
	f.Fuzz(func(t *testing.T, b []byte, length uint32) {
		content := append(bytes.Clone(b), make([]byte, max(0, int(length%(1<<16))-len(b)))...)
		broken, features := inspect(t, content)
		if len(content) >= 512 && string(content[510:512]) == signature && len(broken) == 0 && len(features) == 0 {
			t.Error("a boot sector was not looked at")
		}
		if len(broken) > len(rules()) {
			t.Errorf("%d rules", len(broken))
		}
	})
}

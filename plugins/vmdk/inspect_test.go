package vmdk

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// inspect returns the rules that a file breaks, each once, and whether Info
// tells of a parent, or the error of Open.
func inspect(t testing.TB, content []byte) (broken []string, parent bool, err error) {
	t.Helper()
	ctx := context.Background()
	img, err := New().Open(ctx, sdk.OpenRequest{Check: true, Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.ReadOnly(formattest.MemFile(content))}}})
	if err != nil {
		return nil, false, err
	}
	info, err := img.Info(ctx)
	if err != nil {
		return nil, false, err
	}
	in, err := img.(sdk.Inspector).Inspect(ctx)
	if err != nil {
		return nil, false, err
	}
	if len(in.Findings) > enough*len(rules()) {
		t.Errorf("%d findings", len(in.Findings))
	}
	for _, f := range in.Findings {
		if !slices.ContainsFunc(rules(), func(r sdk.Rule) bool { return r.Name == f.Rule }) {
			t.Errorf("the manifest does not list %q", f.Rule)
		}
		if !slices.Contains(broken, f.Rule) {
			broken = append(broken, f.Rule)
		}
	}
	return broken, slices.ContainsFunc(info.References, func(r sdk.Reference) bool { return r.Kind == sdk.RefBacking }), nil
}

// hosted is a sparse extent of 128 KiB with a descriptor in its usual place.
func hosted(text string, bend func(h *sparseHeader, file []byte)) []byte {
	h := sparseHeader{version: 1, flags: flagNewlineTest | flagRedundantGD, capacity: 256, grainSize: 128, descriptorOffset: 1, descriptorSize: 20,
		tableEntries: 512, rgdOffset: 21, gdOffset: 26, overhead: 128, newlines: newlineTest}
	b := make([]byte, 128*sectorSize)
	copy(b[descriptorAt:], text)
	b[21*sectorSize], b[26*sectorSize] = 22, 27
	bend(&h, b)
	copy(b, h.append(nil))
	return b
}

// head and tail of the descriptor of a disk in one file.
const (
	hostedHead = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n"
	hostedTail = "\n# Extent description\nRW 256 SPARSE \"x.vmdk\"\n\n# The Disk Data Base\n#DDB\n\nddb.adapterType = \"ide\"\n"
	hostedText = hostedHead + hostedTail
)

// Each crafted image breaks just these rules, or cannot be opened; and none in
// which qemu-img finds a parent is without fault.
func TestInspect(t *testing.T) {
	none := func(*sparseHeader, []byte) {}
	text := func(from, to string) []byte {
		if !strings.Contains(hostedText, from) {
			t.Fatalf("no %q", from)
		}
		return hosted(strings.Replace(hostedText, from, to, 1), none)
	}
	add := func(more string) []byte { return hosted(hostedText+more, none) }
	const hint = "parentFileNameHint=\"victim.vmdk\"\n"
	for _, tt := range []struct {
		name  string
		bytes []byte
		rules string // "-": it cannot be opened
	}{
		{"plain", hosted(hostedText, none), ""},
		{"windows lines", hosted(strings.ReplaceAll(hostedText, "\n", "\r\n"), none), ""},
		{"all keys", text("parentCID", "encoding=\"UTF-8\"\nisNativeSnapshot=\"no\"\nparentCID"), ""},

		{"parent in a comment", add("#" + hint), "hidden-parent"},
		{"parent behind a comment", add("# x " + hint), "hidden-parent"},
		{"parent of a ddb key", add("ddb." + hint), "hidden-parent"},
		{"parent in a value", add("ddb.x = \"" + strings.ReplaceAll(strings.TrimSpace(hint), `"`, "'") + "\"\n"), "hidden-parent"},
		{"parent in small letters", add("#" + strings.ToLower(hint)), "hidden-parent"},
		{"parent in another descriptor", hosted(strings.Replace(hostedText, "parentCID", hint+"parentCID", 1), func(h *sparseHeader, b []byte) {
			h.descriptorOffset = 64
			copy(b[64*sectorSize:], hostedText)
		}), "descriptor hidden-parent"},
		{"parent behind the descriptor", hosted(hostedText+strings.Repeat(" ", sectorSize-len(hostedText)), func(h *sparseHeader, b []byte) {
			h.descriptorSize = 1
			copy(b[2*sectorSize:], hint)
		}), "hidden-parent"},
		{"parent behind a NUL", add("\x00" + hint), "descriptor hidden-parent"},
		{"parent's id in a comment", text("parentCID", "#parentCID=12345678\n#"+hint+"parentCID"), "hidden-parent"},
		{"parent's id alone", text("parentCID=ffffffff", "parentCID=12345678"), "hidden-parent"},
		{"two parents", text("parentCID", "#parentFileNameHint=\"other.vmdk\"\n"+hint+"parentCID"), "hidden-parent"},
		{"parent", text("parentCID", hint+"parentCID"), ""}, // Info tells of it

		{"type", text("monolithicSparse", "monolithicFlat"), "subformat"},
		{"type in small letters", text("monolithicSparse", "monolithicsparse"), "subformat"},
		{"two types", add("createType=\"monolithicFlat\"\n"), "descriptor"},
		{"another type first", text("CID=", "createType=\"vmfs\"\nCID="), "subformat descriptor"},
		{"no type", text("createType=\"monolithicSparse\"\n", ""), "-"},
		{"no extent", text("RW 256 SPARSE \"x.vmdk\"\n", ""), "descriptor"},
		{"two extents", add("RW 256 SPARSE \"y.vmdk\"\n"), "descriptor"},
		{"flat extent", text("SPARSE \"x.vmdk\"", "FLAT \"x.vmdk\" 0"), "descriptor"},
		{"empty extent", add("RW 0 FLAT \"/etc/passwd\" 0\n"), "descriptor extent-name"},
		{"path", text("x.vmdk", "../x.vmdk"), "extent-name"},
		{"junk", add("what is this\n"), "descriptor"},
		{"extent in small letters", add("rw 2 FLAT \"x\" 0\n"), "descriptor"},
		{"unknown key", add("changeTrackPath=\"x-ctk.vmdk\"\n"), "descriptor"},
		{"not ASCII", add("ddb.x = \"\xc3\xa9\"\n"), "descriptor"},
		{"not UTF-8", add("ddb.x = \"\xff\"\n"), "descriptor"},
		{"carriage return", add("#\rddb.x = \"1\"\n"), "descriptor"},
		{"much junk", hosted(hostedText+strings.Repeat("?\n", 4000), none), "descriptor"},
		{"another place", hosted("", func(h *sparseHeader, b []byte) {
			h.descriptorOffset = 64
			copy(b[64*sectorSize:], hostedText)
		}), "descriptor"},

		{"bare behind a comment", []byte("#\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 2 FLAT \"/etc/passwd\" 0\n"), "subformat extent-name"},
		{"bare", descriptorText("monolithicFlat", `RW 2 FLAT "x" 0`), "subformat"},
		{"bare with a parent in a comment", append(descriptorText("monolithicFlat", `RW 2 FLAT "x" 0`), "#"+hint...), "subformat hidden-parent"},
		{"ESX", cowdExtent(4096, 1, nil), "subformat"},
	} {
		broken, parent, err := inspect(t, tt.bytes)
		slices.Sort(broken)
		want := strings.Fields(tt.rules)
		slices.Sort(want)
		if tt.rules == "-" {
			if err == nil {
				t.Errorf("%s: it was opened", tt.name)
			}
		} else if err != nil || !slices.Equal(broken, want) {
			t.Errorf("%s: broken %v (%v), want %v", tt.name, broken, err, want)
		}
		path := filepath.Join(t.TempDir(), "x.vmdk")
		writeFile(t, path, tt.bytes)
		stdout, _, _ := formattest.TryOracle(t, "qemu-img", "info", "-U", "--output", "json", path)
		if strings.Contains(stdout, `"backing-filename"`) && !parent && !slices.Contains(broken, ruleParent) {
			t.Errorf("%s: qemu-img finds a parent: %s", tt.name, stdout)
		}
	}
}

// What both programs write into one file breaks no rule.
func TestInspectHarmless(t *testing.T) {
	for _, options := range []string{"", "compat6=on", "zeroed_grain=on", "adapter_type=lsilogic,hwversion=7,toolsversion=9", "subformat=streamOptimized"} {
		for _, size := range []string{"64k", "1M", "100G"} {
			dir := t.TempDir()
			if _, err := formattest.TryCreate(t, New(), dir, "ours", map[string]int64{"64k": 64 << 10, "1M": 1 << 20, "100G": 100 << 30}[size], options); err != nil {
				t.Fatal(err)
			}
			args := []string{"create", "-q", "-f", "vmdk"}
			if options != "" {
				args = append(args, "-o", options)
			}
			formattest.Oracle(t, "qemu-img", append(args, filepath.Join(dir, "theirs"), size)...)
			for _, name := range []string{"ours", "theirs"} {
				b, err := os.ReadFile(filepath.Join(dir, name))
				if err != nil {
					t.Fatal(err)
				}
				if broken, parent, err := inspect(t, b); err != nil || len(broken) > 0 || parent {
					t.Errorf("%s of %s with %q: %v %v", name, size, options, broken, err)
				}
			}
		}
	}
}

// The footer of a stream says what its header says.
func TestInspectFooter(t *testing.T) {
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "x.vmdk", 1<<20, "subformat=streamOptimized")
	formattest.Write(t, New(), path, map[int64][]byte{0: {1}}, true)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if broken, _, err := inspect(t, good); err != nil || len(broken) > 0 {
		t.Fatalf("%v %v", broken, err)
	}
	for name, edit := range map[string]func(h *sparseHeader){
		"version":          func(h *sparseHeader) { h.version = 2 },
		"capacity":         func(h *sparseHeader) { h.capacity /= 2 },
		"descriptor place": func(h *sparseHeader) { h.descriptorOffset = 7 },
		"descriptor size":  func(h *sparseHeader) { h.descriptorSize = 9 },
		"compression":      func(h *sparseHeader) { h.compression = 0 },
	} {
		b := bytes.Clone(good)
		footer := b[len(b)-2*sectorSize:][:sectorSize]
		var h sparseHeader
		if err := h.decode(footer); err != nil {
			t.Fatal(err)
		}
		edit(&h)
		copy(footer, h.append(nil))
		if broken, _, err := inspect(t, b); err != nil || !slices.Equal(broken, []string{ruleFooter}) {
			t.Errorf("%s: %v %v", name, broken, err)
		}
	}
}

// FuzzInspect judges arbitrary descriptors, embedded and bare: nothing may
// panic, findings have rules that the manifest lists and a bound, and a parent's
// key that Info says nothing of breaks a rule.
func FuzzInspect(f *testing.F) {
	for _, text := range []string{hostedText, hostedText + "#parentFileNameHint=\"x\"\n", "", "RW 0 SPARSE \"\"\x00x", strings.ReplaceAll(hostedText, "\n", "\r\n")} {
		f.Add(text, uint16(1), uint16(20), uint16(0))
		f.Add(text, uint16(2), uint16(1), uint16(512))
	}
	f.Fuzz(func(t *testing.T, text string, at, size, move uint16) {
		// The descriptor begins up to a sector behind its place.
		b := hosted("", func(h *sparseHeader, b []byte) {
			h.descriptorOffset, h.descriptorSize = uint64(at), uint64(size)
			copy(b[descriptorAt+int(move%1024):20*sectorSize], text)
		})
		for _, content := range [][]byte{b, []byte(text)} {
			broken, parent, err := inspect(t, content)
			if err != nil || parent || len(broken) > 0 {
				continue
			}
			if seen, _, _ := strings.Cut(text, "\x00"); strings.Contains(seen, parentKey) && move%1024 == 0 {
				t.Errorf("a parent was not found: %q", text)
			}
		}
	})
}

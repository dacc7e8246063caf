//go:build linux

package reading

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
)

// put writes numbers into a file, in the byte order given.
func put(t *testing.T, path string, order binary.ByteOrder, off int64, values ...any) {
	t.Helper()
	var b bytes.Buffer
	for _, v := range values {
		if err := binary.Write(&b, order, v); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(b.Bytes(), off); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

const qcow2Size = 24 // where the header has the virtual size

// TestPartSectors reads disks whose size is not a multiple of 512. QEMU leaves out
// what is behind their last whole sector, and so does instar where that is nothing.
func TestPartSectors(t *testing.T) {
	qemu, instar := qemuImg72(t), program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, `
qemu-img create -q -f raw ref 1M
qemu-img create -q -f raw raw1000 1000
truncate -s 1000 raw1000
qemu-img create -q -f qcow2 data 2M
qemu-io -c 'write -P 7 0 1M' data
qemu-img create -q -f qcow2 full 2M
qemu-io -c 'write -P 7 0 1M' -c 'write -z 1M 64k' -c 'write -P 0 512k 64k' full
qemu-img create -q -f qcow2 packed 2M
qemu-io -c 'write -c -P 7 512k 64k' -c 'write -c -P 0 1M 64k' packed
qemu-img create -q -f qcow2 cut 2M
qemu-io -c 'write -P 7 0 1047k' cut
qemu-img create -q -f vhdx a.vhdx 2M
qemu-img snapshot -c snap data
`)
	sizes := map[string][]uint64{"data": {1<<20 + 1, 1<<20 + 300, 1<<20 + 511}, "full": {1<<20 + 100, 1<<19 + 1000}, "packed": {1<<20 + 1}, "cut": {1047<<10 + 1}, "a.vhdx": {1<<20 + 1, 511}}
	for base, list := range sizes {
		for _, size := range list {
			name := fmt.Sprintf("%s-%d", base, size)
			b, err := os.ReadFile(filepath.Join(dir, base))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
			format := "qcow2"
			if strings.HasSuffix(base, ".vhdx") {
				format = "vhdx"
				put(t, filepath.Join(dir, name), binary.LittleEndian, vhdxSize(t, b), size)
			} else {
				put(t, filepath.Join(dir, name), binary.BigEndian, qcow2Size, size)
			}
			lines := `info NAME
info --output=json NAME
check NAME
check --output=json NAME
measure -O raw NAME
compare NAME ref
compare ref NAME
convert -O qcow2 NAME out
info out
dd -O raw bs=64k if=NAME of=out
info out
`
			if format == "qcow2" {
				lines += `map NAME
map --output=json NAME
measure -O qcow2 NAME
check -r all NAME
`
			}
			compareLines(t, dir, "7.2", instar, qemu, strings.ReplaceAll(lines, "NAME", name))
			formattest.Script(t, dir, fmt.Sprintf("qemu-img convert -O raw %s theirs\n%s convert -O raw %[1]s ours\ncmp theirs ours", name, instar))
		}
	}
	compareLines(t, dir, "7.2", instar, qemu, `
info -f raw raw1000
map --output=json -f raw raw1000
measure -f raw -O raw raw1000
compare -f raw raw1000 ref
`)
}

// vhdxSize returns where a VHDX has its virtual size: the metadata table has the
// place of the item.
func vhdxSize(t *testing.T, b []byte) int64 {
	t.Helper()
	table := bytes.Index(b, []byte("metadata"))
	entry := bytes.Index(b, []byte("\x24\x42\xa5\x2f\x1b\xcd\x76\x48\xb2\x11\x5d\xbe\xd8\x3b\xf4\xb8"))
	if table < 0 || entry < table {
		t.Fatal("no item for the virtual size")
	}
	return int64(table) + int64(binary.LittleEndian.Uint32(b[entry+16:]))
}

// TestPartSectorKept: what an image holds in a part of a sector is not lost.
func TestPartSectorKept(t *testing.T) {
	instar := program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, `
qemu-img create -q -f qcow2 plain 2M
qemu-io -c 'write -P 7 0 2M' plain
qemu-img create -q -f qcow2 packed 2M
qemu-io -c 'write -c -P 7 1M 64k' packed
qemu-img create -q -f qcow2 -b plain -F qcow2 over
`)
	for _, name := range []string{"plain", "packed", "over"} {
		put(t, filepath.Join(dir, name), binary.BigEndian, qcow2Size, uint64(1<<20+100))
		if got := run(t, dir, instar, "info", name); !strings.Contains(got.Stdout, "(1048676 bytes)") {
			t.Errorf("%s: %+v", name, got)
		}
		if got := run(t, dir, instar, "convert", "-O", "raw", name, "out"); got.Code != 0 {
			t.Fatalf("%s: %+v", name, got)
		}
		b, err := os.ReadFile(filepath.Join(dir, "out"))
		if err != nil {
			t.Fatal(err)
		}
		if want := append(bytes.Repeat([]byte{7}, 100), make([]byte, 412)...); len(b) != 1<<20+512 || !bytes.Equal(b[1<<20:], want) {
			t.Errorf("%s: %d bytes, the last % x", name, len(b), b[len(b)-512:])
		}
	}
}

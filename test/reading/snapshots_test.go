//go:build linux

package reading

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk/formattest"
)

// TestDamagedSnapshotTable reads and repairs images whose snapshot table is cut, or
// outside the file, or says absurd things.
func TestDamagedSnapshotTable(t *testing.T) {
	qemu, instar := qemuImg72(t), program(t)
	dir := t.TempDir()
	formattest.Script(t, dir, `
qemu-img create -q -f qcow2 good 1M
qemu-io -c 'write -P 7 0 128k' good
qemu-img snapshot -c one good
qemu-img snapshot -c two good
`)
	good, err := os.ReadFile(filepath.Join(dir, "good"))
	if err != nil {
		t.Fatal(err)
	}
	const atCount, atTable = 60, 64
	table := int64(binary.BigEndian.Uint64(good[atTable:]))
	type number struct {
		off   int64
		value any
	}
	for _, c := range []struct {
		name   string
		length int64 // 0: as it is
		put    []number
		fails  bool // not repaired by qemu-img
		behind bool // the end of the file: instar only checks and repairs that
	}{
		{name: "past", put: []number{{atTable, uint64(1 << 30)}}, behind: true},
		{name: "far", put: []number{{atTable, uint64(1 << 62)}}, fails: true, behind: true}, // it leaves a leak
		{name: "beyond all files", put: []number{{atTable, uint64(1<<63 - 1<<16)}}, fails: true, behind: true},
		{name: "not aligned", put: []number{{atTable, uint64(table + 512)}}, fails: true},
		{name: "cut in an entry", length: table + 60},
		{name: "cut in the first", length: table + 10},
		{name: "cut before", length: table, behind: true},
		{name: "one more", put: []number{{atCount, uint32(3)}}},
		{name: "fewer", put: []number{{atCount, uint32(1)}}},
		{name: "too many", put: []number{{atCount, uint32(65537)}}, fails: true}, // it fails
		{name: "much extra data", put: []number{{table + 36, uint32(1025)}}},
		{name: "wrong extra data", put: []number{{table + 36, uint32(1024)}}},
		{name: "no extra data", put: []number{{table + 36, uint32(0)}}},
		{name: "long names", put: []number{{table + 12, uint32(0xffffffff)}}},
		{name: "too long", put: []number{{atCount, uint32(3000)}, {table + 12, uint32(0xffffffff)}, {table + 36, uint32(1 << 31)}}, fails: true},
		{name: "L1 table not aligned", put: []number{{table, uint64(513)}}, fails: true},
		{name: "L1 table far", put: []number{{table, uint64(1 << 62)}}, fails: true},
		{name: "L1 table of 4 G entries", put: []number{{table + 8, uint32(0xffffffff)}}, fails: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			fresh := func() {
				b := good
				if c.length != 0 {
					b = good[:c.length]
				}
				if err := os.WriteFile(filepath.Join(dir, "x"), b, 0o600); err != nil {
					t.Fatal(err)
				}
				for _, n := range c.put {
					put(t, filepath.Join(dir, "x"), binary.BigEndian, n.off, n.value)
				}
			}
			fresh()
			compareLines(t, dir, "7.2", instar, qemu, `
code check x
code check --output=json x
`)
			if c.behind {
				for _, line := range []string{"info x", "map x", "measure -O raw x", "convert -O raw x y", "convert -O raw -l one x y"} {
					got := runAs(t, dir, "7.2", append([]string{instar}, strings.Fields(line)...)...)
					if got.Code != 1 || !strings.Contains(got.Stderr, "snapshot table at 0x") {
						t.Errorf("%s: %+v", line, got)
					}
				}
			} else {
				compareLines(t, dir, "7.2", instar, qemu, `
info x
info --output=json x
map --output=json x
measure -O raw x
convert -O raw -l no x y
code convert -O raw -l one x y
code convert -O raw -l 2 x y
convert -O raw x y
`)
			}
			if c.fails {
				return
			}
			var infos []outcome
			for _, program := range []string{"qemu-img", instar} {
				fresh()
				if got := runAs(t, dir, "7.2", program, "check", "-r", "all", "x"); got.Code != 0 {
					t.Errorf("%s: %+v", program, got)
				}
				oracle := runAs(t, dir, "7.2", "qemu-img", "info", "x")
				var lines []string
				for line := range strings.Lines(oracle.Stdout) {
					if !strings.HasPrefix(line, "disk size:") {
						lines = append(lines, line)
					}
				}
				oracle.Stdout = strings.Join(lines, "")
				infos = append(infos, oracle)
			}
			if diff := cmp.Diff(infos[0], infos[1]); diff != "" {
				t.Errorf("repaired (-qemu-img +instar):\n%s", diff)
			}
		})
	}
}

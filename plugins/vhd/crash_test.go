package vhd

import (
	"bytes"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// A crash while an image with content is written leaves an image that opens, in
// which what was not written is as it was, and what was written is old or new.
func TestCrashWhileWriting(t *testing.T) {
	dir := t.TempDir()
	base := formattest.Create(t, New(), dir, "base.vhd", 1<<20, "block_size=64k")
	size := formattest.Open(t, New(), base, false).Info.VirtualSize
	formattest.Write(t, New(), base, map[int64][]byte{0: bytes.Repeat([]byte{1}, int(size))}, false)
	below := formattest.Open(t, New(), base, false).Read(0, size)

	for name, path := range map[string]string{
		"dynamic":      formattest.Create(t, New(), dir, "dynamic.vhd", 1<<20, "block_size=64k"),
		"differencing": formattest.Create(t, New(), dir, "child.vhd", formattest.NoSize, "block_size=64k,backing_file=base.vhd"),
	} {
		t.Run(name, func(t *testing.T) {
			formattest.Write(t, New(), path, map[int64][]byte{64 << 10: bytes.Repeat([]byte{2}, 8192), 300 << 10: bytes.Repeat([]byte{2}, 4096)}, false)
			states := formattest.Overwrite{
				Format: New(), Before: read(t, path), Below: below,
				Runs: []sdk.Run{
					{Offset: 4096, Length: 4096},           // a new block
					{Offset: 64<<10 + 4096, Length: 8192},  // over old sectors and new ones of an old block
					{Offset: 512 << 10, Length: 128 << 10}, // whole new blocks
				},
				Zeros: sdk.Run{Offset: 302 << 10, Length: 2 << 10},
			}.Crashes(t, func(formattest.Crash) {})
			if states < 20 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

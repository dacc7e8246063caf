package vhd

import (
	"bytes"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// footerGone is what check says while new blocks lie over the trailing footer, for
// which the first copy stands in.
const footerGone = "ERROR the footer at the end of the file is missing, damaged or differs from the first copy"

// wantSound wants nothing to be wrong with what a crash left but the trailing
// footer. Blocks may be lost.
func wantSound(t *testing.T, c formattest.Crash) {
	t.Helper()
	r, found, err := formattest.CheckState(New(), c.State)
	if err != nil || r.CheckErrors > 0 {
		t.Errorf("%s: check: %+v, %v %.300q", c.What, r, err, found)
	}
	for _, text := range found {
		if text != footerGone && !strings.HasPrefix(text, "Leaked space of ") {
			t.Errorf("%s: check: %s", c.What, text)
		}
	}
}

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
			}.Crashes(t, func(c formattest.Crash) { wantSound(t, c) })
			if states < 100 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

// A process that is killed while it fills a new image leaves one that is sound but
// for its trailing footer.
func TestCrashWhileConverting(t *testing.T) {
	for _, options := range []string{"block_size=64k", "subformat=fixed"} {
		t.Run(options, func(t *testing.T) {
			states := formattest.Fresh{Format: New(), Options: options, Size: 1 << 20}.Crashes(t, func(c formattest.Crash, made bool) {
				if made && !c.Lost {
					wantSound(t, c)
				}
			})
			if states < 20 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

package vmdk

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// A crash while an image with content is written leaves an image in which what was
// not written is as it was, and what was written is old or new. The two copies of
// a grain table may differ then, which check counts as a corruption.
func TestWriteCrash(t *testing.T) {
	for _, options := range []string{"grain_size=8k", "grain_size=8k,zeroed_grain=on"} {
		t.Run(options, func(t *testing.T) {
			path := formattest.Create(t, New(), t.TempDir(), "a.vmdk", 1<<20, options)
			formattest.Write(t, New(), path, map[int64][]byte{0: bytes.Repeat([]byte{1}, 100<<10), 300 << 10: bytes.Repeat([]byte{2}, 64<<10)}, false)
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			states := formattest.Overwrite{
				Format: New(), Before: before,
				Runs: []sdk.Run{
					{Offset: 800 << 10, Length: 48 << 10}, // new grains
					{Offset: 96 << 10, Length: 16 << 10},  // old and new ones
					{Offset: 512 << 10, Length: 8 << 10},
				},
				Zeros: sdk.Run{Offset: 304 << 10, Length: 16 << 10},
			}.Crashes(t, func(c formattest.Crash) {
				r, found, err := formattest.CheckState(New(), c.State)
				if err != nil || r.CheckErrors > 0 {
					t.Errorf("%s: check: %+v, %v", c.What, r, err)
				}
				for _, text := range found {
					if !strings.Contains(text, "redundant") {
						t.Errorf("%s: check: %s", c.What, text)
					}
				}
			})
			if states < 10 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

package vmdk

import (
	"bytes"
	"os"
	"path/filepath"
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

// Extents of several files are written in place, each byte old or new.
func TestWriteCrashFlat(t *testing.T) {
	dir := t.TempDir()
	path := formattest.Create(t, New(), dir, "image.vmdk", 256<<10, "subformat=monolithicFlat")
	formattest.Write(t, New(), path, map[int64][]byte{0: bytes.Repeat([]byte{1}, 100<<10)}, false)
	var files [][]byte
	for _, name := range []string{"image.vmdk", "image-flat.vmdk"} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, b)
	}
	states := formattest.Overwrite{
		Format: New(), Before: files[0], Others: files[1:],
		Runs:  []sdk.Run{{Offset: 64 << 10, Length: 64 << 10}, {Offset: 200 << 10, Length: 8 << 10}},
		Zeros: sdk.Run{Offset: 4 << 10, Length: 4 << 10},
	}.Crashes(t, func(formattest.Crash) {})
	if states < 10 {
		t.Errorf("only %d states", states)
	}
}

// A process that is killed while it fills a new image, of one file or several,
// leaves one in which nothing is wrong but that two copies of a grain table differ.
// A stream has no tables before it is whole.
func TestConvertCrash(t *testing.T) {
	for _, options := range []string{
		"grain_size=8k", "grain_size=8k,zeroed_grain=on", "subformat=monolithicFlat", "subformat=twoGbMaxExtentSparse,grain_size=8k",
		"subformat=twoGbMaxExtentFlat", "subformat=streamOptimized,grain_size=8k",
	} {
		t.Run(options, func(t *testing.T) {
			stream := strings.Contains(options, "streamOptimized")
			states := formattest.Fresh{Format: New(), Options: options, Size: 512 << 10, Stream: stream}.Crashes(t, func(c formattest.Crash, made bool) {
				if !made || c.Lost || stream {
					return
				}
				r, found, err := formattest.CheckState(New(), c.State, c.Others...)
				if err != nil || r.CheckErrors > 0 {
					t.Errorf("%s: check: %+v, %v", c.What, r, err)
				}
				for _, text := range found {
					if !strings.Contains(text, "redundant") {
						t.Errorf("%s: check: %s", c.What, text)
					}
				}
			})
			if states < 20 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

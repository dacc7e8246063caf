package vmdk

import (
	"bytes"
	"context"
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
	ctx := context.Background()
	const size = 1 << 20
	open := func(file sdk.File, readWrite bool) (sdk.Image, error) {
		return New().Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}, ReadWrite: readWrite})
	}
	content := func(b []byte) ([]byte, error) {
		img, err := open(formattest.ReadOnly(formattest.MemFile(b)), false)
		if err != nil {
			return nil, err
		}
		extents, err := formattest.MapRange(ctx, img, 0, size)
		out := make([]byte, size)
		for _, e := range extents {
			if e.Kind == sdk.Data {
				copy(out[e.Offset:e.Offset+e.Length], b[min(e.HostOffset, int64(len(b))):])
			}
		}
		return out, err
	}
	for _, options := range []string{"grain_size=8k", "grain_size=8k,zeroed_grain=on"} {
		t.Run(options, func(t *testing.T) {
			path := formattest.Create(t, New(), t.TempDir(), "a.vmdk", size, options)
			formattest.Write(t, New(), path, map[int64][]byte{0: bytes.Repeat([]byte{1}, 100<<10), 300 << 10: bytes.Repeat([]byte{2}, 64<<10)}, false)
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			old, err := content(before)
			if err != nil {
				t.Fatal(err)
			}
			new := bytes.Clone(old)

			var log formattest.Recorder
			file := log.File(formattest.MemFile(bytes.Clone(before)))
			img, err := open(file, true)
			if err != nil {
				t.Fatal(err)
			}
			w := img.(sdk.Writer)
			if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
				t.Fatal(err)
			}
			for _, run := range []sdk.Run{
				{Offset: 800 << 10, Length: 48 << 10}, // new grains
				{Offset: 96 << 10, Length: 16 << 10},  // old and new ones
				{Offset: 512 << 10, Length: 8 << 10},
			} {
				places, err := w.Place(ctx, []sdk.Run{run})
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range places {
					if _, err := file.WriteAt(bytes.Repeat([]byte{3}, int(p.Length)), p.HostOffset); err != nil {
						t.Fatal(err)
					}
				}
				copy(new[run.Offset:], bytes.Repeat([]byte{3}, int(run.Length)))
			}
			zeros := sdk.Run{Offset: 304 << 10, Length: 16 << 10}
			if err := w.Zero(ctx, []sdk.Run{zeros}); err != nil {
				t.Fatal(err)
			}
			clear(new[zeros.Offset : zeros.Offset+zeros.Length])
			if err := w.Finish(ctx); err != nil {
				t.Fatal(err)
			}

			states, last := 0, []byte(nil)
			log.Crashes(before, func(what string, state []byte) {
				states++
				got, err := content(state)
				if err != nil {
					t.Errorf("%s: %v", what, err)
					return
				}
				for i := range got {
					if got[i] != old[i] && got[i] != new[i] {
						t.Errorf("%s: byte %#x is %d, was %d and became %d", what, i, got[i], old[i], new[i])
						return
					}
				}
				img, err := open(formattest.ReadOnly(formattest.MemFile(state)), false)
				if err != nil {
					t.Errorf("%s: %v", what, err)
					return
				}
				var found []string
				r, err := img.(sdk.Checker).Check(ctx, sdk.CheckRequest{Message: func(s string) { found = append(found, s) }})
				if err != nil || r.CheckErrors > 0 {
					t.Errorf("%s: check: %+v, %v", what, r, err)
				}
				for _, text := range found {
					if !strings.Contains(text, "redundant") {
						t.Errorf("%s: check: %s", what, text)
					}
				}
				if !strings.Contains(what, "without") {
					last = got
				}
			})
			if !bytes.Equal(last, new) {
				t.Error("nothing lost, and yet the content is not the new one")
			}
			if states < 10 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

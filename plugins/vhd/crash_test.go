package vhd

import (
	"bytes"
	"context"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// A crash while an image with content is written leaves an image that opens, in
// which what was not written is as it was, and what was written is old or new.
func TestCrashWhileWriting(t *testing.T) {
	ctx := context.Background()
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
			before := read(t, path)
			content := func(b []byte) ([]byte, error) {
				files := []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.ReadOnly(formattest.MemFile(b))}}
				img, err := New().Open(ctx, sdk.OpenRequest{Files: files})
				if err != nil {
					return nil, err
				}
				extents, err := formattest.MapRange(ctx, img, 0, size)
				out := make([]byte, size)
				for _, e := range extents {
					switch e.Kind {
					case sdk.Absent:
						copy(out[e.Offset:], below[e.Offset:e.Offset+e.Length])
					case sdk.Data:
						copy(out[e.Offset:e.Offset+e.Length], b[min(e.HostOffset, int64(len(b))):])
					}
				}
				return out, err
			}
			old, err := content(before)
			if err != nil {
				t.Fatal(err)
			}
			new := bytes.Clone(old)

			var log formattest.Recorder
			file := log.File(formattest.MemFile(bytes.Clone(before)))
			img, err := New().Open(ctx, sdk.OpenRequest{ReadWrite: true, Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}})
			if err != nil {
				t.Fatal(err)
			}
			w := img.(sdk.Writer)
			if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
				t.Fatal(err)
			}
			for _, run := range []sdk.Run{
				{Offset: 4096, Length: 4096},           // a new block
				{Offset: 64<<10 + 4096, Length: 8192},  // over old sectors and new ones of an old block
				{Offset: 512 << 10, Length: 128 << 10}, // whole new blocks
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
			zeros := sdk.Run{Offset: 302 << 10, Length: 2 << 10}
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
				if what[:6] == "after " && !bytes.Contains([]byte(what), []byte("without")) {
					last = got
				}
			})
			if !bytes.Equal(last, new) {
				t.Error("nothing lost, and yet the content is not the new one")
			}
			if states < 20 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

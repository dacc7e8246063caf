package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// memory is an image in memory, with what a crash test asks of it.
type memory []byte

func (b memory) open(t *testing.T, file sdk.File, readWrite bool) (sdk.Image, error) {
	t.Helper()
	return New().Open(context.Background(), sdk.OpenRequest{
		Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}, ReadWrite: readWrite, Check: true,
	})
}

// content returns what the guest reads.
func (b memory) content(t *testing.T) ([]byte, error) {
	t.Helper()
	img, err := b.open(t, formattest.ReadOnly(formattest.MemFile(b)), false)
	if err != nil {
		return nil, err
	}
	info, err := img.Info(context.Background())
	if err != nil {
		return nil, err
	}
	out := make([]byte, info.VirtualSize)
	extents, err := formattest.MapRange(context.Background(), img, 0, info.VirtualSize)
	if err != nil {
		return nil, err
	}
	for _, e := range extents {
		dst := out[e.Offset : e.Offset+e.Length]
		switch e.Kind {
		case sdk.Data:
			copy(dst, b[min(e.HostOffset, int64(len(b))):])
		case sdk.Encoded:
			if err := img.(sdk.Decoder).Decode(context.Background(), e, dst); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// check returns what a check counts, without repair.
func (b memory) check(t *testing.T) (*sdk.CheckResult, string) {
	t.Helper()
	img, err := b.open(t, formattest.ReadOnly(formattest.MemFile(b)), false)
	if err != nil {
		return nil, err.Error()
	}
	var found []string
	r, err := img.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Message: func(s string) { found = append(found, s) }})
	if err != nil {
		return nil, err.Error()
	}
	return r, strings.Join(found, "; ")
}

// written is an image of 1 MiB with data, compressed data and a snapshot.
func written(t *testing.T, options string) memory {
	t.Helper()
	path := formattest.Create(t, New(), t.TempDir(), "a.qcow2", 1<<20, options)
	formattest.Write(t, New(), path, map[int64][]byte{0: bytes.Repeat([]byte{1}, 100<<10), 300 << 10: bytes.Repeat([]byte{2}, 64<<10)}, false)
	formattest.Write(t, New(), path, map[int64][]byte{512 << 10: bytes.Repeat([]byte{4}, 64<<10)}, true)
	formattest.Oracle(t, "qemu-img", "snapshot", "-c", "one", path)
	formattest.Write(t, New(), path, map[int64][]byte{64 << 10: bytes.Repeat([]byte{5}, 8<<10)}, false)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// A crash while an image with content is written leaves an image without
// corruptions, in which what was not written is as it was, and what was written
// is old or new. Clusters may be lost until a repair.
func TestWriteCrash(t *testing.T) {
	ctx := context.Background()
	for _, options := range []string{"cluster_size=4k", "cluster_size=512", "cluster_size=16k,extended_l2=on", "cluster_size=4k,compat=0.10"} {
		t.Run(options, func(t *testing.T) {
			before := written(t, options)
			old, err := before.content(t)
			if err != nil {
				t.Fatal(err)
			}
			new := bytes.Clone(old)

			var log formattest.Recorder
			file := log.File(formattest.MemFile(bytes.Clone(before)))
			img, err := before.open(t, file, true)
			if err != nil {
				t.Fatal(err)
			}
			w := img.(sdk.Writer)
			if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
				t.Fatal(err)
			}
			for _, run := range []sdk.Run{
				{Offset: 800 << 10, Length: 48 << 10}, // new clusters
				{Offset: 0, Length: 32 << 10},         // which the snapshot has too
				{Offset: 64 << 10, Length: 16 << 10},  // partly its own already
				{Offset: 512 << 10, Length: 32 << 10}, // compressed ones
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
			states := crashes(t, &log, before, old, new)
			if states < 20 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

// crashes checks every state that a crash could have left, and that without one
// the content is the new one. It returns how many there were.
func crashes(t *testing.T, log *formattest.Recorder, before memory, old, new []byte) int {
	t.Helper()
	states := 0
	var last []byte
	log.Crashes(before, func(what string, state []byte) {
		states++
		got, err := memory(state).content(t)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		for i := range got {
			if got[i] != old[i] && got[i] != new[i] {
				t.Errorf("%s: byte %#x is %d, was %d and became %d", what, i, got[i], old[i], new[i])
				break
			}
		}
		if r, found := memory(state).check(t); r == nil || r.Corruptions > 0 || r.CheckErrors > 0 {
			t.Errorf("%s: %+v %.300s", what, r, found)
		}
		if !strings.Contains(what, "without") {
			last = got
		}
	})
	if !bytes.Equal(last, new) {
		t.Error("nothing lost, and yet the content is not the new one")
	}
	return states
}

// A crash during a repair leaves the content as it was, and an image that the
// next repair can deal with.
func TestRepairCrash(t *testing.T) {
	ctx := context.Background()
	for _, fix := range []sdk.Fix{sdk.FixLeaks, sdk.FixAll} {
		before := spoil(written(t, "cluster_size=4k"), fix == sdk.FixAll)
		old, err := before.content(t)
		if err != nil {
			t.Fatal(err)
		}
		first, found := before.check(t)
		if first == nil || first.Leaks == 0 || fix == sdk.FixAll && first.Corruptions == 0 {
			t.Fatalf("the damage shows as %+v %s", first, found)
		}
		repair := func(file sdk.File) error {
			img, err := before.open(t, file, true)
			if err != nil {
				return err
			}
			r, err := img.(sdk.Checker).Check(ctx, sdk.CheckRequest{Fix: fix, Message: func(string) {}})
			if err == nil && (r.Leaks > 0 || r.Corruptions > 0) {
				t.Errorf("left after the repair: %+v", r)
			}
			return err
		}
		var log formattest.Recorder
		if err := repair(log.File(formattest.MemFile(bytes.Clone(before)))); err != nil {
			t.Fatal(err)
		}
		states := 0
		log.Crashes(before, func(what string, state []byte) {
			states++
			got, err := memory(state).content(t)
			if err != nil || !bytes.Equal(got, old) {
				t.Errorf("fix %v, %s: content differs (%v)", fix, what, err)
			}
			if err := repair(formattest.MemFile(state)); err != nil {
				t.Errorf("fix %v, %s: second repair: %v", fix, what, err)
			}
		})
		if states < 2 {
			t.Errorf("only %d states", states)
		}
	}
}

// spoil appends clusters that nothing uses and, where it may not only leak,
// miscounts used ones.
func spoil(b memory, corrupt bool) memory {
	table := binary.BigEndian.Uint64(b[48:])
	block := int(binary.BigEndian.Uint64(b[table:]))
	used := len(b) / 4096
	b = append(b, make([]byte, 3*4096)...)
	for i := used; i < used+3; i++ {
		binary.BigEndian.PutUint16(b[block+2*i:], 1)
	}
	if corrupt {
		for i := used - 3; i < used; i++ {
			b[block+2*i+1] ^= 1
		}
	}
	return b
}

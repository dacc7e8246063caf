package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// written is an image of 1 MiB with data, compressed data and a snapshot.
func written(t *testing.T, options string) []byte {
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
	for _, c := range []struct {
		options    string
		compressed bool
	}{
		{"cluster_size=4k", false}, {"cluster_size=512", false}, {"cluster_size=16k,extended_l2=on", false},
		{"cluster_size=4k,compat=0.10", false}, {"cluster_size=4k", true}, {"cluster_size=4k,compat=0.10", true},
	} {
		t.Run(fmt.Sprint(c.options, " compressed ", c.compressed), func(t *testing.T) {
			states := formattest.Overwrite{
				Format: New(), Before: written(t, c.options), Compressed: c.compressed,
				Runs: []sdk.Run{
					{Offset: 800 << 10, Length: 48 << 10}, // new clusters
					{Offset: 0, Length: 32 << 10},         // which the snapshot has too
					{Offset: 64 << 10, Length: 16 << 10},  // partly its own already
					{Offset: 512 << 10, Length: 32 << 10}, // compressed ones
				},
				Zeros: sdk.Run{Offset: 304 << 10, Length: 16 << 10},
			}.Crashes(t, func(c formattest.Crash) {
				r, found, err := formattest.CheckState(New(), c.State)
				if err != nil || r.Corruptions > 0 || r.CheckErrors > 0 {
					t.Errorf("%s: check: %+v, %v %.300q", c.What, r, err, found)
				}
			})
			if states < 20 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

// A process that is killed while it fills a new image leaves one without
// corruptions.
func TestConvertCrash(t *testing.T) {
	for _, c := range []struct {
		options    string
		compressed bool
	}{
		{"cluster_size=4k", false}, {"cluster_size=16k,extended_l2=on", false}, {"cluster_size=4k,compat=0.10", false},
		{"cluster_size=4k", true}, {"cluster_size=4k,preallocation=metadata", false},
	} {
		t.Run(fmt.Sprint(c.options, " compressed ", c.compressed), func(t *testing.T) {
			states := formattest.Fresh{Format: New(), Options: c.options, Size: 256 << 10, Compressed: c.compressed}.Crashes(t, func(c formattest.Crash, made bool) {
				if !made || c.Lost {
					return
				}
				r, found, err := formattest.CheckState(New(), c.State, c.Others...)
				if err != nil || r.Corruptions > 0 || r.CheckErrors > 0 {
					t.Errorf("%s: check: %+v, %v %.300q", c.What, r, err, found)
				}
			})
			if states < 20 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

// A crash during a repair leaves the content as it was, and an image that the
// next repair can deal with.
func TestRepairCrash(t *testing.T) {
	ctx := context.Background()
	for _, fix := range []sdk.Fix{sdk.FixLeaks, sdk.FixAll} {
		before := spoil(written(t, "cluster_size=4k"), fix == sdk.FixAll)
		old, err := formattest.ReadState(New(), nil, before)
		if err != nil {
			t.Fatal(err)
		}
		first, found, err := formattest.CheckState(New(), before)
		if err != nil || first.Leaks == 0 || fix == sdk.FixAll && first.Corruptions == 0 {
			t.Fatalf("the damage shows as %+v %q, %v", first, found, err)
		}
		repair := func(file sdk.File) error {
			img, err := New().Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}, ReadWrite: true, Check: true})
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
		log.Crashes(func(c formattest.Crash) {
			states++
			got, err := formattest.ReadState(New(), nil, c.State)
			if err != nil || !bytes.Equal(got, old) {
				t.Errorf("fix %v, %s: content differs (%v)", fix, c.What, err)
			}
			if err := repair(formattest.MemFile(c.State)); err != nil {
				t.Errorf("fix %v, %s: second repair: %v", fix, c.What, err)
			}
		})
		if states < 2 {
			t.Errorf("only %d states", states)
		}
	}
}

// spoil appends clusters that nothing uses and, where it may not only leak,
// miscounts used ones.
func spoil(b []byte, corrupt bool) []byte {
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

package vhdx

import (
	"bytes"
	"context"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

const replayText = "VHDX image contains a log that needs to be replayed.  To replay the log, check it with -r all."

// checkState wants nothing to be wrong with what a crash left, but that the log
// must be replayed, and returns whether it must.
func checkState(t *testing.T, c formattest.Crash) (dirty bool) {
	t.Helper()
	r, found, err := formattest.CheckState(New(), c.State)
	dirty = len(found) == 1 && found[0] == replayText
	if err != nil || !dirty && *r != (sdk.CheckResult{}) || dirty && *r != (sdk.CheckResult{Corruptions: 1}) {
		t.Errorf("%s: check: %+v %q, %v", c.What, r, found, err)
	}
	return dirty
}

// TestWriteCrash stops writing into an image that holds something after every
// step. Blocks that were there are overwritten in place, so only new ones are
// written here: the table is the old one or the new one.
func TestWriteCrash(t *testing.T) {
	ctx := context.Background()
	old := small(t, "")
	var log formattest.Recorder
	file := log.File(formattest.MemFile(bytes.Clone(old)))
	img, err := New().Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}, ReadWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	w := img.(sdk.Writer)
	if _, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err != nil {
		t.Fatal(err)
	}
	for _, block := range []int64{0, 3} {
		places, err := w.Place(ctx, []sdk.Run{{Offset: block * mib, Length: mib}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := file.WriteAt(bytes.Repeat([]byte{byte(0xa0 + block)}, mib), places[0].HostOffset); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	before := make([]byte, 4*mib)
	copy(before[mib:], bytes.Repeat([]byte{0x11}, mib))
	after := bytes.Clone(before)
	copy(after, bytes.Repeat([]byte{0xa0}, mib))
	copy(after[3*mib:], bytes.Repeat([]byte{0xa3}, mib))
	seen := map[string]int{}
	log.Crashes(func(c formattest.Crash) {
		got, err := formattest.ReadState(New(), nil, c.State)
		if err != nil {
			t.Fatalf("%s: %v", c.What, err)
		}
		switch {
		case bytes.Equal(got, before):
			seen["old"]++
		case bytes.Equal(got, after):
			seen["new"]++
		default:
			t.Fatal("neither the old content nor the new one")
		}
		if checkState(t, c) {
			seen["dirty"]++
		}
	})
	for _, s := range []string{"old", "new", "dirty"} {
		if seen[s] == 0 {
			t.Errorf("no crash left the %s state: %v", s, seen)
		}
	}
}

// A crash while an image is made and filled leaves one that is valid from the
// moment it was made.
func TestConvertCrash(t *testing.T) {
	for _, options := range []string{"block_size=1M,log_size=1M", "block_size=1M,log_size=1M,subformat=fixed"} {
		t.Run(options, func(t *testing.T) {
			states := formattest.Fresh{Format: New(), Options: options, Size: 6 * mib}.Crashes(t, func(c formattest.Crash, made bool) {
				if made && !c.Lost && checkState(t, c) {
					t.Errorf("%s: a new image has a log", c.What)
				}
			})
			if states < 20 {
				t.Errorf("only %d states", states)
			}
		})
	}
}

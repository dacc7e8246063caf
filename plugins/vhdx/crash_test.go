package vhdx

import (
	"bytes"
	"context"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

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
	log.Crashes(old, func(c formattest.Crash) {
		path := save(t, c.State)
		o := formattest.Open(t, New(), path, false)
		got := o.Read(0, 4*mib)
		switch {
		case bytes.Equal(got, before):
			seen["old"]++
		case bytes.Equal(got, after):
			seen["new"]++
		default:
			t.Fatal("neither the old content nor the new one")
		}
		if o.Info.Dirty {
			seen["dirty"]++
		} else if res, messages := check(t, path, sdk.FixNone); *res != (sdk.CheckResult{}) {
			t.Fatalf("check: %+v %q", res, messages)
		}
	})
	for _, s := range []string{"old", "new", "dirty"} {
		if seen[s] == 0 {
			t.Errorf("no crash left the %s state: %v", s, seen)
		}
	}
}

// TestConvertCrash stops writing into a new image after every step: it is valid
// all the time.
func TestConvertCrash(t *testing.T) {
	ctx := context.Background()
	path := formattest.Create(t, New(), t.TempDir(), "a", 4*mib, "block_size=1M")
	old := readFile(t, path)
	var log formattest.Recorder
	file := log.File(formattest.MemFile(bytes.Clone(old)))
	img, err := New().Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}, ReadWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	w := img.(sdk.Writer)
	info, err := w.BeginWrite(ctx, sdk.WriteRequest{})
	if err != nil || !info.ReadsZero || info.Unit != mib {
		t.Fatalf("%+v, %v", info, err)
	}
	if _, err := w.Place(ctx, []sdk.Run{{Offset: 0, Length: 2 * mib}, {Offset: 3 * mib, Length: mib}}); err != nil {
		t.Fatal(err)
	}
	if err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	prefixes := 0
	log.Crashes(old, func(c formattest.Crash) {
		if c.Lost {
			return // nothing to lose in a new file
		}
		prefixes++
		if res, messages := check(t, save(t, c.State), sdk.FixNone); *res != (sdk.CheckResult{}) {
			t.Errorf("%s: %+v %q", c.What, res, messages)
		}
	})
	if prefixes < 5 {
		t.Errorf("only %d states", prefixes)
	}
}

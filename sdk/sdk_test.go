package sdk

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
)

func TestParallelCallsEachOnce(t *testing.T) {
	var calls [1000]atomic.Int32
	if err := Parallel(len(calls), func(i int) error { calls[i].Add(1); return nil }); err != nil {
		t.Fatal(err)
	}
	for i := range calls {
		if n := calls[i].Load(); n != 1 {
			t.Errorf("%d was called %d times", i, n)
		}
	}
	first := errors.New("first")
	err := Parallel(50, func(i int) error {
		switch i {
		case 7:
			return first
		case 30:
			return errors.New("another")
		}
		return nil
	})
	if !errors.Is(err, first) {
		t.Errorf("the error is %v, want that of the lowest index", err)
	}
	if err := Parallel(0, func(int) error { return first }); err != nil {
		t.Error(err)
	}
}

func TestDiscard(t *testing.T) {
	name := filepath.Join(t.TempDir(), "full")
	full := bytes.Repeat([]byte{7}, 1<<20)
	if err := os.WriteFile(name, full, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if OnDevice(NewFile(f)) {
		t.Error("a file is taken for a device")
	}
	if !Discard(NewFile(f), 5000, 900000) {
		t.Skip("holes cannot be punched into files here")
	}
	clear(full[5000:905000])
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, full) {
		t.Errorf("more or less than the range reads as zeros (%v)", err)
	}
	if Discard(struct{ File }{NewFile(f)}, 0, 1) {
		t.Error("what is no file of the system is said to be discarded")
	}
}

func TestReadAtMost(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("0123456789"), 0o644); err != nil {
		t.Fatal(err)
	}
	osf, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer osf.Close()
	f := NewFile(osf)
	if b, err := ReadAtMost(f, "table", 2, 3, 8); err != nil || string(b) != "234" {
		t.Errorf("%q, %v", b, err)
	}
	for _, r := range [][3]int64{{0, 9, 8}, {0, -1, 8}, {-1, 1, 8}, {8, 3, 8}, {11, 0, 8}, {1 << 62, 1, 8}} {
		if b, err := ReadAtMost(f, "table", r[0], r[1], r[2]); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%v: %q, %v", r, b, err)
		}
	}
}

// plain implements no optional interface, remote says which it has.
type plain struct{ Image }

type remote struct {
	plain
	checks bool
}

func (remote) Check(context.Context, CheckRequest) (*CheckResult, error) { return nil, nil }

func (r remote) Supports(iface any) bool {
	_, ok := iface.(*Checker)
	return ok && r.checks
}

func TestAs(t *testing.T) {
	if _, ok := As[Checker](plain{}); ok {
		t.Error("an image without Check is a Checker")
	}
	if _, ok := As[Checker](remote{checks: true}); !ok {
		t.Error("an image that supports Check is no Checker")
	}
	if _, ok := As[Checker](remote{}); ok {
		t.Error("an image that says it cannot check is a Checker")
	}
}

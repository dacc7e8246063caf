package vhdx

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// recorder remembers what is done to a file.
type recorder struct {
	sdk.File
	ops []op
}

// op is a write, a truncation (data nil), or a sync.
type op struct {
	off  int64
	data []byte
	sync bool
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	r.ops = append(r.ops, op{off: off, data: bytes.Clone(p)})
	return r.File.WriteAt(p, off)
}

func (r *recorder) Truncate(size int64) error {
	r.ops = append(r.ops, op{off: size})
	return r.File.Truncate(size)
}

func (r *recorder) Sync() error {
	r.ops = append(r.ops, op{sync: true})
	return r.File.Sync()
}

func (o op) apply(b []byte) []byte {
	switch {
	case o.sync:
	case o.data == nil && o.off < int64(len(b)):
		b = b[:o.off]
	case o.data == nil:
		b = append(b, make([]byte, o.off-int64(len(b)))...)
	default:
		if end := int(o.off) + len(o.data); end > len(b) {
			b = append(b, make([]byte, end-len(b))...)
		}
		copy(b[o.off:], o.data)
	}
	return b
}

// crashes calls f with what old may be after a crash: every prefix of what was
// done, and every prefix without one write since the last sync, and without all
// but the last.
func (r *recorder) crashes(old []byte, f func([]byte)) {
	synced := 0
	for n := range len(r.ops) + 1 {
		if n > 0 && r.ops[n-1].sync {
			synced = n
		}
		state := func(skip func(i int) bool) {
			b := bytes.Clone(old)
			for i, o := range r.ops[:n] {
				if i >= synced && o.data != nil && skip(i) {
					continue
				}
				b = o.apply(b)
			}
			f(b)
		}
		state(func(int) bool { return false })
		for lost := synced; lost < n-1; lost++ {
			state(func(i int) bool { return i == lost })
		}
		if n-synced > 2 {
			state(func(i int) bool { return i < n-1 })
		}
	}
}

// TestWriteCrash stops writing into an image that holds something after every
// step. Blocks that were there are overwritten in place, so only new ones are
// written here: the table is the old one or the new one.
func TestWriteCrash(t *testing.T) {
	ctx := context.Background()
	old := small(t, "")
	rec := &recorder{File: formattest.MemFile(bytes.Clone(old))}
	img, err := New().Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: rec}}, ReadWrite: true})
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
		if _, err := rec.WriteAt(bytes.Repeat([]byte{byte(0xa0 + block)}, mib), places[0].HostOffset); err != nil {
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
	rec.crashes(old, func(state []byte) {
		path := save(t, state)
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
	rec := &recorder{File: formattest.MemFile(bytes.Clone(old))}
	img, err := New().Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: rec}}, ReadWrite: true})
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
	for n := range len(rec.ops) + 1 {
		b := bytes.Clone(old)
		for _, o := range rec.ops[:n] {
			b = o.apply(b)
		}
		if res, messages := check(t, save(t, b), sdk.FixNone); *res != (sdk.CheckResult{}) {
			t.Errorf("after %d steps: %+v %q", n, res, messages)
		}
	}
	if len(rec.ops) < 4 {
		t.Errorf("only %s", fmt.Sprint(len(rec.ops)))
	}
}

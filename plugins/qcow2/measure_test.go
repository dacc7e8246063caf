package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

type qemuMeasure struct {
	Required int64  `json:"required"`
	Fully    int64  `json:"fully-allocated"`
	Bitmaps  *int64 `json:"bitmaps"`
}

func measureByQemu(t *testing.T, args ...string) (m qemuMeasure) {
	t.Helper()
	out := formattest.Oracle(t, "qemu-img", append([]string{"measure", "--output=json", "-O", "qcow2"}, args...)...)
	if err := json.Unmarshal([]byte(out), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func measure(t *testing.T, size int64, opts string, req sdk.MeasureRequest) sdk.MeasureResult {
	t.Helper()
	p, err := formattest.TryPlan(t, New(), t.TempDir(), "a", size, opts, nil)
	if err != nil {
		t.Fatal(err)
	}
	m, err := p.(sdk.Measurer).Measure(context.Background(), req)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestMeasureEqualsQemu(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 3))
	for range 60 {
		bits := 9 + r.IntN(13)
		opts := fmt.Sprintf("cluster_size=%d,refcount_bits=%d", 1<<bits, 1<<r.IntN(7))
		if bits >= 14 && r.IntN(2) == 0 {
			opts += ",extended_l2=on"
		}
		opts += []string{"", ",preallocation=metadata", ",preallocation=falloc", ",preallocation=full"}[r.IntN(4)]
		size := r.Int64N(1 << (bits + 22)) // the L1 table has room for twice that
		got := measure(t, size, opts, sdk.MeasureRequest{})
		want := measureByQemu(t, "-o", opts, "--size", fmt.Sprint(size))
		if got.Required != want.Required || got.FullyAllocated != want.Fully {
			t.Errorf("size %d, %s: %+v, qemu-img says %+v", size, opts, got, want)
		}
	}
}

func TestMeasureBitmaps(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "100G")
	for _, b := range [][2]string{{"one", "65536"}, {"a-longer-name-than-the-first", "512"}, {"third", "2M"}} {
		formattest.Oracle(t, "qemu-img", "bitmap", "--add", "-g", b[1], path, b[0])
	}
	// Marks the first one as being in use: the directory is behind the header's
	// extension, the flags behind table offset and size.
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	be := binary.BigEndian
	ext := bytes.Index(b, be.AppendUint32(nil, extBitmaps))
	b[be.Uint64(b[ext+8+16:])+15] |= bitmapInUse
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	req := sdk.MeasureRequest{Bitmaps: formattest.Open(t, New(), path, false).Info.Bitmaps}
	if !req.Bitmaps[0].Inconsistent || req.Bitmaps[1].Inconsistent {
		t.Fatalf("bitmaps %+v: the first one should be inconsistent", req.Bitmaps)
	}
	for _, opts := range []string{"cluster_size=64k", "cluster_size=4k", "cluster_size=2M"} {
		got, want := measure(t, 100<<30, opts, req), measureByQemu(t, "-o", opts, path)
		if want.Bitmaps == nil || got.Bitmaps != *want.Bitmaps || got.Required != want.Required {
			t.Errorf("%s: %+v, qemu-img says %+v", opts, got, want)
		}
	}
	if got := measure(t, 100<<30, "compat=v2", req); got.Bitmaps != -1 {
		t.Errorf("version 2: bitmaps %d", got.Bitmaps)
	}
}

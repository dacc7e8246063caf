package qcow2

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// factsJSON renders facts in their order.
func factsJSON(t *testing.T, facts []sdk.Fact) string {
	t.Helper()
	var b strings.Builder
	b.WriteByte('{')
	for i, f := range facts {
		if i > 0 {
			b.WriteByte(',')
		}
		name, err := json.Marshal(f.Name)
		if err != nil {
			t.Fatal(err)
		}
		b.Write(name)
		b.WriteByte(':')
		b.WriteString(factJSON(t, f))
	}
	return b.String() + "}"
}

func factJSON(t *testing.T, f sdk.Fact) string {
	t.Helper()
	var v any
	switch {
	case f.IsObject:
		return factsJSON(t, f.Object)
	case f.IsList:
		var items []string
		for _, item := range f.List {
			items = append(items, factJSON(t, item))
		}
		return "[" + strings.Join(items, ",") + "]"
	case f.Bool != nil:
		v = *f.Bool
	case f.Int != nil:
		v = *f.Int
	case f.Uint != nil:
		v = *f.Uint
	case f.String != nil:
		v = *f.String
	default:
		t.Fatalf("fact %q has no value", f.Name)
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestInfoEqualsQemu(t *testing.T) {
	dir := memoryDir(t)
	for n, args := range [][]string{
		nil,
		{"-o", "compat=0.10"},
		{"-o", "lazy_refcounts=on,refcount_bits=1,compression_type=zstd,extended_l2=on"},
		{"-o", "data_file=" + filepath.Join(dir, "data.raw")},
		{"-o", "data_file=" + filepath.Join(dir, "data.raw") + ",data_file_raw=on"},
		{"-u", "-b", "base.qcow2", "-F", "qcow2"},
		{"--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s"},
		{"--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"},
		{"--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv,encrypt.ivgen-hash-alg=sha256,encrypt.cipher-alg=serpent-128"},
	} {
		if testing.Short() && n > 7 {
			break // qemu-img measures its key derivation for seconds
		}
		path := filepath.Join(dir, fmt.Sprintf("%d.qcow2", n))
		create := append(append([]string{"create", "-q", "-f", "qcow2"}, args...), path, "3M")
		formattest.Oracle(t, "qemu-img", create...)
		if n < 3 {
			for _, b := range [][2]string{{"b0", "65536"}, {"other", "512"}} {
				if n == 1 {
					break
				}
				formattest.Oracle(t, "qemu-img", "bitmap", "--add", "-g", b[1], path, b[0])
			}
			formattest.Oracle(t, "qemu-img", "bitmap", "--disable", pathOr(path, n != 1, t), "other")
			formattest.Oracle(t, "qemu-img", "snapshot", "-c", "name of it", pathOr(path, n != 2, t))
		}
		var want struct {
			Size      int64 `json:"virtual-size"`
			Cluster   int64 `json:"cluster-size"`
			Encrypted bool  `json:"encrypted"`
			Dirty     bool  `json:"dirty-flag"`
			Backing   string
			Format    string          `json:"format"`
			Name      string          `json:"backing-filename"`
			BackFmt   string          `json:"backing-filename-format"`
			Specific  json.RawMessage `json:"format-specific"`
			Snapshots []struct {
				ID     string `json:"id"`
				Name   string `json:"name"`
				Icount int64  `json:"icount"`
				Sec    int64  `json:"date-sec"`
				Nsec   int64  `json:"date-nsec"`
				VM     int64  `json:"vm-state-size"`
			} `json:"snapshots"`
		}
		if err := json.Unmarshal([]byte(formattest.Oracle(t, "qemu-img", "info", "--output=json", "-U", path)), &want); err != nil {
			t.Fatal(err)
		}
		o := formattest.Open(t, New(), path, false)
		if o.Info.VirtualSize != want.Size || o.Info.AllocationUnit != want.Cluster || o.Info.Encrypted != want.Encrypted || o.Info.Dirty != want.Dirty {
			t.Errorf("%v: %+v, qemu-img says %+v", args, o.Info, want)
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, want.Specific); err != nil {
			t.Fatal(err)
		}
		got := fmt.Sprintf(`{"type":%q,"data":%s}`, o.Info.SpecificType, factsJSON(t, o.Info.Specific))
		got = strings.Replace(got, `"detached-header":false,`, "", 1) // since qemu-img 9
		if got != compact.String() {
			t.Errorf("%v:\n%s\nqemu-img says\n%s", args, got, compact.String())
		}
		backing, backFmt := "", ""
		for _, r := range o.Info.References {
			if r.Kind == sdk.RefBacking {
				backing, backFmt = r.Name, r.Format
			}
		}
		if backing != want.Name || backFmt != want.BackFmt {
			t.Errorf("%v: backing %q %q, qemu-img says %q %q", args, backing, backFmt, want.Name, want.BackFmt)
		}
		if len(o.Info.Snapshots) != len(want.Snapshots) {
			t.Errorf("%v: snapshots %v, qemu-img says %v", args, o.Info.Snapshots, want.Snapshots)
			continue
		}
		for i, s := range o.Info.Snapshots {
			w := want.Snapshots[i]
			if s.ID != w.ID || s.Name != w.Name || s.Icount != w.Icount || s.DateSec != w.Sec || s.DateNsec != w.Nsec || s.VMStateSize != w.VM || s.DiskSize != want.Size {
				t.Errorf("%v: snapshot %+v, qemu-img says %+v", args, s, w)
			}
		}
	}
}

// pathOr returns path, or where the image cannot have it another one that can.
func pathOr(path string, ok bool, t *testing.T) string {
	t.Helper()
	if ok {
		return path
	}
	other := filepath.Join(t.TempDir(), "other.qcow2")
	formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "qcow2", other, "1M")
	formattest.Oracle(t, "qemu-img", "bitmap", "--add", other, "other")
	return other
}

func TestSnapshotSelection(t *testing.T) {
	dir := memoryDir(t)
	path := filepath.Join(dir, "a.qcow2")
	formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "2M")
	formattest.Oracle(t, "qemu-io", "-c", "write -q -P 1 0 1M", path)
	formattest.Oracle(t, "qemu-img", "snapshot", "-c", "first", path)
	formattest.Oracle(t, "qemu-io", "-c", "write -q -P 2 64k 1M", path)
	formattest.Oracle(t, "qemu-img", "snapshot", "-c", "1", path) // a name like an id
	formattest.Oracle(t, "qemu-img", "resize", "-q", path, "4M")
	formattest.Oracle(t, "qemu-io", "-c", "write -q -P 3 0 4M", path)
	for _, c := range []struct {
		snapshot string
		size     int64
		at64k    byte
	}{{"", 4 << 20, 3}, {"first", 2 << 20, 1}, {"1", 2 << 20, 1}, {"2", 2 << 20, 2}} {
		o, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{Snapshot: c.snapshot})
		if err != nil {
			t.Fatal(err)
		}
		if o.Info.VirtualSize != c.size {
			t.Errorf("snapshot %q: %d bytes, want %d", c.snapshot, o.Info.VirtualSize, c.size)
		}
		if got := o.Read(64<<10, 512); got[0] != c.at64k {
			t.Errorf("snapshot %q: %d at 64k, want %d", c.snapshot, got[0], c.at64k)
		}
		o.Map()
	}
	if _, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{Snapshot: "none"}); !errors.Is(err, sdk.ErrNotFound) {
		t.Errorf("snapshot that is not there: %v", err)
	}
}

// TestDataFile reads and writes images with an external data file.
func TestDataFile(t *testing.T) {
	for _, opts := range []string{"", ",data_file_raw=on", ",extended_l2=on,cluster_size=16k"} {
		dir := memoryDir(t)
		path := filepath.Join(dir, "a.qcow2")
		t.Chdir(dir)
		formattest.Oracle(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=data.raw"+opts, path, "3M")
		formattest.Oracle(t, "qemu-io", "-c", "write -q -P 1 0 100k", "-c", "write -q -P 2 1M 64k", "-c", "write -q -z 1M 16k", path)
		checkContent(t, path)
		compareOutcome(t, opts, runCheck(t, path, sdk.FixNone), qemuCheck(t, path, sdk.FixNone))

		formattest.Write(t, New(), path, map[int64][]byte{0: bytes.Repeat([]byte{7}, 1<<20), 2 << 20: bytes.Repeat([]byte{8}, 1<<20)}, false)
		formattest.Oracle(t, "qemu-img", "check", "-q", path)
		formattest.Oracle(t, "qemu-io", "-c", "read -q -P 7 0 1M", "-c", "read -q -P 8 2M 1M", path)
		if raw, err := os.ReadFile("data.raw"); err != nil || len(raw) < 3<<20 || raw[0] != 7 || raw[2<<20] != 8 {
			t.Errorf("%s: data file does not hold the data (%v)", opts, err)
		}

		// Refused by the core's policy: an error, not zeros.
		f := mustOpenFile(t, path)
		im, err := New().Open(context.Background(), sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: sdk.NewFile(f)}}})
		if err != nil {
			t.Fatal(err)
		}
		err = im.Map(context.Background(), 0, 3<<20, func([]sdk.Extent) bool { return true })
		if !errors.Is(err, sdk.ErrNotAttached) {
			t.Errorf("%s: map without the data file: %v", opts, err)
		}
	}
}

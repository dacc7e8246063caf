package wire

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

func TestExtentsRoundTrip(t *testing.T) {
	in := []sdk.Extent{
		{Offset: 512, Length: 1, Kind: sdk.Absent, HostOffset: -1},
		{Offset: 513, Length: 1 << 40, Kind: sdk.Zero, HostOffset: -1},
		{Offset: 513 + 1<<40, Length: 7, Kind: sdk.Zero, File: 2, HostOffset: 0},
		{Offset: 520 + 1<<40, Length: 9, Kind: sdk.Data, File: 3, HostOffset: 1 << 50, Sparse: true, Raw: true},
		{Offset: 529 + 1<<40, Length: 11, Kind: sdk.Encoded, HostOffset: 77, EncodedLength: 5},
	}
	var r pb.MapImageResponse
	AppendExtents(&r, in)
	out, err := FromExtents(nil, &r, 512, 540+1<<40)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(in, out); d != "" {
		t.Error(d)
	}
}

func TestFromExtentsRefusesLies(t *testing.T) {
	for name, r := range map[string]*pb.MapImageResponse{
		"columns of unequal length": {Length: []uint64{1, 1}, Attributes: []uint64{1}},
		"empty extent":              {Length: []uint64{0}, Attributes: []uint64{1}},
		"beyond the end":            {Length: []uint64{101}, Attributes: []uint64{1}},
		"length overflow":           {Length: []uint64{1 << 63}, Attributes: []uint64{1}},
		"unknown kind":              {Length: []uint64{1}, Attributes: []uint64{9}},
		"data without host offset":  {Length: []uint64{1}, Attributes: []uint64{uint64(sdk.Data)}},
		"missing host offset":       {Length: []uint64{1}, Attributes: []uint64{uint64(sdk.Data) | attrHost}},
		"huge host offset":          {Length: []uint64{1}, Attributes: []uint64{uint64(sdk.Data) | attrHost}, HostOffset: []uint64{1 << 63}},
		"huge file index":           {Length: []uint64{1}, Attributes: []uint64{uint64(sdk.Data) | attrHost | 1<<62}, HostOffset: []uint64{0}},
		"missing encoded length":    {Length: []uint64{1}, Attributes: []uint64{uint64(sdk.Encoded) | attrHost}, HostOffset: []uint64{0}},
	} {
		if _, err := FromExtents(nil, r, 0, 100); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzFromExtents(f *testing.F) {
	f.Add([]byte{1, 2, 3}, uint64(3))
	f.Fuzz(func(t *testing.T, b []byte, host uint64) {
		r := &pb.MapImageResponse{HostOffset: []uint64{host}, EncodedLength: []uint64{host}}
		for i, x := range b {
			if i%2 == 0 {
				r.Length = append(r.Length, uint64(x))
			} else {
				r.Attributes = append(r.Attributes, uint64(x))
			}
		}
		out, err := FromExtents(nil, r, 10, 500)
		if err != nil {
			return
		}
		at := int64(10)
		for _, e := range out {
			if e.Offset != at || e.Length <= 0 || e.Offset+e.Length > 500 {
				t.Fatalf("bad extent %+v after %d", e, at)
			}
			at += e.Length
		}
	})
}

func TestErrorsKeepTheirClass(t *testing.T) {
	for _, c := range classes {
		in := fmt.Errorf("l2[3]: %w", c.err)
		out := FromStatus(Status(in))
		if !errors.Is(out, c.err) || out.Error() != in.Error() {
			t.Errorf("%v came back as %v", in, out)
		}
	}
	out := FromStatus(Status(fmt.Errorf("write: %w", syscall.ENOSPC)))
	if !errors.Is(out, syscall.ENOSPC) {
		t.Errorf("errno lost: %v", out)
	}
	var oe *option.Error
	if !errors.As(FromStatus(Status(&option.Error{Key: "a", Value: "b", Reason: "c", Accepted: []string{"d"}})), &oe) || oe.Key != "a" || oe.Accepted[0] != "d" {
		t.Errorf("option error lost: %v", oe)
	}
	if !errors.Is(FromStatus(Status(context.Canceled)), context.Canceled) {
		t.Error("cancellation lost")
	}
	if err := FromStatus(Status(errors.New("plain"))); err == nil || err.Error() != "plain" {
		t.Errorf("plain error came back as %v", err)
	}
	if FromStatus(nil) != nil || Status(nil) != nil {
		t.Error("nil became an error")
	}
}

func TestInfoRoundTrip(t *testing.T) {
	in := &sdk.Info{
		VirtualSize: 1 << 40, AllocationUnit: 65536, Dirty: true,
		References: []sdk.Reference{{Kind: sdk.RefBacking, Name: "x", Format: "raw", Alternatives: []string{"y"}, IdentityKey: "k", Identity: "v"}},
		Snapshots:  []sdk.Snapshot{{ID: "1", Name: "s", VMStateSize: 3, DateSec: 4, Icount: -1}},
		HasBitmaps: true, Bitmaps: []sdk.BitmapInfo{{Name: "b", Granularity: 65536, Enabled: true, Inconsistent: true}},
		SpecificType: "t",
		Specific: []sdk.Fact{
			sdk.BoolFact("b", false), sdk.IntFact("i", -1), sdk.UintFact("u", 1<<63), sdk.StringFact("s", ""),
			sdk.PathFact("p", "main"), sdk.ObjectFact("o", sdk.IntFact("x", 1)), sdk.ListFact("l", sdk.StringFact("", "y")),
		},
		Identity: map[string]string{"cid": "1"},
	}
	out, err := FromInfo(Info(in))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(in, out); d != "" {
		t.Error(d)
	}
}

package wire

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

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

// Names are bytes and come back as such, through messages that are UTF-8.
func TestNamesAreBytes(t *testing.T) {
	for _, name := range []string{
		"", "plain", "ünïcode", "\xff\xfe", "a\xffb\x80", "\x9b2J", "\xed\xa0\x80", "\x00", "\U0010ff7f",
		"\U0010ff80", "\U0010ffff", "\xf4\x8f\xbe", "\xf4\x8f\xbf\xc0", "\ufffd\xff", "\xc3",
	} {
		b, err := proto.Marshal(&pb.OpenImageResponse{Info: Info(&sdk.Info{
			References: []sdk.Reference{{Kind: sdk.RefBacking, Name: name, Alternatives: []string{name}, Format: name, IdentityKey: name, Identity: name}},
			Snapshots:  []sdk.Snapshot{{ID: name, Name: name}}, Bitmaps: []sdk.BitmapInfo{{Name: name}},
			Specific: []sdk.Fact{sdk.StringFact(name, name), sdk.ListFact(name, sdk.ObjectFact(name))}, SpecificType: name,
			Identity: map[string]string{"k" + name: name},
		})})
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		var m pb.OpenImageResponse
		if err := proto.Unmarshal(b, &m); err != nil {
			t.Fatal(err)
		}
		got, err := FromInfo(m.GetInfo())
		if err != nil {
			t.Fatal(err)
		}
		all := []string{
			got.References[0].Name, got.References[0].Alternatives[0], got.References[0].Format, got.References[0].IdentityKey,
			got.References[0].Identity, got.Snapshots[0].ID, got.Snapshots[0].Name, got.Bitmaps[0].Name, got.Specific[0].Name,
			*got.Specific[0].String, got.Specific[1].Name, got.Specific[1].List[0].Name, got.SpecificType, got.Identity["k"+name],
		}
		for i, s := range all {
			if s != name {
				t.Errorf("%q came back as %q (%d)", name, s, i)
			}
		}
		b, err = proto.Marshal(CreateRequest(sdk.CreateRequest{
			Options: option.Values{{Key: "backing_file", String: name}}, BackingName: name, Name: name,
			Backing: &sdk.BackingInfo{Format: name, Identity: map[string]string{"k": name}},
		}))
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		var r pb.PlanCreateRequest
		if err := proto.Unmarshal(b, &r); err != nil {
			t.Fatal(err)
		}
		req, err := FromCreateRequest(&r)
		if err != nil || req.Name != name || req.BackingName != name || req.Options[0].String != name || req.Backing.Format != name || req.Backing.Identity["k"] != name {
			t.Errorf("%q came back as %+v (%v)", name, req, err)
		}
		err = FromStatus(Status(fmt.Errorf("snapshot %s: %w", name, sdk.ErrCorrupt)))
		if !errors.Is(err, sdk.ErrCorrupt) {
			t.Errorf("%q in an error: %v lost its class", name, err)
		}
		var oe *option.Error
		if !errors.As(FromStatus(Status(&option.Error{Key: "k", Value: name})), &oe) || oe.Value != name {
			t.Errorf("%q in an option error: %+v", name, oe)
		}
	}
}

func FuzzText(f *testing.F) {
	f.Add("plain \xff \U0010ff80 \xf4\x8f")
	f.Fuzz(func(t *testing.T, s string) {
		out := Text(s)
		if !utf8.ValidString(out) || FromText(out) != s || len(out) > 4*len(s) {
			t.Errorf("%q became %q and then %q", s, out, FromText(out))
		}
		FromText(s) // what a plugin sends
	})
}

// Errors of gRPC itself are put into words, and a class where there is one.
func TestTransportErrors(t *testing.T) {
	err := FromStatus(status.Error(codes.ResourceExhausted, "grpc: received message larger than max (2 vs. 1)"))
	if !errors.Is(err, sdk.ErrTooBig) || err.Error() != "the plugin's answer is too large to be taken" {
		t.Errorf("got %v", err)
	}
	err = FromStatus(status.Error(codes.Internal, "grpc: error while marshaling\x1b: x"))
	if got := err.Error(); strings.Contains(got, "rpc error") || !strings.Contains(got, "error while marshaling") {
		t.Errorf("got %s", got)
	}
	checkLine(t, err.Error())
}

// Without detail the code tells the class.
func TestPlainStatus(t *testing.T) {
	for code, class := range map[codes.Code]error{
		codes.DataLoss: sdk.ErrCorrupt, codes.InvalidArgument: sdk.ErrInvalid, codes.NotFound: sdk.ErrNotFound, codes.OutOfRange: sdk.ErrTooBig,
	} {
		err := FromStatus(status.Error(code, "header:\x1b bad"))
		if !errors.Is(err, class) || err.Error() != `header:\x1b bad` {
			t.Errorf("%v: got %v", code, err)
		}
	}
	for _, code := range []codes.Code{codes.Unknown, codes.Unimplemented} {
		if err := FromStatus(status.Error(code, "reason")); !strings.Contains(err.Error(), "request to the plugin failed") {
			t.Errorf("%v: got %v", code, err)
		}
	}
}

// What proto3 leaves away is the usual, not an error.
func TestUnspecified(t *testing.T) {
	plan, err := FromPlanInfo(&pb.PlanCreateResponse{Files: []*pb.PlannedFile{{Role: "main"}}})
	if err != nil || plan.Files[0].Preallocation != sdk.PreallocOff {
		t.Errorf("preallocation: %+v, %v", plan, err)
	}
	keys, err := FromOptionKeys([]*pb.OptionKey{{Name: "k", Type: pb.OptionType_OPTION_TYPE_BOOL}})
	if err != nil || keys[0].Disposition != option.Honoured {
		t.Errorf("disposition: %+v, %v", keys, err)
	}
	for _, bad := range []int32{-1, 5} {
		if _, err := FromPlanInfo(&pb.PlanCreateResponse{Files: []*pb.PlannedFile{{Preallocation: pb.Preallocation(bad)}}}); err == nil {
			t.Errorf("preallocation %d passed", bad)
		}
		if _, err := FromOptionKeys([]*pb.OptionKey{{Type: pb.OptionType_OPTION_TYPE_BOOL, Disposition: pb.Disposition(bad)}}); err == nil {
			t.Errorf("disposition %d passed", bad)
		}
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

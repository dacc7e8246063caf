package wire

import (
	"errors"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/instar-img/instar/sdk"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// What a plugin says in an error is one line of bounded length.
func TestErrorsAreOneLine(t *testing.T) {
	for _, text := range []string{"\x1b[2Jcleared", "one\ninstar: two", "\r", strings.Repeat("long", 10_000), "\xff\xfe", "\u009b2J"} {
		d := &pb.ErrorDetail{Class: "corrupt"}
		for _, err := range []error{FromDetail(text, d), FromStatus(status.Error(codes.Unknown, text)), FromStatus(status.Error(codes.Canceled, text))} {
			checkLine(t, err.Error())
		}
		if !errors.Is(FromDetail(text, d), sdk.ErrCorrupt) {
			t.Errorf("%q: its class is lost", text)
		}
	}
	if got := OneLine("plain: ünïcode"); got != "plain: ünïcode" {
		t.Errorf("got %q", got)
	}
}

func checkLine(t *testing.T, s string) {
	t.Helper()
	if len(s) > 6*maxText || strings.ContainsFunc(s, unicode.IsControl) || !utf8.ValidString(s) {
		t.Errorf("not a line: %.200q", s)
	}
}

// Whatever bytes a plugin answers, they are refused or sound.
func FuzzAnswers(f *testing.F) {
	add := func(m proto.Message) {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	add(&pb.OpenImageResponse{Image: 1, Info: Info(&sdk.Info{
		VirtualSize: 1 << 30, AllocationUnit: 65536, References: []sdk.Reference{{Kind: sdk.RefBacking, Name: "x"}},
		Snapshots: []sdk.Snapshot{{ID: "1"}}, Specific: []sdk.Fact{sdk.ObjectFact("a", sdk.ListFact("b", sdk.IntFact("", 1)))},
	})})
	add(PlanInfo(sdk.PlanInfo{VirtualSize: 1, Files: []sdk.PlannedFile{{Role: sdk.RoleMain, Length: 7}}}))
	add(&pb.PlaceRunsResponse{Placements: Placements([]sdk.Placement{{Offset: 1, Length: 2, HostOffset: 3}})})
	f.Fuzz(func(t *testing.T, b []byte) {
		var open pb.OpenImageResponse
		if proto.Unmarshal(b, &open) == nil {
			if info, err := FromInfo(open.GetInfo()); err == nil && (info.VirtualSize < 0 || info.AllocationUnit < 0) {
				t.Errorf("negative sizes: %+v", info)
			}
		}
		var plan pb.PlanCreateResponse
		if proto.Unmarshal(b, &plan) == nil {
			if info, err := FromPlanInfo(&plan); err == nil && len(info.Files) != len(plan.GetFiles()) {
				t.Errorf("%d files of %d", len(info.Files), len(plan.GetFiles()))
			}
		}
		var describe pb.DescribeResponse
		if proto.Unmarshal(b, &describe) == nil {
			_, _ = FromOptionKeys(describe.GetCreateSchema())
		}
		var place pb.PlaceRunsResponse
		if proto.Unmarshal(b, &place) == nil {
			FromPlacements(place.GetPlacements())
		}
		var detail pb.ErrorDetail
		if proto.Unmarshal(b, &detail) == nil && detail.GetOption() == nil {
			checkLine(t, FromDetail(string(b), &detail).Error())
		}
	})
}

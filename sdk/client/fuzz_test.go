package client

import (
	"context"
	"io"
	"os"
	"strings"
	"testing"
	"unicode"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/instar-img/instar/sdk"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// babble is a connection whose other end answers the same bytes to everything:
// those of one kind of message.
type babble struct {
	kind  proto.Message
	bytes []byte
}

func (b *babble) answer(reply any) error {
	m := reply.(proto.Message)
	switch {
	case m.ProtoReflect().Descriptor() == b.kind.ProtoReflect().Descriptor():
		return proto.Unmarshal(b.bytes, m)
	case m.ProtoReflect().Descriptor() == (&pb.OpenImageResponse{}).ProtoReflect().Descriptor():
		proto.Merge(m, &pb.OpenImageResponse{
			Image: 1, Info: &pb.Info{VirtualSize: 1 << 20}, Checker: true, Decoder: true, Attacher: true, Writer: true,
			BitmapReader: true, BitmapWriter: true, Inspector: true,
		})
	case m.ProtoReflect().Descriptor() == (&pb.PlanCreateResponse{}).ProtoReflect().Descriptor():
		proto.Merge(m, &pb.PlanCreateResponse{Measurable: true})
	}
	return nil
}

func (b *babble) Invoke(_ context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
	return b.answer(reply)
}

func (b *babble) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return &babbling{babble: b}, nil
}

// babbling is a stream of a few such answers.
type babbling struct {
	grpc.ClientStream
	*babble
	said int
}

func (s *babbling) SendMsg(any) error { return nil }
func (s *babbling) CloseSend() error  { return nil }
func (s *babbling) RecvMsg(m any) error {
	if s.said++; s.said > 3 {
		return io.EOF
	}
	return s.answer(m)
}

func (b *babble) SendFile(*os.File) (uint32, error) { return 1, nil }

// kinds are the answers that are read, one of them from what was fuzzed.
var kinds = []proto.Message{
	&pb.DescribeResponse{}, &pb.PlanCreateResponse{}, &pb.MeasurePlanResponse{}, &pb.OpenImageResponse{}, &pb.AttachFilesResponse{},
	&pb.MapImageResponse{}, &pb.DecodeExtentsResponse{}, &pb.CheckImageResponse{}, &pb.InspectImageResponse{}, &pb.BeginWriteResponse{},
	&pb.PlaceRunsResponse{}, &pb.ReadBitmapResponse{},
}

// FuzzAnswers reads any bytes as any answer: what comes through is what its
// readers may rely on.
func FuzzAnswers(f *testing.F) {
	for i, m := range []proto.Message{
		&pb.DescribeResponse{Manifest: []byte(`{"name":"x","version":"1","protocols":[1],"capabilities":["open"]}`)},
		&pb.PlanCreateResponse{Plan: 1, VirtualSize: 7, Measurable: true, Files: []*pb.PlannedFile{{Role: "main", Length: 9}}},
		&pb.MeasurePlanResponse{Required: 1, FullyAllocated: -2, Bitmaps: 3},
		&pb.OpenImageResponse{Image: 1, Info: &pb.Info{VirtualSize: 1 << 20}, Checker: true, Writer: true},
		&pb.AttachFilesResponse{Info: &pb.Info{VirtualSize: -1}},
		&pb.MapImageResponse{Length: []uint64{1 << 19, 1 << 19}, Attributes: []uint64{1, 1}},
		&pb.DecodeExtentsResponse{},
		&pb.CheckImageResponse{Messages: []string{"\x1b[2J\nline"}, Progress: 0.5, Result: &pb.CheckResult{Corruptions: -1}},
		&pb.InspectImageResponse{Features: []string{"\x1b"}, Findings: []*pb.Finding{{Rule: "a", Text: "b"}}},
		&pb.BeginWriteResponse{Unit: 512, ReadsZero: true},
		&pb.PlaceRunsResponse{Placements: []*pb.Placement{{Length: 4096, HostOffset: 1 << 62}}},
		&pb.ReadBitmapResponse{Runs: []*pb.Run{{Offset: 1, Length: 2}}},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(i, b)
	}
	f.Fuzz(func(t *testing.T, kind int, b []byte) {
		ctx := context.Background()
		conn := &babble{kinds[uint(kind)%uint(len(kinds))], b}
		format := Connect(conn, conn, nil, func(sdk.Description) error { return nil })
		_ = format.Ready(ctx)
		if p, err := format.PlanCreate(ctx, sdk.CreateRequest{}); err == nil {
			info := p.Info()
			if info.VirtualSize < 0 {
				t.Errorf("plan: %+v", info)
			}
			if m, err := p.(sdk.Measurer).Measure(ctx, sdk.MeasureRequest{}); err == nil && (m.Required < 0 || m.FullyAllocated < 0) {
				t.Errorf("measured %+v", m)
			}
		}
		img, err := format.Open(ctx, sdk.OpenRequest{})
		if err != nil {
			return
		}
		_ = img.(sdk.Attacher).Attach(ctx, nil) // an answer that is no Info is an error
		if info, err := img.Info(ctx); err == nil && info != nil && (info.VirtualSize < 0 || info.AllocationUnit < 0) {
			t.Errorf("info %+v", info)
		}
		next := int64(4096)
		err = img.Map(ctx, next, 1<<20, func(extents []sdk.Extent) bool {
			for _, e := range extents {
				if e.Offset != next || e.Length <= 0 || e.Kind > sdk.Encoded || e.File < 0 {
					t.Fatalf("extent %+v after %#x", e, next)
				}
				next += e.Length
			}
			return true
		})
		if err == nil && next != 4096+1<<20 {
			t.Errorf("the map ends at %#x", next)
		}
		_, _ = img.(sdk.Checker).Check(ctx, sdk.CheckRequest{Message: func(s string) {
			if strings.ContainsFunc(s, unicode.IsControl) {
				t.Errorf("message %q", s)
			}
		}, Progress: func(p float64) {
			if !(p > 0) {
				t.Errorf("progress %v", p)
			}
		}})
		_, _ = img.(sdk.Inspector).Inspect(ctx) // its texts are escaped where they are printed
		w := img.(sdk.Writer)
		if info, err := w.BeginWrite(ctx, sdk.WriteRequest{}); err == nil && info.Unit <= 0 {
			t.Errorf("write: %+v", info)
		}
		runs := []sdk.Run{{Offset: 0, Length: 4096}, {Offset: 65536, Length: 512}}
		if places, err := w.Place(ctx, runs); err == nil {
			length := int64(0)
			for _, p := range places {
				if length += p.Length; p.Length <= 0 || p.HostOffset < 0 || p.HostOffset+p.Length < 0 {
					t.Errorf("placed at %+v", p)
				}
			}
			if length != 4608 {
				t.Errorf("placed %+v", places)
			}
		}
		_ = img.(sdk.BitmapReader).ReadBitmap(ctx, "b", func([]sdk.Run) bool { return true })
	})
}

package wire

import (
	"sync"

	"google.golang.org/protobuf/proto"

	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// WarmOpen and WarmCreate send what opens and what creates an image through the
// encoder and back, to nobody, in the background. A type costs some 10 to 50 µs
// when it is met for the first time, which the core can spend while it waits for
// a plugin to start.
var (
	WarmOpen = warm(
		&pb.OpenImageRequest{Files: []*pb.FileTicket{{}}},
		&pb.OpenImageResponse{Info: &pb.Info{
			Specific:   []*pb.Fact{{Value: &pb.Fact_StringValue{}}},
			Identity:   map[string]string{"": ""},
			References: []*pb.Reference{{}},
		}})
	WarmCreate = warm(
		&pb.DescribeResponse{CreateSchema: []*pb.OptionKey{{Synonyms: map[string]string{"": ""}}}},
		&pb.PlanCreateRequest{Options: []*pb.OptionValue{{}}, Backing: &pb.BackingInfo{}},
		&pb.PlanCreateResponse{Files: []*pb.PlannedFile{{}}},
		&pb.EmitPlanRequest{Files: []*pb.FileTicket{{}}},
		&pb.EmitPlanResponse{})
)

func warm(messages ...proto.Message) func() {
	return sync.OnceFunc(func() {
		go func() {
			for _, m := range messages {
				if b, err := proto.Marshal(m); err == nil {
					_ = proto.Unmarshal(b, m)
				}
			}
		}()
	})
}

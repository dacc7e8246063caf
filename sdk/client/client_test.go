package client

import (
	"context"
	"errors"
	"testing"

	"google.golang.org/grpc"

	"github.com/instar-img/instar/sdk"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// endless is a connection whose streams send empty messages for ever.
type endless struct{ grpc.ClientConnInterface }

func (endless) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return endlessStream{}, nil
}

type endlessStream struct{ grpc.ClientStream }

func (endlessStream) SendMsg(any) error { return nil }
func (endlessStream) RecvMsg(any) error { return nil }
func (endlessStream) CloseSend() error  { return nil }

// A map whose parts hold nothing is refused: it need not ever end.
func TestMapMakesProgress(t *testing.T) {
	m := &Image{format: &Format{rpc: pb.NewFormatServiceClient(endless{})}}
	err := m.Map(t.Context(), 0, 1<<20, func([]sdk.Extent) bool {
		t.Error("extents out of nothing")
		return false
	})
	if !errors.Is(err, errMapEmpty) {
		t.Errorf("got %v", err)
	}
}

package formattest

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/client"
	"github.com/instar-img/instar/sdk/internal/server"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// OverWire returns format as the core sees it: behind both halves of the wire,
// in this process. It ends with the test.
func OverWire(t testing.TB, format sdk.Format) sdk.Format {
	t.Helper()
	listener := bufconn.Listen(1 << 20)
	desk := &ticketDesk{files: map[uint32]*os.File{}}
	srv := grpc.NewServer()
	pb.RegisterFormatServiceServer(srv, server.New(format, desk, ""))
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(listener) // ends with Stop
	}()
	conn, err := grpc.NewClient("passthrough:///wire",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		srv.Stop()
		<-served
	})
	f := client.Connect(conn, desk, nil, func(sdk.Description) error { return nil })
	if err := f.Ready(context.Background()); err != nil {
		t.Fatal(err)
	}
	return f
}

// ticketDesk hands descriptors from one half to the other.
type ticketDesk struct {
	mu    sync.Mutex
	last  uint32
	files map[uint32]*os.File
}

func (d *ticketDesk) SendFile(f *os.File) (uint32, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.last++
	d.files[d.last] = os.NewFile(uintptr(fd), f.Name())
	return d.last, nil
}

func (d *ticketDesk) Take(_ context.Context, ticket uint32) (*os.File, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f, ok := d.files[ticket]
	if !ok {
		return nil, fmt.Errorf("no ticket %d", ticket)
	}
	delete(d.files, ticket)
	return f, nil
}

// Package serve turns an sdk.Format into a plugin program: its main function is
// one call of Main. It is apart from package sdk so that a format's own package,
// and its tests, link no wire.
package serve

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"google.golang.org/grpc"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/handshake"
	"github.com/instar-img/instar/sdk/internal/descriptor"
	"github.com/instar-img/instar/sdk/internal/lock"
	"github.com/instar-img/instar/sdk/internal/server"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// Main serves format to the core that started this program, and does not
// return before the core is gone. Called with --manifest it prints the format's
// manifest instead, which belongs beside the program as NAME.json.
func Main(format sdk.Format) {
	if len(os.Args) == 2 && os.Args[1] == "--manifest" {
		if err := printManifest(format); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv(handshake.MagicCookieKey) != handshake.MagicCookieValue {
		fmt.Fprintf(os.Stderr, "%s is a format plugin of instar: it is started by instar, not by hand (--manifest prints what it is)\n", filepath.Base(os.Args[0]))
		os.Exit(2)
	}
	files := descriptor.Receive(handshake.DescriptorFD)
	go func() {
		<-files.Closed()
		os.Exit(0) // the core is gone
	}()
	if err := run(format, files); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", filepath.Base(os.Args[0]), err)
		os.Exit(1)
	}
}

// run takes the second lock and serves until the program ends, on the connection
// that it inherits. Where there is none it listens, and tells the core where:
// that is what go-plugin's server does too, which the core's go-plugin client
// cannot tell apart. That one would add services that nobody calls (reflection,
// a broker, redirected output) and net/rpc: 5 MB in each plugin, and a
// millisecond of initialisation in each command.
func run(format sdk.Format, files *descriptor.Receiver) error {
	inherits := os.Getenv(handshake.ConnectionKey) != ""
	var listener net.Listener
	var err error
	if inherits {
		listener, err = inherit()
	} else {
		listener, err = net.Listen("unix", filepath.Join(os.Getenv(handshake.SocketDirKey), "plugin"))
	}
	if err != nil {
		return err
	}
	s := grpc.NewServer(grpc.MaxRecvMsgSize(maxRequest),
		grpc.StaticStreamWindowSize(windowSize), grpc.StaticConnWindowSize(windowSize))
	pb.RegisterFormatServiceServer(s, server.New(format, files, sdk.ConnectionInherited))
	if err := lock.Engage(!inherits); err != nil {
		if !errors.Is(err, lock.ErrUnavailable) {
			return fmt.Errorf("second lock: %w", err)
		}
		warn("second lock not available", err)
	}
	if !inherits {
		if _, err := fmt.Fprintf(os.Stdout, "%d|%d|unix|%s|grpc\n", handshake.CoreProtocol, sdk.Protocol, listener.Addr()); err != nil {
			return err
		}
	}
	return s.Serve(listener)
}

// warn tells whom the level of the log interests, in the form of hclog, which the
// core reads. To link that package would cost a fiftieth of an info.
func warn(message string, cause error) {
	if !slices.Contains([]string{"trace", "debug", "info", "warn"}, os.Getenv(handshake.LogLevelKey)) {
		return
	}
	if line, err := json.Marshal(map[string]string{"@level": "warn", "@message": message, "error": cause.Error()}); err == nil {
		fmt.Fprintf(os.Stderr, "%s\n", line)
	}
}

// connected is a listener to which one connection comes, which is there.
type connected struct {
	net.Conn
	taken atomic.Bool
}

// inherit returns the connection that the core left open for this program.
func inherit() (net.Listener, error) {
	f := os.NewFile(handshake.ConnectionFD, "connection")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("connection: %w", err)
	}
	return &connected{Conn: conn}, nil
}

func (c *connected) Accept() (net.Conn, error) {
	if c.taken.Swap(true) {
		select {} // the program ends with the connection
	}
	return c.Conn, nil
}

func (c *connected) Addr() net.Addr { return c.LocalAddr() }

// windowSize is fixed, so that no time goes into estimating it, in bytes.
const windowSize = 4 << 20

// maxRequest bounds a request of the core, in bytes: the largest is a batch of
// runs to place.
const maxRequest = 16 << 20

func printManifest(format sdk.Format) error {
	m := format.Describe().Manifest
	m.Connection = sdk.ConnectionInherited
	out, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(append(out, '\n'))
	return err
}

// Package serve turns an sdk.Format into a plugin program: its main function is
// one call of Main. It is apart from package sdk so that a format's own package,
// and its tests, link no wire.
package serve

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	plugin "github.com/hashicorp/go-plugin"
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
	logger := hclog.New(&hclog.LoggerOptions{
		Level:      hclog.LevelFromString(os.Getenv(handshake.LogLevelKey)),
		Output:     os.Stderr,
		JSONFormat: true,
	})
	if os.Getenv(handshake.LogLevelKey) == "" {
		logger.SetLevel(hclog.Off)
	}
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: plugin.HandshakeConfig{
			MagicCookieKey:   handshake.MagicCookieKey,
			MagicCookieValue: handshake.MagicCookieValue,
		},
		VersionedPlugins: map[int]plugin.PluginSet{
			sdk.Protocol: {handshake.PluginName: &formatPlugin{format: format, files: files, logger: logger}},
		},
		GRPCServer: func(opts []grpc.ServerOption) *grpc.Server {
			return grpc.NewServer(append(opts, grpc.MaxRecvMsgSize(maxRequest))...)
		},
		Logger: logger,
	})
}

// maxRequest bounds a request of the core, in bytes: the largest is a batch of
// runs to place.
const maxRequest = 16 << 20

func printManifest(format sdk.Format) error {
	out, err := json.MarshalIndent(format.Describe().Manifest, "", "  ")
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(append(out, '\n'))
	return err
}

// formatPlugin registers the service with go-plugin's server.
type formatPlugin struct {
	plugin.NetRPCUnsupportedPlugin
	format sdk.Format
	files  *descriptor.Receiver
	logger hclog.Logger
}

// GRPCServer is called when the listener is open and before any request is
// served: the moment for the second lock.
func (p *formatPlugin) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	if err := lock.Engage(); err != nil {
		if !errors.Is(err, lock.ErrUnavailable) {
			return fmt.Errorf("second lock: %w", err)
		}
		p.logger.Warn("second lock not available", "error", err)
	}
	pb.RegisterFormatServiceServer(s, server.New(p.format, p.files))
	return nil
}

// GRPCClient is the core's side, which is not ours.
func (p *formatPlugin) GRPCClient(context.Context, *plugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errors.New("not a client")
}

// Package launch starts a format plugin in its sandbox, connects to it, passes
// it open files and ends it.
package launch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/instar-img/instar/internal/host/ahead"
	"github.com/instar-img/instar/internal/host/child"
	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/handshake"
)

// Types and facts of the process itself.
type (
	Limits    = child.Limits
	Sandbox   = child.Sandbox
	ExitError = child.ExitError
)

// SandboxVariable is the environment variable that can make the sandbox a
// condition ("require") or leave it away ("off", for benchmarks and debugging).
const SandboxVariable = child.SandboxVariable

// Effective describes the sandbox that the running kernel gives.
func Effective() Sandbox { return child.Effective() }

// SandboxStatus says in one line what plugins run in.
func SandboxStatus() (string, error) { return child.SandboxStatus() }

// Options says how to start a plugin.
type Options struct {
	// Logger takes go-plugin's messages and the plugin's. Nil discards them.
	Logger hclog.Logger
	Limits Limits
	// Require makes it an error when the kernel lacks a part of the sandbox.
	// INSTAR_SANDBOX=require does the same.
	Require bool
	// Stderr also gets what the plugin writes there. Nil discards it.
	Stderr io.Writer
	// StartTimeout bounds the time until the plugin can be connected to; 0: 20 s.
	StartTimeout time.Duration
}

const defaultStartTimeout = 20 * time.Second

// Process is a running plugin.
type Process struct {
	plugin *discover.Plugin
	child  *child.Child
	conn   *grpc.ClientConn
	major  int

	inherited *inherited // nil where it listens

	drain    *time.Timer
	killOnce sync.Once
}

// Start starts a plugin and connects to it. The end of ctx ends the start, not
// the plugin: that is Kill's.
func Start(ctx context.Context, p *discover.Plugin, o Options) (*Process, error) {
	if o.Logger == nil {
		o.Logger = hclog.NewNullLogger()
	}
	if o.StartTimeout == 0 {
		o.StartTimeout = defaultStartTimeout
	}
	if !speaks(p.Manifest.Protocols) {
		return nil, protocolError(p, fmt.Sprint(p.Manifest.Protocols))
	}
	proc, err := start(ctx, p, o)
	return proc, named(p, err)
}

// named adds the plugin to an error that does not name it.
func named(p *discover.Plugin, err error) error {
	if err == nil || errors.As(err, new(*ExitError)) || errors.As(err, new(*ProtocolError)) {
		return err
	}
	return fmt.Errorf("plugin %s (%s): %w", p.Manifest.Name, p.Path, err)
}

func start(ctx context.Context, p *discover.Plugin, o Options) (*Process, error) {
	if err := checkSandbox(o); err != nil {
		return nil, err
	}
	c, err := program(p, o)
	if err != nil {
		return nil, err
	}
	proc := &Process{plugin: p, child: c}
	if connection := c.Connection(); connection != nil {
		err = proc.use(connection, o)
	} else {
		err = proc.meet(ctx, o)
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		proc.Kill()
		child.Await(false, c)
		return nil, err
	}
	return proc, nil
}

// meet has go-plugin find out where a program listens, and connects to it.
func (p *Process) meet(ctx context.Context, o Options) error {
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig: plugin.HandshakeConfig{
			MagicCookieKey:   handshake.MagicCookieKey,
			MagicCookieValue: handshake.MagicCookieValue,
		},
		VersionedPlugins: map[int]plugin.PluginSet{
			sdk.Protocol: {}, // what it serves is no business of go-plugin's
		},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		Logger:           frame{o.Logger},
		Stderr:           o.Stderr,
		SkipHostEnv:      true,
		StartTimeout:     o.StartTimeout,
		// The child has its own; go-plugin makes one in it that is not used.
		UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: p.child.SocketDir()},
		RunnerFunc: func(_ hclog.Logger, _ *exec.Cmd, unused string) (runner.Runner, error) {
			os.Remove(unused)
			return &childRunner{Child: p.child, name: p.plugin.Manifest.Name}, nil
		},
	})
	defer context.AfterFunc(ctx, p.child.Kill)() // connect then fails
	return p.connect(client, o.StartTimeout)
}

// frame is the logger of go-plugin itself, which reports the end of each process
// as if that were news. What plugins log goes to loggers that it has named after
// them.
type frame struct{ hclog.Logger }

func (f frame) Info(msg string, args ...any) { f.Debug(msg, args...) }

func checkSandbox(o Options) error {
	mode, err := child.SandboxMode(o.Require)
	if err != nil {
		return err
	}
	if mode == child.Off {
		o.Logger.Warn("plugin runs without a sandbox", "reason", SandboxVariable+"=off")
		return nil
	}
	missing := Effective().Missing()
	if len(missing) == 0 {
		return nil
	}
	if mode == child.Required {
		return fmt.Errorf("the sandbox is required, and this system lacks %s", strings.Join(missing, ", "))
	}
	o.Logger.Warn("plugin sandbox is incomplete", "missing", missing)
	return nil
}

// program returns the plugin's process: the one started ahead where there is
// one that will do.
func program(p *discover.Plugin, o Options) (*child.Child, error) {
	level := ""
	if l := o.Logger.GetLevel(); l != hclog.Off && l != hclog.NoLevel {
		level = l.String()
	}
	if level == "" {
		if c := ahead.Take(p, o.Limits.MemoryBytes); c != nil {
			c.SetLimits(o.Limits)
			return c, nil
		}
	}
	spec := p.Spec()
	spec.Limits, spec.LogLevel = o.Limits, level
	if level != "" {
		spec.Connected = false // go-plugin reads what a program logs that listens
	}
	return child.Start(spec)
}

// dial makes a connection ready over what dialer returns, in the background. A
// program has timeout to answer on it.
func dial(dialer func(context.Context, string) (net.Conn, error), timeout time.Duration) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///plugin",
		grpc.WithContextDialer(dialer),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: timeout}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxAnswer), grpc.MaxCallSendMsgSize(math.MaxInt32)),
		grpc.WithStaticStreamWindowSize(windowSize), grpc.WithStaticConnWindowSize(windowSize),
		grpc.WithDisableServiceConfig(), grpc.WithDisableRetry())
	if err == nil {
		conn.Connect()
	}
	return conn, err
}

// connect reads where a program listens, and dials.
//
// go-plugin's own client would do so too, and begin streams for its broker and
// for what the plugin prints, which costs a millisecond before the first
// request. Here the connection is made ready while the program initialises, all
// but the socket.
func (p *Process) connect(client *plugin.Client, timeout time.Duration) error {
	address := make(chan net.Addr, 1)
	var err error
	p.conn, err = dial(func(ctx context.Context, _ string) (net.Conn, error) {
		select {
		case addr := <-address:
			address <- addr // for another attempt
			return new(net.Dialer).DialContext(ctx, addr.Network(), addr.String())
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}, timeout)
	if err != nil {
		return err
	}
	addr, err := client.Start()
	if err != nil {
		return p.startError(err)
	}
	go io.Copy(io.Discard, p.child.Stdout()) // go-plugin gives up at a long line
	address <- addr
	p.major = client.NegotiatedVersion()
	p.drain = time.AfterFunc(drainAfter, p.drainPrints)
	return nil
}

const (
	// maxAnswer bounds a plugin's answer: the largest are batches of extents.
	maxAnswer = 64 << 20
	// windowSize is fixed, so that no time goes into estimating it.
	windowSize = 4 << 20
	// drainAfter is when what a plugin printed is thrown away for the first time:
	// before, it has room in a pipe.
	drainAfter = 300 * time.Millisecond
)

// drainPrints throws away what the plugin writes to its os.Stdout and os.Stderr,
// which go-plugin's server redirects to a stream: unread, it would block.
func (p *Process) drainPrints() {
	stream, err := p.conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/plugin.GRPCStdio/StreamStdio")
	if err != nil {
		return
	}
	err = stream.SendMsg(&emptypb.Empty{})
	if err == nil {
		err = stream.CloseSend()
	}
	for err == nil {
		err = stream.RecvMsg(&emptypb.Empty{})
	}
}

// startError turns go-plugin's many-line advice into one line with what the
// program did.
func (p *Process) startError(err error) error {
	line := p.child.FirstLine()
	if wrong := p.lineError(line); line != "" && wrong != nil {
		return wrong
	}
	var exit *ExitError
	if line == "" && errors.As(p.ExitError(), &exit) && !exit.Killed {
		return exit
	}
	return errors.New(strings.Join(strings.Fields(err.Error()), " "))
}

// lineError says what is wrong with the line in which a program should say where
// it listens, as far as that is about the program.
func (p *Process) lineError(line string) error {
	parts := strings.Split(line, "|")
	if len(parts) < 4 {
		return fmt.Errorf("not a plugin: it printed %q", line)
	}
	if major, err := strconv.Atoi(parts[1]); err == nil && !speaks([]int{major}) {
		return protocolError(p.plugin, parts[1])
	}
	return nil
}

// ProtocolError reports a plugin that speaks no protocol major that the core
// speaks.
type ProtocolError struct {
	Plugin string // format name
	Path   string
	Speaks string // its majors
}

func (e *ProtocolError) Error() string {
	return fmt.Sprintf("plugin %s (%s) speaks protocol %s, this instar speaks %d", e.Plugin, e.Path, e.Speaks, sdk.Protocol)
}

func protocolError(p *discover.Plugin, speaks string) error {
	return &ProtocolError{Plugin: p.Manifest.Name, Path: p.Path, Speaks: strings.Trim(speaks, "[]")}
}

func speaks(majors []int) bool {
	for _, m := range majors {
		if m == sdk.Protocol {
			return true
		}
	}
	return false
}

// Plugin returns what was started.
func (p *Process) Plugin() *discover.Plugin { return p.plugin }

// Protocol returns the protocol major agreed on.
func (p *Process) Protocol() int { return p.major }

// Conn returns the connection to the plugin.
func (p *Process) Conn() grpc.ClientConnInterface { return p.conn }

// SendFile passes an open file to the plugin and returns the ticket by which
// requests name it. The caller keeps its own descriptor.
func (p *Process) SendFile(f *os.File) (ticket uint32, err error) {
	ticket, err = p.child.SendFile(f)
	if err == nil {
		return ticket, nil
	}
	if exit := p.exitErrorSoon(); exit != nil {
		return 0, exit
	}
	return 0, fmt.Errorf("plugin %s: pass %s: %w", p.plugin.Manifest.Name, f.Name(), err)
}

// Kill ends the plugin and removes its socket directory. It does not wait for
// the kernel to be done with the process; Done does.
func (p *Process) Kill() {
	p.killOnce.Do(func() {
		p.child.Remove()
		if p.drain != nil {
			p.drain.Stop()
		}
		if p.conn != nil {
			go p.conn.Close() // it has nobody left to talk to
		}
	})
}

// Child is the plugin's process itself.
func (p *Process) Child() *child.Child { return p.child }

// Done is closed when the plugin's process has ended.
func (p *Process) Done() <-chan struct{} { return p.child.Done() }

// ExitError says how the process ended, with the last that it wrote to stderr.
// It is nil while the process runs.
func (p *Process) ExitError() error { return p.child.ExitError(p.plugin.Manifest.Name) }

// exitErrorSoon is ExitError for a caller who has reason to believe that the
// process is about to end.
func (p *Process) exitErrorSoon() error {
	select {
	case <-p.child.Done():
	case <-time.After(child.DyingTimeout):
	}
	return p.ExitError()
}

// Explain returns the cause of a failure to speak to the plugin: where it died (or
// is dying) how it ended, else what is wrong with the connection.
func (p *Process) Explain(err error) error {
	if err == nil {
		return nil
	}
	if line := p.child.FirstLine(); p.inherited.silent() && line != "" {
		wrong := p.lineError(line)
		if wrong == nil {
			wrong = errors.New("it listens, where its manifest says that it inherits its connection")
		}
		return named(p.plugin, wrong)
	}
	late := p.inherited.late() // before the wait for its end
	if exit := p.exitErrorSoon(); exit != nil {
		return exit
	}
	if late && p.inherited.silent() {
		return named(p.plugin, fmt.Errorf("it did not answer within %v", p.inherited.timeout))
	}
	return named(p.plugin, errors.New(status.Convert(err).Message()))
}

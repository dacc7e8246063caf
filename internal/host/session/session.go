// Package session keeps the plugins of one run: found once, started when first
// needed, each at most once, all gone when the session ends.
package session

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/internal/host/launch"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/client"
)

// Session is a run of the core.
type Session struct {
	Plugins *discover.Set

	launch  launch.Options
	mu      sync.Mutex
	running map[string]*plugin // by canonical name
	closed  bool
}

// plugin is started by the first who asks; the others wait.
type plugin struct {
	once    sync.Once
	process *launch.Process
	format  *client.Format
	err     error
}

// New returns a session over the plugins found.
func New(plugins *discover.Set, options launch.Options) *Session {
	return &Session{Plugins: plugins, launch: options, running: map[string]*plugin{}}
}

// Format returns the running plugin p, started if it is not.
func (s *Session) Format(ctx context.Context, p *discover.Plugin) (*client.Format, error) {
	f, err := s.Start(ctx, p)
	if err == nil {
		err = f.Ready(ctx)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Start is Format for a caller who only opens an image, which tells whether the
// plugin is what its manifest says.
func (s *Session) Start(ctx context.Context, p *discover.Plugin) (*client.Format, error) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil, fmt.Errorf("plugin %s: the session has ended", p.Manifest.Name)
	}
	run, ok := s.running[p.Manifest.Name]
	if !ok {
		run = &plugin{}
		s.running[p.Manifest.Name] = run
	}
	s.mu.Unlock()
	run.once.Do(func() { run.start(ctx, p, s.launch) })
	return run.format, run.err
}

func (r *plugin) start(ctx context.Context, p *discover.Plugin, o launch.Options) {
	if r.process, r.err = launch.Start(ctx, p, o); r.err != nil {
		return
	}
	r.format = client.Connect(&explainedConn{r.process.Conn(), r.process}, r.process, &p.Manifest, func(d sdk.Description) error {
		return sameManifest(p, d.Manifest)
	})
}

// sameManifest reports whether a running plugin is what its manifest said, by
// which it was chosen.
func sameManifest(p *discover.Plugin, running sdk.Manifest) error {
	a, errA := json.Marshal(p.Manifest)
	b, errB := json.Marshal(running)
	if errA != nil || errB != nil {
		return fmt.Errorf("plugin %s: manifest cannot be compared", p.Path)
	}
	if string(a) == string(b) {
		return nil
	}
	return fmt.Errorf("plugin %s (%s %s) is not what its manifest %s says (%s %s); write the manifest anew with --manifest",
		p.Path, running.Name, running.Version, p.ManifestPath, p.Manifest.Name, p.Manifest.Version)
}

// Close ends all plugins. Calls under way fail.
func (s *Session) Close() {
	s.mu.Lock()
	s.closed = true
	running := s.running
	s.running = nil
	s.mu.Unlock()
	for _, r := range running {
		r.once.Do(func() {}) // waits for a start under way
		if r.process != nil {
			r.process.Kill()
		}
	}
}

// explain returns what became of the process where err is the transport's, and
// err itself where the plugin answered.
func explain(p *launch.Process, err error) error {
	if status.Code(err) != codes.Unavailable {
		return err
	}
	return p.Explain(err)
}

// explainedConn replaces the transport's errors by what became of the process.
type explainedConn struct {
	grpc.ClientConnInterface
	process *launch.Process
}

func (c *explainedConn) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return explain(c.process, c.ClientConnInterface.Invoke(ctx, method, args, reply, opts...))
}

func (c *explainedConn) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := c.ClientConnInterface.NewStream(ctx, desc, method, opts...)
	if err != nil {
		return nil, explain(c.process, err)
	}
	return &explainedStream{s, c.process}, nil
}

type explainedStream struct {
	grpc.ClientStream
	process *launch.Process
}

func (s *explainedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil || err == io.EOF { //nolint:errorlint // gRPC returns io.EOF itself
		return err
	}
	return explain(s.process, err)
}

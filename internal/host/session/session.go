// Package session keeps the plugins of one run: found once, started when first
// needed, each at most once, all gone when the session ends.
package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/instar-img/instar/internal/host/child"
	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/internal/host/launch"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/client"
)

// Session is a run of the core.
type Session struct {
	Plugins *discover.Set
	Bounds  Bounds

	launch  launch.Options
	mu      sync.Mutex
	running map[string]*plugin // by canonical name
	closed  bool
}

// Bounds are those of answers of plugins. They are set before the first plugin
// starts.
type Bounds struct {
	// Idle bounds the wait for each answer, and for each part of one that comes
	// in parts; 0: no bound.
	Idle time.Duration
	// Bytes bounds the length of each, and of each part; 0: the wire's own bound.
	Bytes int
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
	run.once.Do(func() { run.start(ctx, p, s.launch, s.Bounds) })
	return run.format, run.err
}

func (r *plugin) start(ctx context.Context, p *discover.Plugin, o launch.Options, bounds Bounds) {
	if r.process, r.err = launch.Start(ctx, p, o); r.err != nil {
		return
	}
	r.format = client.Connect(&explainedConn{r.process.Conn(), r.process, bounds}, r.process, &p.Manifest, func(d sdk.Description) error {
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
	return fmt.Errorf("plugin %s (%s %s) is not what its manifest %s says (%s %s, other %s); write the manifest anew with --manifest",
		p.Path, running.Name, running.Version, p.ManifestPath, p.Manifest.Name, p.Manifest.Version, strings.Join(differing(a, b), ", "))
}

// differing returns the keys whose values differ in two JSON objects, sorted.
func differing(a, b []byte) []string {
	var in [2]map[string]json.RawMessage
	_ = json.Unmarshal(a, &in[0]) // they were just made
	_ = json.Unmarshal(b, &in[1])
	keys := map[string]bool{}
	for i, m := range in {
		for k, v := range m {
			if string(in[1-i][k]) != string(v) {
				keys[k] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(keys))
}

// Watch returns a context that also ends, for the reason that it has, when a
// plugin that runs by now does. What it returns beside must be called.
func (s *Session) Watch(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.running {
		go func() {
			r.once.Do(func() {}) // waits for a start under way
			if r.process == nil {
				return
			}
			select {
			case <-r.process.Done():
				cancel(r.process.ExitError())
			case <-ctx.Done():
			}
		}()
	}
	return ctx, func() { cancel(nil) }
}

// End ends all plugins, without waiting for the kernel to be done with them.
// Close is to follow.
func (s *Session) End() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, r := range s.running {
		r.once.Do(func() {}) // waits for a start under way
		if r.process != nil {
			r.process.Kill()
		}
	}
}

// Close ends all plugins. Calls under way fail. With wait it returns when the
// kernel is done with them, so that nothing keeps open a device that the next
// command wants to itself. It does so too where nobody else would wait for them.
func (s *Session) Close(wait bool) {
	s.End()
	s.mu.Lock()
	running := s.running
	s.running = nil
	s.mu.Unlock()
	var killed []*child.Child
	for _, r := range running {
		if r.process != nil {
			killed = append(killed, r.process.Child())
		}
	}
	child.Await(wait, killed...)
}

// explain returns what became of the process where err is the transport's, and
// err itself where the plugin answered.
func explain(p *launch.Process, err error) error {
	if status.Code(err) != codes.Unavailable {
		return err
	}
	return p.Explain(err)
}

// IdleError reports a plugin that left a request unanswered.
type IdleError struct {
	Plugin string // format name
	After  time.Duration
}

func (e *IdleError) Error() string {
	return fmt.Sprintf("plugin %s has not answered for %v", e.Plugin, e.After)
}

// explainedConn replaces the transport's errors by what became of the process,
// and gives up on answers that do not come, or not to an end.
type explainedConn struct {
	grpc.ClientConnInterface
	process *launch.Process
	bounds  Bounds
}

// options adds what bounds the length of answers; of two such the last counts.
func (c *explainedConn) options(opts []grpc.CallOption) []grpc.CallOption {
	if c.bounds.Bytes == 0 {
		return opts
	}
	return append(opts[:len(opts):len(opts)], grpc.MaxCallRecvMsgSize(c.bounds.Bytes))
}

// patience ends a context when it is not stopped in time.
type patience struct {
	ctx   context.Context
	end   context.CancelCauseFunc
	timer *time.Timer // nil: no end
	idle  time.Duration
}

func (c *explainedConn) patience(ctx context.Context) *patience {
	p := &patience{idle: c.bounds.Idle}
	p.ctx, p.end = context.WithCancelCause(ctx)
	if c.bounds.Idle > 0 {
		late := &IdleError{Plugin: c.process.Plugin().Manifest.Name, After: c.bounds.Idle}
		p.timer = time.AfterFunc(c.bounds.Idle, func() { p.end(late) })
	}
	return p
}

// start begins the wait for another part of an answer, stop ends it.
func (p *patience) start() {
	if p.timer != nil {
		p.timer.Reset(p.idle)
	}
}

func (p *patience) stop() {
	if p.timer != nil {
		p.timer.Stop()
	}
}

// explain says that the patience has ended where that is why err came about.
func (p *patience) explain(process *launch.Process, err error) error {
	var late *IdleError
	if err != nil && errors.As(context.Cause(p.ctx), &late) {
		return late
	}
	return explain(process, err)
}

func (c *explainedConn) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	p := c.patience(ctx)
	defer p.end(nil)
	defer p.stop()
	return p.explain(c.process, c.ClientConnInterface.Invoke(p.ctx, method, args, reply, c.options(opts)...))
}

func (c *explainedConn) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	p := c.patience(ctx)
	s, err := c.ClientConnInterface.NewStream(p.ctx, desc, method, c.options(opts)...)
	p.stop()
	if err != nil {
		err = p.explain(c.process, err)
		p.end(nil)
		return nil, err
	}
	return &explainedStream{s, c.process, p}, nil
}

type explainedStream struct {
	grpc.ClientStream
	process  *launch.Process
	patience *patience
}

// RecvMsg takes the next part of an answer. The time that its taker takes
// between two of them does not count.
func (s *explainedStream) RecvMsg(m any) error {
	s.patience.start()
	err := s.ClientStream.RecvMsg(m)
	s.patience.stop()
	if err == nil {
		return nil
	}
	if err != io.EOF { //nolint:errorlint // gRPC returns io.EOF itself
		err = s.patience.explain(s.process, err)
	}
	s.patience.end(nil)
	return err
}

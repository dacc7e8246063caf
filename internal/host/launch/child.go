package launch

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk/handshake"
)

// child is a plugin's process.
type child struct {
	path      string
	env       []string
	limits    Limits
	socketDir string
	roots     []string
	confined  bool
	required  bool
	started   func() // called once the process runs, while it initialises

	stdout, stderr *os.File // our ends
	first          firstLine
	last           tail

	sendMu sync.Mutex
	socket int // our end of the descriptor socket, -1 when closed

	done chan struct{} // closed when the process has been waited for

	mu     sync.Mutex
	id     int // process id, 0 before the start
	reaped bool
	killed bool
	status syscall.WaitStatus
}

type ticketCounter struct{ n atomic.Uint32 }

func (t *ticketCounter) next() uint32 { return t.n.Add(1) }

// start runs the program. It returns when it runs, or failed to.
func (c *child) start() error {
	c.done = make(chan struct{})
	c.socket = -1
	pair, err := socketpair()
	if err != nil {
		return fmt.Errorf("descriptor socket: %w", err)
	}
	defer unix.Close(pair[1])
	// Opened before the sandbox takes the right to open it away.
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		unix.Close(pair[0])
		return err
	}
	defer null.Close()
	outR, outW, err := os.Pipe()
	if err != nil {
		unix.Close(pair[0])
		return err
	}
	defer outW.Close()
	errR, errW, err := os.Pipe()
	if err != nil {
		unix.Close(pair[0])
		outR.Close()
		return err
	}
	defer errW.Close()

	attr := &syscall.ProcAttr{
		Env:   c.env,
		Files: []uintptr{null.Fd(), outW.Fd(), errW.Fd(), uintptr(pair[1])},
		Sys:   sysProcAttr(),
	}
	result := make(chan error)
	go c.run(attr, result)
	if err := <-result; err != nil {
		unix.Close(pair[0])
		outR.Close()
		errR.Close()
		close(c.done)
		return err
	}
	c.stdout, c.stderr, c.socket = outR, errR, pair[0]
	c.started()
	return nil
}

// wait waits for the process to end, and closes done.
func (c *child) wait() {
	awaitExit(c.id)
	c.mu.Lock()
	var status syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(c.id, &status, 0, nil); err != syscall.EINTR {
			break
		}
	}
	c.status, c.reaped = status, true
	c.mu.Unlock()
	close(c.done)
}

func (c *child) pid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.id
}

func (c *child) kill() {
	c.mu.Lock()
	if c.id != 0 && !c.reaped {
		c.killed = true
		unix.Kill(-c.id, unix.SIGKILL)
		unix.Kill(c.id, unix.SIGKILL)
	}
	c.mu.Unlock()
	c.sendMu.Lock()
	if c.socket >= 0 {
		unix.Close(c.socket)
		c.socket = -1
	}
	c.sendMu.Unlock()
}

func (c *child) killedByUs() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.killed
}

// dyingTimeout bounds the wait for a process that seems to be about to end.
const dyingTimeout = 500 * time.Millisecond

// sendTimeout bounds the wait for a plugin that does not receive.
const sendTimeout = 10 * time.Second

func (c *child) sendFile(ticket uint32, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var message [handshake.TicketSize]byte
	binary.LittleEndian.PutUint32(message[:], ticket)
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if c.socket < 0 {
		return os.ErrClosed
	}
	deadline := time.Now().Add(sendTimeout)
	for {
		var sendErr error
		if err := raw.Control(func(fd uintptr) {
			sendErr = unix.Sendmsg(c.socket, message[:], unix.UnixRights(int(fd)), nil, sendFlags)
		}); err != nil {
			return err
		}
		switch sendErr {
		case unix.EINTR:
			continue
		case unix.EAGAIN, unix.ENOBUFS, unix.ETOOMANYREFS:
			if time.Now().After(deadline) {
				return errors.New("it does not take files")
			}
			// Rare, and poll would not wake for ETOOMANYREFS.
			time.Sleep(time.Millisecond)
			continue
		}
		return sendErr
	}
}

// exitError describes the end of the process.
func (c *child) exitError(name string) error {
	c.last.settle(100 * time.Millisecond)
	c.mu.Lock()
	defer c.mu.Unlock()
	return &ExitError{Plugin: name, Status: c.status, Killed: c.killed, Output: c.last.line()}
}

// ExitError reports a plugin that ended while it was needed.
type ExitError struct {
	Plugin string
	Status syscall.WaitStatus
	Killed bool   // by the core
	Output string // the most telling line that it wrote to stderr
}

func (e *ExitError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "plugin %s ", e.Plugin)
	switch {
	case e.Killed:
		b.WriteString("was stopped")
	case e.Status.Signaled() && e.Status.Signal() == syscall.SIGXCPU:
		b.WriteString("used up its processor time")
	case e.Status.Signaled():
		fmt.Fprintf(&b, "was killed by signal %d (%v)", int(e.Status.Signal()), e.Status.Signal())
	default:
		b.WriteString("exited with status " + strconv.Itoa(e.Status.ExitStatus()))
	}
	if e.Output != "" && !e.Killed {
		b.WriteString(": " + e.Output)
	}
	return b.String()
}

// firstLine remembers the first line of a stream.
type firstLine struct {
	mu   sync.Mutex
	b    []byte
	full bool
}

const maxLine = 512

func (l *firstLine) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.full {
		line, _, found := bytes.Cut(p, []byte{'\n'})
		l.b = append(l.b, line[:min(len(line), maxLine-len(l.b))]...)
		l.full = found || len(l.b) == maxLine
	}
	return len(p), nil
}

func (c *child) firstLine() string {
	c.first.mu.Lock()
	defer c.first.mu.Unlock()
	return strings.TrimSpace(string(c.first.b))
}

// tail remembers the last line of a stream, or the one with which a Go program
// says why it dies.
type tail struct {
	mu     sync.Mutex
	b      []byte // the line that is being written
	last   string
	cause  string
	closed chan struct{}
}

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(p)
	for len(p) > 0 {
		line, rest, found := bytes.Cut(p, []byte{'\n'})
		t.b = append(t.b, line[:min(len(line), maxLine-len(t.b))]...)
		p = rest
		if found {
			t.endLine()
		}
	}
	return n, nil
}

func (t *tail) endLine() {
	line := strings.TrimSpace(string(t.b))
	t.b = t.b[:0]
	if line == "" {
		return
	}
	t.last = line
	if t.cause == "" && (strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ") ||
		strings.HasPrefix(line, "runtime: out of memory")) {
		t.cause = line
	}
}

func (t *tail) line() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.b) > 0 {
		t.endLine()
	}
	if t.cause != "" {
		return t.cause
	}
	return t.last
}

// settle waits until the stream was read to its end.
func (t *tail) settle(most time.Duration) {
	select {
	case <-t.closed:
	case <-time.After(most):
	}
}

// childRunner makes a child what go-plugin calls a runner.
type childRunner struct {
	child *child
}

func (r *childRunner) Start(context.Context) error {
	r.child.last.closed = make(chan struct{})
	return r.child.start()
}

// Diagnose is called when the plugin did not say where it listens, just before
// Kill: it lets a program that dies do so, and say why.
func (r *childRunner) Diagnose(context.Context) string {
	if r.child.firstLine() == "" {
		select {
		case <-r.child.done:
		case <-time.After(dyingTimeout):
		}
	}
	return ""
}

func (r *childRunner) Stdout() io.ReadCloser {
	return &teeReader{f: r.child.stdout, w: &r.child.first}
}

func (r *childRunner) Stderr() io.ReadCloser {
	return &teeReader{f: r.child.stderr, w: &r.child.last, closed: r.child.last.closed}
}

func (r *childRunner) Name() string { return r.child.path }

// Wait returns nil after Kill, which is how plugins end normally.
func (r *childRunner) Wait(context.Context) error {
	<-r.child.done
	if r.child.killedByUs() {
		return nil
	}
	return r.child.exitError(r.child.path)
}

func (r *childRunner) Kill(context.Context) error {
	r.child.kill()
	return nil
}

func (r *childRunner) ID() string { return strconv.Itoa(r.child.pid()) }

// PluginToHost accepts nothing but a socket in the plugin's own directory: a
// plugin must not make the core connect elsewhere.
func (r *childRunner) PluginToHost(network, address string) (string, string, error) {
	name, ok := strings.CutPrefix(address, r.child.socketDir+string(os.PathSeparator))
	if network != "unix" || !ok || name == "" || strings.ContainsRune(name, os.PathSeparator) {
		return "", "", fmt.Errorf("it listens on %s %q, not in its directory", network, address)
	}
	info, err := os.Lstat(address)
	if err != nil {
		return "", "", fmt.Errorf("its socket: %w", errors.Unwrap(err))
	}
	if info.Mode().Type() != os.ModeSocket {
		return "", "", fmt.Errorf("its socket: %q is none", address)
	}
	return network, address, nil
}

func (r *childRunner) HostToPlugin(network, address string) (string, string, error) {
	return network, address, nil
}

// teeReader copies what is read from a pipe.
type teeReader struct {
	f      *os.File
	w      io.Writer
	closed chan struct{} // closed at the end of the stream
	once   sync.Once
}

func (t *teeReader) Read(p []byte) (int, error) {
	n, err := t.f.Read(p)
	t.w.Write(p[:n])
	if err != nil {
		t.once.Do(func() {
			if t.closed != nil {
				close(t.closed)
			}
			t.f.Close()
		})
	}
	return n, err
}

func (t *teeReader) Close() error { return t.f.Close() }

// Package child runs a plugin's program: in its sandbox, with its socket
// directory and descriptor socket, until it ends. It imports little, so that a
// process can be started while the rest of the core initialises.
package child

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk/handshake"
)

// Limits of a plugin's process. Zero means no limit of ours.
type Limits struct {
	MemoryBytes int64 // of heap and other private memory
	CPUSeconds  int64
	Files       int64 // open descriptors; 0: DefaultFiles
}

// DefaultFiles is the usual limit on open descriptors, as far as the caller's own
// goes: an image of 64 TiB in files of 2 GiB has 32,768.
const DefaultFiles = 65536

// Spec says what to run.
type Spec struct {
	Path string   // of the program
	Args []string // of its command line, after its name
	// Roots are further directories and files that it may read and execute.
	// Relative ones lie beside the program.
	Roots    []string
	Limits   Limits
	LogLevel string // for the plugin's logger, empty for off
	// Protocols are the majors that the core speaks.
	Protocols []int
	// Connected programs inherit a connection; the others have a directory in
	// which they may listen. See handshake.ConnectionKey.
	Connected bool
}

// Child is a plugin's process.
type Child struct {
	path     string
	args     []string
	roots    []string
	dir      *socketDir // nil for a connected program
	confined bool

	connection     *os.File // nil for others
	stdout, stderr *teeReader
	first          firstLine
	last           tail

	sendMu  sync.Mutex
	socket  *os.File // our end of the descriptor socket, nil when closed
	tickets atomic.Uint32

	done chan struct{} // closed when the process has been waited for

	mu     sync.Mutex
	id     int // process id
	reaped bool
	killed bool
	status syscall.WaitStatus
	usage  syscall.Rusage
	limits Limits
	group  *cgroup // nil where there is none
	ended  bool    // too late for a group
	ranOut bool    // of the memory of its group
}

// Start runs a program. Where it is not connected its first line on stdout tells
// where it listens.
func Start(spec Spec) (*Child, error) {
	mode, err := SandboxMode(false)
	if err != nil {
		return nil, err
	}
	c := &Child{path: spec.Path, args: append([]string{spec.Path}, spec.Args...), roots: spec.Roots, confined: mode != Off, done: make(chan struct{})}
	if !spec.Connected {
		if c.dir, err = newSocketDir(); err != nil {
			return nil, err
		}
	}
	if err := c.start(spec); err != nil {
		if c.dir != nil {
			c.dir.remove(nil)
		}
		return nil, err
	}
	sweepOnce()
	return c, nil
}

// environment is all that a plugin gets: what go-plugin's server reads.
func (c *Child) environment(spec Spec) []string {
	majors := make([]string, len(spec.Protocols))
	for i, m := range spec.Protocols {
		majors[i] = strconv.Itoa(m)
	}
	env := []string{
		handshake.MagicCookieKey + "=" + handshake.MagicCookieValue,
		"PLUGIN_PROTOCOL_VERSIONS=" + strings.Join(majors, ","),
		// A Go program starts sooner with one processor. Package serve takes the
		// others when there is work for them.
		"GOMAXPROCS=1",
	}
	if spec.Connected {
		env = append(env, handshake.ConnectionKey+"=1")
	} else {
		env = append(env, handshake.SocketDirKey+"="+c.dir.path)
	}
	if spec.LogLevel != "" {
		env = append(env, handshake.LogLevelKey+"="+spec.LogLevel)
	}
	if m := spec.Limits.MemoryBytes; m > 0 {
		// Nine tenths, so that the collector works before the limit strikes.
		env = append(env, "GOMEMLIMIT="+strconv.FormatInt(m/10*9, 10))
	}
	return env
}

// start runs the program. It returns when it runs, or failed to.
func (c *Child) start(spec Spec) (err error) {
	var theirs, ours []*os.File
	defer func() {
		closeAll(theirs)
		if err != nil {
			closeAll(ours)
		}
	}()
	// Opened before the sandbox takes the right to open it away.
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	theirs = append(theirs, null)
	for range 2 {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		theirs, ours = append(theirs, w), append(ours, r)
	}
	kinds := []func() ([2]int, error){descriptorSockets, streamSockets}
	if !spec.Connected {
		kinds = kinds[:1]
	}
	for _, sockets := range kinds {
		pair, err := sockets()
		if err != nil {
			return fmt.Errorf("sockets: %w", err)
		}
		ours = append(ours, os.NewFile(uintptr(pair[0]), "plugin"))
		theirs = append(theirs, os.NewFile(uintptr(pair[1]), "plugin"))
	}

	attr := &syscall.ProcAttr{Env: c.environment(spec), Sys: sysProcAttr()}
	for _, f := range theirs {
		attr.Files = append(attr.Files, f.Fd())
	}
	result := make(chan error)
	go c.run(attr, result)
	if err := <-result; err != nil {
		return err
	}
	c.last.closed = make(chan struct{})
	c.stdout = &teeReader{f: ours[0], w: &c.first}
	c.stderr = &teeReader{f: ours[1], w: &c.last, closed: c.last.closed}
	c.socket = ours[2]
	if spec.Connected {
		c.connection = ours[3]
	}
	c.SetLimits(spec.Limits)
	return nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// Connection is the core's end of the connection of a connected program, the
// caller's to close. It is there once.
func (c *Child) Connection() *os.File {
	f := c.connection
	c.connection = nil
	return f
}

// Stdout is what the program prints.
func (c *Child) Stdout() io.ReadCloser { return c.stdout }

// Stderr is what it prints to stderr. It must be read to its end for ExitError
// to tell all.
func (c *Child) Stderr() io.ReadCloser { return c.stderr }

// SocketDir is where a program that is not connected makes its socket.
func (c *Child) SocketDir() string { return c.dir.path }

// Output runs a program to its end and returns what it printed, at most limit
// bytes.
func Output(spec Spec, limit int64, timeout time.Duration) ([]byte, error) {
	c, err := Start(spec)
	if err != nil {
		return nil, err
	}
	defer c.Remove()
	timer := time.AfterFunc(timeout, c.Kill)
	defer timer.Stop()
	go io.Copy(io.Discard, c.Stderr())
	b, err := io.ReadAll(io.LimitReader(c.Stdout(), limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("it printed more than %d bytes", limit)
	}
	<-c.done
	if c.Killed() {
		return nil, fmt.Errorf("it did not end within %v", timeout)
	}
	if c.status.Signaled() || c.status.ExitStatus() != 0 {
		return nil, c.ExitError(path.Base(spec.Path))
	}
	return b, nil
}

// Path is the program's.
func (c *Child) Path() string { return c.path }

// Done is closed when the process has ended.
func (c *Child) Done() <-chan struct{} { return c.done }

// Remove ends the process and removes its socket directory, without waiting
// for the kernel to be done with it.
func (c *Child) Remove() {
	c.Kill()
	if c.dir != nil {
		c.dir.remove(c.done)
	}
	if f := c.Connection(); f != nil {
		f.Close()
	}
}

// ours are the processes that we started and that have not been waited for.
var ours struct {
	sync.Mutex
	pids map[int]bool
}

func own(pid int) {
	ours.Lock()
	defer ours.Unlock()
	if ours.pids == nil {
		ours.pids = make(map[int]bool)
	}
	ours.pids[pid] = true
}

func disown(pid int) {
	ours.Lock()
	defer ours.Unlock()
	delete(ours.pids, pid)
}

func isOurs(pid int) bool {
	ours.Lock()
	defer ours.Unlock()
	return ours.pids[pid]
}

// wait waits for the process to end, and closes done.
func (c *Child) wait() {
	awaitExit(c.id)
	ranOut := c.leaveGroup()
	c.mu.Lock()
	c.ranOut = ranOut
	var status syscall.WaitStatus
	for {
		if _, err := syscall.Wait4(c.id, &status, 0, &c.usage); err != syscall.EINTR {
			break
		}
	}
	c.status, c.reaped = status, true
	disown(c.id)
	c.mu.Unlock()
	close(c.done)
}

// Pid is the process id.
func (c *Child) Pid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.id
}

// Kill ends the process.
func (c *Child) Kill() {
	c.mu.Lock()
	if c.id != 0 && !c.reaped {
		c.killed = true
		c.killTree()
	}
	c.mu.Unlock()
	c.sendMu.Lock()
	if c.socket != nil {
		c.socket.Close()
		c.socket = nil
	}
	c.sendMu.Unlock()
}

// Killed reports whether Kill ended the process, rather than itself.
func (c *Child) Killed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.killed
}

// DyingTimeout bounds the wait for a process that seems to be about to end. The
// kernel takes its time to free what one had that was killed for its memory.
const DyingTimeout = 1500 * time.Millisecond

// sendTimeout bounds the wait for a plugin that does not receive.
const sendTimeout = 10 * time.Second

// SendFile passes an open file to the plugin and returns its ticket.
func (c *Child) SendFile(f *os.File) (uint32, error) {
	ticket := c.tickets.Add(1)
	return ticket, c.sendFile(ticket, f)
}

func (c *Child) sendFile(ticket uint32, f *os.File) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var message [handshake.TicketSize]byte
	binary.LittleEndian.PutUint32(message[:], ticket)
	c.sendMu.Lock()
	defer c.sendMu.Unlock()
	if c.socket == nil {
		return os.ErrClosed
	}
	deadline := time.Now().Add(sendTimeout)
	for {
		var sendErr error
		if err := raw.Control(func(fd uintptr) {
			sendErr = unix.Sendmsg(int(c.socket.Fd()), message[:], unix.UnixRights(int(fd)), nil, sendFlags)
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

// ExitError describes the end of the process, nil while it runs.
func (c *Child) ExitError(name string) error {
	select {
	case <-c.done:
	default:
		return nil
	}
	c.last.settle(100 * time.Millisecond)
	c.mu.Lock()
	defer c.mu.Unlock()
	used := time.Duration(c.usage.Utime.Nano() + c.usage.Stime.Nano())
	limit := time.Duration(c.limits.CPUSeconds) * time.Second
	return &ExitError{
		Plugin: name, Status: c.status, Killed: c.killed, Output: c.last.line(),
		RanOut: c.status.Signaled() && c.ranOut,
		UsedUp: c.status.Signaled() && limit > 0 && used >= limit,
	}
}

// ExitError reports a plugin that ended while it was needed.
type ExitError struct {
	Plugin string
	Status syscall.WaitStatus
	Killed bool   // by the core
	RanOut bool   // of the memory that it was given
	UsedUp bool   // the processor time that it was given
	Output string // the most telling line that it wrote to stderr
}

func (e *ExitError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "plugin %s ", e.Plugin)
	switch {
	case e.Killed:
		b.WriteString("was stopped")
	case e.RanOut:
		b.WriteString("ran out of memory")
	case e.UsedUp || e.Status.Signaled() && e.Status.Signal() == syscall.SIGXCPU:
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

// FirstLine is what was read of the first line on stdout.
func (c *Child) FirstLine() string {
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

// teeReader copies what is read from a pipe.
type teeReader struct {
	f      *os.File
	w      io.Writer
	closed chan struct{} // closed at the end of the stream
	once   sync.Once
}

func (t *teeReader) Read(p []byte) (int, error) {
	n, err := t.f.Read(p)
	_, _ = t.w.Write(p[:n])
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

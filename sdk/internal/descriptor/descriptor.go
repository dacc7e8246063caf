// Package descriptor receives the open files that the core passes to a plugin.
//
// Each message on the socket is handshake.TicketSize bytes, a ticket number,
// with exactly one descriptor attached. Requests name files by ticket.
package descriptor

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk/handshake"
)

// maxPending bounds the files that arrived and were not taken yet.
const maxPending = 65536

// ErrClosed is returned when the core closed its end, or broke the protocol.
var ErrClosed = errors.New("descriptor socket closed")

// Receiver collects the files that arrive on a socket.
type Receiver struct {
	closed chan struct{}

	mu      sync.Mutex
	files   map[uint32]*os.File
	arrived chan struct{} // closed and replaced at each arrival
	err     error         // why the receiver stopped
}

// Receive takes over the socket fd and begins to receive.
func Receive(fd int) *Receiver {
	r := &Receiver{
		closed:  make(chan struct{}),
		files:   make(map[uint32]*os.File),
		arrived: make(chan struct{}),
	}
	unix.CloseOnExec(fd)
	if err := unix.SetNonblock(fd, true); err != nil {
		r.stop(fmt.Errorf("descriptor socket: %w", err))
		return r
	}
	go r.run(os.NewFile(uintptr(fd), "descriptors"))
	return r
}

// Closed is closed when the core closed its end: the plugin has nobody left to
// work for.
func (r *Receiver) Closed() <-chan struct{} { return r.closed }

// Take returns the file with this ticket, waiting until it arrives. The caller
// owns the file; a ticket can be taken once.
func (r *Receiver) Take(ctx context.Context, ticket uint32) (*os.File, error) {
	for {
		r.mu.Lock()
		f, ok := r.files[ticket]
		delete(r.files, ticket)
		arrived, err := r.arrived, r.err
		r.mu.Unlock()
		if ok {
			return f, nil
		}
		if err != nil {
			return nil, fmt.Errorf("file with ticket %d: %w", ticket, err)
		}
		select {
		case <-arrived:
		case <-r.closed:
		case <-ctx.Done():
			return nil, fmt.Errorf("file with ticket %d: %w", ticket, ctx.Err())
		}
	}
}

func (r *Receiver) run(socket *os.File) {
	defer socket.Close()
	raw, err := socket.SyscallConn()
	if err != nil {
		r.stop(err)
		return
	}
	for {
		ticket, f, err := receiveOne(raw)
		if err != nil {
			r.stop(err)
			return
		}
		if err := r.add(ticket, f); err != nil {
			f.Close()
			r.stop(err)
			return
		}
	}
}

func (r *Receiver) add(ticket uint32, f *os.File) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, dup := r.files[ticket]; dup {
		return fmt.Errorf("ticket %d was used twice: %w", ticket, ErrClosed)
	}
	if len(r.files) >= maxPending {
		return fmt.Errorf("more than %d files pending: %w", maxPending, ErrClosed)
	}
	r.files[ticket] = f
	close(r.arrived)
	r.arrived = make(chan struct{})
	return nil
}

func (r *Receiver) stop(err error) {
	r.mu.Lock()
	r.err = err
	r.mu.Unlock()
	close(r.closed)
}

// rawConn is the part of syscall.RawConn that receiveOne needs.
type rawConn interface {
	Read(func(fd uintptr) (done bool)) error
}

func receiveOne(raw rawConn) (uint32, *os.File, error) {
	// Room for two descriptors, so that a second one is noticed.
	buf := make([]byte, handshake.TicketSize)
	oob := make([]byte, unix.CmsgSpace(2*4))
	var n, oobn int
	var err error
	if waitErr := raw.Read(func(fd uintptr) bool {
		n, oobn, err = receiveMessage(int(fd), buf, oob)
		return !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR)
	}); waitErr != nil {
		return 0, nil, waitErr
	}
	if err != nil {
		return 0, nil, fmt.Errorf("receive descriptor: %w", err)
	}
	fds, err := attached(oob[:oobn])
	if err == nil && n == 0 && len(fds) == 0 {
		return 0, nil, ErrClosed
	}
	if err == nil && (n != handshake.TicketSize || len(fds) != 1) {
		err = fmt.Errorf("message of %d bytes with %d descriptors: %w", n, len(fds), ErrClosed)
	}
	if err != nil {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return 0, nil, err
	}
	ticket := binary.LittleEndian.Uint32(buf)
	return ticket, os.NewFile(uintptr(fds[0]), "ticket "+strconv.FormatUint(uint64(ticket), 10)), nil
}

// attached returns the descriptors in ancillary data.
func attached(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("ancillary data: %w", err)
	}
	var all []int
	for i := range messages {
		if n := len(messages[i].Data); n%4 != 0 {
			return all, fmt.Errorf("ancillary data: %d bytes of descriptors: %w", n, ErrClosed)
		}
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return all, fmt.Errorf("ancillary data: %w", err)
		}
		all = append(all, fds...)
	}
	return all, nil
}

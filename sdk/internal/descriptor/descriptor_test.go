package descriptor

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns a receiver and the core's end of its socket.
func pair(t *testing.T) (*Receiver, int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, socketType, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fds[1]) })
	return Receive(fds[0]), fds[1]
}

func file(t *testing.T, content string) *os.File {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(content); err != nil {
		t.Fatal(err)
	}
	return f
}

func send(t *testing.T, socket int, message []byte, files ...*os.File) {
	t.Helper()
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(socket, message, rights, nil, 0); err != nil {
		t.Fatal(err)
	}
}

func ticket(n uint32) []byte { return binary.LittleEndian.AppendUint32(nil, n) }

func TestTake(t *testing.T) {
	r, socket := pair(t)
	send(t, socket, ticket(7), file(t, "seven"))
	send(t, socket, ticket(3), file(t, "three"))
	for n, want := range map[uint32]string{3: "three", 7: "seven"} {
		f, err := r.Take(t.Context(), n)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(io.NewSectionReader(f, 0, 100))
		if err != nil || string(b) != want {
			t.Errorf("%d: %q, %v", n, b, err)
		}
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%d would be inherited: %v, %v", n, flags, err)
		}
		f.Close()
	}
}

// A request may come before the file that it names.
func TestTakeWaits(t *testing.T) {
	r, socket := pair(t)
	taken := make(chan error)
	go func() {
		f, err := r.Take(context.Background(), 5)
		if err == nil {
			f.Close()
		}
		taken <- err
	}()
	send(t, socket, ticket(4), file(t, "other"))
	send(t, socket, ticket(5), file(t, "this"))
	if err := <-taken; err != nil {
		t.Error(err)
	}
}

func TestTakeIsBounded(t *testing.T) {
	r, socket := pair(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := r.Take(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	send(t, socket, ticket(1), file(t, "late"))
	f, err := r.Take(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := r.Take(ctx, 1); err == nil {
		t.Error("a ticket was taken twice")
	}
}

func TestEnd(t *testing.T) {
	r, socket := pair(t)
	send(t, socket, ticket(1), file(t, "before the end"))
	if err := unix.Shutdown(socket, unix.SHUT_WR); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.Closed():
	case <-time.After(10 * time.Second):
		t.Fatal("the end was not noticed")
	}
	if f, err := r.Take(t.Context(), 1); err != nil {
		t.Errorf("what came before the end: %v", err)
	} else {
		f.Close()
	}
	if _, err := r.Take(t.Context(), 2); !errors.Is(err, ErrClosed) {
		t.Errorf("got %v", err)
	}
}

// A core that does not keep the protocol is no core.
func TestBrokenMessages(t *testing.T) {
	for name, breakIt := range map[string]func(t *testing.T, socket int){
		"no descriptor": func(t *testing.T, socket int) { send(t, socket, ticket(1)) },
		"two descriptors": func(t *testing.T, socket int) {
			send(t, socket, ticket(1), file(t, "a"), file(t, "b"))
		},
		"short ticket": func(t *testing.T, socket int) { send(t, socket, []byte{1, 0, 0}, file(t, "a")) },
		"ticket used twice": func(t *testing.T, socket int) {
			send(t, socket, ticket(1), file(t, "a"))
			send(t, socket, ticket(1), file(t, "b"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r, socket := pair(t)
			breakIt(t, socket)
			select {
			case <-r.Closed():
			case <-time.After(10 * time.Second):
				t.Fatal("nothing happened")
			}
			if _, err := r.Take(t.Context(), 9); err == nil {
				t.Error("no error")
			}
		})
	}
}

package launch

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/instar-img/instar/sdk"
)

// inherited is the core's end of a connection that a program inherited.
type inherited struct {
	net.Conn
	used    atomic.Bool   // by gRPC
	heard   atomic.Bool   // anything came from the program
	since   time.Time     // when it was started, or soon after
	timeout time.Duration // within which something should come
}

func (i *inherited) Read(b []byte) (int, error) {
	n, err := i.Conn.Read(b)
	if n > 0 {
		i.heard.Store(true)
	}
	return n, err
}

// silent reports whether nothing came from the program, where it has inherited.
func (i *inherited) silent() bool { return i != nil && !i.heard.Load() }

// late reports whether something should have come by now.
func (i *inherited) late() bool { return i != nil && time.Since(i.since) >= i.timeout }

// use speaks to a program over the connection that it has inherited. It does not
// wait for an answer, so that the first request is ready when the program is. A
// failure shows there.
func (p *Process) use(connection *os.File, o Options) error {
	defer connection.Close()
	conn, err := net.FileConn(connection)
	if err != nil {
		return err
	}
	p.inherited = &inherited{Conn: conn, since: time.Now(), timeout: o.StartTimeout}
	p.conn, err = dial(func(context.Context, string) (net.Conn, error) {
		if p.inherited.used.Swap(true) {
			return nil, errors.New("its connection broke off")
		}
		return p.inherited, nil
	}, o.StartTimeout)
	if err != nil {
		conn.Close()
		return err
	}
	p.major = sdk.Protocol
	stderr := o.Stderr
	if stderr == nil {
		stderr = io.Discard
	}
	go io.Copy(stderr, p.child.Stderr())
	go p.listenToStdout()
	return nil
}

// silence is how long after a program has printed something it may be silent on
// its connection.
const silence = 200 * time.Millisecond

// listenToStdout hangs up on a program that prints something, and does not serve:
// it is no plugin, or one that listens.
func (p *Process) listenToStdout() {
	out := p.child.Stdout()
	if n, _ := out.Read(make([]byte, 4096)); n > 0 {
		time.AfterFunc(silence, func() {
			if p.inherited.silent() {
				p.inherited.Close()
			}
		})
	}
	io.Copy(io.Discard, out)
}

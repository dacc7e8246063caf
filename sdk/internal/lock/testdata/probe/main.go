// Command probe is a plugin for the tests of the launch room and of both locks.
// Its name decides how it starts, its one method does what its argument says:
// among it all that a plugin must not be able to do. It is served by go-plugin,
// as a plugin that does not use package serve may be.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	plugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/instar-img/instar/sdk/handshake"
	"github.com/instar-img/instar/sdk/internal/descriptor"
	"github.com/instar-img/instar/sdk/internal/lock"
)

// Method is what the tests call, with a StringValue each way.
const serviceName, methodName = "instar.launchtest.Probe", "Do"

func main() {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "sleep-in-child":
			pid, err := startSleeper()
			fmt.Println(pid, err)
			return
		case "sleep":
			time.Sleep(time.Hour)
		case "--manifest":
			fmt.Println(`{"name":"asked","version":"1","protocols":[1],"capabilities":["open"]}`)
		}
		return
	}
	p := &probe{}
	major := 1
	_, mode, _ := strings.Cut(filepath.Base(os.Args[0]), "instar-format-")
	switch mode {
	case "crash-at-start":
		panic("no reason at all")
	case "silent":
		time.Sleep(time.Hour)
	case "garbage":
		fmt.Println("hello there")
		time.Sleep(time.Hour)
	case "endless-line":
		for {
			fmt.Print(strings.Repeat("x", 1<<16))
		}
	case "no-http":
		fmt.Fprint(os.NewFile(handshake.ConnectionFD, "connection"), "220 hello\r\n")
		time.Sleep(time.Hour)
	case "hangs-up":
		syscall.Close(handshake.ConnectionFD)
		time.Sleep(time.Hour)
	case "tcp":
		fmt.Println("1|1|tcp|127.0.0.1:1|grpc")
		time.Sleep(time.Hour)
	case "elsewhere":
		fmt.Println("1|1|unix|/run/some.sock|grpc")
		time.Sleep(time.Hour)
	case "no-socket":
		fmt.Printf("1|1|unix|%s/none|grpc\n", os.Getenv(handshake.SocketDirKey))
		time.Sleep(time.Hour)
	case "future":
		major = 7
	case "noisy":
		go flood(1 << 40)
	case "deaf": // to the end of the core
		p.deaf = true
	case "locked":
		p.locked = true
	}
	if !p.deaf {
		p.files = descriptor.Receive(handshake.DescriptorFD)
		go func() {
			<-p.files.Closed()
			os.Exit(0)
		}()
	}
	plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: plugin.HandshakeConfig{
			MagicCookieKey:   handshake.MagicCookieKey,
			MagicCookieValue: handshake.MagicCookieValue,
		},
		VersionedPlugins: map[int]plugin.PluginSet{major: {"format": p}},
		GRPCServer:       plugin.DefaultGRPCServer,
		Logger:           hclog.NewNullLogger(),
	})
}

type probe struct {
	plugin.NetRPCUnsupportedPlugin
	files  *descriptor.Receiver
	locked bool
	deaf   bool
}

func (p *probe) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	if p.locked {
		begin := time.Now()
		if err := lock.Engage(true); err != nil {
			return err
		}
		lockCost = time.Since(begin)
	}
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: methodName, Handler: func(_ any, ctx context.Context,
			decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
			var in wrapperspb.StringValue
			if err := decode(&in); err != nil {
				return nil, err
			}
			out, err := p.do(ctx, strings.Split(in.GetValue(), "\n"))
			return wrapperspb.String(out), err
		}}},
	}, p)
	return nil
}

func (p *probe) GRPCClient(context.Context, *plugin.GRPCBroker, *grpc.ClientConn) (any, error) {
	return nil, errors.New("not a client")
}

var lockCost time.Duration

func (p *probe) do(ctx context.Context, args []string) (string, error) {
	switch args[0] {
	case "hello":
		return "hello", nil
	case "lock-cost":
		return lockCost.String(), nil
	case "environment":
		return strings.Join(os.Environ(), "\n"), nil
	case "descriptors":
		return openDescriptors(), nil
	case "read":
		f, err := p.take(ctx, args[1])
		if err != nil {
			return "", err
		}
		defer f.Close()
		b, err := io.ReadAll(f)
		return string(b), err
	case "open": // by name
		b, err := os.ReadFile(args[1])
		return string(b), err
	case "write":
		f, err := p.take(ctx, args[1])
		if err != nil {
			return "", err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte(args[2]), 0)
		return "", err
	case "escape":
		return escape(args[1:]), nil
	case "exit":
		// go-plugin replaced os.Stderr; descriptor 2 is what the core reads.
		syscall.Write(2, []byte("no more work today\n"))
		os.Exit(3)
	case "panic":
		go panic("this is the cause")
		time.Sleep(time.Hour)
	case "hang":
		select {}
	case "spin":
		for {
			runtime.Gosched()
		}
	case "allocate":
		var hoard [][]byte
		for {
			b := make([]byte, 16<<20)
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
			hoard = append(hoard, b)
		}
	case "flood":
		flood(8 << 20)
		return "flooded", nil
	case "flood-stdout": // in one line
		_, err := syscall.Write(1, make([]byte, 8<<20)) // go-plugin replaced os.Stdout
		return "flooded", err
	case "open-many":
		n := 0
		for ; n < 100; n++ {
			if _, err := os.Open(os.Args[0]); err != nil {
				break
			}
		}
		return strconv.Itoa(n), nil
	case "fork-twice": // the parent of the sleeper is gone
		r, w, err := os.Pipe()
		if err != nil {
			return "", err
		}
		pid, err := syscall.ForkExec(os.Args[0], []string{os.Args[0], "sleep-in-child"},
			&syscall.ProcAttr{Files: []uintptr{0, w.Fd(), 2}})
		if err != nil {
			return "", err
		}
		w.Close()
		b := make([]byte, 64)
		n, _ := r.Read(b)
		if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
			return "", err
		}
		sleeper, _, _ := strings.Cut(string(b[:n]), " ")
		return sleeper, nil
	case "fork":
		pid, err := startSleeper()
		return strconv.Itoa(pid), err
	}
	return "", fmt.Errorf("what is %q?", args[0])
}

func (p *probe) take(ctx context.Context, ticket string) (*os.File, error) {
	n, err := strconv.ParseUint(ticket, 10, 32)
	if err != nil {
		return nil, err
	}
	return p.files.Take(ctx, uint32(n))
}

// startSleeper starts a process out of the process group, so that a signal to
// that does not reach it.
func startSleeper() (int, error) {
	return syscall.ForkExec(os.Args[0], []string{os.Args[0], "sleep"},
		&syscall.ProcAttr{Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setpgid: true}})
}

func flood(most int64) {
	line := []byte(strings.Repeat("noise ", 20) + "\n")
	for n := int64(0); n < most; n += int64(len(line)) {
		if _, err := syscall.Write(2, line); err != nil {
			return
		}
	}
}

package launch

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/instar-img/instar/internal/host/child"
)

// childRunner makes a child that runs what go-plugin calls a runner.
type childRunner struct {
	*child.Child
	name string
}

func (r *childRunner) Start(context.Context) error { return nil }

// Diagnose is called when the plugin did not say where it listens, just before
// Kill: it lets a program that dies do so, and say why.
func (r *childRunner) Diagnose(context.Context) string {
	if r.FirstLine() == "" {
		select {
		case <-r.Done():
		case <-time.After(child.DyingTimeout):
		}
	}
	return ""
}

func (r *childRunner) Name() string { return r.Path() }

// Wait returns nil after Kill, which is how plugins end normally.
func (r *childRunner) Wait(context.Context) error {
	<-r.Done()
	if r.Killed() {
		return nil
	}
	return r.ExitError(r.name)
}

func (r *childRunner) Kill(context.Context) error {
	r.Child.Kill()
	return nil
}

func (r *childRunner) ID() string { return strconv.Itoa(r.Pid()) }

// PluginToHost accepts nothing but a socket in the plugin's own directory: a
// plugin must not make the core connect elsewhere.
func (r *childRunner) PluginToHost(network, address string) (string, string, error) {
	name, ok := strings.CutPrefix(address, r.SocketDir()+string(os.PathSeparator))
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

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/instar-img/instar/internal/host/ahead"
	"github.com/instar-img/instar/internal/host/launch"
	"github.com/instar-img/instar/internal/host/session"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// policyFlags say how much a run trusts its images, and what it may use.
type policyFlags struct {
	untrusted bool
	maxMemory string
	maxOutput string
	timeout   time.Duration
	idle      time.Duration

	environment error // a variable whose value is not understood
}

// untrustedVariable turns --untrusted on for every command.
const untrustedVariable = "INSTAR_UNTRUSTED"

// What a plugin may use where --untrusted and nothing else is said.
const (
	untrustedMemory     = ahead.UntrustedMemory
	untrustedCPUSeconds = 30
	// untrustedTimeout ends verbs that look at metadata alone: a plugin that
	// waits uses no processor time.
	untrustedTimeout = 2 * time.Minute
	// untrustedIdle ends verbs that copy, whose time has no bound. A plugin that
	// puts tens of gigabytes on stable storage before it answers is not idle.
	untrustedIdle = 5 * time.Minute
	// untrustedAnswer bounds what the core holds of an image, of which it may hold
	// several, and each a few times over.
	untrustedAnswer   = 4 << 20
	untrustedInFlight = 8
)

// kind is what a verb does with images, which decides about its limits.
type kind uint8

const (
	looks  kind = iota // at their metadata
	reads              // their content
	writes             // new ones
)

func (p *policyFlags) register(flags *pflag.FlagSet, verb kind) {
	on, err := envBool(untrustedVariable)
	p.environment = err
	flags.BoolVar(&p.untrusted, "untrusted", on, "follow no reference, refuse ambiguous content, limit memory and time ("+untrustedVariable+"=1)")
	flags.StringVar(&p.maxMemory, "max-memory", "", "memory that each plugin may use (256M where --untrusted)")
	flags.Var((*timeFlag)(&p.timeout), "timeout", "time after which the command ends with an error (2m for metadata where --untrusted)")
	flags.Var((*timeFlag)(&p.idle), "idle-timeout", "time for which a plugin may leave a request unanswered (5m where --untrusted)")
	if verb == writes {
		flags.StringVar(&p.maxOutput, "max-output", "", "virtual size that the output may have")
	}
}

// timeFlag is a span of time: seconds, or what has units (2m, 1h30m).
type timeFlag time.Duration

func (f *timeFlag) Set(s string) error {
	if strings.Trim(s, "0123456789.") == "" {
		s += "s"
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return errors.New("a time above 0 is accepted, in seconds or with a unit (30, 90s, 2m, 1h)")
	}
	*f = timeFlag(d)
	return nil
}

func (f *timeFlag) String() string {
	if *f == 0 {
		return ""
	}
	return time.Duration(*f).String()
}

func (f *timeFlag) Type() string { return "TIME" }

// envBool reports whether an environment variable says yes. What is neither yes
// nor no is an error: it must not pass for no.
func envBool(name string) (bool, error) {
	switch v := os.Getenv(name); v {
	case "", "0":
		return false, nil
	case "1":
		return true, nil
	default:
		on, err := option.ParseBool(v)
		if err != nil {
			return false, fmt.Errorf("%s=%q: accepted are 1, on, yes, true, 0, off, no and false", name, v)
		}
		return on, nil
	}
}

// bounds returns what bounds answers of plugins.
func (p *policyFlags) bounds() session.Bounds {
	b := session.Bounds{Idle: max(p.idle, 0)}
	if p.untrusted {
		b.Bytes = untrustedAnswer
		if b.Idle == 0 {
			b.Idle = untrustedIdle
		}
	}
	return b
}

// inFlight is how many images of one command are worked on at a time: the
// cores, and as many again to wait for disks and plugins. It bounds the files
// that are open, and under --untrusted the answers that are held in memory.
func (p *policyFlags) inFlight() int {
	n := 2 * runtime.GOMAXPROCS(0)
	if p.untrusted {
		n = min(n, untrustedInFlight)
	}
	return n
}

// checkOutput refuses an output whose virtual size, in bytes, --max-output does
// not allow. What is written is that at most, and the format's metadata.
func (p *policyFlags) checkOutput(size int64) error {
	if p.maxOutput == "" {
		return nil
	}
	most, err := option.ParseSize(p.maxOutput)
	if err != nil {
		return usagef("--max-output %s: a size is accepted (100G)", p.maxOutput)
	}
	if size < 0 || uint64(size) > most {
		return fmt.Errorf("the output would have a virtual size of %d bytes, --max-output allows %d: %w", size, most, sdk.ErrTooBig)
	}
	return nil
}

// limits returns what a plugin may use.
func (p *policyFlags) limits(verb kind) (launch.Limits, error) {
	var l launch.Limits
	if p.environment != nil {
		return l, p.environment
	}
	if p.untrusted {
		l.MemoryBytes = untrustedMemory
		if verb == looks {
			l.CPUSeconds = untrustedCPUSeconds
		}
	}
	if p.maxMemory != "" {
		n, err := option.ParseSize(p.maxMemory)
		if err != nil || n == 0 || n > math.MaxInt64 {
			return l, usagef("--max-memory %s: a size is accepted (256M)", p.maxMemory)
		}
		l.MemoryBytes = int64(n)
	}
	return l, nil
}

// errTimeout is the cause of a context that --timeout ended.
type errTimeout struct{ after time.Duration }

func (e errTimeout) Error() string { return fmt.Sprintf("timed out after %v", e.after) }

// bound adds the policy's flags to a verb and makes it keep them.
func (a *app) bound(cmd *cobra.Command, verb kind) *cobra.Command {
	a.policy.register(cmd.Flags(), verb)
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		limits, err := a.policy.limits(verb)
		if err != nil {
			return err
		}
		a.limits = limits
		timeout := a.policy.timeout
		if timeout <= 0 && a.policy.untrusted && verb == looks {
			timeout = untrustedTimeout
		}
		if timeout <= 0 {
			return run(cmd, args)
		}
		// Not a deadline: gRPC would tell the plugin of it, which then could end
		// a request before we do, with an error of its own.
		ctx, cancel := context.WithCancelCause(cmd.Context())
		timer := time.AfterFunc(timeout, func() { cancel(errTimeout{timeout}) })
		defer timer.Stop()
		defer cancel(nil)
		cmd.SetContext(ctx)
		err = run(cmd, args)
		var cause errTimeout
		var said exitCode
		if err != nil && !errors.As(err, &said) && errors.As(context.Cause(ctx), &cause) {
			return cause
		}
		return err
	}
	return cmd
}

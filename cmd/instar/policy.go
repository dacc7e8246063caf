package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/instar-img/instar/internal/host/launch"
	"github.com/instar-img/instar/sdk/option"
)

// policyFlags say how much a run trusts its images, and what it may use.
type policyFlags struct {
	untrusted bool
	maxMemory string
	timeout   time.Duration
}

// untrustedVariable turns --untrusted on for every command.
const untrustedVariable = "INSTAR_UNTRUSTED"

// What a plugin may use where --untrusted and nothing else is said.
const (
	untrustedMemory     = 256 << 20
	untrustedCPUSeconds = 30
	// untrustedTimeout ends verbs that look at metadata alone: a plugin that
	// waits uses no processor time.
	untrustedTimeout = 2 * time.Minute
)

func (p *policyFlags) register(flags *pflag.FlagSet) {
	flags.BoolVar(&p.untrusted, "untrusted", envBool(untrustedVariable), "follow no reference, refuse ambiguous content, limit memory and time ("+untrustedVariable+"=1)")
	flags.StringVar(&p.maxMemory, "max-memory", "", "memory that each plugin may use (256M where --untrusted)")
	flags.DurationVar(&p.timeout, "timeout", 0, "time after which the command ends with an error (2m for metadata where --untrusted)")
}

// envBool reports whether an environment variable says yes.
func envBool(name string) bool {
	on, err := option.ParseBool(os.Getenv(name))
	return os.Getenv(name) == "1" || (err == nil && on)
}

// limits returns what a plugin may use. bounded verbs look at metadata alone,
// so that their time can be limited too.
func (p *policyFlags) limits(bounded bool) (launch.Limits, error) {
	var l launch.Limits
	if p.untrusted {
		l.MemoryBytes = untrustedMemory
		if bounded {
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
func (a *app) bound(cmd *cobra.Command, metadataOnly bool) *cobra.Command {
	a.policy.register(cmd.Flags())
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		limits, err := a.policy.limits(metadataOnly)
		if err != nil {
			return err
		}
		a.limits = limits
		timeout := a.policy.timeout
		if timeout <= 0 && a.policy.untrusted && metadataOnly {
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

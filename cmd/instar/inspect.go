package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/gate"
	"github.com/instar-img/instar/internal/host/inspect"
)

// inspectUnsafe is inspect's exit code for an image that breaks a rule.
const inspectUnsafe exitCode = 1

// inspectFlags is inspect's command line.
type inspectFlags struct {
	format string
	output string
	allow  []string
}

func (a *app) inspectCommand() *cobra.Command {
	var f inspectFlags
	var rules strings.Builder
	for _, r := range inspect.Rules {
		fmt.Fprintf(&rules, "  %-13s %s\n", r.Name, r.Meaning)
	}
	cmd := &cobra.Command{
		Use:   "inspect [-f FMT] [--allow RULE]... [--output human|json] FILENAME",
		Short: "Judge whether an image from a stranger is safe to use",
		Long: `Judge whether an image from a stranger is safe to use. Nothing that it refers
to is opened. Exit code 0: no rule is broken; 1: one is, or the command failed.

Rules (formats add their own, see their documentation):
` + rules.String(),
		RunE: func(cmd *cobra.Command, args []string) error { return a.inspect(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVarP(&f.format, "format", "f", "", "format that the image must have")
	flags.StringArrayVar(&f.allow, "allow", nil, "rule that may be broken")
	flags.StringVar(&f.output, "output", "human", "form of the result: human or json")
	a.completeFormats(cmd, "format")
	return cmd
}

// knownRules lists the names of the core's rules.
func knownRules() []string {
	var names []string
	for _, r := range inspect.Rules {
		names = append(names, r.Name)
	}
	return names
}

// inspect is the verb.
func (a *app) inspect(ctx context.Context, f *inspectFlags, args []string) error {
	if f.output != "human" && f.output != "json" {
		return usagef("--output must be used with human or json as argument.")
	}
	for _, rule := range f.allow {
		if !inspect.ValidRule(rule) {
			return fmt.Errorf("--allow %q: no rule has such a name (known: %s, and those of the formats)", rule, strings.Join(knownRules(), ", "))
		}
	}
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	a.policy.untrusted = true
	var err error
	if a.limits, err = a.policy.limits(true); err != nil {
		return err
	}
	opener, err := a.opener()
	if err != nil {
		return err
	}
	opener.Gate, opener.Warn = &gate.Policy{Untrusted: true}, nil
	v, err := inspect.Image(ctx, opener, inspect.Request{Path: args[0], Format: f.format, Allow: f.allow})
	if err != nil {
		return err
	}
	if f.output == "json" {
		fmt.Fprintf(a.out, "%s", render.VerdictJSON(v))
	} else {
		fmt.Fprint(a.out, render.VerdictText(v, render.Style{Escape: true}))
	}
	if !v.Safe() {
		return inspectUnsafe
	}
	return nil
}

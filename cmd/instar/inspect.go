package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/gate"
	"github.com/instar-img/instar/internal/host/inspect"
)

// inspectUnsafe is inspect's exit code for an image that breaks a rule.
const inspectUnsafe exitCode = 1

// inspectFlags is inspect's command line.
type inspectFlags struct {
	format formatFlag
	output string
	allow  []string
}

func (a *app) inspectCommand() *cobra.Command {
	var f inspectFlags
	cmd := &cobra.Command{
		Use:   "inspect [-f FMT] [--allow RULE,...]... [--output human|json] FILENAME",
		Short: "Judge whether an image from a stranger is safe to use",
		Long: `Judge whether an image from a stranger is safe to use. Nothing that it refers
to is opened. Exit code 0: no rule is broken; 1: one is, or the command failed.
-f says which format the image must have, and of several that its content fits
the one as which it is judged.`,
		// Before the limits are taken from it.
		PreRun: func(*cobra.Command, []string) { a.policy.untrusted = true },
		RunE:   func(cmd *cobra.Command, args []string) error { return a.inspect(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.VarP(&f.format, "format", "f", "format that the image must have")
	flags.StringArrayVar(&f.allow, "allow", nil, "rules that may be broken, RULE,... (help lists them)")
	flags.StringVar(&f.output, "output", "human", "form of the result: human or json")
	a.completeFormats(cmd, "format")
	completeValues(cmd, "output", "human", "json")
	completeList(cmd, "allow", func() (names []string) {
		for _, r := range a.rules() {
			names = append(names, r.Name+"\t"+r.Meaning)
		}
		return names
	})
	// The formats' rules are known only when their manifests have been read.
	help := cmd.HelpFunc()
	cmd.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		cmd.Long += "\n\nRules, and the formats that they are of:\n" + strings.TrimSuffix(rulesText(a.rules()), "\n")
		help(cmd, args)
	})
	return cmd
}

// rules lists the core's rules and those of the formats that are installed.
func (a *app) rules() []inspect.Rule {
	s, err := a.session()
	if err != nil {
		return inspect.Rules(nil)
	}
	return inspect.Rules(s.Plugins.Plugins())
}

// rulesText is a table of rules, a line each.
func rulesText(rules []inspect.Rule) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, r := range rules {
		fmt.Fprintf(w, "  %s\t%s\t%s\n", r.Name, dash(r.Format), r.Meaning)
	}
	_ = w.Flush() // into memory
	return b.String()
}

// inspect is the verb.
func (a *app) inspect(ctx context.Context, f *inspectFlags, args []string) error {
	if f.output != "human" && f.output != "json" {
		return usagef("--output must be used with human or json as argument.")
	}
	var allow []string
	for _, rules := range f.allow {
		allow = append(allow, strings.Split(rules, ",")...)
	}
	if slices.Contains(allow, "help") {
		fmt.Fprint(a.out, rulesText(a.rules()))
		return nil
	}
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	format, err := f.format.opening()
	if err != nil {
		return fmt.Errorf("Could not open '%s': %w", args[0], err)
	}
	opener, err := a.opener()
	if err != nil {
		return err
	}
	opener.Gate, opener.Warn = &gate.Policy{Untrusted: true}, nil
	v, err := inspect.Image(ctx, opener, inspect.Request{Path: args[0], Format: format, Allow: allow})
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
	return a.printed()
}

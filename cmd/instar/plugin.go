package main

import (
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/internal/host/launch"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

func (a *app) pluginCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use: "plugin", Short: "Show the format plugins",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usagef("Command not found: plugin %s", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		&cobra.Command{
			Use: "list", Short: "List the plugins found, and the sandbox they run in", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error { return a.pluginList() },
		},
		&cobra.Command{
			Use: "info NAME", Short: "Show what a plugin says of itself", Args: func(_ *cobra.Command, args []string) error {
				if len(args) != 1 {
					return usagef("Expecting one format name")
				}
				return nil
			},
			ValidArgsFunction: func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
				if len(args) > 0 {
					return nil, cobra.ShellCompDirectiveNoFileComp
				}
				return a.formatNames()
			},
			RunE: func(cmd *cobra.Command, args []string) error { return a.pluginInfo(cmd, args[0]) },
		},
	)
	return cmd
}

// pluginList prints a table, what was refused, and the sandbox.
func (a *app) pluginList() error {
	status, err := launch.SandboxStatus()
	if err != nil {
		return err
	}
	s, err := a.session()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(a.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "FORMAT\tALIASES\tVERSION\tPROTOCOL\tCAN\tPROGRAM")
	for _, p := range s.Plugins.Plugins() {
		m := &p.Manifest
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", m.Name, dash(strings.Join(m.Aliases, ",")), m.Version,
			strings.Trim(fmt.Sprint(m.Protocols), "[]"), strings.Join(m.Capabilities, ","), p.Path)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, r := range s.Plugins.Refused() {
		fmt.Fprintf(a.out, "refused: %v\n", r)
	}
	fmt.Fprintf(a.out, "sandbox: %s\n", status)
	return nil
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// pluginInfo starts a plugin and prints what it says of itself.
func (a *app) pluginInfo(cmd *cobra.Command, name string) error {
	s, err := a.session()
	if err != nil {
		return err
	}
	p, err := s.Plugins.ByName(name)
	if err != nil {
		return err
	}
	format, err := s.Format(cmd.Context(), p)
	if err != nil {
		return err
	}
	d := format.Describe()
	m := &d.Manifest
	fmt.Fprintf(a.out, "name: %s\naliases: %s\nversion: %s\nprotocols: %s\ncapabilities: %s\nfile suffixes: %s\nprogram: %s\nmanifest: %s\n",
		m.Name, dash(strings.Join(m.Aliases, ", ")), m.Version, strings.Trim(fmt.Sprint(m.Protocols), "[]"),
		strings.Join(m.Capabilities, ", "), dash(strings.Join(m.Suffixes, ", ")), p.Path, dash(p.ManifestPath))
	for _, root := range m.RuntimeRoots {
		fmt.Fprintf(a.out, "runtime root: %s\n", root)
	}
	for _, probe := range m.Probes {
		fmt.Fprintf(a.out, "probe: %s\n", probeText(probe))
	}
	for _, r := range m.Rules {
		fmt.Fprintf(a.out, "rule: %s, %s\n", r.Name, r.Meaning)
	}
	if len(d.Create) > 0 {
		fmt.Fprint(a.out, option.Help("create options:", d.Create))
	}
	return nil
}

// probeText describes a probe.
func probeText(p sdk.Probe) string {
	switch {
	case p.Bytes == "":
		return fmt.Sprintf("any content, score %d", p.Score)
	case p.AfterComments:
		return fmt.Sprintf("bytes %s at %d behind comments, score %d", p.Bytes, p.Offset, p.Score)
	case p.Offset < 0:
		return fmt.Sprintf("bytes %s at %d before the end, score %d", p.Bytes, -p.Offset, p.Score)
	default:
		return fmt.Sprintf("bytes %s at %d, score %d", p.Bytes, p.Offset, p.Score)
	}
}

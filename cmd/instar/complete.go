package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/sdk/option"
)

// completeFormats completes -f and -F with the installed formats.
func (a *app) completeFormats(cmd *cobra.Command, flags ...string) {
	for _, flag := range flags {
		must(cmd.RegisterFlagCompletionFunc(flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return a.formatNames()
		}))
	}
}

// formatNames returns what completes the name of a format.
func (a *app) formatNames() ([]string, cobra.ShellCompDirective) {
	s, err := a.session()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var names []string
	for _, p := range s.Plugins.Plugins() {
		names = append(append(names, p.Manifest.Name), p.Manifest.Aliases...)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeValues completes a flag with the values it takes.
func completeValues(cmd *cobra.Command, flag string, values ...string) {
	must(cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)))
}

// completeList completes the last of a flag's values separated by commas. Each may
// have a description behind a tab.
func completeList(cmd *cobra.Command, flag string, values func() []string) {
	must(cmd.RegisterFlagCompletionFunc(flag, func(_ *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		done := typed[:strings.LastIndexByte(typed, ',')+1]
		var out []string
		for _, v := range values() {
			if v = done + v; strings.HasPrefix(v, typed) {
				out = append(out, v)
			}
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}))
}

// completeOptions completes the keys and values of -o from the schema of the
// format that a flag names.
func (a *app) completeOptions(cmd *cobra.Command, nameFlag string) {
	must(cmd.RegisterFlagCompletionFunc("options", func(cmd *cobra.Command, _ []string, typed string) ([]string, cobra.ShellCompDirective) {
		s, err := a.session()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		name, err := cmd.Flags().GetString(nameFlag)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		p, err := a.formatOrFallback(s, formatFlag{name: name, given: name != ""}, "")
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		format, err := s.Format(cmd.Context(), p)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return completions(format.Describe().Create, typed), cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}))
}

// completions returns what the last item of an -o string may become.
func completions(schema option.Schema, typed string) []string {
	done, item := "", typed
	if i := strings.LastIndexByte(typed, ','); i >= 0 {
		done, item = typed[:i+1], typed[i+1:]
	}
	key, value, valued := strings.Cut(item, "=")
	var out []string
	for i := range schema {
		k := &schema[i]
		switch {
		case k.Family() || k.Disposition == option.Deferred:
		case !valued && strings.HasPrefix(k.Name, key):
			out = append(out, done+k.Name+"=\t"+k.Help)
		case valued && k.Name == key:
			values := k.Allowed
			if k.Type == option.Bool {
				values = []string{"on", "off"}
			}
			for _, v := range values {
				if strings.HasPrefix(v, value) {
					out = append(out, done+key+"="+v)
				}
			}
		}
	}
	return out
}

// must is for registrations that fail only where the program is wrong.
func must(err error) {
	if err != nil {
		panic(err)
	}
}

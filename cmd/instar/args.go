package main

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// verbOptions are the long options that qemu-img has for a verb. Those may be
// abbreviated; instar's own are written in full, so that a new one makes no
// script ambiguous, and none that guards a run is met by chance.
type verbOptions struct {
	old []string          // of 7.2; each is a flag of that name
	new map[string]string // what 10.0 adds, to the flag that it is here
}

// qemuOptions returns the options of a verb, and those before one for none.
func qemuOptions(verb string) verbOptions {
	switch verb {
	case "":
		return verbOptions{old: []string{"help", "version", "trace"}}
	case "create":
		return verbOptions{
			old: []string{"help", "object"},
			new: map[string]string{
				"quiet": "quiet", "format": "format", "options": "options", "backing": "backing",
				"backing-format": "backing-format", "backing-unsafe": "unsafe",
			},
		}
	case "convert":
		return verbOptions{
			old: []string{"help", "object", "image-opts", "force-share", "target-image-opts", "salvage", "target-is-zero", "bitmaps", "skip-broken-bitmaps"},
			new: map[string]string{
				"quiet": "quiet", "source-format": "format", "source-image-opts": "image-opts", "source-snapshot": "snapshot",
				"source-cache": "source-cache", "target-format": "target-format", "target-options": "options",
				"target-cache": "cache", "compress": "compress", "backing": "target-backing", "backing-format": "backing-format",
				"no-create": "no-create", "progress": "progress", "sparse-size": "sparse-size", "rate": "rate-limit", "parallel": "coroutines",
				"copy-range-offloading": "offload", "oob-writes": "out-of-order",
			},
		}
	case "dd":
		return verbOptions{
			old: []string{"help", "object", "image-opts", "force-share"},
			new: map[string]string{"format": "format", "output-format": "target-format"},
		}
	case "info":
		return verbOptions{old: []string{"help", "format", "output", "backing-chain", "object", "image-opts", "force-share"}}
	case "map":
		return verbOptions{old: []string{"help", "format", "output", "object", "image-opts", "force-share", "start-offset", "max-length"}}
	case "check":
		return verbOptions{
			old: []string{"help", "format", "repair", "output", "object", "image-opts", "force-share"},
			new: map[string]string{"quiet": "quiet", "cache": "cache"},
		}
	case "measure":
		return verbOptions{
			old: []string{"help", "image-opts", "object", "output", "size", "force-share"},
			new: map[string]string{"target-format": "target-format", "options": "options", "format": "format", "snapshot": "snapshot"},
		}
	case "compare":
		return verbOptions{
			old: []string{"help", "object", "image-opts", "force-share"},
			new: map[string]string{
				"quiet": "quiet", "progress": "progress", "a-format": "format", "b-format": "second-format",
				"strict": "strict", "cache": "source-cache",
			},
		}
	}
	return verbOptions{}
}

// errAmbiguous lists what an abbreviation may stand for, as getopt_long does.
func errAmbiguous(arg string, names []string) error {
	return usagef("option '%s' is ambiguous; possibilities: '--%s'", arg, strings.Join(names, "' '--"))
}

// normalise reads a command line as getopt_long does and returns it in the form
// that cobra reads in the same way: VERB, flags by their full names, --, operands.
// What the verbs do not know is an error in qemu-img's words. Command lines of
// other commands than verbs come back as they are.
func normalise(root *cobra.Command, args []string) ([]string, error) {
	root.InitDefaultHelpFlag()
	root.InitDefaultVersionFlag()
	before, rest, err := scan(root, "", args, true)
	if err != nil || len(rest) == 0 {
		return before, err
	}
	for _, ends := range []string{"--help", "--version"} {
		if slices.Contains(before, ends) {
			return []string{ends}, nil
		}
	}
	known := slices.Contains([]string{"help", "completion", cobra.ShellCompRequestCmd, cobra.ShellCompNoDescRequestCmd}, rest[0]) // cobra's own
	for _, verb := range root.Commands() {
		if verb.Name() != rest[0] {
			continue
		}
		known = true
		if verb.HasSubCommands() {
			break
		}
		verb.InitDefaultHelpFlag()
		flags, operands, err := scan(verb, verb.Name(), rest[1:], false)
		if err != nil {
			return nil, err
		}
		before = slices.DeleteFunc(before, func(s string) bool { return strings.HasPrefix(s, "--trace=") })
		return slices.Concat([]string{rest[0]}, before, flags, []string{"--"}, operands), nil
	}
	if !known {
		rest = rest[:1] // that there is no such command is what matters
	}
	return append(before, rest...), nil
}

// scan splits arguments into flags by their full names and operands. Where
// first is set the first operand and all that follows it are operands.
func scan(cmd *cobra.Command, verb string, args []string, first bool) (flags, operands []string, err error) {
	for i := 0; i < len(args); i++ {
		arg := args[i]
		var used []string
		var want string // the flag that takes the next argument
		switch {
		case arg == "--":
			return flags, append(operands, args[i+1:]...), nil
		case len(arg) < 2 || arg[0] != '-':
			if first {
				return flags, args[i:], nil
			}
			operands = append(operands, arg)
			continue
		case strings.HasPrefix(arg, "--"):
			used, want, err = longFlag(cmd, verb, arg, args[i+1:])
		default:
			used, want, err = shortFlags(cmd, arg)
		}
		if err != nil {
			return nil, nil, err
		}
		flags = append(flags, used...)
		if want == "" {
			continue
		}
		if i++; i == len(args) {
			return nil, nil, usagef("missing argument for option '%s'", arg)
		}
		flags = append(flags, "--"+want+"="+args[i])
	}
	return flags, operands, nil
}

// optionalValue is a flag that can do without a value. getopt_long knows values
// of such only behind =; this one also takes the next argument, where that is one
// of its values.
type optionalValue interface {
	accepts(value string) bool
}

// longFlag reads --NAME or --NAME=VALUE, which next follows.
func longFlag(cmd *cobra.Command, verb, arg string, next []string) (used []string, want string, err error) {
	name, value, valued := strings.Cut(arg[2:], "=")
	flag, err := findFlag(cmd, verb, name, arg)
	if err != nil {
		return nil, "", err
	}
	switch {
	case valued && isSwitch(flag) && slices.Contains(qemuOptions(verb).old, flag.Name):
		return nil, "", errUnrecognized(arg)
	case valued:
		return []string{"--" + flag.Name + "=" + value}, "", nil
	case flag.NoOptDefVal != "":
		if v, ok := flag.Value.(optionalValue); ok && len(next) > 0 && v.accepts(next[0]) {
			return nil, flag.Name, nil
		}
		return []string{"--" + flag.Name}, "", nil
	}
	return nil, flag.Name, nil
}

// shortFlags reads -abc, where the rest may be the value of one of them.
func shortFlags(cmd *cobra.Command, arg string) (used []string, want string, err error) {
	for i := 1; i < len(arg); i++ {
		flag := shorthand(cmd, arg[i])
		switch {
		case flag == nil:
			_, n := utf8.DecodeRuneInString(arg[i:])
			return nil, "", errUnrecognized("-" + arg[i:i+n])
		case flag.NoOptDefVal != "":
			used = append(used, "--"+flag.Name)
		case i+1 < len(arg):
			return append(used, "--"+flag.Name+"="+arg[i+1:]), "", nil
		default:
			return used, flag.Name, nil
		}
	}
	return used, "", nil
}

func errUnrecognized(arg string) error { return usagef("unrecognized option '%s'", arg) }

// isSwitch reports whether a flag is on or off.
func isSwitch(f *pflag.Flag) bool { return f.Value.Type() == "bool" }

// flagSets are where the flags of a command are.
func flagSets(cmd *cobra.Command) []*pflag.FlagSet {
	return []*pflag.FlagSet{cmd.Flags(), cmd.PersistentFlags(), cmd.InheritedFlags()}
}

func lookup(cmd *cobra.Command, name string) *pflag.Flag {
	for _, set := range flagSets(cmd) {
		if f := set.Lookup(name); f != nil {
			return f
		}
	}
	return nil
}

func shorthand(cmd *cobra.Command, c byte) *pflag.Flag {
	if c >= 0x80 {
		return nil
	}
	for _, set := range flagSets(cmd) {
		if f := set.ShorthandLookup(string(rune(c))); f != nil {
			return f
		}
	}
	return nil
}

// findFlag returns the flag of a long name, which may be qemu-img's, or a
// beginning of one that fits nothing else. arg is for the error.
func findFlag(cmd *cobra.Command, verb, name, arg string) (*pflag.Flag, error) {
	if f := lookup(cmd, name); f != nil {
		return f, nil
	}
	options := qemuOptions(verb)
	if to, ok := options.new[name]; ok {
		return lookup(cmd, to), nil
	}
	beginning := func(s string) bool { return strings.HasPrefix(s, name) }
	var fits []string
	for _, s := range options.old {
		if beginning(s) {
			fits = append(fits, s)
		}
	}
	if len(fits) == 1 { // as scripts for 7.2 have it, whatever came later
		return lookup(cmd, fits[0]), nil
	}
	targets := map[string]bool{}
	for _, s := range fits {
		targets[s] = true
	}
	for s, to := range options.new {
		if beginning(s) {
			fits = append(fits, s)
			targets[to] = true
		}
	}
	slices.Sort(fits)
	switch len(targets) {
	case 0:
		return nil, errUnrecognized(arg)
	case 1:
		for to := range targets {
			return lookup(cmd, to), nil
		}
	}
	return nil, errAmbiguous(arg, fits)
}

// traceFlag registers what qemu-img takes before a verb: there is nothing to
// trace here.
func traceFlag(flags *pflag.FlagSet) {
	flags.StringArrayP("trace", "T", nil, "accepted for qemu-img's sake, without effect")
}

// objectsFlag registers --object, and returns what checks its values.
func objectsFlag(flags *pflag.FlagSet) func() error {
	var objects []string
	flags.StringArrayVar(&objects, "object", nil, "accepted for qemu-img's sake: objects serve encryption, which is deferred")
	return func() error { return checkObjects(objects) }
}

// checkSourceCache checks -T.
func checkSourceCache(mode string) error {
	if !slices.Contains(cacheModes, mode) {
		return fmt.Errorf("Invalid source cache option: %s", mode)
	}
	return nil
}

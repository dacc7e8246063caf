package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/ahead"
	"github.com/instar-img/instar/internal/host/errno"
	"github.com/instar-img/instar/internal/host/gate"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/internal/host/launch"
	"github.com/instar-img/instar/internal/host/remote"
	"github.com/instar-img/instar/internal/host/session"
	"github.com/instar-img/instar/sdk"
)

// app is what the verbs share: how they were called, and the session.
//
// Output rules: results go to out, errors and nothing else to err; colour and
// bars only on a terminal; what -v adds goes to err.
type app struct {
	name    string // under which the program was called: instar, or qemu-img
	out     io.Writer
	err     io.Writer
	verbose bool
	policy  policyFlags
	limits  launch.Limits // of each plugin
	meter   meter         // of a verb that shows how far it is; nil elsewhere

	currentMu sync.Mutex // images of one command are opened side by side
	current   *session.Session
}

// usageError is an error in the command line itself.
type usageError struct{ text string }

func (e *usageError) Error() string { return e.text }

func usagef(format string, args ...any) error { return &usageError{fmt.Sprintf(format, args...)} }

// exitCode ends the program with a code; nothing more is printed.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit code %d", int(e)) }

// exit returns the exit code and the message for an error of a command.
func (a *app) exit(ctx context.Context, err error) (int, string) {
	var code exitCode
	if errors.As(err, &code) {
		return int(code), ""
	}
	var usage *usageError
	if errors.As(err, &usage) {
		return 1, fmt.Sprintf("%s\nTry '%s --help' for more information", usage.text, a.name)
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		var late errTimeout
		if errors.As(context.Cause(ctx), &late) {
			return 1, late.Error()
		}
		return 130, "interrupted"
	}
	var several reports
	if !errors.As(err, &several) {
		return 1, lines(advised(err))
	}
	texts := make([]string, len(several))
	for i, e := range several {
		texts[i] = lines(advised(e))
	}
	return 1, strings.Join(texts, "\n"+a.name+": ")
}

// advised returns an error's text, with what can be done about it on a line of its
// own.
func advised(err error) string {
	text := errno.Text(err)
	if hint := sdk.HintOf(err); hint != "" {
		text += "\n" + hint
	}
	return text
}

// lines makes characters visible that would steer a terminal, in a text of one
// or more lines: it may hold what images say.
func lines(s string) string {
	parts := strings.Split(s, "\n")
	for i := range parts {
		parts[i] = render.Escape(parts[i])
	}
	return strings.Join(parts, "\n")
}

// reports are errors that are printed one by one, each with the prefix.
type reports []error

func (r reports) Error() string { return errors.Join(r...).Error() }

// logf prints a line for -v.
func (a *app) logf(format string, args ...any) {
	if a.verbose {
		fmt.Fprintf(a.err, a.name+": "+format+"\n", args...)
	}
}

// logVariable sets the level of what plugins log.
const logVariable = "INSTAR_LOG"

// logger returns where plugins' logs go: nowhere (nil), unless -v or INSTAR_LOG
// asks.
func (a *app) logger() (hclog.Logger, error) {
	v := os.Getenv(logVariable)
	level := hclog.LevelFromString(v)
	switch {
	case v != "" && level == hclog.NoLevel:
		return nil, fmt.Errorf("%s=%q: accepted are trace, debug, info, warn, error and off", logVariable, v)
	case level == hclog.NoLevel && a.verbose:
		level = hclog.Info
	case level == hclog.NoLevel:
		return nil, nil //nolint:nilnil // see above
	}
	return hclog.New(&hclog.LoggerOptions{Name: a.name, Output: escaped{a.err}, Level: level}), nil
}

// escaped takes what plugins log, which is no more to be trusted than what they
// answer.
type escaped struct{ w io.Writer }

func (e escaped) Write(p []byte) (int, error) {
	lines := strings.Split(strings.TrimSuffix(string(p), "\n"), "\n")
	for i := range lines {
		lines[i] = render.Escape(lines[i])
	}
	_, err := io.WriteString(e.w, strings.Join(lines, "\n")+"\n")
	return len(p), err
}

// opener returns what opens images, under the policy of this run.
func (a *app) opener() (*image.Opener, error) {
	s, err := a.session()
	if err != nil {
		return nil, err
	}
	return &image.Opener{Session: s, Gate: &gate.Policy{Untrusted: a.policy.untrusted}, Warn: a.warn}, nil
}

// warn prints a warning, once.
func (a *app) warn(text string) { fmt.Fprintf(a.err, "%s: warning: %s\n", a.name, render.Escape(text)) }

// standardOutput remembers that something could not be written.
type standardOutput struct {
	*os.File
	err error
}

func (o *standardOutput) Write(p []byte) (int, error) {
	n, err := o.File.Write(p)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}

func (o *standardOutput) WriteString(s string) (int, error) { return o.Write([]byte(s)) }

// printed returns why results could not be written. Who prints a verdict must not
// end as if it had.
func (a *app) printed() error {
	if o, ok := a.out.(*standardOutput); ok {
		return o.err
	}
	return nil
}

// terminal reports whether results go to a terminal.
func (a *app) terminal() bool {
	f, ok := a.out.(*standardOutput)
	return ok && term.IsTerminal(int(f.Fd()))
}

// width returns the columns of the terminal, 80 where there is none.
func (a *app) width() int {
	if f, ok := a.out.(*standardOutput); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
			return w
		}
	}
	return 80
}

// openSource opens the image that a reading verb works on.
func (a *app) openSource(ctx context.Context, f *sourceFlags, name string, opts image.Options) (*image.Chain, error) {
	opener, err := a.opener()
	if err != nil {
		return nil, err
	}
	source, err := f.parse(name)
	if errors.Is(err, errExclusive) {
		return nil, err
	}
	if err != nil {
		return nil, fmt.Errorf("Could not open '%s': %w", name, err)
	}
	opts.Name = name
	opener.Shared = f.shared
	source.Apply(&opts)
	if remote.IsURL(source.Path) {
		file, err := a.fetch(ctx, source.Path)
		if err != nil {
			return nil, err
		}
		return opener.OpenFile(ctx, source.Path, file, opts)
	}
	return opener.Open(ctx, source.Path, opts)
}

// session returns the run's session, with the plugins found.
func (a *app) session() (*session.Session, error) {
	a.currentMu.Lock()
	defer a.currentMu.Unlock()
	if a.current != nil {
		return a.current, nil
	}
	plugins, err := ahead.Find()
	if err != nil {
		return nil, err
	}
	for _, r := range plugins.Refused() {
		a.logf("%v", r)
	}
	logger, err := a.logger()
	if err != nil {
		return nil, err
	}
	a.current = session.New(plugins, launch.Options{Logger: logger, Limits: a.limits})
	a.current.Bounds = a.policy.bounds()
	return a.current, nil
}

// close ends the plugins. A command that failed may have been stopped while they
// were at work.
func (a *app) close(failed bool) {
	ahead.Discard()
	a.currentMu.Lock()
	defer a.currentMu.Unlock()
	if a.current != nil {
		a.current.Close(failed)
	}
}

// short is called by verbs that do little: what wakes further processors takes
// longer then than what they would do.
func short() { runtime.GOMAXPROCS(1) }

// rootCommand builds the command tree.
func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           a.name,
		Short:         "Create, inspect, check, compare and convert virtual disk images",
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("Not enough arguments")
			}
			return usagef("Command not found: %s", args[0])
		},
		RunE: func(*cobra.Command, []string) error { return nil },
	}
	a.registerUsage(root)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err.Error()} })
	root.Flags().BoolP("version", "V", false, "print the version")
	traceFlag(root.Flags())
	root.PersistentFlags().BoolVarP(&a.verbose, "verbose", "v", false, "say what is done beside the result, on standard error")
	root.AddCommand(
		a.bound(a.createCommand(), writes),
		a.bound(a.convertCommand(), writes),
		a.bound(a.ddCommand(), writes),
		a.bound(a.infoCommand(), looks),
		a.bound(a.mapCommand(), looks),
		a.bound(a.checkCommand(), looks),
		a.bound(a.measureCommand(), looks),
		a.bound(a.compareCommand(), reads),
		a.bound(a.inspectCommand(), looks),
		a.pluginCommand(),
	)
	return root
}

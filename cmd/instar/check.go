package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/errno"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
)

// Exit codes of check, as qemu-img has them.
const (
	checkFailed      exitCode = 1
	checkCorrupt     exitCode = 2
	checkLeaks       exitCode = 3
	checkUnsupported exitCode = 63
)

// checkFlags is check's command line.
type checkFlags struct {
	source   sourceFlags
	objects  func() error
	output   string
	repair   repairFlag
	cache    string
	quiet    bool
	progress bool
}

func (a *app) checkCommand() *cobra.Command {
	var f checkFlags
	cmd := &cobra.Command{
		Use:   "check [-f FMT] [--output human|json|ndjson] [-r leaks|all] [-p] [-q] [-T CACHE] [-U] FILENAME...",
		Short: "Check the consistency of disk images, and repair them",
		Long: `Check the consistency of disk images, and with -r repair them.

Exit codes: 0 nothing wrong; 1 the check could not be completed; 2 corrupt;
3 leaked clusters, not corrupt; 63 the format cannot be checked. Of many images
the gravest: 2, 1, 3, 63.`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.check(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.StringVar(&f.output, "output", "human", "form of the result: human, json, or ndjson (a line for each image)")
	flags.VarP(&f.repair, "repair", "r", "repair: leaks, or all (leaks and corruptions)")
	flags.BoolVarP(&f.progress, "progress", "p", false, "show progress")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "print errors alone")
	flags.StringVarP(&f.cache, "cache", "T", "writeback", "cache mode: none, directsync, writeback, writethrough or unsafe")
	f.objects = objectsFlag(flags)
	a.completeFormats(cmd, "format")
	completeValues(cmd, "output", resultForms...)
	completeValues(cmd, "repair", "leaks", "all")
	completeValues(cmd, "cache", cacheModes...)
	return cmd
}

// repairFlag is -r.
type repairFlag struct {
	fix sdk.Fix
	bad error
}

// Set keeps what is wrong with the value for later: the command line is read
// whole first.
func (v *repairFlag) Set(s string) error {
	switch s {
	case "leaks":
		v.fix = sdk.FixLeaks
	case "all":
		v.fix = sdk.FixAll
	default:
		v.bad = cmp.Or(v.bad, usagef("Unknown option value for -r (expecting 'leaks' or 'all'): %s", s))
	}
	return nil
}

func (v *repairFlag) String() string { return "" }
func (v *repairFlag) Type() string   { return "string" }

// checked is the outcome for one image.
type checked struct {
	name     string
	format   string
	repaired *sdk.CheckResult // what the first of two checks repaired
	result   *sdk.CheckResult // nil: the format cannot be checked
	messages messages         // of many images
}

// check is the verb.
func (a *app) check(ctx context.Context, f *checkFlags, args []string) error {
	out, err := a.checkResults(f.output, len(args))
	if err != nil {
		return err
	}
	if f.repair.bad != nil {
		return f.repair.bad
	}
	fix := f.repair.fix
	if len(args) == 0 {
		return usagef("Expecting one image file name")
	}
	if err := cmp.Or(f.objects(), checkSourceCache(f.cache)); err != nil {
		return err
	}
	var progress *render.Progress
	if f.progress && !f.quiet {
		progress = render.NewProgress(a.out, 1)
	}
	all := parts{part: make([]float64, len(args)), set: progress.Set}
	turns := takeTurns(args, fix != sdk.FixNone)
	work := func(ctx context.Context, i int, name string) (*checked, error) {
		defer close(turns[i].done)
		if err := turns[i].wait(ctx); err != nil {
			return nil, err
		}
		return a.checkOne(ctx, f, fix, name, out.many, all.of(i))
	}
	emit := func(c *checked) error {
		_, _ = a.err.Write(c.messages.buf.Bytes())
		if c.result == nil || f.quiet {
			return nil
		}
		return out.add(c.name, render.RepairedText(c.repaired)+render.CheckText(c.result), render.CheckObject(c.name, c.format, c.result))
	}
	if !out.many {
		c, err := work(ctx, 0, args[0])
		progress.Close()
		if c == nil {
			return err
		}
		return errors.Join(emit(c), err)
	}
	// Results come after the progress: nothing is printed into its line.
	var done []*checked
	err = each(ctx, a, args, work, func(c *checked) error {
		if progress == nil {
			return emit(c)
		}
		done = append(done, c)
		return nil
	})
	progress.Close()
	for _, c := range done {
		err = errors.Join(err, emit(c))
	}
	if !f.quiet {
		err = errors.Join(err, out.close())
	}
	return err
}

// turn is when an image's turn comes: an image that is named twice is not
// repaired by two at a time, who would keep each other out.
type turn struct {
	file   os.FileInfo
	before <-chan struct{} // closed when the image's other check is done
	done   chan struct{}
}

// takeTurns returns the turns of the images. Where nothing is repaired nobody
// waits.
func takeTurns(names []string, repair bool) []turn {
	turns := make([]turn, len(names))
	for i, name := range names {
		turns[i].done = make(chan struct{})
		if !repair {
			continue
		}
		turns[i].file, _ = os.Stat(name) // what is no file is reported when it is opened
		for j := range i {
			if turns[i].file != nil && turns[j].file != nil && os.SameFile(turns[i].file, turns[j].file) {
				turns[i].before = turns[j].done
			}
		}
	}
	return turns
}

// wait waits for the turn.
func (t *turn) wait(ctx context.Context) error {
	if t.before == nil {
		return nil
	}
	select {
	case <-t.before:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// checkOne checks an image. An exitCode as the error comes with the outcome.
func (a *app) checkOne(ctx context.Context, f *checkFlags, fix sdk.Fix, name string, many bool, progress func(float64)) (*checked, error) {
	chain, err := a.openSource(ctx, &f.source, name, image.Options{Check: true, ReadWrite: fix != sdk.FixNone})
	if err != nil {
		return nil, err
	}
	defer closeChain(chain, many)
	layer := chain.Top()
	c := &checked{name: name, format: layer.Format()}
	say := func(line string) { fmt.Fprintln(a.err, render.Escape(line)) }
	if many {
		say = func(line string) { c.messages.add(a.shown(name) + ": " + render.Escape(line)) }
	}
	for _, err := range layer.Refused {
		say(errno.Text(err))
	}
	checker, ok := sdk.As[sdk.Checker](layer.Image)
	if !ok || fix != sdk.FixNone && !layer.Plugin.Manifest.Has(sdk.CapRepair) {
		return c, c.unsupported(a, many, say)
	}
	if err := c.run(ctx, checker, sdk.CheckRequest{Fix: fix, Message: say, Progress: progress}); err != nil {
		if errors.Is(err, sdk.ErrUnsupported) {
			return c, c.unsupported(a, many, say)
		}
		return nil, named(many, name, fmt.Errorf("Check failed: %w", err))
	}
	if c.result.CheckErrors != 0 {
		if many {
			say("Check failed")
		} else {
			c.messages.add(a.name + ": Check failed")
		}
	}
	return c, checkCode(c.result)
}

// unsupported reports that the format cannot be checked, or repaired.
func (c *checked) unsupported(a *app, many bool, say func(string)) error {
	const text = "This image format does not support checks"
	if many {
		say(text)
	} else {
		say(a.name + ": " + text)
	}
	c.result = nil
	return checkUnsupported
}

// named puts an image's name before an error where there are many images.
func named(many bool, name string, err error) error {
	if !many {
		return err
	}
	return fmt.Errorf("%s: %w", name, err)
}

// run checks, and checks again what was repaired.
func (c *checked) run(ctx context.Context, checker sdk.Checker, req sdk.CheckRequest) error {
	var err error
	if c.result, err = checker.Check(ctx, req); err != nil {
		return err
	}
	if c.result.LeaksFixed == 0 && c.result.CorruptionsFixed == 0 {
		return nil
	}
	c.repaired = c.result
	req.Fix = sdk.FixNone
	if c.result, err = checker.Check(ctx, req); err != nil {
		return err
	}
	c.result.LeaksFixed, c.result.CorruptionsFixed = c.repaired.LeaksFixed, c.repaired.CorruptionsFixed
	return nil
}

// checkCode returns the exit code for a result, nil for 0.
func checkCode(r *sdk.CheckResult) error {
	switch {
	case r.CheckErrors != 0:
		return checkFailed
	case r.Corruptions != 0:
		return checkCorrupt
	case r.Leaks != 0:
		return checkLeaks
	}
	return nil
}

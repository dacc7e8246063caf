package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/cmd/instar/internal/render"
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
	output   string
	repair   string
	quiet    bool
	progress bool
}

func (a *app) checkCommand() *cobra.Command {
	var f checkFlags
	cmd := &cobra.Command{
		Use:   "check [-f FMT] [--output human|json] [-r leaks|all] [-p] [-q] [-U] FILENAME...",
		Short: "Check the consistency of disk images, and repair them",
		Long: `Check the consistency of disk images, and with -r repair them.

Exit codes: 0 nothing wrong; 1 the check could not be completed; 2 corrupt;
3 leaked clusters, not corrupt; 63 the format cannot be checked.`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.check(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.StringVar(&f.output, "output", "human", "form of the result: human or json")
	flags.StringVarP(&f.repair, "repair", "r", "", "repair: leaks, or all (leaks and corruptions)")
	flags.BoolVarP(&f.progress, "progress", "p", false, "show progress")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "print errors alone")
	a.completeFormats(cmd, "format")
	return cmd
}

// check is the verb.
func (a *app) check(ctx context.Context, f *checkFlags, args []string) error {
	if err := checkOutput(f.output); err != nil {
		return err
	}
	fix := sdk.FixNone
	switch f.repair {
	case "":
	case "leaks":
		fix = sdk.FixLeaks
	case "all":
		fix = sdk.FixAll
	default:
		return usagef("--repair (-r) expects 'leaks' or 'all' as argument.")
	}
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	chain, err := a.openSource(ctx, &f.source, args[0], image.Options{Check: true, ReadWrite: fix != sdk.FixNone})
	if err != nil {
		return err
	}
	defer chain.Close()
	layer := chain.Top()
	checker, ok := sdk.As[sdk.Checker](layer.Image)
	if !ok {
		fmt.Fprintf(a.err, "%s: This image format does not support checks\n", a.name)
		return checkUnsupported
	}
	var progress *render.Progress
	if f.progress && !f.quiet {
		progress = render.NewProgress(a.out, 1)
	}
	result, err := a.runCheck(ctx, checker, f, fix, progress)
	progress.Close()
	if err != nil {
		return fmt.Errorf("Check failed: %w", err)
	}
	switch {
	case f.output == "json":
		fmt.Fprintf(a.out, "%s", render.CheckJSON(args[0], layer.Format(), result))
	case !f.quiet:
		fmt.Fprint(a.out, render.CheckText(result))
	}
	return checkCode(result)
}

// runCheck checks, and checks again what was repaired.
func (a *app) runCheck(ctx context.Context, checker sdk.Checker, f *checkFlags, fix sdk.Fix, progress *render.Progress) (*sdk.CheckResult, error) {
	req := sdk.CheckRequest{
		Fix:      fix,
		Message:  func(line string) { fmt.Fprintln(a.err, render.Escape(line)) },
		Progress: func(part float64) { progress.Set(part) },
	}
	result, err := checker.Check(ctx, req)
	if err != nil || (result.LeaksFixed == 0 && result.CorruptionsFixed == 0) {
		return result, err
	}
	if f.output == "human" && !f.quiet {
		fmt.Fprint(a.out, render.RepairedText(result))
	}
	req.Fix = sdk.FixNone
	again, err := checker.Check(ctx, req)
	if err != nil {
		return nil, err
	}
	again.LeaksFixed, again.CorruptionsFixed = result.LeaksFixed, result.CorruptionsFixed
	return again, nil
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

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/copier"
	"github.com/instar-img/instar/internal/host/errno"
	"github.com/instar-img/instar/internal/host/image"
)

// Exit codes of compare, as qemu-img has them; 0: the images are identical.
const (
	compareDiffers    exitCode = 1
	compareOpenFailed exitCode = 2
	compareMapFailed  exitCode = 3
	compareReadFailed exitCode = 4
)

// compareFlags is compare's command line.
type compareFlags struct {
	source   sourceFlags
	format2  formatFlag
	strict   bool
	progress bool
	quiet    bool
	cache    string
	objects  func() error
}

func (a *app) compareCommand() *cobra.Command {
	var f compareFlags
	cmd := &cobra.Command{
		Use:   "compare [-f FMT] [-F FMT] [-s] [-p] [-q] [-T CACHE] [-U] FILENAME1 FILENAME2",
		Short: "Compare the content of two disk images",
		Long: `Compare the content of two disk images, whatever their formats. Where one is
longer the rest of it must read as zeros; with -s the sizes must be equal, and
what is allocated.

Exit codes: 0 identical; 1 different; 2 an image could not be opened; 3 where
its data lies could not be told; 4 it could not be read.`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.compare(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.VarP(&f.format2, "second-format", "F", "format of the second image; detected where not given")
	flags.BoolVarP(&f.strict, "strict", "s", false, "sizes and allocation must be equal too")
	flags.BoolVarP(&f.progress, "progress", "p", false, "show progress")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "print errors alone")
	flags.StringVarP(&f.cache, "source-cache", "T", "writeback", "cache mode: none, directsync, writeback, writethrough or unsafe")
	f.objects = objectsFlag(flags)
	a.completeFormats(cmd, "format", "second-format")
	completeValues(cmd, "source-cache", cacheModes...)
	return cmd
}

// compareError is an error with an exit code of its own.
type compareError struct {
	code exitCode
	err  error
}

// compare is the verb. Its errors have codes of their own, 2 where nothing else
// fits.
func (a *app) compare(ctx context.Context, f *compareFlags, args []string) error {
	identical, failed := a.compareImages(ctx, f, args)
	switch {
	case failed != nil:
	case identical:
		return nil
	default:
		return compareDiffers
	}
	code, message := a.exit(ctx, failed.err)
	if code == 1 {
		code = int(failed.code)
	}
	fmt.Fprintf(a.err, "%s: %s\n", a.name, message)
	return exitCode(code)
}

// compareImages prints the verdict.
func (a *app) compareImages(ctx context.Context, f *compareFlags, args []string) (identical bool, failed *compareError) {
	if len(args) != 2 {
		return false, &compareError{compareDiffers, usagef("Expecting two image file names")}
	}
	if err := f.check(); err != nil {
		return false, &compareError{compareOpenFailed, err}
	}
	var sources [2]*copier.Source
	for i, name := range args {
		flags := f.source
		if i == 1 {
			flags.format = f.format2
		}
		chain, err := a.openSource(ctx, &flags, name, image.Options{Backing: true})
		if err != nil {
			return false, &compareError{compareOpenFailed, err}
		}
		defer chain.Close()
		sources[i] = copier.FromChain(chain)
	}
	var progress *render.Progress
	if f.progress && !f.quiet {
		progress = render.NewProgress(a.out, 1)
	}
	defer progress.Close()
	result, err := copier.Compare(ctx, sources[0], sources[1], copier.CompareOptions{
		Strict:   f.strict,
		Progress: func(done, total int64) { progress.Set(float64(done) / float64(max(total, 1))) },
	})
	if err != nil {
		return false, compareFailure(err, args)
	}
	if !f.quiet {
		fmt.Fprint(a.out, verdictText(result, sources))
	}
	return result.Verdict == copier.Identical, nil
}

// check checks the command line.
func (f *compareFlags) check() error {
	return cmp.Or(f.objects(), checkSourceCache(f.cache))
}

// compareFailure words a failure as qemu-img does.
func compareFailure(err error, names []string) *compareError {
	var failed *copier.CompareError
	if !errors.As(err, &failed) {
		return &compareError{compareReadFailed, err}
	}
	name := names[0]
	if failed.Second {
		name = names[1]
	}
	if failed.Map {
		return &compareError{compareMapFailed, &errno.Error{Text: "Sector allocation test failed for " + name, Err: failed.Err}}
	}
	return &compareError{compareReadFailed, &errno.Error{Text: fmt.Sprintf("Error while reading offset %d of %s", failed.Offset, name), Err: failed.Err}}
}

// verdictText is what compare prints.
func verdictText(result copier.Comparison, sources [2]*copier.Source) string {
	warning := ""
	if shorter := min(sources[0].Size, sources[1].Size); sources[0].Size != sources[1].Size &&
		(result.Verdict == copier.Identical || result.Offset >= shorter) {
		warning = render.SizeMismatch
	}
	switch result.Verdict {
	case copier.DifferentSize:
		return render.StrictSizeMismatch
	case copier.DifferentStatus:
		return render.StatusMismatch(result.Offset)
	case copier.DifferentContent:
		return warning + render.ContentMismatch(result.Offset)
	default:
		return warning + render.ImagesIdentical
	}
}

package main

import (
	"context"
	"fmt"
	"math"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// measureFlags is measure's command line.
type measureFlags struct {
	source   sourceFlags
	target   string
	options  []string
	objects  []string
	size     string
	snapshot string
	output   string
	keys     keyFlags
}

func (a *app) measureCommand() *cobra.Command {
	var f measureFlags
	cmd := &cobra.Command{
		Use:   "measure [-O FMT] [-o KEY=VAL,...]... [--size N | [-f FMT] [-l SNAPSHOT] FILENAME]",
		Short: "Compute the file size of an image before it is made",
		RunE:  func(cmd *cobra.Command, args []string) error { return a.measure(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.StringVarP(&f.target, "target-format", "O", "", "format of the image to be made")
	flags.StringArrayVarP(&f.options, "options", "o", nil, "format options KEY=VALUE,... (help lists them)")
	flags.StringVar(&f.size, "size", "", "virtual size of a new, empty image")
	flags.StringVarP(&f.snapshot, "snapshot", "l", "", "measure an internal snapshot of the source")
	flags.StringArrayVar(&f.objects, "object", nil, "accepted for qemu-img's sake: objects serve encryption, which is deferred")
	flags.StringVar(&f.output, "output", "human", "form of the result: human or json")
	f.keys.register(flags)
	a.completeFormats(cmd, "format", "target-format")
	return cmd
}

// measure is the verb.
func (a *app) measure(ctx context.Context, f *measureFlags, args []string) error {
	if err := checkOutput(f.output); err != nil {
		return err
	}
	for _, o := range f.objects {
		if err := checkObject(o); err != nil {
			return err
		}
	}
	switch {
	case len(args) > 1:
		return usagef("At most one filename argument is allowed.")
	case len(args) == 0 && f.size == "":
		return usagef("Either --size N or one filename must be specified.")
	case len(args) == 1 && f.size != "":
		return usagef("--size N cannot be used together with a filename.")
	case f.size != "" && (f.source.format != "" || f.snapshot != ""):
		return usagef("--image-opts, -f, and -l can only be used with a filename argument.")
	}
	s, err := a.session()
	if err != nil {
		return err
	}
	plugin, err := a.formatOrFallback(s, f.target, "")
	if err != nil {
		return err
	}
	format, err := s.Format(ctx, plugin)
	if err != nil {
		return err
	}
	fromO, help, err := splitOptions(f.options)
	if err != nil {
		return err
	}
	schema := format.Describe().Create
	if help {
		fmt.Fprint(a.out, option.Help(fmt.Sprintf("Supported %s options:", plugin.Manifest.Name), schema))
		return nil
	}
	values, err := schema.Validate(plugin.Manifest.Name, option.Merge(f.keys.settings, fromO))
	if err != nil {
		return err
	}
	var chain *image.Chain
	var size int64
	if len(args) == 1 {
		if chain, err = a.openSource(ctx, &f.source, args[0], image.Options{Backing: true, Snapshot: f.snapshot}); err != nil {
			return err
		}
		defer chain.Close()
		size = chain.VirtualSize()
	} else {
		n, err := option.ParseSize(f.size)
		if err != nil || n > math.MaxInt64 {
			return errImageSize
		}
		size = int64(n)
	}
	values = schema.WithSize(values, keySize, uint64(size))
	plan, err := format.PlanCreate(ctx, sdk.CreateRequest{Options: values, Size: size, BackingName: values.StringOr(keyBackingFile, ""), Name: "measured"})
	if err != nil {
		return err
	}
	result, err := image.Measure(ctx, plan, chain)
	if err != nil {
		return err
	}
	if f.output == "json" {
		fmt.Fprintf(a.out, "%s", render.MeasureJSON(result))
	} else {
		fmt.Fprint(a.out, render.MeasureText(result))
	}
	return nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/client"
	"github.com/instar-img/instar/sdk/option"
)

// measureFlags is measure's command line.
type measureFlags struct {
	source   sourceFlags
	target   formatFlag
	options  []string
	objects  func() error
	size     string
	snapshot string
	output   string
	keys     keyFlags
}

func (a *app) measureCommand() *cobra.Command {
	var f measureFlags
	cmd := &cobra.Command{
		Use:   "measure [-O FMT] [-o KEY=VAL,...]... [--size N | [-f FMT] [-l SNAPSHOT] FILENAME...] [--output human|json|ndjson]",
		Short: "Compute the file size of an image before it is made",
		RunE:  func(cmd *cobra.Command, args []string) error { return a.measure(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.VarP(&f.target, "target-format", "O", "format of the image to be made")
	flags.StringArrayVarP(&f.options, "options", "o", nil, "format options KEY=VALUE,... (help lists them)")
	flags.StringVarP(&f.size, "size", "s", "", "virtual size of a new, empty image")
	flags.StringVarP(&f.snapshot, "snapshot", "l", "", "measure an internal snapshot of the source")
	f.objects = objectsFlag(flags)
	flags.StringVar(&f.output, "output", "human", "form of the result: human, json, or ndjson (a line for each image)")
	f.keys.register(flags)
	a.completeFormats(cmd, "format", "target-format")
	a.completeOptions(cmd, "target-format")
	completeValues(cmd, "output", resultForms...)
	return cmd
}

// measured is the outcome for one image.
type measured struct {
	name   string
	result sdk.MeasureResult
}

// checkStatic checks what needs no image.
func (f *measureFlags) checkStatic(args []string) error {
	if err := f.objects(); err != nil {
		return err
	}
	switch {
	case len(args) > 0 && f.size != "":
		return errors.New("--size N cannot be used together with a filename.")
	case len(args) == 0 && (f.source.format.given || f.snapshot != "" || f.source.imageOpts):
		return errors.New("--image-opts, -f, and -l require a filename argument.")
	case len(args) == 0 && f.size == "":
		return errors.New("Either --size N or one filename must be specified.")
	}
	return nil
}

// measure is the verb.
func (a *app) measure(ctx context.Context, f *measureFlags, args []string) error {
	out, err := a.checkResults(f.output, len(args))
	if err != nil {
		return err
	}
	fromO, help, err := splitOptions(f.options)
	if err != nil {
		return err
	}
	if !help {
		if err := f.checkStatic(args); err != nil {
			return err
		}
	}
	s, err := a.session()
	if err != nil {
		return err
	}
	target := &measureTarget{}
	if target.plugin, err = a.formatOrFallback(s, f.target, ""); err != nil {
		return err
	}
	if target.format, err = s.Format(ctx, target.plugin); err != nil {
		return err
	}
	schema := target.format.Describe().Create
	if help {
		fmt.Fprint(a.out, option.Help(fmt.Sprintf("Supported %s options:", target.plugin.Manifest.Name), schema))
		return nil
	}
	if target.values, err = schema.Validate(target.plugin.Manifest.Name, option.Merge(f.keys.settings, fromO)); err != nil {
		return err
	}
	emit := func(m *measured) error {
		return out.add(m.name, render.MeasureText(m.result), measureObject(m, out.many))
	}
	if len(args) == 0 {
		size, err := parseImageSize(f.size)
		if err != nil {
			return err
		}
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil {
			return err
		}
		result, err := target.measure(ctx, n, nil)
		if err != nil {
			return err
		}
		return emit(&measured{result: result})
	}
	work := func(ctx context.Context, _ int, name string) (*measured, error) {
		return a.measureOne(ctx, f, target, name, out.many)
	}
	if !out.many {
		m, err := work(ctx, 0, args[0])
		if err != nil {
			return err
		}
		return emit(m)
	}
	err = each(ctx, a, args, work, emit)
	return errors.Join(err, out.close())
}

// measureTarget is what is to be made.
type measureTarget struct {
	plugin *discover.Plugin
	format *client.Format
	values option.Values
}

// measure computes the size of an image with the content of source, nil for
// an empty one of so many bytes.
func (t *measureTarget) measure(ctx context.Context, size int64, source *image.Chain) (sdk.MeasureResult, error) {
	backing := t.values.StringOr(keyBackingFile, "")
	plan, err := t.format.PlanCreate(ctx, sdk.CreateRequest{
		Options: t.format.Describe().Create.WithSize(t.values, keySize, uint64(size)),
		Size:    size, BackingName: backing, Name: "measured",
	})
	if err != nil {
		return sdk.MeasureResult{}, err
	}
	return image.Measure(ctx, plan, source, backing != "")
}

// measureOne measures what an image would become.
func (a *app) measureOne(ctx context.Context, f *measureFlags, target *measureTarget, name string, many bool) (*measured, error) {
	chain, err := a.openSource(ctx, &f.source, name, image.Options{Backing: true, Snapshot: f.snapshot})
	if err != nil {
		return nil, err
	}
	defer closeChain(chain, many)
	result, err := target.measure(ctx, chain.VirtualSize(), chain)
	if err != nil {
		return nil, named(many, name, err)
	}
	return &measured{name: name, result: result}, nil
}

// measureObject is the JSON for one image. Of many, each says which it is.
func measureObject(m *measured, many bool) *render.Object {
	o := render.MeasureObject(m.result)
	if many {
		o.Set("filename", m.name)
	}
	return o
}

package main

import (
	"context"
	"errors"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
)

// infoFlags is info's command line.
type infoFlags struct {
	source  sourceFlags
	objects func() error
	output  string
	layout  string
	chain   bool
}

func (a *app) infoCommand() *cobra.Command {
	var f infoFlags
	cmd := &cobra.Command{
		Use:   "info [-f FMT] [--output human|json|ndjson] [--backing-chain] [-U] FILENAME...",
		Short: "Describe a disk image",
		RunE:  func(cmd *cobra.Command, args []string) error { return a.info(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.StringVar(&f.output, "output", "human", "form of the result: human, json, or ndjson (a line for each image)")
	flags.BoolVarP(&f.chain, "backing-chain", "b", false, "describe the backing files too")
	f.objects = objectsFlag(flags)
	registerLayout(flags, &f.layout)
	a.completeFormats(cmd, "format")
	completeValues(cmd, "output", resultForms...)
	completeValues(cmd, "qemu-version", "7.2", "10.0")
	return cmd
}

// formatFlag is a format's name on the command line. An empty one is a name too,
// that of no format.
type formatFlag struct {
	name  string
	given bool
}

func (v *formatFlag) Set(s string) error {
	v.name, v.given = s, true
	return nil
}

func (v *formatFlag) String() string { return v.name }
func (v *formatFlag) Type() string   { return "string" }

// opening returns the name of the format to open an image with, empty: detect.
func (v *formatFlag) opening() (string, error) {
	if v.given && v.name == "" {
		return "", image.UnknownDriver("")
	}
	return v.name, nil
}

// sourceFlags say which image a reading verb opens, and how.
type sourceFlags struct {
	format    formatFlag
	shared    bool
	imageOpts bool
}

func (f *sourceFlags) register(flags *pflag.FlagSet) {
	flags.VarP(&f.format, "format", "f", "format of the image; detected where not given")
	flags.BoolVarP(&f.shared, "force-share", "U", false, "open an image that another process uses")
	flags.BoolVar(&f.imageOpts, "image-opts", false, "FILENAME is driver=FMT,file.filename=PATH,...")
}

// errExclusive has qemu-img's words.
var errExclusive = errors.New("--image-opts and --format are mutually exclusive")

// parse says what an argument names.
func (f *sourceFlags) parse(name string) (*image.Source, error) {
	if f.imageOpts {
		if f.format.given {
			return nil, errExclusive
		}
		return image.ParseImageOptions(name)
	}
	format, err := f.format.opening()
	if err != nil {
		return nil, err
	}
	source, err := image.ParseName(name)
	if err == nil && format != "" {
		source.Format = format
	}
	return source, err
}

// registerLayout adds the flag that selects whose output layout is followed.
func registerLayout(flags *pflag.FlagSet, layout *string) {
	def := os.Getenv("INSTAR_QEMU_VERSION")
	if def == "" {
		def = "10.0"
	}
	flags.StringVar(layout, "qemu-version", def, "print as this version of qemu-img does: 7.2 or 10.0 (INSTAR_QEMU_VERSION)")
}

// childName is the name of a file below its image, as qemu-img has it.
func childName(role string) string {
	if role == sdk.RoleMain {
		return "file"
	}
	return strings.ReplaceAll(role, ":", ".")
}

// style returns how text is laid out for --qemu-version.
func (a *app) style(version string) (render.Style, error) {
	style := render.Style{Escape: a.terminal()}
	switch version {
	case "7.2":
		style.Layout = render.Layout72
	case "10.0":
		style.Layout = render.Layout10
	default:
		return style, usagef("--qemu-version %s: 7.2 and 10.0 are known", version)
	}
	return style, nil
}

// info is the verb.
func (a *app) info(ctx context.Context, f *infoFlags, args []string) error {
	out, err := a.checkResults(f.output, len(args))
	if err != nil {
		return err
	}
	if len(args) == 0 {
		return usagef("Expecting one image file name")
	}
	if err := f.objects(); err != nil {
		return err
	}
	style, err := a.style(f.layout)
	if err != nil {
		return err
	}
	work := func(ctx context.Context, _ int, name string) ([]render.Image, error) {
		return a.describeChain(ctx, f, name, out.many)
	}
	emit := func(images []render.Image) error {
		if f.output == "human" {
			return out.add("", render.InfoText(images, style), nil)
		}
		// With --backing-chain an image is an array itself.
		var object any = images[0].Object(style)
		if f.chain {
			chain := make([]any, len(images))
			for i := range images {
				chain[i] = images[i].Object(style)
			}
			object = chain
		}
		return out.add("", "", object)
	}
	if !out.many {
		short()
		images, err := work(ctx, 0, args[0])
		if err != nil {
			return err
		}
		a.current.End() // while the result is printed
		return emit(images)
	}
	err = each(ctx, a, args, work, emit)
	return errors.Join(err, out.close())
}

// describeChain opens one image and collects what info shows of it.
func (a *app) describeChain(ctx context.Context, f *infoFlags, name string, release bool) ([]render.Image, error) {
	chain, err := a.openSource(ctx, &f.source, name, image.Options{Backing: f.chain, Describe: true})
	if err != nil {
		return nil, err
	}
	defer closeChain(chain, release)
	images := make([]render.Image, len(chain.Layers))
	for i, layer := range chain.Layers {
		images[i] = describe(layer)
	}
	return images, nil
}

// closeChain closes a chain, in the plugins too where the run goes on.
func closeChain(chain *image.Chain, release bool) {
	if release {
		chain.Release()
		return
	}
	chain.Close()
}

// describe collects what info shows of a layer.
func describe(layer *image.Layer) render.Image {
	m := render.Image{
		Filename: layer.Path, Format: layer.Format(), Protocol: layer.Protocol, Info: layer.Info,
		ActualSize: layer.AllocatedSize(), Paths: map[string]string{},
	}
	for i := len(layer.Files) - 1; i >= 0 && !layer.Protocol; i-- {
		file := layer.Files[i]
		m.Paths[file.Role] = file.Path
		m.Children = append(m.Children, render.Child{
			Name: childName(file.Role), Filename: file.Path, Protocol: file.Protocol(),
			Length: sectors(file.Length()), ActualSize: file.AllocatedSize(),
		})
	}
	for _, ref := range layer.Info.References {
		if _, open := m.Paths[ref.Role]; !open && ref.Kind != sdk.RefBacking {
			m.Paths[ref.Role] = layer.FullName(ref)
		}
	}
	if ref, ok := layer.Backing(); ok {
		m.BackingFilename, m.BackingFormat = ref.Name, ref.Format
		m.FullBackingFilename = layer.FullName(ref)
	}
	return m
}

// sectors rounds a length up to whole sectors, in which QEMU counts.
func sectors(n int64) int64 { return (n + 511) &^ 511 }

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/internal/host/session"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// createFlags is create's command line.
type createFlags struct {
	format        formatFlag
	options       []string
	backing       string
	backingFormat string
	unsafe        bool
	quiet         bool
	objects       []string
	output        string
	keys          keyFlags
}

// Keys that create treats itself, in every format's schema.
const (
	keySize          = "size"
	keyBackingFile   = "backing_file"
	keyBackingFormat = "backing_fmt"
)

func (a *app) createCommand() *cobra.Command {
	var f createFlags
	cmd := &cobra.Command{
		Use:   "create [-f FMT] [-o KEY=VAL,...]... [-b BACKING [-F FMT]] [-u] [-q] FILENAME [SIZE]",
		Short: "Create an empty disk image",
		Long: `Create an empty disk image FILENAME of SIZE bytes (suffixes k, M, G, T, P, E).

The options that -o takes depend on the format: -o help lists them. Repeated
keys: the last wins; -o wins over the flag of the same name and over SIZE, -b
and -F. Without SIZE the backing file's size is used.`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.create(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.VarP(&f.format, "format", "f", "format of the image")
	flags.StringArrayVarP(&f.options, "options", "o", nil, "format options KEY=VALUE,... (help lists them)")
	flags.StringVarP(&f.backing, "backing", "b", "", "backing file: the new image holds what differs from it")
	flags.StringVarP(&f.backingFormat, "backing-format", "F", "", "format of the backing file")
	flags.BoolVarP(&f.unsafe, "unsafe", "u", false, "do not open the backing file")
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "print nothing")
	flags.StringArrayVar(&f.objects, "object", nil, "accepted for qemu-img's sake: objects serve encryption, which is deferred")
	flags.StringVar(&f.output, "output", "human", "form of the result: human or json")
	f.keys.register(flags)
	a.completeFormats(cmd, "format", "backing-format")
	a.completeOptions(cmd, "format")
	completeValues(cmd, "output", "human", "json")
	return cmd
}

// keyFlags are the flags that stand for single keys of -o. They are settings
// like any other: the format's schema says what they mean.
type keyFlags struct {
	settings []option.Setting
}

// flagKeys are the keys with a flag of their own, the name with dashes.
var flagKeys = []struct {
	key  string
	bare bool // may be given without a value, meaning on
}{
	{"cluster_size", false}, {"compat", false}, {"compression_type", false},
	{"refcount_bits", false}, {"extended_l2", true}, {"lazy_refcounts", true},
	{"subformat", false}, {"grain_size", false}, {"block_size", false},
	{"preallocation", false},
}

func (k *keyFlags) register(flags *pflag.FlagSet) {
	for _, fk := range flagKeys {
		name := strings.ReplaceAll(fk.key, "_", "-")
		v := &keyFlag{to: k, key: fk.key}
		flag := flags.VarPF(v, name, "", "same as -o "+fk.key+"=VALUE")
		if fk.bare {
			flag.NoOptDefVal = "on"
		}
	}
}

// keyFlag adds a setting when it is set.
type keyFlag struct {
	to  *keyFlags
	key string
}

func (v *keyFlag) Set(s string) error {
	v.to.settings = append(v.to.settings, option.Setting{Key: v.key, Value: s})
	return nil
}

func (v *keyFlag) String() string { return "" }
func (v *keyFlag) Type() string   { return "VALUE" }

// checkStatic checks what no -o can change.
func (f *createFlags) checkStatic(args []string, help bool) error {
	if f.output != "human" && f.output != "json" {
		return usagef("--output must be used with human or json as argument.")
	}
	if err := checkObjects(f.objects); err != nil {
		return err
	}
	if len(args) == 0 && !help {
		return usagef("Expecting image file name")
	}
	if len(args) > 2 {
		return usagef("Unexpected argument: %s", args[2])
	}
	return nil
}

// create is the verb.
func (a *app) create(ctx context.Context, f *createFlags, args []string) error {
	fromO, help, err := splitOptions(f.options)
	if err != nil {
		return err
	}
	if err := f.checkStatic(args, help); err != nil {
		return err
	}
	short()
	s, err := a.session()
	if err != nil {
		return err
	}
	filename := ""
	if len(args) > 0 {
		filename = args[0]
	}
	plugin, err := a.formatOrFallback(s, f.format, filename)
	if err != nil {
		return err
	}
	format, err := s.Format(ctx, plugin)
	if err != nil {
		return err
	}
	schema := format.Describe().Create
	if help {
		fmt.Fprint(a.out, option.Help(fmt.Sprintf("Supported %s options:", plugin.Manifest.Name), schema))
		return nil
	}
	if filename == "" {
		return usagef("Expecting image file name")
	}
	settings, err := f.settings(args, schema, fromO)
	if err != nil {
		return err
	}
	path, err := image.ParseOutput(filename)
	if err != nil {
		return fmt.Errorf("%s: %w", filename, err)
	}
	req := &image.CreateRequest{Path: path, Plugin: plugin, Allow: a.policy.checkOutput, Log: func(line string) { a.logf("%s", line) }}
	if req.Values, err = schema.Validate(plugin.Manifest.Name, settings); err != nil {
		return fmt.Errorf("%s: %w", filename, err)
	}
	opener, err := a.opener()
	if err != nil {
		return err
	}
	if err := resolveBacking(ctx, opener, schema, req, f.unsafe); err != nil {
		return fmt.Errorf("%s: %w", filename, err)
	}
	if err := a.policy.checkOutput(req.Size); err != nil {
		return fmt.Errorf("%s: %w", filename, err)
	}
	if !f.quiet && f.output == "human" {
		fmt.Fprint(a.out, render.FormattingLine(filename, plugin.Manifest.Name, req.Values))
	}
	made, err := opener.Create(ctx, req)
	if err != nil {
		return fmt.Errorf("%s: %w", filename, err)
	}
	if !f.quiet && f.output == "json" {
		fmt.Fprintf(a.out, "%s", render.CreatedJSON(render.Created{
			Filename: filename, Format: plugin.Manifest.Name, VirtualSize: made.VirtualSize,
			AllocationUnit: made.AllocationUnit, Options: made.Options, Files: made.Paths,
		}))
	}
	return nil
}

// splitOptions splits all -o strings; the result may repeat keys.
func splitOptions(options []string) (settings []option.Setting, help bool, err error) {
	for _, o := range options {
		s, h, err := option.Split(o)
		if err != nil {
			return nil, false, err
		}
		help = help || h
		settings = append(settings, s...)
	}
	return settings, help, nil
}

// formatOrFallback returns the plugin for -f, without -f the fallback format's.
func (a *app) formatOrFallback(s *session.Session, format formatFlag, filename string) (*discover.Plugin, error) {
	prefix := ""
	if filename != "" {
		prefix = filename + ": "
	}
	switch {
	case format.given && format.name == "":
		return nil, fmt.Errorf("%sUnknown file format ''", prefix)
	case !format.given:
		if p := s.Plugins.Fallback(); p != nil {
			return p, nil
		}
		return nil, fmt.Errorf("%sno -f given, and no installed format stands in for any content", prefix)
	}
	p, err := s.Plugins.ByName(format.name)
	if err != nil {
		return nil, fmt.Errorf("%s%w", prefix, err)
	}
	if !p.Manifest.Has(sdk.CapCreate) {
		return nil, fmt.Errorf("%sFormat driver '%s' does not support image creation", prefix, p.Manifest.Name)
	}
	return p, nil
}

// settings collects the command line: flags, positionals, -b and -F first, then
// what -o says, which wins when the schema validates them. Values overridden are
// checked too, so nothing is merged before.
func (f *createFlags) settings(args []string, schema option.Schema, fromO []option.Setting) ([]option.Setting, error) {
	own := f.keys.settings
	if len(args) == 2 {
		size, err := parseImageSize(args[1])
		if err != nil {
			return nil, err
		}
		own = append(own, option.Setting{Key: keySize, Value: size})
	}
	for _, x := range []struct{ key, value, flag, what string }{
		{keyBackingFile, f.backing, "-b", "Backing file"}, {keyBackingFormat, f.backingFormat, "-F", "Backing format"},
	} {
		if x.value == "" {
			continue
		}
		if _, ok := schema.Find(x.key); !ok {
			return nil, fmt.Errorf("%s: %s not supported for file format '%s'", args[0], x.what, f.format.name)
		}
		own = append(own, option.Setting{Key: x.key, Value: x.value})
	}
	return append(slices.Clip(own), fromO...), nil
}

// errImageSize is qemu-img's message for a SIZE that is no number.
var errImageSize = reports{
	errors.New("Invalid image size specified. You may use k, M, G, T, P or E suffixes for"),
	errors.New("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."),
}

// parseImageSize checks the positional SIZE and returns it in bytes, in decimal.
func parseImageSize(s string) (string, error) {
	n, err := option.ParseSize(s)
	switch {
	case errors.Is(err, option.ErrRange), err == nil && n > math.MaxInt64:
		return "", errors.New("Invalid image size specified. Must be between 0 and 9223372036854775807.")
	case err != nil:
		return "", errImageSize
	}
	return fmt.Sprint(n), nil
}

// resolveBacking checks the backing file's options after the merge, opens it
// unless it is to be left unchecked, and takes the size from it where none was
// given.
func resolveBacking(ctx context.Context, opener *image.Opener, schema option.Schema, req *image.CreateRequest, unchecked bool) error {
	req.BackingName = req.Values.StringOr(keyBackingFile, "")
	if req.BackingName != "" && !unchecked {
		if err := openBacking(ctx, opener, req); err != nil {
			return err
		}
	}
	if !req.Values.IsSet(keySize) {
		if req.Backing == nil {
			return errors.New("Image creation needs a size parameter")
		}
		req.Values = schema.WithSize(req.Values, keySize, uint64(req.Backing.VirtualSize))
	}
	size := req.Values.UintOr(keySize, 0)
	if size > math.MaxInt64 {
		return errors.New("Image size must be less than 8 EiB!")
	}
	req.Size = int64(size)
	return nil
}

// openBacking opens the backing file and describes it.
func openBacking(ctx context.Context, opener *image.Opener, req *image.CreateRequest) error {
	errItself := errors.New("Error: Trying to create an image with the same filename as the backing file")
	if req.BackingName == req.Path {
		return errItself
	}
	format := req.Values.StringOr(keyBackingFormat, "")
	unlocked := *opener
	unlocked.Shared = true // its size is all that is read: a guest may be writing into it
	chain, err := unlocked.OpenBacking(ctx, req.Path, req.BackingName, format)
	if err != nil {
		return fmt.Errorf("%w\nCould not open backing image.", err)
	}
	defer chain.Close()
	// By whatever name, and however far below.
	if chain.Holds(req.Path) {
		return errItself
	}
	layer := chain.Top()
	if format == "" {
		return fmt.Errorf("Backing file specified without backing format\nDetected format of %s.", layer.Format())
	}
	req.Backing = &sdk.BackingInfo{
		Format: layer.Format(), VirtualSize: layer.Info.VirtualSize,
		Identity: layer.Info.Identity, Specific: layer.Info.Specific,
	}
	return nil
}

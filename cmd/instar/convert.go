package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/internal/host/copier"
	"github.com/instar-img/instar/internal/host/errno"
	"github.com/instar-img/instar/internal/host/gate"
	"github.com/instar-img/instar/internal/host/image"
	outfile "github.com/instar-img/instar/internal/host/output"
	"github.com/instar-img/instar/internal/host/platform"
	"github.com/instar-img/instar/internal/host/remote"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// convertFlags is convert's command line.
type convertFlags struct {
	source        sourceFlags
	target        formatFlag
	backing       string
	backingFormat string
	options       []string
	keys          keyFlags
	compress      bool
	progress      progressFlag
	quiet         bool
	inPlace       bool
	snapshot      string
	sparse        string
	cache         string
	sourceCache   string
	sparseSet     bool
	workers       string
	workersSet    bool
	outOfOrder    bool
	offload       bool
	rate          string
	salvage       bool
	targetIsZero  bool
	targetOpts    bool
	bitmaps       bool
	skipBroken    bool
	objects       []string
	digest        string
	reproducible  bool
	platform      string
	size          string

	copied *bitmapCopy // where bitmaps
	sum    *digest     // where digest
	dd     bool        // the verb is dd
	joined bool        // several sources
}

func (a *app) convertCommand() *cobra.Command {
	var f convertFlags
	cmd := &cobra.Command{
		Use:   "convert [-f FMT] [-O FMT] [-o KEY=VAL,...]... [-B BACKING -F FMT] [-c] [-p] [-n] FILENAME... OUTPUT",
		Short: "Copy disk images into another format",
		Long: `Copy disk images into another format. Several sources are joined.

FILENAME may be a path, an http(s) URL whose server serves ranges, or - for
standard input (with --source-size where it is a pipe). OUTPUT may be - for raw
data on standard output. The output appears under its name when it is complete.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			f.workersSet, f.sparseSet = cmd.Flags().Changed("coroutines"), cmd.Flags().Changed("sparse-size")
			return a.convert(cmd.Context(), &f, args)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.VarP(&f.target, "target-format", "O", "format of the output")
	flags.StringVarP(&f.backing, "target-backing", "B", "", "backing file of the output, which then holds what differs from it")
	flags.StringVarP(&f.backingFormat, "backing-format", "F", "", "format of the backing file")
	flags.StringArrayVarP(&f.options, "options", "o", nil, "format options KEY=VALUE,... (help lists them)")
	flags.BoolVarP(&f.compress, "compress", "c", false, "compress the output")
	flags.VarPF(&f.progress, "progress", "p", "show progress: text, or json, a line a second of what is done").NoOptDefVal = progressText
	flags.BoolVarP(&f.quiet, "quiet", "q", false, "print errors alone")
	flags.BoolVarP(&f.inPlace, "no-create", "n", false, "write into an output that exists")
	flags.StringVarP(&f.snapshot, "snapshot", "l", "", "internal snapshot of the source: id, name, or snapshot.id=ID,snapshot.name=NAME")
	flags.StringVarP(&f.sparse, "sparse-size", "S", "4k", "runs of zeros of this size are not stored; 0: all is stored")
	flags.StringVarP(&f.cache, "cache", "t", "unsafe", "cache mode of the output: none, directsync, writeback, writethrough, unsafe")
	flags.StringVarP(&f.sourceCache, "source-cache", "T", "writeback", "cache mode of the sources")
	flags.StringVarP(&f.workers, "coroutines", "m", "8", "parts copied side by side, 1 to 16")
	flags.BoolVarP(&f.outOfOrder, "out-of-order", "W", false, "parts may be written in any order")
	flags.BoolVarP(&f.offload, "offload", "C", false, "have the file system copy, whatever the data is")
	flags.StringVarP(&f.rate, "rate-limit", "r", "", "bytes a second to write at most")
	flags.BoolVar(&f.salvage, "salvage", false, "go on after read errors, with zeros")
	flags.BoolVar(&f.targetIsZero, "target-is-zero", false, "with -n: the output reads as zeros already")
	flags.BoolVar(&f.targetOpts, "target-image-opts", false, "OUTPUT is driver=FMT,file.filename=PATH,... (with -n); without driver it is probed")
	flags.BoolVar(&f.bitmaps, "bitmaps", false, "copy persistent bitmaps")
	flags.BoolVar(&f.skipBroken, "skip-broken-bitmaps", false, "with --bitmaps: leave out bitmaps that are inconsistent")
	flags.StringArrayVar(&f.objects, "object", nil, "accepted for qemu-img's sake: objects serve encryption, which is deferred")
	flags.StringVar(&f.digest, "digest", "", "sha256: print the digest of the guest's content")
	flags.BoolVar(&f.reproducible, "reproducible", false, "make the output depend on the input alone (SOURCE_DATE_EPOCH sets its date)")
	flags.StringVar(&f.platform, "for", "", "format and options for a platform: azure, gce, aws, esxi, hyperv")
	flags.StringVar(&f.size, "source-size", "", "bytes that standard input will bring")
	f.keys.register(flags)
	a.completeFormats(cmd, "format", "target-format", "backing-format")
	a.completeOptions(cmd, "target-format")
	completeValues(cmd, "progress", progressForms...)
	completeValues(cmd, "digest", "sha256")
	completeValues(cmd, "cache", cacheModes...)
	completeValues(cmd, "source-cache", cacheModes...)
	must(cmd.RegisterFlagCompletionFunc("for", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		names, err := platform.Names()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}))
	return cmd
}

// cacheModes are those that qemu-img knows.
var cacheModes = []string{"none", "off", "directsync", "writeback", "writethrough", "unsafe"}

// check checks the flags against each other, as qemu-img does, and returns the
// copier's options.
func (f *convertFlags) check(args []string) (copier.Options, error) {
	var o copier.Options
	if len(args) < 2 {
		return o, errors.New("Must specify image file name")
	}
	if err := checkObjects(f.objects); err != nil {
		return o, err
	}
	if !slices.Contains(cacheModes, f.cache) {
		return o, fmt.Errorf("Invalid cache option: %s", f.cache)
	}
	if err := checkSourceCache(f.sourceCache); err != nil {
		return o, err
	}
	sparse, err := option.ParseSize(f.sparse)
	switch {
	case err != nil:
		return o, invalidSize("buffer size for sparse output")
	case sparse%512 != 0 || sparse > 16<<20:
		return o, errors.New("Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to 16777216. Select 0 to disable sparse detection (fully allocates output).")
	}
	workers, err := strconv.Atoi(f.workers)
	switch {
	case err != nil || workers < 1 || workers > 16:
		return o, errors.New("Invalid number of coroutines. Allowed number of coroutines is between 1 and 16")
	case f.target.given && f.targetOpts:
		return o, errExclusive
	case f.targetIsZero && !f.inPlace:
		return o, errors.New("--target-is-zero requires use of -n flag")
	case f.targetOpts && !f.inPlace:
		return o, errors.New("--target-image-opts requires use of -n flag")
	case f.skipBroken && !f.bitmaps:
		return o, errors.New("Use of --skip-broken-bitmaps requires --bitmaps")
	case f.offload && f.sparseSet:
		return o, errors.New("Cannot enable copy offloading when -S is used")
	case f.offload && f.compress:
		return o, errors.New("Cannot enable copy offloading when -c is used")
	case f.backing != "" && f.backingFormat == "":
		return o, errBackingFormat
	case f.backing != "" && len(args) > 2:
		return o, errBackingJoined
	case f.snapshot != "" && len(args) > 2:
		return o, errors.New("No support for concatenating multiple snapshot")
	case f.digest != "" && f.digest != "sha256":
		return o, usagef("--digest %s: sha256 is accepted", f.digest)
	}
	if err := checkSnapshot(f.snapshot); err != nil {
		return o, err
	}
	if f.rate != "" {
		rate, err := option.ParseSize(f.rate)
		if err != nil {
			return o, invalidSize("rate limit")
		}
		o.Rate = int64(rate)
	}
	o.Compressed, o.Sparse, o.Reproducible, o.TargetIsZero, o.Offload = f.compress, int64(sparse), f.reproducible, f.targetIsZero, f.offload
	if f.workersSet {
		o.Workers = workers
	}
	return o, nil
}

// qemu-img's words for backing files that cannot be.
var (
	errBackingFormat = errors.New("Use of backing file requires explicit backing format")
	errBackingJoined = errors.New("Having a backing file for the target makes no sense when concatenating multiple input images")
)

// invalidSize is qemu-img's message for a value that is no size.
func invalidSize(what string) error {
	return reports{
		fmt.Errorf("Invalid %s specified. You may use k, M, G, T, P or E suffixes for", what),
		errors.New("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."),
	}
}

// checkSnapshot checks the form of -l: ID or NAME, or
// snapshot.id=ID,snapshot.name=NAME.
func checkSnapshot(s string) error {
	if _, err := image.FindSnapshot(nil, s); !errors.Is(err, sdk.ErrNotFound) {
		return reports{err, fmt.Errorf("Failed in parsing snapshot param '%s'", s)}
	}
	return nil
}

// checkPlatform checks --for against what else was asked for, and returns the
// platform.
func (f *convertFlags) checkPlatform() (*platform.Platform, error) {
	to, err := platform.ByName(f.platform)
	switch {
	case err != nil:
		return nil, err
	case f.target.given:
		return nil, usagef("--for chooses the format: -O has no place beside it")
	case f.inPlace:
		return nil, usagef("--for makes a new image: -n has no place beside it")
	case to.Wrap != "" && (f.compress || f.backing != "" || f.bitmaps || f.hasOptions()):
		return nil, usagef("--for %s packs raw data: -c, -B, -o and --bitmaps have no place beside it", to.Name)
	}
	f.target = formatFlag{name: to.Format, given: true}
	return to, nil
}

// hasOptions reports whether format options were given.
func (f *convertFlags) hasOptions() bool { return len(f.options) > 0 || len(f.keys.settings) > 0 }

// sizeName is what the user calls the size of standard input.
func (f *convertFlags) sizeName() string {
	if f.dd {
		return "isize"
	}
	return "--source-size"
}

// failed says that an output could not be made, as qemu-img's verbs do.
func (f *convertFlags) failed(output, format string, err error) error {
	switch {
	case f.compress && errors.Is(err, sdk.ErrUnsupported):
		return err // of all formats that do not compress
	case f.dd:
		return fmt.Errorf("%s: error while creating output image: %w", output, err)
	}
	return fmt.Errorf("%s: error while converting %s: %w", output, format, err)
}

// sync reports whether the output must be on stable storage in the end: in all
// cache modes but unsafe.
func (f *convertFlags) sync() bool { return f.cache != "" && f.cache != "unsafe" }

// standardStream is the name that stands for standard input or output.
const standardStream = "-"

// convert is the verb.
func (a *app) convert(ctx context.Context, f *convertFlags, args []string) error {
	if f.inPlace && f.hasOptions() {
		return errors.New("-o has no effect when skipping image creation")
	}
	fromO, help, err := splitOptions(f.options)
	if err != nil {
		return err
	}
	if help {
		return a.targetHelp(ctx, f.target, len(args) > 0)
	}
	opts, err := f.check(args)
	if err != nil {
		return err
	}
	var to *platform.Platform
	if f.platform != "" {
		if to, err = f.checkPlatform(); err != nil {
			return err
		}
	}
	output := args[len(args)-1]
	var out io.Writer = a.out
	if output == standardStream {
		out = a.err
	}
	a.meter = a.newMeter(ctx, out, f.progress, f.quiet)
	err = a.convertImages(ctx, f, to, args[:len(args)-1], output, fromO, opts)
	a.meter.Close(err == nil)
	if err != nil {
		return err
	}
	return f.sum.printTo(out)
}

// convertImages opens the sources and makes the output.
func (a *app) convertImages(ctx context.Context, f *convertFlags, to *platform.Platform, names []string, output string, fromO []option.Setting, opts copier.Options) error {
	chains, err := a.openSources(ctx, f, names)
	if err != nil {
		return err
	}
	var sources []*copier.Source
	for _, c := range chains {
		defer c.Close()
		sources = append(sources, copier.FromChain(c))
	}
	source := copier.Concat(sources...)
	if err := a.policy.checkOutput(source.Size); err != nil {
		return err
	}
	f.joined = len(sources) > 1
	if f.bitmaps {
		if f.copied, err = selectBitmaps(chains, f.skipBroken, a.warn); err != nil {
			return err
		}
	}
	opts.Progress = a.begin("convert " + output)
	if f.salvage {
		opts.Salvage = func(off, length int64, err error) {
			if !f.quiet {
				a.warn(fmt.Sprintf("error while reading %d bytes at byte %d: %v; zeros are stored", length, off, errno.Text(err)))
			}
		}
	}
	f.sum = newDigest(f.digest, source)
	ctx, stop := context.WithCancel(ctx)
	defer stop() // the digest's reading too
	switch {
	case to != nil && to.Wrap != "":
		return a.convertWrapped(ctx, f, to, source, output, opts)
	case output == standardStream:
		return a.convertToStream(ctx, f, source, a.out, opts)
	case f.inPlace:
		return a.convertInPlace(ctx, f, source, output, opts)
	}
	return a.convertToFile(ctx, f, to, source, output, fromO, opts)
}

// targetHelp lists the options of a target format. Where a file was named the
// title does not name the format, as with qemu-img.
func (a *app) targetHelp(ctx context.Context, name formatFlag, file bool) error {
	s, err := a.session()
	if err != nil {
		return err
	}
	p, err := a.formatOrFallback(s, name, "")
	if err != nil {
		return err
	}
	format, err := s.Format(ctx, p)
	if err != nil {
		return err
	}
	title := fmt.Sprintf("Supported %s options:", p.Manifest.Name)
	if file {
		title = "Supported options:"
	}
	fmt.Fprint(a.out, option.Help(title, format.Describe().Create))
	return nil
}

// openSources opens the sources.
func (a *app) openSources(ctx context.Context, f *convertFlags, names []string) ([]*image.Chain, error) {
	var chains []*image.Chain
	for _, name := range names {
		chain, err := a.openConvertSource(ctx, f, name)
		if err != nil {
			for _, c := range chains {
				c.Close()
			}
			return nil, err
		}
		chains = append(chains, chain)
	}
	return chains, nil
}

// openConvertSource opens one source: a path, a URL or standard input.
func (a *app) openConvertSource(ctx context.Context, f *convertFlags, name string) (*image.Chain, error) {
	opts := image.Options{Backing: true, Snapshot: f.snapshot, Still: !f.dd}
	if name != standardStream || f.source.imageOpts {
		return a.openSource(ctx, &f.source, name, opts)
	}
	file := os.Stdin
	if fi, err := file.Stat(); err != nil {
		return nil, err
	} else if !fi.Mode().IsRegular() {
		if f.size == "" {
			return nil, fmt.Errorf("standard input is not a file: %s must say how many bytes it will bring", f.sizeName())
		}
		size, err := parseOffset("source size", f.size)
		if err != nil {
			return nil, err
		}
		if file, err = remote.Spool(ctx, os.Stdin, "standard input", size, a.begin("read standard input")); err != nil {
			return nil, err
		}
	}
	opener, err := a.opener()
	if err != nil {
		return nil, err
	}
	if opts.Format, err = f.source.format.opening(); err != nil {
		return nil, fmt.Errorf("Could not open '%s': %w", name, err)
	}
	if opts.Format == "" {
		// What comes through a pipe is taken for what it is, not for what it
		// looks like.
		p, err := a.formatOrFallback(opener.Session, formatFlag{}, "")
		if err != nil {
			return nil, err
		}
		opts.Format = p.Manifest.Name
	}
	return opener.OpenFile(ctx, "standard input", file, opts)
}

// convertToFile makes a new image.
func (a *app) convertToFile(ctx context.Context, f *convertFlags, to *platform.Platform, source *copier.Source, output string, fromO []option.Setting, opts copier.Options) error {
	opener, err := a.opener()
	if err != nil {
		return err
	}
	plugin, err := a.formatOrFallback(opener.Session, f.target, "")
	if err != nil {
		return err
	}
	format, err := opener.Session.Format(ctx, plugin)
	if err != nil {
		return err
	}
	if output == "" {
		return f.failed(output, plugin.Manifest.Name, &errno.Error{Text: "Could not create ''", Err: syscall.ENOENT})
	}
	path, err := image.ParseOutput(output)
	if err != nil {
		return err
	}
	schema := format.Describe().Create
	var settings []option.Setting // what flags and -o say wins
	if to != nil {
		if settings, _, err = option.Split(to.Options); err != nil {
			return err
		}
		size, err := to.RoundSize(source.Size)
		if err != nil {
			return err
		}
		source = copier.Pad(source, size)
	}
	settings = append(settings, f.keys.settings...)
	for _, x := range []struct{ key, value string }{{keyBackingFile, f.backing}, {keyBackingFormat, f.backingFormat}} {
		if x.value == "" {
			continue
		}
		if _, ok := schema.Find(x.key); !ok {
			return fmt.Errorf("Backing file not supported for file format '%s'", plugin.Manifest.Name)
		}
		settings = append(settings, option.Setting{Key: x.key, Value: x.value})
	}
	req := &image.CreateRequest{
		Path: path, Plugin: plugin, Size: source.Size, Sync: f.sync(),
		Allow: a.policy.checkOutput, Log: func(line string) { a.logf("%s", line) },
	}
	if req.Values, err = schema.Validate(plugin.Manifest.Name, append(settings, fromO...)); err != nil {
		return f.failed(output, plugin.Manifest.Name, err)
	}
	if req.Values.StringOr(keyBackingFile, "") != "" { // by -B or by -o
		switch {
		case req.Values.StringOr(keyBackingFormat, "") == "":
			return errBackingFormat
		case f.joined:
			return errBackingJoined
		}
	}
	if f.compress {
		if pre := req.Values.StringOr("preallocation", "off"); pre != "off" {
			return errors.New("Compression and preallocation not supported at the same time")
		}
	}
	req.Values = schema.WithSize(req.Values, keySize, uint64(source.Size))
	target := image.TargetOptions{Compressed: f.compress, Reproducible: f.reproducible}
	if target.Time, err = epoch(); err != nil {
		return err
	}
	closeBase, err := openBase(ctx, opener, req, &opts)
	var host *errno.Error
	switch {
	case errors.As(err, &host):
		return fmt.Errorf("Could not open '%s': Could not open backing file: %w", output, host)
	case err != nil:
		return fmt.Errorf("Could not open '%s': Could not open backing file: %w", output, err)
	}
	defer closeBase()
	t, err := opener.CreateTarget(ctx, req, target)
	if err != nil {
		return f.failed(output, plugin.Manifest.Name, err)
	}
	return a.copyInto(ctx, f, source, t, opts)
}

// openBase opens the backing file that the output shall have, as what it need
// not hold itself.
func openBase(ctx context.Context, opener *image.Opener, req *image.CreateRequest, opts *copier.Options) (func(), error) {
	req.BackingName = req.Values.StringOr(keyBackingFile, "")
	if req.BackingName == "" {
		return func() {}, nil
	}
	chain, err := opener.OpenBackingChain(ctx, req.Path, req.BackingName, req.Values.StringOr(keyBackingFormat, ""))
	if err != nil {
		return nil, err
	}
	top := chain.Top()
	req.Backing = &sdk.BackingInfo{
		Format: top.Format(), VirtualSize: top.Info.VirtualSize,
		Identity: top.Info.Identity, Specific: top.Info.Specific,
	}
	opts.Base = copier.FromChain(chain)
	return chain.Close, nil
}

// zeroPrefix before the name of an output that exists says that it reads as
// zeros: a protocol of Proxmox VE's qemu-img.
const zeroPrefix = "zeroinit:"

// convertInPlace writes into an image that exists.
func (a *app) convertInPlace(ctx context.Context, f *convertFlags, source *copier.Source, output string, opts copier.Options) error {
	opener, err := a.opener()
	if err != nil {
		return err
	}
	format, err := f.target.opening()
	if err != nil {
		return fmt.Errorf("Could not open '%s': %w", output, err)
	}
	parse, name := image.ParseName, output
	if f.targetOpts {
		parse = image.ParseImageOptions
	} else if rest, ok := strings.CutPrefix(output, zeroPrefix); ok {
		name, opts.TargetIsZero = rest, true
	}
	named, err := parse(name)
	if err != nil {
		return fmt.Errorf("Could not open '%s': %w", output, err)
	}
	open := image.Options{Name: output}
	named.Apply(&open)
	if !f.targetOpts {
		if format == "" {
			p, err := a.formatOrFallback(opener.Session, formatFlag{}, "")
			if err != nil {
				return err
			}
			format = p.Manifest.Name
		}
		open.Format = format
	}
	t, err := opener.OpenTarget(ctx, named.Path, open)
	if err != nil {
		return err
	}
	t.Sync = f.sync()
	if t.Info.VirtualSize < source.Size {
		t.Close()
		return errors.New("output file is smaller than input file")
	}
	if f.backing != "" {
		if err := f.namesBacking(t); err != nil {
			t.Close()
			return err
		}
		// What it holds by itself counts as much: only what differs is written.
		opts.Base = copier.FromChain(t.Chain)
	}
	return a.copyInto(ctx, f, source, t, opts)
}

// namesBacking refuses a -B that is not the backing file which an output has.
func (f *convertFlags) namesBacking(t *image.Target) error {
	if t.Chain == nil || len(t.Chain.Layers) < 2 {
		return fmt.Errorf("-B %s: the output has no backing file", f.backing)
	}
	top, backing := t.Chain.Layers[0], t.Chain.Layers[1]
	named, err := os.Stat(gate.Resolve(top.Path, f.backing))
	if err != nil {
		return err
	}
	there, err := backing.Files[0].File.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(named, there) || f.backingFormat != backing.Format() {
		return fmt.Errorf("-B %s -F %s: the output's backing file is %s, of format %s", f.backing, f.backingFormat, backing.Path, backing.Format())
	}
	return nil
}

// copyInto copies and commits.
func (a *app) copyInto(ctx context.Context, f *convertFlags, source *copier.Source, t *image.Target, opts copier.Options) error {
	defer t.Close()
	s, err := a.session()
	if err != nil {
		return err
	}
	files := make([]*os.File, len(t.Files))
	for i := range t.Files {
		files[i] = t.Files[i].File
	}
	if f.bitmaps {
		if err := f.copied.check(t); err != nil {
			return err
		}
		opts.BeforeFinish = func(ctx context.Context) error { return f.copied.writeTo(ctx, t) }
	}
	dst := &copier.Target{Writer: t.Writer, Files: files, Size: t.Info.VirtualSize, Fresh: t.Fresh}
	if t.Chain != nil {
		dst.Old = copier.FromChain(t.Chain)
	} else {
		dst.Size = min(dst.Size, t.Created.VirtualSize) // a device is longer
	}
	watched, stop := s.Watch(ctx)
	defer stop()
	f.sum.start(watched, opts)
	stats, err := copier.Copy(watched, source, dst, opts)
	if err != nil {
		return because(watched, err)
	}
	a.logf("%d bytes copied, %d shared with the source, %d encoded", stats.Written, stats.Cloned, stats.Encoded)
	if err := f.sum.wait(); err != nil {
		return err
	}
	return t.Commit(ctx)
}

// convertToStream writes raw data in order.
func (a *app) convertToStream(ctx context.Context, f *convertFlags, source *copier.Source, w io.Writer, opts copier.Options) error {
	opener, err := a.opener()
	if err != nil {
		return err
	}
	plugin, err := a.formatOrFallback(opener.Session, f.target, "")
	if err != nil {
		return err
	}
	if plugin != opener.Session.Plugins.Fallback() || f.compress || f.inPlace || f.backing != "" || f.bitmaps || f.hasOptions() {
		return fmt.Errorf("only plain %s data can be written to standard output", opener.Session.Plugins.Fallback().Manifest.Name)
	}
	ctx, stop := opener.Session.Watch(ctx)
	defer stop()
	return because(ctx, copier.Stream(ctx, source, f.sum.tee(w), opts))
}

// because returns why a context ended where that is why err happened.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
		return cause
	}
	return err
}

// convertWrapped writes raw data into the archive that a platform asks for.
func (a *app) convertWrapped(ctx context.Context, f *convertFlags, to *platform.Platform, source *copier.Source, output string, opts copier.Options) error {
	size, err := to.RoundSize(source.Size)
	if err != nil {
		return err
	}
	if err := a.policy.checkOutput(size); err != nil {
		return err
	}
	source = copier.Pad(source, size)
	date, err := epoch()
	if err != nil {
		return err
	}
	s, err := a.session()
	if err != nil {
		return err
	}
	watched, stop := s.Watch(ctx)
	defer stop()
	content := func(w io.Writer) error { return because(watched, copier.Stream(watched, source, f.sum.tee(w), opts)) }
	if output == standardStream {
		return to.Archive(a.out, size, date, content)
	}
	path, err := image.ParseOutput(output)
	if err != nil {
		return err
	}
	set, err := outfile.Begin(path, outfile.Options{Log: func(line string) { a.logf("%s", line) }})
	if err != nil {
		return err
	}
	defer set.Abort()
	if err := to.Archive(set.Main(), size, date, content); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return set.Commit()
}

// epoch returns the time that a reproducible output bears.
func epoch() (int64, error) {
	s := os.Getenv("SOURCE_DATE_EPOCH")
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0, fmt.Errorf("SOURCE_DATE_EPOCH=%s: a number of seconds is accepted", s)
	}
	return n, nil
}

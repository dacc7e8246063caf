package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/internal/host/copier"
	"github.com/instar-img/instar/sdk/option"
)

// ddFlags is dd's command line.
type ddFlags struct {
	source  sourceFlags
	target  formatFlag
	snap    string
	inPlace bool
	objects func() error
}

func (a *app) ddCommand() *cobra.Command {
	var f ddFlags
	cmd := &cobra.Command{
		Use:   "dd [-f FMT] [-O FMT] [-l SNAPSHOT] [-n] if=INPUT of=OUTPUT [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] [isize=SIZE] [osize=SIZE]",
		Short: "Copy a part of a disk image into a new image",
		Long: `Copy a part of a disk image into a new image.

  if=INPUT      the image to read, or - for standard input (with isize where it
                is a pipe)
  of=OUTPUT     the image to make, with -n one that exists, or - for raw data on
                standard output
  bs=SIZE       size of a block, 512 where not given
  count=BLOCKS  blocks to copy at most
  skip=BLOCKS   blocks to pass over at the start of the input
  isize=SIZE    take the input to be of this size
  osize=SIZE    virtual size of the output, at least what is copied`,
		RunE: func(cmd *cobra.Command, args []string) error { return a.dd(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.VarP(&f.target, "target-format", "O", "format of the output")
	flags.StringVarP(&f.snap, "snapshot", "l", "", "internal snapshot of the input")
	flags.BoolVarP(&f.inPlace, "no-create", "n", false, "write into an output that exists")
	f.objects = objectsFlag(flags)
	a.completeFormats(cmd, "format", "target-format")
	return cmd
}

// ddOperands are dd's key=value words.
type ddOperands struct {
	input, output      string
	bs                 int64
	count, skip        int64
	isize, osize       int64
	hasCount, hasIsize bool

	hasInput, hasOutput bool
}

// parseDD parses dd's operands.
func parseDD(args []string) (*ddOperands, error) {
	d := &ddOperands{bs: 512}
	for _, arg := range args {
		name, value, ok := strings.Cut(arg, "=")
		if !ok {
			return nil, fmt.Errorf("unrecognized operand %s", arg)
		}
		var number *int64
		switch name {
		case "if":
			d.input, d.hasInput = value, true
			continue
		case "of":
			d.output, d.hasOutput = value, true
			continue
		case "bs":
			number = &d.bs
		case "count":
			number, d.hasCount = &d.count, true
		case "skip":
			number = &d.skip
		case "isize":
			number, d.hasIsize = &d.isize, true
		case "osize":
			number = &d.osize
		default:
			return nil, fmt.Errorf("unrecognized operand %s", name)
		}
		n, err := option.ParseSize(value)
		least, most := uint64(0), uint64(1<<63-1)
		if name == "bs" {
			least, most = 1, 1<<31-1
		}
		switch {
		case errors.Is(err, option.ErrRange), err == nil && (n < least || n > most):
			return nil, fmt.Errorf("Invalid %s specified. Must be between %d and %d.", name, least, most)
		case err != nil:
			return nil, invalidSize(name)
		}
		*number = int64(n)
	}
	if !d.hasInput || !d.hasOutput {
		return nil, errors.New("Must specify both input and output files")
	}
	return d, nil
}

// window returns the part of an input of so many bytes that is copied: count
// blocks after those that are skipped. beyond is set where the input ends
// before that; the part is empty then.
func (d *ddOperands) window(size int64) (off, length int64, beyond bool) {
	if d.hasIsize {
		size = min(size, d.isize)
	}
	if d.skip > (1<<63-1)/d.bs || d.skip*d.bs > size {
		return 0, 0, true
	}
	off = d.skip * d.bs
	length = size - off
	if d.hasCount && d.count <= (1<<63-1)/d.bs {
		length = min(length, d.count*d.bs)
	}
	return off, length, false
}

// dd is the verb.
func (a *app) dd(ctx context.Context, f *ddFlags, args []string) (err error) {
	if err := f.objects(); err != nil {
		return err
	}
	d, err := parseDD(args)
	if err != nil {
		return err
	}
	if err := checkSnapshot(f.snap); err != nil {
		return err
	}
	if f.inPlace && d.osize > 0 {
		return errors.New("osize has no effect when skipping image creation")
	}
	to := &convertFlags{source: f.source, target: f.target, inPlace: f.inPlace, snapshot: f.snap, dd: true}
	if d.hasIsize {
		to.size = strconv.FormatInt(d.isize, 10)
	}
	// Nothing is shown, but SIGUSR1 is answered, as by dd.
	a.meter = a.newMeter(ctx, a.err, "", false)
	defer func() { a.meter.Close(err == nil) }()
	chain, err := a.openConvertSource(ctx, to, d.input)
	if err != nil {
		return err
	}
	defer chain.Close()
	source := copier.FromChain(chain)
	off, length, beyond := d.window(source.Size)
	if beyond {
		// An empty output all the same, as dd and qemu-img have it.
		fmt.Fprintf(a.err, "%s: %s: cannot skip to specified offset\n", a.name, d.input)
	}
	source = copier.Pad(copier.Slice(source, off, length), d.osize)
	if err := a.policy.checkOutput(source.Size); err != nil {
		return err
	}
	opts := copier.Options{Sparse: copier.DefaultSparse, Progress: a.begin("dd " + d.output)}
	switch {
	case d.output == standardStream:
		return a.convertToStream(ctx, to, source, a.out, opts)
	case f.inPlace:
		return a.convertInPlace(ctx, to, source, d.output, opts)
	}
	return a.convertToFile(ctx, to, nil, source, d.output, nil, opts)
}

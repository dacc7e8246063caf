package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// mapFlags is map's command line.
type mapFlags struct {
	source  sourceFlags
	objects func() error
	output  string
	layout  string
	start   string
	length  string
}

func (a *app) mapCommand() *cobra.Command {
	var f mapFlags
	cmd := &cobra.Command{
		Use:   "map [-f FMT] [--output human|json|svg|heat] [--start-offset N] [--max-length N] [-U] FILENAME",
		Short: "Show where the guest's bytes lie",
		RunE:  func(cmd *cobra.Command, args []string) error { return a.mapImage(cmd.Context(), &f, args) },
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	f.source.register(flags)
	flags.StringVar(&f.output, "output", "human", "form of the result: human, json, svg (a picture) or heat (block characters)")
	flags.StringVarP(&f.start, "start-offset", "s", "0", "guest offset to begin at")
	flags.StringVarP(&f.length, "max-length", "l", "", "guest bytes to show at most")
	f.objects = objectsFlag(flags)
	registerLayout(flags, &f.layout)
	a.completeFormats(cmd, "format")
	completeValues(cmd, "output", "human", "json", "svg", "heat")
	completeValues(cmd, "qemu-version", "7.2", "10.0")
	return cmd
}

// mapSink takes a map entry by entry.
type mapSink interface {
	Add(render.MapEntry) error
	Close() error
	Abort() error // prints what came so far
}

// mapImage is the verb.
func (a *app) mapImage(ctx context.Context, f *mapFlags, args []string) error {
	if len(args) != 1 {
		return usagef("Expecting one image file name")
	}
	if err := f.objects(); err != nil {
		return err
	}
	style, err := a.style(f.layout)
	if err != nil {
		return err
	}
	start, err := parseOffset("start offset", f.start)
	if err != nil {
		return err
	}
	length := int64(math.MaxInt64)
	if f.length != "" {
		if length, err = parseOffset("max length", f.length); err != nil {
			return err
		}
	}
	chain, err := a.openSource(ctx, &f.source, args[0], image.Options{Backing: true})
	if err != nil {
		return err
	}
	defer chain.Close()
	size := chain.VirtualSize()
	length = max(0, min(length, size-start))
	sink, err := a.mapSink(f.output, chain, start, length, style)
	if err != nil {
		return err
	}
	var addErr error
	err = chain.Map(ctx, start, length, image.SplitHoles(func(extents []image.Extent) bool {
		for i := range extents {
			if addErr = sink.Add(mapEntry(&extents[i])); addErr != nil {
				return false
			}
		}
		return true
	}))
	if addErr != nil || err != nil {
		return cmp.Or(addErr, err, sink.Abort())
	}
	return sink.Close()
}

// parseOffset parses a guest offset or length of the command line.
func parseOffset(what, s string) (int64, error) {
	n, err := option.ParseSize(s)
	switch {
	case errors.Is(err, option.ErrRange), err == nil && n > math.MaxInt64:
		return 0, fmt.Errorf("Invalid %s specified. Must be between 0 and %d.", what, int64(math.MaxInt64))
	case err != nil:
		return 0, reports{
			fmt.Errorf("Invalid %s specified. You may use k, M, G, T, P or E suffixes for", what),
			errors.New("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."),
		}
	}
	return int64(n), nil
}

// mapSink returns what prints the map.
func (a *app) mapSink(output string, chain *image.Chain, start, length int64, style render.Style) (mapSink, error) {
	switch output {
	case "human", "json":
		return render.NewMap(a.out, output == "json", start, style), nil
	case "svg", "heat":
		info := render.PictureInfo{Filename: chain.Top().Path, Start: start, Length: length}
		for _, l := range chain.Layers {
			info.Layers = append(info.Layers, l.Path)
		}
		if output == "svg" {
			return render.NewSVGMap(a.out, info), nil
		}
		return render.NewHeatMap(a.out, info, a.width(), a.terminal()), nil
	}
	return nil, errOutput
}

// mapEntry converts an extent.
func mapEntry(e *image.Extent) render.MapEntry {
	m := render.MapEntry{
		Start: e.Offset, Length: e.Length, Depth: e.Depth,
		Present: e.Kind != sdk.Absent, Zero: e.Zero(),
		Data:       e.Kind == sdk.Encoded || (e.Kind == sdk.Data && (!e.Hole || !e.Raw)),
		Compressed: e.Kind == sdk.Encoded,
	}
	if e.File != nil && e.Kind != sdk.Encoded {
		m.HasOffset, m.Offset, m.File = true, e.HostOffset, e.File.Path
	}
	return m
}

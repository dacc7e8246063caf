// Package image opens images: one file with its format's plugin, the files it
// refers to, and the chain of its backing files. What several verbs share of
// an opened image is here.
package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/internal/host/errno"
	"github.com/instar-img/instar/internal/host/gate"
	"github.com/instar-img/instar/internal/host/lock"
	"github.com/instar-img/instar/internal/host/session"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// Opener opens images under one policy.
type Opener struct {
	Session *session.Session
	Gate    *gate.Policy
	// Shared opens images that another process has locked (-U).
	Shared bool
	// Warn gets what a user should read beside the result, a line each.
	Warn func(string)

	warned int // warnings of plugins so far
}

// Options says how to open an image.
type Options struct {
	Format    string   // empty: detect
	Through   []string // formats between the image and its file; see Source
	Protocol  bool     // take the file's bytes as they are; see Source
	ReadWrite bool
	Access
	Check    bool   // open what can be opened
	Snapshot string // internal snapshot, empty for the active state; see Snapshot
	Backing  bool   // open the chain of backing files too
	// Describe opens for Info alone: no guest data will be read, and each image
	// of a chain is opened for its own sake.
	Describe bool
	// Still refuses what another process writes into. Without it that holds only for
	// images with structures of their own, which would be read half written.
	Still bool
	// Name is what messages call the image; empty: its path.
	Name string
	// Own are options of the image's format.
	Own map[string]string
	// Data, where not nil, is the file with the image's data.
	Data *Override
	// Overrides replace what images say of their backing files, by depth.
	Overrides []Override
}

// File is an open file of a layer.
type File struct {
	Role string
	Path string
	*os.File
}

// Layer is one opened image of a chain.
type Layer struct {
	Path   string // as named by the user, or resolved from the referring image
	Plugin *discover.Plugin
	// Protocol: the file's own driver was asked for, no format.
	Protocol bool
	Files    []File // the first is the main file; the position is sdk's file index
	Image    sdk.Image
	Info     *sdk.Info
	// Refused holds the references that were not opened, and why.
	Refused []error
}

// Format returns the canonical name of the layer's format, or of the file's own
// driver where that was asked for.
func (l *Layer) Format() string {
	if l.Protocol {
		return l.Files[0].Protocol()
	}
	return l.Plugin.Manifest.Name
}

// Backing returns the layer's reference to its backing file, or false.
func (l *Layer) Backing() (sdk.Reference, bool) {
	for _, r := range l.Info.References {
		if r.Kind == sdk.RefBacking && r.Name != "" {
			return r, true
		}
	}
	return sdk.Reference{}, false
}

// Close closes the files. The plugin keeps its own until Release, or its end,
// which may come after the core's: the locks go first.
func (l *Layer) Close() {
	for _, f := range l.Files {
		lock.Release(f.File)
		f.Close()
	}
}

// Chain is an opened image with its backing files, the image itself first.
type Chain struct {
	Layers []*Layer
}

// Top is the image itself.
func (c *Chain) Top() *Layer { return c.Layers[0] }

// Close closes all layers.
func (c *Chain) Close() {
	for _, l := range c.Layers {
		l.Close()
	}
}

// Release closes all layers in their plugins too: for runs that open many
// images, where ending the plugin comes late.
func (c *Chain) Release() {
	for _, l := range c.Layers {
		_ = l.Image.Close() // a plugin that is gone has nothing open
	}
	c.Close()
}

// Open opens the image at path and, where asked for, its chain.
func (o *Opener) Open(ctx context.Context, path string, opts Options) (*Chain, error) {
	if opts.Name == "" {
		opts.Name = path
	}
	if err := o.admit(opts); err != nil {
		return nil, couldNotOpen(opts.Name, err)
	}
	walk := o.Gate.NewWalk()
	file, err := walk.OpenMain(path, opts.ReadWrite)
	if err != nil {
		var host *errno.Error
		protocol, named := protocolOf(path)
		switch {
		case errors.Is(err, fs.ErrNotExist) && named:
			return nil, couldNotOpen(opts.Name, unknownProtocol(protocol))
		case errors.As(err, &host):
			return nil, couldNotOpen(opts.Name, err) // QEMU names the image and the file
		}
		return nil, err
	}
	again := func() (*os.File, error) { return o.Gate.NewWalk().OpenMain(path, opts.ReadWrite) }
	top, err := o.openTop(ctx, walk, path, file, again, opts)
	if err != nil {
		return nil, err
	}
	chain := &Chain{Layers: []*Layer{top}}
	if !opts.Backing {
		return chain, nil
	}
	if err := o.openBackings(ctx, walk, chain, opts); err != nil {
		chain.Close()
		return nil, err
	}
	return chain, nil
}

// admit refuses to open for writing what was said to be opened otherwise, in
// qemu-img's words.
func (o *Opener) admit(opts Options) error {
	switch {
	case opts.ReadWrite && opts.ReadOnly:
		return errors.New("Block node is read-only")
	case (opts.ReadWrite || opts.Writable) && (o.Shared || opts.Shared):
		return errors.New("force-share=on can only be used with read-only images")
	}
	return nil
}

func couldNotOpen(name string, err error) error {
	return fmt.Errorf("Could not open '%s': %w", gate.OneLine(name), err)
}

// openTop opens the image itself, at the snapshot asked for. again returns the
// file once more.
func (o *Opener) openTop(ctx context.Context, walk *gate.Walk, path string, file *os.File, again func() (*os.File, error), opts Options) (*Layer, error) {
	snapshot := opts.Snapshot
	if strings.HasPrefix(snapshot, "snapshot.") {
		// Only what the image tells of its snapshots can answer this.
		active := opts
		active.Snapshot, active.Describe = "", true
		quiet := *o // the second time says it all
		quiet.Warn = nil
		layer, err := quiet.openLayer(ctx, walk, path, file, active)
		if err != nil {
			return nil, couldNotOpen(opts.Name, err)
		}
		defer (&Chain{Layers: []*Layer{layer}}).Release()
		if opts.Snapshot, err = FindSnapshot(layer.Info.Snapshots, snapshot); err != nil {
			return nil, fmt.Errorf("Failed to load snapshot: %w", err)
		}
		if file, err = again(); err != nil {
			return nil, err
		}
	}
	layer, err := o.openLayer(ctx, walk, path, file, opts)
	switch {
	case err == nil:
		return layer, nil
	case opts.Snapshot != "" && errors.Is(err, sdk.ErrNotFound):
		return nil, fmt.Errorf("Failed to load snapshot: %w", errNoSnapshot)
	}
	return nil, couldNotOpen(opts.Name, err)
}

// errNoSnapshot has qemu-img's words.
var errNoSnapshot = &sdk.Error{Text: "Can't find snapshot", Class: sdk.ErrNotFound}

// FindSnapshot returns the id of the snapshot that -l selects: ID or NAME, or
// snapshot.id=ID,snapshot.name=NAME, of which both must fit.
func FindSnapshot(snapshots []sdk.Snapshot, which string) (string, error) {
	if !strings.HasPrefix(which, "snapshot.") {
		for _, fits := range []func(*sdk.Snapshot) bool{
			func(s *sdk.Snapshot) bool { return s.ID == which },
			func(s *sdk.Snapshot) bool { return s.Name == which },
		} {
			for i := range snapshots {
				if fits(&snapshots[i]) {
					return snapshots[i].ID, nil
				}
			}
		}
		return "", errNoSnapshot
	}
	settings, _, err := option.Split(which)
	if err != nil {
		return "", err
	}
	var id, name *string
	for i := range settings {
		switch x := &settings[i]; x.Key {
		case "snapshot.id":
			id = &x.Value
		case "snapshot.name":
			name = &x.Value
		default:
			return "", fmt.Errorf("Invalid parameter '%s'", x.Key)
		}
	}
	for i := range snapshots {
		if s := &snapshots[i]; (id == nil || s.ID == *id) && (name == nil || s.Name == *name) {
			return s.ID, nil
		}
	}
	return "", errNoSnapshot
}

// maxNested is how many times an error says of which backing file it is, as
// qemu-img does once for each.
const maxNested = 8

// openBackings appends the chain below its last layer.
func (o *Opener) openBackings(ctx context.Context, walk *gate.Walk, chain *Chain, opts Options) error {
	overrides := opts.Overrides
	shared := opts.Shared // goes down the chain
	for {
		layer := chain.Layers[len(chain.Layers)-1]
		ref, ok := layer.Backing()
		var over Override
		if i := len(chain.Layers) - 1; i < len(overrides) {
			over = overrides[i]
		}
		if over.None || (!ok && over.Path == "") {
			return nil
		}
		shared = shared || over.Shared
		over.Shared = shared
		next, path, err := o.openBacking(ctx, walk, layer, ref, over, opts)
		switch {
		case err == nil:
			chain.Layers = append(chain.Layers, next)
		case opts.Describe:
			return couldNotOpen(path, err)
		default:
			return couldNotOpen(opts.Name, fmt.Errorf("%s%w", strings.Repeat("Could not open backing file: ", min(len(chain.Layers), maxNested)), err))
		}
	}
}

// openBacking opens the image that layer refers to, in the chain of an image opened
// with top. Where it fails it returns the path that was tried.
func (o *Opener) openBacking(ctx context.Context, walk *gate.Walk, layer *Layer, ref sdk.Reference, over Override, top Options) (*Layer, string, error) {
	var file *os.File
	var err error
	path, format := layer.FullName(ref), ref.Format
	if over.Protocol {
		ref.Format, format = "", ""
	}
	if over.Path != "" {
		path, format = over.Path, over.Format
		file, err = walk.OpenMain(path, false)
	} else {
		if over.Format != "" {
			format = over.Format
		}
		var found string
		if file, found, err = walk.OpenReference(layer.Path, ref); err == nil {
			path = found
		}
	}
	if err != nil {
		return nil, path, err
	}
	if format == "" && !over.Protocol && o.Warn != nil {
		o.Warn(fmt.Sprintf("%s names no format for its backing file %s: probing it", layer.Path, path))
	}
	next, err := o.openLayer(ctx, walk, path, file, Options{
		Format: format, Through: over.Through, Protocol: over.Protocol, Access: over.Access, Describe: top.Describe, Still: top.Still,
		Own: over.Own, Data: over.Data,
	})
	if err != nil {
		return nil, path, err
	}
	if ref.IdentityKey != "" && over.Path == "" && next.Info.Identity[ref.IdentityKey] != ref.Identity {
		next.Close()
		return nil, path, fmt.Errorf("%s: backing file %s is another image than the one it was made on (%s %s, expected %s): %w",
			layer.Path, path, ref.IdentityKey, next.Info.Identity[ref.IdentityKey], ref.Identity, sdk.ErrCorrupt)
	}
	return next, path, nil
}

// openLayer opens one image of which file is the main file, and takes it over.
func (o *Opener) openLayer(ctx context.Context, walk *gate.Walk, path string, file *os.File, opts Options) (_ *Layer, err error) {
	layer := &Layer{Path: path, Protocol: opts.Protocol, Files: []File{{Role: sdk.RoleMain, Path: path, File: file}}}
	defer func() {
		if err != nil {
			layer.Close()
		}
	}()
	if layer.Plugin, err = o.choose(path, file, opts); err != nil {
		return nil, err
	}
	if !opts.Unlocked {
		plain := layer.Plugin == o.Session.Plugins.Fallback()
		if err := o.lock(file, path, plain, opts); err != nil {
			return nil, err
		}
	}
	for _, key := range slices.Sorted(maps.Keys(opts.Own)) {
		if !slices.Contains(layer.Plugin.Manifest.OpenOptions, key) {
			return nil, fmt.Errorf("Block format '%s' does not support the option '%s'", layer.Plugin.Manifest.Name, key)
		}
	}
	format, err := o.Session.Start(ctx, layer.Plugin)
	if err != nil {
		return nil, err
	}
	layer.Image, err = format.Open(ctx, sdk.OpenRequest{
		Files:     []sdk.NamedFile{{Role: sdk.RoleMain, File: sdk.NewFile(file)}},
		ReadWrite: opts.ReadWrite, Check: opts.Check, Snapshot: opts.Snapshot, Name: filepath.Base(path),
		Guessed: opts.Format == "" && !opts.Protocol, Options: opts.Own,
	})
	if err != nil {
		return nil, err
	}
	if layer.Info, err = layer.Image.Info(ctx); err != nil {
		return nil, err
	}
	o.passOn(layer)
	if layer.Info.Encrypted && !opts.Describe && !opts.Check {
		return nil, errEncrypted
	}
	return layer, o.attach(ctx, walk, layer, opts)
}

// maxWarnings is how many warnings of plugins a chain may give.
const maxWarnings = 64

// passOn hands on what the plugin warns of.
func (o *Opener) passOn(layer *Layer) {
	w, ok := sdk.As[sdk.Warner](layer.Image)
	if !ok || o.Warn == nil {
		return
	}
	for _, text := range w.Warnings() {
		if o.warned++; o.warned > maxWarnings {
			if o.warned == maxWarnings+1 {
				o.Warn("more warnings are left out")
			}
			return
		}
		o.Warn(text)
	}
}

// errEncrypted has qemu-img's words for an image whose data nobody here can read.
var errEncrypted = &sdk.Error{Text: "Parameter 'encrypt.key-secret' is required for cipher", Class: sdk.ErrUnsupported}

// lock takes QEMU's locks on a file, which is plain where it holds nothing but guest
// data. -U is for reading alone.
func (o *Opener) lock(file *os.File, path string, plain bool, opts Options) error {
	mode := lock.Read
	switch {
	case opts.ReadWrite:
		mode = lock.Write
	case o.Shared || opts.Shared:
		mode = lock.Share
	case plain && !opts.Still:
		mode = lock.Look
	}
	return lock.Take(file, path, mode)
}

// attach hands the plugin the further files of its image that the gate grants.
func (o *Opener) attach(ctx context.Context, walk *gate.Walk, layer *Layer, opts Options) error {
	var granted []sdk.NamedFile
	if err := o.admitData(layer, opts); err != nil {
		return err
	}
	for _, ref := range layer.Info.References {
		if ref.Kind == sdk.RefBacking || ref.Role == sdk.RoleMain {
			continue
		}
		if ref.Kind == sdk.RefData && opts.Describe {
			continue // QEMU describes an image without its data file
		}
		file, path, err := o.openPart(walk, layer, ref, opts)
		if err != nil {
			if ref.Required && !opts.Check {
				return err
			}
			layer.Refused = append(layer.Refused, err)
			continue
		}
		layer.Files = append(layer.Files, File{Role: ref.Role, Path: path, File: file})
		granted = append(granted, sdk.NamedFile{Role: ref.Role, File: sdk.NewFile(file)})
	}
	if len(granted) == 0 {
		return nil
	}
	attacher, ok := sdk.As[sdk.Attacher](layer.Image)
	if !ok {
		return fmt.Errorf("%s: plugin %s refers to files and takes none", layer.Path, layer.Format())
	}
	if err := attacher.Attach(ctx, granted); err != nil {
		return err
	}
	var err error
	layer.Info, err = layer.Image.Info(ctx)
	return err
}

// openPart opens and locks what a reference of the image names, or the data file
// that the user names instead, who need not be asked whether he trusts himself.
func (o *Opener) openPart(walk *gate.Walk, layer *Layer, ref sdk.Reference, opts Options) (file *os.File, path string, err error) {
	if data := opts.Data; ref.Kind == sdk.RefData && data != nil {
		path = data.Path
		file, err = walk.OpenNamedPart(path, layer.Path, opts.ReadWrite)
		opts.Access = data.Access
	} else {
		file, path, err = walk.OpenPart(layer.Path, ref, opts.ReadWrite)
	}
	if err != nil || opts.Unlocked {
		return file, path, err
	}
	if err := o.lock(file, path, false, opts); err != nil {
		file.Close()
		return nil, "", err
	}
	return file, path, nil
}

// admitData refuses a data file for an image that has none, and one whose content is
// not to be taken as it is.
func (o *Opener) admitData(layer *Layer, opts Options) error {
	if opts.Data == nil || opts.Describe {
		return nil
	}
	if !slices.ContainsFunc(layer.Info.References, func(r sdk.Reference) bool { return r.Kind == sdk.RefData }) {
		return errors.New("'data-file' can only be set for images with an external data file")
	}
	for _, name := range append([]string{opts.Data.Format}, opts.Data.Through...) {
		if name == "" {
			continue
		}
		if p, err := o.Session.Plugins.ByName(name); err != nil {
			return err
		} else if p != o.Session.Plugins.Fallback() {
			return fmt.Errorf("data-file.driver=%s: only what takes any content as it is can hold an image's data: %w", name, sdk.ErrUnsupported)
		}
	}
	return nil
}

// choose returns the plugin for a named format, or the one whose probe fits.
func (o *Opener) choose(path string, file *os.File, opts Options) (*discover.Plugin, error) {
	fallback := o.Session.Plugins.Fallback()
	for _, name := range opts.Through {
		if p, err := o.Session.Plugins.ByName(name); err != nil {
			return nil, err
		} else if p != fallback {
			return nil, fmt.Errorf("file.driver=%s: between an image and its file can only be what takes any content as it is: %w", name, sdk.ErrUnsupported)
		}
	}
	switch {
	case opts.Protocol && fallback == nil:
		return nil, fmt.Errorf("no installed format takes any content as it is: %w", sdk.ErrNotFormat)
	case opts.Protocol:
		return fallback, opens(fallback)
	case opts.Format != "":
		p, err := o.Session.Plugins.ByName(opts.Format)
		if err != nil {
			return nil, err
		}
		return p, opens(p)
	}
	matches, err := o.Probe(file)
	if err != nil {
		return nil, err
	}
	if len(matches) == 0 {
		return nil, fmt.Errorf("no installed format recognises it: %w", sdk.ErrNotFormat)
	}
	taken := matches[0].Plugin.Manifest.Name
	fits := certain(matches)
	if matches[0].Fallback && len(fits) > 0 {
		fits = append(fits, taken)
	}
	if err := o.Gate.Ambiguous(path, fits); err != nil {
		return nil, err
	}
	if !matches[0].Fallback && len(fits) > 1 && o.Warn != nil {
		o.Warn(fmt.Sprintf("%s could be any of %s; taken as %s (-f chooses)", path, strings.Join(fits, ", "), taken))
	}
	return matches[0].Plugin, opens(matches[0].Plugin)
}

func opens(p *discover.Plugin) error {
	if !p.Manifest.Has(sdk.CapOpen) {
		return fmt.Errorf("plugin %s cannot open images: %w", p.Manifest.Name, sdk.ErrUnsupported)
	}
	return nil
}

// OpenBacking opens the image that a new image at path shall have as its
// backing file, with those below it that can be opened.
func (o *Opener) OpenBacking(ctx context.Context, path, name, format string) (*Chain, error) {
	walk := o.Gate.NewWalk()
	full := gate.Resolve(path, name)
	file, err := walk.OpenMain(full, false)
	if err != nil {
		return nil, err
	}
	opts := Options{Name: full, Format: format}
	top, err := o.openLayer(ctx, walk, full, file, opts)
	if err != nil {
		return nil, err
	}
	chain := &Chain{Layers: []*Layer{top}}
	quiet := *o
	quiet.Warn = nil
	_ = quiet.openBackings(ctx, walk, chain, opts) // who reads the image will be told
	return chain, nil
}

// Holds reports whether the file at path, if there is one, is among those of the
// chain.
func (c *Chain) Holds(path string) bool {
	info, err := os.Stat(path)
	if err != nil {
		return false
	}
	for _, l := range c.Layers {
		for _, f := range l.Files {
			if fi, err := f.Stat(); err == nil && os.SameFile(info, fi) {
				return true
			}
		}
	}
	return false
}

// certain lists the formats whose own bytes are in the file.
func certain(matches []discover.Match) []string {
	var out []string
	for _, m := range matches {
		if !m.Fallback {
			out = append(out, m.Plugin.Manifest.Name)
		}
	}
	return out
}

// Probe returns the formats whose probes fit a file, best first.
func (o *Opener) Probe(file *os.File) ([]discover.Match, error) {
	size, err := sdk.NewFile(file).Size()
	if err != nil {
		return nil, err
	}
	headLen, tailLen := o.Session.Plugins.ProbeReach()
	head, err := readRange(file, 0, min(headLen, size))
	if err != nil {
		return nil, err
	}
	tail, err := readRange(file, max(0, size-tailLen), min(tailLen, size))
	if err != nil {
		return nil, err
	}
	return o.Session.Plugins.Match(head, tail, size), nil
}

func readRange(file *os.File, off, n int64) ([]byte, error) {
	b := make([]byte, n)
	got, err := file.ReadAt(b, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	return b[:got], nil
}

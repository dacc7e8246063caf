package image

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/instar-img/instar/internal/host/output"
	"github.com/instar-img/instar/sdk"
)

// Target is an image that guest data is written into.
type Target struct {
	*Layer
	Writer sdk.Writer
	// Chain is the image with its backing files as it was, nil for one that was
	// made.
	Chain *Chain
	// Fresh: what is not written of the files reads as zeros.
	Fresh bool
	// Sync has Commit wait until the image is on stable storage.
	Sync bool
	// Created says what was made, nil for an image that was there.
	Created *Created

	set *output.Set
}

// TargetOptions say how a target is written.
type TargetOptions struct {
	Compressed   bool
	Reproducible bool
	Time         int64 // seconds since the Unix epoch, where Reproducible
}

// CreateTarget makes an empty image that is not visible under its name before
// Commit.
func (o *Opener) CreateTarget(ctx context.Context, req *CreateRequest, opts TargetOptions) (_ *Target, err error) {
	plugin := req.Plugin
	if !plugin.Manifest.Has(sdk.CapCreate) {
		return nil, fmt.Errorf("Format driver '%s' does not support image creation", plugin.Manifest.Name)
	}
	for _, capability := range []string{sdk.CapOpen, sdk.CapWrite} {
		if !plugin.Manifest.Has(capability) {
			return nil, fmt.Errorf("plugin %s makes empty images and cannot write data into them (it lacks %q): %w", plugin.Manifest.Name, capability, sdk.ErrUnsupported)
		}
	}
	format, err := o.Session.Format(ctx, plugin)
	if err != nil {
		return nil, err
	}
	plan, set, files, err := emit(ctx, format, req, opts)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			set.Abort()
		}
	}()
	made := req.created(plan.Info())
	layer := &Layer{Path: req.Path, Plugin: plugin}
	for i, f := range files {
		osf, _ := sdk.OSFile(f.File)
		layer.Files = append(layer.Files, File{Role: f.Role, Path: made.Paths[i], File: osf})
	}
	if err := layer.reopen(ctx, format, files, plan.Info()); err != nil {
		return nil, err
	}
	t := &Target{Layer: layer, Created: made, Fresh: set.Fresh(0), set: set}
	return t, t.findWriter()
}

// reopen opens a new image in its plugin again, for writing. Its files have no
// names yet: references to them are met from the plan.
func (l *Layer) reopen(ctx context.Context, format sdk.Format, files []sdk.NamedFile, plan sdk.PlanInfo) (err error) {
	l.Image, err = format.Open(ctx, sdk.OpenRequest{Files: files[:1], ReadWrite: true, Name: filepath.Base(l.Path)})
	if err != nil {
		return err
	}
	if l.Info, err = l.Image.Info(ctx); err != nil || len(files) == 1 {
		return err
	}
	attacher, ok := sdk.As[sdk.Attacher](l.Image)
	if !ok {
		return fmt.Errorf("plugin %s made several files and takes one", l.Format())
	}
	opened := append([]File(nil), l.Files[0])
	var parts []sdk.NamedFile
	for _, ref := range l.Info.References {
		for i := 1; i < len(files); i++ {
			if ref.Kind != sdk.RefBacking && plan.Files[i].Name == ref.Name {
				parts = append(parts, sdk.NamedFile{Role: ref.Role, File: files[i].File})
				opened = append(opened, File{Role: ref.Role, Path: l.Files[i].Path, File: l.Files[i].File})
			}
		}
	}
	l.Files = opened
	if err := attacher.Attach(ctx, parts); err != nil {
		return err
	}
	l.Info, err = l.Image.Info(ctx)
	return err
}

// OpenTarget opens an existing image to be written in place (-n).
func (o *Opener) OpenTarget(ctx context.Context, path string, open Options) (*Target, error) {
	open.ReadWrite, open.Backing = true, true
	chain, err := o.Open(ctx, path, open)
	if err != nil {
		return nil, err
	}
	t := &Target{Layer: chain.Top(), Chain: chain}
	if err := t.findWriter(); err != nil {
		chain.Close()
		return nil, err
	}
	return t, nil
}

func (t *Target) findWriter() error {
	w, ok := sdk.As[sdk.Writer](t.Image)
	if !ok {
		return fmt.Errorf("plugin %s cannot write data into this image: %w", t.Format(), sdk.ErrUnsupported)
	}
	t.Writer = w
	return nil
}

// Commit gives an image that has been written its name.
func (t *Target) Commit(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if t.set != nil {
		return t.set.Commit()
	}
	for i := range t.Files {
		if !t.Sync {
			break
		}
		if err := t.Files[i].Sync(); err != nil {
			return err
		}
	}
	return nil
}

// Close drops the target; what was not committed disappears.
func (t *Target) Close() {
	if t.set != nil {
		t.set.Abort()
		return
	}
	t.Chain.Close()
}

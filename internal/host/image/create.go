package image

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/internal/host/output"
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// Keys that the core honours itself, whatever the format.
const (
	keyNocow      = "nocow"
	keyExtentHint = "extent_size_hint"
)

// CreateRequest asks for an empty image.
type CreateRequest struct {
	Path        string
	Plugin      *discover.Plugin
	Values      option.Values // valid by the format's schema
	Size        int64         // virtual size
	Backing     *sdk.BackingInfo
	BackingName string
	// Allow is asked about the virtual size that the image will have, as the format
	// rounds it, before anything is made. Nil allows any.
	Allow func(size int64) error
	// Sync waits until the image is on stable storage before it has its name.
	Sync bool
	Log  func(string)
}

// Created is what Create made.
type Created struct {
	sdk.PlanInfo
	Paths []string // of the files, the image itself first
}

// Create makes an empty image. It appears under its name when it is complete;
// after an error nothing new is there and what was there before still is.
func (o *Opener) Create(ctx context.Context, req *CreateRequest) (*Created, error) {
	format, err := o.Session.Format(ctx, req.Plugin)
	if err != nil {
		return nil, err
	}
	plan, set, _, err := emit(ctx, format, req, TargetOptions{})
	if err != nil {
		return nil, err
	}
	defer set.Abort()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := set.Commit(); err != nil {
		return nil, err
	}
	return req.created(plan.Info()), nil
}

// emit plans an image, makes its files and has the plugin write them.
func emit(ctx context.Context, format sdk.Creator, req *CreateRequest, opts TargetOptions) (sdk.Plan, *output.Set, []sdk.NamedFile, error) {
	plan, err := format.PlanCreate(ctx, sdk.CreateRequest{
		Options: req.Values, Size: req.Size, Backing: req.Backing, BackingName: req.BackingName,
		Name:       filepath.Base(req.Path),
		Compressed: opts.Compressed, Reproducible: opts.Reproducible, Time: opts.Time,
	})
	if err != nil {
		return nil, nil, nil, err
	}
	if req.Allow != nil {
		if err := req.Allow(plan.Info().VirtualSize); err != nil {
			return nil, nil, nil, err
		}
	}
	set, files, err := begin(ctx, format, req, plan.Info())
	if err != nil {
		return nil, nil, nil, err
	}
	if err := plan.Emit(ctx, files); err != nil {
		set.Abort()
		return nil, nil, nil, err
	}
	return plan, set, files, nil
}

// created says what a plan made.
func (req *CreateRequest) created(plan sdk.PlanInfo) *Created {
	made := &Created{PlanInfo: plan, Paths: []string{req.Path}}
	for _, p := range plan.Files[1:] {
		made.Paths = append(made.Paths, filepath.Join(filepath.Dir(req.Path), p.Name))
	}
	return made
}

// furtherName checks the name of a further file: it is made from the image's
// own, so that no plugin can choose another file to be replaced.
func furtherName(req *CreateRequest, name string) error {
	base := filepath.Base(req.Path)
	stem := strings.TrimSuffix(base, filepath.Ext(base))
	if stem == "" {
		stem = base
	}
	if !strings.HasPrefix(name, stem) || name == base {
		return fmt.Errorf("plugin %s planned a file %.100q, which is not named after %q: %w", req.Plugin.Manifest.Name, name, base, sdk.ErrInvalid)
	}
	return nil
}

// begin makes the files that a plan wants.
func begin(ctx context.Context, format sdk.Creator, req *CreateRequest, plan sdk.PlanInfo) (_ *output.Set, _ []sdk.NamedFile, err error) {
	if len(plan.Files) == 0 || plan.Files[0].Role != sdk.RoleMain {
		return nil, nil, fmt.Errorf("plugin %s planned no main file", req.Plugin.Manifest.Name)
	}
	set, err := output.Begin(req.Path, output.Options{
		Nocow:          req.Values.BoolOr(keyNocow, false),
		ExtentSizeHint: int64(req.Values.UintOr(keyExtentHint, output.DefaultExtentSizeHint)),
		Sync:           req.Sync,
		Interim:        interim(ctx, format, req, plan),
		Log:            req.Log,
	})
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			set.Abort()
		}
	}()
	var files []sdk.NamedFile
	for i, p := range plan.Files {
		f := set.Main()
		if i > 0 {
			if err := furtherName(req, p.Name); err != nil {
				return nil, nil, err
			}
			if f, err = set.Add(p.Name); err != nil {
				return nil, nil, err
			}
		}
		if err := set.Prepare(ctx, i, p.Length, p.Preallocation); err != nil {
			return nil, nil, err
		}
		files = append(files, sdk.NamedFile{Role: p.Role, File: sdk.NewFile(f)})
	}
	return set, files, nil
}

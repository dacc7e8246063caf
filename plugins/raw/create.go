package raw

import (
	"context"
	"fmt"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
	"github.com/instar-img/instar/sdk/option"
)

// PlanCreate implements sdk.Creator. A raw image is its content: the plan is
// one file of the right length.
func (format) PlanCreate(_ context.Context, req sdk.CreateRequest) (sdk.Plan, error) {
	if req.Backing != nil || req.BackingName != "" {
		return nil, &sdk.Error{Text: "Backing file not supported for file format 'raw'", Class: sdk.ErrUnsupported}
	}
	if req.Compressed {
		return nil, &sdk.Error{Text: "Compression not supported for this file format", Class: sdk.ErrUnsupported}
	}
	if req.Size < 0 {
		return nil, fmt.Errorf("size %d: %w", req.Size, sdk.ErrInvalid)
	}
	virtual, ok := ondisk.AlignUp(req.Size, sectorSize)
	if !ok {
		return nil, &sdk.Error{Text: "The image size is too large for file format 'raw'", Class: sdk.ErrTooBig}
	}
	mode := req.Options.StringOr(keyPreallocation, "off")
	prealloc, ok := map[string]sdk.Preallocation{
		"off": sdk.PreallocOff, "falloc": sdk.PreallocFalloc, "full": sdk.PreallocFull,
	}[mode]
	if !ok {
		return nil, &sdk.Error{Text: "Unsupported preallocation mode: " + mode, Class: sdk.ErrInvalid}
	}
	return &plan{sdk.PlanInfo{
		VirtualSize: virtual,
		Options: option.Values{
			{Key: keySize, Type: option.Size, Uint: uint64(req.Size), Set: req.Options.IsSet(keySize)},
			{Key: keyNoCOW, Type: option.Bool, Bool: req.Options.BoolOr(keyNoCOW, false), Set: req.Options.IsSet(keyNoCOW)},
			{Key: keyPreallocation, Type: option.Enum, String: mode, Set: req.Options.IsSet(keyPreallocation)},
			{Key: keyExtentHint, Type: option.Size, Uint: req.Options.UintOr(keyExtentHint, 0), Set: req.Options.IsSet(keyExtentHint)},
		},
		Files: []sdk.PlannedFile{{Role: sdk.RoleMain, Length: virtual, Preallocation: prealloc}},
	}}, nil
}

type plan struct{ info sdk.PlanInfo }

func (p *plan) Info() sdk.PlanInfo { return p.info }

// Emit has nothing to add to a file of the planned length.
func (p *plan) Emit(context.Context, []sdk.NamedFile) error { return nil }

// Measure implements sdk.Measurer: every sector of the disk is a sector of the
// file, used or not.
func (p *plan) Measure(context.Context, sdk.MeasureRequest) (sdk.MeasureResult, error) {
	return sdk.MeasureResult{Required: p.info.VirtualSize, FullyAllocated: p.info.VirtualSize, Bitmaps: -1}, nil
}

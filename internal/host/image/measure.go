package image

import (
	"context"
	"fmt"

	"github.com/instar-img/instar/sdk"
)

// Measure computes the host space of a planned image that gets the content of
// source, or of an empty one where source is nil. With a backing file below the
// new image nobody knows how much of the source it shares: the worst is assumed.
func Measure(ctx context.Context, plan sdk.Plan, source *Chain, backed bool) (sdk.MeasureResult, error) {
	m, ok := plan.(sdk.Measurer)
	if !ok {
		return sdk.MeasureResult{}, fmt.Errorf("Block driver does not support size measurement: %w", sdk.ErrUnsupported)
	}
	var req sdk.MeasureRequest
	unit := max(1, plan.Info().AllocationUnit)
	fixed := false
	if source != nil {
		req.Bitmaps = source.Top().Info.Bitmaps
		// A file that is as long when empty as when full needs no look at the map.
		empty, err := m.Measure(ctx, req)
		if err != nil {
			return sdk.MeasureResult{}, err
		}
		fixed = empty.Required >= empty.FullyAllocated
	}
	switch {
	case source == nil || fixed:
	case backed:
		req.AllocatedUnits = (source.VirtualSize() + unit - 1) / unit
	default:
		units, err := source.allocatedUnits(ctx, unit)
		if err != nil {
			return sdk.MeasureResult{}, err
		}
		req.AllocatedUnits = units
	}
	result, err := m.Measure(ctx, req)
	if source == nil || !source.Top().Info.HasBitmaps {
		result.Bitmaps = -1 // there is nothing to copy them from
	}
	return result, err
}

// allocatedUnits counts the units of so many bytes that hold data.
func (c *Chain) allocatedUnits(ctx context.Context, unit int64) (int64, error) {
	var count int64
	counted := int64(-1) // the last unit counted
	err := c.Map(ctx, 0, c.VirtualSize(), SplitHoles(func(extents []Extent) bool {
		for i := range extents {
			e := &extents[i]
			if e.Zero() {
				continue
			}
			first, last := e.Offset/unit, (e.Offset+e.Length-1)/unit
			if first == counted {
				first++
			}
			if last >= first {
				count += last - first + 1
				counted = last
			}
		}
		return true
	}))
	return count, err
}

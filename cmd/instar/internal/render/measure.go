package render

import (
	"fmt"

	"github.com/instar-img/instar/sdk"
)

// MeasureText is what measure prints.
func MeasureText(r sdk.MeasureResult) string {
	s := fmt.Sprintf("required size: %d\nfully allocated size: %d\n", uint64(r.Required), uint64(r.FullyAllocated))
	if r.Bitmaps >= 0 {
		s += fmt.Sprintf("bitmaps size: %d\n", r.Bitmaps)
	}
	return s
}

// MeasureObject is the same as JSON.
func MeasureObject(r sdk.MeasureResult) *Object {
	o := new(Object)
	o.Set("required", r.Required)
	o.Set("fully-allocated", r.FullyAllocated)
	if r.Bitmaps >= 0 {
		o.Set("bitmaps", r.Bitmaps)
	}
	return o
}

// MeasureJSON is what measure --output json prints.
func MeasureJSON(r sdk.MeasureResult) []byte { return Pretty(MeasureObject(r)) }

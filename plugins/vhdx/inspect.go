package vhdx

import (
	"context"
	"fmt"

	"github.com/instar-img/instar/sdk"
)

var _ sdk.Inspector = (*image)(nil)

// Inspect implements sdk.Inspector. All that a gatekeeper has to know breaks
// rules of the core: a parent is a backing file, a log to replay makes the image
// dirty, and what is required and unknown is not opened.
func (img *image) Inspect(context.Context) (*sdk.Inspection, error) {
	in := &sdk.Inspection{Features: []string{
		fmt.Sprintf("blocks of %d bytes", img.params.blockSize),
		fmt.Sprintf("sectors of %d bytes", img.params.logicalSector),
	}}
	if img.parent != nil {
		in.Features = append(in.Features, "differencing")
	}
	if img.file.dirty() {
		in.Features = append(in.Features, "log")
	}
	return in, nil
}

package qcow2

import "github.com/instar-img/instar/sdk"

// onDevice reports whether the main file is a block device, which has a size of
// its own.
func (im *image) onDevice() bool { return sdk.OnDevice(im.main) }

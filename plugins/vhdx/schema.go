// Package vhdx is the VHDX format of Hyper-V (MS-VHDX): dynamic, fixed and
// differencing disks.
package vhdx

import (
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

const (
	name    = "vhdx"
	version = "0.1.0"
)

// Keys of the create schema.
const (
	keySize           = "size"
	keyLogSize        = "log_size"
	keyBlockSize      = "block_size"
	keySubformat      = "subformat"
	keyBlockStateZero = "block_state_zero"
	keyNocow          = "nocow"
	keyPreallocation  = "preallocation"
	keyExtentSizeHint = "extent_size_hint"
	keyBackingFile    = "backing_file"
	keyBackingFormat  = "backing_fmt"
)

const (
	subformatDynamic = "dynamic"
	subformatFixed   = "fixed"

	preallocOff    = "off"
	preallocFalloc = "falloc"
	preallocFull   = "full"
)

type format struct{}

// New returns the format.
func New() sdk.Format { return format{} }

// Describe implements sdk.Format.
func (format) Describe() sdk.Description {
	return sdk.Description{
		Manifest: sdk.Manifest{
			Name:      name,
			Suffixes:  []string{"vhdx", "avhdx"},
			Version:   version,
			Protocols: []int{sdk.Protocol},
			Capabilities: []string{
				sdk.CapOpen, sdk.CapCreate, sdk.CapCheck, sdk.CapRepair, sdk.CapWrite, sdk.CapDecode,
			},
			Probes:         []sdk.Probe{{Offset: 0, Bytes: "7668647866696c65", Score: 100}},
			BackingFormats: []string{name},
		},
		Create: option.Schema{
			{Name: keySize, Type: option.Size, Help: "Virtual disk size; max of 64TB."},
			{Name: keyLogSize, Type: option.Size, Default: "1048576", Help: "Log size; min 1MB."},
			{Name: keyBlockSize, Type: option.Size, Default: "0", Help: "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size."},
			{Name: keySubformat, Type: option.Enum, Allowed: []string{subformatDynamic, subformatFixed}, Help: "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'."},
			{Name: keyBlockStateZero, Type: option.Bool, Help: "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using 'qemu-img convert' with subformat=dynamic."},
			{Name: keyNocow, Type: option.Bool, Help: "Turn off copy-on-write (valid only on btrfs)"},
			{Name: keyPreallocation, Type: option.Enum, Allowed: []string{preallocOff, preallocFalloc, preallocFull}, RangeText: "Unsupported preallocation mode: %s", Help: "Preallocation mode (allowed values: off, falloc, full)"},
			{Name: keyExtentSizeHint, Type: option.Size, Help: "Extent size hint for the image file, 0 to disable"},
			{Name: keyBackingFile, Type: option.String, Help: "File name of the parent of a differencing disk, a VHDX", Extra: true},
			{Name: keyBackingFormat, Type: option.String, Help: "Image format of the parent, vhdx", Extra: true},
		},
	}
}

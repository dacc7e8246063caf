package vhd

import (
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// name is what qemu calls the format, after Virtual PC.
const name = "vpc"

const (
	keySize          = "size"
	keySubformat     = "subformat"
	keyForceSize     = "force_size"
	keyForceCalc     = "force_size_calc"
	keyBlockSize     = "block_size"
	keyBackingFile   = "backing_file"
	keyBackingFormat = "backing_fmt"
	keyNoCOW         = "nocow"
	keyPreallocation = "preallocation"
	keyExtentHint    = "extent_size_hint"
)

const (
	subDynamic = "dynamic"
	subFixed   = "fixed"
)

const defaultBlockSize = 2 << 20

func description() sdk.Description {
	const hexCookie = "636f6e6563746978"
	return sdk.Description{
		Manifest: sdk.Manifest{
			Name:         name,
			Aliases:      []string{"vhd"},
			Suffixes:     []string{"vhd", "vpc"},
			Version:      "0.1.0",
			Protocols:    []int{sdk.Protocol},
			Capabilities: []string{sdk.CapOpen, sdk.CapCreate, sdk.CapCheck, sdk.CapWrite},
			Probes: []sdk.Probe{
				{Offset: 0, Bytes: hexCookie, Score: 100},
				// A fixed disk begins with what the guest wrote there: without -f
				// it is raw, as for qemu-img, but it matches here too.
				{Offset: -footerSize, Bytes: hexCookie},
				{Offset: -shortFooterSize, Bytes: hexCookie},
			},
			Rules:          rules(),
			BackingFormats: []string{name},
		},
		Create: option.Schema{
			{Name: keySize, Type: option.Size, Help: "Virtual disk size"},
			{
				Name: keySubformat, Type: option.Enum, Allowed: []string{subDynamic, subFixed},
				Help:      "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
				RangeText: "Parameter 'subformat' does not accept value '%s'",
			},
			{Name: keyForceSize, Type: option.Bool, Help: "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based calculation"},
			{Name: keyForceCalc, Type: option.String, Help: "Force disk size calculation to use either CHS geometry, or use the disk current_size specified in the VHD footer", Disposition: option.Ignored, Extra: true},
			{
				Name: keyBlockSize, Type: option.Size, Min: 64 << 10, Max: 256 << 20, PowerOfTwo: true, Extra: true,
				Help: "Block size of dynamic disks (default: 2M)",
			},
			{Name: keyBackingFile, Type: option.String, Help: "File name of a base image, itself a VHD", Extra: true},
			{Name: keyBackingFormat, Type: option.String, Help: "Image format of the base image", Extra: true},
			{Name: keyNoCOW, Type: option.Bool, Help: "Turn off copy-on-write (valid only on btrfs)"},
			{
				Name: keyPreallocation, Type: option.Enum, Allowed: []string{"off", "falloc", "full"},
				Help:      "Preallocation mode (allowed values: off, falloc, full)",
				RangeText: "Unsupported preallocation mode: %s",
			},
			{Name: keyExtentHint, Type: option.Size, Help: "Extent size hint for the image file, 0 to disable"},
		},
	}
}

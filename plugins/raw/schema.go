package raw

import (
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

const (
	keySize          = "size"
	keyOffset        = "offset"
	keyNoCOW         = "nocow"
	keyPreallocation = "preallocation"
	keyExtentHint    = "extent_size_hint"
)

func description() sdk.Description {
	return sdk.Description{
		Manifest: sdk.Manifest{
			Name:         "raw",
			Suffixes:     []string{"raw", "img", "bin", "iso"},
			Version:      "0.1.0",
			Protocols:    []int{sdk.Protocol},
			Capabilities: []string{sdk.CapOpen, sdk.CapCreate, sdk.CapWrite},
			// Any file is a raw image when it is nothing else.
			Probes: []sdk.Probe{{Score: 1}},
			Rules:  rules(),
			// A part of the file can be the disk.
			OpenOptions: []string{keyOffset, keySize},
		},
		Create: option.Schema{
			{Name: keySize, Type: option.Size, Help: "Virtual disk size"},
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

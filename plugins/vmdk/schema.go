// Package vmdk is the VMware disk format: one file or many, sparse, flat or
// compressed for streaming, as hosted products and ESX write it
// ("Virtual Disk Format 5.0").
package vmdk

import (
	"encoding/hex"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// Subformats that create makes: the createType of the descriptor.
const (
	monolithicSparse     = "monolithicSparse"
	monolithicFlat       = "monolithicFlat"
	twoGbMaxExtentSparse = "twoGbMaxExtentSparse"
	twoGbMaxExtentFlat   = "twoGbMaxExtentFlat"
	streamOptimized      = "streamOptimized"
)

const sectorSize = 512

type format struct{}

// New returns the format.
func New() sdk.Format { return format{} }

func (format) Describe() sdk.Description {
	return sdk.Description{
		Manifest: sdk.Manifest{
			Name:         "vmdk",
			Suffixes:     []string{"vmdk"},
			Version:      "0.1.0",
			Protocols:    []int{sdk.Protocol},
			Capabilities: capabilities,
			Probes: []sdk.Probe{
				{Bytes: hex.EncodeToString([]byte(sparseMagic)), Score: 100},
				{Bytes: hex.EncodeToString([]byte(cowdMagic)), Score: 100},
				{Bytes: hex.EncodeToString([]byte("# Disk Descriptor")), Score: 100, FoldCase: true},
				{Bytes: hex.EncodeToString([]byte("version=1\n")), Score: 90, AfterComments: true},
				{Bytes: hex.EncodeToString([]byte("version=1\r\n")), Score: 90, AfterComments: true},
				{Bytes: hex.EncodeToString([]byte("version=2\n")), Score: 90, AfterComments: true},
				{Bytes: hex.EncodeToString([]byte("version=2\r\n")), Score: 90, AfterComments: true},
				{Bytes: hex.EncodeToString([]byte("version=3\n")), Score: 90, AfterComments: true},
				{Bytes: hex.EncodeToString([]byte("version=3\r\n")), Score: 90, AfterComments: true},
			},
			Rules:          rules(),
			BackingFormats: []string{"vmdk"},
		},
		Create: schema(),
	}
}

var capabilities = []string{sdk.CapOpen, sdk.CapCreate, sdk.CapCheck, sdk.CapWrite, sdk.CapDecode}

// Bounds of grain_size in bytes. The specification asks for more than 8
// sectors, and libvmdk insists; what is larger than 2 MiB gains nothing and has
// to fit the window through which compressed grains pass.
const (
	minGrainSize     = 8 << 10
	maxGrainSize     = 2 << 20
	defaultGrainSize = 64 << 10
)

func schema() option.Schema {
	return option.Schema{
		{Name: "size", Type: option.Size, Help: "Virtual disk size"},
		{Name: "adapter_type", Type: option.Enum, Allowed: []string{"ide", "buslogic", "lsilogic", "legacyESX"},
			RangeText: "invalid parameter value: %s",
			Help:      "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX"},
		{Name: "backing_file", Type: option.String, Help: "File name of a base image"},
		{Name: "backing_fmt", Type: option.String, Help: "Must be 'vmdk' if present"},
		{Name: "compat6", Type: option.Bool, Default: "off", Help: "VMDK version 6 image"},
		{Name: "hwversion", Type: option.String, Default: "undefined", Help: "VMDK hardware version"},
		{Name: "toolsversion", Type: option.String, Help: "VMware guest tools version"},
		{Name: "subformat", Type: option.Enum, RangeText: "invalid parameter value: %s",
			Allowed: []string{monolithicSparse, monolithicFlat, twoGbMaxExtentSparse, twoGbMaxExtentFlat, streamOptimized},
			Help:    "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} "},
		{Name: "zeroed_grain", Type: option.Bool, Help: "Enable efficient zero writes using the zeroed-grain GTE feature"},
		{Name: "grain_size", Type: option.Size, Min: minGrainSize, Max: maxGrainSize, PowerOfTwo: true, Extra: true,
			Help: "Size of a grain of a sparse extent (default 64k)"},
		{Name: "nocow", Type: option.Bool, Help: "Turn off copy-on-write (valid only on btrfs)"},
		{Name: "preallocation", Type: option.Enum, Allowed: []string{"off", "falloc", "full"},
			RangeText: "Unsupported preallocation mode: %s",
			Help:      "Preallocation mode (allowed values: off, falloc, full)"},
		{Name: "extent_size_hint", Type: option.Size, Help: "Extent size hint for the image file, 0 to disable"},
	}
}

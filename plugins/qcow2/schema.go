// Package qcow2 reads, checks and writes qcow2 images, versions 2 and 3.
//
// Section names in comments refer to qcow2.txt, the specification that QEMU
// publishes in docs/interop.
package qcow2

import (
	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

const (
	keySize         = "size"
	keyBackingFile  = "backing_file"
	keyBackingFmt   = "backing_fmt"
	keyClusterSize  = "cluster_size"
	keyCompat       = "compat"
	keyRefcountBits = "refcount_bits"
	keyExtendedL2   = "extended_l2"
	keyCompression  = "compression_type"
	keyLazy         = "lazy_refcounts"
	keyPrealloc     = "preallocation"
)

// keyNoUnref is an option of opening: clusters that a guest discards shall stay
// its own. No guest runs here, and it has no effect.
const keyNoUnref = "discard-no-unref"

const (
	clusterSizeText  = "Cluster size must be a power of two between 512 and 2048k"
	refcountBitsText = "Refcount width must be a power of two and may not exceed 64 bits"

	encryptionReason = "instar does not write encrypted images yet"
	dataFileReason   = "instar does not create images with an external data file yet"
)

func schema() option.Schema {
	return option.Schema{
		{Name: "encryption", Type: option.Bool, Help: "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)", Disposition: option.Deferred, Reason: encryptionReason},
		{Name: "encrypt.*", Type: option.String, Help: "Encrypt the image, format choices: 'aes', 'luks'", Disposition: option.Deferred, Reason: encryptionReason},
		{Name: keyClusterSize, Type: option.Size, Default: "65536", Min: 1 << minClusterBits, Max: 1 << maxClusterBits, PowerOfTwo: true, RangeText: clusterSizeText, Help: "qcow2 cluster size"},
		{Name: keyExtendedL2, Type: option.Bool, Default: "off", Help: "Extended L2 tables"},
		{Name: keyPrealloc, Type: option.Enum, Allowed: []string{"off", "metadata", "falloc", "full"}, Help: "Preallocation mode (allowed values: off, metadata, falloc, full)"},
		{Name: keyCompression, Type: option.Enum, Default: "zlib", Allowed: []string{"zlib", "zstd"}, Help: "Compression method used for image cluster compression"},
		{Name: keySize, Type: option.Size, Help: "Virtual disk size"},
		// All four spellings stand in Allowed, so that the value is printed as
		// the user wrote it.
		{Name: keyCompat, Type: option.Enum, Allowed: []string{"0.10", "1.1", "v2", "v3"}, RangeText: "Parameter 'version' does not accept value '%s'", Help: "Compatibility level (v2 [0.10] or v3 [1.1])"},
		{Name: keyBackingFile, Type: option.String, Help: "File name of a base image"},
		{Name: keyBackingFmt, Type: option.String, Help: "Image format of the base image"},
		{Name: "data_file", Type: option.String, Help: "File name of an external data file", Disposition: option.Deferred, Reason: dataFileReason},
		{Name: "data_file_raw", Type: option.Bool, Help: "The external data file must stay valid as a raw image", Disposition: option.Deferred, Reason: dataFileReason},
		{Name: keyLazy, Type: option.Bool, Default: "off", Help: "Postpone refcount updates"},
		{Name: keyRefcountBits, Type: option.Uint, Default: "16", Min: 1, Max: 64, PowerOfTwo: true, RangeText: refcountBitsText, Help: "Width of a reference count entry in bits"},
		{Name: "nocow", Type: option.Bool, Help: "Turn off copy-on-write (valid only on btrfs)"},
		{Name: "extent_size_hint", Type: option.Size, Help: "Extent size hint for the image file, 0 to disable"},
	}
}

type format struct{}

// New returns the qcow2 format.
func New() sdk.Format { return format{} }

func (format) Describe() sdk.Description {
	return sdk.Description{
		Manifest: sdk.Manifest{
			Name:         "qcow2",
			Suffixes:     []string{"qcow2"},
			Version:      "0.1.0",
			Protocols:    []int{sdk.Protocol},
			Capabilities: []string{sdk.CapOpen, sdk.CapCreate, sdk.CapDecode, sdk.CapCheck, sdk.CapRepair, sdk.CapWrite},
			Probes: []sdk.Probe{
				{Offset: 0, Bytes: "514649fb00000002", Score: 100},
				{Offset: 0, Bytes: "514649fb00000003", Score: 100},
				// Versions to come are ours to refuse by name.
				{Offset: 0, Bytes: "514649fb", Score: 50},
			},
			Rules:       rules(),
			OpenOptions: []string{keyNoUnref},
		},
		Create: schema(),
	}
}

package qcow2

import (
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
)

func TestConformance(t *testing.T) {
	formattest.Run(t, New, formattest.Config{
		Options: []string{
			"cluster_size=4k", // every bit of its metadata is flipped: few bytes
			"",
			"compat=0.10,cluster_size=4k",
			"cluster_size=512,refcount_bits=1",
			"cluster_size=16k,extended_l2=on,lazy_refcounts=on",
			"cluster_size=2M,refcount_bits=64,compression_type=zstd",
			"preallocation=metadata,cluster_size=64k",
		},
		CompressedOptions: []string{
			"",
			"compression_type=zstd",
			"compat=0.10,cluster_size=512",
			"cluster_size=16k,extended_l2=on,compression_type=zstd",
			"cluster_size=2M",
		},
	})
}

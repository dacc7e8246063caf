package qcow2

import (
	"context"

	"github.com/instar-img/instar/sdk"
)

// Measure computes what qemu-img measure does: the metadata of a fully
// allocated image, whatever is in it, and the guest clusters that hold data.
func (p *plan) Measure(_ context.Context, req sdk.MeasureRequest) (sdk.MeasureResult, error) {
	g := &p.g
	clusters := g.clusters(p.size)
	// Whole L2 tables, whole clusters of L1 table, one of header.
	tables := divUp(clusters, g.l2Entries)
	meta := 1 + tables + divUp(tables*8, g.clusterSize)
	blocks, reftable := g.refcountMetadata(meta+clusters, false)
	meta += blocks + reftable

	data := min(req.AllocatedUnits, clusters)
	if p.prealloc == "falloc" || p.prealloc == "full" {
		data = clusters
	}
	r := sdk.MeasureResult{
		Required:       (meta + data) * g.clusterSize,
		FullyAllocated: (meta + clusters) * g.clusterSize,
		Bitmaps:        -1,
	}
	if p.version >= 3 {
		r.Bitmaps = g.bitmapsSpace(p.size, req.Bitmaps)
	}
	return r, nil
}

// bitmapsSpace returns the host bytes of fully allocated bitmaps, their tables
// and their directory. Inconsistent ones count, as for qemu-img.
func (g *geometry) bitmapsSpace(size int64, bitmaps []sdk.BitmapInfo) int64 {
	var clusters, directory int64
	for _, b := range bitmaps {
		if b.Granularity <= 0 {
			continue
		}
		n := g.bitmapClusters(size, b.Granularity)
		clusters += n + g.clusters(n*8)
		directory += divUp(bitmapFixed+int64(len(b.Name)), 8) * 8
	}
	return (clusters + g.clusters(directory)) * g.clusterSize
}

// bitmapClusters returns how many clusters the bits of a disk take.
func (g *geometry) bitmapClusters(size, granularity int64) int64 {
	return g.clusters(divUp(divUp(size, granularity), 8))
}

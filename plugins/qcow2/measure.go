package qcow2

import (
	"context"

	"github.com/instar-img/instar/sdk"
)

// Measure computes the file's length when so many guest clusters hold data.
// Like qemu-img's it has the metadata of a fully allocated image in both.
func (p *plan) Measure(_ context.Context, req sdk.MeasureRequest) (sdk.MeasureResult, error) {
	clusters := p.g.clusters(p.size)
	tables := divUp(clusters, p.g.l2Entries)
	l1 := divUp(tables*8, p.g.clusterSize)
	used := 1 + tables + l1 + clusters // with the header
	full := (used + refcountClusters(p.g, used)) * p.g.clusterSize

	data := clusters
	if p.prealloc == "off" || p.prealloc == "metadata" {
		data = min(req.AllocatedUnits, clusters)
	}
	result := sdk.MeasureResult{
		Required:       full - (clusters-data)*p.g.clusterSize,
		FullyAllocated: full,
		Bitmaps:        -1,
	}
	if p.version >= 3 {
		result.Bitmaps = p.measureBitmaps(req.Bitmaps)
	}
	return result, nil
}

// refcountClusters returns the clusters of refcount table and blocks that count
// used clusters and themselves.
func refcountClusters(g geometry, used int64) int64 {
	blocks, table := int64(0), int64(0)
	for {
		b := divUp(used+blocks+table, g.blockEntries)
		t := divUp(b*8, g.clusterSize)
		if b == blocks && t == table {
			return blocks + table
		}
		blocks, table = b, t
	}
}

// measureBitmaps returns the bytes of bitmaps of which every bit is set: their
// data, their tables, and the directory.
func (p *plan) measureBitmaps(bitmaps []sdk.BitmapInfo) int64 {
	var clusters, directory int64
	for _, b := range bitmaps {
		if b.Inconsistent {
			continue // not copied
		}
		data := divUp(divUp(divUp(p.size, max(1, b.Granularity)), 8), p.g.clusterSize)
		clusters += data + divUp(data*8, p.g.clusterSize)
		directory += divUp(bitmapFixed+int64(len(b.Name)), 8) * 8
	}
	return (clusters + divUp(directory, p.g.clusterSize)) * p.g.clusterSize
}

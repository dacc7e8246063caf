package qcow2

import (
	"fmt"
	"syscall"

	"github.com/instar-img/instar/sdk"
)

// preallocated reports whether guest clusters were allocated in tables only
// (preallocation=metadata), so that holes of the file are worth looking for.
// As qemu does, it takes an image for one when clearly more clusters are in use
// than the file has blocks for.
func (im *image) preallocated() bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	if !im.sparseOK {
		sparse, err := im.detectPreallocated()
		im.sparse, im.sparseOK = sparse && err == nil, true
	}
	return im.sparse
}

func (im *image) detectPreallocated() (bool, error) {
	osf, ok := sdk.OSFile(im.main)
	if !ok || im.h.dataFile() {
		return false, nil
	}
	fi, err := osf.Stat()
	if err != nil {
		return false, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.Mode().IsRegular() {
		return false, nil
	}
	real := st.Blocks * 512 / im.g.clusterSize
	limit := max(real*10/9, real+2)
	total := im.g.clusters(fi.Size())
	if total < limit {
		return false, nil
	}
	// Count clusters in use until there are too many.
	used := int64(0)
	block := make([]byte, im.g.clusterSize)
	for i := int64(0); i*im.g.blockEntries < total; i++ {
		off, err := im.refcountBlock(i)
		if err != nil {
			return false, err
		}
		if off == 0 {
			continue
		}
		if err := readZeros(im.main, block, off); err != nil {
			return false, fmt.Errorf("refcount block %d: %w", i, err)
		}
		for j := int64(0); j < min(im.g.blockEntries, total-i*im.g.blockEntries); j++ {
			if refcountAt(block, j, im.g.order) != 0 {
				used++
			}
		}
		if used >= limit {
			return true, nil
		}
	}
	return false, nil
}

package qcow2

import (
	"encoding/binary"
	"fmt"

	"github.com/instar-img/instar/sdk"
)

// refcountBlock returns the offset of refcount block i, 0 for none.
func (im *image) refcountBlock(i int64) (int64, error) {
	entries := int64(im.h.reftableClusters) * im.g.clusterSize / 8
	if i >= entries {
		return 0, nil
	}
	const per = tablePartSize / 8
	first := i / per * per
	b, err := im.cache.get(int64(im.h.reftableOffset)+first*8, min(per, entries-first)*8)
	if err != nil {
		return 0, fmt.Errorf("refcount table: %w", err)
	}
	off := binary.BigEndian.Uint64(b[(i-first)*8:]) & offsetMask
	if off&uint64(im.g.clusterSize-1) != 0 {
		return 0, fmt.Errorf("refblock offset %#x unaligned (reftable index: %#x): %w", off, i, sdk.ErrCorrupt)
	}
	return int64(off), nil
}

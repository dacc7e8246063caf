package qcow2

import "github.com/instar-img/instar/sdk"

// allocator decides where the clusters of a new image lie. It makes the choices
// that qemu-img makes, so that our images equal its byte for byte; it does so
// on ranges, so that a terabyte takes microseconds.
//
// In a new image every refcount is 0 or 1, so the used clusters are a set.
type allocator struct {
	g             geometry
	used          spans
	free          int64   // where the next search begins
	table         []int64 // refcount table: cluster of each refcount block, 0 for none
	tableCluster  int64
	tableClusters int64
}

// newAllocator starts with header, refcount table and one refcount block.
func newAllocator(g geometry) *allocator {
	a := &allocator{g: g, tableCluster: 1, tableClusters: 1, table: make([]int64, g.clusterSize/8)}
	a.table[0] = 2
	a.used.add(0, 3)
	a.free = 3
	return a
}

var errTooLarge = &sdk.Error{
	Text:  "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
	Class: sdk.ErrTooBig,
}

// find returns n free clusters in a row, without taking them.
func (a *allocator) find(n int64) int64 {
	for {
		taken, ok := a.used.firstIn(a.free, a.free+n)
		if !ok {
			a.free += n
			return a.free - n
		}
		a.free = taken.end
	}
}

// alloc takes n clusters in a row.
func (a *allocator) alloc(n int64) (int64, error) {
	for {
		start := a.find(n)
		again, err := a.take(start, n)
		if err != nil {
			return 0, err
		}
		if !again {
			return start, nil
		}
	}
}

// allocAt takes as many as it can of n clusters that begin at start.
func (a *allocator) allocAt(start, n int64) (int64, error) {
	for {
		got := n
		if taken, ok := a.used.firstIn(start, start+n); ok {
			got = max(taken.start-start, 0)
		}
		again, err := a.take(start, got)
		if err != nil {
			return 0, err
		}
		if !again {
			return got, nil
		}
	}
}

// take marks clusters used. When a refcount block had to be made on the way,
// nothing is taken and again is true: the block may lie where the clusters
// should.
func (a *allocator) take(start, n int64) (again bool, err error) {
	for c := start; c < start+n; {
		index := c / a.g.blockEntries
		again, err = a.needBlock(index, c)
		if again || err != nil {
			a.release(start, c-start)
			a.free = min(a.free, start) // they may still be free
			return again, err
		}
		end := min(start+n, (index+1)*a.g.blockEntries)
		a.used.add(c, end)
		c = end
	}
	return false, nil
}

func (a *allocator) release(start, n int64) {
	if n > 0 {
		a.used.remove(start, start+n)
		a.free = min(a.free, start)
	}
}

// needBlock makes the refcount block for cluster c where there is none, and
// then reports true.
func (a *allocator) needBlock(index, c int64) (bool, error) {
	if index < int64(len(a.table)) && a.table[index] != 0 {
		return false, nil
	}
	block := a.find(1)
	if block/a.g.blockEntries == index {
		a.used.add(block, block+1) // it describes itself
	} else if again, err := a.take(block, 1); again || err != nil {
		return again, err
	}
	if index < int64(len(a.table)) {
		a.table[index] = block
		return true, nil
	}
	// The table is too small. A new one goes beyond everything that the blocks
	// so far can describe.
	blocks := divUp(max(c, block)+1, a.g.blockEntries)
	_, err := a.growTable(blocks*a.g.blockEntries, 0, false, index, block)
	return true, err
}

// growTable puts a new refcount table, with the blocks that describe it and
// additional clusters after it, at start, and returns the end of the table.
func (a *allocator) growTable(start, additional int64, exact bool, index, block int64) (int64, error) {
	total, _ := a.g.refcountMetadata(start+additional, !exact)
	size := total
	if !exact {
		size += divUp(total, 2)
	}
	perCluster := a.g.clusterSize / 8
	size = divUp(size, perCluster) * perCluster
	if size > maxReftableBytes/8 {
		return 0, errTooLarge
	}
	table := make([]int64, size)
	copy(table, a.table)
	if block != 0 {
		table[index] = block
	}
	next := start
	for i := start / a.g.blockEntries; i < total; i++ {
		if table[i] == 0 {
			table[i] = next
			next++
		}
	}
	oldCluster, oldClusters := a.tableCluster, a.tableClusters
	a.table, a.tableCluster, a.tableClusters = table, next, size/perCluster
	end := next + a.tableClusters
	a.used.add(start, end)
	a.release(oldCluster, oldClusters)
	return end, nil
}

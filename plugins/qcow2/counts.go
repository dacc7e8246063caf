package qcow2

// counts holds how often each cluster is referred to. Pages exist where
// something is, so that a sparse file of any length costs little.
type counts struct {
	max uint64 // what the image's refcounts can express
	n   int64  // clusters counted so far, as if there were no pages
	// Narrow refcounts, which nearly all images have, take two bytes a cluster.
	narrow [][]uint16
	wide   [][]uint32
	isWide bool
}

const countsPage = 1 << 16

func newCounts(order uint32, clusters int64) *counts {
	c := &counts{max: min(refcountMax(order), 1<<32-1), isWide: order > 4}
	c.grow(clusters)
	return c
}

// grow makes room for clusters below n.
func (c *counts) grow(n int64) {
	if n <= c.n {
		return
	}
	c.n = n
	pages := int(divUp(n, countsPage))
	if c.isWide {
		for len(c.wide) < pages {
			c.wide = append(c.wide, nil)
		}
		return
	}
	for len(c.narrow) < pages {
		c.narrow = append(c.narrow, nil)
	}
}

func (c *counts) get(cluster int64) uint64 {
	if cluster >= c.n {
		return 0
	}
	page, i := cluster/countsPage, cluster%countsPage
	if c.isWide {
		if p := c.wide[page]; p != nil {
			return uint64(p[i])
		}
		return 0
	}
	if p := c.narrow[page]; p != nil {
		return uint64(p[i])
	}
	return 0
}

// page16 returns the counts of the narrow page that holds cluster, from it on.
func (c *counts) page16(cluster int64) []uint16 {
	page, i := cluster/countsPage, cluster%countsPage
	if c.narrow[page] == nil {
		c.narrow[page] = make([]uint16, countsPage)
	}
	return c.narrow[page][i:]
}

// inc adds one to a cluster's count and reports false where it is full.
func (c *counts) inc(cluster int64) bool {
	c.grow(cluster + 1)
	if !c.isWide {
		p := c.page16(cluster)
		if uint64(p[0]) >= c.max {
			return false
		}
		p[0]++
		return true
	}
	page, i := cluster/countsPage, cluster%countsPage
	if c.wide[page] == nil {
		c.wide[page] = make([]uint32, countsPage)
	}
	if uint64(c.wide[page][i]) >= c.max {
		return false
	}
	c.wide[page][i]++
	return true
}

// incRange adds one to n clusters that exist, and returns how many it did
// before one that was full.
func (c *counts) incRange(cluster, n int64) int64 {
	done := int64(0)
	if !c.isWide {
		c.grow(cluster + n)
		limit := uint16(min(c.max, 1<<16-1))
		for done < n {
			p := c.page16(cluster + done)
			if left := n - done; int64(len(p)) > left {
				p = p[:left]
			}
			for i := range p {
				if p[i] >= limit {
					return done + int64(i)
				}
				p[i]++
			}
			done += int64(len(p))
		}
		return done
	}
	for ; done < n; done++ {
		if !c.inc(cluster + done) {
			break
		}
	}
	return done
}

// empty reports whether nothing in the page of a cluster was ever counted.
func (c *counts) empty(cluster int64) bool {
	if cluster >= c.n {
		return true
	}
	if c.isWide {
		return c.wide[cluster/countsPage] == nil
	}
	return c.narrow[cluster/countsPage] == nil
}

// reset forgets all counts.
func (c *counts) reset() {
	clear(c.narrow)
	clear(c.wide)
}

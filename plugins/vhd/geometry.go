package vhd

const (
	// maxSectors is 2040 GiB, the largest disk.
	maxSectors = 0xff000000
	// maxGeometry is the number of sectors that a geometry can express. A disk
	// with exactly this geometry may be larger: its size is as stored.
	maxGeometry = 65535 * 16 * 255
)

// geometry is the footer's "Disk Geometry".
type geometry struct {
	cylinders uint16
	heads     uint8
	sectors   uint8 // per track
}

func (g geometry) total() int64 {
	return int64(g.cylinders) * int64(g.heads) * int64(g.sectors)
}

var largestGeometry = geometry{65535, 16, 255}

// geometryFor returns the geometry for a disk of n sectors (VHD specification,
// "Appendix: CHS Calculation"). It may hold fewer than n.
func geometryFor(n int64) geometry {
	n = min(n, maxGeometry)
	perTrack, heads := int64(255), int64(16)
	if n < 65535*16*63 {
		perTrack = 17
		tracks := n / perTrack
		heads = max((tracks+1023)/1024, 4)
		if tracks >= heads*1024 || heads > 16 {
			perTrack, heads = 31, 16
			tracks = n / perTrack
		}
		if tracks >= heads*1024 {
			perTrack, heads = 63, 16
		}
	}
	return geometry{uint16(n / perTrack / heads), uint8(heads), uint8(perTrack)}
}

// roundGeometry returns the smallest geometry of those that geometryFor gives
// for n sectors or more that holds n, or largestGeometry.
func roundGeometry(n int64) geometry {
	if n == 0 {
		return geometry{}
	}
	for at := n; at < maxGeometry; at++ {
		if g := geometryFor(at); g.total() >= n {
			return g
		}
	}
	return largestGeometry
}

package image

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// SplitHoles splits the sparse data extents of a chain's map at the holes of
// their files, and marks those that are holes. Data beyond the end of a file
// reads as zeros: it is a hole too.
func SplitHoles(yield func([]Extent) bool) func([]Extent) bool {
	return func(in []Extent) bool {
		split := false
		for i := range in {
			split = split || in[i].Sparse
		}
		if !split {
			return yield(in)
		}
		var out []Extent
		for _, e := range in {
			if !e.Sparse || e.File == nil {
				out = append(out, e)
				continue
			}
			for e.Length > 0 {
				hole, data := dataAt(e.File.File, e.HostOffset, e.Length)
				part := e
				part.Length, part.Hole = hole+data, hole > 0
				out = append(out, part)
				e.Offset += part.Length
				e.HostOffset += part.Length
				e.Length -= part.Length
				if len(out) >= mapBatch {
					if !yield(out) {
						return false
					}
					out = out[:0]
				}
			}
		}
		return len(out) == 0 || yield(out)
	}
}

// dataAt looks at [off, off+length) of a file: it begins with a hole of hole
// bytes, or, where hole is 0, with data bytes of data. Where the file system
// does not tell, all is data.
func dataAt(f *os.File, off, length int64) (hole, data int64) {
	next, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return length, 0 // no data from here to the end, or beyond the end
	}
	if err != nil {
		return 0, length
	}
	if next > off {
		return min(next-off, length), 0
	}
	end, err := unix.Seek(int(f.Fd()), off, unix.SEEK_HOLE)
	if err != nil || end <= off {
		return 0, length
	}
	return 0, min(end-off, length)
}

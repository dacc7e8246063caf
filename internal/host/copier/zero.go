package copier

import (
	"bytes"

	"github.com/instar-img/instar/sdk"
)

const zeroStep = 64 << 10

var zeros [zeroStep]byte

// isZero reports whether b is all zeros.
func isZero(b []byte) bool {
	for len(b) > zeroStep {
		if !bytes.Equal(b[:zeroStep], zeros[:]) {
			return false
		}
		b = b[zeroStep:]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

// nonzero appends to runs those of b, whose first byte is at guest offset off,
// that are not zeros, in steps of grain from the start of the disk.
func nonzero(runs []sdk.Run, b []byte, off, grain int64) []sdk.Run {
	for pos := int64(0); pos < int64(len(b)); {
		n := min(grain-(off+pos)%grain, int64(len(b))-pos)
		if !isZero(b[pos : pos+n]) {
			runs = join(runs, off+pos, n)
		}
		pos += n
	}
	return runs
}

// join appends a run, as the rest of the last one where it continues that.
func join(runs []sdk.Run, off, length int64) []sdk.Run {
	if n := len(runs); n > 0 && runs[n-1].Offset+runs[n-1].Length >= off {
		runs[n-1].Length = max(runs[n-1].Length, off+length-runs[n-1].Offset)
		return runs
	}
	return append(runs, sdk.Run{Offset: off, Length: length})
}

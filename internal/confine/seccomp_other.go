//go:build linux && !amd64 && !arm64

package confine

// HasSeccomp reports whether filters are supported: system call numbers of this
// architecture are not known here.
func HasSeccomp() bool { return false }

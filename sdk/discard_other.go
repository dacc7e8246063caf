//go:build !linux

package sdk

// Discard makes n bytes at off of a file read as zeros and gives their space
// back. It returns false where it cannot, and the range is to be overwritten.
func Discard(File, int64, int64) bool { return false }

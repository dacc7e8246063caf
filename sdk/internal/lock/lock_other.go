//go:build !linux

package lock

// Engage returns ErrUnavailable.
func Engage(bool) error { return ErrUnavailable }

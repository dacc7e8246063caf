//go:build !linux

package lock

// Engage returns ErrUnavailable.
func Engage() error { return ErrUnavailable }

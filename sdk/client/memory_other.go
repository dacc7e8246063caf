//go:build !linux

package client

import "os"

// anonymousFile returns memory of a fixed size as a file.
func anonymousFile(size int64) (*os.File, error) { return unlinkedFile(size) }

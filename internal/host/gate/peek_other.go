//go:build unix && !linux

package gate

import "os"

func peek(string) (*os.File, string, error) { return nil, "", nil }

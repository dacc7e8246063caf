//go:build unix && !linux

package child

import "runtime"

// Effective describes the sandbox of this system: none.
func Effective() Sandbox { return Sandbox{System: runtime.GOOS} }

//go:build linux && !amd64 && !arm64

package child

import "github.com/instar-img/instar/internal/confine"

// confineCalls does nothing: system call numbers of this architecture are not
// known here.
func confineCalls() error { return confine.ErrUnavailable }

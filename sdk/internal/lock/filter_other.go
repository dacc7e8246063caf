//go:build linux && !amd64 && !arm64

package lock

import "github.com/instar-img/instar/internal/confine"

func engageSeccomp(bool) error { return confine.ErrUnavailable }

// Package lock takes away from a plugin's process all that it does not need to
// serve requests. It is the second lock: the first is the core's, taken before
// the plugin runs.
package lock

import "errors"

// ErrUnavailable is returned where this system has no such lock, or lacks a
// part of it: the parts that there are have then been taken.
var ErrUnavailable = errors.New("second lock not available on this system")

// Package confine holds the two mechanisms of Linux that both locks of a plugin
// are made of: Landlock rulesets and seccomp filters. What is allowed is the
// callers' business.
package confine

import "errors"

// ErrUnavailable is returned where the kernel lacks a mechanism.
var ErrUnavailable = errors.New("not available in this kernel")

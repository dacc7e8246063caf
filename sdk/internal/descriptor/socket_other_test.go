//go:build unix && !linux

package descriptor

import "golang.org/x/sys/unix"

const socketType = unix.SOCK_STREAM

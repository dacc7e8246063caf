//go:build unix && !linux

package copier

import "os"

const worthReserving = 0

func reserves(*os.File) bool { return false }

func reserve(*os.File, int64, int64) {}

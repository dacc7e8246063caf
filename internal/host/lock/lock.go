// Package lock takes and respects the locks by which QEMU processes tell each
// other what they do with an image file.
//
// A QEMU that holds a permission has byte 100+n of the file locked, one that
// does not want others to have it has byte 200+n locked; both are shared locks
// of the open file description (OFD locks), so that any number of processes
// can hold them and see each other's (QEMU, block/file-posix.c). A lock goes
// with the last descriptor of its open file description, those that were sent
// to other processes included.
//
// Where the system or the file system has no such locks nothing is locked and
// nothing refused, as with qemu's locking=auto.
package lock

import (
	"fmt"
	"os"

	"github.com/instar-img/instar/sdk"
)

// Permissions, by their bit: the n of bytes 100+n and 200+n.
const (
	permRead   = 1 << 0 // consistent read
	permWrite  = 1 << 1
	permResize = 1 << 3

	permBase, unsharedBase = 100, 200
)

var permNames = [...]string{"consistent read", "write", "write unchanged", "resize"}

// Mode is what is done with a file.
type Mode uint8

const (
	// Read: the content must not change meanwhile; other readers are welcome.
	Read Mode = iota
	// Write: nobody else may use the file.
	Write
	// Create: the file is about to be replaced: nobody may use it who relies
	// on its content or size.
	Create
	// Look: the content may change meanwhile, but it must be there.
	Look
	// Share is Read with -U: whatever others do. Nothing is locked.
	Share
)

func (m Mode) permissions() (held, unshared uint8) {
	switch m {
	case Read:
		return permRead, permWrite | permResize
	case Look:
		return permRead, 0
	case Write:
		return permRead | permWrite | permResize, permWrite | permResize
	case Create:
		return permWrite | permResize, permResize
	default:
		return 0, 0
	}
}

// Error says that another process uses the file. Its text is qemu-img's.
type Error struct {
	Path       string
	Shared     bool // others hold a permission that we cannot share
	Permission string
}

func (e *Error) Error() string {
	shared := ""
	if e.Shared {
		shared = "shared "
	}
	return fmt.Sprintf("Failed to get %s\"%s\" lock\nIs another process using the image [%s]?", shared, e.Permission, e.Path)
}

// Unwrap gives the class: what is asked cannot be done as things stand.
func (e *Error) Unwrap() error { return sdk.ErrInvalid }

// Take locks f for mode until f, and every descriptor made from it, is closed.
// path is f's name in the error, which is an *Error when another process is in
// the way. Whoever locks first wins; nobody waits.
func Take(f *os.File, path string, mode Mode) error {
	held, unshared := mode.permissions()
	if held == 0 {
		return nil
	}
	if err := take(f, path, held, unshared); err != nil {
		release(f)
		return err
	}
	return nil
}

// Release gives up what Take took on f.
func Release(f *os.File) { release(f) }

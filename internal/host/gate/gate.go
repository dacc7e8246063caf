// Package gate decides which files are opened, and how. Names found inside an
// image are data until the gate has approved them.
package gate

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/sdk"
)

// MaxDepth is the number of backing files that one chain may have.
const MaxDepth = 200

// Policy says what may be opened. The zero value is a person's at a shell:
// qemu-img's.
type Policy struct {
	// Untrusted follows no reference and refuses ambiguous content.
	Untrusted bool
}

// Error is a decision of the gate against an open.
type Error struct {
	Reference string // the name, as stored or given
	Referrer  string // the image that names it, empty for the user
	Rule      string // which rule, complete
}

func (e *Error) Error() string {
	if e.Referrer == "" {
		return fmt.Sprintf("Could not open '%s': %s", e.Reference, e.Rule)
	}
	return fmt.Sprintf("Could not open '%s', which '%s' refers to: %s", e.Reference, e.Referrer, e.Rule)
}

// Ambiguous refuses content that several formats claim, where the policy says so.
// fits are the formats whose probes match, the fallback among them.
func (p *Policy) Ambiguous(path string, fits []string) error {
	if !p.Untrusted || len(fits) < 2 {
		return nil
	}
	return &Error{Reference: path, Rule: fmt.Sprintf("its content fits several formats (%s): say with -f which one it is", strings.Join(fits, ", "))}
}

// Walk is the opening of one image with all that it refers to. It finds cycles.
type Walk struct {
	policy *Policy
	layers []visited
}

type visited struct {
	dev, ino uint64
	path     string
}

// NewWalk starts the opening of an image.
func (p *Policy) NewWalk() *Walk { return &Walk{policy: p} }

// OpenMain opens what the user named: a regular file or a block device, never
// blocking.
func (w *Walk) OpenMain(path string, readWrite bool) (*os.File, error) {
	f, err := openFile(path, readWrite)
	if err != nil {
		return nil, named(err, path, "")
	}
	if err := w.enter(f, path, ""); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// OpenReference opens the backing file that the image at referrer names, and
// returns the path it was found at.
func (w *Walk) OpenReference(referrer string, ref sdk.Reference) (*os.File, string, error) {
	if w.policy.Untrusted {
		return nil, "", &Error{Reference: ref.Name, Referrer: referrer, Rule: "references are not followed in untrusted images"}
	}
	var first error
	for _, name := range append([]string{ref.Name}, ref.Alternatives...) {
		path := Resolve(referrer, name)
		f, err := openFile(path, false)
		if err == nil {
			if err := w.enter(f, path, referrer); err != nil {
				f.Close()
				return nil, "", err
			}
			return f, path, nil
		}
		if first == nil {
			first = named(err, path, referrer)
		}
		if !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	return nil, "", first
}

// OpenPart opens a file that holds a part of the image at referrer: an extent
// file, which must lie in the image's own directory, or an external data file.
func (w *Walk) OpenPart(referrer string, ref sdk.Reference, readWrite bool) (*os.File, string, error) {
	if w.policy.Untrusted && ref.Kind != sdk.RefExtent {
		return nil, "", &Error{Reference: ref.Name, Referrer: referrer, Rule: "references are not followed in untrusted images"}
	}
	path := Resolve(referrer, ref.Name)
	if ref.Kind == sdk.RefExtent {
		if ref.Name != filepath.Base(ref.Name) || ref.Name == ".." || ref.Name == "." || ref.Name == "/" {
			return nil, "", &Error{Reference: ref.Name, Referrer: referrer, Rule: "an extent file must lie in the image's own directory"}
		}
	}
	f, err := openFile(path, readWrite)
	if err != nil {
		return nil, "", named(err, path, referrer)
	}
	return f, path, nil
}

// enter records a layer, and refuses cycles and chains without end.
func (w *Walk) enter(f *os.File, path, referrer string) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no inode number", path)
	}
	v := visited{dev: uint64(st.Dev), ino: st.Ino, path: path}
	for _, seen := range w.layers {
		if seen.dev == v.dev && seen.ino == v.ino {
			var names []string
			for _, l := range w.layers {
				names = append(names, l.path)
			}
			return &Error{Reference: path, Referrer: referrer, Rule: "the backing files form a cycle: " + strings.Join(append(names, path), " -> ")}
		}
	}
	if len(w.layers) > MaxDepth {
		return &Error{Reference: path, Referrer: referrer, Rule: fmt.Sprintf("more than %d backing files", MaxDepth)}
	}
	w.layers = append(w.layers, v)
	return nil
}

// Resolve returns the path of a file that the image at referrer names: relative
// names are relative to the referrer's directory. Names are paths and nothing
// else: "json:" and "nbd://" have no meaning in an image.
func Resolve(referrer, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	i := strings.LastIndexByte(referrer, '/')
	return referrer[:i+1] + name
}

// openFile opens a regular file or a block device, and nothing else, without
// blocking.
func openFile(path string, readWrite bool) (*os.File, error) {
	flags := unix.O_RDONLY
	if readWrite {
		flags = unix.O_RDWR
	}
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	kind := uint32(st.Mode) & unix.S_IFMT
	if kind != unix.S_IFREG && kind != unix.S_IFBLK {
		_ = unix.Close(fd)
		return nil, errNotRegular{kindName(kind)}
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

type errNotRegular struct{ kind string }

func (e errNotRegular) Error() string {
	return "it is a " + e.kind + ", only regular files and block devices are opened"
}

func kindName(kind uint32) string {
	switch kind {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFIFO:
		return "FIFO"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFSOCK:
		return "socket"
	}
	return "special file"
}

// named says which file could not be opened.
func named(err error, path, referrer string) error {
	var kind errNotRegular
	if errors.As(err, &kind) {
		return &Error{Reference: path, Referrer: referrer, Rule: kind.Error()}
	}
	return fmt.Errorf("Could not open '%s': %w", path, err)
}

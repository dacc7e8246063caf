// Package gate decides which files are opened, and how. Names found inside an
// image are data until the gate has approved them.
//
// Always: only regular files and block devices are opened, and nothing is
// opened that could block or act on being opened. A name in an image is a path
// and nothing else: "json:{...}" and "nbd://host/export" are odd file names.
// Backing files that form a cycle, and chains of more than MaxDepth, are
// refused. Extent files lie in the directory of the image that names them, or
// below it, symbolic links considered.
//
// Untrusted images: no reference is followed.
package gate

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/host/errno"
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
		return fmt.Sprintf("Could not open '%s': %s", OneLine(e.Reference), e.Rule)
	}
	return fmt.Sprintf("Could not open '%s', which '%s' refers to: %s", OneLine(e.Reference), OneLine(e.Referrer), e.Rule)
}

// OneLine returns a name from an image without the line breaks that would make
// an error of it look like several.
func OneLine(name string) string { return breaks.Replace(name) }

var breaks = strings.NewReplacer("\n", `\n`, "\r", `\r`)

// Unwrap gives the class: such requests are not met.
func (e *Error) Unwrap() error { return sdk.ErrInvalid }

const (
	ruleUntrusted = "references are not followed in untrusted images"
	ruleExtent    = "an extent file must lie in the image's own directory"
)

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
	info os.FileInfo
	path string
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
		return nil, "", &Error{Reference: ref.Name, Referrer: referrer, Rule: ruleUntrusted}
	}
	f, path, err := first(ref, func(name string) (*os.File, string, error) {
		path := Resolve(referrer, name)
		f, err := openFile(path, false)
		return f, path, named(err, path, referrer)
	})
	if err != nil {
		return nil, "", err
	}
	if err := w.enter(f, path, referrer); err != nil {
		f.Close()
		return nil, "", err
	}
	return f, path, nil
}

// OpenPart opens a file that holds a part of the image at referrer: an extent
// file, which must lie in the image's own directory, or an external data file.
func (w *Walk) OpenPart(referrer string, ref sdk.Reference, readWrite bool) (*os.File, string, error) {
	if w.policy.Untrusted {
		return nil, "", &Error{Reference: ref.Name, Referrer: referrer, Rule: ruleUntrusted}
	}
	f, path, err := first(ref, func(name string) (*os.File, string, error) {
		path := Resolve(referrer, name)
		if ref.Kind == sdk.RefExtent {
			f, err := openExtent(referrer, name, readWrite)
			if errors.Is(err, errOutside) {
				return nil, "", &Error{Reference: name, Referrer: referrer, Rule: ruleExtent}
			}
			return f, path, named(err, path, referrer)
		}
		f, err := openFile(path, readWrite)
		return f, path, named(err, path, referrer)
	})
	if err != nil {
		return nil, "", err
	}
	if err := w.apart(f, path, referrer); err != nil {
		f.Close()
		return nil, "", err
	}
	return f, path, nil
}

// OpenNamedPart opens what the user named as a part of the image at referrer.
func (w *Walk) OpenNamedPart(path, referrer string, readWrite bool) (*os.File, error) {
	f, err := openFile(path, readWrite)
	if err != nil {
		return nil, named(err, path, "")
	}
	if err := w.apart(f, path, referrer); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// apart refuses a file that is an image of the chain itself.
func (w *Walk) apart(f *os.File, path, referrer string) error {
	seen, err := w.seen(f)
	if err == nil && seen != "" {
		err = &Error{Reference: path, Referrer: referrer, Rule: "it is an image of the same chain (" + seen + "), not a part of one"}
	}
	return err
}

// first opens the first of a reference's names under which there is a file.
// When there is none the error is that of the name proper.
func first(ref sdk.Reference, open func(name string) (*os.File, string, error)) (*os.File, string, error) {
	var missing error
	for _, name := range append([]string{ref.Name}, ref.Alternatives...) {
		f, path, err := open(name)
		if err == nil {
			return f, path, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, "", err
		}
		if missing == nil {
			missing = err
		}
	}
	return nil, "", missing
}

// seen returns the path under which f is a layer already, or "".
func (w *Walk) seen(f *os.File) (string, error) {
	fi, err := f.Stat()
	if err != nil {
		return "", err
	}
	for _, l := range w.layers {
		if os.SameFile(l.info, fi) {
			return l.path, nil
		}
	}
	return "", nil
}

// enter records a layer, and refuses cycles and chains without end.
func (w *Walk) enter(f *os.File, path, referrer string) error {
	fi, err := f.Stat()
	if err != nil {
		return named(err, path, referrer)
	}
	for i, l := range w.layers {
		if os.SameFile(l.info, fi) {
			var names []string
			for _, l := range w.layers[i:] {
				names = append(names, l.path)
			}
			return &Error{Reference: path, Referrer: referrer, Rule: "the backing files form a cycle: " + strings.Join(append(names, path), " -> ")}
		}
	}
	if len(w.layers) > MaxDepth {
		return &Error{Reference: path, Referrer: referrer, Rule: fmt.Sprintf("more than %d backing files", MaxDepth)}
	}
	w.layers = append(w.layers, visited{info: fi, path: path})
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
	// What it is shows before it is opened: opening some devices has effects.
	name := path
	place, again, err := peek(path)
	if err != nil {
		return nil, err
	}
	if place != nil {
		defer place.Close()
		if err := plain(place); err != nil {
			return nil, err
		}
		name = again
	}
	flags := access(readWrite) | unix.O_CLOEXEC
	if place != nil && readWrite && isDevice(place) {
		// A device that is mounted or part of another is not ours to write.
		flags |= unix.O_EXCL
	}
	for {
		fd, err := unix.Open(name, flags, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		return checked(os.NewFile(uintptr(fd), path))
	}
}

// isDevice reports whether f is a device.
func isDevice(f *os.File) bool {
	fi, err := f.Stat()
	return err == nil && fi.Mode()&fs.ModeDevice != 0
}

// errOutside: a name that leads out of the image's directory.
var errOutside = errors.New("outside of the image's directory")

// openExtent opens a file in or below referrer's directory, as openFile does.
func openExtent(referrer, name string, readWrite bool) (*os.File, error) {
	dir := filepath.Dir(referrer)
	if filepath.IsAbs(name) {
		abs, err := filepath.Abs(dir)
		if err != nil {
			return nil, err
		}
		if name, err = filepath.Rel(abs, name); err != nil {
			return nil, errOutside
		}
	}
	if !filepath.IsLocal(name) {
		return nil, errOutside
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	fi, err := root.Stat(name)
	if err == nil {
		if !fi.Mode().IsRegular() && fi.Mode().Type() != fs.ModeDevice {
			return nil, kindError(fi.Mode())
		}
		var f *os.File
		if f, err = root.OpenFile(name, access(readWrite), 0); err == nil {
			return checked(f)
		}
	}
	var no unix.Errno
	if !errors.As(err, &no) {
		return nil, errOutside // a symbolic link that leads out
	}
	return nil, err
}

func access(readWrite bool) int {
	if readWrite {
		return unix.O_RDWR | unix.O_NONBLOCK | unix.O_NOCTTY
	}
	return unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY
}

// checked returns f, open without blocking, ready for use if it is what may be
// opened.
func checked(f *os.File) (*os.File, error) {
	err := plain(f)
	if err == nil {
		err = unix.SetNonblock(int(f.Fd()), false)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// plain refuses what is neither a regular file nor a block device.
func plain(f *os.File) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if mode := fi.Mode(); !mode.IsRegular() && mode.Type() != fs.ModeDevice {
		return kindError(mode)
	}
	return nil
}

// kindError says what a file is that is not opened.
type kindError fs.FileMode

func (e kindError) kind() string {
	switch mode := fs.FileMode(e); {
	case mode.IsDir():
		return "directory"
	case mode&fs.ModeNamedPipe != 0:
		return "FIFO"
	case mode&fs.ModeCharDevice != 0:
		return "character device"
	case mode&fs.ModeSocket != 0:
		return "socket"
	}
	return "special file"
}

func (e kindError) Error() string {
	return "it is a " + e.kind() + ", only regular files and block devices are opened"
}

// named says which file could not be opened.
func named(err error, path, referrer string) error {
	var kind kindError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &kind):
		return &errno.Error{Text: "Could not open '" + OneLine(path) + "'", Err: err}
	case kind.kind() == "directory" && referrer == "":
		// qemu-img's words.
		path := OneLine(path)
		return &sdk.Error{Text: "Could not open '" + path + "': 'file' driver requires '" + path + "' to be a regular file", Class: sdk.ErrInvalid}
	}
	return &Error{Reference: path, Referrer: referrer, Rule: kind.Error()}
}

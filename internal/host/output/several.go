package output

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/host/errno"
)

// Files are renamed one by one, and the old main file names further files that
// the new ones replace: a process killed between two renames would leave the old
// main file over new content. So before the first of them is replaced
//
//   - each new further file gets a second name, and a copy of the new main file
//     that names it by that takes the place of the old one: the image is the new
//     one from there on, at each step. The second names go in the end. Or, where
//     that cannot be done,
//   - the old main file is moved out of the way: until the new one has its name
//     there is no image of that name, rather than a wrong one.

// meetsOld reports whether the set replaces a main file and files that it may
// refer to.
func (s *Set) meetsOld() bool {
	if s.files[0].way != byRename {
		return false
	}
	for _, fl := range s.files[1:] {
		if fl.old != nil && fl.way != direct {
			return true
		}
	}
	return false
}

// clear makes sure that the old main file is not seen beside new further files.
// It returns what stands, or stood, in its place, to be undone after the others;
// nil where the main file cannot be renamed.
func (s *Set) clear() (*file, error) {
	main := s.files[0]
	if err := main.unchanged(); err != nil {
		return nil, err
	}
	first, err := s.standIn()
	if err == nil {
		return first, nil
	}
	s.opts.Log(main.path + ": the old file is moved away until the new ones have their names (" + errno.Reason(err) + ")")
	if err := s.opts.fail("aside " + main.base); err != nil {
		return nil, cannotCreate(main.path, err)
	}
	first = &file{path: main.path, dir: main.dir, base: main.base, borrowed: true, way: byRename}
	first.backup, err = sibling(main.base, func(name string) error { return giveName(main.old, main.dir, main.base, name) })
	if err != nil {
		s.opts.Log(main.path + ": it cannot be renamed (" + errno.Reason(err) + ")")
		return nil, nil //nolint:nilnil // it is written in place then, as publish finds out
	}
	first.done = true
	main.way = byLink
	return first, nil
}

// standIn replaces the main file by one that names the new further files by
// their second names.
func (s *Set) standIn() (_ *file, err error) {
	main := s.files[0]
	if s.opts.Interim == nil {
		return nil, errors.New("its format is not known to allow more")
	}
	names := make(map[string]string, len(s.files)-1)
	for _, fl := range s.files[1:] {
		if err := s.secondName(fl); err != nil {
			return nil, err
		}
		names[fl.base] = fl.second
	}
	first := &file{path: main.path, dir: main.dir, base: main.base, borrowed: true, way: byRename}
	defer func() {
		if err != nil {
			first.drop()
		}
	}()
	if first.f, first.tmp, err = temporary(main, s.opts); err != nil {
		return nil, err
	}
	if err := keepAttributes(main.old, first.f); err != nil {
		return nil, err
	}
	if err := s.opts.Interim(main.f, first.f, names); err != nil {
		return nil, err
	}
	if err := first.f.Sync(); err != nil {
		return nil, err
	}
	if err := s.opts.fail("stand in for " + main.base); err != nil {
		return nil, err
	}
	if err := s.replace(first); err != nil {
		return nil, err
	}
	first.done = true
	main.instead = first.f
	return first, nil
}

// secondName gives a further file a name besides the one it will have.
func (s *Set) secondName(fl *file) error {
	if !fl.borrowed || fl.base != filepath.Base(fl.path) {
		return errors.New(fl.path + " is a symbolic link")
	}
	if err := s.opts.fail("second name for " + fl.base); err != nil {
		return err
	}
	var err error
	if fl.tmp == "" {
		fl.tmp, err = sibling(fl.base, func(name string) error { return giveName(fl.f, fl.dir, "", name) })
		if err != nil {
			return err
		}
	}
	dir := int(fl.dir.Fd())
	fl.second, err = sameLength(fl.base, func(name string) error { return unix.Linkat(dir, fl.tmp, dir, name, 0) })
	return err
}

// sameLength tries hidden names that are as long as base, as sibling does with
// others.
func sameLength(base string, try func(name string) error) (string, error) {
	const digits = 8
	if len(base) < 1+digits {
		return "", errors.New(base + " is too short a name")
	}
	for range 100 {
		name := fmt.Sprintf(".%0*x%s", digits, rand.Uint32(), base[1+digits:])
		err := try(name)
		if !errors.Is(err, os.ErrExist) {
			return name, err
		}
	}
	return "", os.ErrExist
}

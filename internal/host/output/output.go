// Package output makes images that appear under their names complete, or not
// at all.
//
// Every file of a Set is written where nobody sees it: in a file without a name
// (O_TMPFILE), or a temporary sibling where the file system has none. Commit
// gives them their names: by link where nothing was there, by rename over a
// file that was. Until then, and after any failure, an existing file is as it
// was and a new one does not exist.
//
// Some targets cannot be replaced under their name: devices; files with further
// hard links; files in a directory that may not be written or over which a file
// is mounted; files whose owner or attributes a new file cannot be given. The
// first are written directly. For the others the image is completed in a
// temporary file first (beside the target, else in os.TempDir, without a name),
// and Commit then reserves the space in the target, without touching its
// content, before it copies the image over it. A crash or an I/O error during
// that copy, and nothing else, can leave such a target incomplete.
package output

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/host/errno"
	"github.com/instar-img/instar/internal/host/lock"
	"github.com/instar-img/instar/sdk"
)

// DefaultExtentSizeHint is what qemu-img asks for where the user does not say.
const DefaultExtentSizeHint = 1 << 20

// Options say how the files of a Set are made.
type Options struct {
	// Nocow asks for files that a copy-on-write file system overwrites in place.
	Nocow bool
	// ExtentSizeHint asks for space in units of so many bytes; 0 asks for nothing.
	ExtentSizeHint int64
	// InPlace opens files that exist and writes them as they are (convert -n).
	InPlace bool
	// Sync waits until everything is on stable storage before Commit returns.
	// What replaces a file is there in any case before it has the name.
	Sync bool
	// Interim writes to to what main holds, with further files named otherwise:
	// names has the new name, of the same length, of each. An error says that
	// this cannot be done. Nil: it cannot.
	Interim func(main, to *os.File, names map[string]string) error
	// Log is told what a user may want to know: that a target is written in
	// place, and why. May be nil.
	Log func(string)

	// For tests: file systems without O_TMPFILE, and failures on the way.
	noTmpfile bool
	fault     func(step string) error
}

func cannotCreate(path string, err error) error {
	return &errno.Error{Text: "Could not create '" + path + "'", Err: err}
}

// way is how a file gets its content.
type way uint8

const (
	byLink    way = iota // nothing there: the new file is given the name
	byRename             // the new file takes the place of the old one
	overwrite            // the old file is given the new one's content
	direct               // the target itself is written from the start
)

// file is one file of a Set.
type file struct {
	path string   // as the user or the plan calls it
	dir  *os.File // where the file itself lies, symlinks followed
	base string   // its name there
	// borrowed: dir is that of the set's first file.
	borrowed bool
	f        *os.File    // what is written
	old      *os.File    // the existing file, open and locked; nil for a new one
	was      os.FileInfo // of old
	tmp      string      // name in dir of f's temporary sibling; empty: f has no name
	way      way

	prealloc sdk.Preallocation
	done     bool     // has its name
	backup   string   // name in dir under which the old file is kept until all are done
	second   string   // name in dir that f has besides, until all are done
	instead  *os.File // what has the name in place of old meanwhile
}

// Set is the files of one image. Its methods are for one goroutine, but for
// Abort, which may come from another.
type Set struct {
	opts Options
	path string

	mu     sync.Mutex
	files  []*file
	closed bool
}

// ErrAborted is returned for work that Abort interrupted.
var ErrAborted = errors.New("interrupted")

// Begin starts a Set whose main file will be found at path.
func Begin(path string, opts Options) (*Set, error) {
	if opts.Log == nil {
		opts.Log = func(string) {}
	}
	s := &Set{opts: opts, path: path}
	if _, err := s.add(path); err != nil {
		s.Abort()
		return nil, err
	}
	return s, nil
}

// Main returns the main file.
func (s *Set) Main() *os.File { return s.File(0) }

// File returns file i, in the order of Add, where 0 is the main file. The
// files are closed by Commit and Abort.
func (s *Set) File(i int) *os.File { return s.files[i].f }

// Fresh reports whether file i was made empty, so that what is not written to
// it reads as zeros. Of devices, and with InPlace, old content shows through.
func (s *Set) Fresh(i int) bool { return s.files[i].way != direct }

// Add starts a further file called name, in the same directory as the path
// that Begin was given.
func (s *Set) Add(name string) (*os.File, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return nil, fmt.Errorf("file name %q is not a plain name: %w", name, sdk.ErrInvalid)
	}
	return s.add(filepath.Join(filepath.Dir(s.path), name))
}

func (s *Set) add(path string) (*os.File, error) {
	fl, err := open(path, s.opts)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err = s.alone(fl)
	if s.closed {
		err = ErrAborted
	}
	if err != nil {
		fl.drop()
		return nil, err
	}
	s.share(fl)
	s.files = append(s.files, fl)
	return fl.f, nil
}

// share gives a file the first one's descriptor of their directory: a set may
// have thousands of files in one.
func (s *Set) share(fl *file) {
	if len(s.files) == 0 || fl.dir == nil || s.files[0].dir == nil || !sameFile(fl.dir, s.files[0].dir) {
		return
	}
	fl.dir.Close()
	fl.dir, fl.borrowed = s.files[0].dir, true
}

// alone checks that no two files of the set are one.
func (s *Set) alone(fl *file) error {
	for _, other := range s.files {
		same := fl.base != "" && fl.base == other.base && sameFile(fl.dir, other.dir)
		if same || fl.was != nil && other.was != nil && os.SameFile(fl.was, other.was) {
			return fmt.Errorf("%s and %s are the same file: %w", other.path, fl.path, sdk.ErrInvalid)
		}
	}
	return nil
}

func sameFile(a, b *os.File) bool {
	ai, errA := a.Stat()
	bi, errB := b.Stat()
	return errA == nil && errB == nil && os.SameFile(ai, bi)
}

// open finds out what path is and opens what is to be written for it.
func open(path string, opts Options) (*file, error) {
	fl := &file{path: path}
	if err := fl.open(opts); err != nil {
		fl.drop()
		return nil, err
	}
	return fl, nil
}

func (fl *file) open(opts Options) error {
	old, err := openExisting(fl.path)
	fl.old = old
	if err == nil {
		fl.was, err = old.Stat()
	}
	if opts.InPlace {
		if err != nil {
			return &errno.Error{Text: "Could not open '" + fl.path + "'", Err: err}
		}
		return fl.openDirect(lock.Write)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return cannotCreate(fl.path, err)
	}
	if fl.old != nil {
		switch mode := fl.was.Mode(); {
		case mode&fs.ModeNamedPipe != 0:
			return &sdk.Error{Text: "Could not create '" + fl.path + "': a FIFO is not a regular file or a block device", Class: sdk.ErrInvalid}
		case mode&fs.ModeCharDevice != 0:
			return fl.openDirect(lock.Create)
		case mode&fs.ModeDevice != 0:
			// A device that is mounted or part of another is not ours to write.
			if fl.old, err = claimDevice(fl.old); err != nil {
				return cannotCreate(fl.path, err)
			}
			return fl.openDirect(lock.Create)
		}
	}
	if fl.dir, fl.base, err = locate(fl.path); errors.Is(err, errNoName) && fl.old != nil {
		// /dev/fd/3: a file, but not one that another could take the name of.
		return fl.openDirect(lock.Create)
	} else if err != nil {
		return cannotCreate(fl.path, err)
	}
	if fl.old == nil {
		fl.way = byLink
		if fl.f, fl.tmp, err = temporary(fl, opts); err != nil {
			return cannotCreate(fl.path, err)
		}
		fl.hint(opts)
		return nil
	}
	if err := mayReplace(fl.dir, fl.old); err != nil {
		return cannotCreate(fl.path, err)
	}
	if err := lock.Take(fl.old, fl.path, lock.Create); err != nil {
		return err
	}
	return fl.stage(opts)
}

func (fl *file) openDirect(mode lock.Mode) error {
	fl.way, fl.f = direct, fl.old
	return lock.Take(fl.f, fl.path, mode)
}

// stage opens the file in which the successor of fl.old is made.
func (fl *file) stage(opts Options) error {
	fl.way = byRename
	why := irreplaceable(fl.dir, fl.base, fl.old)
	var err error
	if fl.f, fl.tmp, err = temporary(fl, opts); err == nil {
		if kept := keepAttributes(fl.old, fl.f); kept != nil && why == "" {
			why = "a new file cannot be given its attributes (" + errno.Reason(kept) + ")"
		}
	} else if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EROFS) {
		if why == "" {
			why = "its directory cannot be written (" + errno.Reason(err) + ")"
		}
		if fl.f, err = temporaryElsewhere(fl.path); err != nil {
			return &errno.Error{Text: "Could not create a temporary file in '" + os.TempDir() + "' (set TMPDIR to another directory)", Err: err}
		}
	} else {
		return cannotCreate(fl.path, err)
	}
	if why != "" {
		fl.way = overwrite
		opts.Log(fl.path + ": written in place: " + why)
	}
	fl.hint(opts)
	return nil
}

// hint tells the file system how f will be used; what it does not know is not
// an error.
func (fl *file) hint(opts Options) {
	if opts.Nocow {
		if err := setNocow(fl.f); err != nil {
			opts.Log(fl.path + ": nocow without effect: " + errno.Reason(err))
		}
	}
	if opts.ExtentSizeHint > 0 {
		if err := setExtentSizeHint(fl.f, opts.ExtentSizeHint); err != nil {
			opts.Log(fl.path + ": extent_size_hint without effect: " + errno.Reason(err))
		}
	}
}

// temporary makes a file in fl's directory that can take its name there:
// without a name so far where that works, else it returns the one it has.
func temporary(fl *file, opts Options) (*os.File, string, error) {
	if err := opts.fail("temporary"); err != nil {
		return nil, "", err
	}
	if !opts.noTmpfile {
		f, err := unnamed(fl.dir, fl.path)
		if err == nil || !errors.Is(err, errors.ErrUnsupported) {
			return f, "", err
		}
	}
	var f *os.File
	name, err := sibling(fl.base, func(name string) (err error) {
		f, err = openat(fl.dir, name, fl.path, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW, 0o644)
		return err
	})
	return f, name, err
}

// temporaryElsewhere makes a file without a name in os.TempDir.
func temporaryElsewhere(shown string) (*os.File, error) {
	dir, err := openDir(os.TempDir(), nil)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	if f, err := unnamed(dir, shown); err == nil || !errors.Is(err, errors.ErrUnsupported) {
		return f, err
	}
	f, err := os.CreateTemp("", ".instar-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (o *Options) fail(step string) error {
	if o.fault == nil {
		return nil
	}
	return o.fault(step)
}

// Prepare gives file i its length and reserves its space, before anything else
// is written to it.
func (s *Set) Prepare(ctx context.Context, i int, length int64, p sdk.Preallocation) error {
	fl := s.files[i]
	if length < 0 {
		return fmt.Errorf("length %d of %s: %w", length, fl.path, sdk.ErrInvalid)
	}
	if fl.way == direct {
		return fl.prepareDirect(length, p)
	}
	fl.prealloc = p
	// It is empty as it is. ext4 writes all of a file that was cut to nothing when
	// it is closed, which the command would wait for.
	if length > 0 {
		if err := fl.f.Truncate(length); err != nil {
			return &errno.Error{Text: "Could not resize file", Err: err}
		}
	}
	if fl.way == overwrite {
		return nil // the space is reserved in the target itself, by Commit
	}
	return preallocate(ctx, fl.f, length, p)
}

func (fl *file) prepareDirect(length int64, p sdk.Preallocation) error {
	fi, err := fl.f.Stat()
	if err != nil {
		return &errno.Error{Text: "Could not resize file", Err: err}
	}
	capacity := fi.Size()
	if !fi.Mode().IsRegular() {
		if capacity, err = deviceSize(fl.f); err != nil {
			return &errno.Error{Text: "Could not get the size of device '" + fl.path + "'", Err: err}
		}
	}
	switch {
	case p == sdk.PreallocFalloc && !fi.Mode().IsRegular():
		return &sdk.Error{Text: "Preallocation mode 'falloc' unsupported for this non-regular file", Class: sdk.ErrUnsupported}
	case p == sdk.PreallocFull && !fi.Mode().IsRegular():
		return &sdk.Error{Text: "Unsupported preallocation mode 'full'", Class: sdk.ErrUnsupported}
	case length > capacity && !fi.Mode().IsRegular():
		return &sdk.Error{Text: "Cannot grow device files", Class: sdk.ErrInvalid}
	case length > capacity:
		return fl.f.Truncate(length)
	}
	return nil
}

// Commit makes the files appear under their names, the main file last, and
// closes them. When it fails none of the new files exists, and the old ones are
// as they were; where one had to be written in place and that failed midway,
// the error says so. A process that is killed meanwhile leaves the old files, or
// all the new ones, but for what several.go says.
func (s *Set) Commit() (err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrAborted
	}
	s.closed = true
	order := append(append([]*file(nil), s.files[1:]...), s.files[0])
	publish := order
	defer func() {
		for i := len(order) - 1; err != nil && i >= 0; i-- {
			if undone := order[i].undo(); undone != nil {
				err = fmt.Errorf("%w (%w)", err, undone)
			}
		}
		for _, fl := range order {
			fl.drop()
		}
	}()
	for _, fl := range order {
		// A name may reach the disk before the content does: after a power cut
		// the old file must not be gone while the new one is still empty.
		if s.opts.Sync && fl.way != overwrite || fl.way == byRename {
			err := s.opts.fail("sync " + filepath.Base(fl.path))
			if err == nil {
				err = fl.f.Sync()
			}
			// Character devices have nothing to sync and say so.
			if err != nil && !errors.Is(err, unix.EINVAL) {
				return &errno.Error{Text: "Could not write '" + fl.path + "'", Err: err}
			}
		}
	}
	for _, fl := range order {
		if fl.way == overwrite {
			if err := fl.reserve(); err != nil {
				return &errno.Error{Text: "Could not reserve the space for '" + fl.path + "'", Err: err}
			}
		}
	}
	if s.meetsOld() {
		first, err := s.clear()
		if err != nil {
			return err
		}
		if first != nil {
			order = append([]*file{first}, order...)
		}
	}
	for _, fl := range publish {
		if err := s.opts.fail("publish " + filepath.Base(fl.path)); err != nil {
			return cannotCreate(fl.path, err)
		}
		if err := s.publish(fl); err != nil {
			return err
		}
	}
	for _, fl := range publish {
		if s.opts.Sync && fl.way != direct {
			syncDir(fl.dir)
		}
	}
	return s.opts.fail("published")
}

func (s *Set) publish(fl *file) error {
	switch fl.way {
	case byLink:
		err := giveName(fl.f, fl.dir, fl.tmp, fl.base)
		if errors.Is(err, fs.ErrExist) {
			return &sdk.Error{Text: "Could not create '" + fl.path + "': a file of this name has appeared meanwhile, and is left as it is", Class: fs.ErrExist}
		}
		if err != nil {
			return cannotCreate(fl.path, err)
		}
		fl.tmp = ""
	case byRename:
		if err := fl.unchanged(); err != nil {
			return err
		}
		err := s.replace(fl)
		if err == nil {
			break
		}
		if fl.instead != nil || !errors.Is(err, unix.EBUSY) && !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EXDEV) {
			return cannotCreate(fl.path, err)
		}
		s.opts.Log(fl.path + ": written in place: it cannot be replaced (" + errno.Reason(err) + ")")
		if err := fl.reserve(); err != nil {
			return &errno.Error{Text: "Could not reserve the space for '" + fl.path + "'", Err: err}
		}
		// A temporary sibling, where there is one, goes when fl is dropped.
		fl.way = overwrite
		if err := fl.copyOver(); err != nil {
			return err
		}
	case overwrite:
		if err := fl.copyOver(); err != nil {
			return err
		}
	case direct:
	}
	fl.done = true
	return nil
}

// unchanged checks that the name still stands for the file that was locked.
func (fl *file) unchanged() error {
	var now, old unix.Stat_t
	if err := unix.Fstatat(int(fl.dir.Fd()), fl.base, &now, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return cannotCreate(fl.path, err)
	}
	expected := fl.old
	if fl.instead != nil {
		expected = fl.instead
	}
	if err := unix.Fstat(int(expected.Fd()), &old); err != nil {
		return cannotCreate(fl.path, err)
	}
	if now.Dev != old.Dev || now.Ino != old.Ino {
		return &sdk.Error{Text: "Could not create '" + fl.path + "': another file has taken its place meanwhile, and is left as it is", Class: fs.ErrExist}
	}
	return nil
}

// replace puts fl.f in the place of the old file. Where other files of the set
// can still fail the old one is kept beside it.
func (s *Set) replace(fl *file) error {
	if fl.tmp == "" {
		name, err := sibling(fl.base, func(name string) error { return giveName(fl.f, fl.dir, "", name) })
		if err != nil {
			return err
		}
		fl.tmp = name
	}
	dir := int(fl.dir.Fd())
	if len(s.files) > 1 {
		err := exchange(dir, fl.tmp, fl.base)
		if err == nil {
			fl.backup, fl.tmp = fl.tmp, ""
			return nil
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		name, err := sibling(fl.base, func(name string) error {
			return unix.Linkat(dir, fl.base, dir, name, 0)
		})
		if err != nil {
			return err
		}
		fl.backup = name
	}
	if err := unix.Renameat(dir, fl.tmp, dir, fl.base); err != nil {
		if fl.backup != "" {
			_ = unix.Unlinkat(dir, fl.backup, 0)
			fl.backup = ""
		}
		return err
	}
	fl.tmp = ""
	return nil
}

// undo takes back what publish did to fl, or says what it cannot take back.
func (fl *file) undo() error {
	if !fl.done {
		return nil
	}
	var err error
	switch {
	case fl.way == byLink:
		err = unix.Unlinkat(int(fl.dir.Fd()), fl.base, 0)
	case fl.backup != "":
		err = unix.Renameat(int(fl.dir.Fd()), fl.backup, int(fl.dir.Fd()), fl.base)
		fl.backup = "" // what could not be moved back stays where it is
	default:
		return &sdk.Error{Text: fl.path + " has been overwritten", Class: sdk.ErrInvalid}
	}
	if err != nil {
		return &errno.Error{Text: "could not restore " + fl.path, Err: err}
	}
	return nil
}

// Abort gives up: no file appears, none is changed, nothing temporary is left.
// Work on the files that goes on elsewhere fails. After Commit it does nothing.
func (s *Set) Abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	s.closed = true
	for _, fl := range slices.Backward(s.files) { // the first lends its directory
		fl.drop()
	}
}

// drop closes fl's files and removes what has a temporary name.
func (fl *file) drop() {
	for _, name := range []string{fl.tmp, fl.backup, fl.second} {
		if name != "" {
			_ = unix.Unlinkat(int(fl.dir.Fd()), name, 0)
		}
	}
	fl.tmp, fl.backup, fl.second = "", "", ""
	for _, f := range []*os.File{fl.f, fl.old} {
		if f != nil {
			lock.Release(f) // a plugin that is ending may still have it open
			f.Close()
		}
	}
	if fl.dir != nil && !fl.borrowed {
		fl.dir.Close()
	}
}

// errNoName: a name that stands for an open file, not for one in a directory.
var errNoName = errors.New("not a name in a directory")

// maxLinks is how many symbolic links Linux follows in one path.
const maxLinks = 40

// locate follows symbolic links in the last component of path and returns the
// directory and the name at which the file itself lies, or would lie.
func locate(path string) (dir *os.File, base string, err error) {
	for range maxLinks {
		dirName, name := filepath.Split(path)
		if name == "" {
			err = unix.EISDIR
			break
		}
		if dirName == "" {
			dirName = "."
		}
		var next *os.File
		if next, err = openDir(dirName, dir); err != nil {
			break
		}
		if dir != nil {
			dir.Close()
		}
		dir = next
		buf := make([]byte, unix.PathMax)
		n, linkErr := unix.Readlinkat(int(dir.Fd()), name, buf)
		if linkErr != nil {
			return dir, name, nil // no link, or nothing at all
		}
		if magicLinks(dir) {
			err = errNoName
			break
		}
		path, err = string(buf[:n]), unix.ELOOP
	}
	if dir != nil {
		dir.Close()
	}
	return nil, "", err
}

// openExisting opens what path stands for, for reading and writing, without
// waiting for anybody. The kernel's rules for symbolic links in directories
// that all may write apply.
func openExisting(path string) (*os.File, error) {
	return openat(nil, path, path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
}

// openat opens name in dir; nil is the current directory. shown is what errors
// call it.
func openat(dir *os.File, name, shown string, flags int, mode uint32) (*os.File, error) {
	at := unix.AT_FDCWD
	if dir != nil {
		at = int(dir.Fd())
	}
	for {
		fd, err := unix.Openat(at, name, flags|unix.O_CLOEXEC, mode)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if flags&unix.O_NONBLOCK != 0 {
			if err := unix.SetNonblock(fd, false); err != nil {
				unix.Close(fd)
				return nil, err
			}
		}
		return os.NewFile(uintptr(fd), shown), nil
	}
}

// sibling calls try with names derived from base until one is free, and
// returns that.
func sibling(base string, try func(name string) error) (string, error) {
	const longest = 200 // leaves room for the rest within 255 bytes
	if len(base) > longest {
		base = base[:longest]
	}
	for range 100 {
		name := fmt.Sprintf(".%s.instar-%08x", base, rand.Uint32())
		err := try(name)
		if err == nil {
			return name, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return "", err
		}
	}
	return "", fs.ErrExist
}

// control runs do with f's descriptor, which stays open meanwhile.
func control(f *os.File, do func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var doErr error
	if err := conn.Control(func(fd uintptr) {
		for {
			if doErr = do(int(fd)); !errors.Is(doErr, unix.EINTR) {
				return
			}
		}
	}); err != nil {
		return err
	}
	return doErr
}

package output

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// keepAttributes gives the new file f the owner, permissions, ACL and extended
// attributes of old. Any that cannot be given is an error.
func keepAttributes(old, f *os.File) error {
	var want, have unix.Stat_t
	if err := unix.Fstat(int(old.Fd()), &want); err != nil {
		return err
	}
	fd := int(f.Fd())
	if err := unix.Fstat(fd, &have); err != nil {
		return err
	}
	if want.Uid != have.Uid || want.Gid != have.Gid {
		if err := unix.Fchown(fd, int(want.Uid), int(want.Gid)); err != nil {
			return err
		}
	}
	if err := keepXattrs(int(old.Fd()), fd); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, uint32(want.Mode)&0o7777); err != nil {
		return err
	}
	keepFlags(old, f)
	return nil
}

// ownXattr reports whether an attribute belongs to content, so that a write
// changes or removes it.
func ownXattr(name string) bool {
	return name == "security.ima" || name == "security.evm" || name == "security.capability"
}

func keepXattrs(old, fd int) error {
	names, err := listXattrs(old)
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, name := range names {
		if ownXattr(name) {
			continue
		}
		keep[name] = true
		want, err := getXattr(old, name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if have, err := getXattr(fd, name); err == nil && bytes.Equal(have, want) {
			continue
		}
		if err := unix.Fsetxattr(fd, name, want, 0); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	// The new file may have got some from its directory (a default ACL).
	names, err = listXattrs(fd)
	if err != nil {
		return err
	}
	for _, name := range names {
		if !keep[name] && !ownXattr(name) {
			if err := unix.Fremovexattr(fd, name); err != nil && !strings.HasPrefix(name, "security.") {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return nil
}

func listXattrs(fd int) ([]string, error) {
	b, err := growing(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) })
	if errors.Is(err, errors.ErrUnsupported) {
		return nil, nil
	}
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == 0 }), err
}

func getXattr(fd int, name string) ([]byte, error) {
	return growing(func(b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) })
}

// growing calls read with a larger buffer while it says ERANGE. Linux has no
// attribute, and no list of them, over 64 KiB.
func growing(read func([]byte) (int, error)) ([]byte, error) {
	for size := 1 << 10; ; size *= 4 {
		b := make([]byte, size)
		n, err := read(b)
		if err == nil {
			return b[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) || size > 1<<20 {
			return nil, err
		}
	}
}

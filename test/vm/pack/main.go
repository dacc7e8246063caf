// Command pack writes a directory to stdout as an initramfs: a cpio archive of the
// "newc" kind (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)
// in which everything belongs to root.
package main

import (
	"bufio"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: pack DIRECTORY >ARCHIVE")
		os.Exit(2)
	}
	w := bufio.NewWriter(os.Stdout)
	err := pack(w, os.Args[1])
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

// Types of files in a mode, as stat has them.
const (
	directory = 0o040000
	regular   = 0o100000
	symlink   = 0o120000
)

func pack(w *bufio.Writer, top string) error {
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(top, path)
		if err != nil || name == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		mode, data := uint32(info.Mode().Perm()), []byte(nil)
		switch {
		case d.IsDir():
			mode |= directory
		case d.Type() == fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			mode, data = mode|symlink, []byte(target)
		case d.Type().IsRegular():
			mode |= regular
			if data, err = os.ReadFile(path); err != nil {
				return err
			}
		default:
			return fmt.Errorf("%s: neither file, directory nor link", path)
		}
		return entry(w, name, mode, data)
	})
	if err != nil {
		return err
	}
	return entry(w, "TRAILER!!!", 0, nil)
}

// entry writes one member. Its header and its content begin at multiples of 4
// bytes; the header is a magic number and 13 numbers of 8 digits.
func entry(w *bufio.Writer, name string, mode uint32, data []byte) error {
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
	for _, part := range []string{header, string(data)} {
		if _, err := w.WriteString(part); err != nil {
			return err
		}
		if _, err := w.Write(make([]byte, -len(part)&3)); err != nil {
			return err
		}
	}
	return nil
}

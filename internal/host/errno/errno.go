// Package errno gives system errors the words that the C library has for them,
// which qemu-img prints.
package errno

import (
	"errors"
	"syscall"
)

// Text returns strerror's text for the errno inside err, and err's own text
// where there is none.
func Text(err error) string {
	var no syscall.Errno
	if !errors.As(err, &no) {
		return err.Error()
	}
	s := []byte(no.Error())
	if len(s) > 0 && s[0] >= 'a' && s[0] <= 'z' {
		s[0] -= 'a' - 'A'
	}
	return string(s)
}

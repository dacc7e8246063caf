// Package errno gives system errors the words that the C library has for them,
// which qemu-img prints.
package errno

import (
	"errors"
	"strings"
	"syscall"
)

// Error is a failure of the host: Text says what could not be done, Err why.
type Error struct {
	Text string
	Err  error
}

func (e *Error) Error() string { return e.Text + ": " + Reason(e.Err) }
func (e *Error) Unwrap() error { return e.Err }

// Text returns err's text, with the words of the system error inside it, if
// there is one, as strerror has them.
func Text(err error) string {
	text := err.Error()
	var no syscall.Errno
	if !errors.As(err, &no) {
		return text
	}
	if i := strings.LastIndex(text, no.Error()); i >= 0 {
		return text[:i] + strerror(no) + text[i+len(no.Error()):]
	}
	return text
}

// Reason returns strerror's text for the system error inside err alone, and
// err's own text where there is none.
func Reason(err error) string {
	var no syscall.Errno
	if errors.As(err, &no) {
		return strerror(no)
	}
	return err.Error()
}

func strerror(no syscall.Errno) string {
	s := []byte(no.Error())
	if len(s) > 0 && s[0] >= 'a' && s[0] <= 'z' {
		s[0] -= 'a' - 'A'
	}
	return string(s)
}

package errno

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"testing"
)

func TestTextAndReason(t *testing.T) {
	for _, c := range []struct {
		err          error
		text, reason string
	}{
		{syscall.ENOENT, "No such file or directory", "No such file or directory"},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.EACCES}, "open x: Permission denied", "Permission denied"},
		{fmt.Errorf("outer: %w, after all", syscall.ENOSPC), "outer: No space left on device, after all", "No space left on device"},
		{&Error{"Could not create 'x'", &os.PathError{Op: "open", Path: "x", Err: syscall.EROFS}}, "Could not create 'x': Read-only file system", "Read-only file system"},
		{syscall.EIO, "Input/output error", "Input/output error"},
		{errors.New("plain"), "plain", "plain"},
	} {
		if got := Text(c.err); got != c.text {
			t.Errorf("Text(%v) = %q, want %q", c.err, got, c.text)
		}
		if got := Reason(c.err); got != c.reason {
			t.Errorf("Reason(%v) = %q, want %q", c.err, got, c.reason)
		}
	}
}

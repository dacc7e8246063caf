package sdk

import "errors"

// Classes of errors. Wrap them with %w; the wire carries the class, so
// errors.Is works in the core too.
var (
	// ErrCorrupt: the image contradicts its specification.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrUnsupported: valid, but this plugin cannot do it.
	ErrUnsupported = errors.New("not supported")
	// ErrInvalid: the request cannot be met as it stands (*option.Error is of
	// this class too).
	ErrInvalid = errors.New("invalid argument")
	// ErrNotFormat: the file is not an image of this format.
	ErrNotFormat = errors.New("not an image of this format")
	// ErrNotAttached: the bytes lie in a file that the core did not hand over.
	ErrNotAttached = errors.New("file not available")
	// ErrReadOnly: the image may not be written (a dirty or corrupt flag, say).
	ErrReadOnly = errors.New("image cannot be written")
	// ErrNotFound: no such snapshot or bitmap.
	ErrNotFound = errors.New("not found")
	// ErrTooBig: the size is beyond what the format or the host can hold.
	ErrTooBig = errors.New("too big")
)

// Error is an error whose text is complete as it stands, with a class:
// Error() returns Text alone, errors.Is matches Class. Use it where the text is
// a contract (qemu-img's messages); elsewhere wrap a class with %w.
type Error struct {
	Text  string
	Class error
	// Hint says what can be done about it, on a line of its own; empty for none.
	Hint string
}

func (e *Error) Error() string { return e.Text }
func (e *Error) Unwrap() error { return e.Class }

// ErrorHint returns Hint.
func (e *Error) ErrorHint() string { return e.Hint }

// HintOf returns what an error says that can be done about it, empty for nothing.
func HintOf(err error) string {
	var h interface{ ErrorHint() string }
	if errors.As(err, &h) {
		return h.ErrorHint()
	}
	return ""
}

package option

import "errors"

// Split splits one -o string at its commas. A doubled comma stands for one, a
// bare key means key=on, help or ? asks for the list of keys (help is true).
func Split(s string) (settings []Setting, help bool, err error) {
	return nil, false, errors.New("TODO")
}

// Merge returns one setting a key, the last one given, in the order in which
// the keys first appear.
func Merge(lists ...[]Setting) []Setting { return nil }

// ParseSize parses a size as qemu-img does: bytes, with suffixes b k K M G T P E
// and decimal fractions ("1.5G").
func ParseSize(s string) (uint64, error) { return 0, errors.New("TODO") }

// ParseBool parses on/off/true/false/yes/no in any case.
func ParseBool(s string) (bool, error) { return false, errors.New("TODO") }

// Validate checks settings against the schema of target and adds defaults.
// Errors are *Error.
func (s Schema) Validate(target string, settings []Setting) (Values, error) {
	return nil, errors.New("TODO")
}

func (e *Error) Error() string { return e.Text }

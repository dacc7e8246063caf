// Package option is the one implementation of -o: splitting, last-wins merging,
// the parsers of values, and schemas against which settings are validated.
package option

import "strings"

// Type is the type of a key's values.
type Type uint8

const (
	String Type = iota
	Bool        // on/off/true/false/yes/no/y/n in any case
	Size        // bytes, with suffixes b k K M G T P E and fractions
	Uint        // an unsigned number
	Enum        // one of Allowed
)

// Disposition says what becomes of a key.
type Disposition uint8

const (
	Honoured   Disposition = iota
	Ignored                // accepted for qemu-img's sake, without effect
	Deferred               // known and refused, for Reason
	Deprecated             // honoured; Reason names the replacement
)

// Key is one key of a schema.
type Key struct {
	// Name of the key. A trailing * matches every key that begins so.
	Name string
	Type Type
	// Default is the value that the format takes, and prints, where none is
	// given; empty: none is printed.
	Default string
	// Min and Max bound Size and Uint values; Max 0 is no bound.
	Min, Max uint64
	// PowerOfTwo restricts Size and Uint values; ZeroOK admits 0 besides.
	PowerOfTwo, ZeroOK bool
	// Allowed lists an Enum's values, as they are listed in help. FoldCase
	// accepts them in any case.
	Allowed  []string
	FoldCase bool
	// Synonyms maps further accepted Enum values to those in Allowed.
	Synonyms map[string]string
	// Help is one line, qemu-img's where it has the key.
	Help        string
	Disposition Disposition
	Reason      string
	// RangeText, where not empty, is the whole text of the error for a value out
	// of bounds or not among Allowed (a contract with qemu-img). %s in it stands
	// for the value.
	RangeText string
	// Extra marks keys that qemu-img does not have.
	Extra bool
}

// Family reports whether k matches more than its own name.
func (k *Key) Family() bool { return strings.HasSuffix(k.Name, "*") }

// Matches reports whether k is the key for name.
func (k *Key) Matches(name string) bool {
	if k.Family() {
		return strings.HasPrefix(name, strings.TrimSuffix(k.Name, "*"))
	}
	return k.Name == name
}

// Schema is an ordered list of keys. Values are printed in its order.
type Schema []Key

// Find returns the key for name, exact names before families.
func (s Schema) Find(name string) (*Key, bool) {
	for pass := 0; pass < 2; pass++ {
		for i := range s {
			if s[i].Family() == (pass == 1) && s[i].Matches(name) {
				return &s[i], true
			}
		}
	}
	return nil, false
}

// Setting is one key=value as the user wrote it.
type Setting struct {
	Key, Value string
	// Bare: written without "=", which means on.
	Bare bool
}

// Value is a validated value: the field of its type is set.
type Value struct {
	Key    string
	Type   Type
	Uint   uint64 // Size, Uint
	Bool   bool
	String string // String, Enum
	// Text is the value as the user wrote it, where that is not its canonical
	// form (yes for on, v3 for 1.1). Only messages to that user repeat it.
	Text string
	// Set: the user gave it; otherwise it is the schema's default.
	Set bool
}

// Values are validated values in schema order.
type Values []Value

// Lookup returns the value of a key.
func (v Values) Lookup(key string) (Value, bool) {
	for _, x := range v {
		if x.Key == key {
			return x, true
		}
	}
	return Value{}, false
}

// UintOr, BoolOr and StringOr return a key's value, or def where it has none.
func (v Values) UintOr(key string, def uint64) uint64 {
	if x, ok := v.Lookup(key); ok {
		return x.Uint
	}
	return def
}

func (v Values) BoolOr(key string, def bool) bool {
	if x, ok := v.Lookup(key); ok {
		return x.Bool
	}
	return def
}

func (v Values) StringOr(key, def string) string {
	if x, ok := v.Lookup(key); ok {
		return x.String
	}
	return def
}

// WithSize returns v with the key of type Size set to n, as if the user had
// given it, in its place in the schema's order.
func (s Schema) WithSize(v Values, key string, n uint64) Values {
	set := Value{Key: key, Type: Size, Uint: n, Set: true}
	out := make(Values, 0, len(v)+1)
	place := s.index(key)
	for _, x := range v {
		if place >= 0 && s.index(x.Key) > place {
			out = append(out, set)
			place = -1
		}
		if x.Key != key {
			out = append(out, x)
		}
	}
	if place >= 0 {
		out = append(out, set)
	}
	return out
}

// index returns the position of the key for name, -1 where there is none.
func (s Schema) index(name string) int {
	for i := range s {
		if s[i].Matches(name) {
			return i
		}
	}
	return -1
}

// IsSet reports whether the user gave the key.
func (v Values) IsSet(key string) bool {
	x, ok := v.Lookup(key)
	return ok && x.Set
}

// Error says which option is wrong, why, and what is accepted.
type Error struct {
	Key, Value string
	Reason     string   // complete sentence without full stop, lower case
	Accepted   []string // values or keys that would do, may be empty
	// Text, where not empty, is the whole message.
	Text string
}

package option

import (
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"
)

// Why a number was refused. ParseSize and ParseUint return nothing else.
var (
	ErrSyntax = errors.New("not a number")
	ErrRange  = errors.New("number out of range")
)

// Split splits one -o string at its commas. In a value a doubled comma stands
// for one. A bare key means key=on, a bare help or ? asks for the list of keys
// (help is true). Strings that qemu-img calls invalid lists are refused with its
// message: empty ones, and those with an empty item.
func Split(s string) (settings []Setting, help bool, err error) {
	if !validList(s) {
		return nil, false, &Error{Text: "Invalid option list: " + s}
	}
	for rest := s; rest != ""; {
		var set Setting
		end := strings.IndexAny(rest, "=,")
		switch {
		case end < 0:
			set, rest = Setting{Key: rest, Value: "on", Bare: true}, ""
		case rest[end] == ',':
			set, rest = Setting{Key: rest[:end], Value: "on", Bare: true}, rest[end+1:]
		default:
			set.Key = rest[:end]
			set.Value, rest, _ = cutItem(rest[end+1:])
		}
		if set.Bare && (set.Key == "help" || set.Key == "?") {
			help = true
			continue
		}
		settings = append(settings, set)
	}
	return settings, help, nil
}

// cutItem returns what stands before the first single comma, with doubled
// commas made single, and what follows it. more is false at the end of s.
func cutItem(s string) (item, rest string, more bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == ',' {
			if i+1 == len(s) || s[i+1] != ',' {
				return b.String(), s[i+1:], true
			}
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), "", false
}

func validList(s string) bool {
	for more := true; more; {
		var item string
		item, s, more = cutItem(s)
		if item == "" || item[0] == ',' {
			return false
		}
	}
	return true
}

// Merge returns one setting a key, the last one given, in the order in which
// they were given. Validate does the same, and checks the values overridden as
// qemu-img does: merge only what is to be shown or asked for a single key.
func Merge(lists ...[]Setting) []Setting {
	last := make(map[string]int)
	n := 0
	for _, list := range lists {
		for _, set := range list {
			last[set.Key] = n
			n++
		}
	}
	merged := make([]Setting, 0, len(last))
	n = 0
	for _, list := range lists {
		for _, set := range list {
			if last[set.Key] == n {
				merged = append(merged, set)
			}
			n++
		}
	}
	return merged
}

// ParseSize parses a size as qemu-img does: a decimal or 0x number with an
// optional suffix b k K m M g G t T p P e E, decimals also with a fraction
// ("1.5G"), which needs a suffix larger than b unless it is zero. The value is
// rounded to whole bytes, half upwards.
func ParseSize(s string) (uint64, error) {
	digits := strings.TrimLeft(s, " \t\n\v\f\r")
	digits = strings.TrimPrefix(digits, "+")
	if hex, ok := cutHexPrefix(digits); ok {
		n := prefixLen(hex, isHexDigit)
		if n == 0 {
			return 0, ErrSyntax
		}
		shift, err := suffixShift(hex[n:])
		if err != nil {
			return 0, err
		}
		val, err := strconv.ParseUint(hex[:n], 16, 64)
		if err != nil {
			return 0, overflow(hex[n:])
		}
		return scale(val, 0, shift)
	}

	n := prefixLen(digits, isDigit)
	if n == 0 {
		return 0, ErrSyntax
	}
	whole, rest := digits[:n], digits[n:]
	var frac uint64 // in units of 2^-64
	carry := uint64(0)
	if strings.HasPrefix(rest, ".") {
		m := prefixLen(rest[1:], isDigit)
		if m > 0 {
			f, err := strconv.ParseFloat("0"+rest[:1+m], 64)
			if err != nil {
				return 0, ErrSyntax
			}
			// qemu-img takes 0.99999999999999999999, which no float64 tells
			// from 1, for 0, and makes the disk smaller than was asked for.
			if f >= 1 {
				carry = 1
			} else {
				frac = uint64(f * (1 << 64))
			}
		}
		rest = rest[1+m:]
	}
	shift, err := suffixShift(rest)
	if err != nil {
		return 0, err
	}
	val, err := strconv.ParseUint(whole, 10, 64)
	if err != nil {
		return 0, overflow(digits[n:])
	}
	if shift == 0 && (frac != 0 || carry != 0) {
		return 0, ErrSyntax
	}
	val, c := bits.Add64(val, carry, 0)
	if c != 0 {
		return 0, ErrRange
	}
	return scale(val, frac, shift)
}

// overflow says how a number above 2^64-1 is refused: qemu-img stops reading
// there, and what follows makes it a malformed number rather than a big one.
func overflow(rest string) error {
	if rest != "" {
		return ErrSyntax
	}
	return ErrRange
}

// scale returns (val + frac/2^64) << shift, half rounded upwards.
func scale(val, frac uint64, shift uint) (uint64, error) {
	if shift == 0 {
		return val, nil
	}
	if val>>(64-shift) != 0 {
		return 0, ErrRange
	}
	// val<<shift has shift low bits free for what the fraction contributes.
	val = val<<shift | frac>>(64-shift)
	val, carry := bits.Add64(val, frac<<shift>>63, 0)
	if carry != 0 {
		return 0, ErrRange
	}
	return val, nil
}

func suffixShift(s string) (uint, error) {
	switch s {
	case "", "b", "B":
		return 0, nil
	case "k", "K":
		return 10, nil
	case "m", "M":
		return 20, nil
	case "g", "G":
		return 30, nil
	case "t", "T":
		return 40, nil
	case "p", "P":
		return 50, nil
	case "e", "E":
		return 60, nil
	}
	return 0, ErrSyntax
}

// ParseUint parses an unsigned number as qemu-img does: decimal, 0x or octal
// with a leading 0. Negative numbers, which wrap around there, are refused.
func ParseUint(s string) (uint64, error) {
	digits := strings.TrimLeft(s, " \t\n\v\f\r")
	digits = strings.TrimPrefix(digits, "+")
	base := 10
	if hex, ok := cutHexPrefix(digits); ok {
		digits, base = hex, 16
	} else if len(digits) > 1 && digits[0] == '0' {
		digits, base = digits[1:], 8
	}
	// ParseUint takes a sign in no base, and underscores in base 0 only.
	v, err := strconv.ParseUint(digits, base, 64)
	switch {
	case err == nil:
		return v, nil
	case errors.Is(err, strconv.ErrRange):
		return 0, ErrRange
	default:
		return 0, ErrSyntax
	}
}

// ParseBool parses on/off/true/false/yes/no/y/n in any case.
func ParseBool(s string) (bool, error) {
	switch strings.ToLower(s) {
	case "on", "true", "yes", "y":
		return true, nil
	case "off", "false", "no", "n":
		return false, nil
	}
	return false, errors.New("expects 'on' or 'off'")
}

func cutHexPrefix(s string) (string, bool) {
	if len(s) > 1 && s[0] == '0' && (s[1] == 'x' || s[1] == 'X') {
		return s[2:], true
	}
	return s, false
}

func prefixLen(s string, in func(byte) bool) int {
	for i := 0; i < len(s); i++ {
		if !in(s[i]) {
			return i
		}
	}
	return len(s)
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isHexDigit(c byte) bool {
	return isDigit(c) || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func (e *Error) Error() string {
	if e.Text != "" {
		return e.Text
	}
	s := "-o " + printable(e.Key)
	if e.Value != "" {
		s += "=" + printable(e.Value)
	}
	s += ": " + e.Reason
	if len(e.Accepted) > 0 {
		s += " (accepted: " + strings.Join(e.Accepted, ", ") + ")"
	}
	return s
}

// printable quotes what would upset a terminal.
func printable(s string) string {
	if q := strconv.Quote(s); q != `"`+s+`"` {
		return q
	}
	return s
}

// formatSize writes a size with the largest suffix that loses nothing.
func formatSize(v uint64) string {
	if v == 0 {
		return "0"
	}
	unit := 0
	for v%1024 == 0 && unit < 6 {
		v /= 1024
		unit++
	}
	return fmt.Sprintf("%d%s", v, [...]string{"", "k", "M", "G", "T", "P", "E"}[unit])
}

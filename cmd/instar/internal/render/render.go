// Package render turns what the verbs found into the bytes that they print:
// qemu-img's text and JSON, and what instar adds to them. It reads no files and
// asks nobody; everything that is printed is in its arguments.
package render

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Layout says which qemu-img is followed where its versions differ.
type Layout uint8

const (
	Layout10 Layout = iota // qemu-img 8.2 to 10
	Layout72               // qemu-img 7.2
)

// Style is how text is laid out.
type Style struct {
	Layout Layout
	// Escape makes characters visible that would steer a terminal. Names in an
	// image are its author's.
	Escape bool
	// Location is the time zone of dates; nil is the local one.
	Location *time.Location
}

// text returns a string from an image as it is printed.
func (s Style) text(t string) string {
	if s.Escape {
		return Escape(t)
	}
	return t
}

// Escape replaces control characters, direction marks and bytes that are not
// UTF-8 by \n, \t, \xNN or \uNNNN.
func Escape(s string) string {
	clean := true
	for _, r := range s {
		if r == utf8.RuneError || !printable(r) {
			clean = false
			break
		}
	}
	if clean {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case printable(r):
			b.WriteString(s[i : i+n])
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r < 0x80:
			fmt.Fprintf(&b, `\x%02x`, r)
		case r > 0xffff:
			fmt.Fprintf(&b, `\U%08x`, r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
		i += n
	}
	return b.String()
}

func printable(r rune) bool {
	return !unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co)
}

// humanSize writes a number of bytes in three digits: "196 KiB".
func humanSize(n uint64) string {
	// The unit is the one that leaves the number below 1000, as three digits
	// of 1000 to 1023 would need an exponent.
	_, exp := math.Frexp(float64(n) / (1000.0 / 1024.0))
	unit := (exp - 1) / 10
	return strconv.FormatFloat(float64(n)/float64(uint64(1)<<(10*unit)), 'g', 3, 64) + " " +
		[...]string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}[unit] + "B"
}

package wire

import (
	"strings"
	"unicode/utf8"
)

// Names in images and paths are bytes; strings in messages are UTF-8. Text
// returns the string that stands for s in a message, FromText the s that it
// stands for. UTF-8 stands for itself, but each byte b of what is not UTF-8, and
// of the characters that these would be taken for, is U+10FF00+b, of a private
// use area.
func Text(s string) string {
	if utf8.ValidString(s) && !strings.Contains(s, standInPrefix) {
		return s
	}
	out := make([]byte, 0, 2*len(s))
	for s != "" {
		r, n := utf8.DecodeRuneInString(s)
		if r == utf8.RuneError && n == 1 || r >= firstStandIn {
			for i := range n {
				out = utf8.AppendRune(out, standIn+rune(s[i]))
			}
		} else {
			out = append(out, s[:n]...)
		}
		s = s[n:]
	}
	return string(out)
}

func FromText(s string) string {
	if !strings.Contains(s, standInPrefix) {
		return s
	}
	out := make([]byte, 0, len(s))
	for s != "" {
		r, n := utf8.DecodeRuneInString(s)
		if r >= firstStandIn {
			out = append(out, byte(r-standIn))
		} else {
			out = append(out, s[:n]...)
		}
		s = s[n:]
	}
	return string(out)
}

const (
	standIn = 0x10ff00
	// firstStandIn stands for the first byte that is not UTF-8 by itself. From it
	// on, up to the last character there is, all are stand-ins.
	firstStandIn  = standIn + utf8.RuneSelf
	standInPrefix = "\xf4\x8f" // how they begin
)

// texts and fromTexts convert many.
func texts(in []string) []string     { return each(in, Text) }
func fromTexts(in []string) []string { return each(in, FromText) }

func each(in []string, f func(string) string) []string {
	if in == nil {
		return nil
	}
	out := make([]string, len(in))
	for i := range in {
		out[i] = f(in[i])
	}
	return out
}

// identity and fromIdentity convert values, and the names under which they are.
func identity(in map[string]string) map[string]string     { return eachValue(in, Text) }
func fromIdentity(in map[string]string) map[string]string { return eachValue(in, FromText) }

// Options and FromOptions convert what an image is opened with.
func Options(in map[string]string) map[string]string     { return eachValue(in, Text) }
func FromOptions(in map[string]string) map[string]string { return eachValue(in, FromText) }

func eachValue(in map[string]string, f func(string) string) map[string]string {
	if in == nil {
		return nil
	}
	out := make(map[string]string, len(in))
	for k, v := range in {
		out[f(k)] = f(v)
	}
	return out
}

// Prose returns a text for people as UTF-8.
func Prose(s string) string { return strings.ToValidUTF8(s, "?") }

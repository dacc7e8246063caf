package render

import (
	"fmt"
	"io"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Object is a JSON object. Its members are printed in the order in which QEMU
// prints them: its dictionary is a hash table, printed bucket by bucket, in each
// bucket the member added last comes first.
type Object struct {
	members []member
	index   map[string]int // into members, where they are many
}

// member values are string, bool, int64, uint64, *Object and []any of them.
type member struct {
	key    string
	value  any
	bucket uint32
}

// Set adds a member, or replaces the value of one that is there.
func (o *Object) Set(key string, value any) {
	if i, ok := o.find(key); ok {
		o.members[i].value = value
		return
	}
	o.members = append(o.members, member{key, value, bucket(key)})
	if o.index != nil {
		o.index[key] = len(o.members) - 1
	}
}

// fewMembers are found as fast without an index.
const fewMembers = 64

func (o *Object) find(key string) (int, bool) {
	if o.index == nil && len(o.members) > fewMembers {
		o.index = make(map[string]int, 2*len(o.members))
		for i := range o.members {
			o.index[o.members[i].key] = i
		}
	}
	if o.index != nil {
		i, ok := o.index[key]
		return i, ok
	}
	for i := range o.members {
		if o.members[i].key == key {
			return i, true
		}
	}
	return 0, false
}

// sorted returns the members in the order of printing.
func (o *Object) sorted() []member {
	m := make([]member, len(o.members))
	for i := range o.members {
		m[len(m)-1-i] = o.members[i]
	}
	sort.SliceStable(m, func(i, j int) bool { return m[i].bucket < m[j].bucket })
	return m
}

// bucket is where QEMU's dictionary keeps a key: the hash is the one of tdb, the
// table has 512 buckets.
func bucket(key string) uint32 {
	h := 0x238f13af * uint32(len(key))
	for i := 0; i < len(key); i++ {
		h += uint32(key[i]) << (i * 5 % 24)
	}
	return (1103515243*h + 12345) % 512
}

// Pretty returns a value over several lines, indented by four spaces, with a
// newline at its end.
func Pretty(value any) []byte {
	w := jsonWriter{pretty: true}
	w.value(value)
	return append(w.out, '\n')
}

// Line returns a value on one line, with a newline at its end.
func Line(value any) []byte {
	var w jsonWriter
	w.value(value)
	return append(w.out, '\n')
}

// WritePretty and WriteLine write what Pretty and Line return, piece by piece:
// the text can be many times as long as what it is made of.
func WritePretty(to io.Writer, value any) error { return write(to, value, true) }

func WriteLine(to io.Writer, value any) error { return write(to, value, false) }

func write(to io.Writer, value any, pretty bool) error {
	w := jsonWriter{to: to, pretty: pretty}
	w.value(value)
	w.out = append(w.out, '\n')
	w.flush()
	return w.err
}

// Array writes an array like WritePretty, element by element.
type Array struct {
	w     jsonWriter
	count int
}

// NewArray begins an array.
func NewArray(to io.Writer) *Array {
	a := &Array{w: jsonWriter{to: to, pretty: true}}
	a.w.out = append(a.w.out, '[')
	a.w.depth++
	return a
}

// Add writes an element.
func (a *Array) Add(value any) error {
	a.w.separate(a.count)
	a.count++
	a.w.value(value)
	a.w.flush()
	return a.w.err
}

// Close ends the array.
func (a *Array) Close() error {
	a.w.depth--
	a.w.newline()
	a.w.out = append(a.w.out, "]\n"...)
	a.w.flush()
	return a.w.err
}

type jsonWriter struct {
	to     io.Writer // nil: all stays in out
	err    error     // of to
	out    []byte
	depth  int
	pretty bool
}

// piece is how much is written at a time, in bytes.
const piece = 32 << 10

// flush writes what there is.
func (w *jsonWriter) flush() {
	if w.err == nil && w.to != nil {
		_, w.err = w.to.Write(w.out)
	}
	w.out = w.out[:0]
}

func (w *jsonWriter) value(v any) {
	if w.to != nil && len(w.out) >= piece {
		w.flush()
	}
	switch v := v.(type) {
	case string:
		w.out = appendQuoted(w.out, v)
	case bool:
		w.out = strconv.AppendBool(w.out, v)
	case int64:
		w.out = strconv.AppendInt(w.out, v, 10)
	case uint64:
		w.out = strconv.AppendUint(w.out, v, 10)
	case *Object:
		w.out = append(w.out, '{')
		w.depth++
		for i, m := range v.sorted() {
			w.separate(i)
			w.out = appendQuoted(w.out, m.key)
			w.out = append(w.out, ": "...)
			w.value(m.value)
		}
		w.depth--
		w.newline()
		w.out = append(w.out, '}')
	case []any:
		w.out = append(w.out, '[')
		w.depth++
		for i, e := range v {
			w.separate(i)
			w.value(e)
		}
		w.depth--
		w.newline()
		w.out = append(w.out, ']')
	default:
		panic(fmt.Sprintf("render: a %T in JSON", v))
	}
}

// separate stands before member i.
func (w *jsonWriter) separate(i int) {
	if i > 0 {
		w.out = append(w.out, ',')
		if !w.pretty {
			w.out = append(w.out, ' ')
		}
	}
	w.newline()
}

func (w *jsonWriter) newline() {
	if w.pretty {
		w.out = append(w.out, '\n')
		w.out = append(w.out, strings.Repeat("    ", w.depth)...)
	}
}

// appendQuoted writes a JSON string in ASCII. Each sequence of bytes that is not
// a character in UTF-8 becomes one U+FFFD.
func appendQuoted(out []byte, s string) []byte {
	out = append(out, '"')
	for s != "" {
		r, n := decodeModified(s)
		s = s[n:]
		switch {
		case r == '"':
			out = append(out, `\"`...)
		case r == '\\':
			out = append(out, `\\`...)
		case r == '\b':
			out = append(out, `\b`...)
		case r == '\f':
			out = append(out, `\f`...)
		case r == '\n':
			out = append(out, `\n`...)
		case r == '\r':
			out = append(out, `\r`...)
		case r == '\t':
			out = append(out, `\t`...)
		case r > 0xffff:
			out = fmt.Appendf(out, `\u%04X\u%04X`, 0xd800+(r-0x10000)>>10, 0xdc00+(r-0x10000)&0x3ff)
		case r < 0x20 || r >= 0x7f:
			out = fmt.Appendf(out, `\u%04X`, r)
		default:
			out = append(out, byte(r))
		}
	}
	return append(out, '"')
}

// decodeModified returns the first character of s, which is not empty, and its
// length. It knows NUL as C0 80 besides, takes a malformed sequence as long as
// its first byte says or up to the byte that does not continue it, and admits
// neither surrogates nor noncharacters.
func decodeModified(s string) (r rune, n int) {
	c := s[0]
	switch {
	case c < 0x80:
		return rune(c), 1
	case c < 0xc0 || c >= 0xfe:
		return utf8.RuneError, 1
	}
	length := 2
	for c<<length&0x80 != 0 {
		length++
	}
	r = rune(c & (0x7f >> length))
	for n = 1; n < length; n++ {
		if n == len(s) || s[n]&0xc0 != 0x80 {
			return utf8.RuneError, n
		}
		r = r<<6 | rune(s[n]&0x3f)
	}
	shortest := [...]rune{2: 0x80, 3: 0x800, 4: 0x10000, 5: 0x200000, 6: 0x4000000}[length]
	switch {
	case r == 0 && length == 2:
	case r < shortest, r > 0x10ffff, r >= 0xd800 && r < 0xe000, r&0xfffe == 0xfffe, r >= 0xfdd0 && r < 0xfdf0:
		return utf8.RuneError, length
	}
	return r, length
}

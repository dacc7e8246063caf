package render

import (
	"bufio"
	"errors"
	"fmt"
	"io"
)

// ErrUnmappable is map's, for data that no plain file holds: only the JSON
// output can tell of it.
var ErrUnmappable = errors.New("File contains external, encrypted or compressed clusters.") // qemu-img's text

// MapEntry is a run of guest bytes as map shows it.
type MapEntry struct {
	Start, Length int64
	Depth         int // of the layer that answers; 0 is the image itself
	// Present: the layer or one above allocates it. Zero: reads as zeros. Data:
	// bytes are read from a file. Compressed: from compressed ones.
	Present, Zero, Data, Compressed bool
	// Offset in File, where HasOffset.
	HasOffset bool
	Offset    int64
	File      string
}

// continues reports whether n is more of the same as e.
func (e *MapEntry) continues(n *MapEntry, layout Layout) bool {
	return e.Length > 0 && e.Start+e.Length == n.Start &&
		e.Zero == n.Zero && e.Data == n.Data && e.Present == n.Present && e.Depth == n.Depth &&
		e.HasOffset == n.HasOffset && e.File == n.File &&
		(!e.HasOffset || e.Offset+e.Length == n.Offset) &&
		(layout == Layout72 || e.Compressed == n.Compressed)
}

// Map prints map's table or JSON as the entries come in. Entries that continue
// each other are printed as one.
type Map struct {
	w       *bufio.Writer
	json    bool
	style   Style
	pending MapEntry
}

// NewMap begins a map whose first entry will start at guest offset start.
func NewMap(w io.Writer, json bool, start int64, style Style) *Map {
	m := &Map{w: bufio.NewWriterSize(w, 64<<10), json: json, style: style, pending: MapEntry{Start: start}}
	if json {
		m.w.WriteByte('[')
	} else {
		fmt.Fprintf(m.w, "%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File")
	}
	return m
}

// Add takes the next entry. Errors are those of the writer, and ErrUnmappable.
func (m *Map) Add(e MapEntry) error {
	if e.Length <= 0 {
		return nil
	}
	if m.pending.continues(&e, m.style.Layout) {
		m.pending.Length += e.Length
		return nil
	}
	if m.pending.Length > 0 {
		if err := m.print(&m.pending); err != nil {
			return err
		}
		if m.json {
			m.w.WriteString(",\n")
		}
	}
	m.pending = e
	return nil
}

// Abort flushes what was printed: after an error of Add or of the map itself
// the output so far stands.
func (m *Map) Abort() error { return m.w.Flush() }

// Close prints what is pending and flushes.
func (m *Map) Close() error {
	// Like qemu-img, an empty range is an entry of length 0.
	err := m.print(&m.pending)
	if m.json && err == nil {
		m.w.WriteString("]\n")
	}
	return errors.Join(err, m.w.Flush())
}

func (m *Map) print(e *MapEntry) error {
	if m.json {
		fmt.Fprintf(m.w, `{ "start": %d, "length": %d, "depth": %d, "present": %t, "zero": %t, "data": %t`,
			e.Start, e.Length, e.Depth, e.Present, e.Zero, e.Data)
		if m.style.Layout != Layout72 {
			fmt.Fprintf(m.w, `, "compressed": %t`, e.Compressed)
		}
		if e.HasOffset {
			fmt.Fprintf(m.w, `, "offset": %d`, e.Offset)
		}
		return m.w.WriteByte('}')
	}
	if !e.Data || e.Zero {
		return nil
	}
	if !e.HasOffset {
		return ErrUnmappable
	}
	_, err := fmt.Fprintf(m.w, "%-16s%-16s%-16s%s\n", hex(e.Start), hex(e.Length), hex(e.Offset), m.style.text(e.File))
	return err
}

// hex is C's %#x, which leaves zero bare.
func hex(n int64) string {
	if n == 0 {
		return "0"
	}
	return fmt.Sprintf("%#x", uint64(n))
}

package render

import (
	"fmt"
	"strings"

	"github.com/instar-img/instar/sdk"
)

// Image is one image as info shows it.
type Image struct {
	// Protocol: it is the file itself, Format its driver.
	Protocol bool
	Filename string // as the user named it, or as the chain leads to it
	Format   string
	// ActualSize is the disk space of all its files; -1 where unknown.
	ActualSize int64
	Info       *sdk.Info
	// BackingFilename is the name stored in the image, FullBackingFilename where
	// that leads (empty where it leads nowhere), BackingFormat the stored hint.
	BackingFilename, FullBackingFilename, BackingFormat string
	// Paths are the paths of files by role, for facts that name one.
	Paths map[string]string
	// Children are the files below the format, in the order of printing: qemu-img
	// has the one opened last first, the main file last. Layout72 has none.
	Children []Child
}

// Child is a file that an image is stored in.
type Child struct {
	Name       string // "file", "extents.0"
	Filename   string
	Protocol   string // "file", "host_device"
	Length     int64
	ActualSize int64 // -1 where unknown
	Specific   []sdk.Fact
}

// InfoText is what info prints of one image, or of a chain from the top down.
func InfoText(images []Image, style Style) string {
	var b strings.Builder
	for i := range images {
		if i > 0 {
			b.WriteByte('\n')
		}
		images[i].text(&b, style)
	}
	return b.String()
}

func (m *Image) text(b *strings.Builder, style Style) {
	info := m.Info
	fmt.Fprintf(b, "image: %s\nfile format: %s\nvirtual size: %s\ndisk size: %s\n",
		style.text(m.Filename), m.Format, sizeAndBytes(info.VirtualSize), diskSize(m.ActualSize))
	if info.Encrypted {
		b.WriteString("encrypted: yes\n")
	}
	if info.AllocationUnit != 0 {
		fmt.Fprintf(b, "cluster_size: %d\n", info.AllocationUnit)
	}
	if info.Dirty {
		b.WriteString("cleanly shut down: no\n")
	}
	if m.BackingFilename != "" {
		b.WriteString("backing file: " + style.text(m.BackingFilename))
		switch m.FullBackingFilename {
		case m.BackingFilename:
		case "":
			b.WriteString(" (cannot determine actual path)")
		default:
			b.WriteString(" (actual path: " + style.text(m.FullBackingFilename) + ")")
		}
		b.WriteByte('\n')
		if m.BackingFormat != "" {
			b.WriteString("backing file format: " + style.text(m.BackingFormat) + "\n")
		}
	}
	if len(info.Snapshots) > 0 {
		b.WriteString(SnapshotTable(info.Snapshots, style))
	}
	if info.SpecificType != "" {
		specificText(b, "Format specific information:\n", m.facts(info.Specific, style), 0, style)
	}
	if style.Layout == Layout72 {
		return
	}
	for _, c := range m.Children {
		fmt.Fprintf(b, "Child node '/%s':\n    filename: %s\n    protocol type: %s\n    file length: %s\n    disk size: %s\n",
			c.Name, style.text(c.Filename), c.Protocol, sizeAndBytes(c.Length), diskSize(c.ActualSize))
		specificText(b, "Format specific information:\n", m.facts(c.Specific, style), 4, style)
	}
}

func sizeAndBytes(n int64) string { return fmt.Sprintf("%s (%d bytes)", humanSize(uint64(n)), n) }

func diskSize(n int64) string {
	if n < 0 {
		return "unavailable"
	}
	return humanSize(uint64(n))
}

// specificText prints format-specific information, where there is any.
func specificText(b *strings.Builder, title string, facts *Object, indent int, style Style) {
	if len(facts.members) == 0 {
		return
	}
	b.WriteString(strings.Repeat(" ", indent) + title)
	dumpObject(b, facts, indent+4, style)
}

func dumpObject(b *strings.Builder, o *Object, indent int, style Style) {
	for _, m := range o.sorted() {
		dump(b, strings.ReplaceAll(m.key, "-", " ")+":", m.value, indent, style)
	}
}

// dump prints a value after its name: in the same line if it is a scalar, else
// below and indented.
func dump(b *strings.Builder, name string, value any, indent int, style Style) {
	b.WriteString(strings.Repeat(" ", indent) + style.text(name))
	switch v := value.(type) {
	case *Object:
		b.WriteByte('\n')
		dumpObject(b, v, indent+4, style)
	case []any:
		b.WriteByte('\n')
		for i, e := range v {
			dump(b, fmt.Sprintf("[%d]:", i), e, indent+4, style)
		}
	case string:
		b.WriteString(" " + style.text(v) + "\n")
	default:
		fmt.Fprintf(b, " %v\n", v)
	}
}

// since10 are the facts that qemu-img 7.2 does not know.
var since10 = map[string]bool{"detached-header": true}

// facts turns a plugin's facts into an object.
func (m *Image) facts(facts []sdk.Fact, style Style) *Object {
	o := new(Object)
	for i := range facts {
		if style.Layout == Layout72 && since10[facts[i].Name] {
			continue
		}
		o.Set(facts[i].Name, m.fact(&facts[i], style))
	}
	return o
}

func (m *Image) fact(f *sdk.Fact, style Style) any {
	switch {
	case f.IsObject:
		return m.facts(f.Object, style)
	case f.IsList:
		list := make([]any, len(f.List))
		for i := range f.List {
			list[i] = m.fact(&f.List[i], style)
		}
		return list
	case f.Bool != nil:
		return *f.Bool
	case f.Int != nil:
		return *f.Int
	case f.Uint != nil:
		return *f.Uint
	case f.FileRole != "":
		return m.Paths[f.FileRole]
	case f.String != nil:
		return *f.String
	}
	return ""
}

// InfoJSON is what info --output json prints of one image.
func InfoJSON(image Image, style Style) []byte { return Pretty(image.Object(style)) }

// InfoArrayJSON is what info --output json --backing-chain prints, and info of
// several files.
func InfoArrayJSON(images []Image, style Style) []byte {
	list := make([]any, len(images))
	for i := range images {
		list[i] = images[i].Object(style)
	}
	return Pretty(list)
}

// Object is the image as JSON.
func (m *Image) Object(style Style) *Object {
	info := m.Info
	o := node(m.Filename, m.Format, info.VirtualSize, m.ActualSize, info.Dirty)
	if info.AllocationUnit != 0 {
		o.Set("cluster-size", info.AllocationUnit)
	}
	if info.Encrypted {
		o.Set("encrypted", true)
	}
	if m.BackingFilename != "" {
		o.Set("backing-filename", m.BackingFilename)
		if m.FullBackingFilename != "" {
			o.Set("full-backing-filename", m.FullBackingFilename)
		}
		if m.BackingFormat != "" {
			o.Set("backing-filename-format", m.BackingFormat)
		}
	}
	if len(info.Snapshots) > 0 {
		var list []any
		for i := range info.Snapshots {
			list = append(list, snapshotObject(&info.Snapshots[i]))
		}
		o.Set("snapshots", list)
	}
	if info.SpecificType != "" {
		o.Set("format-specific", specificObject(info.SpecificType, m.facts(info.Specific, style)))
	}
	if style.Layout == Layout72 {
		return o
	}
	if m.Protocol {
		o.Set("format-specific", specificObject("file", m.facts(nil, style)))
	}
	children := []any{}
	for _, c := range m.Children {
		n := node(c.Filename, c.Protocol, c.Length, c.ActualSize, false)
		n.Set("format-specific", specificObject("file", m.facts(c.Specific, style)))
		n.Set("children", []any{})
		child := new(Object)
		child.Set("name", c.Name)
		child.Set("info", n)
		children = append(children, child)
	}
	o.Set("children", children)
	return o
}

// node has what QEMU tells of every node of its block graph.
func node(filename, format string, virtualSize, actualSize int64, dirty bool) *Object {
	o := new(Object)
	o.Set("filename", filename)
	o.Set("format", format)
	o.Set("dirty-flag", dirty)
	if actualSize >= 0 {
		o.Set("actual-size", actualSize)
	}
	o.Set("virtual-size", virtualSize)
	return o
}

func specificObject(kind string, data *Object) *Object {
	o := new(Object)
	o.Set("type", kind)
	o.Set("data", data)
	return o
}

package render

import (
	"bufio"
	"encoding/xml"
	"fmt"
	"io"
	"math/bits"
	"sort"
	"strings"
)

// PictureInfo says what a picture of a map shows.
type PictureInfo struct {
	Filename string
	Start    int64    // guest offset of the first entry
	Length   int64    // of all entries
	Layers   []string // file names by depth, the image itself first
}

// kind is what guest bytes are, in the order in which pictures stack them.
type kind uint8

const (
	stored kind = iota
	compressed
	zeros
	unallocated
)

var kindNames = [...]string{stored: "data", compressed: "compressed data", zeros: "zeros", unallocated: "unallocated"}

// pictureLayers is how many layers have colours of their own; deeper ones share
// the last.
const pictureLayers = 8

// class is what is drawn alike.
type class struct {
	kind  kind
	layer int // 0 for unallocated
}

func (c class) less(d class) bool {
	if c.kind == unallocated || d.kind == unallocated || c.layer == d.layer {
		return c.kind < d.kind
	}
	return c.layer < d.layer
}

// share is the number of guest bytes of a class in a cell.
type share struct {
	class class
	bytes int64
}

// grid lays the guest range out in rows of cells that are powers of two long.
type grid struct {
	info     PictureInfo
	cellSize int64
	columns  int // a power of two
	cells    [][]share
	totals   []share
}

// newGrid makes a grid of at most rows rows, and no more than are useful for
// small disks.
func newGrid(info PictureInfo, columns, rows int) *grid {
	g := &grid{info: info, columns: columns, cellSize: 1}
	row := powerOfTwo(max(1, (info.Length-1)/int64(rows)+1))
	if row < 64<<10 {
		row = min(64<<10, powerOfTwo(max(1, info.Length)))
	}
	g.cellSize = max(1, row/int64(columns))
	g.cells = make([][]share, (max(info.Length, 1)-1)/g.cellSize+1)
	return g
}

// powerOfTwo returns the smallest one that is not below n, which is positive, or
// the largest an int64 holds.
func powerOfTwo(n int64) int64 { return 1 << min(62, bits.Len64(uint64(n-1))) }

func (g *grid) rowSize() int64 { return g.cellSize * int64(g.columns) }

func (g *grid) rows() int { return (len(g.cells) + g.columns - 1) / g.columns }

// cellBytes is the length of the guest range of cell i.
func (g *grid) cellBytes(i int) int64 {
	return max(1, min(g.cellSize, g.info.Length-int64(i)*g.cellSize))
}

func (g *grid) add(e MapEntry) {
	c := class{unallocated, 0}
	layer := min(max(e.Depth, 0), pictureLayers-1)
	switch {
	case e.Compressed:
		c = class{compressed, layer}
	case e.Data && !e.Zero:
		c = class{stored, layer}
	case e.Present && e.Zero:
		c = class{zeros, layer}
	}
	from := max(0, e.Start-g.info.Start)
	to := min(e.Start-g.info.Start+e.Length, g.info.Length)
	if from >= to {
		return
	}
	g.totals = addShare(g.totals, c, to-from)
	for from < to {
		i := from / g.cellSize
		n := min(to-from, g.cellSize-from%g.cellSize)
		g.cells[i] = addShare(g.cells[i], c, n)
		from += n
	}
}

func addShare(s []share, c class, n int64) []share {
	for i := range s {
		if s[i].class == c {
			s[i].bytes += n
			return s
		}
	}
	return append(s, share{c, n})
}

func sortShares(s []share) {
	sort.Slice(s, func(i, j int) bool { return s[i].class.less(s[j].class) })
}

// layerName is what a legend calls a layer.
func (g *grid) layerName(layer int) string {
	if layer >= len(g.info.Layers) {
		return fmt.Sprintf("layer %d", layer)
	}
	name := Escape(g.info.Layers[layer])
	if layer == pictureLayers-1 && len(g.info.Layers) > pictureLayers {
		name += " and deeper"
	}
	return name
}

func (g *grid) legend(s share) string {
	text := kindNames[s.class.kind]
	if s.class.kind != unallocated && len(g.info.Layers) > 1 {
		text = g.layerName(s.class.layer) + ": " + text
	}
	return fmt.Sprintf("%s, %s (%.1f%%)", text, humanSize(uint64(s.bytes)), 100*float64(s.bytes)/float64(g.info.Length))
}

func (g *grid) title() string {
	t := fmt.Sprintf("%s, %s", Escape(g.info.Filename), humanSize(uint64(g.info.Length)))
	if g.info.Start != 0 {
		t += " from " + exactSize(g.info.Start)
	}
	return t
}

// exactSize writes a number of bytes in the largest unit that divides it.
func exactSize(n int64) string {
	if n == 0 {
		return "0"
	}
	unit := min(6, bits.TrailingZeros64(uint64(n))/10)
	return fmt.Sprintf("%d %sB", n>>(10*unit), [...]string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}[unit])
}

// SVGMap draws a map as a picture.
type SVGMap struct {
	grid *grid
	w    io.Writer
}

// NewSVGMap begins a picture that Close will write.
func NewSVGMap(w io.Writer, info PictureInfo) *SVGMap {
	return &SVGMap{newGrid(info, svgColumns, svgRows), w}
}

// Add takes the next entry.
func (m *SVGMap) Add(e MapEntry) error {
	m.grid.add(e)
	return nil
}

// Abort draws nothing: half a map makes no picture.
func (m *SVGMap) Abort() error { return nil }

// Measures of the picture, in pixels but for the first two.
const (
	svgColumns   = 256
	svgRows      = 32
	svgCell      = 4
	svgRowHeight = 18
	svgRowStep   = 22
	svgLeft      = 96
	svgTop       = 76
	svgLine      = 20
	svgRight     = 40
)

// layerColours are told apart by the colour-blind too (Okabe and Ito).
var layerColours = [pictureLayers]uint32{0x0072b2, 0xe69f00, 0x009e73, 0xcc79a7, 0x56b4e9, 0xd55e00, 0xf0e442, 0x888888}

// colour of a class: the layer's, dark where compressed, pale where zero.
func (c class) colour() string {
	rgb := layerColours[c.layer]
	mix := func(shift uint) uint32 {
		v := rgb >> shift & 0xff
		switch c.kind {
		case compressed:
			v = v * 55 / 100
		case zeros:
			v = 255 - (255-v)*35/100
		case unallocated:
			v = 0xee
		}
		return v
	}
	return fmt.Sprintf("#%02x%02x%02x", mix(16), mix(8), mix(0))
}

// Close writes the picture.
func (m *SVGMap) Close() error {
	g := m.grid
	b := bufio.NewWriter(m.w)
	sortShares(g.totals)
	width := svgLeft + svgColumns*svgCell + svgRight
	legendTop := svgTop + g.rows()*svgRowStep + 2*svgLine
	height := legendTop + len(g.totals)*svgLine

	fmt.Fprintf(b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height, width, height)
	fmt.Fprintf(b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", width, height)
	text := func(x, y int, attrs, s string) {
		fmt.Fprintf(b, `<text x="%d" y="%d"%s>`, x, y, attrs)
		xml.EscapeText(b, []byte(s))
		b.WriteString("</text>\n")
	}
	text(svgLeft, 24, ` font-size="16"`, g.title())
	g.svgScale(b, text)
	g.svgCells(b)
	text(svgLeft, legendTop-svgLine/2, ` fill="#555555"`,
		fmt.Sprintf("a row is %s, a column %s of guest offsets", exactSize(g.rowSize()), exactSize(g.cellSize)))
	for i, s := range g.totals {
		y := legendTop + i*svgLine
		fmt.Fprintf(b, `<rect x="%d" y="%d" width="24" height="12" fill="%s" stroke="#999999" stroke-width="0.5"/>`+"\n", svgLeft, y, s.class.colour())
		text(svgLeft+32, y+11, "", g.legend(s))
	}
	b.WriteString("</svg>\n")
	return b.Flush()
}

// svgScale draws the scale above the rows and the offsets before them.
func (g *grid) svgScale(b io.Writer, text func(x, y int, attrs, s string)) {
	bottom := svgTop + g.rows()*svgRowStep - (svgRowStep - svgRowHeight)
	for i := 0; i <= 8; i++ {
		x := svgLeft + i*svgColumns*svgCell/8
		fmt.Fprintf(b, `<path d="M%d %dV%d" stroke="#bbbbbb" stroke-width="0.5"/>`+"\n", x, svgTop-8, bottom)
		if at := g.rowSize() / 8 * int64(i); i == 0 || at > 0 {
			text(x, svgTop-14, ` text-anchor="middle" fill="#555555"`, "+"+exactSize(at))
		}
	}
	for row := range g.rows() {
		text(svgLeft-8, svgTop+row*svgRowStep+svgRowHeight-5, ` text-anchor="end" fill="#555555"`,
			exactSize(g.info.Start+int64(row)*g.rowSize()))
	}
}

// band is a stripe of a row in one colour, over columns from..to.
type band struct {
	class    class
	y, h     int // within the row
	from, to int
}

// svgCells draws each class as one path. A cell of several classes is a stack
// of them, the most stored at the bottom, each at least a pixel high.
func (g *grid) svgCells(b io.Writer) {
	paths := make(map[class]*strings.Builder)
	for row := range g.rows() {
		var open []band
		for col := 0; col < g.columns; col++ {
			i := row*g.columns + col
			if i >= len(g.cells) {
				break
			}
			var still []band
			for _, n := range stack(g.cells[i], g.cellBytes(i)) {
				n.from, n.to = col, col+1
				for _, o := range open {
					if o.class == n.class && o.y == n.y && o.h == n.h && o.to == col {
						n.from = o.from
					}
				}
				still = append(still, n)
			}
			for _, o := range open {
				if !continued(o, still) {
					drawBand(paths, row, o)
				}
			}
			open = still
		}
		for _, o := range open {
			drawBand(paths, row, o)
		}
	}
	classes := make([]class, 0, len(paths))
	for c := range paths {
		classes = append(classes, c)
	}
	sort.Slice(classes, func(i, j int) bool { return classes[i].less(classes[j]) })
	for _, c := range classes {
		fmt.Fprintf(b, `<path fill="%s" d="%s"/>`+"\n", c.colour(), paths[c])
	}
}

func continued(o band, by []band) bool {
	for _, n := range by {
		if n.class == o.class && n.y == o.y && n.h == o.h {
			return true
		}
	}
	return false
}

func drawBand(paths map[class]*strings.Builder, row int, o band) {
	p := paths[o.class]
	if p == nil {
		p = new(strings.Builder)
		paths[o.class] = p
	}
	w := (o.to - o.from) * svgCell
	fmt.Fprintf(p, "M%d %dh%dv%dh-%dz", svgLeft+o.from*svgCell, svgTop+row*svgRowStep+o.y, w, o.h, w)
}

// stack divides the height of a row among the classes of a cell.
func stack(cell []share, total int64) []band {
	sortShares(cell)
	bands := make([]band, 0, len(cell))
	left, largest := svgRowHeight, 0
	for i, s := range cell {
		h := max(1, int(float64(s.bytes)/float64(total)*svgRowHeight+0.5))
		bands = append(bands, band{class: s.class, h: h})
		left -= h
		if h > bands[largest].h {
			largest = i
		}
	}
	if len(bands) == 0 {
		return nil
	}
	// Rounding is the largest's loss; with more classes than pixels the last
	// ones are not to be seen.
	bands[largest].h = max(1, bands[largest].h+left)
	bottom := svgRowHeight
	for i := range bands {
		bands[i].h = min(bands[i].h, bottom)
		bottom -= bands[i].h
		bands[i].y = bottom
	}
	for len(bands) > 0 && bands[len(bands)-1].h == 0 {
		bands = bands[:len(bands)-1]
	}
	return bands
}

// HeatMap draws a map with block characters.
type HeatMap struct {
	grid   *grid
	w      io.Writer
	colour bool
}

const (
	heatRows  = 16
	heatLabel = 12 // columns before each row
)

// NewHeatMap begins a picture for a terminal of width columns.
func NewHeatMap(w io.Writer, info PictureInfo, width int, colour bool) *HeatMap {
	columns := 16
	for columns*2+heatLabel <= width && columns < 1024 {
		columns *= 2
	}
	return &HeatMap{newGrid(info, columns, heatRows), w, colour}
}

// Add takes the next entry.
func (m *HeatMap) Add(e MapEntry) error {
	m.grid.add(e)
	return nil
}

// Abort draws nothing: half a map makes no picture.
func (m *HeatMap) Abort() error { return nil }

// layerEscapes are the terminal's colours of the layers.
var layerEscapes = [pictureLayers]string{"\x1b[34m", "\x1b[33m", "\x1b[32m", "\x1b[35m", "\x1b[36m", "\x1b[31m", "\x1b[93m", "\x1b[90m"}

// Close writes the picture: full blocks are all data, lower ones partly, each
// in the colour of the layer that holds most of it.
func (m *HeatMap) Close() error {
	g := m.grid
	b := bufio.NewWriter(m.w)
	sortShares(g.totals)
	fmt.Fprintln(b, g.title())
	fmt.Fprintf(b, "%*s+0%*s\n", heatLabel, "", g.columns-2, "+"+exactSize(g.rowSize()))
	for row := range g.rows() {
		fmt.Fprintf(b, "%*s ", heatLabel-1, exactSize(g.info.Start+int64(row)*g.rowSize()))
		escape := ""
		for col := 0; col < g.columns; col++ {
			i := row*g.columns + col
			if i >= len(g.cells) {
				break
			}
			glyph, c := heatGlyph(g.cells[i], g.cellBytes(i))
			if want := m.escape(c); want != escape {
				if escape != "" {
					b.WriteString("\x1b[0m")
				}
				b.WriteString(want)
				escape = want
			}
			b.WriteString(glyph)
		}
		if escape != "" {
			b.WriteString("\x1b[0m")
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(b, "%*sa character is %s: ▁ to █ how much is data, ▚ compressed, ░ zeros, · unallocated\n", heatLabel, "", exactSize(g.cellSize))
	for _, s := range g.totals {
		glyph, _ := heatGlyph([]share{s}, s.bytes)
		if e := m.escape(s.class); e != "" {
			glyph = e + glyph + "\x1b[0m"
		}
		fmt.Fprintf(b, "%*s%s %s\n", heatLabel, "", glyph, g.legend(s))
	}
	return b.Flush()
}

func (m *HeatMap) escape(c class) string {
	if !m.colour || c.kind == unallocated {
		return ""
	}
	return layerEscapes[c.layer]
}

// heatGlyph returns a cell's character and the class that gives its colour.
func heatGlyph(cell []share, total int64) (string, class) {
	var data, packed int64
	largest, largestStored := share{class: class{kind: unallocated}}, share{}
	for _, s := range cell {
		if s.bytes > largest.bytes {
			largest = s
		}
		if s.class.kind > compressed {
			continue
		}
		data += s.bytes
		if s.class.kind == compressed {
			packed += s.bytes
		}
		if s.bytes > largestStored.bytes {
			largestStored = s
		}
	}
	switch {
	case data > 0 && packed*2 > data:
		return "▚", largestStored.class
	case data > 0:
		eighths := int(float64(data) / float64(total) * 8)
		return string([]rune("▁▂▃▄▅▆▇█")[min(7, max(0, eighths-1))]), largestStored.class
	case largest.class.kind == zeros:
		return "░", largest.class
	}
	return "·", largest.class
}

package render

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"math/rand"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/instar-img/instar/sdk/formattest"
)

// chainMap is what qemu-img says of a chain of three, the middle one compressed.
func chainMap(t *testing.T) (PictureInfo, []MapEntry) {
	t.Helper()
	dir := t.TempDir()
	formattest.Script(t, dir, `
		truncate -s 700M base.raw
		qemu-io -f raw -c 'write -P 3 50M 150M' -c 'write -P 4 600M 33M' base.raw
		qemu-img create -q -f qcow2 -b base.raw -F raw src.qcow2
		qemu-io -c 'write -P 1 0 90M' -c 'write -P 2 200M 40M' -c 'write -z 300M 100M' src.qcow2
		qemu-img convert -c -B base.raw -F raw -O qcow2 src.qcow2 mid.qcow2
		qemu-img create -q -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2
		qemu-io -c 'write -P 5 10M 3M' -c 'write -P 6 399M 64k' -c 'write -z 500M 20M' -c 'write -P 7 650M 20M' top.qcow2
	`)
	layers := []string{"top.qcow2", "mid.qcow2", "base.raw"}
	all := oracles(t)
	o := all[len(all)-1]
	entries := parseMap(t, o.run(t, dir, "map", "--output", "json", "top.qcow2"), layers)
	if o.layout == Layout72 {
		for i := range entries { // 7.2 does not tell compressed data
			entries[i].Compressed = entries[i].Data && !entries[i].HasOffset
		}
	}
	return PictureInfo{Filename: "top.qcow2", Length: 700 << 20, Layers: layers}, entries
}

type mapper interface {
	Add(MapEntry) error
	Close() error
}

func draw(t *testing.T, m mapper, entries []MapEntry) {
	t.Helper()
	for _, e := range entries {
		if err := m.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
}

// svgAreas returns the area of each colour among the cells, in pixels, and fails
// where two overlap or leave the picture.
func svgAreas(t *testing.T, svg string) map[string]int {
	t.Helper()
	d := xml.NewDecoder(strings.NewReader(svg))
	for {
		if _, err := d.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("not XML: %v", err)
		}
	}
	box := regexp.MustCompile(`viewBox="0 0 (\d+) (\d+)"`).FindStringSubmatch(svg)
	width, _ := strconv.Atoi(box[1])
	height, _ := strconv.Atoi(box[2])
	taken := make([]bool, width*height)
	areas := make(map[string]int)
	path := regexp.MustCompile(`<path fill="(#[0-9a-f]{6})" d="([^"]*)"/>`)
	part := regexp.MustCompile(`M(\d+) (\d+)h(\d+)v(\d+)h-(\d+)z`)
	for _, p := range path.FindAllStringSubmatch(svg, -1) {
		if left := part.ReplaceAllString(p[2], ""); left != "" {
			t.Fatalf("path with %q", left)
		}
		for _, m := range part.FindAllStringSubmatch(p[2], -1) {
			var v [5]int
			for i := range v {
				v[i], _ = strconv.Atoi(m[i+1])
			}
			if v[2] != v[4] || v[0]+v[2] > width || v[1]+v[3] > height || v[3] == 0 {
				t.Fatalf("rectangle %v", v)
			}
			for y := v[1]; y < v[1]+v[3]; y++ {
				for x := v[0]; x < v[0]+v[2]; x++ {
					if taken[y*width+x] {
						t.Fatalf("rectangles overlap at %d,%d", x, y)
					}
					taken[y*width+x] = true
				}
			}
			areas[p[1]] += v[2] * v[3]
		}
	}
	return areas
}

// The areas of the colours are in proportion to the bytes.
func TestSVGMap(t *testing.T) {
	info, entries := chainMap(t)
	var b bytes.Buffer
	draw(t, NewSVGMap(&b, info), entries)
	if dir := os.Getenv("INSTAR_PICTURE_DIR"); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, "map.svg"), b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	areas := svgAreas(t, b.String())

	bytesOf, sum := make(map[string]int64), 0
	for _, e := range entries {
		c := class{unallocated, 0}
		switch {
		case e.Compressed:
			c = class{compressed, e.Depth}
		case e.Data:
			c = class{stored, e.Depth}
		case e.Present:
			c = class{zeros, e.Depth}
		}
		bytesOf[c.colour()] += e.Length
	}
	for _, a := range areas {
		sum += a
	}
	if cells := 700 << 20 / (128 << 10); sum != cells*svgCell*svgRowHeight { // a row is 32 MiB
		t.Errorf("%d pixels drawn for %d cells", sum, cells)
	}
	if len(areas) != len(bytesOf) || len(areas) < 5 {
		t.Errorf("%d colours, want %d", len(areas), len(bytesOf))
	}
	for colour, n := range bytesOf {
		want, got := float64(n)/float64(info.Length), float64(areas[colour])/float64(sum)
		if math.Abs(want-got) > 0.003 {
			t.Errorf("%s covers %.4f, want %.4f", colour, got, want)
		}
	}
	for _, want := range []string{"top.qcow2, 700 MiB", "mid.qcow2: compressed data", "base.raw: data, ", "top.qcow2: zeros", "+16 MiB", "64 MiB"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing", want)
		}
	}
}

func TestHeatMap(t *testing.T) {
	info, entries := chainMap(t)
	var plain, coloured bytes.Buffer
	draw(t, NewHeatMap(&plain, info, 80, false), entries)
	draw(t, NewHeatMap(&coloured, info, 80, true), entries)
	if os.Getenv("INSTAR_PICTURE_DIR") != "" {
		t.Logf("\n%s\n%s", plain.String(), coloured.String())
	}
	if got := regexp.MustCompile(`\x1b\[\d+m`).ReplaceAllString(coloured.String(), ""); got != plain.String() {
		t.Errorf("colours change the text:\n%s", got)
	}
	cells := 0
	for _, line := range strings.Split(strings.TrimSuffix(plain.String(), "\n"), "\n") {
		if m := regexp.MustCompile(`^ *\d+(?: MiB)? ([▁▂▃▄▅▆▇█▚░·]+)$`).FindStringSubmatch(line); m != nil {
			cells += utf8.RuneCountInString(m[1])
			if n := utf8.RuneCountInString(line); n > 80 {
				t.Errorf("%d columns in %q", n, line)
			}
		}
	}
	if cells != 700 { // a row of 64 cells is 64 MiB
		t.Errorf("%d cells:\n%s", cells, plain.String())
	}
	// 10 MiB of compressed data, 3 MiB of plain data, compressed data again.
	if !regexp.MustCompile(`(?m)^ +0 ▚{10}█{3}▚{51}$`).MatchString(plain.String()) {
		t.Errorf("first row:\n%s", plain.String())
	}
}

// Whatever the entries, a picture is whole, and of bounded size.
func TestPicturesOfAnything(t *testing.T) {
	rng := rand.New(rand.NewSource(5))
	for _, length := range []int64{0, 1, 511, 512, 65535, 65536, 65537, 1 << 20, 700 << 20, 1<<40 + 12345, math.MaxInt64} {
		for _, start := range []int64{0, 512, 1 << 30} {
			if length > math.MaxInt64-start {
				continue
			}
			var layers []string
			for i := range 12 {
				layers = append(layers, fmt.Sprintf("<%d>&\x1b\"", i))
			}
			info := PictureInfo{Filename: "a<b>&\x1b\xff", Start: start, Length: length, Layers: layers}
			var entries []MapEntry
			for at := int64(0); at < length; {
				n := min(length-at, 1+rng.Int63n(max(1, length/2000)))
				entries = append(entries, MapEntry{Start: start + at, Length: n, Depth: rng.Intn(12),
					Present: rng.Intn(4) > 0, Zero: rng.Intn(3) == 0, Data: rng.Intn(2) == 0, Compressed: rng.Intn(5) == 0})
				at += n
			}
			var svg, heat bytes.Buffer
			draw(t, NewSVGMap(&svg, info), entries)
			svgAreas(t, svg.String())
			if svg.Len() > 2<<20 {
				t.Errorf("length %d: %d bytes of SVG", length, svg.Len())
			}
			draw(t, NewHeatMap(&heat, info, 100, false), entries)
			if strings.Contains(heat.String(), "\x1b") || !utf8.ValidString(heat.String()) || heat.Len() > 64<<10 {
				t.Errorf("length %d: heat map of %d bytes: %q", length, heat.Len(), heat.String())
			}
		}
	}
}

// Entries outside of the range are cut, not drawn elsewhere.
func TestPictureCutsEntries(t *testing.T) {
	info := PictureInfo{Start: 1 << 20, Length: 1 << 20, Layers: []string{"x"}}
	g := newGrid(info, 16, 16)
	for _, e := range []MapEntry{
		{Start: 0, Length: 3 << 19, Data: true, Present: true},
		{Start: 3 << 19, Length: 1 << 40, Zero: true, Present: true},
		{Start: 1 << 50, Length: 5, Data: true, Present: true},
		{Start: 0, Length: 5, Data: true, Present: true},
	} {
		g.add(e)
	}
	sortShares(g.totals)
	if len(g.totals) != 2 || g.totals[0] != (share{class{stored, 0}, 1 << 19}) || g.totals[1] != (share{class{zeros, 0}, 1 << 19}) {
		t.Errorf("got %v", g.totals)
	}
}

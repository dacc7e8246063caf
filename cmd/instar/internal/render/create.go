package render

import (
	"strconv"
	"strings"

	"github.com/instar-img/instar/sdk/option"
)

// FormattingLine is the line that create prints before it begins. The values
// are those that the user gave and the schema's defaults, in schema order, with
// size and backing file among them whichever way they were given. Doubled commas
// keep the values of strings apart from the options that follow.
func FormattingLine(file, format string, values option.Values) string {
	var b strings.Builder
	b.WriteString("Formatting '" + file + "', fmt=" + format + " ")
	for i, v := range values {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(v.Key + "=" + valueText(v))
	}
	b.WriteByte('\n')
	return b.String()
}

func valueText(v option.Value) string {
	switch v.Type {
	case option.Size, option.Uint:
		// qemu-img prints sizes from 8 EiB up as negative numbers.
		return strconv.FormatUint(v.Uint, 10)
	case option.Bool:
		if v.Text != "" {
			return v.Text
		}
		if v.Bool {
			return "on"
		}
		return "off"
	}
	text := v.String
	if v.Text != "" {
		text = v.Text
	}
	return strings.ReplaceAll(text, ",", ",,")
}

// Created describes new image files.
type Created struct {
	Format, Filename string
	VirtualSize      int64
	AllocationUnit   int64         // 0 where the format has none
	Options          option.Values // resolved
	Files            []string      // all that were made, the main one first
}

// CreatedJSON is what create --output json prints.
func CreatedJSON(c Created) []byte { return Pretty(c.object()) }

func (c Created) object() *Object {
	o := new(Object)
	o.Set("filename", c.Filename)
	o.Set("format", c.Format)
	o.Set("virtual-size", c.VirtualSize)
	if c.AllocationUnit > 0 {
		o.Set("allocation-unit", c.AllocationUnit)
	}
	options := new(Object)
	for _, v := range c.Options {
		switch v.Type {
		case option.Size, option.Uint:
			options.Set(v.Key, v.Uint)
		case option.Bool:
			options.Set(v.Key, v.Bool)
		default:
			options.Set(v.Key, v.String)
		}
	}
	o.Set("options", options)
	files := []any{}
	for _, f := range c.Files {
		files = append(files, f)
	}
	o.Set("files", files)
	return o
}

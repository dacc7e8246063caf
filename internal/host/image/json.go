package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// maxJSONDepth is how deep values may be nested, as in QEMU (json-parser.c).
const maxJSONDepth = 1024

// parseJSON parses one JSON value as QEMU does: strings may stand in single
// quotes too, keys must not repeat. Objects are map[string]any, numbers
// json.Number.
func parseJSON(s string) (any, error) {
	if !utf8.ValidString(s) {
		return nil, errors.New("JSON parse error, invalid UTF-8")
	}
	d := json.NewDecoder(strings.NewReader(doubleQuoted(s)))
	d.UseNumber()
	v, err := jsonValue(d, 0)
	switch {
	case errors.Is(err, io.EOF):
		return nil, errors.New("Expecting a JSON value")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, errors.New("JSON parse error, it ends too early")
	case err != nil:
		return nil, fmt.Errorf("JSON parse error, %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("Expecting at most one JSON value")
	}
	return v, nil
}

// jsonValue reads the next value.
func jsonValue(d *json.Decoder, depth int) (any, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	open, ok := token.(json.Delim)
	if !ok {
		return token, nil
	}
	if depth++; depth > maxJSONDepth {
		return nil, errors.New("nested too deeply")
	}
	object := map[string]any{}
	list := []any{}
	for d.More() {
		key := ""
		if open == '{' {
			if token, err = d.Token(); err != nil {
				return nil, early(err)
			}
			key, _ = token.(string) // the decoder accepts nothing else here
			if _, taken := object[key]; taken {
				return nil, errors.New("duplicate key")
			}
		}
		v, err := jsonValue(d, depth)
		if err != nil {
			return nil, early(err)
		}
		if open == '{' {
			object[key] = v
		} else {
			list = append(list, v)
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, early(err)
	}
	if open == '{' {
		return object, nil
	}
	return list, nil
}

// early is for errors inside a value.
func early(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// doubleQuoted puts strings in single quotes into double ones.
func doubleQuoted(s string) string {
	var b strings.Builder
	var quote byte // of the string that is open
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && quote != 0 && i+1 < len(s):
			if i++; s[i] != '\'' { // in JSON proper it is not escaped
				b.WriteByte(c)
			}
			b.WriteByte(s[i])
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
			b.WriteByte('"')
		case c == quote && quote != 0:
			quote = 0
			b.WriteByte('"')
		case c == '"':
			b.WriteString(`\"`)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

package main

import (
	"bytes"
	"strings"
	"testing"
)

// What a plugin logs cannot drive the terminal.
func TestLogsAreEscaped(t *testing.T) {
	var out bytes.Buffer
	a := &app{name: "instar", err: &out, verbose: true}
	t.Setenv(logVariable, "")
	logger, err := a.logger()
	if err != nil {
		t.Fatal(err)
	}
	logger.Warn("title \x1b]0;owned\x07", "key", "a\x1b[2Jb")
	logger.Warn("two\nlines")
	text := out.String()
	if strings.ContainsAny(text, "\x1b\x07") {
		t.Errorf("%q", text)
	}
	if !strings.Contains(text, `title \x1b]0;owned\x07`) || strings.Count(text, "\n") < 2 || !strings.HasSuffix(text, "\n") {
		t.Errorf("%q", text)
	}
}

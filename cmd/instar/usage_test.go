package main

import (
	"bytes"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// helpOf returns what the program prints under a name.
func helpOf(t *testing.T, name string, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	a := &app{name: name, out: &out, err: &out}
	root := a.rootCommand()
	line, err := normalise(root, args)
	if err != nil {
		t.Fatal(err)
	}
	root.SetArgs(line)
	if err := root.Execute(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// TestVersionIsRead runs over the version what callers look for.
func TestVersionIsRead(t *testing.T) {
	for env, want := range map[string]string{"": "10.0.0", "7.2": "7.2.0", "10.0": "10.0.0", "11": "10.0.0"} {
		t.Setenv("INSTAR_QEMU_VERSION", env)
		for _, args := range [][]string{{"--version"}, {"-V"}, {"--help"}, {"-h"}, {"help"}} {
			text := helpOf(t, qemuName, args...)
			m := regexp.MustCompile(`\Aqemu-img version ([0-9.]*)`).FindStringSubmatch(text)
			if m == nil || m[1] != want || !strings.Contains(text, "(instar "+version+")") {
				t.Errorf("%q as %q: %s", args, env, text)
			}
		}
	}
	if got := helpOf(t, "instar", "--version"); got != "instar version "+version+"\n" {
		t.Errorf("instar --version: %s", got)
	}
	if got := helpOf(t, "instar", "--help"); strings.Contains(got, "qemu-img version") {
		t.Errorf("instar --help: %s", got)
	}
}

// TestHelpIsRead runs over the help what callers look for.
func TestHelpIsRead(t *testing.T) {
	t.Setenv("INSTAR_PLUGIN_PATH", binDir(t))
	help := helpOf(t, qemuName, "--help")
	for _, c := range []struct {
		expression string
		want       bool
	}{
		{`(?m)\binfo\b.*-U\b`, true},                     // libguestfs
		{`--target-is-zero`, true},                       // CloudStack
		{`--object`, true},                               // nbdkit
		{`(?m)^\s+bitmap (.+) filename bitmap`, false},   // vdsm: there is no such verb
		{`(?m)^Supported formats: (.*\b)?qcow2\b`, true}, // scripts
	} {
		if regexp.MustCompile(c.expression).MatchString(help) != c.want {
			t.Errorf("%s: want %t in:\n%s", c.expression, c.want, help)
		}
	}
	if got := helpOf(t, qemuName, "info", "--help"); !strings.Contains(got, "--backing-chain") || strings.Contains(got, "Command syntax") {
		t.Errorf("info --help: %s", got)
	}
}

// TestSyntaxIsThere wants a line for each of qemu-img's verbs that is there, and
// each option in it to be an option. The lines are those of qemu-img.
func TestSyntaxIsThere(t *testing.T) {
	root := (&app{name: qemuName, out: &bytes.Buffer{}}).rootCommand()
	lines := map[string]string{}
	for line := range strings.Lines(strings.TrimPrefix(qemuSyntax, "\n")) {
		lines[strings.Fields(line)[0]] = line
	}
	for _, verb := range root.Commands() {
		line, ok := lines[verb.Name()]
		if (len(qemuOptions(verb.Name()).old) > 0) != ok {
			t.Errorf("%s: a line: %t", verb.Name(), ok)
		}
		delete(lines, verb.Name())
		for _, m := range regexp.MustCompile(`(?:\[|\| )(-{1,2}[a-zA-Z-]+)`).FindAllStringSubmatch(line, -1) {
			if _, _, err := scan(verb, verb.Name(), []string{m[1], "x"}, false); err != nil && !strings.Contains(err.Error(), "argument") {
				t.Errorf("%s %s: %v", verb.Name(), m[1], err)
			}
		}
	}
	if len(lines) > 0 {
		t.Errorf("lines for verbs that are not there: %q", lines)
	}
	out, err := exec.Command("qemu-img", "--help").Output()
	if err != nil || !strings.Contains(string(out), " version 7.2") {
		t.Skipf("NOT COMPARED with qemu-img 7.2: the installed one is another: %v", err)
	}
	for line := range strings.Lines(strings.TrimPrefix(qemuSyntax, "\n")) {
		if !strings.Contains(string(out), "\n"+line) {
			t.Errorf("not a line of qemu-img: %s", line)
		}
	}
}

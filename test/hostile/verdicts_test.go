//go:build linux

package hostile

import (
	"math/rand/v2"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
)

// differences are where instar's verdict on a damaged image may be another than
// qemu-img's, with what each says then; docs/divergences.md has the reasons.
// Verdicts that differ otherwise fail TestVerdicts.
var differences = []struct {
	format, verb string
	ours, theirs string // classes
	says, answer *regexp.Regexp
}{
	// check goes on after the first error.
	{"vmdk", "check", "corrupt", "refused", regexp.MustCompile(`points after EOF`), regexp.MustCompile(`Check failed: Invalid argument`)},
	// It looks at both copies of a table.
	{"vmdk", "check", "corrupt", "good", regexp.MustCompile(`redundant grain (table|directory)`), regexp.MustCompile(`^$`)},
	// It works, and on what cannot be opened for reading.
	{"vpc", "check", "corrupt", "refused", regexp.MustCompile(`^ERROR`), regexp.MustCompile(`Could not open`)},
	// A region must lie in the file, whole.
	{"vhdx", "check", "refused", "corrupt", regexp.MustCompile(`region\[\d+\]: .* file 0x`), regexp.MustCompile(`points after end of file`)},
}

func documented(format, verb string, ours, theirs verdict) bool {
	for _, d := range differences {
		if d.format == format && d.verb == verb && d.ours == ours.class(verb) && d.theirs == theirs.class(verb) &&
			d.says.MatchString(ours.text) && d.answer.MatchString(theirs.text) {
			return true
		}
	}
	return false
}

// verdict is a program's answer to one image.
type verdict struct {
	code int
	text string // of its errors
}

// class is what of an exit code is compared: of check's, corrupt and leaking are
// different answers.
func (v verdict) class(verb string) string {
	switch {
	case v.code == 0:
		return "good"
	case verb == "check" && v.code == 2:
		return "corrupt"
	case verb == "check" && v.code == 3:
		return "leaking"
	}
	return "refused"
}

// The built programs agree with qemu-img on which damaged images can be opened,
// and on whether check has something to say; inspect calls none safe that qemu-img
// finds fault with.
func TestVerdicts(t *testing.T) {
	runs := 12
	if n, err := strconv.Atoi(os.Getenv(runsVariable)); err == nil {
		runs = n
	}
	for _, s := range samples(t) {
		if s.format == "raw" {
			continue // there is nothing to be wrong
		}
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			rng := rand.New(rand.NewPCG(seed+1, uint64(len(s.name))))
			dir, env := t.TempDir(), []string{"XDG_RUNTIME_DIR=" + runtimeDir(t)}
			for range runs {
				b, what := mutate(rng, s.bytes)
				path := write(t, dir, "image", b)
				good := true // what qemu-img says of it; what is lost harms nobody
				for _, verb := range []string{"info", "check"} {
					r := command{Argv: []string{verb, "-f", s.format, "image"}, Dir: dir, Env: env}.run(t)
					_, text, code := formattest.TryOracle(t, "qemu-img", verb, "-f", s.format, path)
					ours := verdict{r.Code, strings.TrimSpace(r.Stderr)}
					theirs := verdict{code, strings.TrimSpace(text)}
					if theirs.code == 63 {
						continue // it has no check for this format
					}
					if class := theirs.class(verb); class != "good" && class != "leaking" {
						good = false
					}
					if ours.class(verb) != theirs.class(verb) && !documented(s.format, verb, ours, theirs) {
						t.Errorf("%s: %s: %s %s\nqemu-img: %s %s", what, verb, ours.class(verb), clip(ours.text), theirs.class(verb), clip(theirs.text))
					}
				}
				if r := (command{Argv: []string{"inspect", "-f", s.format, "image"}, Dir: dir, Env: env}).run(t); r.Code == 0 && !good {
					t.Errorf("%s: inspect says it is safe, and qemu-img that it is damaged: %s", what, r.Stdout)
				}
			}
		})
	}
}

package image

import (
	"testing"

	"github.com/instar-img/instar/sdk"
)

type warner struct{ sdk.Image }

func (warner) Warnings() []string { return []string{"a", "b", "c"} }

// However long a chain is, its plugins' warnings are not.
func TestWarningsOfChain(t *testing.T) {
	var said []string
	o := &Opener{Warn: func(s string) { said = append(said, s) }}
	for range 200 {
		o.passOn(&Layer{Image: warner{}})
	}
	if len(said) != maxWarnings+1 || said[0] != "a" || said[maxWarnings] != "more warnings are left out" {
		t.Errorf("%d warnings, the last %q", len(said), said[len(said)-1])
	}
}

package raw

import (
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
)

// A crash while a new image is filled leaves zeros or what is written at each byte.
func TestConvertCrash(t *testing.T) {
	states := formattest.Fresh{Format: New(), Size: 256<<10 + 512}.Crashes(t, func(formattest.Crash, bool) {})
	if states < 20 {
		t.Errorf("only %d states", states)
	}
}

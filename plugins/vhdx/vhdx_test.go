package vhdx

import (
	"testing"

	"github.com/instar-img/instar/sdk/formattest"
)

func TestConformance(t *testing.T) {
	formattest.Run(t, New, formattest.Config{
		Options: []string{
			"",
			"block_state_zero=off",
			"subformat=fixed",
			"subformat=fixed,block_state_zero=off",
			"block_size=1M,log_size=2M",
		},
		FlipBytes: 3 << 10,
	})
}

package main

import (
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

func TestConformance(t *testing.T) {
	formattest.Run(t, func() sdk.Format { return boxed{} }, formattest.Config{Options: []string{"", "colour=white"}})
}

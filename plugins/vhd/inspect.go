package vhd

import (
	"context"
	"fmt"

	"github.com/instar-img/instar/sdk"
)

// Rules of Inspect, beside those of the core.
const (
	ruleFooter     = "footer"
	ruleSavedState = "saved-state"
)

func rules() []sdk.Rule {
	return []sdk.Rule{
		{Name: ruleFooter, Meaning: "the two footers differ, or one is missing or damaged"},
		{Name: ruleSavedState, Meaning: "the machine was suspended when the disk was taken"},
	}
}

var _ sdk.Inspector = (*image)(nil)

// Inspect implements sdk.Inspector.
func (img *image) Inspect(context.Context) (*sdk.Inspection, error) {
	in := &sdk.Inspection{Features: []string{"fixed"}}
	if img.footer.diskType != typeFixed {
		in.Features[0] = "dynamic"
		if img.footer.diskType == typeDifferencing {
			in.Features[0] = "differencing"
		}
		if !img.tailOK {
			in.Findings = append(in.Findings, sdk.Finding{Rule: ruleFooter, Text: "the footer at the end is missing or says something else than its copy at the start"})
		}
	}
	for _, err := range img.damage {
		in.Findings = append(in.Findings, sdk.Finding{Rule: ruleFooter, Text: err.Error()})
	}
	if img.footer.savedState != 0 {
		in.Findings = append(in.Findings, sdk.Finding{Rule: ruleSavedState, Text: fmt.Sprintf("the machine it was taken from was suspended (%d)", img.footer.savedState)})
	}
	return in, nil
}

package vmdk

import (
	"context"
	"fmt"
	"strings"

	"github.com/instar-img/instar/sdk"
)

// Rules of Inspect, beside those of the core.
const (
	ruleSubformat  = "subformat"
	ruleExtentName = "extent-name"
)

var _ sdk.Inspector = (*image)(nil)

// Inspect implements sdk.Inspector. Only a disk in a single file that holds its
// own data is what a stranger has reason to send.
func (img *image) Inspect(context.Context) (*sdk.Inspection, error) {
	in := &sdk.Inspection{Features: []string{img.createType}}
	switch img.createType {
	case "monolithicSparse", "streamOptimized":
	default:
		in.Findings = append(in.Findings, sdk.Finding{Rule: ruleSubformat, Text: fmt.Sprintf("a disk of type %q, which is not kept in one file of its own", img.createType)})
	}
	// Many extents may share a bad name, and there may be many.
	const enough = 16
	for _, e := range img.desc.extents {
		if why := badExtentName(e.name); why != "" {
			in.Findings = append(in.Findings, sdk.Finding{Rule: ruleExtentName, Text: fmt.Sprintf("extent %.200q %s", e.name, why)})
			if len(in.Findings) >= enough {
				break
			}
		}
	}
	return in, nil
}

// badExtentName says why no file of an image may have this name, or nothing.
func badExtentName(name string) string {
	switch {
	case strings.ContainsAny(name, `/\`):
		return "is a path, not a name"
	case name == "." || name == "..":
		return "is a directory"
	case len(name) > 1 && name[1] == ':':
		return "names a drive"
	case strings.ContainsFunc(name, func(r rune) bool { return r < 0x20 || r == 0x7f }):
		return "has control characters"
	}
	return ""
}

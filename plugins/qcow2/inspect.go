package qcow2

import (
	"context"
	"fmt"

	"github.com/instar-img/instar/sdk"
)

// Rules of Inspect, beside those of the core.
const (
	ruleUnknownFeatures   = "unknown-features"
	ruleUnknownExtensions = "unknown-extensions"
	ruleBackingOffset     = "backing-offset"
)

func rules() []sdk.Rule {
	return []sdk.Rule{
		{Name: ruleUnknownFeatures, Meaning: "compatible or autoclear feature bits, or header fields, that nobody knows"},
		{Name: ruleUnknownExtensions, Meaning: "header extensions that nobody knows"},
		{Name: ruleBackingOffset, Meaning: "a place for a backing file's name, and no name"},
	}
}

var _ sdk.Inspector = (*image)(nil)

// Inspect implements sdk.Inspector. An image with unknown incompatible features
// cannot be opened in the first place.
func (im *image) Inspect(context.Context) (*sdk.Inspection, error) {
	in := &sdk.Inspection{Features: []string{fmt.Sprintf("version %d", im.h.version)}}
	for _, f := range []struct {
		set  bool
		name string
	}{
		{im.h.incompatible&incompatDirty != 0, "dirty bit"},
		{im.h.incompatible&incompatCorrupt != 0, "corrupt bit"},
		{im.h.dataFile(), "external data file"},
		{im.h.incompatible&incompatCompression != 0, "compression type"},
		{im.h.extendedL2(), "extended L2 entries"},
		{im.h.compatible&compatLazyRefcounts != 0, "lazy refcounts"},
		{im.h.autoclear&autoclearBitmaps != 0, "bitmaps"},
		{im.h.autoclear&autoclearDataFileRaw != 0, "raw external data"},
		{im.h.crypt != cryptNone, "encryption"},
	} {
		if f.set {
			in.Features = append(in.Features, f.name)
		}
	}
	find := func(rule, format string, args ...any) {
		in.Findings = append(in.Findings, sdk.Finding{Rule: rule, Text: fmt.Sprintf(format, args...)})
	}
	if im.h.backingOffset != 0 && im.h.backingSize == 0 {
		find(ruleBackingOffset, "the name of a backing file, of no length, at %#x", im.h.backingOffset)
	}
	if x := im.h.compatible &^ compatLazyRefcounts; x != 0 {
		find(ruleUnknownFeatures, "unknown compatible features %#x", x)
	}
	if x := im.h.autoclear &^ autoclearKnown; x != 0 {
		find(ruleUnknownFeatures, "unknown autoclear features %#x", x)
	}
	if len(im.h.unknown) > 0 {
		find(ruleUnknownFeatures, "%d bytes of unknown header fields", len(im.h.unknown))
	}
	for _, e := range im.ext {
		switch e.kind {
		case extBackingFormat, extFeatures, extCrypto, extBitmaps, extDataFile:
		default:
			find(ruleUnknownExtensions, "unknown header extension %#x", e.kind)
		}
	}
	return in, nil
}

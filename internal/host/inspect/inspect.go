// Package inspect judges images for gatekeepers: services that take images from
// strangers and hand them to programs that trust them.
package inspect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/internal/host/image"
	"github.com/instar-img/instar/sdk"
)

// Rules of the core, which need no knowledge of a format. Plugins add theirs.
const (
	RuleUnreadable = "unreadable"   // the image cannot be opened
	RuleAmbiguous  = "ambiguous"    // the content fits several formats
	RuleBacking    = "backing-file" // the image refers to a backing file
	RuleData       = "data-file"    // its data lies in another file
	RuleExtent     = "extent-file"  // parts of it lie in other files
	RuleEncrypted  = "encrypted"    // nobody can see what is in it
	RuleCorrupt    = "corrupt"      // it is marked corrupt, or its structures contradict each other
	RuleDirty      = "dirty"        // it was not closed: its metadata is to be repaired or replayed
	RuleUnexpected = "unexpected"   // it is not of the format that was expected
)

// coreRules lists the core's rules.
func coreRules() []sdk.Rule {
	return []sdk.Rule{
		{Name: RuleUnreadable, Meaning: "the image cannot be opened as what it seems to be"},
		{Name: RuleAmbiguous, Meaning: "the content fits several formats, and programs may differ in which they take it for"},
		{Name: RuleBacking, Meaning: "the image names a backing file, whose content would become the guest's"},
		{Name: RuleData, Meaning: "the image names another file that holds its data"},
		{Name: RuleExtent, Meaning: "the image names other files that hold parts of it"},
		{Name: RuleEncrypted, Meaning: "the content is encrypted"},
		{Name: RuleCorrupt, Meaning: "the image is marked corrupt, or a check of its structures fails"},
		{Name: RuleDirty, Meaning: "the image was not closed, so that its metadata must be repaired or a log replayed"},
		{Name: RuleUnexpected, Meaning: "the image is not of the format that -f says"},
	}
}

// Rule is a rule and the format that it is of, empty for those of the core.
type Rule struct {
	sdk.Rule
	Format string
}

// Rules lists the rules there are: the core's, and those that the manifests of
// plugins list. Formats may have rules of one name.
func Rules(plugins []*discover.Plugin) []Rule {
	var out []Rule
	for _, r := range coreRules() {
		out = append(out, Rule{Rule: r})
	}
	for _, p := range plugins {
		for _, r := range p.Manifest.Rules {
			out = append(out, Rule{r, p.Manifest.Name})
		}
	}
	return out
}

// allowed checks that there are rules of these names.
func allowed(names []string, plugins []*discover.Plugin) error {
	if len(names) == 0 {
		return nil
	}
	var known []string
	for _, r := range Rules(plugins) {
		if !slices.Contains(known, r.Name) {
			known = append(known, r.Name)
		}
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			return fmt.Errorf("no rule is called %.100q (accepted: %s): %w", name, strings.Join(known, ", "), sdk.ErrInvalid)
		}
	}
	return nil
}

// Request says what to inspect.
type Request struct {
	Path   string
	Format string // expected; empty: any. Of several that fit, the one to open it as
	// Allow lists rules whose findings do not count.
	Allow []string
}

// Reference is a name in the image.
type Reference struct {
	Kind, Name, Format string
}

// Finding is a broken rule.
type Finding struct {
	Rule, Text string
	Allowed    bool
}

// Verdict is what was found out.
type Verdict struct {
	Path        string
	Format      string   // what it was taken for, empty where nothing fits
	Matches     []string // all formats that the content fits, without the fallback
	VirtualSize int64
	References  []Reference
	Features    []string
	Findings    []Finding
}

// Safe reports whether no rule is broken that was not allowed.
func (v *Verdict) Safe() bool {
	for _, f := range v.Findings {
		if !f.Allowed {
			return false
		}
	}
	return true
}

// Image inspects one image. What is wrong with the image is in the verdict; an
// error is for what is wrong with the request. The opener's policy must not
// trust the image.
func Image(ctx context.Context, o *image.Opener, req Request) (*Verdict, error) {
	v := &Verdict{Path: req.Path}
	find := func(rule, format string, args ...any) {
		v.Findings = append(v.Findings, Finding{Rule: rule, Text: fmt.Sprintf(format, args...), Allowed: slices.Contains(req.Allow, rule)})
	}
	if err := allowed(req.Allow, o.Session.Plugins.Plugins()); err != nil {
		return nil, err
	}
	expected := ""
	if req.Format != "" {
		p, err := o.Session.Plugins.ByName(req.Format)
		if err != nil {
			return nil, err
		}
		expected = p.Manifest.Name
	}
	// Opened once: there may soon be another file of that name.
	file, err := o.Gate.NewWalk().OpenMain(req.Path, false)
	if err != nil {
		return nil, err
	}
	matches, err := o.Probe(file)
	if err != nil {
		file.Close()
		return nil, err
	}
	if len(matches) == 0 {
		file.Close()
		find(RuleUnreadable, "no installed format recognises the content")
		return v, nil
	}
	v.Format = matches[0].Plugin.Manifest.Name
	for _, m := range matches {
		if !m.Fallback {
			v.Matches = append(v.Matches, m.Plugin.Manifest.Name)
		}
	}
	if slices.Contains(v.Matches, expected) {
		v.Format = expected
	}
	if len(v.Matches) > 1 || (len(v.Matches) == 1 && v.Matches[0] != v.Format) {
		find(RuleAmbiguous, "the content fits %s", strings.Join(v.Matches, " and "))
	}
	if expected != "" && expected != v.Format {
		find(RuleUnexpected, "it is %s, %s was expected", v.Format, expected)
	}
	chain, err := o.OpenFile(ctx, req.Path, file, image.Options{Format: v.Format, Describe: true, Check: true, Still: true})
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		find(RuleUnreadable, "%v", err)
		return v, nil
	}
	defer chain.Close()
	if err := v.layer(ctx, chain.Top(), find); err != nil {
		return nil, err
	}
	if first := matches[0]; first.Fallback && first.Plugin.Manifest.Name != v.Format {
		return v, v.asFallback(ctx, o, first.Plugin, chain.Top().Files[0].File, find)
	}
	return v, nil
}

// asFallback judges a file as what programs take it for that are not told its
// format, too.
func (v *Verdict) asFallback(ctx context.Context, o *image.Opener, p *discover.Plugin, file *os.File, find func(rule, format string, args ...any)) error {
	format, err := o.Session.Start(ctx, p)
	if err != nil {
		return err
	}
	img, err := format.Open(ctx, sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: sdk.NewFile(file)}}, Check: true})
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		find(RuleUnreadable, "%s: %v", p.Manifest.Name, err)
		return nil
	}
	defer img.Close()
	return v.inspector(ctx, &image.Layer{Plugin: p, Image: img}, find)
}

// layer judges an opened image.
func (v *Verdict) layer(ctx context.Context, layer *image.Layer, find func(rule, format string, args ...any)) error {
	info := layer.Info
	v.VirtualSize = info.VirtualSize
	rules := map[sdk.ReferenceKind]string{sdk.RefBacking: RuleBacking, sdk.RefData: RuleData, sdk.RefExtent: RuleExtent}
	for _, r := range info.References {
		if r.Role == sdk.RoleMain {
			continue
		}
		v.References = append(v.References, Reference{Kind: string(r.Kind), Name: r.Name, Format: r.Format})
		rule, ok := rules[r.Kind]
		if !ok {
			rule = RuleUnreadable
		}
		find(rule, "it refers to %q", r.Name)
	}
	for _, flag := range []struct {
		set  bool
		rule string
		text string
	}{
		{info.Encrypted, RuleEncrypted, "the content is encrypted"},
		{info.Corrupt, RuleCorrupt, "it is marked corrupt"},
		{info.Dirty, RuleDirty, "it was not closed properly"},
	} {
		if flag.set {
			find(flag.rule, "%s", flag.text)
		}
	}
	if len(info.Snapshots) > 0 {
		v.Features = append(v.Features, fmt.Sprintf("internal snapshots: %d", len(info.Snapshots)))
	}
	if err := v.inspector(ctx, layer, find); err != nil {
		return err
	}
	return check(ctx, layer, find)
}

// inspector asks the plugin for what only it knows.
func (v *Verdict) inspector(ctx context.Context, layer *image.Layer, find func(rule, format string, args ...any)) error {
	i, ok := sdk.As[sdk.Inspector](layer.Image)
	if !ok {
		return nil
	}
	in, err := i.Inspect(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		find(RuleUnreadable, "%v", err)
		return nil
	}
	v.Features = append(v.Features, in.Features...)
	rules := Rules([]*discover.Plugin{layer.Plugin})
	for _, f := range in.Findings {
		if !slices.ContainsFunc(rules, func(r Rule) bool { return r.Name == f.Rule }) {
			find(RuleUnreadable, "its plugin says that %.100q is broken, a rule that its manifest does not list", f.Rule)
			continue
		}
		find(f.Rule, "%s", f.Text)
	}
	return nil
}

// check has the plugin check the structures. Leaks waste space and no more.
func check(ctx context.Context, layer *image.Layer, find func(rule, format string, args ...any)) error {
	checker, ok := sdk.As[sdk.Checker](layer.Image)
	if !ok {
		return nil
	}
	first := ""
	r, err := checker.Check(ctx, sdk.CheckRequest{Message: func(line string) {
		if first == "" {
			first = ": " + line
		}
	}})
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, sdk.ErrUnsupported), errors.Is(err, sdk.ErrNotAttached):
		return nil // parts that were not opened have rules of their own
	case err != nil:
		find(RuleCorrupt, "it cannot be checked: %v", err)
	case r.Corruptions > 0 || (r.CheckErrors > 0 && len(layer.Refused) == 0):
		// Errors in parts that were not opened say nothing.
		find(RuleCorrupt, "%d corruptions and %d errors were found in its structures%s", r.Corruptions, r.CheckErrors, first)
	}
	return nil
}

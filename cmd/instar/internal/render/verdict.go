package render

import (
	"fmt"
	"strings"

	"github.com/instar-img/instar/internal/host/inspect"
)

// VerdictText is what inspect prints.
func VerdictText(v *inspect.Verdict, style Style) string {
	var b strings.Builder
	line := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s: %s\n", name, style.text(value))
		}
	}
	line("image", v.Path)
	line("file format", v.Format)
	line("content fits", strings.Join(v.Matches, ", "))
	if v.VirtualSize > 0 {
		line("virtual size", sizeAndBytes(v.VirtualSize))
	}
	line("features", strings.Join(v.Features, ", "))
	for _, r := range v.References {
		line(r.Kind, r.Name)
	}
	for _, f := range v.Findings {
		name := f.Rule
		if f.Allowed {
			name += " (allowed)"
		}
		line(name, f.Text)
	}
	safe := "no"
	if v.Safe() {
		safe = "yes"
	}
	line("safe", safe)
	return b.String()
}

// VerdictJSON is what inspect --output json prints.
func VerdictJSON(v *inspect.Verdict) []byte {
	o := new(Object)
	o.Set("filename", v.Path)
	o.Set("format", v.Format)
	o.Set("matches", anys(v.Matches))
	o.Set("virtual-size", v.VirtualSize)
	o.Set("features", anys(v.Features))
	references := make([]any, len(v.References))
	for i, r := range v.References {
		ref := new(Object)
		ref.Set("kind", r.Kind)
		ref.Set("name", r.Name)
		if r.Format != "" {
			ref.Set("format", r.Format)
		}
		references[i] = ref
	}
	o.Set("references", references)
	findings := make([]any, len(v.Findings))
	for i, f := range v.Findings {
		finding := new(Object)
		finding.Set("rule", f.Rule)
		finding.Set("text", f.Text)
		finding.Set("allowed", f.Allowed)
		findings[i] = finding
	}
	o.Set("findings", findings)
	o.Set("safe", v.Safe())
	return Pretty(o)
}

func anys(in []string) []any {
	out := make([]any, len(in))
	for i, s := range in {
		out[i] = s
	}
	return out
}

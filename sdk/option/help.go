package option

import (
	"fmt"
	"sort"
	"strings"
)

// Help lists the keys of a schema under title ("Supported qcow2 options:") as
// qemu-img lists them, sorted, a line each. In brackets follows what its texts
// do not tell: values, bounds, defaults, and keys that are not to be used.
func Help(title string, s Schema) string {
	keys := make([]*Key, len(s))
	for i := range s {
		keys[i] = &s[i]
	}
	sort.SliceStable(keys, func(i, j int) bool { return keys[i].Name < keys[j].Name })

	var b strings.Builder
	b.WriteString(title + "\n")
	for _, k := range keys {
		line := fmt.Sprintf("  %s=<%s>", k.Name, k.typeName())
		text := k.Help
		if notes := k.notes(); len(notes) > 0 {
			text = strings.TrimSpace(text + " [" + strings.Join(notes, "; ") + "]")
		}
		if text != "" {
			line = fmt.Sprintf("%-24s - %s", line, text)
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

// typeName is qemu-img's name for the type.
func (k *Key) typeName() string {
	switch k.Type {
	case Bool:
		return "bool (on/off)"
	case Size:
		return "size"
	case Uint:
		return "num"
	}
	return "str"
}

func (k *Key) notes() []string {
	var notes []string
	switch k.Disposition {
	case Deferred:
		return []string{"not supported yet: " + k.Reason}
	case Ignored:
		notes = append(notes, "accepted, without effect")
	case Deprecated:
		notes = append(notes, "deprecated: "+k.Reason)
	}
	switch k.Type {
	case Enum:
		if missing(k.Help, k.Allowed) {
			notes = append(notes, "one of "+strings.Join(k.Allowed, ", "))
		}
	case Size, Uint:
		if k.Min != 0 || k.Max != 0 || k.PowerOfTwo {
			notes = append(notes, k.bounds())
		}
	}
	if k.Default != "" && !strings.Contains(strings.ToLower(k.Help), "default") {
		def := k.Default
		if v, err := ParseSize(def); err == nil && k.Type == Size {
			def = formatSize(v)
		}
		notes = append(notes, "default "+def)
	}
	if k.Extra {
		notes = append(notes, "not in qemu-img")
	}
	return notes
}

// missing reports whether text leaves out one of the words.
func missing(text string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(text, w) {
			return true
		}
	}
	return false
}

package option

import (
	"errors"
	"fmt"
	"math/bits"
	"sort"
	"strings"
)

// Validate checks settings against the schema of target, a format's name, and
// adds defaults. Of a key that was given more than once the last value counts;
// the others must still be of the key's type, as for qemu-img. Errors are
// *Error.
func (s Schema) Validate(target string, settings []Setting) (Values, error) {
	type given struct {
		key   *Key
		value Value
		text  string
	}
	byKey := make(map[string]given, len(settings))
	var order []string // names of byKey, as first given
	for _, set := range settings {
		key, name, text, err := s.resolve(target, set)
		if err != nil {
			return nil, err
		}
		value, err := key.parse(name, text)
		if err != nil {
			return nil, err
		}
		value.Set = true
		if _, ok := byKey[name]; !ok {
			order = append(order, name)
		}
		byKey[name] = given{key, value, text}
	}
	for _, name := range order {
		g := byKey[name]
		if err := g.key.check(target, &g.value, g.text); err != nil {
			return nil, err
		}
		byKey[name] = g
	}

	var values Values
	for i := range s {
		key := &s[i]
		if key.Family() {
			for _, name := range order {
				if g := byKey[name]; g.key == key {
					values = append(values, g.value)
				}
			}
			continue
		}
		if g, ok := byKey[key.Name]; ok {
			values = append(values, g.value)
			continue
		}
		if key.Default == "" {
			continue
		}
		value, err := key.parse(key.Name, key.Default)
		if err == nil {
			err = key.check(target, &value, key.Default)
		}
		if err != nil {
			return nil, fmt.Errorf("schema of %s: default of %s: %w", target, key.Name, err)
		}
		values = append(values, value)
	}
	return values, nil
}

// resolve finds the key that a setting means, under which name, and the text of
// its value. A bare noKEY switches off the bool KEY.
func (s Schema) resolve(target string, set Setting) (key *Key, name, text string, err error) {
	if key, ok := s.Find(set.Key); ok {
		return key, set.Key, set.Value, nil
	}
	if base, ok := strings.CutPrefix(set.Key, "no"); ok && set.Bare {
		if key, ok := s.Find(base); ok && key.Type == Bool {
			return key, base, "off", nil
		}
	}
	return nil, "", "", s.unknown(target, set)
}

func (s Schema) unknown(target string, set Setting) *Error {
	e := &Error{Key: set.Key, Value: set.Value, Reason: "unrecognised key"}
	for i := range s {
		if s[i].Disposition != Deferred {
			e.Accepted = append(e.Accepted, s[i].Name)
		}
	}
	sort.Strings(e.Accepted)
	e.Text = fmt.Sprintf("unrecognised -o key %q for target %s (accepted keys: %s)",
		set.Key, target, strings.Join(e.Accepted, ", "))
	if near := s.nearest(set.Key); near != "" {
		e.Text += fmt.Sprintf("; did you mean %q?", near)
	}
	return e
}

// parse reads text as a value of the key's type. Allowed values and bounds are
// check's business.
func (k *Key) parse(name, text string) (Value, error) {
	v := Value{Key: name, Type: k.Type}
	var err error
	switch k.Type {
	case Bool:
		if v.Bool, err = ParseBool(text); err != nil {
			return v, &Error{Key: name, Value: text, Reason: "expects 'on' or 'off'",
				Accepted: []string{"on", "off"},
				Text:     fmt.Sprintf("Parameter '%s' expects 'on' or 'off'", name)}
		}
		if text != onOff(v.Bool) {
			v.Text = text
		}
	case Size:
		v.Uint, err = ParseSize(text)
		switch {
		case errors.Is(err, ErrRange):
			return v, &Error{Key: name, Value: text, Reason: "is out of range",
				Text: fmt.Sprintf("Value '%s' is out of range for parameter '%s'", text, name)}
		case err != nil:
			return v, &Error{Key: name, Value: text, Reason: "expects a non-negative number below 2^64",
				Text: fmt.Sprintf("Parameter '%s' expects a non-negative number below 2^64\n", name) +
					"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n" +
					"and exabytes, respectively."}
		}
	case Uint:
		v.Uint, err = ParseUint(text)
		switch {
		case errors.Is(err, ErrRange):
			return v, &Error{Key: name, Value: text, Reason: "is too large",
				Text: fmt.Sprintf("Value '%s' is too large for parameter '%s'", text, name)}
		case err != nil && k.RangeText != "" && isNegative(text):
			// qemu-img wraps it around and finds it too large.
			return v, k.outOfBounds(name, text)
		case err != nil:
			return v, &Error{Key: name, Value: text, Reason: "expects a number",
				Text: fmt.Sprintf("Parameter '%s' expects a number", name)}
		}
	default:
		v.String = text
	}
	return v, nil
}

// check refuses values that the key does not take, and keys that are not to be
// used at all. It makes an enum's value canonical.
func (k *Key) check(target string, v *Value, text string) error {
	if k.Disposition == Deferred {
		// Switching off what is off anyway asks for nothing.
		if k.Type == Bool && !v.Bool {
			return nil
		}
		return &Error{Key: v.Key, Value: text, Reason: k.Reason,
			Text: fmt.Sprintf("-o key %q for target %s is not supported yet: %s", v.Key, target, k.Reason)}
	}
	switch k.Type {
	case Enum:
		canonical, ok := k.canonical(v.String)
		if !ok {
			return k.outOfBounds(v.Key, text)
		}
		if canonical != v.String {
			v.String, v.Text = canonical, v.String
		}
	case Size, Uint:
		if v.Uint == 0 && k.ZeroOK {
			return nil
		}
		if v.Uint < k.Min || k.Max != 0 && v.Uint > k.Max || k.PowerOfTwo && bits.OnesCount64(v.Uint) != 1 {
			return k.outOfBounds(v.Key, text)
		}
	}
	return nil
}

func (k *Key) canonical(text string) (string, bool) {
	for _, a := range k.Allowed {
		if a == text || k.FoldCase && strings.EqualFold(a, text) {
			return a, true
		}
	}
	for from, to := range k.Synonyms {
		if from == text || k.FoldCase && strings.EqualFold(from, text) {
			return to, true
		}
	}
	return "", false
}

func (k *Key) outOfBounds(name, text string) *Error {
	e := &Error{Key: name, Value: text}
	if k.RangeText != "" {
		e.Text = strings.ReplaceAll(k.RangeText, "%s", text)
	}
	if k.Type == Enum {
		e.Reason = "is not an accepted value"
		e.Accepted = k.Allowed
		if e.Text == "" {
			e.Text = fmt.Sprintf("Parameter '%s' does not accept value '%s'", strings.ReplaceAll(name, "_", "-"), text)
		}
		return e
	}
	e.Reason = "must be " + k.bounds()
	return e
}

// bounds says in words which numbers a key takes.
func (k *Key) bounds() string {
	number := func(v uint64) string {
		if k.Type == Size {
			return formatSize(v)
		}
		return fmt.Sprint(v)
	}
	what := "a number"
	if k.Type == Size {
		what = "a size"
	}
	if k.PowerOfTwo {
		what = "a power of two"
	}
	switch {
	case k.Max != 0:
		what += fmt.Sprintf(" from %s to %s", number(k.Min), number(k.Max))
	case k.Min != 0:
		what += fmt.Sprintf(" from %s up", number(k.Min))
	}
	if k.ZeroOK && (k.Min != 0 || k.PowerOfTwo) {
		what += ", or 0"
	}
	return what
}

// nearest returns the accepted key that a mistyped one most likely means, or "".
func (s Schema) nearest(typed string) string {
	if len(typed) > 64 {
		return ""
	}
	plain := func(s string) string {
		return strings.NewReplacer("-", "", "_", "", ".", "").Replace(strings.ToLower(s))
	}
	best, limit := "", 1+len(typed)/4
	for i := range s {
		k := &s[i]
		if k.Family() || k.Disposition == Deferred {
			continue
		}
		d := distance(typed, k.Name)
		if plain(typed) == plain(k.Name) {
			d = 0
		}
		if d <= limit && (best == "" || d < limit) {
			best, limit = k.Name, d
		}
	}
	return best
}

// distance is the number of insertions, deletions, substitutions and swaps of
// neighbours that turn a into b (optimal string alignment), in bytes.
func distance(a, b string) int {
	prev2 := make([]int, len(b)+1)
	prev := make([]int, len(b)+1)
	cur := make([]int, len(b)+1)
	for j := range prev {
		prev[j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], prev2[j-2]+1)
			}
		}
		prev2, prev, cur = prev, cur, prev2
	}
	return prev[len(b)]
}

func isNegative(text string) bool {
	digits := strings.TrimLeft(text, " \t\n\v\f\r")
	rest, ok := strings.CutPrefix(digits, "-")
	if !ok {
		return false
	}
	_, err := ParseUint(rest)
	return err == nil && rest[0] != '+' && strings.TrimLeft(rest, " \t\n\v\f\r") == rest
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

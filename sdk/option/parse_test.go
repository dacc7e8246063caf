package option

import (
	"errors"
	"math"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSplit(t *testing.T) {
	kv := func(pairs ...string) []Setting {
		var out []Setting
		for i := 0; i < len(pairs); i += 2 {
			out = append(out, Setting{Key: pairs[i], Value: pairs[i+1]})
		}
		return out
	}
	bare := func(keys ...string) []Setting {
		var out []Setting
		for _, k := range keys {
			out = append(out, Setting{Key: k, Value: "on", Bare: true})
		}
		return out
	}
	for _, tt := range []struct {
		in   string
		want []Setting
		help bool
	}{
		{in: "size=1M", want: kv("size", "1M")},
		{in: "a=1,b=2", want: kv("a", "1", "b", "2")},
		{in: "a=1,a=2", want: kv("a", "1", "a", "2")},
		{in: "a", want: bare("a")},
		{in: "a,b", want: bare("a", "b")},
		{in: "a=", want: kv("a", "")},
		{in: "a==b", want: kv("a", "=b")},
		{in: "a=b=c", want: kv("a", "b=c")},
		{in: "a=x,,y", want: kv("a", "x,y")},
		{in: "a=x,,y,b=1", want: kv("a", "x,y", "b", "1")},
		{in: "a=x,,,b=1", want: kv("a", "x,", "b", "1")},
		{in: "a=x,,", want: kv("a", "x,")},
		{in: "a=,,x", want: kv("a", ",x")},
		{in: "=5", want: kv("", "5")},
		{in: "help", help: true},
		{in: "?", help: true},
		{in: "help,,", want: bare(""), help: true},
		{in: "a=1,help", want: kv("a", "1"), help: true},
		{in: "a=1,?,b=2", want: kv("a", "1", "b", "2"), help: true},
		{in: "a=x,,help", want: kv("a", "x,help")},
		{in: "help=5", want: kv("help", "5")},
		{in: "a=help", want: kv("a", "help")},
	} {
		got, help, err := Split(tt.in)
		if err != nil || help != tt.help || !cmp.Equal(got, tt.want) {
			t.Errorf("Split(%q) = %v, %v, %v; want %v, %v", tt.in, got, help, err, tt.want, tt.help)
		}
	}
}

func TestSplitRefusesInvalidLists(t *testing.T) {
	for _, in := range []string{"", ",", ",,", ",,,", "a=1,", ",a=1", "a=1,,,", "a,,,,,", "a=1,,,,,b=2,"} {
		got, _, err := Split(in)
		if want := "Invalid option list: " + in; err == nil || err.Error() != want {
			t.Errorf("Split(%q) = %v, %v; want error %q", in, got, err, want)
		}
		var oe *Error
		if !errors.As(err, &oe) {
			t.Errorf("Split(%q): error is a %T", in, err)
		}
	}
}

// A list splits the same whether given as one -o or as several.
func FuzzSplit(f *testing.F) {
	for _, s := range []string{"", ",", "a", "a=1,b", "a=x,,y,help", "a=,,", "?", "a=1,,,b=2", "no", "=", "a,,b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		settings, help, err := Split(s)
		if err != nil {
			if settings != nil || help {
				t.Fatalf("Split(%q) gives settings and an error", s)
			}
			return
		}
		var parts []string
		for _, set := range settings {
			if strings.ContainsAny(set.Key, "=,") {
				t.Fatalf("Split(%q): key %q", s, set.Key)
			}
			if set.Bare && set.Value != "on" {
				t.Fatalf("Split(%q): bare %q has value %q", s, set.Key, set.Value)
			}
			parts = append(parts, set.Key+"="+strings.ReplaceAll(set.Value, ",", ",,"))
		}
		if len(parts) == 0 {
			if !help {
				t.Fatalf("Split(%q) is empty", s)
			}
			return
		}
		again, _, err := Split(strings.Join(parts, ","))
		if err != nil {
			t.Fatalf("Split(%q), joined again: %v", s, err)
		}
		for i := range settings {
			settings[i].Bare = false
		}
		if d := cmp.Diff(settings, again); d != "" {
			t.Fatalf("Split(%q), joined and split again: %s", s, d)
		}
	})
}

func TestMerge(t *testing.T) {
	a := []Setting{{Key: "a", Value: "1"}, {Key: "b", Value: "2"}, {Key: "a", Value: "3"}}
	b := []Setting{{Key: "c", Value: "4"}, {Key: "b", Value: "5"}}
	want := []Setting{{Key: "a", Value: "3"}, {Key: "c", Value: "4"}, {Key: "b", Value: "5"}}
	if d := cmp.Diff(want, Merge(a, b)); d != "" {
		t.Error(d)
	}
	if got := Merge(); len(got) != 0 {
		t.Errorf("Merge() = %v", got)
	}
}

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
	tib = 1 << 40
	pib = 1 << 50
	eib = 1 << 60
)

// Each of these was given to qemu-img 7.2, and TestParseSizeIsQemuImgs does so
// again.
var sizes = []struct {
	in   string
	want uint64
	err  error
}{
	{in: "0"}, {in: "00"}, {in: "0b"}, {in: "0x0"},
	{in: "1", want: 1}, {in: "1b", want: 1}, {in: "1B", want: 1},
	{in: "1k", want: kib}, {in: "1K", want: kib},
	{in: "1m", want: mib}, {in: "1M", want: mib},
	{in: "1g", want: gib}, {in: "1G", want: gib},
	{in: "1t", want: tib}, {in: "1T", want: tib},
	{in: "1p", want: pib}, {in: "1P", want: pib},
	{in: "1e", want: eib}, {in: "1E", want: eib},
	{in: "1.5G", want: 3 * gib / 2}, {in: "0.5k", want: 512}, {in: "1.5E", want: 3 * eib / 2}, {in: "1.5e", want: 3 * eib / 2},
	{in: "1.00001k", want: kib}, {in: "1.123456789k", want: 1150}, {in: "1.9999999999999999k", want: 2 * kib},
	{in: "1.0000000000000001E", want: 1152921504606847091},
	{in: "1.", want: 1}, {in: "1.0", want: 1}, {in: "1.00b", want: 1}, {in: "1.M", want: mib}, {in: "1.e", want: eib},
	{in: "0.0000000000000000000000001"},
	{in: "010", want: 10},
	{in: "0x10", want: 16}, {in: "0X10", want: 16}, {in: "0x1E", want: 30}, {in: "0x1b", want: 27},
	{in: "0x10k", want: 16 * kib}, {in: "0x10G", want: 16 * gib},
	{in: "+1", want: 1}, {in: "+1M", want: mib}, {in: "+0x10", want: 16}, {in: " 1M", want: mib}, {in: "\t1k", want: kib},
	{in: "7E", want: 7 * eib}, {in: "8E", want: 8 * eib}, {in: "16383P", want: 16383 * pib},
	{in: "9223372036854775807", want: math.MaxInt64}, {in: "9223372036854775808", want: 1 << 63},

	{in: "", err: ErrSyntax}, {in: "foo", err: ErrSyntax}, {in: "b", err: ErrSyntax}, {in: "k", err: ErrSyntax},
	{in: "-1", err: ErrSyntax}, {in: "-1M", err: ErrSyntax}, {in: "-0", err: ErrSyntax}, {in: "+-1", err: ErrSyntax},
	{in: "++1", err: ErrSyntax}, {in: "+ 1", err: ErrSyntax}, {in: "1 ", err: ErrSyntax}, {in: "1M ", err: ErrSyntax},
	{in: "1.5", err: ErrSyntax}, {in: "1.5b", err: ErrSyntax}, {in: ".5M", err: ErrSyntax}, {in: "1.5.5", err: ErrSyntax},
	{in: "1. 5k", err: ErrSyntax}, {in: "1.+5k", err: ErrSyntax}, {in: "1.-5k", err: ErrSyntax},
	{in: "1MB", err: ErrSyntax}, {in: "1MiB", err: ErrSyntax}, {in: "1kk", err: ErrSyntax}, {in: "1s", err: ErrSyntax},
	{in: "1e3", err: ErrSyntax}, {in: "1.5e3", err: ErrSyntax}, {in: "1.5E+", err: ErrSyntax}, {in: "1.e5", err: ErrSyntax},
	{in: "0x", err: ErrSyntax}, {in: "0x1.8", err: ErrSyntax}, {in: "0x1p3", err: ErrSyntax}, {in: "00x10", err: ErrSyntax},
	{in: "0x0x1", err: ErrSyntax}, {in: "0xg", err: ErrSyntax}, {in: "1.0x1k", err: ErrSyntax}, {in: "0b1", err: ErrSyntax},
	{in: "1_0", err: ErrSyntax}, {in: "0x1_0", err: ErrSyntax}, {in: "inf", err: ErrSyntax}, {in: "nan", err: ErrSyntax}, {in: "1.inf", err: ErrSyntax},
	{in: "99999999999999999999M", err: ErrSyntax}, {in: "99999999999999999999x", err: ErrSyntax}, {in: "0x10000000000000000k", err: ErrSyntax},

	{in: "16E", err: ErrRange}, {in: "16384P", err: ErrRange}, {in: "18446744073709551616", err: ErrRange},
	{in: "99999999999999999999", err: ErrRange}, {in: "0x10000000000000000", err: ErrRange},
}

func TestParseSize(t *testing.T) {
	for _, tt := range sizes {
		got, err := ParseSize(tt.in)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("ParseSize(%q) = %d, %v; want %d, %v", tt.in, got, err, tt.want, tt.err)
		}
	}
	// Where qemu-img takes the largest number for "none given", and a fraction
	// that rounds to one for zero, we do not follow it.
	for _, tt := range []struct {
		in   string
		want uint64
		err  error
	}{
		{in: "18446744073709551615", want: math.MaxUint64},
		{in: "1.99999999999999999999k", want: 2 * kib},
		{in: "1.99999999999999999999", err: ErrSyntax},
		{in: "15.99999999999999999999E", err: ErrRange},
	} {
		got, err := ParseSize(tt.in)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("ParseSize(%q) = %d, %v; want %d, %v", tt.in, got, err, tt.want, tt.err)
		}
	}
}

func TestParseSizeIsQemuImgs(t *testing.T) {
	tool, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Fatal("qemu-img is needed (Debian package qemu-utils)")
	}
	file := filepath.Join(t.TempDir(), "x.raw")
	printed := regexp.MustCompile(` size=(-?\d+)\n`)
	for _, tt := range sizes {
		// Huge sizes fail after the line with the parsed number is out.
		out, _ := exec.Command(tool, "create", "-f", "raw", "-o", "size="+strings.ReplaceAll(tt.in, ",", ",,"), file).CombinedOutput()
		var got string
		switch text := string(out); {
		case strings.Contains(text, "expects a non-negative number"):
			got = "syntax"
		case strings.Contains(text, "is out of range for parameter"):
			got = "range"
		case printed.MatchString(text):
			n, err := strconv.ParseInt(printed.FindStringSubmatch(text)[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			got = strconv.FormatUint(uint64(n), 10)
		default:
			t.Fatalf("size=%q: qemu-img says %q", tt.in, text)
		}
		want := strconv.FormatUint(tt.want, 10)
		if tt.err == ErrSyntax {
			want = "syntax"
		} else if tt.err == ErrRange {
			want = "range"
		}
		if got != want {
			t.Errorf("size=%q: qemu-img finds %s, want %s", tt.in, got, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, tt := range sizes {
		f.Add(tt.in)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseSize(s)
		if err != nil {
			if v != 0 || err != ErrSyntax && err != ErrRange {
				t.Fatalf("ParseSize(%q) = %d, %v", s, v, err)
			}
			return
		}
		if back, err := ParseSize(formatSize(v)); err != nil || back != v {
			t.Fatalf("ParseSize(%q) = %d; formatted %q gives %d, %v", s, v, formatSize(v), back, err)
		}
		if strings.ContainsAny(s, "-_") {
			t.Fatalf("ParseSize(%q) = %d", s, v)
		}
		if n, err := strconv.ParseUint(s, 10, 64); err == nil && n != v {
			t.Fatalf("ParseSize(%q) = %d", s, v)
		}
	})
}

func TestParseUint(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want uint64
		err  error
	}{
		{in: "0"}, {in: "16", want: 16}, {in: "0x10", want: 16}, {in: "010", want: 8}, {in: "+8", want: 8}, {in: " 8", want: 8},
		{in: "18446744073709551615", want: math.MaxUint64},
		{in: "18446744073709551616", err: ErrRange},
		{in: "", err: ErrSyntax}, {in: "foo", err: ErrSyntax}, {in: "16k", err: ErrSyntax}, {in: "16.5", err: ErrSyntax},
		{in: "-1", err: ErrSyntax}, {in: "8 ", err: ErrSyntax}, {in: "08", err: ErrSyntax}, {in: "1_0", err: ErrSyntax}, {in: "0x", err: ErrSyntax},
	} {
		got, err := ParseUint(tt.in)
		if err == nil && tt.err != nil || err != nil && !errors.Is(err, tt.err) || err == nil && got != tt.want {
			t.Errorf("ParseUint(%q) = %d, %v; want %d, %v", tt.in, got, err, tt.want, tt.err)
		}
	}
}

func FuzzParseUint(f *testing.F) {
	for _, s := range []string{"0", "16", "0x10", "010", "-1", "", "18446744073709551616", " 8"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseUint(s)
		if err != nil {
			return
		}
		if back, err := ParseUint(strconv.FormatUint(v, 10)); err != nil || back != v {
			t.Fatalf("ParseUint(%q) = %d, which gives %d, %v", s, v, back, err)
		}
	})
}

func TestParseBool(t *testing.T) {
	for _, s := range []string{"on", "ON", "On", "true", "TRUE", "yes", "Yes", "y", "Y"} {
		if v, err := ParseBool(s); err != nil || !v {
			t.Errorf("ParseBool(%q) = %v, %v", s, v, err)
		}
	}
	for _, s := range []string{"off", "OFF", "false", "False", "no", "NO", "n", "N"} {
		if v, err := ParseBool(s); err != nil || v {
			t.Errorf("ParseBool(%q) = %v, %v", s, v, err)
		}
	}
	for _, s := range []string{"", "1", "0", "t", "f", "on ", "enable"} {
		if v, err := ParseBool(s); err == nil {
			t.Errorf("ParseBool(%q) = %v", s, v)
		}
	}
}

func FuzzParseBool(f *testing.F) {
	for _, s := range []string{"on", "OFF", "", "1", "yes"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		v, err := ParseBool(s)
		if err != nil {
			return
		}
		if again, err := ParseBool(onOff(v)); err != nil || again != v {
			t.Fatalf("ParseBool(%q) = %v", s, v)
		}
	})
}

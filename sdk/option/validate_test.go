package option

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// schemas resemble those of the five formats, so that the tests do not follow
// each change of a plugin.
var schemas = map[string]Schema{
	"raw": {
		{Name: "size", Type: Size, Help: "Virtual disk size"},
		{Name: "preallocation", Type: Enum, Allowed: []string{"off", "falloc", "full"}},
	},
	"qcow2": {
		{Name: "encrypt.*", Disposition: Deferred, Reason: "encrypted images are future work"},
		{Name: "encryption", Type: Bool, Disposition: Deferred, Reason: "encrypted images are future work"},
		{Name: "cluster_size", Type: Size, Default: "65536", Min: 512, Max: 2 << 20, PowerOfTwo: true,
			RangeText: "Cluster size must be a power of two between 512 and 2048k", Help: "qcow2 cluster size"},
		{Name: "extended_l2", Type: Bool, Default: "off", Help: "Extended L2 tables"},
		{Name: "preallocation", Type: Enum, Allowed: []string{"off", "metadata", "falloc", "full"}, Help: "Preallocation mode (allowed values: off, metadata, falloc, full)"},
		{Name: "compression_type", Type: Enum, Default: "zlib", Allowed: []string{"zlib", "zstd"}, Help: "Compression method used for image cluster compression"},
		{Name: "size", Type: Size, Help: "Virtual disk size"},
		{Name: "compat", Type: Enum, Allowed: []string{"0.10", "1.1"}, Synonyms: map[string]string{"v2": "0.10", "v3": "1.1"},
			RangeText: "Parameter 'version' does not accept value '%s'", Help: "Compatibility level (v2 [0.10] or v3 [1.1])"},
		{Name: "backing_file", Help: "File name of a base image"},
		{Name: "backing_fmt", Help: "Image format of the base image"},
		{Name: "data_file", Disposition: Deferred, Reason: "external data files are deferred", Help: "File name of an external data file"},
		{Name: "lazy_refcounts", Type: Bool, Default: "off", Help: "Postpone refcount updates"},
		{Name: "refcount_bits", Type: Uint, Default: "16", Min: 1, Max: 64, PowerOfTwo: true,
			RangeText: "Refcount width must be a power of two and may not exceed 64 bits", Help: "Width of a reference count entry in bits"},
		{Name: "nocow", Type: Bool, Help: "Turn off copy-on-write (valid only on btrfs)"},
	},
	"vmdk": {
		{Name: "size", Type: Size},
		{Name: "adapter_type", Type: Enum, Allowed: []string{"ide", "lsilogic", "buslogic", "legacyESX"}, RangeText: "invalid parameter value: %s"},
		{Name: "subformat", Type: Enum, FoldCase: true, Allowed: []string{"monolithicSparse", "monolithicFlat", "streamOptimized"}},
		{Name: "grain_size", Type: Size, Min: 4096, Max: 1 << 30, PowerOfTwo: true, Extra: true, Help: "Grain size"},
	},
	"vpc": {
		{Name: "size", Type: Size},
		{Name: "force_size_calc", Type: Bool, Disposition: Ignored},
	},
	"vhdx": {
		{Name: "size", Type: Size},
		{Name: "block_size", Type: Size, Default: "0", Min: 1 << 20, Max: 256 << 20, PowerOfTwo: true, ZeroOK: true},
		{Name: "log_size", Type: Size, Default: "1048576", Min: 1 << 20},
	},
}

func validate(t *testing.T, target string, lists ...string) (Values, error) {
	t.Helper()
	var all []Setting
	for _, l := range lists {
		s, _, err := Split(l)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s...)
	}
	return schemas[target].Validate(target, all)
}

func TestNothingGivenMeansDefaults(t *testing.T) {
	for target, want := range map[string]Values{
		"raw":  nil,
		"vpc":  nil,
		"vmdk": nil,
		"vhdx": {{Key: "block_size", Type: Size}, {Key: "log_size", Type: Size, Uint: 1 << 20}},
		"qcow2": {
			{Key: "cluster_size", Type: Size, Uint: 65536},
			{Key: "extended_l2", Type: Bool},
			{Key: "compression_type", Type: Enum, String: "zlib"},
			{Key: "lazy_refcounts", Type: Bool},
			{Key: "refcount_bits", Type: Uint, Uint: 16},
		},
	} {
		got, err := validate(t, target)
		if err != nil {
			t.Errorf("%s: %v", target, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", target, d)
		}
	}
}

func TestEveryKeySetsItsValue(t *testing.T) {
	for _, tt := range []struct {
		target, in string
		want       Value
	}{
		{"raw", "size=1M", Value{Type: Size, Uint: 1 << 20}},
		{"raw", "preallocation=falloc", Value{Type: Enum, String: "falloc"}},
		{"qcow2", "cluster_size=4k", Value{Type: Size, Uint: 4096}},
		{"qcow2", "extended_l2=on", Value{Type: Bool, Bool: true}},
		{"qcow2", "extended_l2=YES", Value{Type: Bool, Bool: true, Text: "YES"}},
		{"qcow2", "extended_l2", Value{Type: Bool, Bool: true}},
		{"qcow2", "lazy_refcounts=off", Value{Type: Bool}},
		{"qcow2", "nolazy_refcounts", Value{Key: "lazy_refcounts", Type: Bool}},
		{"qcow2", "nocow", Value{Type: Bool, Bool: true}},
		{"qcow2", "preallocation=metadata", Value{Type: Enum, String: "metadata"}},
		{"qcow2", "compression_type=zstd", Value{Type: Enum, String: "zstd"}},
		{"qcow2", "size=1.5G", Value{Type: Size, Uint: 3 << 29}},
		{"qcow2", "compat=0.10", Value{Type: Enum, String: "0.10"}},
		{"qcow2", "compat=v3", Value{Type: Enum, String: "1.1", Text: "v3"}},
		{"qcow2", "backing_file=a,,b", Value{Type: String, String: "a,b"}},
		{"qcow2", "backing_fmt=raw", Value{Type: String, String: "raw"}},
		{"qcow2", "refcount_bits=0x8", Value{Type: Uint, Uint: 8}},
		{"qcow2", "encryption=off", Value{Type: Bool}},
		{"vmdk", "subformat=monolithicFlat", Value{Type: Enum, String: "monolithicFlat"}},
		{"vmdk", "subformat=MONOLITHICSPARSE", Value{Type: Enum, String: "monolithicSparse", Text: "MONOLITHICSPARSE"}},
		{"vmdk", "adapter_type=legacyESX", Value{Type: Enum, String: "legacyESX"}},
		{"vmdk", "grain_size=64k", Value{Type: Size, Uint: 65536}},
		{"vpc", "force_size_calc", Value{Type: Bool, Bool: true}},
		{"vhdx", "block_size=0", Value{Type: Size}},
		{"vhdx", "log_size=3M", Value{Type: Size, Uint: 3 << 20}},
	} {
		got, err := validate(t, tt.target, tt.in)
		if err != nil {
			t.Errorf("%s %s: %v", tt.target, tt.in, err)
			continue
		}
		if tt.want.Key == "" {
			tt.want.Key, _, _ = strings.Cut(tt.in, "=")
		}
		tt.want.Set = true
		v, ok := got.Lookup(tt.want.Key)
		if d := cmp.Diff(tt.want, v); !ok || d != "" {
			t.Errorf("%s %s: found %v: %s", tt.target, tt.in, ok, d)
		}
		for _, other := range got {
			if other.Set && other.Key != tt.want.Key {
				t.Errorf("%s %s: %s is set too", tt.target, tt.in, other.Key)
			}
		}
	}
}

const notASize = "expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."

func TestRefusals(t *testing.T) {
	const acceptedQcow2 = "backing_file, backing_fmt, cluster_size, compat, compression_type, extended_l2, lazy_refcounts, nocow, preallocation, refcount_bits, size"
	for _, tt := range []struct{ target, in, want string }{
		// Unknown keys.
		{"qcow2", "bogus=1", `unrecognised -o key "bogus" for target qcow2 (accepted keys: ` + acceptedQcow2 + ")"},
		{"qcow2", "clustersize=1", `unrecognised -o key "clustersize" for target qcow2 (accepted keys: ` + acceptedQcow2 + `); did you mean "cluster_size"?`},
		{"raw", "cluster_size=4k", `unrecognised -o key "cluster_size" for target raw (accepted keys: preallocation, size)`},
		{"raw", "Size=4k", `unrecognised -o key "Size" for target raw (accepted keys: preallocation, size); did you mean "size"?`},
		{"vpc", "nosize", `unrecognised -o key "nosize" for target vpc (accepted keys: force_size_calc, size); did you mean "size"?`},
		{"vpc", "noforce_size_calc=on", `unrecognised -o key "noforce_size_calc" for target vpc (accepted keys: force_size_calc, size); did you mean "force_size_calc"?`},
		{"raw", "=5", `unrecognised -o key "" for target raw (accepted keys: preallocation, size)`},
		// Bad values, qemu-img's texts.
		{"qcow2", "cluster_size=foo", "Parameter 'cluster_size' " + notASize},
		{"qcow2", "cluster_size=-4k", "Parameter 'cluster_size' " + notASize},
		{"qcow2", "cluster_size", "Parameter 'cluster_size' " + notASize},
		{"qcow2", "size=16E", "Value '16E' is out of range for parameter 'size'"},
		{"qcow2", "lazy_refcounts=1", "Parameter 'lazy_refcounts' expects 'on' or 'off'"},
		{"qcow2", "lazy_refcounts=", "Parameter 'lazy_refcounts' expects 'on' or 'off'"},
		{"qcow2", "refcount_bits=16k", "Parameter 'refcount_bits' expects a number"},
		{"qcow2", "refcount_bits=", "Parameter 'refcount_bits' expects a number"},
		{"qcow2", "refcount_bits=18446744073709551617", "Value '18446744073709551617' is too large for parameter 'refcount_bits'"},
		{"qcow2", "refcount_bits=-1", "Refcount width must be a power of two and may not exceed 64 bits"},
		{"qcow2", "refcount_bits=--1", "Parameter 'refcount_bits' expects a number"},
		{"qcow2", "refcount_bits=3", "Refcount width must be a power of two and may not exceed 64 bits"},
		{"qcow2", "refcount_bits=0", "Refcount width must be a power of two and may not exceed 64 bits"},
		{"qcow2", "refcount_bits=128", "Refcount width must be a power of two and may not exceed 64 bits"},
		{"qcow2", "cluster_size=1000", "Cluster size must be a power of two between 512 and 2048k"},
		{"qcow2", "cluster_size=256", "Cluster size must be a power of two between 512 and 2048k"},
		{"qcow2", "cluster_size=4M", "Cluster size must be a power of two between 512 and 2048k"},
		{"qcow2", "compat=foo", "Parameter 'version' does not accept value 'foo'"},
		{"qcow2", "compression_type=ZLIB", "Parameter 'compression-type' does not accept value 'ZLIB'"},
		{"qcow2", "preallocation=", "Parameter 'preallocation' does not accept value ''"},
		{"vmdk", "adapter_type=IDE", "invalid parameter value: IDE"},
		// Bad values, our texts.
		{"vmdk", "grain_size=3000", "-o grain_size=3000: must be a power of two from 4k to 1G"},
		{"vhdx", "block_size=3M", "-o block_size=3M: must be a power of two from 1M to 256M, or 0"},
		{"vhdx", "log_size=1000", "-o log_size=1000: must be a size from 1M up"},
		// Deferred keys.
		{"qcow2", "encrypt.cipher=aes", `-o key "encrypt.cipher" for target qcow2 is not supported yet: encrypted images are future work`},
		{"qcow2", "encrypt.format=luks,encrypt.key-secret=s", `-o key "encrypt.format" for target qcow2 is not supported yet: encrypted images are future work`},
		{"qcow2", "encryption=on", `-o key "encryption" for target qcow2 is not supported yet: encrypted images are future work`},
		{"qcow2", "data_file=x", `-o key "data_file" for target qcow2 is not supported yet: external data files are deferred`},
		// A bad value is bad even where another one overrides it.
		{"qcow2", "cluster_size=foo,cluster_size=64k", "Parameter 'cluster_size' " + notASize},
	} {
		_, err := validate(t, tt.target, tt.in)
		if err == nil || err.Error() != tt.want {
			t.Errorf("%s %s:\n got %v\nwant %s", tt.target, tt.in, err, tt.want)
		}
		var oe *Error
		if key, _, _ := strings.Cut(tt.in, "="); err != nil && (!errors.As(err, &oe) || oe.Key != key) {
			t.Errorf("%s %s: error %#v", tt.target, tt.in, err)
		}
	}
}

func TestLastValueWins(t *testing.T) {
	for _, tt := range []struct {
		lists []string
		want  uint64
	}{
		{[]string{"cluster_size=4k,cluster_size=128k"}, 128 << 10},
		{[]string{"cluster_size=4k", "cluster_size=8k"}, 8 << 10},
		{[]string{"cluster_size=4k", "lazy_refcounts=on", "cluster_size=16k"}, 16 << 10},
		// Out of bounds, but overridden.
		{[]string{"cluster_size=1000,cluster_size=2k"}, 2 << 10},
	} {
		got, err := validate(t, "qcow2", tt.lists...)
		if err != nil || got.UintOr("cluster_size", 0) != tt.want {
			t.Errorf("%q: %d, %v", tt.lists, got.UintOr("cluster_size", 0), err)
		}
	}
	for in, want := range map[string]bool{
		"lazy_refcounts=on,nolazy_refcounts":                  false,
		"nolazy_refcounts,lazy_refcounts":                     true,
		"nolazy_refcounts,lazy_refcounts=on,nolazy_refcounts": false,
	} {
		got, err := validate(t, "qcow2", in)
		if err != nil || got.BoolOr("lazy_refcounts", !want) != want {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
}

func TestValuesAreInSchemaOrder(t *testing.T) {
	got, err := validate(t, "qcow2", "refcount_bits=8,size=1M,nocow=on,cluster_size=4k")
	if err != nil {
		t.Fatal(err)
	}
	var keys []string
	for _, v := range got {
		keys = append(keys, v.Key)
	}
	want := "cluster_size extended_l2 compression_type size lazy_refcounts refcount_bits nocow"
	if strings.Join(keys, " ") != want {
		t.Errorf("got %v, want %s", keys, want)
	}
}

func TestFamilyOfHonouredKeys(t *testing.T) {
	s := Schema{{Name: "x.*", Type: Uint}, {Name: "x.one", Type: Bool}}
	settings, _, _ := Split("x.b=2,x.one=on,x.a=1")
	got, err := s.Validate("t", settings)
	if err != nil {
		t.Fatal(err)
	}
	want := Values{
		{Key: "x.b", Type: Uint, Uint: 2, Set: true}, {Key: "x.a", Type: Uint, Uint: 1, Set: true},
		{Key: "x.one", Type: Bool, Bool: true, Set: true},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestBadDefaultIsAnError(t *testing.T) {
	s := Schema{{Name: "n", Type: Uint, Default: "many"}}
	if _, err := s.Validate("t", nil); err == nil || !strings.Contains(err.Error(), "default of n") {
		t.Errorf("got %v", err)
	}
}

func TestErrorQuotesControlCharacters(t *testing.T) {
	e := &Error{Key: "k", Value: "a\x1b[31m", Reason: "is bad", Accepted: []string{"x", "y"}}
	if want := `-o k="a\x1b[31m": is bad (accepted: x, y)`; e.Error() != want {
		t.Errorf("got %s, want %s", e, want)
	}
}

func TestNearest(t *testing.T) {
	for typed, want := range map[string]string{
		"cluster-size": "cluster_size", "clustre_size": "cluster_size", "CLUSTER_SIZE": "cluster_size", "siez": "size",
		"lazy_refcount": "lazy_refcounts", "backing": "", "xyzzy": "", "": "", "data_fil": "", strings.Repeat("size", 1000): "",
	} {
		if got := schemas["qcow2"].nearest(typed); got != want {
			t.Errorf("nearest(%q) = %q, want %q", typed, got, want)
		}
	}
}

// Whatever is given, Validate gives values in schema order or an *Error.
func FuzzValidate(f *testing.F) {
	f.Add("qcow2", "cluster_size=4k,lazy_refcounts")
	f.Add("vmdk", "subformat=STREAMoptimized,grain_size=64k")
	f.Add("vhdx", "block_size=0,log_size=1M,noblock")
	f.Fuzz(func(t *testing.T, target, list string) {
		s, ok := schemas[target]
		if !ok {
			return
		}
		settings, _, err := Split(list)
		if err != nil {
			return
		}
		values, err := s.Validate(target, settings)
		if err != nil {
			var oe *Error
			if !errors.As(err, &oe) || oe.Error() == "" {
				t.Fatalf("%q: error %#v", list, err)
			}
			return
		}
		next := 0
		for _, v := range values {
			for next < len(s) && !s[next].Matches(v.Key) {
				next++
			}
			if next == len(s) {
				t.Fatalf("%q: %v is out of order", list, v)
			}
		}
	})
}

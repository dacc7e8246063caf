package main

import (
	"io"
	"strings"
	"testing"
)

func TestNormalise(t *testing.T) {
	for line, want := range map[string]string{
		"info a":                                   "info -- a",
		"-v info -Uf qcow2 a":                      "info --verbose --force-share --format=qcow2 -- a",
		"info a --form=qcow2 -- -b":                "info --format=qcow2 -- a -b",
		"info --untrusted=false a":                 "info --untrusted=false -- a",
		"info -f=x a":                              "info --format==x -- a",
		"create --extended-l2 --cluster-size 4k a": "create --extended-l2 --cluster-size=4k -- a",
		"convert --rate 1M --par 2 a b":            "convert --rate-limit=1M --coroutines=2 -- a b",
		"convert --b a b":                          "convert --bitmaps -- a b", // 10.0: ambiguous
		"convert -p json b":                        "convert --progress -- json b",
		"convert --progress json a b":              "convert --progress=json -- a b",
		"convert --progress=json a b":              "convert --progress=json -- a b",
		"convert --progress a b":                   "convert --progress -- a b",
		"convert --progress ./json b":              "convert --progress -- ./json b",
		"convert --prog json a b":                  "convert --progress=json -- a b",
		"convert a b --progress":                   "convert --progress -- a b",
		"dd -f raw if=a of=b":                      "dd --format=raw -- if=a of=b",
		"-T x map a":                               "map -- a",
		"--vers info a":                            "--version",
		"plugin info qcow2":                        "plugin info qcow2",
		"__complete info --form":                   "__complete info --form",
		"snapshot -c one a":                        "snapshot",
	} {
		a := &app{name: "instar", out: io.Discard, err: io.Discard}
		got, err := normalise(a.rootCommand(), strings.Fields(line))
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%s: %q %v, want %q", line, got, err, want)
		}
	}
	for line, want := range map[string]string{
		"info --untrust a":    "unrecognized option '--untrust'", // ours: in full
		"info --b=1 a":        "unrecognized option '--b=1'",
		"measure --o a":       "option '--o' is ambiguous; possibilities: '--object' '--options' '--output'",
		"info -Ux a":          "unrecognized option '-x'",
		"info --format":       "missing argument for option '--format'",
		"info a -Uf":          "missing argument for option '-Uf'",
		"-q info a":           "unrecognized option '-q'",
		"compare -\u00e9 a b": "unrecognized option '-\u00e9'",
	} {
		a := &app{name: "instar", out: io.Discard, err: io.Discard}
		if got, err := normalise(a.rootCommand(), strings.Fields(line)); err == nil || err.Error() != want {
			t.Errorf("%s: %q %v, want %q", line, got, err, want)
		}
	}
}

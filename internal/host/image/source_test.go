package image

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/instar-img/instar/sdk"
)

func TestParseImageOptions(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Source
	}{
		{"driver=qcow2,file.filename=a", Source{Path: "a", Format: "qcow2"}},
		{"driver=qcow2,file.driver=file,file.filename=a,,b", Source{Path: "a,b", Format: "qcow2"}},
		{"file.filename=a,force-share=on", Source{Path: "a", Access: Access{Shared: true}}},
		{"driver=file,filename=a", Source{Path: "a", Protocol: true}},
		{"driver=qcow2,file.filename=a,backing.driver=raw,backing.file.filename=b",
			Source{Path: "a", Format: "qcow2", Overrides: []Override{{Path: "b", Format: "raw"}}}},
		{"file.filename=a,backing.file.filename=b,backing.backing.file.filename=c,backing.backing.driver=raw",
			Source{Path: "a", Overrides: []Override{{Path: "b"}, {Path: "c", Format: "raw"}}}},
		{"driver=qcow2,file.filename=a,backing.backing.driver=raw,backing.backing.file.filename=b",
			Source{Path: "a", Format: "qcow2", Overrides: []Override{{}, {Path: "b", Format: "raw"}}}},
		{"file.filename=a,backing.driver=file,backing.filename=b",
			Source{Path: "a", Overrides: []Override{{Path: "b", Protocol: true}}}},
		{"driver=qcow2,file.driver=raw,file.file.filename=a", Source{Path: "a", Format: "qcow2", Through: []string{"raw"}}},
		{"file.filename=a,file.locking=off,read-only=on", Source{Path: "a", Access: Access{Unlocked: true, ReadOnly: true}}},
		{"file.filename=a,file.read-only=on,file.force-share=on", Source{Path: "a", Access: Access{Shared: true, ReadOnly: true}}},
		{"file.filename=a,read-only=off", Source{Path: "a", Access: Access{Writable: true}}},
		{"file.filename=a,discard=unmap,detect-zeroes=on,cache.direct=on,file.aio=threads,auto-read-only=on,node-name=n", Source{Path: "a"}},
		{"driver=raw,offset=1M,size=1k,file.filename=a", Source{Path: "a", Format: "raw", Own: map[string]string{"offset": "1M", "size": "1k"}}},
		{"file.filename=a,data-file.filename=b,data-file.locking=off", Source{Path: "a", Data: &Override{Path: "b", Access: Access{Unlocked: true}}}},
		{"file.filename=a,data-file.driver=raw,data-file.file.filename=b", Source{Path: "a", Data: &Override{Path: "b", Format: "raw"}}},
		{"file.filename=a,backing=", Source{Path: "a", Overrides: []Override{{None: true}}}},
	} {
		got, err := ParseImageOptions(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
		} else if diff := cmp.Diff(&c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.in, diff)
		}
	}
	for in, want := range map[string]string{
		"a.qcow2":                               "Cannot find device='a.qcow2' nor node-name='a.qcow2'",
		"driver=qcow2":                          "A block device must be specified",
		"":                                      "Must specify either driver or file",
		"filename=a":                            "Must specify either driver or file",
		"driver=qcow2,filename=a":               "A block device must be specified",
		"driver=,file.filename=a":               "Unknown driver ''",
		"driver=file":                           "The 'file' block driver requires a file name",
		"file.filename=":                        "The 'file' block driver requires a file name",
		"file.filename=a,read-only=x":           "Parameter 'read-only' expects 'on' or 'off'",
		"file.filename=a,file.locking=x":        "locking: invalid parameter value: x",
		"file.filename=a,discard=x":             "Invalid discard option",
		"file.filename=a,cache.x=on":            `image option "cache" is not supported`,
		"file.filename=a,a.b=on":                `image option "a" is not supported`,
		"file.filename=a,data-file=x":           "Cannot find device='x' nor node-name='x'",
		"file.filename=a,data-file.driver=file": "data-file: The 'file' block driver requires a file name",
		"file.filename=a,data-file.driver=raw,data-file.offset=1,data-file.file.filename=b": "data-file: options of its format",
		"file.driver=nbd,file.filename=a":  "file.driver=nbd is not supported",
		"file=x,file.filename=a":           "given both as a value and as a node",
		"file.filename=a,backing=node":     "node names have no meaning",
		"file.filename=a,force-share=some": "Parameter 'force-share' expects 'on' or 'off'",
	} {
		if _, err := ParseImageOptions(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}

func TestParseName(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Source
	}{
		{"a.qcow2", Source{Path: "a.qcow2"}},
		{"file:a.qcow2", Source{Path: "a.qcow2"}},
		{"dir/json:{}", Source{Path: "dir/json:{}"}},
		{`json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}`, Source{Path: "a", Format: "qcow2"}},
		{`json:{"driver":"qcow2","file.filename":"a"}`, Source{Path: "a", Format: "qcow2"}},
		{`json:{'driver':'qcow2','file':{'filename':'a"\'b'}}`, Source{Path: `a"'b`, Format: "qcow2"}},
		{`json:{"driver":"qcow2","read-only":true,"file.filename":"\u0061'\""}`, Source{Path: `a'"`, Format: "qcow2", Access: Access{ReadOnly: true}}},
		{`json:{"file.filename":"a","offset":512,"x":true}`, Source{Path: "a", Own: map[string]string{"offset": "512", "x": "on"}}},
		{`json:{"file.filename":"a","backing":null}`, Source{Path: "a", Overrides: []Override{{None: true}}}},
		{`json:{"file.filename":"a","backing":{"driver":"raw","file":{"filename":"b"}}}`,
			Source{Path: "a", Overrides: []Override{{Path: "b", Format: "raw"}}}},
	} {
		got, err := ParseName(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
		} else if diff := cmp.Diff(&c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.in, diff)
		}
	}
	for in, want := range map[string]string{
		"json:{bad":                                          "Could not parse the JSON options",
		`json:{"file.filename":"a"}{}`:                       "Expecting at most one JSON value",
		`json:{"file.filename":"a"}}`:                        "Expecting at most one JSON value",
		`json:{"file.filename":"a"`:                          "Could not parse the JSON options",
		`json:{"driver":"a","driver":"b"}`:                   "duplicate key",
		`json:{"file.filename":"a","file":{"filename":"b"}}`: "given twice",
		`json:{"file.filename":1}`:                           "Invalid parameter type for 'filename', expected: string",
		`json:{"read-only":1,"file":{"filename":"a"}}`:       "Parameter 'read-only' expects 'on' or 'off'",
		"json:":                                "Expecting a JSON value",
		"json:null":                            "Invalid JSON object given",
		"json:[]":                              "Invalid JSON object given",
		"json:'x'":                             "Invalid JSON object given",
		"":                                     "requires a file name",
		`json:{"file.filename":["a"]}`:         "a list has no meaning here",
		`json:{"driver":"qcow2"}`:              "A block device must be specified",
		`json:{"file":"node"}`:                 "node names have no meaning",
		`json:{"file":{"filename":"a","x":1}}`: `"file.x" is not supported`,
	} {
		if _, err := ParseName(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}

func TestParseOutput(t *testing.T) {
	for _, c := range []struct{ in, want, fails string }{
		{in: "a.qcow2", want: "a.qcow2"},
		{in: "file:a.qcow2", want: "a.qcow2"},
		{in: "file:/a:b", want: "/a:b"},
		{in: "./a:b", want: "./a:b"},
		{in: "dir/nbd://x", want: "dir/nbd://x"},
		{in: "nbd:unix:/run/x", fails: "Unknown protocol 'nbd'"},
		{in: "rbd:pool/image", fails: "Unknown protocol 'rbd'"},
		{in: "json:{}", fails: "Unknown protocol 'json'"},
		{in: ":a", fails: "Unknown protocol ''"},
		{in: "file:", fails: "requires a file name"},
	} {
		got, err := ParseOutput(c.in)
		switch {
		case c.fails == "" && (err != nil || got != c.want):
			t.Errorf("%s: %q, %v, want %q", c.in, got, err, c.want)
		case c.fails != "" && (err == nil || !strings.Contains(err.Error(), c.fails)):
			t.Errorf("%s: %q, %v, want %q", c.in, got, err, c.fails)
		}
	}
}

func FuzzParseName(f *testing.F) {
	f.Add(`{"driver":"qcow2","file":{"filename":"a"},"backing":{"file.filename":"b"}}`)
	f.Add(`{'driver':'file','filename':'a\'"','read-only':true}`)
	f.Add(`{"driver":"qcow2","file":{"driver":"raw","file.filename":"a"},"cache":{"direct":"on"}}`)
	f.Add(`{"a.b.c":1,"a":{"b":null}}`)
	f.Fuzz(func(t *testing.T, s string) {
		source, err := ParseName("json:" + s)
		if err == nil && source.Path == "" {
			t.Errorf("no path out of %s", s)
		}
	})
}

func TestFindSnapshot(t *testing.T) {
	list := []sdk.Snapshot{{ID: "1", Name: "2"}, {ID: "2", Name: "two"}, {ID: "3", Name: "two"}}
	for which, want := range map[string]string{
		"1": "1", "two": "2", "2": "2", "3": "3",
		"snapshot.name=2":                 "1",
		"snapshot.id=2":                   "2",
		"snapshot.id=3,snapshot.name=two": "3",
	} {
		if got, err := FindSnapshot(list, which); err != nil || got != want {
			t.Errorf("%s: %q %v, want %q", which, got, err, want)
		}
	}
	for _, which := range []string{"4", "", "snapshot.name=1", "snapshot.id=1,snapshot.name=two"} {
		if got, err := FindSnapshot(list, which); !errors.Is(err, sdk.ErrNotFound) {
			t.Errorf("%s: %q %v", which, got, err)
		}
	}
	if _, err := FindSnapshot(list, "snapshot.color=blue"); err == nil || err.Error() != "Invalid parameter 'snapshot.color'" {
		t.Errorf("unknown key: %v", err)
	}
}

package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"strings"

	"github.com/instar-img/instar/sdk/option"
)

// Source says what a command line's image argument names.
type Source struct {
	Path   string
	Format string // empty: detect
	// Overrides are for the backing files, by depth.
	Overrides []Override
	Shared    bool // force-share
	// Protocol: the driver is that of the file itself, its content is not to be
	// looked at for a format.
	Protocol bool
}

// ParseImageOptions parses --image-opts: driver=FMT,file.filename=PATH and
// nested backing.* keys, as qemu-img takes them.
func ParseImageOptions(s string) (*Source, error) {
	settings, _, err := option.Split(s)
	if err != nil {
		return nil, err
	}
	if len(settings) > 0 && settings[0].Bare {
		return nil, fmt.Errorf("Cannot find device='%s' nor node-name='%[1]s'", settings[0].Key)
	}
	root := node{}
	for _, x := range settings {
		if err := root.set(strings.Split(x.Key, "."), x.Value); err != nil {
			return nil, err
		}
	}
	return root.source()
}

// jsonPrefix introduces a pseudo-protocol name. It has a meaning on the command
// line only.
const jsonPrefix = "json:"

// filePrefix may stand before a path on the command line.
const filePrefix = "file:"

// ParseName parses an image argument: a path, file:PATH, or json:{...}.
func ParseName(name string) (*Source, error) {
	rest, ok := strings.CutPrefix(name, jsonPrefix)
	if !ok {
		return &Source{Path: strings.TrimPrefix(name, filePrefix)}, nil
	}
	d := json.NewDecoder(bytes.NewReader([]byte(rest)))
	d.UseNumber()
	var tree map[string]any
	if err := d.Decode(&tree); err != nil {
		return nil, fmt.Errorf("Could not parse the JSON options: %w", err)
	}
	if d.More() {
		return nil, errors.New("Could not parse the JSON options: trailing text")
	}
	root := node{}
	if err := root.fill(tree); err != nil {
		return nil, err
	}
	return root.source()
}

// node is a tree of image options: values are strings and nodes.
type node map[string]any

// set puts a value at a dotted key.
func (n node) set(key []string, value string) error {
	if len(key) == 1 {
		n[key[0]] = value
		return nil
	}
	child, ok := n[key[0]].(node)
	if !ok {
		if _, taken := n[key[0]]; taken {
			return fmt.Errorf("%s is given both as a value and as a node", key[0])
		}
		child = node{}
		n[key[0]] = child
	}
	return child.set(key[1:], value)
}

// fill takes over a JSON object, in which keys may be dotted too.
func (n node) fill(tree map[string]any) error {
	keys := make([]string, 0, len(tree))
	for k := range tree {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	for _, k := range keys {
		path := strings.Split(k, ".")
		switch v := tree[k].(type) {
		case map[string]any:
			child := node{}
			if err := child.fill(v); err != nil {
				return err
			}
			at := n
			for _, p := range path[:len(path)-1] {
				next, ok := at[p].(node)
				if !ok {
					next = node{}
					at[p] = next
				}
				at = next
			}
			at[path[len(path)-1]] = child
		case nil:
			n[k] = nil
		case string:
			if err := n.set(path, v); err != nil {
				return err
			}
		case json.Number, bool:
			if err := n.set(path, fmt.Sprint(v)); err != nil {
				return err
			}
		default:
			return fmt.Errorf("json: %s: a list has no meaning here", k)
		}
	}
	return nil
}

// source interprets a tree.
func (n node) source() (*Source, error) {
	s := &Source{}
	if err := n.image(&s.Path, &s.Format, s); err != nil {
		return nil, err
	}
	for child, ok := n["backing"]; ok; {
		var over Override
		switch b := child.(type) {
		case nil:
			over.None = true
		case string:
			if b != "" {
				return nil, fmt.Errorf("backing=%s: node names have no meaning here, backing.file.filename=PATH is accepted", b)
			}
			over.None = true
		case node:
			if err := b.image(&over.Path, &over.Format, s); err != nil {
				return nil, fmt.Errorf("backing: %w", err)
			}
		}
		s.Overrides = append(s.Overrides, over)
		b, isNode := child.(node)
		if !isNode {
			break
		}
		child, ok = b["backing"]
	}
	return s, nil
}

// image interprets the keys of one image: driver, file and filename.
func (n node) image(path, format *string, s *Source) error {
	if d, ok := n["driver"].(string); ok {
		*format = d
	}
	for key, v := range n {
		switch key {
		case "driver", "backing", "node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "cache":
		case "force-share":
			on, err := option.ParseBool(fmt.Sprint(v))
			if err != nil {
				return fmt.Errorf("force-share: %w", err)
			}
			s.Shared = s.Shared || on
		case "filename":
			*path = fmt.Sprint(v)
		case "file":
			if err := n.file(v, path); err != nil {
				return err
			}
		default:
			return fmt.Errorf("image option %q is not supported (accepted: driver, file.filename, file.driver, filename, backing.*, force-share, read-only)", key)
		}
	}
	if *format == "file" || *format == "host_device" {
		s.Protocol = true // the bytes of the file as they are
		*format = ""
	}
	if *path == "" {
		return errors.New("A block device must be specified for \"file\"")
	}
	return nil
}

// file interprets the file child: a protocol node.
func (n node) file(v any, path *string) error {
	child, ok := v.(node)
	if !ok {
		return errors.New("file: node names have no meaning here, file.filename=PATH is accepted")
	}
	for key, v := range child {
		switch key {
		case "filename":
			*path = fmt.Sprint(v)
		case "driver":
			if d := fmt.Sprint(v); d != "file" && d != "host_device" {
				return fmt.Errorf("file.driver=%s is not supported (accepted: file, host_device)", d)
			}
		case "locking", "aio", "node-name", "read-only", "cache", "discard":
		default:
			return fmt.Errorf("image option \"file.%s\" is not supported (accepted: file.filename, file.driver)", key)
		}
	}
	return nil
}

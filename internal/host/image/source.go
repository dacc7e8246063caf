package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// Source says what a command line's image argument names.
type Source struct {
	Path   string
	Format string // empty: detect
	// Through are formats named between the image and its file, the outermost
	// first.
	Through []string
	// Protocol: the driver is that of the file itself, its content is not to be
	// looked at for a format.
	Protocol bool
	Access
	// Own are the options of the image's format, by key.
	Own map[string]string
	// Data is the file that holds the image's data, nil for the one it names itself.
	Data *Override
	// Overrides are for the backing files, by depth.
	Overrides []Override
}

// Access says how an image's file is opened.
type Access struct {
	Shared   bool // force-share=on: what others do with the file does not matter
	ReadOnly bool // read-only=on: it must not be opened for writing
	Writable bool // read-only=off, which cannot go with Shared
	Unlocked bool // locking=off: locks are neither taken nor respected
}

// Override replaces what an image says of its backing file.
type Override struct {
	Path, Format string // empty: as the image says
	Through      []string
	Protocol     bool
	None         bool // treat the image as if it had no backing file
	Access
	Own  map[string]string
	Data *Override
}

// errNoFile has qemu-img's words.
var errNoFile = errors.New("The 'file' block driver requires a file name")

// UnknownDriver is the error for the name of no format, in qemu-img's words.
func UnknownDriver(name string) error { return fmt.Errorf("Unknown driver '%s'", name) }

// ParseImageOptions parses --image-opts: driver=FMT,file.filename=PATH and
// nested backing.* keys, as qemu-img takes them.
func ParseImageOptions(s string) (*Source, error) {
	root := node{}
	if s == "" {
		return root.source()
	}
	settings, _, err := option.Split(s)
	if err != nil {
		return nil, err
	}
	if len(settings) > 0 && settings[0].Bare {
		return nil, fmt.Errorf("Cannot find device='%s' nor node-name='%[1]s'", settings[0].Key)
	}
	for _, x := range settings {
		if err := root.set(strings.Split(x.Key, "."), x.Value, false); err != nil {
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
		path := strings.TrimPrefix(name, filePrefix)
		if path == "" {
			return nil, errNoFile
		}
		return &Source{Path: path}, nil
	}
	value, err := parseJSON(rest)
	if err != nil {
		return nil, fmt.Errorf("Could not parse the JSON options: %w", err)
	}
	tree, ok := value.(map[string]any)
	if !ok {
		return nil, errors.New("Invalid JSON object given")
	}
	root := node{}
	if err := root.fill("", tree); err != nil {
		return nil, err
	}
	return root.source()
}

// ParseOutput returns the path that the name of a new image stands for: a path,
// or file:PATH. What else has a protocol before it is refused, in qemu-img's
// words: a caller that means a server must not get a file of that name. A path
// with a colon in its first part is written ./NAME.
func ParseOutput(name string) (string, error) {
	if path, ok := strings.CutPrefix(name, filePrefix); ok {
		if path == "" {
			return "", errNoFile
		}
		return path, nil
	}
	if protocol, ok := protocolOf(name); ok {
		return "", unknownProtocol(protocol)
	}
	return name, nil
}

// protocolOf returns what stands before the first colon of a name, if that is
// before the first slash.
func protocolOf(name string) (string, bool) {
	protocol, _, colon := strings.Cut(name, ":")
	return protocol, colon && !strings.Contains(protocol, "/")
}

func unknownProtocol(name string) error { return fmt.Errorf("Unknown protocol '%s'", name) }

// node is a tree of image options: values are nodes, strings, and what else
// JSON has.
type node map[string]any

// set puts a value at a dotted key. once refuses to replace one.
func (n node) set(key []string, value any, once bool) error {
	old, taken := n[key[0]]
	if len(key) == 1 {
		if _, isNode := old.(node); isNode || taken && once {
			return fmt.Errorf("%s is given twice", key[0])
		}
		n[key[0]] = value
		return nil
	}
	child, ok := old.(node)
	if !ok {
		if taken {
			return fmt.Errorf("%s is given both as a value and as a node", key[0])
		}
		child = node{}
		n[key[0]] = child
	}
	return child.set(key[1:], value, once)
}

// fill takes over a JSON object, in which keys may be dotted too. prefix stands
// before them, with its dot.
func (n node) fill(prefix string, tree map[string]any) error {
	for _, k := range slices.Sorted(maps.Keys(tree)) {
		v := tree[k]
		var err error
		switch v := v.(type) {
		case map[string]any:
			if len(v) > 0 {
				err = n.fill(prefix+k+".", v)
			} else {
				err = n.set(strings.Split(prefix+k, "."), node{}, true)
			}
		case []any:
			err = fmt.Errorf("json: %s: a list has no meaning here", prefix+k)
		default:
			err = n.set(strings.Split(prefix+k, "."), v, true)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// source interprets a tree.
func (n node) source() (*Source, error) {
	var top layerOptions
	_, hasDriver := n["driver"]
	if _, hasFile := n["file"]; !hasDriver && !hasFile {
		return nil, errors.New("Must specify either driver or file")
	}
	if err := n.image(&top); err != nil {
		return nil, err
	}
	switch {
	case top.path != "":
	case top.protocol || top.hasPath:
		return nil, errNoFile
	default:
		return nil, errors.New("A block device must be specified for \"file\"")
	}
	s := &Source{Path: top.path, Format: top.format, Through: top.through, Protocol: top.protocol, Access: top.access, Own: top.own, Data: top.data}
	for child, ok := n["backing"]; ok; {
		var over Override
		b, isNode := child.(node)
		switch {
		case isNode:
			var l layerOptions
			if err := b.image(&l); err != nil {
				return nil, fmt.Errorf("backing: %w", err)
			}
			if l.hasPath && l.path == "" {
				return nil, fmt.Errorf("backing: %w", errNoFile)
			}
			over = Override{Path: l.path, Format: l.format, Through: l.through, Protocol: l.protocol, Access: l.access, Own: l.own, Data: l.data}
		case child == nil || child == "":
			over.None = true
		default:
			return nil, fmt.Errorf("backing=%v: node names have no meaning here, backing.file.filename=PATH is accepted", child)
		}
		s.Overrides = append(s.Overrides, over)
		if !isNode {
			break
		}
		child, ok = b["backing"]
	}
	return s, nil
}

// layerOptions is what the options say of one image.
type layerOptions struct {
	path, format string
	hasPath      bool
	protocol     bool
	through      []string
	access       Access
	own          map[string]string
	data         *Override
}

// protocols are the drivers that are the file itself.
var protocols = []string{"file", "host_device"}

// image interprets the keys of one image.
func (n node) image(l *layerOptions) error {
	driver, given, err := n.text("driver")
	if err != nil {
		return err
	}
	if given && driver == "" {
		return UnknownDriver("")
	}
	if slices.Contains(protocols, driver) {
		l.protocol = true
		return n.file("", l)
	}
	l.format = driver
	for _, key := range slices.Sorted(maps.Keys(n)) {
		v := n[key]
		switch key {
		case "driver", "backing":
		case "filename":
			// Of a file's driver alone; without a file there is another error.
			if _, hasFile := n["file"]; hasFile {
				err = fmt.Errorf("image option %q is not supported (accepted: file.filename)", key)
			}
		case "file":
			err = fileNode(v, l)
		case string(sdk.RefData):
			err = dataNode(v, l)
		default:
			if err = n.common(key, l); errors.Is(err, errUnknownOption) {
				err = l.keep(key, v)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// keep notes an option of the format's own.
func (l *layerOptions) keep(key string, value any) error {
	var text string
	switch v := value.(type) {
	case string:
		text = v
	case bool:
		text = map[bool]string{true: "on", false: "off"}[v]
	case json.Number:
		text = v.String()
	default:
		return fmt.Errorf("image option %q is not supported (accepted: driver, file.filename, file.driver, file.locking, backing.*, data-file.*, force-share, read-only, those that only advise, and the format's own)", key)
	}
	if l.own == nil {
		l.own = map[string]string{}
	}
	l.own[key] = text
	return nil
}

// dataNode interprets what stands for the file with an image's data.
func dataNode(v any, l *layerOptions) error {
	child, ok := v.(node)
	if !ok {
		return fmt.Errorf("Cannot find device='%v' nor node-name='%[1]v'", v)
	}
	var data layerOptions
	var err error
	if _, nested := child["file"]; nested {
		err = child.image(&data)
	} else {
		if data.format, _, err = child.text("driver"); slices.Contains(protocols, data.format) {
			data.format = ""
		}
		if err == nil {
			err = child.file("data-file.", &data)
		}
	}
	switch {
	case err != nil:
		return fmt.Errorf("data-file: %w", err)
	case data.path == "":
		return fmt.Errorf("data-file: %w", errNoFile)
	case len(data.own) > 0 || data.data != nil:
		return errors.New("data-file: options of its format are not supported")
	}
	l.data = &Override{Path: data.path, Format: data.format, Through: data.through, Access: data.access}
	return nil
}

// fileNode interprets what stands below an image: its file, or another image.
func fileNode(v any, l *layerOptions) error {
	child, ok := v.(node)
	switch {
	case ok:
	case v == nil:
		return nil
	default:
		return fmt.Errorf("file=%v: node names have no meaning here, file.filename=PATH is accepted", v)
	}
	driver, given, err := child.text("driver")
	if err != nil {
		return err
	}
	inner, nested := child["file"]
	switch {
	case given && driver == "":
		return UnknownDriver("")
	case !given && nested:
		return errors.New("file.file: file.driver must say what lies between the image and its file")
	case !given || slices.Contains(protocols, driver):
		return child.file("file.", l)
	case !nested:
		return fmt.Errorf("file.driver=%s is not supported (accepted: %s; a format where file.file.filename=PATH follows)", driver, strings.Join(protocols, ", "))
	}
	l.through = append(l.through, driver)
	for _, key := range slices.Sorted(maps.Keys(child)) {
		if key == "driver" || key == "file" {
			continue
		}
		if err := child.common(key, l); errors.Is(err, errUnknownOption) {
			return fmt.Errorf("image option \"file.%s\" is not supported", key)
		} else if err != nil {
			return err
		}
	}
	return fileNode(inner, l)
}

// file interprets the keys of a file, prefix stands before them.
func (n node) file(prefix string, l *layerOptions) error {
	for _, key := range slices.Sorted(maps.Keys(n)) {
		var err error
		switch key {
		case "driver":
		case "filename":
			l.path, l.hasPath, err = n.text(key)
		case "locking":
			var value string
			if value, err = n.oneOf(key, "on", "off", "auto"); value == "off" {
				l.access.Unlocked = true
			}
		case "aio":
			_, err = n.oneOf(key, "threads", "native", "io_uring")
		case "drop-cache":
			_, err = n.onOff(key)
		default:
			if err = n.common(key, l); errors.Is(err, errUnknownOption) {
				err = fmt.Errorf("image option \"%s%s\" is not supported (accepted: %[1]sfilename, %[1]sdriver, %[1]slocking, %[1]sread-only, %[1]sforce-share, and those that only advise)", prefix, key)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

var errUnknownOption = errors.New("unknown option")

// common interprets what images and files have in common. Options that advise
// how to use the host are checked, and have no effect.
func (n node) common(key string, l *layerOptions) error {
	switch key {
	case "force-share":
		on, err := n.onOff(key)
		l.access.Shared = l.access.Shared || on
		return err
	case "read-only":
		on, err := n.onOff(key)
		l.access.ReadOnly = l.access.ReadOnly || on
		l.access.Writable = l.access.Writable || !on
		return err
	case "auto-read-only":
		_, err := n.onOff(key)
		return err
	case "node-name":
		_, _, err := n.text(key)
		return err
	case "discard":
		if _, err := n.oneOf(key, "ignore", "off", "unmap", "on"); err != nil {
			return errors.New("Invalid discard option")
		}
		return nil
	case "detect-zeroes":
		_, err := n.oneOf(key, "off", "on", "unmap")
		return err
	case "cache":
		cache, ok := n[key].(node)
		for _, k := range slices.Sorted(maps.Keys(cache)) {
			if k != "direct" && k != "no-flush" {
				return errUnknownOption
			}
			if _, err := cache.onOff(k); err != nil {
				return fmt.Errorf("Parameter 'cache.%s' expects 'on' or 'off'", k)
			}
		}
		if ok {
			return nil
		}
	}
	return errUnknownOption
}

// text returns the string at a key, and whether there is one.
func (n node) text(key string) (string, bool, error) {
	v, ok := n[key]
	if !ok {
		return "", false, nil
	}
	s, ok := v.(string)
	if !ok {
		return "", false, fmt.Errorf("Invalid parameter type for '%s', expected: string", key)
	}
	return s, true, nil
}

// onOff returns the switch at a key.
func (n node) onOff(key string) (bool, error) {
	switch v := n[key].(type) {
	case bool:
		return v, nil
	case string:
		if on, err := option.ParseBool(v); err == nil {
			return on, nil
		}
	}
	return false, fmt.Errorf("Parameter '%s' expects 'on' or 'off'", key)
}

// oneOf returns the word at a key, one of those that are accepted.
func (n node) oneOf(key string, accepted ...string) (string, error) {
	v, _, err := n.text(key)
	if err == nil && !slices.Contains(accepted, v) {
		err = fmt.Errorf("%s: invalid parameter value: %s (accepted: %s)", key, v, strings.Join(accepted, ", "))
	}
	return v, err
}

// Apply puts what a source says into the options to open it with.
func (s *Source) Apply(opts *Options) {
	opts.Format, opts.Through, opts.Protocol = s.Format, s.Through, s.Protocol
	opts.Access, opts.Overrides = s.Access, s.Overrides
	opts.Own, opts.Data = s.Own, s.Data
}

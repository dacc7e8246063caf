// Package discover finds format plugins and reads their manifests. It runs on
// every command and starts no plugin that has a manifest beside it.
package discover

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"sort"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/host/child"
	"github.com/instar-img/instar/sdk"
)

// Prefix of the names of plugin programs.
const Prefix = "instar-format-"

const (
	maxManifest = 1 << 20
	maxLinks    = 40
	askTimeout  = 10 * time.Second
)

// PathVariable is the environment variable with directories to search first.
const PathVariable = "INSTAR_PLUGIN_PATH"

// Plugin is a format plugin that can be launched.
type Plugin struct {
	Manifest     sdk.Manifest
	Path         string // of the program, absolute
	ManifestPath string // empty where the program itself was asked
	Dir          string // in which it was found
}

// Spec says how to run the program, without limits.
func (p *Plugin) Spec() child.Spec {
	return child.Spec{
		Path: p.Path, Roots: p.Manifest.RuntimeRoots, Protocols: []int{sdk.Protocol},
		Connected: p.Manifest.Connection == sdk.ConnectionInherited,
	}
}

// Set is what was found.
type Set struct {
	plugins []*Plugin
	dirs    []string
	refused []error
}

// Options says where to search.
type Options struct {
	// Dirs are searched in order; nil means the usual ones: those in
	// INSTAR_PLUGIN_PATH, the directory of Executable, its ../libexec/instar,
	// /usr/local/libexec/instar and /usr/libexec/instar.
	Dirs []string
	// Executable is the path of the running program, empty for os.Executable.
	// Where that fails, as on Linux without /proc, the directories that depend on
	// it are left out.
	Executable string
}

// Find searches for plugins. Of several with one name the first found counts.
// What is refused or broken is left out and listed by Refused.
func Find(o Options) (*Set, error) {
	s := &Set{}
	dirs := o.Dirs
	if dirs == nil {
		executable := o.Executable
		if executable == "" {
			var err error
			if executable, err = os.Executable(); err != nil {
				s.refused = append(s.refused, fmt.Errorf("plugins beside the program: %w", err))
			}
		}
		dirs = usualDirs(executable)
	}
	for _, dir := range dirs {
		s.addDir(dir)
	}
	sort.Slice(s.plugins, func(i, j int) bool {
		return s.plugins[i].Manifest.Name < s.plugins[j].Manifest.Name
	})
	return s, nil
}

// systemDirs are searched last, wherever the program is.
var systemDirs = []string{"/usr/local/libexec/instar", "/usr/libexec/instar"}

func usualDirs(executable string) []string {
	var dirs []string
	for _, d := range strings.Split(os.Getenv(PathVariable), ":") {
		if d != "" {
			dirs = append(dirs, d)
		}
	}
	if executable == "" {
		return append(dirs, systemDirs...)
	}
	// The link bin/qemu-img, or one in /usr/bin, leads to the real program.
	for range maxLinks {
		target, err := os.Readlink(executable)
		if err != nil {
			break
		}
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(executable), target)
		}
		executable = target
	}
	own := path.Dir(executable)
	dirs = append(dirs, own, path.Join(path.Dir(own), "libexec", "instar"))
	return append(dirs, systemDirs...)
}

// addDir adds the plugins of one directory.
func (s *Set) addDir(dir string) {
	dir, err := absolute(dir)
	if err != nil {
		s.refused = append(s.refused, err)
		return
	}
	for _, seen := range s.dirs {
		if seen == dir {
			return
		}
	}
	s.dirs = append(s.dirs, dir)
	info, err := os.Stat(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err == nil && !info.IsDir() {
		err = fmt.Errorf("plugin directory %s: not a directory", dir)
	}
	if err != nil {
		s.refused = append(s.refused, err)
		return
	}
	names, err := pluginNames(dir)
	if err != nil {
		s.refused = append(s.refused, err)
		return
	}
	if len(names) == 0 {
		return
	}
	if err := trusted(dir, info); err != nil {
		s.refused = append(s.refused, fmt.Errorf("plugin directory %w", err))
		return
	}
	for _, name := range names {
		if !strings.HasSuffix(name, ".json") {
			s.addProgram(dir, name)
		}
	}
}

// absolute makes a directory's name absolute. Package path/filepath would do so
// too, but is initialised late (see package early).
func absolute(dir string) (string, error) {
	if path.IsAbs(dir) {
		return path.Clean(dir), nil
	}
	wd, err := os.Getwd()
	return path.Join(wd, dir), err
}

// pluginNames lists the directory's entries that begin with Prefix, sorted.
func pluginNames(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("plugin directory: %w", err)
	}
	defer d.Close()
	all, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("plugin directory: %w", err)
	}
	names := all[:0]
	for _, n := range all {
		if strings.HasPrefix(n, Prefix) {
			names = append(names, n)
		}
	}
	sort.Strings(names)
	return names, nil
}

func (s *Set) addProgram(dir, name string) {
	program := path.Join(dir, name)
	info, err := os.Stat(program)
	if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
		return
	}
	if err := trusted(program, info); err != nil {
		s.refused = append(s.refused, fmt.Errorf("plugin %w", err))
		return
	}
	p := &Plugin{Path: program, Dir: dir, ManifestPath: program + ".json"}
	p.Manifest, err = readManifest(p.ManifestPath)
	if errors.Is(err, fs.ErrNotExist) {
		p.ManifestPath = ""
		p.Manifest, err = askManifest(program)
	}
	if err != nil {
		s.refused = append(s.refused, fmt.Errorf("plugin %s: %w", program, err))
		return
	}
	for _, other := range s.plugins {
		if other.Manifest.Name == p.Manifest.Name {
			return
		}
	}
	s.plugins = append(s.plugins, p)
}

// trusted refuses what somebody else than root or the caller could replace.
func trusted(name string, info fs.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: owner unknown", name)
	}
	return trustedOwner(name, int(st.Uid), info.Mode())
}

func trustedOwner(name string, owner int, mode fs.FileMode) error {
	if owner != 0 && owner != os.Geteuid() {
		return fmt.Errorf("%s: refused: owned by user %d, neither root nor the caller", name, owner)
	}
	// A group that holds root or the caller alone would be harmless, but who is
	// in a group cannot be told cheaply.
	if mode&0o022 != 0 {
		return fmt.Errorf("%s: refused: writable by others (mode %04o)", name, mode.Perm())
	}
	return nil
}

func readManifest(name string) (sdk.Manifest, error) {
	// os.Open would first try whether the file can be polled.
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return sdk.Manifest{}, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return sdk.Manifest{}, &fs.PathError{Op: "fstat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return sdk.Manifest{}, fmt.Errorf("%s: not a file", name)
	}
	if err := trustedOwner(name, int(st.Uid), fs.FileMode(st.Mode&0o777)); err != nil {
		return sdk.Manifest{}, err
	}
	if st.Size > maxManifest {
		return sdk.Manifest{}, fmt.Errorf("manifest is larger than %d bytes", maxManifest)
	}
	b := make([]byte, st.Size)
	n := 0
	for n < len(b) {
		m, err := unix.Read(fd, b[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return sdk.Manifest{}, &fs.PathError{Op: "read", Path: name, Err: err}
		}
		if m == 0 {
			break
		}
		n += m
	}
	return parseManifest(b[:n])
}

// askManifest starts the program, in its sandbox, to have it print its manifest.
func askManifest(program string) (sdk.Manifest, error) {
	b, err := child.Output(child.Spec{Path: program, Args: []string{"--manifest"}}, maxManifest, askTimeout)
	if err != nil {
		return sdk.Manifest{}, fmt.Errorf("no manifest beside it, and asked for it: %w", err)
	}
	return parseManifest(b)
}

func parseManifest(b []byte) (sdk.Manifest, error) {
	var m sdk.Manifest
	if err := json.Unmarshal(b, &m); err != nil {
		return m, fmt.Errorf("manifest: %w", err)
	}
	if m.Name == "" {
		return m, errors.New("manifest: no name")
	}
	for _, p := range m.Probes {
		if _, err := hex.DecodeString(p.Bytes); err != nil {
			return m, fmt.Errorf("manifest: probe %q: %w", p.Bytes, err)
		}
	}
	for _, r := range m.Rules {
		if !r.Valid() {
			return m, fmt.Errorf("manifest: rule %.100q: a name of a-z and dashes and a meaning of one line are accepted", r.Name)
		}
	}
	return m, nil
}

// Plugins returns the plugins in order of their names.
func (s *Set) Plugins() []*Plugin { return s.plugins }

// Dirs returns the directories that were searched.
func (s *Set) Dirs() []string { return s.dirs }

// Refused returns why directories, programs and manifests were left out.
func (s *Set) Refused() []error { return s.refused }

// ByName returns the plugin with a canonical name or alias; canonical names
// win. The error is a *MissingError.
func (s *Set) ByName(name string) (*Plugin, error) {
	for _, p := range s.plugins {
		if p.Manifest.Name == name {
			return p, nil
		}
	}
	for _, p := range s.plugins {
		for _, alias := range p.Manifest.Aliases {
			if alias == name {
				return p, nil
			}
		}
	}
	err := &MissingError{Name: name}
	for _, p := range s.plugins {
		err.Present = append(err.Present, p.Manifest.Name)
	}
	// A refused program of that name is the likely reason.
	for _, refused := range s.refused {
		if strings.Contains(refused.Error(), Prefix+name) {
			err.Reason = refused
		}
	}
	return nil, err
}

// MissingError reports a format for which there is no plugin.
type MissingError struct {
	Name    string
	Present []string // formats that there are
	Reason  error    // why a plugin of that name was refused, nil for none
}

func (e *MissingError) Error() string {
	present := "no format is installed"
	if len(e.Present) > 0 {
		present = "installed formats: " + strings.Join(e.Present, ", ")
	}
	if e.Reason != nil {
		return fmt.Sprintf("unknown format %q: %v (%s)", e.Name, e.Reason, present)
	}
	return fmt.Sprintf("unknown format %q: the program %s%s, which a package of that name would bring, was not found (%s)",
		e.Name, Prefix, e.Name, present)
}

// Unwrap gives the reason.
func (e *MissingError) Unwrap() error { return e.Reason }

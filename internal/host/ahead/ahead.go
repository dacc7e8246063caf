// Package ahead starts the plugins that a command line is likely to need while
// the rest of the core initialises, which takes as long as a plugin's own
// initialisation. It imports little, so that it is initialised early. A wrong
// guess costs a process that is ended unused.
package ahead

import (
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/instar-img/instar/internal/host/child"
	"github.com/instar-img/instar/internal/host/discover"
	"github.com/instar-img/instar/sdk"
)

// run is what Begin has under way.
type run struct {
	set    *discover.Set
	err    error
	starts []*start
}

// start is a process on its way.
type start struct {
	plugin *discover.Plugin
	memory int64         // its limit in bytes, 0 for none
	done   chan struct{} // closed when child is there, or will not be

	mu    sync.Mutex
	child *child.Child
}

var begun *run

// Begin finds the plugins, and starts the likely ones in the background. args is
// the command line. It is called once, before anything else here.
func Begin(args []string) {
	guess, ok := guessOf(args, os.Getenv("INSTAR_UNTRUSTED"))
	if !ok || os.Getenv("INSTAR_LOG") != "" {
		return
	}
	// Finding is not left to a goroutine: the start needs it, and the first
	// goroutine of a program waits for its thread.
	r := &run{}
	begun = r
	if r.set, r.err = discover.Find(discover.Options{}); r.err != nil {
		return
	}
	for _, p := range guess.plugins(r.set) {
		if !slices.Contains(p.Manifest.Protocols, sdk.Protocol) {
			continue
		}
		s := &start{plugin: p, memory: guess.memory, done: make(chan struct{})}
		r.starts = append(r.starts, s)
		go s.run()
	}
}

func (s *start) run() {
	defer close(s.done)
	spec := s.plugin.Spec()
	spec.Limits.MemoryBytes = s.memory
	// Where it fails, who needs it will start it, and report.
	if c, err := child.Start(spec); err == nil {
		s.child = c
	}
}

// Find returns what discover.Find finds in the usual places, perhaps already
// found.
func Find() (*discover.Set, error) {
	if begun == nil {
		return discover.Find(discover.Options{})
	}
	return begun.set, begun.err
}

// Take returns the process of p where it was started ahead with this limit of
// memory, and it is the caller's then. Other limits are yet to be set.
func Take(p *discover.Plugin, memory int64) *child.Child {
	if begun == nil {
		return nil
	}
	for _, s := range begun.starts {
		if s.plugin == p && s.memory == memory {
			return s.take()
		}
	}
	return nil
}

// Discard ends the processes that nobody took.
func Discard() {
	if begun == nil {
		return
	}
	var unused []*child.Child
	for _, s := range begun.starts {
		if c := s.take(); c != nil {
			c.Remove()
			unused = append(unused, c)
		}
	}
	child.Await(false, unused...)
}

func (s *start) take() *child.Child {
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.child
	s.child = nil
	return c
}

// guess says which plugins a command line needs: for the formats that it names,
// for the first images of files, whose content tells, and the fallback format for a
// new image of which nothing is said.
type guess struct {
	formats  []string
	files    []string
	images   int
	fallback bool
	memory   int64 // limit of each plugin in bytes, 0 for none
}

// UntrustedMemory is what a plugin may use, in bytes, where --untrusted and nothing
// else is said.
const UntrustedMemory = 256 << 20

// verbs take images whose formats are named or whose content tells.
var verbs = []string{
	"amend", "bitmap", "check", "commit", "compare", "convert", "create", "dd", "info", "inspect", "map", "measure",
	"rebase", "resize", "snapshot",
}

// notAhead are flags with which no plugin is needed, or one that is started
// with other settings.
var notAhead = []string{"-h", "--help", "-V", "--version", "-v", "--verbose"}

// flags that name the format of an image, by what is known of them here.
var flags = map[string]byte{
	"-f": 'f', "--format": 'f',
	"-F": 'F', "--second-format": 'F',
	"-O": 'O', "--target-format": 'O',
}

// untrusted is the value of INSTAR_UNTRUSTED, of which the usual ones will do.
func guessOf(args []string, untrusted string) (guess, bool) {
	limited := untrusted == "1"
	if !limited && untrusted != "" && untrusted != "0" {
		return guess{}, false
	}
	var verb string
	var words []string
	named := map[byte]string{}
	for i := 1; i < len(args); i++ {
		arg := args[i]
		name, value, hasValue := strings.Cut(arg, "=")
		if len(arg) > 2 && arg[0] == '-' && arg[1] != '-' {
			name, value, hasValue = arg[:2], strings.TrimPrefix(arg[2:], "="), true
		}
		flag, isFormat := flags[name]
		switch {
		case slices.Contains(notAhead, arg) || strings.HasPrefix(arg, "--max-memory") || strings.HasPrefix(arg, "--untrusted="):
			return guess{}, false
		case arg == "--untrusted":
			limited = true
		case isFormat && hasValue:
			named[flag] = value
		case isFormat:
			if i++; i < len(args) {
				named[flag] = args[i]
			}
		case strings.HasPrefix(arg, "-") || arg == "":
		case verb == "":
			verb = arg
		default:
			words = append(words, arg)
		}
	}
	g := guess{files: words}
	if limited || verb == "inspect" {
		g.memory = UntrustedMemory
	}
	opened := func(format string) {
		if format == "" {
			g.images++
		} else {
			g.formats = append(g.formats, format)
		}
	}
	made := func(format string) {
		if format == "" {
			g.fallback = true
		} else {
			g.formats = append(g.formats, format)
		}
	}
	switch verb {
	case "create":
		made(named['f'])
	case "compare":
		opened(named['f'])
		opened(named['F'])
	case "convert":
		g.files = words[:max(len(words)-1, 0)]
		opened(named['f'])
		made(named['O'])
	case "dd":
		g.files = nil
		for _, w := range words {
			if name, ok := strings.CutPrefix(w, "if="); ok {
				g.files = append(g.files, name)
			}
		}
		opened(named['f'])
		made(named['O'])
	default:
		opened(named['f'])
	}
	return g, slices.Contains(verbs, verb) && (len(g.formats) > 0 || len(words) > 0)
}

// plugins returns those that are needed, each once.
func (g guess) plugins(set *discover.Set) []*discover.Plugin {
	var list []*discover.Plugin
	add := func(p *discover.Plugin) {
		if p != nil && !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	for _, format := range g.formats {
		p, _ := set.ByName(format)
		add(p)
	}
	images := 0
	for _, path := range g.files {
		if images == g.images {
			break
		}
		if p, ok := probe(set, path); ok {
			add(p)
			images++
		}
	}
	if g.fallback {
		add(set.Fallback())
	}
	return list
}

// probe looks at the content of a file, if it is one.
func probe(set *discover.Set, path string) (*discover.Plugin, bool) {
	// Opening something else than a file could have effects.
	if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
		return nil, false
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, false
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil, false
	}
	headReach, tailReach := set.ProbeReach()
	head, err := readAt(f, 0, min(headReach, info.Size()))
	if err != nil {
		return nil, false
	}
	tailLength := min(tailReach, info.Size())
	tail, err := readAt(f, info.Size()-tailLength, tailLength)
	if err != nil {
		return nil, false
	}
	matches := set.Match(head, tail, info.Size())
	if len(matches) == 0 {
		return nil, false
	}
	return matches[0].Plugin, true
}

func readAt(f *os.File, off, length int64) ([]byte, error) {
	b := make([]byte, length)
	n, err := f.ReadAt(b, off)
	if err == io.EOF {
		err = nil
	}
	return b[:n], err
}

// Package ahead starts the plugin that a command line is likely to need while
// the rest of the core initialises, which takes as long as the plugin's own
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
	set *discover.Set
	err error

	started chan struct{} // closed when plugin and child are there
	plugin  *discover.Plugin

	mu    sync.Mutex
	child *child.Child
}

var begun *run

// Begin finds the plugins, and starts the likely one in the background. args is the
// command line. It is called once, before anything else here.
func Begin(args []string) {
	guess, ok := guessOf(args)
	if !ok || os.Getenv("INSTAR_UNTRUSTED") != "" || os.Getenv("INSTAR_LOG") != "" {
		return
	}
	// Finding is not left to a goroutine: the start needs it, and the first
	// goroutine of a program waits for its thread.
	r := &run{started: make(chan struct{})}
	begun = r
	var p *discover.Plugin
	if r.set, r.err = discover.Find(discover.Options{}); r.err == nil {
		p = guess.plugin(r.set)
	}
	if p == nil || !slices.Contains(p.Manifest.Protocols, sdk.Protocol) {
		close(r.started)
		return
	}
	go func() {
		defer close(r.started)
		c, err := child.Start(child.Spec{Path: p.Path, Roots: p.Manifest.RuntimeRoots, Protocols: []int{sdk.Protocol}})
		if err != nil {
			return // who needs it will start it, and report
		}
		r.plugin, r.child = p, c
	}()
}

// Find returns what discover.Find finds in the usual places, perhaps already
// found.
func Find() (*discover.Set, error) {
	if begun == nil {
		return discover.Find(discover.Options{})
	}
	return begun.set, begun.err
}

// Take returns the process that was started ahead if it runs p, and it is the
// caller's then.
func Take(p *discover.Plugin) *child.Child {
	if begun == nil {
		return nil
	}
	<-begun.started
	if begun.plugin != p {
		return nil
	}
	return begun.take()
}

// Discard ends a process that nobody took.
func Discard() {
	if begun == nil {
		return
	}
	<-begun.started
	if c := begun.take(); c != nil {
		c.Remove()
	}
}

func (r *run) take() *child.Child {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.child
	r.child = nil
	return c
}

// guess says which plugin a command line needs.
type guess struct {
	format string   // where it is named
	create bool     // else the fallback format
	files  []string // else that of the first of these that is an image
}

// verbs take one image, whose format -f names or its content tells.
var verbs = []string{
	"amend", "bitmap", "check", "commit", "create", "info", "inspect", "map", "measure", "rebase", "resize", "snapshot",
}

// notAhead are flags with which no plugin is needed, or one that is started
// with other settings.
var notAhead = []string{"-h", "--help", "-V", "--version", "-v", "--verbose", "--untrusted", "--untrusted=true"}

func guessOf(args []string) (guess, bool) {
	var g guess
	var verb string
	for i := 1; i < len(args); i++ {
		arg := args[i]
		switch {
		case slices.Contains(notAhead, arg) || strings.HasPrefix(arg, "--max-memory"):
			return g, false
		case arg == "-f" || arg == "--format":
			if i++; i < len(args) {
				g.format = args[i]
			}
		case strings.HasPrefix(arg, "--format="):
			g.format = strings.TrimPrefix(arg, "--format=")
		case strings.HasPrefix(arg, "-f") && len(arg) > 2:
			g.format = strings.TrimPrefix(arg[2:], "=")
		case strings.HasPrefix(arg, "-") || arg == "":
		case verb == "":
			verb = arg
		default:
			g.files = append(g.files, arg)
		}
	}
	g.create = verb == "create"
	return g, slices.Contains(verbs, verb) && (g.format != "" || len(g.files) > 0)
}

func (g guess) plugin(set *discover.Set) *discover.Plugin {
	if g.format != "" {
		p, _ := set.ByName(g.format)
		return p
	}
	if g.create {
		return set.Fallback()
	}
	for _, path := range g.files {
		if p, ok := probe(set, path); ok {
			return p
		}
	}
	return nil
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

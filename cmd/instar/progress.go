package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"

	"github.com/instar-img/instar/cmd/instar/internal/render"
	"github.com/instar-img/instar/internal/host/remote"
)

// meter shows how far a long verb is. The verb begins its parts one after the
// other; Set is called with bytes done and bytes to do of a part, from any
// goroutine.
type meter interface {
	Begin(what string)
	Set(done, total int64)
	// Close ends it. Where not ok the work has not come to its end.
	Close(ok bool)
}

// progressFlag is the form in which progress is shown; empty: not at all.
type progressFlag string

// The forms: a bar on a terminal and qemu-img's lines elsewhere, or lines of JSON.
const (
	progressText = "text"
	progressJSON = "json"
)

var progressForms = []string{progressText, progressJSON}

func (f *progressFlag) Set(s string) error {
	if !f.accepts(s) {
		return fmt.Errorf("%s are accepted", strings.Join(progressForms, " and "))
	}
	if *f != progressJSON { // -p takes nothing back
		*f = progressFlag(s)
	}
	return nil
}

func (f *progressFlag) String() string        { return string(*f) }
func (f *progressFlag) Type() string          { return "FORM" }
func (f *progressFlag) accepts(s string) bool { return slices.Contains(progressForms, s) }

// newMeter returns what -p and --progress ask for, or what shows nothing.
// Whatever it is, SIGUSR1 prints a line to standard error, as it does with
// qemu-img.
func (a *app) newMeter(ctx context.Context, out io.Writer, form progressFlag, quiet bool) meter {
	var shown meter
	switch {
	case quiet || form == "":
	case form == progressJSON:
		shown = newJSONMeter(ctx, out)
	default:
		if f, ok := out.(*standardOutput); ok && a.terminal() {
			shown = &barMeter{out: f.File}
		} else {
			shown = &lineMeter{out: out}
		}
	}
	return newSignalMeter(a.err, shown)
}

// fetch brings what is behind a URL into a file.
func (a *app) fetch(ctx context.Context, url string) (*os.File, error) {
	return remote.Fetch(ctx, url, a.begin("fetch "+url))
}

// begin begins a part of the verb's work, and returns what is told of it; nil
// where the verb has no meter.
func (a *app) begin(what string) func(done, total int64) {
	if a.meter == nil {
		return nil
	}
	a.meter.Begin(what)
	return a.meter.Set
}

// lineMeter prints qemu-img's progress lines.
type lineMeter struct {
	out io.Writer
	p   *render.Progress
}

func (m *lineMeter) Begin(string) {
	m.p.Close()
	m.p = render.NewProgress(m.out, 1)
}
func (m *lineMeter) Set(done, total int64) { m.p.Set(part(done, total)) }
func (m *lineMeter) Close(bool)            { m.p.Close() }

func part(done, total int64) float64 {
	if total <= 0 {
		return 1
	}
	return float64(done) / float64(total)
}

// barMeter draws a bar.
type barMeter struct {
	out  io.Writer
	once *sync.Once
	bar  *progressbar.ProgressBar
}

func (m *barMeter) Begin(what string) {
	m.Close(true)
	m.once = &sync.Once{}
	m.bar = progressbar.NewOptions64(1, progressbar.OptionSetWriter(m.out), progressbar.OptionSetDescription(render.Escape(what)),
		progressbar.OptionShowBytes(true), progressbar.OptionFullWidth(), progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionOnCompletion(func() { fmt.Fprintln(m.out) }))
}

func (m *barMeter) Set(done, total int64) {
	m.once.Do(func() { m.bar.ChangeMax64(max(total, 1)) })
	_ = m.bar.Set64(min(done, total)) // a bar that cannot be drawn is no error
}

func (m *barMeter) Close(ok bool) {
	switch {
	case m.bar == nil || m.bar.IsFinished():
	case ok:
		_ = m.bar.Finish()
	default:
		_ = m.bar.Exit() // it stays where it is
	}
}

// counter holds the last values set.
type counter struct {
	mu          sync.Mutex
	done, total int64
}

func (c *counter) Set(done, total int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done, c.total = max(c.done, done), total
}

func (c *counter) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done, c.total = 0, 0
}

func (c *counter) get() (done, total int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.done, c.total
}

// signalMeter prints a line when SIGUSR1 comes, beside what is shown anyway.
type signalMeter struct {
	counter
	shown   meter // may be nil
	signals chan os.Signal
}

func newSignalMeter(w io.Writer, shown meter) *signalMeter {
	m := &signalMeter{shown: shown, signals: make(chan os.Signal, 1)}
	signal.Notify(m.signals, syscall.SIGUSR1)
	go func() {
		for range m.signals {
			done, total := m.get()
			percent := 0.0 // nothing has begun
			if total > 0 {
				percent = 100 * part(done, total)
			}
			fmt.Fprintf(w, "    (%3.2f/100%%)\n", percent)
		}
	}()
	return m
}

func (m *signalMeter) Begin(what string) {
	m.reset()
	if m.shown != nil {
		m.shown.Begin(what)
	}
}

func (m *signalMeter) Set(done, total int64) {
	m.counter.Set(done, total)
	if m.shown != nil {
		m.shown.Set(done, total)
	}
}

func (m *signalMeter) Close(ok bool) {
	signal.Stop(m.signals)
	close(m.signals)
	if m.shown != nil {
		m.shown.Close(ok)
	}
}

// jsonMeter prints a line of JSON each second, and one at the end of each part.
type jsonMeter struct {
	counter
	out     *json.Encoder
	stop    context.CancelFunc
	stopped chan struct{}

	what    string // guarded by the counter's mutex
	started time.Time
}

// progressLine is a line of --progress json: bytes, bytes a second, seconds.
type progressLine struct {
	Transferred int64   `json:"transferred"`
	Total       int64   `json:"total"`
	Rate        float64 `json:"rate"`
	Elapsed     float64 `json:"elapsed"`
	Description string  `json:"description"`
}

func newJSONMeter(ctx context.Context, w io.Writer) *jsonMeter {
	m := &jsonMeter{out: json.NewEncoder(w), stopped: make(chan struct{})}
	ctx, m.stop = context.WithCancel(ctx)
	go func() {
		defer close(m.stopped)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				m.print()
			case <-ctx.Done():
				return
			}
		}
	}()
	return m
}

func (m *jsonMeter) Begin(what string) {
	m.print()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done, m.total, m.what, m.started = 0, 0, what, time.Now()
}

// print prints a line of what has begun.
func (m *jsonMeter) print() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.what == "" {
		return
	}
	elapsed := time.Since(m.started).Seconds()
	// A reader that went away is met by the verb's own output.
	_ = m.out.Encode(progressLine{Transferred: m.done, Total: m.total, Rate: float64(m.done) / max(elapsed, 1e-9), Elapsed: elapsed, Description: m.what})
}

func (m *jsonMeter) Close(bool) {
	m.stop()
	<-m.stopped
	m.print()
}

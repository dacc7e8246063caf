package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/schollz/progressbar/v3"

	"github.com/instar-img/instar/cmd/instar/internal/render"
)

// meter shows how far a long verb is. Set is called with bytes done and bytes
// to do, from any goroutine.
type meter interface {
	Set(done, total int64)
	Close()
}

// newMeter returns what -p and --progress ask for: a bar on a terminal,
// qemu-img's lines elsewhere, JSON lines, or nothing; then SIGUSR1 prints a
// line, as it does with qemu-img.
func (a *app) newMeter(ctx context.Context, out io.Writer, lines bool, form, what string) (meter, error) {
	switch form {
	case "":
	case "json":
		return newJSONMeter(ctx, out, what), nil
	default:
		return nil, usagef("--progress %s: json is accepted", form)
	}
	if !lines {
		return newSignalMeter(a.err), nil
	}
	if f, ok := out.(*os.File); ok && f == os.Stdout && a.terminal() {
		return &barMeter{bar: progressbar.NewOptions64(1, progressbar.OptionSetWriter(f), progressbar.OptionSetDescription(what),
			progressbar.OptionShowBytes(true), progressbar.OptionFullWidth(), progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionOnCompletion(func() { fmt.Fprintln(f) }))}, nil
	}
	return &lineMeter{render.NewProgress(out, 1)}, nil
}

// lineMeter prints qemu-img's progress lines.
type lineMeter struct{ p *render.Progress }

func (m *lineMeter) Set(done, total int64) { m.p.Set(part(done, total)) }
func (m *lineMeter) Close()                { m.p.Close() }

func part(done, total int64) float64 {
	if total <= 0 {
		return 1
	}
	return float64(done) / float64(total)
}

// barMeter draws a bar.
type barMeter struct {
	once sync.Once
	bar  *progressbar.ProgressBar
}

func (m *barMeter) Set(done, total int64) {
	m.once.Do(func() { m.bar.ChangeMax64(max(total, 1)) })
	_ = m.bar.Set64(min(done, total)) // a bar that cannot be drawn is no error
}

func (m *barMeter) Close() { _ = m.bar.Finish() }

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

func (c *counter) get() (done, total int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.done, c.total
}

// signalMeter prints a line when SIGUSR1 comes.
type signalMeter struct {
	counter
	signals chan os.Signal
}

func newSignalMeter(w io.Writer) *signalMeter {
	m := &signalMeter{signals: make(chan os.Signal, 1)}
	signal.Notify(m.signals, syscall.SIGUSR1)
	go func() {
		for range m.signals {
			fmt.Fprintf(w, "    (%3.2f/100%%)\n", 100*part(m.get()))
		}
	}()
	return m
}

func (m *signalMeter) Close() {
	signal.Stop(m.signals)
	close(m.signals)
}

// jsonMeter prints a line of JSON each second, and one at the end.
type jsonMeter struct {
	counter
	out     *json.Encoder
	what    string
	started time.Time
	stop    context.CancelFunc
	stopped chan struct{}
}

// progressLine is a line of --progress json: bytes, bytes a second, seconds.
type progressLine struct {
	Transferred int64   `json:"transferred"`
	Total       int64   `json:"total"`
	Rate        float64 `json:"rate"`
	Elapsed     float64 `json:"elapsed"`
	Description string  `json:"description"`
}

func newJSONMeter(ctx context.Context, w io.Writer, what string) *jsonMeter {
	m := &jsonMeter{out: json.NewEncoder(w), what: what, started: time.Now(), stopped: make(chan struct{})}
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
				m.print()
				return
			}
		}
	}()
	return m
}

func (m *jsonMeter) print() {
	done, total := m.get()
	elapsed := time.Since(m.started).Seconds()
	// A reader that went away is met by the verb's own output.
	_ = m.out.Encode(progressLine{Transferred: done, Total: total, Rate: float64(done) / max(elapsed, 1e-9), Elapsed: elapsed, Description: m.what})
}

func (m *jsonMeter) Close() {
	m.stop()
	<-m.stopped
}

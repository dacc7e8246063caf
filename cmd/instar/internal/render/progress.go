package render

import (
	"fmt"
	"io"
	"sync"
)

// Progress prints the progress lines of -p: `    (NN.NN/100%)` and a carriage
// return, each time the work has advanced by more than a step. Its methods are
// safe for concurrent use. A nil *Progress prints nothing.
type Progress struct {
	mu   sync.Mutex
	w    io.Writer
	step float64 // percent
	last float64
	done bool
}

// NewProgress prints the first line. step is in percent: qemu-img's is 1, where
// not 2 (commit and rebase) or 0 (short verbs).
func NewProgress(w io.Writer, step float64) *Progress {
	p := &Progress{w: w, step: step, last: -1}
	p.print(0)
	return p
}

// Set says which part of the work is done, 0 to 1. Parts are not unlearned:
// workers that report out of order do not move the number back.
func (p *Progress) Set(part float64) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	percent := 100 * min(max(part, 0), 1)
	if p.done || percent <= p.last || percent < 100 && percent <= p.last+p.step {
		return
	}
	p.print(percent)
}

// Close ends the line. What is set later is not printed.
func (p *Progress) Close() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.done {
		p.done = true
		fmt.Fprintln(p.w)
	}
}

func (p *Progress) print(percent float64) {
	p.last = percent
	fmt.Fprintf(p.w, "    (%3.2f/100%%)\r", percent)
}

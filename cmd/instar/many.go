package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/instar-img/instar/cmd/instar/internal/render"
)

// each works on names side by side and emits the results in the order of the
// names. A name whose work fails is reported and the rest go on; the result is
// then the gravest exit code that any of them had. Work that fails with an
// exitCode has a result all the same.
func each[T any](ctx context.Context, a *app, names []string, work func(context.Context, int, string) (T, error), emit func(T) error) error {
	type outcome struct {
		result T
		err    error
	}
	results := make([]chan outcome, len(names))
	for i := range results {
		results[i] = make(chan outcome, 1)
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	slots := make(chan struct{}, a.policy.inFlight())
	wg.Go(func() {
		for i, name := range names {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			wg.Go(func() {
				r, err := work(ctx, i, name)
				results[i] <- outcome{r, err}
			})
		}
	})
	worst := 0
	for i := range names {
		var o outcome
		select {
		case o = <-results[i]:
			<-slots
		case <-ctx.Done():
			return ctx.Err()
		}
		if o.err != nil {
			code, message := a.exit(ctx, o.err)
			worst = graver(worst, code)
			if message != "" {
				fmt.Fprintf(a.err, "%s: %s\n", a.name, message)
				continue
			}
		}
		if err := emit(o.result); err != nil {
			return err
		}
	}
	if worst != 0 {
		return exitCode(worst)
	}
	return nil
}

// graver returns the exit code that tells of more: of check's, corruption is the
// worst and a format without a check the least.
func graver(a, b int) int {
	order := []int{0, int(checkUnsupported), int(checkLeaks), int(checkFailed), int(checkCorrupt)}
	rank := func(code int) int {
		if i := slices.Index(order, code); i >= 0 {
			return i
		}
		return len(order)
	}
	if rank(a) >= rank(b) {
		return a
	}
	return b
}

// results prints the results of one or many images: of one as qemu-img does,
// of many each under its name, as an array, or as lines.
type results struct {
	app     *app
	output  string
	many    bool
	array   *render.Array // of many
	printed bool
}

// resultForms are the values of --output of a verb that takes many images.
var resultForms = []string{"human", "json", "ndjson"}

// errOutput has qemu-img's words.
var errOutput = errors.New("--output must be used with human or json as argument.")

// checkResults checks --output of a verb that takes many images.
func (a *app) checkResults(output string, names int) (*results, error) {
	if !slices.Contains(resultForms, output) {
		return nil, errOutput
	}
	return &results{app: a, output: output, many: names > 1 || output == "ndjson"}, nil
}

// add prints the result for one image, in the form asked for. text begins with
// the image's name where the verb's text does not say it itself. Nothing is kept:
// results can be large, and many.
func (r *results) add(name, text string, object any) error {
	switch {
	case r.output == "ndjson":
		return render.WriteLine(r.app.out, object)
	case r.output == "json" && r.many:
		if r.array == nil {
			r.array = render.NewArray(r.app.out)
		}
		return r.array.Add(object)
	case r.output == "json":
		return render.WritePretty(r.app.out, object)
	case r.many:
		if r.printed {
			fmt.Fprintln(r.app.out)
		}
		r.printed = true
		if name != "" {
			text = "image: " + r.app.shown(name) + "\n" + text
		}
	}
	_, err := io.WriteString(r.app.out, text)
	return err
}

// close ends what is printed.
func (r *results) close() error {
	if r.output != "json" || !r.many {
		return nil
	}
	if r.array == nil {
		r.array = render.NewArray(r.app.out)
	}
	return r.array.Close()
}

// shown is a name as it is printed.
func (a *app) shown(name string) string {
	if a.terminal() {
		return render.Escape(name)
	}
	return name
}

// messages collects lines for standard error, so that those of images that are
// worked on side by side do not mix.
type messages struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (m *messages) add(line string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.buf.WriteString(line + "\n")
}

// parts adds up the progress of many images.
type parts struct {
	mu   sync.Mutex
	part []float64
	sum  float64
	set  func(float64)
}

// of returns what takes the progress of the i-th image.
func (p *parts) of(i int) func(float64) {
	return func(part float64) {
		p.mu.Lock()
		defer p.mu.Unlock()
		part = max(part, p.part[i])
		p.sum += part - p.part[i]
		p.part[i] = part
		p.set(p.sum / float64(len(p.part)))
	}
}

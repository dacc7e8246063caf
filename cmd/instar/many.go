package main

import (
	"context"
	"fmt"
	"runtime"
	"sync"
)

// inFlight is how many images of one command are worked on at a time: the
// cores, and as many again to wait for disks and plugins.
func inFlight() int { return 2 * runtime.GOMAXPROCS(0) }

// each works on names side by side and emits the results in the order of the
// names. A name whose work fails is reported and the rest go on; the result is
// then the highest exit code that any of them had.
func each[T any](ctx context.Context, a *app, names []string, work func(context.Context, string) (T, error), emit func(T) error) error {
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
	slots := make(chan struct{}, inFlight())
	wg.Go(func() {
		for i, name := range names {
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				return
			}
			wg.Go(func() {
				r, err := work(ctx, name)
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
			worst = max(worst, code)
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

package sdk

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// Parallel calls f(0) to f(n-1), each once, on as many goroutines as there are
// cores, and returns the error of the lowest index that failed.
func Parallel(n int, f func(i int) error) error {
	errs := make([]error, n)
	var next atomic.Int64
	work := func() {
		for {
			i := int(next.Add(1)) - 1
			if i >= n {
				return
			}
			errs[i] = f(i)
		}
	}
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

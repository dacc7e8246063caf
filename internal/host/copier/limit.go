package copier

import (
	"context"
	"sync"
	"time"
)

// limiter spreads work over time: rate bytes each second.
type limiter struct {
	rate int64 // 0: no limit
	mu   sync.Mutex
	free time.Time // when what was let through is paid for
}

// slice is how much may go through at once, in time.
const slice = 100 * time.Millisecond

// wait blocks until n more bytes may be written.
func (l *limiter) wait(ctx context.Context, n int64) error {
	if l.rate <= 0 {
		return nil
	}
	l.mu.Lock()
	now := time.Now()
	if l.free.Before(now.Add(-slice)) {
		l.free = now.Add(-slice)
	}
	delay := l.free.Sub(now)
	l.free = l.free.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	l.mu.Unlock()
	if delay <= 0 {
		return nil
	}
	t := time.NewTimer(delay)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

package lock

import (
	"errors"
	"fmt"

	"github.com/instar-img/instar/internal/confine"
)

// Engage locks all threads of the process: no file system, no new programs,
// processes or sockets, no other processes. What stays are descriptors that are
// open or are passed in, and memory. With accept it still takes connections to a
// socket that listens. There is no way back.
func Engage(accept bool) error {
	var missing []error
	if err := confine.NoNewPrivsAll(); err != nil {
		return unavailable(err)
	}
	// The filter lets no call through that takes a path, so that Landlock has
	// nothing left to refuse. It is the lock where there is no filter, and a
	// second wall where the kernel can put it up for all threads at once; else
	// every thread would have to wake for it, which costs more than the filter.
	if !confine.HasSeccomp() || confine.LandlockAllThreads() {
		if err := engageLandlock(); errors.Is(err, confine.ErrUnavailable) {
			missing = append(missing, err)
		} else if err != nil {
			return err
		}
	}
	if err := engageSeccomp(accept); errors.Is(err, confine.ErrUnavailable) {
		missing = append(missing, err)
	} else if err != nil {
		return err
	}
	if len(missing) > 0 {
		return unavailable(errors.Join(missing...))
	}
	return nil
}

func unavailable(err error) error {
	if errors.Is(err, confine.ErrUnavailable) {
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}

func engageLandlock() error {
	rules, err := confine.NewRuleset()
	if err != nil {
		return err
	}
	defer rules.Close()
	return rules.RestrictAll()
}

package child

import (
	"os"
	"strings"
	"time"
)

// inits wait for every process that they inherit.
const inits = " catatonit docker-init dumb-init init launchd procd runit s6-svscan systemd tini "

// awaitTimeout bounds the wait for processes that were killed.
const awaitTimeout = 2 * time.Second

// Await waits, within a bound, for the end of processes that were killed. Where
// must is not set it does so only where nobody else would wait for them, or would
// remove their control group.
func Await(must bool, killed ...*Child) {
	if len(killed) == 0 {
		return
	}
	all := must || !orphansAreWaitedFor()
	late := time.After(awaitTimeout)
	for _, c := range killed {
		if !all && !c.grouped() {
			continue
		}
		select {
		case <-c.Done():
		case <-late:
			return
		}
	}
}

// orphansAreWaitedFor reports whether process 1 is an init that waits for what it
// inherits. In a container it may be any program, in whose care a process that
// ends after its parent stays a zombie.
func orphansAreWaitedFor() bool {
	name, err := os.ReadFile("/proc/1/comm")
	if err != nil {
		return false
	}
	return strings.Contains(inits, " "+strings.TrimSpace(string(name))+" ")
}

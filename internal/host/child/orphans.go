package child

import (
	"os"
	"strings"
)

// inits wait for every process that they inherit.
const inits = " catatonit docker-init dumb-init init launchd procd runit s6-svscan systemd tini "

// OrphansAreWaitedFor reports whether process 1 is an init that waits for what it
// inherits. In a container it may be any program, in whose care a process that
// ends after its parent stays a zombie.
func OrphansAreWaitedFor() bool {
	name, err := os.ReadFile("/proc/1/comm")
	if err != nil {
		return false
	}
	return strings.Contains(inits, " "+strings.TrimSpace(string(name))+" ")
}

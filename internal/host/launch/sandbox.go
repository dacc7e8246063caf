package launch

import (
	"fmt"
	"os"
)

// SandboxVariable is the environment variable that can make the sandbox a
// condition ("require") or leave it away ("off", for benchmarks and debugging).
const SandboxVariable = "INSTAR_SANDBOX"

// Sandbox is what the running kernel gives to confine plugins.
type Sandbox struct {
	System      string // "linux", "darwin"
	LandlockABI int    // 0: none
	Seccomp     bool
	// SecondLock: the SDK can take away the rest before the first request.
	SecondLock bool
}

// Missing names the parts that the kernel lacks, none for a full sandbox.
func (s Sandbox) Missing() []string {
	var missing []string
	if s.LandlockABI == 0 {
		missing = append(missing, "Landlock")
	} else {
		if s.LandlockABI < 4 {
			missing = append(missing, "Landlock for TCP")
		}
		if s.LandlockABI < 6 {
			missing = append(missing, "Landlock scopes")
		}
	}
	if !s.Seccomp {
		missing = append(missing, "seccomp")
	}
	return missing
}

// String is one line for people.
func (s Sandbox) String() string {
	switch {
	case s.LandlockABI == 0 && !s.Seccomp:
		return fmt.Sprintf("none on %s", s.System)
	case s.LandlockABI == 0:
		return "seccomp only, no Landlock in this kernel"
	case !s.Seccomp:
		return fmt.Sprintf("Landlock ABI %d only, no seccomp", s.LandlockABI)
	}
	second := ""
	if s.SecondLock {
		second = ", second lock in the plugin"
	}
	return fmt.Sprintf("Landlock ABI %d, seccomp%s", s.LandlockABI, second)
}

type mode int

const (
	sandboxBestEffort mode = iota
	sandboxRequired
	sandboxOff
)

func sandboxMode(require bool) (mode, error) {
	switch v := os.Getenv(SandboxVariable); v {
	case "require":
		return sandboxRequired, nil
	case "off":
		if require {
			return sandboxRequired, nil
		}
		return sandboxOff, nil
	case "", "on":
		if require {
			return sandboxRequired, nil
		}
		return sandboxBestEffort, nil
	default:
		return 0, fmt.Errorf("%s=%q: accepted are require, on and off", SandboxVariable, v)
	}
}

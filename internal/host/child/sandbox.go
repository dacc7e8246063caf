package child

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
		second = ", second lock in plugins that use the SDK"
	}
	return fmt.Sprintf("Landlock ABI %d, seccomp%s", s.LandlockABI, second)
}

// Mode says what to do without a full sandbox.
type Mode int

const (
	BestEffort Mode = iota
	Required
	Off
)

// SandboxMode returns the mode that the environment asks for. It cannot weaken
// what the caller requires.
func SandboxMode(require bool) (Mode, error) {
	v := os.Getenv(SandboxVariable)
	switch {
	case v != "" && v != "on" && v != "off" && v != "require":
		return 0, fmt.Errorf("%s=%q: accepted are require, on and off", SandboxVariable, v)
	case require || v == "require":
		return Required, nil
	case v == "off":
		return Off, nil
	}
	return BestEffort, nil
}

// SandboxStatus says in one line what plugins run in: what the environment asks
// for, and what the kernel gives.
func SandboxStatus() (string, error) {
	mode, err := SandboxMode(false)
	switch {
	case err != nil:
		return "", err
	case mode == Off:
		return fmt.Sprintf("off, as %s says (there is: %v)", SandboxVariable, Effective()), nil
	case mode == Required:
		return fmt.Sprintf("%v; required, as %s says", Effective(), SandboxVariable), nil
	}
	return Effective().String(), nil
}

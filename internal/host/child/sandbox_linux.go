package child

import (
	"errors"
	"path"

	"github.com/instar-img/instar/internal/confine"
)

// Effective describes the sandbox that the running kernel gives.
func Effective() Sandbox {
	s := Sandbox{System: "linux", LandlockABI: confine.LandlockABI(), Seccomp: confine.HasSeccomp()}
	s.SecondLock = s.Seccomp || s.LandlockABI > 0
	return s
}

// confine restricts the calling thread and what it starts to what a plugin
// needs before its SDK takes the second lock, or has for life without our SDK.
func (c *Child) confine() error {
	if err := confine.NoNewPrivs(); err != nil {
		return err
	}
	if confine.LandlockABI() > 0 {
		if err := c.confineFiles(); err != nil {
			return err
		}
	}
	if confine.HasSeccomp() {
		if err := confineCalls(); err != nil {
			return err
		}
	}
	return nil
}

func (c *Child) confineFiles() error {
	rules, err := confine.NewRuleset()
	if err != nil {
		return err
	}
	defer rules.Close()
	if err := rules.Allow(c.path, confine.Execute); err != nil {
		return err
	}
	if c.dir != nil {
		if err := rules.Allow(c.dir.path, confine.Sockets); err != nil {
			return err
		}
	}
	for _, root := range c.roots {
		if !path.IsAbs(root) {
			root = path.Join(path.Dir(c.path), root)
		}
		if err := rules.Allow(root, confine.ReadTree); err != nil {
			// Not wrapped: it is no file of the caller's.
			return errors.New("runtime-roots of its manifest: " + err.Error())
		}
	}
	return rules.RestrictThread()
}

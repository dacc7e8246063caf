//go:build linux

package hostile

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Cases 27 and 28, through the built programs: images cut short near what begins
// there, and with a bit of each field of their headers turned.
func TestDamagedPrograms(t *testing.T) {
	for _, s := range samples(t) {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			dir, env := t.TempDir(), []string{"XDG_RUNTIME_DIR=" + runtimeDir(t)}
			try := func(what string, b []byte, verbs ...string) {
				t.Helper()
				write(t, dir, "image", b)
				for _, verb := range verbs {
					words := append(strings.Fields(verb), "-f", s.format, "--untrusted")
					r := command{Argv: words, Dir: dir, Env: env}.run(t)
					if len(r.Crashed) > 0 {
						t.Errorf("%s: %s: a plugin died: %v\n%s", what, words, r.Crashed, clip(r.Stderr))
					}
					if words[0] == "convert" && r.Code != 0 {
						r.oneLine(t)
						if got := listing(t, dir); got != "image" {
							t.Errorf("%s: %s failed and left %s", what, words, got)
						}
					}
					os.Remove(filepath.Join(dir, "out"))
				}
			}
			convert := "convert -O raw image out"
			for _, n := range []int{0, 511, 513, 4096, len(s.bytes) / 2, len(s.bytes) - 512, len(s.bytes) - 1} {
				if n >= 0 && n < len(s.bytes) {
					try(fmt.Sprintf("cut to %d", n), s.bytes[:n], "check image", convert, "inspect image")
				}
			}
			for at := 11; at < 112; at += 8 {
				bit := byte(1) << (at / 8 % 8)
				s.bytes[at] ^= bit
				try(fmt.Sprintf("bit %#x of byte %d", bit, at), s.bytes, convert)
				s.bytes[at] ^= bit
			}
		})
	}
}

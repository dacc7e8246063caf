package launch

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/instar-img/instar/internal/host/discover"
)

// A program without a manifest beside it is asked for it, in its sandbox.
func TestAskedForItsManifest(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(probe, filepath.Join(dir, discover.Prefix+"anything")); err != nil {
		t.Fatal(err)
	}
	set, err := discover.Find(discover.Options{Dirs: []string{dir}})
	if err != nil {
		t.Fatal(err)
	}
	p, err := set.ByName("asked")
	if err != nil {
		t.Fatal(err, set.Refused())
	}
	if p.ManifestPath != "" || p.Manifest.Version != "1" {
		t.Errorf("got %+v", p)
	}
	assertNoSocketDirs(t)
}

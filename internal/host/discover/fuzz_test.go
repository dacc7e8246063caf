package discover

import (
	"encoding/hex"
	"testing"
)

// FuzzManifest reads any bytes as a manifest: what is accepted has a name, and
// probes that can be looked for.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"name":"x","version":"1","protocols":[1],"capabilities":["open"],"probes":[{"offset":-8,"bytes":"636f","score":90}]}`))
	f.Add([]byte(`{"name":"x","probes":[{"offset":-9223372036854775808,"bytes":"","score":1},null]}`))
	f.Add([]byte(`[[[[{"name":`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b)
		if err != nil {
			return
		}
		if m.Name == "" {
			t.Error("a manifest without name")
		}
		for _, p := range m.Probes {
			if _, err := hex.DecodeString(p.Bytes); err != nil {
				t.Errorf("probe %+v", p)
			}
		}
		s := set(nil)
		s.plugins = append(s.plugins, &Plugin{Manifest: m})
		head, tail := s.ProbeReach()
		if head < 0 || tail < 0 || head > 2<<20 || tail > 1<<20 {
			t.Errorf("reach %d, %d", head, tail)
		}
		s.Match(b, b, int64(len(b)))
		_, _ = s.ByName(m.Name)
	})
}

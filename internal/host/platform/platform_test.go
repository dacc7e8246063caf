package platform

import (
	"math"
	"strings"
	"testing"
)

func TestEveryPlatformNamesItsSources(t *testing.T) {
	all, err := All()
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatal("no platforms")
	}
	for _, p := range all {
		if p.Name == "" || p.Title == "" || p.Format == "" || len(p.Rules) == 0 {
			t.Errorf("%+v is incomplete", p)
		}
		for _, r := range p.Rules {
			if r.Rule == "" || !strings.HasPrefix(r.Source, "https://") {
				t.Errorf("%s: rule %+v has no source", p.Name, r)
			}
		}
	}
	if _, err := ByName("nowhere"); err == nil || !strings.Contains(err.Error(), all[0].Name) {
		t.Errorf("unknown platform: %v", err)
	}
}

func TestRoundSize(t *testing.T) {
	p := Platform{SizeMultiple: 1 << 20}
	for in, want := range map[int64]int64{0: 0, 1: 1 << 20, 1 << 20: 1 << 20, 1<<20 + 1: 2 << 20} {
		if got, err := p.RoundSize(in); err != nil || got != want {
			t.Errorf("%d: %d, %v, want %d", in, got, err, want)
		}
	}
	if _, err := p.RoundSize(math.MaxInt64); err == nil {
		t.Error("overflow accepted")
	}
}

package discover

import (
	"bytes"
	"encoding/hex"
	"sort"

	"github.com/instar-img/instar/sdk"
)

// Match is a plugin whose probe fits a file's content.
type Match struct {
	Plugin *Plugin
	Score  int
	// Fallback: only a probe without bytes fits, as it fits any file.
	Fallback bool
}

// Match returns the plugins whose probes fit, the highest score first, each
// once with its best score. head holds the first bytes of the file, tail its
// last, as many as were read; size is the file's length. Probes that reach
// beyond what was read do not fit. Matches below the fallback's are formats that
// the content also fits, and that are never chosen for it.
func (s *Set) Match(head, tail []byte, size int64) []Match {
	var matches []Match
	for _, p := range s.plugins {
		best, fallback := -1, true
		for i := range p.Manifest.Probes {
			probe := &p.Manifest.Probes[i]
			if !fits(probe, head, tail, size) {
				continue
			}
			best = max(best, probe.Score)
			fallback = fallback && probe.Bytes == ""
		}
		if best >= 0 {
			matches = append(matches, Match{Plugin: p, Score: best, Fallback: fallback})
		}
	}
	sort.SliceStable(matches, func(i, j int) bool { return matches[i].Score > matches[j].Score })
	return matches
}

// Fallback returns the plugin that takes files which no probe with bytes fits,
// nil where there is none.
func (s *Set) Fallback() *Plugin {
	var found *Plugin
	best := 0
	for _, p := range s.plugins {
		for _, probe := range p.Manifest.Probes {
			if probe.Bytes == "" && probe.Score > best {
				found, best = p, probe.Score
			}
		}
	}
	return found
}

// ProbeReach returns how many bytes at the start and at the end of a file the
// probes look at.
func (s *Set) ProbeReach() (head, tail int64) {
	const most = 1 << 20
	for _, p := range s.plugins {
		for _, probe := range p.Manifest.Probes {
			n := int64(len(probe.Bytes) / 2)
			switch {
			case probe.AfterComments:
				head = max(head, sdk.CommentReach)
			case probe.Offset < 0 && probe.Offset >= -most:
				tail = max(tail, -probe.Offset)
			case probe.Offset >= 0 && probe.Offset <= most && n <= most:
				head = max(head, probe.Offset+n)
			}
		}
	}
	return head, tail
}

func fits(probe *sdk.Probe, head, tail []byte, size int64) bool {
	want, err := hex.DecodeString(probe.Bytes)
	if err != nil {
		return false
	}
	if len(want) == 0 {
		return true
	}
	from, at := head, probe.Offset
	switch {
	case probe.AfterComments:
		from = afterComments(head[:min(len(head), sdk.CommentReach)])
	case probe.Offset < 0:
		if probe.Offset < -size { // also -size > Offset: the file is too short
			return false
		}
		from, at = tail, int64(len(tail))+probe.Offset
	}
	if at < 0 || at > int64(len(from)) || int64(len(want)) > int64(len(from))-at {
		return false
	}
	got := from[at : at+int64(len(want))]
	for i := range want {
		a, b := got[i], want[i]
		if probe.FoldCase {
			a, b = lower(a), lower(b)
		}
		if a != b {
			return false
		}
	}
	return true
}

// afterComments returns what follows the comments that a text begins with (see
// sdk.Probe); nothing where it has no end of its line.
func afterComments(b []byte) []byte {
	for len(b) > 0 {
		end := bytes.IndexByte(b, '\n')
		switch {
		case b[0] == '#':
		case b[0] == ' ' && end >= 0 && len(bytes.Trim(bytes.TrimSuffix(b[:end], []byte("\r")), " ")) == 0:
		default:
			return b
		}
		if end < 0 {
			return nil
		}
		b = b[end+1:]
	}
	return nil
}

func lower(b byte) byte {
	if 'A' <= b && b <= 'Z' {
		return b + 'a' - 'A'
	}
	return b
}

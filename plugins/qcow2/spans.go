package qcow2

import "sort"

// span is the clusters [start, end).
type span struct{ start, end int64 }

// spans is a set of clusters: sorted, disjoint, neighbours merged.
type spans []span

// after returns the index of the first span that ends after c.
func (s spans) after(c int64) int {
	if n := len(s); n > 0 && s[n-1].start <= c { // the usual place
		if s[n-1].end > c {
			return n - 1
		}
		return n
	}
	return sort.Search(len(s), func(i int) bool { return s[i].end > c })
}

// firstIn returns the span that holds the first member in [start, end).
func (s spans) firstIn(start, end int64) (span, bool) {
	if i := s.after(start); i < len(s) && s[i].start < end {
		return s[i], true
	}
	return span{}, false
}

func (s spans) has(c int64) bool {
	_, ok := s.firstIn(c, c+1)
	return ok
}

// end returns the cluster after the last member.
func (s spans) end() int64 {
	if len(s) == 0 {
		return 0
	}
	return s[len(s)-1].end
}

// add adds [start, end).
func (s *spans) add(start, end int64) {
	if start >= end {
		return
	}
	l := *s
	i := l.after(start - 1) // may touch start from below
	j := i
	for j < len(l) && l[j].start <= end {
		start, end = min(start, l[j].start), max(end, l[j].end)
		j++
	}
	if j == i {
		l = append(l, span{})
		copy(l[i+1:], l[i:])
	} else {
		l = append(l[:i+1], l[j:]...)
	}
	l[i] = span{start, end}
	*s = l
}

// remove takes [start, end) out.
func (s *spans) remove(start, end int64) {
	if start >= end {
		return
	}
	l := *s
	i := l.after(start)
	var keep []span
	j := i
	for ; j < len(l) && l[j].start < end; j++ {
		if l[j].start < start {
			keep = append(keep, span{l[j].start, start})
		}
		if l[j].end > end {
			keep = append(keep, span{end, l[j].end})
		}
	}
	if j == i {
		return
	}
	tail := append(keep, l[j:]...)
	*s = append(l[:i], tail...)
}

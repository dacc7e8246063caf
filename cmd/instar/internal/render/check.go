package render

import (
	"fmt"
	"strings"

	"github.com/instar-img/instar/sdk"
)

// RepairedText is what check -r prints when it repaired something, before it
// checks again and prints CheckText of that.
func RepairedText(r *sdk.CheckResult) string {
	if r == nil || r.LeaksFixed == 0 && r.CorruptionsFixed == 0 {
		return ""
	}
	return fmt.Sprintf("The following inconsistencies were found and repaired:\n\n"+
		"    %d leaked clusters\n    %d corruptions\n\n"+
		"Double checking the fixed image now...\n", r.LeaksFixed, r.CorruptionsFixed)
}

// CheckText is the outcome of a check.
func CheckText(r *sdk.CheckResult) string {
	var b strings.Builder
	if r.Corruptions == 0 && r.Leaks == 0 && r.CheckErrors == 0 {
		b.WriteString("No errors were found on the image.\n")
	}
	if r.Corruptions != 0 {
		fmt.Fprintf(&b, "\n%d errors were found on the image.\n"+
			"Data may be corrupted, or further writes to the image may corrupt it.\n", r.Corruptions)
	}
	if r.Leaks != 0 {
		fmt.Fprintf(&b, "\n%d leaked clusters were found on the image.\n"+
			"This means waste of disk space, but no harm to data.\n", r.Leaks)
	}
	if r.CheckErrors != 0 {
		fmt.Fprintf(&b, "\n%d internal errors have occurred during the check.\n", r.CheckErrors)
	}
	if r.TotalClusters != 0 && r.AllocatedClusters != 0 {
		allocated := float64(r.AllocatedClusters)
		fmt.Fprintf(&b, "%d/%d = %0.2f%% allocated, %0.2f%% fragmented, %0.2f%% compressed clusters\n",
			r.AllocatedClusters, r.TotalClusters, allocated*100/float64(r.TotalClusters),
			float64(r.FragmentedClusters)*100/allocated, float64(r.CompressedClusters)*100/allocated)
	}
	if r.ImageEndOffset > 0 {
		fmt.Fprintf(&b, "Image end offset: %d\n", r.ImageEndOffset)
	}
	return b.String()
}

// CheckObject is the outcome of a check as JSON. After a repair the counts of
// what was fixed stand beside what the second check found.
func CheckObject(filename, format string, r *sdk.CheckResult) *Object {
	o := new(Object)
	o.Set("filename", filename)
	o.Set("format", format)
	o.Set("check-errors", r.CheckErrors)
	for _, m := range []struct {
		key   string
		count int64
	}{
		{"image-end-offset", r.ImageEndOffset},
		{"corruptions", r.Corruptions},
		{"leaks", r.Leaks},
		{"corruptions-fixed", r.CorruptionsFixed},
		{"leaks-fixed", r.LeaksFixed},
		{"total-clusters", r.TotalClusters},
		{"allocated-clusters", r.AllocatedClusters},
		{"fragmented-clusters", r.FragmentedClusters},
		{"compressed-clusters", r.CompressedClusters},
	} {
		if m.count != 0 {
			o.Set(m.key, m.count)
		}
	}
	return o
}

// CheckJSON is what check --output json prints.
func CheckJSON(filename, format string, r *sdk.CheckResult) []byte {
	return Pretty(CheckObject(filename, format, r))
}

package render

import (
	"fmt"
	"strings"
	"time"

	"github.com/instar-img/instar/sdk"
)

// SnapshotTable is the table that info and snapshot -l print, empty where there
// are no snapshots.
func SnapshotTable(snapshots []sdk.Snapshot, style Style) string {
	if len(snapshots) == 0 {
		return ""
	}
	location := style.Location
	if location == nil {
		location = time.Local
	}
	var b strings.Builder
	b.WriteString("Snapshot list:\n")
	if style.Layout == Layout72 {
		fmt.Fprintf(&b, "%-10s%-17s%8s%20s%13s%11s\n", "ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")
	} else {
		fmt.Fprintf(&b, "%-7s %-16s %8s %19s %15s %10s\n", "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
	}
	for i := range snapshots {
		s := &snapshots[i]
		date := time.Unix(s.DateSec, 0).In(location).Format("2006-01-02 15:04:05")
		// QEMU keeps the clock in an uint64 and the hours in an int.
		clock := uint64(s.VMClockNsec)
		secs := clock / 1e9
		hours, minutes, seconds, millis := int32(secs/3600), secs/60%60, secs%60, clock/1e6%1000
		size := humanSize(uint64(s.VMStateSize))
		icount := ""
		if s.Icount != -1 {
			icount = fmt.Sprint(s.Icount)
		}
		id, name := style.text(s.ID), style.text(s.Name)
		if style.Layout == Layout72 {
			fmt.Fprintf(&b, "%s %s %s%20s%13s%11s\n", pad(id, 9), pad(name, 16), padLeft(size, 8), date,
				fmt.Sprintf("%02d:%02d:%02d.%03d", hours, minutes, seconds, millis), icount)
		} else {
			if icount == "" {
				icount = "--"
			}
			fmt.Fprintf(&b, "%s %s %s %19s %15s %10s\n", pad(id, 7), pad(name, 16), padLeft(size, 8), date,
				fmt.Sprintf("%04d:%02d:%02d.%03d", hours, minutes, seconds, millis), icount)
		}
	}
	return b.String()
}

// pad and padLeft fill up to width bytes, as C's printf does.
func pad(s string, width int) string { return s + strings.Repeat(" ", max(0, width-len(s))) }

func padLeft(s string, width int) string { return strings.Repeat(" ", max(0, width-len(s))) + s }

func snapshotObject(s *sdk.Snapshot) *Object {
	o := new(Object)
	o.Set("id", s.ID)
	o.Set("name", s.Name)
	o.Set("vm-state-size", s.VMStateSize)
	o.Set("date-sec", s.DateSec)
	o.Set("date-nsec", s.DateNsec)
	o.Set("vm-clock-sec", int64(uint64(s.VMClockNsec)/1e9))
	o.Set("vm-clock-nsec", int64(uint64(s.VMClockNsec)%1e9))
	if s.Icount != -1 {
		o.Set("icount", s.Icount)
	}
	return o
}

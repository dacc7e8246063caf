// Command liar is a plugin for the tests of package hostile. The name it is
// started under says what it does wrong, and when: instar-format-HOW-WHEN.
package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
	"github.com/instar-img/instar/sdk/serve"
)

func main() {
	_, name, _ := strings.Cut(filepath.Base(os.Args[0]), "instar-format-")
	how, when, _ := strings.Cut(name, "-")
	f := liar{name: name, how: how, when: when}
	if how == "major" && len(os.Args) == 1 {
		fmt.Println("1|" + when + "|unix|/nowhere|grpc|")
		time.Sleep(24 * time.Hour)
	}
	if when == "start" && len(os.Args) == 1 {
		f.at("start")
	}
	serve.Main(f)
}

const (
	size = 1 << 20
	unit = 64 << 10
)

// liar is the format: file and disk are the same, but for what it does wrong.
type liar struct{ name, how, when string }

var flooded atomic.Bool

// at does what is to be done at this point, if it is the point.
func (l liar) at(point string) error {
	if l.when != point {
		return nil
	}
	switch l.how {
	case "hang":
		time.Sleep(24 * time.Hour) // the runtime would notice select {}
	case "slow":
		time.Sleep(time.Second)
	case "exit":
		os.Exit(3)
	case "panic":
		panic("for no reason")
	case "flood":
		if flooded.Swap(true) {
			break
		}
		line := strings.Repeat("noise ", 100) + "\n"
		for range 10_000 {
			fmt.Fprint(os.Stderr, line)
			fmt.Fprint(os.Stdout, line)
		}
	case "eat":
		var all [][]byte
		for {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = byte(i)
			}
			all = append(all, b)
			_ = all
		}
	case "share": // which no limit of a process's own counts
		for {
			b, err := syscall.Mmap(-1, 0, 1<<20, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED|syscall.MAP_ANON)
			if err != nil {
				return fmt.Errorf("mmap: %w", err)
			}
			for i := 0; i < len(b); i += 4096 {
				b[i] = 1
			}
		}
	case "reach":
		return reach()
	case "fork":
		_, err := syscall.ForkExec("/proc/self/exe", []string{"child"}, &syscall.ProcAttr{})
		if err != nil {
			return fmt.Errorf("fork: %w", err)
		}
	case "spin":
		for i := 0; ; i++ {
			_ = i
		}
	case "hint":
		return &sdk.Error{Text: "no", Hint: "\x1b[2J\x1b]0;owned\x07first\nsecond line\r\n" + strings.Repeat("long ", 100_000), Class: sdk.ErrCorrupt}
	case "shout":
		return fmt.Errorf("\x1b[2J\x1b]0;owned\x07first\nsecond line\r\n%s", strings.Repeat("long ", 100_000))
	}
	return nil
}

// reach tries to get at what is not the plugin's, and says what it got.
func reach() error {
	got := []string{"nothing"}
	try := func(what string, err error) {
		if err == nil {
			got = append(got, what)
		}
	}
	for _, name := range []string{"/etc/passwd", "/proc/self/environ", "/dev/null", os.Args[0]} {
		f, err := os.Open(name)
		try("read "+name, err)
		f.Close()
	}
	try("make a file", os.WriteFile("/tmp/made-by-the-liar", nil, 0o666))
	for _, family := range []int{syscall.AF_UNIX, syscall.AF_INET, syscall.AF_INET6} {
		for _, kind := range []int{syscall.SOCK_STREAM, syscall.SOCK_DGRAM} {
			_, err := syscall.Socket(family, kind, 0)
			try(fmt.Sprintf("socket %d %d", family, kind), err)
		}
	}
	for _, program := range []string{"/bin/true", os.Args[0]} {
		_, err := syscall.ForkExec(program, []string{program}, &syscall.ProcAttr{})
		try("start "+program, err)
		try("become "+program, syscall.Exec(program, []string{program}, nil))
	}
	return fmt.Errorf("reached: %s.", strings.Join(got, ", "))
}

func (l liar) Describe() sdk.Description {
	if len(os.Args) == 1 {
		l.at("describe")
	}
	return sdk.Description{
		Manifest: sdk.Manifest{
			Name: l.name, Version: "1", Protocols: []int{sdk.Protocol},
			Capabilities: []string{sdk.CapOpen, sdk.CapCreate, sdk.CapCheck, sdk.CapRepair, sdk.CapWrite, sdk.CapDecode},
			Probes:       []sdk.Probe{{Bytes: hex.EncodeToString([]byte("instar! ")), Score: 100}},
		},
		Create: option.Schema{
			{Name: "size", Type: option.Size, Help: "size"},
			{Name: "backing_file", Type: option.String, Help: "backing file"},
			{Name: "backing_fmt", Type: option.String, Help: "its format"},
		},
	}
}

func (l liar) Open(_ context.Context, req sdk.OpenRequest) (sdk.Image, error) {
	img := &image{liar: l, main: req.Files[0].File, writable: req.ReadWrite}
	return img, l.at("open")
}

func (l liar) PlanCreate(_ context.Context, req sdk.CreateRequest) (sdk.Plan, error) {
	p := plan{l, sdk.PlanInfo{
		VirtualSize: req.Size, AllocationUnit: unit,
		Files: []sdk.PlannedFile{{Role: sdk.RoleMain, Length: req.Size}},
	}}
	if l.how == "plan" {
		second := func(f sdk.PlannedFile) { p.info.Files = append(p.info.Files, f) }
		switch l.when {
		case "none":
			p.info.Files = nil
		case "role":
			p.info.Files[0].Role = "other"
		case "up":
			second(sdk.PlannedFile{Role: "extent:1", Name: "../escaped", Length: 1})
		case "absolute":
			second(sdk.PlannedFile{Role: "extent:1", Name: "/tmp/escaped-by-the-liar", Length: 1})
		case "same":
			second(sdk.PlannedFile{Role: "extent:1", Name: req.Name, Length: 1})
		case "dot":
			second(sdk.PlannedFile{Role: "extent:1", Name: ".", Length: 1})
		case "empty":
			second(sdk.PlannedFile{Role: "extent:1", Name: "", Length: 1})
		case "nul":
			second(sdk.PlannedFile{Role: "extent:1", Name: "a\x00b", Length: 1})
		case "long":
			second(sdk.PlannedFile{Role: "extent:1", Name: strings.Repeat("x", 5000), Length: 1})
		case "existing":
			second(sdk.PlannedFile{Role: "extent:1", Name: "precious", Length: 1})
		case "negative":
			p.info.Files[0].Length = -1
		case "huge":
			p.info.Files[0].Length = math.MaxInt64
		case "full":
			p.info.Files[0].Length = 1 << 62
			p.info.Files[0].Preallocation = sdk.PreallocFalloc
		}
	}
	return p, l.at("plan")
}

type plan struct {
	liar
	info sdk.PlanInfo
}

func (p plan) Info() sdk.PlanInfo                          { return p.info }
func (p plan) Emit(context.Context, []sdk.NamedFile) error { return p.at("emit") }

func (p plan) Measure(context.Context, sdk.MeasureRequest) (sdk.MeasureResult, error) {
	r := sdk.MeasureResult{Required: 1, FullyAllocated: 2, Bitmaps: -1}
	if p.how == "measure" {
		r = sdk.MeasureResult{Required: -5, FullyAllocated: math.MinInt64, Bitmaps: math.MinInt64}
	}
	return r, p.at("measure")
}

type image struct {
	liar
	main     sdk.File
	writable bool
}

func (m *image) Info(context.Context) (*sdk.Info, error) {
	n, err := m.main.Size()
	if err != nil {
		return nil, err
	}
	info := &sdk.Info{VirtualSize: n, AllocationUnit: unit}
	if m.how == "map" && m.when == "endless" {
		info.VirtualSize = 1 << 62
	}
	if m.when == "attach" {
		info.References = []sdk.Reference{{Kind: sdk.RefExtent, Role: "extent:1", Name: "precious", Required: true}}
	}
	if m.when == "readbitmap" || m.when == "writebitmap" || m.how == "bitmap" {
		info.HasBitmaps = true
		if m.writable {
			return info, nil // a new image, which is to get them
		}
		info.Bitmaps = []sdk.BitmapInfo{{Name: "b", Granularity: unit, Enabled: true}}
		if m.how == "bitmap" {
			switch m.when {
			case "granularity":
				info.Bitmaps[0].Granularity = 3
			case "zero":
				info.Bitmaps[0].Granularity = 0
			case "negative":
				info.Bitmaps[0].Granularity = math.MinInt64
			case "name":
				info.Bitmaps[0].Name = "\x1b[2J\nfaked: yes" + strings.Repeat("x", 1100)
			case "twice":
				info.Bitmaps = append(info.Bitmaps, info.Bitmaps[0])
			case "many":
				for i := range 20_000 {
					info.Bitmaps = append(info.Bitmaps, sdk.BitmapInfo{Name: fmt.Sprint(i), Granularity: unit})
				}
			}
		}
	}
	if m.how == "info" {
		ref := func(kind sdk.ReferenceKind, name string) {
			info.References = append(info.References, sdk.Reference{Kind: kind, Role: "r", Name: name, Required: true})
		}
		switch m.when {
		case "negative":
			info.VirtualSize = -1
		case "max":
			info.VirtualSize = math.MaxInt64
		case "unit":
			info.AllocationUnit = math.MaxInt64
		case "backing":
			ref(sdk.RefBacking, "SECRET")
		case "data":
			ref(sdk.RefData, "SECRET")
		case "extent":
			ref(sdk.RefExtent, "SECRET")
		case "kind":
			ref("whatever", "SECRET")
		case "many":
			for i := range 100_000 {
				info.Specific = append(info.Specific, sdk.IntFact(fmt.Sprint(i), int64(i)))
			}
			info.SpecificType = m.name
		case "big":
			info.SpecificType = m.name
			info.Specific = []sdk.Fact{sdk.StringFact("x", strings.Repeat("x", 32<<20))}
		case "deep":
			f := sdk.IntFact("x", 1)
			for range 2000 {
				f = sdk.ObjectFact("x", f)
			}
			info.SpecificType, info.Specific = m.name, []sdk.Fact{f}
		case "ansi":
			info.SpecificType = "\x1b[2J"
			info.Specific = []sdk.Fact{sdk.StringFact("\x1b[2J", "\x1b[2J\nfaked: yes")}
			info.Snapshots = []sdk.Snapshot{{ID: "\x1b[2J", Name: "\x1b[2J\nfaked: yes"}}
		case "snapshot":
			info.Snapshots = []sdk.Snapshot{{ID: "1", Name: "x", VMStateSize: math.MinInt64, DateSec: math.MaxInt64, DateNsec: math.MinInt64, VMClockNsec: math.MinInt64, DiskSize: -1}}
		case "utf8":
			info.References = []sdk.Reference{{Kind: sdk.RefBacking, Name: "\xff\xfe"}}
		}
	}
	return info, m.at("info")
}

func (m *image) Map(ctx context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	if err := m.at("map"); err != nil {
		return err
	}
	one := sdk.Extent{Offset: off, Length: length, Kind: sdk.Data, HostOffset: off, Sparse: true}
	if m.how == "decode" || m.when == "decode" {
		one.Kind, one.EncodedLength, one.Length = sdk.Encoded, 10, min(length, unit)
		for at := off; at < off+length; at += unit {
			one.Offset, one.Length = at, min(unit, off+length-at)
			if !yield([]sdk.Extent{one}) {
				return nil
			}
		}
		return nil
	}
	if m.how == "map" {
		switch m.when {
		case "beyond":
			one.HostOffset = 1 << 40
		case "overflow":
			one.HostOffset = math.MaxInt64 - 10
		case "file":
			one.File = 7
		case "long":
			one.Length *= 2
		case "max":
			one.Length = math.MaxInt64
		case "negative":
			one.Length = -1
		case "none":
			return nil
		case "short":
			one.Length /= 2
		case "empty":
			for ctx.Err() == nil {
				one.Length = 0
				if !yield([]sdk.Extent{one}) {
					return nil
				}
			}
			return nil
		case "kind":
			one.Kind = 9
		case "nowhere":
			one.HostOffset = -1
		case "encoded":
			one.Kind, one.EncodedLength = sdk.Encoded, math.MaxInt64
		case "huge":
			one.Kind, one.EncodedLength, one.HostOffset = sdk.Encoded, 1<<40, math.MaxInt64-5
		case "overlap":
			for at := off; at < off+length; at += 4096 {
				one.Offset, one.Length, one.HostOffset = at, min(4096, off+length-at), 0
				if !yield([]sdk.Extent{one}) {
					return nil
				}
			}
			return nil
		case "endless":
			one.Length = 1
			all := make([]sdk.Extent, 4096)
			for i := range all {
				all[i] = one
				all[i].HostOffset = int64(i % 2 * 5)
			}
			for yield(all) {
				continue
			}
			return nil
		}
	}
	yield([]sdk.Extent{one})
	return nil
}

// Warnings implements sdk.Warner.
func (m *image) Warnings() []string {
	if m.how != "warn" {
		return nil
	}
	switch m.when {
	case "many":
		return slices.Repeat([]string{"again"}, 10_000)
	case "long":
		return []string{strings.Repeat("long ", 10_000)}
	}
	return []string{"\x1b[2J\x1b]0;owned\x07first\nsecond line\r\n\u202eright to left", "\xff\xfe"}
}

func (m *image) Close() error { return m.at("close") }

func (m *image) Decode(_ context.Context, _ sdk.Extent, dst []byte) error {
	for i := range dst {
		dst[i] = 'd'
	}
	return m.at("decode")
}

func (m *image) Attach(context.Context, []sdk.NamedFile) error { return m.at("attach") }

func (m *image) Inspect(context.Context) (*sdk.Inspection, error) {
	in := &sdk.Inspection{}
	if m.how == "rule" {
		in.Findings = []sdk.Finding{{Rule: "made-up", Text: "what is this"}}
	}
	return in, m.at("inspect")
}

func (m *image) Check(ctx context.Context, req sdk.CheckRequest) (*sdk.CheckResult, error) {
	if err := m.at("check"); err != nil {
		return nil, err
	}
	if req.Fix != sdk.FixNone {
		if err := m.at("repair"); err != nil {
			return nil, err
		}
	}
	if m.how == "check" {
		switch m.when {
		case "endless":
			for ctx.Err() == nil {
				req.Message(strings.Repeat("m", 1000))
			}
		case "ansi":
			req.Message("\x1b[2J\x1b]0;owned\x07\nfaked line")
		case "counts":
			return &sdk.CheckResult{CheckErrors: math.MinInt64, Corruptions: -1, Leaks: math.MaxInt64, TotalClusters: -7, AllocatedClusters: math.MaxInt64, FragmentedClusters: math.MinInt64, ImageEndOffset: -1}, nil
		case "progress":
			req.Progress(math.NaN())
			req.Progress(math.Inf(1))
			req.Progress(-5)
		}
	}
	return &sdk.CheckResult{}, nil
}

func (m *image) BeginWrite(context.Context, sdk.WriteRequest) (sdk.WriteInfo, error) {
	w := sdk.WriteInfo{Unit: unit, ReadsZero: m.when != "zero", Ahead: m.how == "ahead"}
	if m.how == "unit" {
		switch m.when {
		case "zero":
			w.Unit = 0
		case "negative":
			w.Unit = math.MinInt64
		case "one":
			w.Unit = 1
		case "odd":
			w.Unit = 12345
		case "max":
			w.Unit = math.MaxInt64
		case "maxexplode":
			w.Unit, w.ReadsZero = math.MaxInt64, false
		case "big":
			w.Unit, w.ReadsZero = 1<<62, false
		case "encode":
			w.Unit, w.EncodeOnly = 1<<62, true
		case "encode64":
			w.Unit, w.EncodeOnly = 63<<20, true
		}
	}
	return w, m.at("begin")
}

func (m *image) Place(_ context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	if err := m.at("place"); err != nil {
		return nil, err
	}
	var out []sdk.Placement
	for _, r := range runs {
		p := sdk.Placement{Offset: r.Offset, Length: r.Length, HostOffset: r.Offset}
		if m.how == "place" {
			switch m.when {
			case "far":
				p.HostOffset = 1 << 50
			case "beyond":
				p.HostOffset = 1 << 42
			case "max":
				p.HostOffset = math.MaxInt64 - r.Length
			case "overflow":
				p.HostOffset = math.MaxInt64 - 1
			case "negative":
				p.HostOffset = -4096
			case "file":
				p.File = 1
			case "filenegative":
				p.File = -1
			case "short":
				p.Length /= 2
			case "long":
				p.Length *= 2
			case "other":
				p.Offset += 512
			case "none":
				continue
			case "twice":
				out = append(out, p)
			}
		}
		out = append(out, p)
	}
	return out, nil
}

func (m *image) Zero(context.Context, []sdk.Run) error { return m.at("zero") }

func (m *image) ReadBitmap(ctx context.Context, _ string, yield func([]sdk.Run) bool) error {
	run := sdk.Run{Offset: 0, Length: unit}
	if m.how == "bitmap" {
		switch m.when {
		case "beyond":
			run.Offset = 1 << 40
		case "overflow":
			run.Offset, run.Length = math.MaxInt64-5, 100
		case "minus":
			run.Offset = -unit
		case "length":
			run.Length = -1
		case "back":
			yield([]sdk.Run{{Offset: 4 * unit, Length: unit}})
		case "endless":
			for ctx.Err() == nil && yield([]sdk.Run{run}) {
				continue
			}
		}
	}
	yield([]sdk.Run{run})
	return m.at("readbitmap")
}

func (m *image) WriteBitmap(context.Context, sdk.BitmapInfo, []sdk.Run) error {
	return m.at("writebitmap")
}

func (m *image) Encode(context.Context, []sdk.Unit) error { return m.at("encode") }

func (m *image) Finish(context.Context) error {
	time.Sleep(time.Millisecond)
	return m.at("finish")
}

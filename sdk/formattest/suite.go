package formattest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
)

// Config says what Run tests of a format. The zero value is useful.
type Config struct {
	// Options are the sets of creation options to test, as in -o; none: the
	// defaults alone.
	Options []string
	// CompressedOptions are the sets with which encoded writing is tested too.
	CompressedOptions []string
	// Sizes asked for; none: 0, 1, 511, 512, 1 MiB +- 1, 2 GiB +- 512.
	Sizes []int64
	// Refuses reports sizes that create must refuse; nil: none of Sizes.
	Refuses func(size int64, opts string) bool
	// WriteSize is the virtual size of images that are written; 0: 5 MiB + 512.
	WriteSize int64
	// FlipBytes bounds the metadata of which every bit is flipped, in bytes
	// among the sectors that are neither zero nor guest data; 0: 8 KiB.
	FlipBytes int
	// WireOptions are the sets tested over the wire too; none: the first of
	// Options.
	WireOptions []string
}

// hang is how long one operation on a small image may take before it counts
// as hanging: far more than any working one needs.
const hang = 2 * time.Minute

// Run is the conformance suite. newFormat returns the format afresh.
func Run(t *testing.T, newFormat func() sdk.Format, cfg Config) {
	if len(cfg.Options) == 0 {
		cfg.Options = []string{""}
	}
	if len(cfg.Sizes) == 0 {
		cfg.Sizes = []int64{0, 1, 511, 512, 1<<20 - 1, 1<<20 + 1, 2<<30 - 512, 2<<30 + 512}
	}
	if cfg.WriteSize == 0 {
		cfg.WriteSize = 5<<20 + 512
	}
	if cfg.FlipBytes == 0 {
		cfg.FlipBytes = 8 << 10
	}
	if len(cfg.WireOptions) == 0 {
		cfg.WireOptions = cfg.Options[:1]
	}
	m := newFormat().Describe().Manifest
	s := &suite{Config: cfg, direct: newFormat, format: func(testing.TB) sdk.Format { return newFormat() }}
	s.whole(t, &m)
	if m.Has(sdk.CapCreate) && m.Has(sdk.CapOpen) {
		t.Run("plan", s.plan)
		t.Run("reproducible", s.reproducible)
		t.Run("readfault", s.readFault)
		t.Run("writefault", s.writeFault)
		t.Run("truncate", s.truncate)
		t.Run("flip", s.flip)
	}
	t.Run("wire", func(t *testing.T) {
		over := *s
		over.Options = cfg.WireOptions
		over.CompressedOptions = cfg.CompressedOptions[:min(1, len(cfg.CompressedOptions))]
		over.format = func(t testing.TB) sdk.Format { return OverWire(t, newFormat()) }
		if direct, wired := asText(t, newFormat().Describe()), asText(t, over.format(t).Describe()); direct != wired {
			t.Errorf("over the wire the description\n%s\nbecomes\n%s", direct, wired)
		}
		over.whole(t, &m)
	})
}

// whole runs the tests that use sound images.
func (s *suite) whole(t *testing.T, m *sdk.Manifest) {
	t.Run("describe", s.describe)
	if m.Has(sdk.CapCreate) && m.Has(sdk.CapOpen) {
		t.Run("create", s.create)
		t.Run("concurrent", s.concurrent)
		t.Run("cancel", s.cancel)
	}
	if m.Has(sdk.CapCreate) && m.Has(sdk.CapWrite) {
		t.Run("write", s.write)
		t.Run("ahead", s.ahead)
	}
}

// asText is v in a form that does not tell empty from missing lists.
func asText(t testing.TB, v any) string {
	t.Helper()
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer("[]", "null", "{}", "null").Replace(string(b))
}

type suite struct {
	Config
	direct func() sdk.Format
	format func(testing.TB) sdk.Format
}

func (s *suite) describe(t *testing.T) {
	d := s.format(t).Describe()
	if again := s.format(t).Describe(); !reflect.DeepEqual(d, again) {
		t.Errorf("Describe is not constant: %+v, then %+v", d, again)
	}
	m := d.Manifest
	if m.Name == "" || m.Version == "" || len(m.Protocols) == 0 || len(m.Capabilities) == 0 {
		t.Errorf("manifest lacks a name, version, protocols or capabilities: %+v", m)
	}
	known := map[string]bool{sdk.CapOpen: true, sdk.CapCreate: true, sdk.CapCheck: true, sdk.CapRepair: true, sdk.CapWrite: true, sdk.CapDecode: true}
	for _, c := range m.Capabilities {
		if !known[c] {
			t.Errorf("capability %q is not known", c)
		}
	}
	for _, p := range m.Probes {
		if len(p.Bytes)%2 != 0 || p.Score < 0 || p.Score > 100 {
			t.Errorf("probe %+v", p)
		}
	}
	rules := map[string]bool{}
	for _, r := range m.Rules {
		if !r.Valid() || rules[r.Name] {
			t.Errorf("rule %+v is not valid, or appears twice", r)
		}
		rules[r.Name] = true
	}
	seen := map[string]bool{}
	for _, k := range d.Create {
		if seen[k.Name] {
			t.Errorf("create key %q appears twice", k.Name)
		}
		seen[k.Name] = true
		if k.Help == "" {
			t.Errorf("create key %q has no help", k.Name)
		}
		if (k.Type == option.Enum) != (len(k.Allowed) > 0) {
			t.Errorf("create key %q: allowed values %v for type %d", k.Name, k.Allowed, k.Type)
		}
		if (k.Disposition == option.Deferred || k.Disposition == option.Deprecated) && k.Reason == "" {
			t.Errorf("create key %q has no reason", k.Name)
		}
	}
	if m.Has(sdk.CapCreate) {
		if _, ok := s.format(t).(sdk.Creator); !ok {
			t.Error("the manifest lists create, the format does not implement Creator")
		}
		if !seen["size"] {
			t.Error(`create has no key "size"`)
		}
		if _, err := d.Create.Validate(m.Name, nil); err != nil {
			t.Errorf("defaults do not validate: %v", err)
		}
	}
}

func (s *suite) create(t *testing.T) {
	f := s.format(t)
	for _, opts := range s.Options {
		for _, size := range s.Sizes {
			t.Run(fmt.Sprintf("%s/%d", opts, size), func(t *testing.T) {
				dir := t.TempDir()
				name := "image"
				path, err := TryCreate(t, f, dir, name, size, opts)
				if s.Refuses != nil && s.Refuses(size, opts) {
					if err == nil {
						t.Fatal("accepted")
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				plan, err := TryPlan(t, f, dir, name, size, opts, nil)
				if err != nil {
					t.Fatal(err)
				}
				o := Open(t, f, path, false)
				if got, want := o.Info.VirtualSize, plan.Info().VirtualSize; got != want || got < size {
					t.Errorf("virtual size %d, planned %d, asked for %d", got, want, size)
				}
				for _, e := range o.Map() {
					if e.Kind == sdk.Encoded {
						t.Errorf("an empty image has the extent %+v", e)
					}
				}
				s.subranges(t, o)
				s.checkClean(t, f, path)
			})
		}
	}
}

// subranges compares the map of parts with the map of the whole.
func (s *suite) subranges(t *testing.T, o *Opened) {
	t.Helper()
	size := o.Info.VirtualSize
	if size == 0 {
		if err := o.Image.Map(context.Background(), 0, 0, func([]sdk.Extent) bool { return true }); err != nil {
			t.Errorf("map of nothing: %v", err)
		}
		return
	}
	whole := o.Map()
	rng := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		off := rng.Int64N(size)
		n := 1 + rng.Int64N(size-off)
		part, err := MapRange(context.Background(), o.Image, off, n)
		if err != nil {
			t.Fatalf("map %#x+%#x: %v", off, n, err)
		}
		if want := cut(whole, off, n); !reflect.DeepEqual(part, want) {
			t.Fatalf("map %#x+%#x: %+v, want %+v", off, n, part, want)
		}
	}
	// Stopping early is no error.
	if err := o.Image.Map(context.Background(), 0, size, func([]sdk.Extent) bool { return false }); err != nil {
		t.Errorf("map stopped by the caller: %v", err)
	}
}

// cut returns the part of whole inside a guest range. Encoded extents cannot be
// cut by their host offset and are kept as they are but for the guest range.
func cut(whole []sdk.Extent, off, n int64) []sdk.Extent {
	var out []sdk.Extent
	for _, e := range whole {
		lo, hi := max(e.Offset, off), min(e.Offset+e.Length, off+n)
		if lo >= hi {
			continue
		}
		if e.HostOffset >= 0 && e.Kind != sdk.Encoded {
			e.HostOffset += lo - e.Offset
		}
		e.Offset, e.Length = lo, hi-lo
		out = append(out, e)
	}
	return out
}

func (s *suite) checkClean(t *testing.T, f sdk.Format, path string) {
	t.Helper()
	m := f.Describe().Manifest
	if !m.Has(sdk.CapCheck) {
		return
	}
	o, err := TryOpen(t, f, path, sdk.OpenRequest{Check: true})
	if err != nil {
		t.Fatalf("open for check: %v", err)
	}
	checker, ok := o.Image.(sdk.Checker)
	if !ok {
		t.Fatal("the manifest lists check, the image does not implement Checker")
	}
	res, err := checker.Check(context.Background(), sdk.CheckRequest{
		Message:  func(m string) { t.Logf("check: %s", m) },
		Progress: func(float64) {},
	})
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	if res.CheckErrors+res.Corruptions+res.Leaks != 0 {
		t.Errorf("check of a sound image: %+v", *res)
	}
}

// sample creates an image with some data in it where the format can.
func (s *suite) sample(t *testing.T, f sdk.Format, opts string) string {
	t.Helper()
	path, err := CreateAs(t, f, t.TempDir(), "image", s.WriteSize, opts, reproducible)
	if err != nil {
		t.Fatal(err)
	}
	if m := f.Describe().Manifest; m.Has(sdk.CapWrite) {
		Write(t, f, path, map[int64][]byte{0: pattern(1, 512), 1 << 20: pattern(2, 4096)}, false)
	}
	return path
}

// plan looks at plans alone, also of sizes too large to make.
func (s *suite) plan(t *testing.T) {
	f := s.direct()
	schema := f.Describe().Create
	for _, opts := range s.Options {
		for _, size := range append(slices.Clone(s.Sizes), 2040<<30, 2040<<30+1, 64<<40, 64<<40+1, 1<<62, math.MaxInt64) {
			p, err := TryPlan(t, f, t.TempDir(), "image", size, opts, nil)
			if err != nil {
				if !errors.Is(err, sdk.ErrTooBig) && !errors.Is(err, sdk.ErrInvalid) && !errors.Is(err, sdk.ErrUnsupported) {
					t.Errorf("%q, size %d: the refusal has no class: %v", opts, size, err)
				}
				continue
			}
			info := p.Info()
			if info.VirtualSize < size {
				t.Errorf("%q, size %d: planned %d", opts, size, info.VirtualSize)
			}
			at := 0
			for _, v := range info.Options {
				for at < len(schema) && !schema[at].Matches(v.Key) {
					at++
				}
				if at == len(schema) {
					t.Errorf("%q, size %d: option %s is not in the schema, or not in its order: %+v", opts, size, v.Key, info.Options)
					break
				}
			}
			roles := map[string]bool{}
			for i, file := range info.Files {
				if roles[file.Role] || (file.Role == sdk.RoleMain) != (i == 0) || (file.Name == "") != (i == 0) || file.Length < 0 {
					t.Errorf("%q, size %d: planned file %d is %+v", opts, size, i, file)
				}
				roles[file.Role] = true
			}
			if m, ok := p.(sdk.Measurer); ok {
				res, err := m.Measure(context.Background(), sdk.MeasureRequest{})
				if err == nil && (res.Required < 0 || res.Required > res.FullyAllocated) {
					t.Errorf("%q, size %d: measured %+v", opts, size, res)
				}
			}
		}
	}
}

// reproducible makes the same image twice.
func (s *suite) reproducible(t *testing.T) {
	for _, opts := range s.Options {
		_, a := s.inMemory(t, opts)
		_, b := s.inMemory(t, opts)
		for i := range a {
			if !bytes.Equal(a[i], b[i]) {
				t.Errorf("%q: file %d differs between two reproducible images", opts, i)
			}
		}
	}
}

// maxFaults bounds how many operations of one kind fail, one at a time.
const maxFaults = 40

// faultsIn returns which of n operations are to fail: all of a few, else the
// first ones and a sample.
func faultsIn(n int) []int {
	var out []int
	for i := 1; i <= n; i += 1 + max(0, i-maxFaults/2)*n/(8*maxFaults) {
		out = append(out, i)
	}
	return out
}

// readFault fails each read of a sound image once: a read that failed must
// not look like zeros, or like an image with less in it.
func (s *suite) readFault(t *testing.T) {
	f := s.direct()
	ctx := context.Background()
	for _, opts := range s.Options {
		roles, contents := s.inMemory(t, opts)
		attempt := func(faults *Faults) ([]byte, error) {
			files := memFiles(roles, contents)
			for i := range files {
				files[i].File = faults.File(files[i].File)
			}
			img, err := f.Open(ctx, sdk.OpenRequest{Files: files[:1], Name: "image"})
			if err != nil {
				return nil, err
			}
			defer img.Close()
			info, err := img.Info(ctx)
			if err != nil {
				return nil, err
			}
			if a, ok := img.(sdk.Attacher); ok && len(files) > 1 {
				if err := a.Attach(ctx, files[1:]); err != nil {
					return nil, err
				}
			}
			return readRange(ctx, img, files, 0, info.VirtualSize)
		}
		sound := &Faults{}
		want, err := attempt(sound)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range faultsIn(sound.Reads) {
			guard(t, fmt.Sprintf("%q with read %d failing", opts, n), func() {
				if got, err := attempt(&Faults{Read: n}); err == nil && !bytes.Equal(got, want) {
					t.Errorf("%q: read %d failed, and the content is another without an error", opts, n)
				}
			})
		}
	}
}

// writeFault fails each write of Emit, Place and Finish once: none may pass
// for success.
func (s *suite) writeFault(t *testing.T) {
	f := s.direct()
	ctx := context.Background()
	m := f.Describe().Manifest
	for _, opts := range s.Options {
		attempt := func(faults *Faults) error {
			p, err := TryPlan(t, f, t.TempDir(), "image", s.WriteSize, opts, reproducible)
			if err != nil {
				t.Fatal(err)
			}
			var inner, files []sdk.NamedFile
			for _, want := range p.Info().Files {
				file := MemFile(make([]byte, want.Length))
				inner = append(inner, sdk.NamedFile{Role: want.Role, File: file})
				files = append(files, sdk.NamedFile{Role: want.Role, File: faults.File(file)})
			}
			if err := p.Emit(ctx, files); err != nil || !m.Has(sdk.CapWrite) {
				return err
			}
			img, err := f.Open(ctx, sdk.OpenRequest{Files: files[:1], Name: "image", ReadWrite: true})
			if err != nil {
				return err
			}
			defer img.Close()
			o := &Opened{t: t, Image: img, Files: inner, path: "image"}
			if o.Info, err = img.Info(ctx); err != nil {
				return err
			}
			if a, ok := img.(sdk.Attacher); ok && len(files) > 1 {
				if err := a.Attach(ctx, files[1:]); err != nil {
					return err
				}
			}
			return o.write(ctx, map[int64][]byte{0: pattern(1, 512), 1 << 20: pattern(2, 4096)}, false)
		}
		sound := &Faults{}
		if err := attempt(sound); err != nil {
			t.Fatal(err)
		}
		for _, n := range faultsIn(sound.Writes) {
			guard(t, fmt.Sprintf("%q with write %d failing", opts, n), func() {
				if err := attempt(&Faults{Write: n}); err == nil {
					t.Errorf("%q: write %d of %d failed without an error", opts, n, sound.Writes)
				}
			})
		}
	}
}

func reproducible(req *sdk.CreateRequest) { req.Reproducible, req.Time = true, reproducibleTime }

func (s *suite) concurrent(t *testing.T) {
	f := s.format(t)
	o := Open(t, f, s.sample(t, f, s.Options[0]), false)
	want := o.Map()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 3))
			for range 20 {
				off := rng.Int64N(o.Info.VirtualSize)
				n := 1 + rng.Int64N(o.Info.VirtualSize-off)
				got, err := MapRange(context.Background(), o.Image, off, n)
				if err != nil || !reflect.DeepEqual(got, cut(want, off, n)) {
					t.Errorf("concurrent map %#x+%#x: %+v, %v", off, n, got, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func (s *suite) cancel(t *testing.T) {
	f := s.format(t)
	path := s.sample(t, f, s.Options[0])
	o := Open(t, f, path, false)
	ctx, stop := context.WithCancel(context.Background())
	stop()
	guard(t, "map with a cancelled context", func() {
		// A map this small may be through before it looks at the context.
		if _, err := MapRange(ctx, o.Image, 0, o.Info.VirtualSize); err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("map with a cancelled context: %v", err)
		}
	})
	// The image works on.
	o.Map()
}

// guard fails the test, naming what, when fn panics or hangs.
func guard(t testing.TB, what string, fn func()) {
	t.Helper()
	timer := time.AfterFunc(hang, func() { panic("formattest: hangs: " + what) })
	defer timer.Stop()
	defer func() {
		if r := recover(); r != nil {
			t.Fatalf("%s: panic: %v\n%s", what, r, debug.Stack())
		}
	}()
	fn()
}

// touch does with a damaged image all that a core would: errors are welcome,
// panics, hangs and writes are not.
func (s *suite) touch(f sdk.Format, files []sdk.NamedFile, check bool) error {
	before := allocated()
	err := s.touchAll(f, files, check)
	if used := allocated() - before; err == nil && used > maxAlloc {
		return fmt.Errorf("%d bytes allocated, at most %d are expected", used, int64(maxAlloc))
	}
	return err
}

// allocated returns how many bytes this process has allocated so far.
func allocated() uint64 {
	sample := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(sample)
	return sample[0].Value.Uint64()
}

// maxAlloc is what handling a damaged image may allocate in all.
const maxAlloc = 256 << 20

func (s *suite) touchAll(f sdk.Format, files []sdk.NamedFile, check bool) error {
	ctx := context.Background()
	img, err := f.Open(ctx, sdk.OpenRequest{Files: files[:1], Name: "image", Check: check})
	if err != nil {
		return harmless(err)
	}
	defer img.Close()
	info, err := img.Info(ctx)
	if err != nil {
		return harmless(err)
	}
	if info.VirtualSize < 0 {
		return fmt.Errorf("virtual size %d", info.VirtualSize)
	}
	if a, ok := img.(sdk.Attacher); ok && len(files) > 1 {
		if err := a.Attach(ctx, files[1:]); err != nil {
			return harmless(err)
		}
	}
	n := 0
	var extents []sdk.Extent
	at := int64(0)
	var broken error
	err = img.Map(ctx, 0, info.VirtualSize, func(batch []sdk.Extent) bool {
		for _, e := range batch {
			if broken = checkExtent(nil, e, at, info.VirtualSize); broken != nil {
				return false
			}
			at += e.Length
			if e.Kind == sdk.Encoded && len(extents) < 8 {
				extents = append(extents, e)
			}
		}
		n += len(batch)
		return n < 1<<14
	})
	if broken != nil {
		return broken
	}
	if err := harmless(err); err != nil {
		return err
	}
	if d, ok := img.(sdk.Decoder); ok {
		for _, e := range extents {
			if e.Length > 1<<26 {
				continue
			}
			if err := harmless(d.Decode(ctx, e, make([]byte, e.Length))); err != nil {
				return err
			}
		}
	}
	if c, ok := img.(sdk.Checker); ok && check {
		_, err := c.Check(ctx, sdk.CheckRequest{Message: func(string) {}, Progress: func(float64) {}})
		return harmless(err)
	}
	return nil
}

// harmless drops the errors that a damaged image may end in.
func harmless(err error) error {
	if errors.Is(err, ErrWritten) {
		return err
	}
	return nil
}

// inMemory creates a sample in process and returns the content of its files.
func (s *suite) inMemory(t *testing.T, opts string) (roles []string, contents [][]byte) {
	t.Helper()
	f := s.direct()
	o := Open(t, f, s.sample(t, f, opts), false)
	for _, nf := range o.Files {
		size, err := nf.File.Size()
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, size)
		if _, err := nf.File.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
		roles, contents = append(roles, nf.Role), append(contents, b)
	}
	return roles, contents
}

func memFiles(roles []string, contents [][]byte) []sdk.NamedFile {
	var files []sdk.NamedFile
	for i := range roles {
		files = append(files, sdk.NamedFile{Role: roles[i], File: ReadOnly(MemFile(contents[i]))})
	}
	return files
}

// truncate cuts an image short, everywhere at the start, where metadata lies,
// and in places behind it.
func (s *suite) truncate(t *testing.T) {
	f := s.direct()
	for i, opts := range s.Options {
		roles, contents := s.inMemory(t, opts)
		whole := contents[0]
		dense, coarse := 512, 32<<10
		if i > 0 || testing.Short() {
			dense = 8 << 10
		}
		for n := 0; n < len(whole); {
			for _, n := range []int{n, n + 1, n + 511} {
				if n >= len(whole) {
					continue
				}
				contents[0] = whole[:n:n]
				what := fmt.Sprintf("%q truncated to %d of %d bytes", opts, n, len(whole))
				guard(t, what, func() {
					for _, check := range []bool{false, true} {
						if err := s.touch(f, memFiles(roles, contents), check); err != nil {
							t.Errorf("%s: %v", what, err)
						}
					}
				})
			}
			switch left := len(whole) - n; {
			case n < 256<<10 || left <= 2048:
				n += min(dense, max(512, left-2048))
			default:
				n += min(coarse, left-2048)
			}
		}
	}
}

// flip damages metadata bit by bit: every bit for the first set of options, a
// sample for the others.
func (s *suite) flip(t *testing.T) {
	f := s.direct()
	for i, opts := range s.Options {
		roles, contents := s.inMemory(t, opts)
		b := contents[0]
		files := memFiles(roles, contents)
		guest := guestBytes(t, f, files)
		step := 1
		if i > 0 || testing.Short() {
			step = 29
		}
		left := s.FlipBytes
		for sector := 0; sector < len(b) && left > 0; sector += 512 {
			end := min(sector+512, len(b))
			if guest[int64(sector)] || len(bytes.TrimLeft(b[sector:end], "\x00")) == 0 {
				continue
			}
			left -= end - sector
			for bit := sector * 8; bit < end*8; bit += step {
				b[bit/8] ^= 1 << (bit % 8)
				what := fmt.Sprintf("%q with bit %d of byte %#x flipped", opts, bit%8, bit/8)
				guard(t, what, func() {
					for _, check := range []bool{false, true} {
						if err := s.touch(f, files, check); err != nil {
							t.Errorf("%s: %v", what, err)
						}
					}
				})
				b[bit/8] ^= 1 << (bit % 8)
			}
		}
	}
}

// guestBytes returns the sectors of the main file that hold guest data, which
// no parser looks at.
func guestBytes(t *testing.T, f sdk.Format, files []sdk.NamedFile) map[int64]bool {
	t.Helper()
	ctx := context.Background()
	img, err := f.Open(ctx, sdk.OpenRequest{Files: files[:1], Name: "image"})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if a, ok := img.(sdk.Attacher); ok && len(files) > 1 {
		if err := a.Attach(ctx, files[1:]); err != nil {
			t.Fatal(err)
		}
	}
	info, err := img.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	extents, err := MapRange(ctx, img, 0, info.VirtualSize)
	if err != nil {
		t.Fatal(err)
	}
	guest := map[int64]bool{}
	for _, e := range extents {
		if e.Kind != sdk.Data || e.File != 0 {
			continue
		}
		for at := (e.HostOffset + 511) / 512 * 512; at+512 <= e.HostOffset+e.Length; at += 512 {
			guest[at] = true
		}
	}
	return guest
}

// pattern returns n bytes that look random and depend on seed alone.
func pattern(seed uint64, n int) []byte {
	b := make([]byte, n)
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 1})
	_, _ = src.Read(b)
	return b
}

func (s *suite) write(t *testing.T) {
	f := s.format(t)
	run := func(opts string, compressed bool) {
		t.Run(fmt.Sprintf("%s/compressed=%v", opts, compressed), func(t *testing.T) {
			path, err := CreateAs(t, f, t.TempDir(), "image", s.WriteSize, opts, func(req *sdk.CreateRequest) {
				reproducible(req)
				req.Compressed = compressed
			})
			if err != nil {
				t.Fatal(err)
			}
			size := Open(t, f, path, false).Info.VirtualSize
			want := make([]byte, size)
			runs := map[int64][]byte{}
			put := func(off int64, b []byte) {
				if off >= 0 && off < size {
					b = b[:min(int64(len(b)), size-off)]
					runs[off] = b
					copy(want[off:], b)
				}
			}
			put(0, pattern(1, 700))
			put(300<<10, bytes.Repeat([]byte("instar "), 50000))
			put(2<<20+512, pattern(2, 200<<10))
			put(size-1000, pattern(3, 1000))
			Write(t, f, path, runs, compressed)

			o := Open(t, f, path, false)
			if o.Info.VirtualSize != size {
				t.Errorf("virtual size became %d, was %d", o.Info.VirtualSize, size)
			}
			if got := o.Read(0, size); !bytes.Equal(got, want) {
				i := 0
				for got[i] == want[i] {
					i++
				}
				t.Errorf("content differs from %#x on", i)
			}
			s.subranges(t, o)
			s.checkClean(t, f, path)
		})
	}
	for _, opts := range s.Options {
		run(opts, false)
	}
	for _, opts := range s.CompressedOptions {
		run(opts, true)
	}
	// Nothing written is a valid image too.
	path := Create(t, f, t.TempDir(), "image", s.WriteSize, s.Options[0])
	Write(t, f, path, nil, false)
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	o := Open(t, f, path, false)
	if got := o.Read(0, o.Info.VirtualSize); len(bytes.TrimLeft(got, "\x00")) != 0 {
		t.Errorf("an image of %d bytes into which nothing was written is not all zeros", before.Size())
	}
	s.checkClean(t, f, path)
}

const maxAheadUnit = 2 << 20

// ahead places runs before their content is known, as WriteInfo.Ahead and InPlace
// allow, and gives some back: the image holds what was written, and the file is as
// long as if nothing else had been placed.
func (s *suite) ahead(t *testing.T) {
	f := s.format(t)
	for _, opts := range s.Options {
		t.Run(opts, func(t *testing.T) {
			ctx := context.Background()
			newImage := func(size int64) (string, *Opened, sdk.Writer, sdk.WriteInfo) {
				path, err := CreateAs(t, f, t.TempDir(), "image", size, opts, reproducible)
				if err != nil {
					t.Fatal(err)
				}
				o := Open(t, f, path, true)
				w, ok := o.Image.(sdk.Writer)
				if !ok {
					t.Fatal("the image does not implement sdk.Writer")
				}
				info, err := w.BeginWrite(ctx, sdk.WriteRequest{})
				if err != nil {
					t.Fatal(err)
				}
				return path, o, w, info
			}
			_, first, _, info := newImage(s.WriteSize)
			step := max(info.Unit, first.Info.AllocationUnit)
			if step > maxAheadUnit {
				t.Logf("units of %d bytes: too much for this test", step)
				return
			}
			const n = 9
			path, o, w, info := newImage((n-1)*step + min(step, 4096))
			size := o.Info.VirtualSize
			unit := func(i int64) sdk.Run {
				return sdk.Run{Offset: i * step, Length: min(step, size-i*step)}
			}
			place := func(o *Opened, w sdk.Writer, r sdk.Run) []sdk.Placement {
				t.Helper()
				places, err := w.Place(ctx, []sdk.Run{r})
				if err != nil {
					t.Fatal(err)
				}
				return places
			}
			fill := func(o *Opened, places []sdk.Placement) {
				t.Helper()
				for _, p := range places {
					if _, err := o.Files[p.File].File.WriteAt(pattern(uint64(p.Offset), int(p.Length)), p.HostOffset); err != nil {
						t.Fatal(err)
					}
				}
			}
			if info.InPlace {
				for _, p := range place(o, w, unit(n-1)) {
					if p.File != 0 || p.HostOffset != p.Offset {
						t.Errorf("in place, and yet guest offset %#x is at %#x of file %d", p.Offset, p.HostOffset, p.File)
					}
				}
			}
			if !info.Ahead || info.EncodeOnly {
				return
			}
			// All but the last, of which the first, two in the middle and the end
			// turn out to be zeros.
			kept := []int64{1, 4}
			content := make([]byte, size)
			keep := func(places []sdk.Placement) {
				for _, p := range places {
					copy(content[p.Offset:], pattern(uint64(p.Offset), int(p.Length)))
				}
			}
			var back []sdk.Run
			for i := range int64(n - 1) {
				places := place(o, w, unit(i))
				if slices.Contains(kept, i) {
					fill(o, places)
					keep(places)
				} else {
					back = append(back, unit(i))
				}
			}
			if err := w.Zero(ctx, back); err != nil {
				t.Fatal(err)
			}
			last := place(o, w, unit(n-1))
			fill(o, last)
			keep(last)
			if err := w.Finish(ctx); err != nil {
				t.Fatal(err)
			}
			if got := Open(t, f, path, false).Read(0, size); !bytes.Equal(got, content) {
				t.Error("content differs")
			}
			s.checkClean(t, f, path)

			plain, o2, w2, _ := newImage(size)
			for _, i := range append(kept, n-1) {
				fill(o2, place(o2, w2, unit(i)))
			}
			if err := w2.Finish(ctx); err != nil {
				t.Fatal(err)
			}
			// The last went where the first had been, and the end was given up, but for
			// the unit between those kept.
			if got, want := fileLength(t, path), fileLength(t, plain); got > want+2*step {
				t.Errorf("file of %d bytes, %d where only what is needed is placed", got, want)
			}
		})
	}
}

func fileLength(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

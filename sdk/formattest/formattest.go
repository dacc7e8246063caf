// Package formattest tests format plugins: helpers that do what the core does
// with an sdk.Format (create, open, attach, map, decode, write), the oracles
// that judge the result, and Run, the conformance suite.
package formattest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
	"github.com/instar-img/instar/sdk/option"
)

// NoSize as a size asks for an image without giving one: the backing file's
// is taken.
const NoSize = -1

// reproducibleTime is the clock of images created by Run: 2020-01-01.
const reproducibleTime = 1577836800

// Create makes an image of format f in dir, as the core does but for atomicity,
// and returns its path. opts are settings as in -o; a size among them wins over
// size. A backing_file is looked up in dir and opened with f.
func Create(t testing.TB, f sdk.Format, dir, name string, size int64, opts string) string {
	t.Helper()
	path, err := TryCreate(t, f, dir, name, size, opts)
	if err != nil {
		t.Fatalf("create %s, size %d, options %q: %v", name, size, opts, err)
	}
	return path
}

// TryCreate is Create for requests that may be refused. Nothing is written when
// the plan fails.
func TryCreate(t testing.TB, f sdk.Format, dir, name string, size int64, opts string) (string, error) {
	t.Helper()
	return CreateAs(t, f, dir, name, size, opts, nil)
}

// CreateAs is TryCreate with a last word on the request.
func CreateAs(t testing.TB, f sdk.Format, dir, name string, size int64, opts string, edit func(*sdk.CreateRequest)) (string, error) {
	t.Helper()
	plan, err := TryPlan(t, f, dir, name, size, opts, edit)
	if err != nil {
		return "", err
	}
	return emit(plan, dir, name)
}

// TryPlan validates opts against the schema of f and plans an image. edit may
// be nil.
func TryPlan(t testing.TB, f sdk.Format, dir, name string, size int64, opts string, edit func(*sdk.CreateRequest)) (sdk.Plan, error) {
	t.Helper()
	creator, ok := f.(sdk.Creator)
	if !ok {
		t.Fatalf("%s: does not implement sdk.Creator", f.Describe().Manifest.Name)
	}
	var settings []option.Setting
	if opts != "" {
		var help bool
		var err error
		if settings, help, err = option.Split(opts); err != nil {
			return nil, err
		}
		if help {
			t.Fatalf("options %q ask for help", opts)
		}
	}
	d := f.Describe()
	values, err := d.Create.Validate(d.Manifest.Name, option.Merge(settings))
	if err != nil {
		return nil, err
	}
	req := sdk.CreateRequest{Options: values, Size: size, Name: name}
	if v, ok := values.Lookup("size"); ok && v.Set {
		n, ok := ondisk.Int64(v.Uint)
		if !ok {
			return nil, fmt.Errorf("size %d: %w", v.Uint, sdk.ErrTooBig)
		}
		req.Size = n
	}
	if req.BackingName = values.StringOr("backing_file", ""); req.BackingName != "" {
		backing := Open(t, f, filepath.Join(dir, req.BackingName), false)
		req.Backing = &sdk.BackingInfo{
			Format:      d.Manifest.Name,
			VirtualSize: backing.Info.VirtualSize,
			Identity:    backing.Info.Identity,
			Specific:    backing.Info.Specific,
		}
		if req.Size < 0 {
			req.Size = backing.Info.VirtualSize
		}
	}
	if req.Size < 0 {
		return nil, fmt.Errorf("no size given: %w", sdk.ErrInvalid)
	}
	if edit != nil {
		edit(&req)
	}
	return creator.PlanCreate(context.Background(), req)
}

func emit(plan sdk.Plan, dir, name string) (path string, err error) {
	info := plan.Info()
	if len(info.Files) == 0 || info.Files[0].Role != sdk.RoleMain || info.Files[0].Name != "" {
		return "", errors.New("formattest: the first planned file must have the main role and no name")
	}
	var files []sdk.NamedFile
	for i, want := range info.Files {
		base := name
		if i > 0 {
			base = want.Name
		}
		if base == "" || base != filepath.Base(base) {
			return "", fmt.Errorf("formattest: planned file %d has the name %q", i, base)
		}
		osf, err := os.OpenFile(filepath.Join(dir, base), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o644)
		if err != nil {
			return "", err
		}
		defer func() { err = errors.Join(err, osf.Close()) }()
		if err := preallocate(osf, want); err != nil {
			return "", err
		}
		files = append(files, sdk.NamedFile{Role: want.Role, File: sdk.NewFile(osf)})
	}
	if err := plan.Emit(context.Background(), files); err != nil {
		return "", fmt.Errorf("emit: %w", err)
	}
	return filepath.Join(dir, name), nil
}

// maxFull bounds the zeros that preallocate writes.
const maxFull = 64 << 20

// preallocate sets the length. What is not written is a hole, which reads the
// same.
func preallocate(f *os.File, want sdk.PlannedFile) error {
	if want.Length == 0 {
		return nil
	}
	if err := f.Truncate(want.Length); err != nil {
		return err
	}
	if want.Preallocation != sdk.PreallocFull {
		return nil
	}
	_, err := f.WriteAt(make([]byte, min(want.Length, maxFull)), 0)
	return err
}

// Opened is an opened image with its files.
type Opened struct {
	Image sdk.Image
	Info  *sdk.Info
	// Files in the order that Extent.File and Placement.File index.
	Files []sdk.NamedFile

	t    testing.TB
	path string
}

// Open opens an image, attaches the data and extent files it refers to that lie
// beside it, and closes everything when the test ends.
func Open(t testing.TB, f sdk.Format, path string, readWrite bool) *Opened {
	t.Helper()
	o, err := TryOpen(t, f, path, sdk.OpenRequest{ReadWrite: readWrite})
	if err != nil {
		t.Fatalf("open %s: %v", filepath.Base(path), err)
	}
	return o
}

// TryOpen is Open for images that may be refused. The request's Files and Name
// are filled in.
func TryOpen(t testing.TB, f sdk.Format, path string, req sdk.OpenRequest) (*Opened, error) {
	t.Helper()
	o := &Opened{t: t, path: path}
	osf := openFile(t, path, req.ReadWrite)
	if osf == nil {
		t.Fatalf("open %s: no such file", path)
	}
	o.Files = []sdk.NamedFile{{Role: sdk.RoleMain, File: osf}}
	req.Files, req.Name = o.Files, filepath.Base(path)
	var err error
	if o.Image, err = f.Open(context.Background(), req); err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		if err := o.Image.Close(); err != nil {
			t.Errorf("close %s: %v", filepath.Base(path), err)
		}
	})
	if o.Info, err = o.Image.Info(context.Background()); err != nil {
		return nil, err
	}
	return o, o.attach(req.ReadWrite)
}

func (o *Opened) attach(readWrite bool) error {
	var more []sdk.NamedFile
	for _, ref := range o.Info.References {
		if ref.Kind == sdk.RefBacking {
			continue
		}
		for _, name := range append([]string{ref.Name}, ref.Alternatives...) {
			if osf := openFile(o.t, filepath.Join(filepath.Dir(o.path), filepath.Base(name)), readWrite); osf != nil {
				more = append(more, sdk.NamedFile{Role: ref.Role, File: osf})
				break
			}
		}
	}
	attacher, ok := o.Image.(sdk.Attacher)
	if !ok || len(more) == 0 {
		return nil
	}
	if err := attacher.Attach(context.Background(), more); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	o.Files = append(o.Files, more...)
	var err error
	o.Info, err = o.Image.Info(context.Background())
	return err
}

// openFile returns nil where there is no such file.
func openFile(t testing.TB, path string, readWrite bool) sdk.File {
	t.Helper()
	flag := os.O_RDONLY
	if readWrite {
		flag = os.O_RDWR
	}
	osf, err := os.OpenFile(path, flag, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = osf.Close() })
	return sdk.NewFile(osf) // the wire takes no other
}

// Map returns the extents of the whole disk, after checking Map's invariants.
func (o *Opened) Map() []sdk.Extent {
	o.t.Helper()
	extents, err := MapRange(context.Background(), o.Image, 0, o.Info.VirtualSize)
	if err != nil {
		o.t.Fatalf("map %s: %v", filepath.Base(o.path), err)
	}
	return extents
}

// MapRange collects the extents of a guest range and checks what Image.Map
// promises: ascending, contiguous, non-empty, merged, exactly the range.
func MapRange(ctx context.Context, img sdk.Image, off, length int64) ([]sdk.Extent, error) {
	var all []sdk.Extent
	at := off
	var broken error
	err := img.Map(ctx, off, length, func(batch []sdk.Extent) bool {
		if len(batch) == 0 {
			broken = errors.New("map: yielded an empty batch")
			return false
		}
		for _, e := range batch {
			if broken = checkExtent(all, e, at, off+length); broken != nil {
				return false
			}
			at += e.Length
			all = append(all, e)
			if len(all) > maxExtents {
				broken = errTooMany
				return false
			}
		}
		return true
	})
	if broken != nil {
		return all, broken
	}
	if err != nil {
		return all, err
	}
	if at != off+length {
		return all, fmt.Errorf("map: stopped at %#x of %#x", at, off+length)
	}
	return all, nil
}

// maxExtents bounds what a test keeps of one map.
const maxExtents = 1 << 20

var errTooMany = errors.New("formattest: too many extents")

func checkExtent(before []sdk.Extent, e sdk.Extent, at, end int64) error {
	switch {
	case e.Offset != at:
		return fmt.Errorf("map: extent %+v begins at %#x, want %#x", e, e.Offset, at)
	case e.Length <= 0 || e.Length > end-at:
		return fmt.Errorf("map: extent %+v is empty or beyond %#x", e, end)
	case e.Kind > sdk.Encoded:
		return fmt.Errorf("map: extent %+v has no known kind", e)
	case (e.Kind == sdk.Data || e.Kind == sdk.Encoded) && e.HostOffset < 0:
		return fmt.Errorf("map: extent %+v has no host offset", e)
	case e.Kind == sdk.Data && e.HostOffset+e.Length < 0:
		return fmt.Errorf("map: extent %+v overflows the file", e)
	case e.HostOffset < -1 || e.File < 0:
		return fmt.Errorf("map: extent %+v has a negative host offset or file", e)
	}
	if len(before) > 0 && continues(before[len(before)-1], e) {
		return fmt.Errorf("map: extents %+v and %+v are not merged", before[len(before)-1], e)
	}
	return nil
}

func continues(a, b sdk.Extent) bool {
	if a.Kind != b.Kind || a.Sparse != b.Sparse || a.Kind == sdk.Encoded {
		return false
	}
	if a.HostOffset < 0 || b.HostOffset < 0 {
		return a.HostOffset == b.HostOffset
	}
	return a.File == b.File && a.HostOffset+a.Length == b.HostOffset
}

// Read returns guest bytes by Map and Decode; absent ranges read as zeros.
func (o *Opened) Read(off, n int64) []byte {
	o.t.Helper()
	b, err := o.TryRead(off, n)
	if err != nil {
		o.t.Fatalf("read %s, %#x bytes at %#x: %v", filepath.Base(o.path), n, off, err)
	}
	return b
}

// TryRead is Read for ranges that may be unreadable.
func (o *Opened) TryRead(off, n int64) ([]byte, error) {
	return readRange(context.Background(), o.Image, o.Files, off, n)
}

func readRange(ctx context.Context, img sdk.Image, files []sdk.NamedFile, off, n int64) ([]byte, error) {
	out := make([]byte, n)
	if err := readOver(ctx, img, files, off, out); err != nil {
		return nil, err
	}
	return out, nil
}

// readOver reads the guest range at off into out, which keeps what it holds
// where the image has nothing.
func readOver(ctx context.Context, img sdk.Image, files []sdk.NamedFile, off int64, out []byte) error {
	extents, err := MapRange(ctx, img, off, int64(len(out)))
	if err != nil {
		return err
	}
	for _, e := range extents {
		dst := out[e.Offset-off:][:e.Length]
		switch e.Kind {
		case sdk.Zero:
			clear(dst)
		case sdk.Data:
			if e.File >= len(files) {
				return fmt.Errorf("map: extent %+v is in file %d of %d", e, e.File, len(files))
			}
			// A file may end inside an extent: what lies behind reads as zeros.
			n, err := files[e.File].File.ReadAt(dst, e.HostOffset)
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			clear(dst[n:])
		case sdk.Encoded:
			if err := decodeWhole(ctx, img, e, dst); err != nil {
				return err
			}
		}
	}
	return nil
}

// decodeWhole decodes an encoded extent. Map cuts extents at the range asked
// for, and Decode takes extents as they were yielded.
func decodeWhole(ctx context.Context, img sdk.Image, e sdk.Extent, dst []byte) error {
	decoder, ok := img.(sdk.Decoder)
	if !ok {
		return fmt.Errorf("map: encoded extent %+v of an image without Decoder", e)
	}
	return decoder.Decode(ctx, e, dst)
}

// Write puts runs (guest offset to bytes) into a new image as the core does:
// rounded out to whole units with zeros, placed and copied, or encoded unit by
// unit where compressed or where the target takes nothing else.
func Write(t testing.TB, f sdk.Format, path string, runs map[int64][]byte, compressed bool) {
	t.Helper()
	o := Open(t, f, path, true)
	if err := o.write(context.Background(), runs, compressed); err != nil {
		t.Fatalf("write %s: %v", filepath.Base(path), err)
	}
}

func (o *Opened) write(ctx context.Context, runs map[int64][]byte, compressed bool) error {
	w, ok := o.Image.(sdk.Writer)
	if !ok {
		return errors.New("the image does not implement sdk.Writer")
	}
	wi, err := w.BeginWrite(ctx, sdk.WriteRequest{Compressed: compressed, Reproducible: true})
	if err != nil {
		return fmt.Errorf("begin: %w", err)
	}
	if wi.Unit <= 0 {
		return fmt.Errorf("begin: unit %d", wi.Unit)
	}
	ranges := roundOut(runs, wi.Unit, o.Info.VirtualSize)
	content := func(off, n int64) []byte {
		b := make([]byte, n)
		for at, src := range runs {
			lo, hi := max(at, off), min(at+int64(len(src)), off+n)
			if lo < hi {
				copy(b[lo-off:], src[lo-at:hi-at])
			}
		}
		return b
	}
	if compressed || wi.EncodeOnly {
		for _, r := range ranges {
			var units []sdk.Unit
			for off := r.Offset; off < r.Offset+r.Length; off += wi.Unit {
				units = append(units, sdk.Unit{Offset: off, Data: content(off, min(wi.Unit, r.Offset+r.Length-off))})
			}
			if err := w.Encode(ctx, units); err != nil {
				return fmt.Errorf("encode %#x: %w", r.Offset, err)
			}
		}
	} else if err := o.place(ctx, w, ranges, content); err != nil {
		return err
	}
	if err := w.Finish(ctx); err != nil {
		return fmt.Errorf("finish: %w", err)
	}
	return nil
}

// placeBatch is how many runs go into one call of Place.
const placeBatch = 16

func (o *Opened) place(ctx context.Context, w sdk.Writer, ranges []sdk.Run, content func(off, n int64) []byte) error {
	for len(ranges) > 0 {
		batch := ranges[:min(placeBatch, len(ranges))]
		ranges = ranges[len(batch):]
		places, err := w.Place(ctx, batch)
		if err != nil {
			return fmt.Errorf("place: %w", err)
		}
		i := 0
		for _, r := range batch {
			for at := r.Offset; at < r.Offset+r.Length; i++ {
				if i == len(places) || places[i].Offset != at || places[i].Length <= 0 || places[i].Length > r.Offset+r.Length-at {
					return fmt.Errorf("place: placements %+v do not cover the runs %+v", places, batch)
				}
				p := places[i]
				if p.File < 0 || p.File >= len(o.Files) {
					return fmt.Errorf("place: placement %+v is in file %d of %d", p, p.File, len(o.Files))
				}
				if _, err := o.Files[p.File].File.WriteAt(content(p.Offset, p.Length), p.HostOffset); err != nil {
					return err
				}
				at += p.Length
			}
		}
		if i != len(places) {
			return fmt.Errorf("place: %d placements too many", len(places)-i)
		}
	}
	return nil
}

// roundOut returns the runs as ascending, disjoint ranges of whole units, cut
// by the end of the disk.
func roundOut(runs map[int64][]byte, unit, size int64) []sdk.Run {
	var all []sdk.Run
	for off, b := range runs {
		lo := off / unit * unit
		hi := min(ondisk.DivUp(off+int64(len(b)), unit)*unit, size)
		if lo < hi {
			all = append(all, sdk.Run{Offset: lo, Length: hi - lo})
		}
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Offset < all[j].Offset })
	var merged []sdk.Run
	for _, r := range all {
		if n := len(merged); n > 0 && r.Offset <= merged[n-1].Offset+merged[n-1].Length {
			merged[n-1].Length = max(merged[n-1].Length, r.Offset+r.Length-merged[n-1].Offset)
			continue
		}
		merged = append(merged, r)
	}
	return merged
}

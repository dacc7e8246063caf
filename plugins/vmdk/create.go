package vmdk

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"strconv"
	"strings"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
	"github.com/instar-img/instar/sdk/option"
)

const (
	splitSize         = 2 << 30 // of the files of a split image
	descriptorSectors = 20      // kept for the descriptor inside a sparse extent
	streamOverhead    = 128     // sectors before the first grain of a streamOptimized file
	maxSectors        = 1 << 32 // what a grain table entry can address in a file
)

// cidKey is the identity under which an overlay knows its backing file.
const cidKey = "cid"

// plan is an image decided on.
type plan struct {
	info       sdk.PlanInfo
	layout     layoutPlan
	descriptor []byte // the text
	embedded   bool   // the descriptor lies inside the first extent
}

// layoutPlan is what decides how the files of an image look.
type layoutPlan struct {
	flat, split, stream bool
	zeroedGrain         bool
	grain               int64 // bytes
	lengths             []int64
}

func invalid(text string, args ...any) error {
	return &sdk.Error{Text: fmt.Sprintf(text, args...), Class: sdk.ErrInvalid}
}

// noCompression is what flat extents say to convert -c.
const noCompression = "Compression not supported for this file format"

// PlanCreate implements sdk.Creator.
func (format) PlanCreate(_ context.Context, req sdk.CreateRequest) (sdk.Plan, error) {
	o := req.Options
	subformat := o.StringOr("subformat", monolithicSparse)
	l := layoutPlan{
		flat:        subformat == monolithicFlat || subformat == twoGbMaxExtentFlat,
		split:       subformat == twoGbMaxExtentSparse || subformat == twoGbMaxExtentFlat,
		stream:      subformat == streamOptimized,
		zeroedGrain: o.BoolOr("zeroed_grain", false),
		grain:       int64(o.UintOr("grain_size", defaultGrainSize)),
	}
	if req.BackingName != "" {
		if f := o.StringOr("backing_fmt", "vmdk"); f != "vmdk" {
			return nil, invalid("backing_file must be a vmdk image")
		}
	}
	version := o.StringOr("hwversion", "undefined")
	switch {
	case o.BoolOr("compat6", false) && version != "undefined":
		return nil, invalid("compat6 cannot be enabled with hwversion set")
	case o.BoolOr("compat6", false):
		version = "6"
	case version == "undefined":
		version = "4"
	}
	switch {
	case l.flat && req.Compressed:
		return nil, unsupported(noCompression)
	case l.flat && req.BackingName != "":
		return nil, unsupported("Flat image can't have backing file")
	case l.flat && l.zeroedGrain:
		return nil, unsupported("Flat image can't enable zeroed grain")
	case l.flat && o.IsSet("grain_size"):
		return nil, unsupported("Flat image can't have a grain size")
	case req.BackingName != "" && req.Backing == nil:
		return nil, invalid("The backing file '%s' must be readable, its content ID is needed", req.BackingName)
	case req.Backing != nil && req.Backing.Format != "vmdk":
		return nil, invalid("Invalid backing file format: %s. Must be vmdk", req.Backing.Format)
	}
	size, ok := ondisk.AlignUp(req.Size, sectorSize)
	if !ok {
		return nil, tooBig("Image size of %d bytes is too big for a VMDK", req.Size)
	}
	if err := l.splitUp(size); err != nil {
		return nil, err
	}

	d := descriptor{parentCID: noParent, createType: subformat}
	if req.Backing != nil {
		cid, err := strconv.ParseUint(req.Backing.Identity[cidKey], 16, 32)
		if err != nil {
			return nil, invalid("Failed to read parent CID")
		}
		d.parentCID, d.parentHint, d.hasParentHint = uint32(cid), req.BackingName, true
	}
	p := &plan{layout: l, embedded: !l.flat && !l.split}
	if err := p.nameFiles(&d, req, size); err != nil {
		return nil, err
	}
	heads := int64(255)
	adapter := o.StringOr("adapter_type", "ide")
	if adapter == "ide" {
		heads = 16
	}
	tools := o.StringOr("toolsversion", "2147483647")
	for _, s := range []string{d.parentHint, version, tools} {
		if !quotable(s) {
			return nil, invalid("%q cannot be stored in a VMDK descriptor: it holds a quote or a line end", s)
		}
	}
	database := []string{
		`ddb.virtualHWVersion = "` + version + `"`,
		`ddb.geometry.cylinders = "` + strconv.FormatInt(size/(63*heads*sectorSize), 10) + `"`,
		`ddb.geometry.heads = "` + strconv.FormatInt(heads, 10) + `"`,
		`ddb.geometry.sectors = "63"`,
		`ddb.adapterType = "` + adapter + `"`,
		`ddb.toolsVersion = "` + tools + `"`,
	}
	var err error
	if d.cid, err = newCID(&d, database, req); err != nil {
		return nil, err
	}
	p.descriptor = d.append(nil, database)
	limit := maxDescriptor
	if p.embedded {
		limit = descriptorSectors * sectorSize
	}
	if len(p.descriptor) > limit {
		return nil, tooBig("The VMDK descriptor would take %d bytes, at most %d fit", len(p.descriptor), limit)
	}
	p.info.VirtualSize = size
	p.info.AllocationUnit = l.grain
	if l.flat {
		p.info.AllocationUnit = 0
	}
	p.info.Options = resolve(req, l, subformat, adapter)
	return p, nil
}

func tooBig(text string, args ...any) error {
	return &sdk.Error{Text: fmt.Sprintf(text, args...), Class: sdk.ErrTooBig}
}

// splitUp decides the lengths of the extents, in guest bytes.
func (l *layoutPlan) splitUp(size int64) error {
	if !l.split {
		l.lengths = []int64{size}
		if l.flat && size == 0 {
			l.lengths = nil
		}
	} else {
		// More would not fit a descriptor.
		if size/splitSize > maxDescriptor/len64(`RW 4194304 FLAT "-f001" 0`) {
			return tooBig("Image size of %d bytes is too big for files of 2 GiB", size)
		}
		for left := size; left > 0; left -= splitSize {
			l.lengths = append(l.lengths, min(left, splitSize))
		}
	}
	for _, n := range l.lengths {
		if l.flat {
			continue
		}
		if s := l.sparse(n); s.overhead >= maxSectors || s.entries > maxDirectory {
			return tooBig("Image size of %d bytes is too big for a sparse VMDK with grains of %d bytes", size, l.grain)
		}
	}
	return nil
}

func len64(s string) int64 { return int64(len(s)) }

// nameFiles names the files as qemu-img does: the suffix of the main file is
// kept, what makes the name unique goes before it.
func (p *plan) nameFiles(d *descriptor, req sdk.CreateRequest, size int64) error {
	l := &p.layout
	main := sdk.PlannedFile{Role: sdk.RoleMain}
	kind := typeSparse
	if l.flat {
		kind = typeFlat
	}
	if p.embedded {
		main.Length = l.sparse(size).overhead * sectorSize
		name := req.Name
		if !quotable(name) {
			// Nobody looks for the extent by this name.
			name = strings.NewReplacer(`"`, "_", "\n", "_", "\r", "_", "\x00", "_").Replace(name)
		}
		d.extents = []extentLine{{access: accessReadWrite, sectors: size / sectorSize, kind: kind, name: name}}
		p.info.Files = []sdk.PlannedFile{main}
		return nil
	}
	if !quotable(req.Name) {
		return invalid("%q cannot be stored in a VMDK descriptor: it holds a quote or a line end", req.Name)
	}
	stem, suffix := req.Name, ""
	if i := strings.LastIndexByte(req.Name, '.'); i >= 0 {
		stem, suffix = req.Name[:i], req.Name[i:]
	}
	p.info.Files = []sdk.PlannedFile{main}
	for i, n := range l.lengths {
		f := sdk.PlannedFile{Role: extentRole(i), Length: n, Preallocation: preallocation(req.Options)}
		switch {
		case !l.split:
			f.Name = stem + "-flat" + suffix
		case l.flat:
			f.Name = fmt.Sprintf("%s-f%03d%s", stem, i+1, suffix)
		default:
			f.Name = fmt.Sprintf("%s-s%03d%s", stem, i+1, suffix)
			f.Length, f.Preallocation = l.sparse(n).overhead*sectorSize, sdk.PreallocOff
		}
		p.info.Files = append(p.info.Files, f)
		d.extents = append(d.extents, extentLine{access: accessReadWrite, sectors: n / sectorSize, kind: kind, name: f.Name})
	}
	return nil
}

// extentRole is the role of the file of extent i where it is the first that
// lies in it: qemu-img calls the node extents.I.
func extentRole(i int) string { return "extents:" + strconv.Itoa(i) }

func preallocation(o option.Values) sdk.Preallocation {
	switch o.StringOr("preallocation", "off") {
	case "falloc":
		return sdk.PreallocFalloc
	case "full":
		return sdk.PreallocFull
	}
	return sdk.PreallocOff
}

// newCID makes the content id: random, or a function of the request.
func newCID(d *descriptor, database []string, req sdk.CreateRequest) (uint32, error) {
	if req.Reproducible {
		seed := binary.LittleEndian.AppendUint64(d.append(nil, database), uint64(req.Time))
		return usableCID(crc32.ChecksumIEEE(seed)), nil
	}
	var b [4]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("content id: %w", err)
	}
	return usableCID(binary.LittleEndian.Uint32(b[:])), nil
}

// usableCID keeps v from meaning that there is no parent.
func usableCID(v uint32) uint32 {
	if v == noParent || v == 0 {
		return 1
	}
	return v
}

// resolve lists every option with the value it came to.
func resolve(req sdk.CreateRequest, l layoutPlan, subformat, adapter string) option.Values {
	o := req.Options
	var out option.Values
	for _, key := range schema() {
		v, ok := o.Lookup(key.Name)
		if !ok {
			v = option.Value{Key: key.Name, Type: key.Type}
		}
		switch key.Name {
		case "size":
			v.Uint = uint64(req.Size)
		case "adapter_type":
			v.String = adapter
		case "backing_file":
			if v.String = req.BackingName; v.String == "" {
				continue
			}
		case "backing_fmt":
			if req.BackingName == "" {
				continue
			}
			v.String = "vmdk"
		case "subformat":
			v.String = subformat
		case "grain_size":
			if l.flat {
				continue
			}
			v.Uint = uint64(l.grain)
		case "preallocation":
			v.String = o.StringOr("preallocation", "off")
		case "toolsversion":
			v.String = o.StringOr("toolsversion", "2147483647")
		case "nocow", "extent_size_hint":
			if !ok {
				continue
			}
		}
		out = append(out, v)
	}
	return out
}

// sparsePlan is how a sparse extent is laid out. Offsets and sizes are in
// sectors.
type sparsePlan struct {
	entries      int64 // grain tables
	directory    int64 // size of a directory
	redundant    int64
	primary      int64
	overhead     int64
	tableSectors int64
}

// sparse lays out a sparse extent of n guest bytes as qemu-img does:
// descriptor, redundant directory and tables, directory and tables, grains.
func (l *layoutPlan) sparse(n int64) sparsePlan {
	s := sparsePlan{
		entries:      ondisk.DivUp(n, l.grain*maxTableEntries),
		tableSectors: maxTableEntries * 4 / sectorSize,
	}
	s.directory = ondisk.DivUp(s.entries*4, sectorSize)
	s.redundant = 1 + descriptorSectors
	s.primary = s.redundant + s.directory + s.entries*s.tableSectors
	s.overhead = ondisk.DivUp(s.primary+s.directory+s.entries*s.tableSectors, l.grain/sectorSize) * (l.grain / sectorSize)
	return s
}

// header is the header of a sparse extent of n guest bytes.
func (l *layoutPlan) header(n int64) sparseHeader {
	s := l.sparse(n)
	h := sparseHeader{
		version:          1,
		flags:            flagNewlineTest | flagRedundantGD,
		capacity:         uint64(n / sectorSize),
		grainSize:        uint64(l.grain / sectorSize),
		descriptorOffset: 1,
		descriptorSize:   descriptorSectors,
		tableEntries:     maxTableEntries,
		rgdOffset:        uint64(s.redundant),
		gdOffset:         uint64(s.primary),
		overhead:         uint64(s.overhead),
		newlines:         newlineTest,
	}
	if l.zeroedGrain {
		h.version = 2
		h.flags |= flagZeroedGrains
	}
	if l.stream {
		h.version = 3
		h.flags |= flagCompressed | flagMarkers
		h.compression = compressDeflate
	}
	return h
}

func (p *plan) Info() sdk.PlanInfo { return p.info }

// Emit implements sdk.Plan.
func (p *plan) Emit(ctx context.Context, files []sdk.NamedFile) error {
	if len(files) != len(p.info.Files) {
		return fmt.Errorf("emit: %d files for %d planned: %w", len(files), len(p.info.Files), sdk.ErrInvalid)
	}
	at := int64(0)
	if p.embedded {
		at = sectorSize
	}
	if _, err := files[0].File.WriteAt(p.descriptor, at); err != nil {
		return fmt.Errorf("descriptor: %w", err)
	}
	if p.layout.flat {
		return nil
	}
	if !p.embedded {
		files = files[1:]
	}
	for i, n := range p.layout.lengths {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := p.layout.emitSparse(ctx, files[i].File, n); err != nil {
			return fmt.Errorf("extent %d: %w", i, err)
		}
	}
	return nil
}

func (l *layoutPlan) emitSparse(ctx context.Context, f sdk.File, n int64) error {
	s := l.sparse(n)
	if sdk.OnDevice(f) {
		// The tables are what is not written of the metadata.
		if err := zeroFlat(ctx, f, s.redundant*sectorSize, (s.overhead-s.redundant)*sectorSize); err != nil {
			return err
		}
	}
	for _, at := range []int64{s.redundant, s.primary} {
		if err := writeDirectory(f, at, at+s.directory, s.tableSectors, s.entries); err != nil {
			return err
		}
	}
	h := l.header(n)
	_, err := f.WriteAt(h.append(nil), 0)
	return err
}

// writeDirectory writes a grain directory at sector at, whose tables follow one
// another from sector first.
func writeDirectory(f sdk.File, at, first, tableSectors, entries int64) error {
	const chunk = 64 << 10 / 4
	if first+entries*tableSectors > math.MaxUint32 {
		return fmt.Errorf("grain table at sector %d: %w", first+entries*tableSectors, sdk.ErrTooBig)
	}
	buf := make([]byte, 0, min(entries, chunk)*4)
	for i := int64(0); i < entries; i += chunk {
		buf = buf[:0]
		for j := i; j < min(entries, i+chunk); j++ {
			buf = binary.LittleEndian.AppendUint32(buf, uint32(first+j*tableSectors))
		}
		if _, err := f.WriteAt(buf, at*sectorSize+i*4); err != nil {
			return err
		}
	}
	return nil
}

// Measure implements sdk.Measurer.
func (p *plan) Measure(_ context.Context, req sdk.MeasureRequest) (sdk.MeasureResult, error) {
	l := &p.layout
	total := int64(0) // grains
	fixed := int64(0) // bytes, but for the grains
	if !p.embedded {
		fixed = int64(len(p.descriptor))
	}
	for _, n := range l.lengths {
		if l.flat {
			fixed += n
			continue
		}
		total += ondisk.DivUp(n, l.grain)
		if !l.stream {
			fixed += l.sparse(n).overhead * sectorSize
		}
	}
	used := min(max(req.AllocatedUnits, 0), total)
	m := sdk.MeasureResult{Required: fixed, FullyAllocated: fixed, Bitmaps: -1}
	switch {
	case l.flat:
	case l.stream:
		m.Required, m.FullyAllocated = l.streamBound(used), l.streamBound(total)
	default:
		m.Required += used * l.grain
		m.FullyAllocated += total * l.grain
	}
	return m, nil
}

// streamBound returns the most bytes that a streamOptimized file with this many
// grains takes: deflate cannot make a grain longer than its stored form.
func (l *layoutPlan) streamBound(grains int64) int64 {
	tables := min(grains, l.sparse(l.lengths[0]).entries)
	// Every blockSize bytes come in a stored block with a head of 5, and so does
	// the mark between two; zlib adds 6.
	longest := grainMarkerSize + 6 + l.grain + 10*ondisk.DivUp(l.grain, blockSize)
	sectors := int64(streamOverhead) + grains*ondisk.DivUp(longest, sectorSize) +
		tables*(1+maxTableEntries*4/sectorSize) + 1 + l.sparse(l.lengths[0]).directory + 3
	return sectors * sectorSize
}

package vmdk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// maxExtents bounds the extents of a descriptor: more do not fit into one.
const maxExtents = maxDescriptor / len("RW 1 ZERO\n")

// image is an opened VMDK.
type image struct {
	main       sdk.File
	mainSize   int64
	readWrite  bool
	check      bool
	desc       descriptor
	descAt     int64 // bytes into main; -1: the image has none
	descLength int64 // bytes kept for it; 0: the rest of the file
	createType string

	cache  *pageCache
	layout atomic.Pointer[layout]
	writer writer
}

// layout is what the files attached so far make of the descriptor.
type layout struct {
	extents []*extent
	size    int64 // guest bytes
	files   int   // attached, with the main file
}

// extent is a part of the disk.
type extent struct {
	line   extentLine
	role   string
	start  int64 // guest offset
	length int64 // guest bytes

	file     sdk.File // nil: not attached
	index    int      // of file
	fileSize int64

	sparse *sparseExtent // nil: flat or zero
}

func (e *extent) zero() bool { return e.line.kind == typeZero }

// sparseExtent is what the header of a sparse extent says. Sizes and offsets
// are in bytes.
type sparseExtent struct {
	kind       string // magic of the header: sparseMagic, cowdMagic or seSparse
	header     sparseHeader
	grain      int64
	entries    int64 // of a grain table
	entrySize  int64 // of directories and tables
	directory  int64 // offset
	redundant  int64 // offset of the redundant directory, 0: none
	tables     int64 // entries of the directory
	overhead   int64
	compressed bool
	markers    bool
	zeroed     bool // a table entry of 1 is a zero grain
	tablesAt   int64
	grainsAt   int64
	cache      *tableCache
}

const seSparse = "seSparse"

// Open implements sdk.Format.
func (format) Open(_ context.Context, req sdk.OpenRequest) (sdk.Image, error) {
	if len(req.Files) == 0 {
		return nil, fmt.Errorf("no file: %w", sdk.ErrInvalid)
	}
	if req.Snapshot != "" {
		return nil, fmt.Errorf("snapshot %q: %w", req.Snapshot, sdk.ErrNotFound)
	}
	img := &image{main: req.Files[0].File, readWrite: req.ReadWrite, check: req.Check, descAt: -1, cache: newPageCache()}
	var err error
	if img.mainSize, err = img.main.Size(); err != nil {
		return nil, fmt.Errorf("size: %w", err)
	}
	if img.mainSize < 4 {
		return nil, &sdk.Error{Text: "File is too small, not a valid image", Class: sdk.ErrNotFormat}
	}
	var magic [4]byte
	if _, err := img.main.ReadAt(magic[:], 0); err != nil {
		return nil, fmt.Errorf("magic: %w", err)
	}
	switch string(magic[:]) {
	case sparseMagic:
		err = img.openSparse()
	case cowdMagic:
		err = img.openCOWD()
	default:
		err = img.openDescriptor(0, 0)
	}
	if err != nil {
		return nil, err
	}
	if len(req.Files) > 1 {
		if err := img.attach(req.Files[1:]); err != nil {
			return nil, err
		}
	}
	return img, nil
}

// openDescriptor opens a disk whose extents lie in files of their own. The
// descriptor lies at a host offset, in length bytes or, where 0, up to the end.
func (img *image) openDescriptor(at, length int64) error {
	if length == 0 {
		length = img.mainSize - at
	}
	text, err := sdk.ReadAtMost(img.main, "descriptor", at, length, maxDescriptor)
	if err != nil {
		if at == 0 && errors.Is(err, sdk.ErrCorrupt) {
			return &sdk.Error{Text: "invalid VMDK image descriptor", Class: sdk.ErrNotFormat}
		}
		return err
	}
	if err := img.desc.decode(text); err != nil {
		return err
	}
	img.descAt, img.descLength = at, length
	if at == 0 {
		img.descLength = 0
	}
	img.createType = img.desc.createType
	if !supportedType(img.createType) {
		return unsupported("Unsupported image type '%s'", img.createType)
	}
	if len(img.desc.extents) == 0 {
		if at != 0 {
			// As qemu-img, which takes such a file for a bare descriptor.
			return unsupported("Unsupported image type '%s'", img.createType)
		}
		return corrupt("VMDK image descriptor without extents")
	}
	if len(img.desc.extents) > maxExtents {
		return corrupt("VMDK image descriptor with %d extents", len(img.desc.extents))
	}
	l := &layout{files: 1}
	roles := make(map[string]string)
	for i, line := range img.desc.extents {
		e := &extent{line: line, index: -1}
		if line.kind != typeZero {
			e.role = roles[line.name]
			if e.role == "" {
				e.role = extentRole(i)
				roles[line.name] = e.role
			}
		}
		var ok bool
		if e.length, ok = ondisk.Mul(line.sectors, sectorSize); !ok {
			return corrupt("Extent %d of %d sectors is too big", i, line.sectors)
		}
		l.extents = append(l.extents, e)
	}
	if err := l.place(); err != nil {
		return err
	}
	img.layout.Store(l)
	return nil
}

// place computes where the extents lie in the disk.
func (l *layout) place() error {
	l.size = 0
	for i, e := range l.extents {
		e.start = l.size
		var ok bool
		if l.size, ok = ondisk.Add(l.size, e.length); !ok {
			return corrupt("Extents up to %d are too big", i)
		}
	}
	return nil
}

// openSparse opens a file that is a hosted sparse extent and holds its
// descriptor.
func (img *image) openSparse() error {
	h, err := readSparseHeader(img.main, img.mainSize)
	if err != nil {
		return err
	}
	at, length, err := img.embedded(&h)
	if err != nil {
		return err
	}
	if h.capacity == 0 {
		if at == 0 {
			return corrupt("Sparse extent without capacity")
		}
		return img.openDescriptor(at, length)
	}
	if at == 0 {
		return corrupt("The file is one of the extents of a VMDK image: open the image's descriptor file instead")
	}
	text, err := sdk.ReadAtMost(img.main, "descriptor", at, length, maxDescriptor)
	if err != nil {
		return err
	}
	// What the descriptor says of extents is not looked at: many a writer
	// leaves there the name that the file once had.
	if err := img.desc.decode(text); err != nil {
		return err
	}
	img.descAt, img.descLength = at, length
	e := &extent{role: sdk.RoleMain}
	if err := e.setSparse(img.main, 0, img.mainSize, h, img); err != nil {
		return err
	}
	img.createType = monolithicSparse
	img.layout.Store(&layout{extents: []*extent{e}, size: e.length, files: 1})
	return nil
}

// embedded returns where the descriptor lies in the file, cut at its end; 0
// where there is none.
func (img *image) embedded(h *sparseHeader) (at, length int64, err error) {
	if h.descriptorOffset == 0 || h.descriptorSize == 0 {
		return 0, 0, nil
	}
	if h.descriptorOffset > uint64(img.mainSize/sectorSize) || h.descriptorSize > maxDescriptor/sectorSize {
		return 0, 0, corrupt("Descriptor of %d sectors at sector %d, the file has %d bytes", h.descriptorSize, h.descriptorOffset, img.mainSize)
	}
	at = int64(h.descriptorOffset) * sectorSize
	return at, min(int64(h.descriptorSize)*sectorSize, img.mainSize-at), nil
}

// readSparseHeader reads the header of a hosted sparse extent, from the footer
// where the header says so.
func readSparseHeader(f sdk.File, size int64) (sparseHeader, error) {
	var h sparseHeader
	b, err := sdk.ReadAtMost(f, "sparse extent header", 0, sectorSize, sectorSize)
	if err != nil {
		return h, err
	}
	if err := h.decode(b); err != nil {
		return h, err
	}
	if h.gdOffset != gdAtEnd || h.capacity == 0 {
		return h, nil
	}
	f2, err := readFooter(f, size)
	// The descriptor stands where the header says.
	f2.descriptorOffset, f2.descriptorSize = h.descriptorOffset, h.descriptorSize
	return f2, err
}

// readFooter reads the footer of a streamed extent: footer marker, footer, end
// of stream.
func readFooter(f sdk.File, size int64) (sparseHeader, error) {
	var h sparseHeader
	end, ok := ondisk.AlignUp(size, sectorSize)
	if !ok || end < 4*sectorSize {
		return h, corrupt("Invalid footer")
	}
	b := make([]byte, 3*sectorSize)
	if n, err := f.ReadAt(b, end-int64(len(b))); err != nil && (!errors.Is(err, io.EOF) || n < 2*sectorSize) {
		return h, fmt.Errorf("footer: %w", err)
	}
	var foot, eos marker
	if foot.decode(b) != nil || foot.validate(markerFooter) != nil ||
		h.decode(b[sectorSize:]) != nil || h.gdOffset == gdAtEnd ||
		eos.decode(b[2*sectorSize:]) != nil || eos.validate(markerEndOfStream) != nil || eos.value != 0 {
		return h, corrupt("Invalid footer")
	}
	return h, nil
}

// setSparse makes e the hosted sparse extent of header h in file f.
func (e *extent) setSparse(f sdk.File, index int, size int64, h sparseHeader, img *image) error {
	if err := h.validate(size); err != nil {
		return err
	}
	if h.version == 3 && img.readWrite && !h.compressed() {
		return &sdk.Error{Text: "VMDK version 3 must be read only", Class: sdk.ErrReadOnly}
	}
	s := &sparseExtent{
		kind:       sparseMagic,
		header:     h,
		grain:      int64(h.grainSize) * sectorSize,
		entries:    int64(h.tableEntries),
		entrySize:  4,
		tables:     h.directoryEntries(),
		overhead:   int64(h.overhead) * sectorSize,
		compressed: h.compressed(),
		markers:    h.flags&flagMarkers != 0,
		zeroed:     h.flags&flagZeroedGrains != 0,
	}
	var err error
	if s.directory, err = sectorOffset("grain directory", h.gdOffset, size, img.check); err != nil {
		return err
	}
	if h.flags&flagRedundantGD != 0 {
		if s.redundant, err = sectorOffset("redundant grain directory", h.rgdOffset, size, true); err != nil {
			return err
		}
	}
	return e.setTables(f, index, size, int64(h.capacity), s, img)
}

// sectorOffset turns a sector number of the file into bytes. Where damaged, one
// beyond the end is allowed, as long as it can be expressed.
func sectorOffset(what string, sector uint64, size int64, damaged bool) (int64, error) {
	if sector > uint64(ondisk.DivUp(size, sectorSize)) && !damaged || sector > 1<<53 {
		return 0, corrupt("%s at sector %d beyond end of file of %d bytes", what, sector, size)
	}
	return int64(sector) * sectorSize, nil
}

// setTables makes e the sparse extent s of so many sectors.
func (e *extent) setTables(f sdk.File, index int, size, sectors int64, s *sparseExtent, img *image) error {
	length, ok := ondisk.Mul(sectors, sectorSize)
	if !ok {
		return corrupt("Sparse extent of %d sectors is too big", sectors)
	}
	if !img.check && !ondisk.Within(s.directory, s.tables*s.entrySize, size) {
		return corrupt("Grain directory of %d entries at %#x beyond end of file %#x", s.tables, s.directory, size)
	}
	s.cache = &tableCache{file: f, size: size, cache: img.cache}
	e.length, e.file, e.index, e.fileSize, e.sparse = length, f, index, size, s
	return nil
}

// openCOWD opens a file that is an ESX server sparse extent, without the
// descriptor that should go with it.
func (img *image) openCOWD() error {
	e := &extent{line: extentLine{kind: typeVMFSSparse}, role: sdk.RoleMain}
	parent, err := e.setCOWD(img.main, 0, img.mainSize, img)
	if err != nil {
		return err
	}
	img.desc = descriptor{parentCID: noParent, createType: "vmfsSparse", parentHint: parent, hasParentHint: parent != ""}
	img.createType = img.desc.createType
	img.layout.Store(&layout{extents: []*extent{e}, size: e.length, files: 1})
	return nil
}

// setCOWD makes e the ESX server sparse extent in file f, and returns the name
// of its parent that the header gives.
func (e *extent) setCOWD(f sdk.File, index int, size int64, img *image) (string, error) {
	b, err := sdk.ReadAtMost(f, "ESX sparse extent header", 0, min(size, cowdHeaderSize), cowdHeaderSize)
	if err != nil {
		return "", err
	}
	var h cowdHeader
	if err := h.decode(b); err != nil {
		return "", err
	}
	if err := h.validate(size); err != nil {
		return "", err
	}
	s := &sparseExtent{
		kind:      cowdMagic,
		grain:     int64(h.grainSize) * sectorSize,
		entries:   cowdTableEntries,
		entrySize: 4,
		tables:    int64(h.directoryEntries),
		directory: int64(h.gdOffset) * sectorSize,
	}
	return h.parentName, e.setTables(f, index, size, int64(h.capacity), s, img)
}

// setSESparse makes e the seSparse extent in file f.
func (e *extent) setSESparse(f sdk.File, index int, size int64, img *image) error {
	if img.readWrite {
		return &sdk.Error{Text: "No write support for seSparse images available", Class: sdk.ErrReadOnly}
	}
	b, err := sdk.ReadAtMost(f, "seSparse header", 0, sectorSize, sectorSize)
	if err != nil {
		return err
	}
	var h seSparseHeader
	if err := h.decode(b); err != nil {
		return err
	}
	if err := h.validate(size); err != nil {
		return err
	}
	if b, err = sdk.ReadAtMost(f, "seSparse volatile header", int64(h.volatileOffset)*sectorSize, sectorSize, sectorSize); err != nil {
		return err
	}
	var v seSparseVolatile
	if err := v.decode(b); err != nil {
		return err
	}
	if err := v.validate(size); err != nil {
		return err
	}
	s := &sparseExtent{
		kind:      seSparse,
		grain:     seSparseGrainSectors * sectorSize,
		entries:   seSparseTableEntries,
		entrySize: 8,
		directory: int64(h.directory[0]) * sectorSize,
		tables:    int64(h.directory[1]) * sectorSize / 8,
		tablesAt:  int64(h.tables[0]) * sectorSize,
		grainsAt:  int64(h.grains[0]) * sectorSize,
	}
	return e.setTables(f, index, size, int64(h.capacity), s, img)
}

// Attach implements sdk.Attacher.
func (img *image) Attach(_ context.Context, files []sdk.NamedFile) error { return img.attach(files) }

func (img *image) attach(files []sdk.NamedFile) error {
	old := img.layout.Load()
	l := &layout{files: old.files + len(files)}
	byRole := make(map[string]int, len(files))
	for j, f := range files {
		byRole[f.Role] = j
	}
	for i, e := range old.extents {
		next := *e
		if j, ok := byRole[e.role]; ok && e.file == nil {
			if err := next.open(files[j].File, old.files+j, img); err != nil {
				return fmt.Errorf("extent %d (%s): %w", i, e.line.name, err)
			}
		}
		l.extents = append(l.extents, &next)
	}
	if err := l.place(); err != nil {
		return err
	}
	img.layout.Store(l)
	return nil
}

// open gives e its file.
func (e *extent) open(f sdk.File, index int, img *image) error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	switch e.line.kind {
	case typeSESparse:
		return e.setSESparse(f, index, size, img)
	case typeSparse, typeVMFSSparse:
		var magic [4]byte
		if size < 4 {
			return corrupt("File is too small, not a valid image")
		}
		if _, err := f.ReadAt(magic[:], 0); err != nil {
			return err
		}
		switch string(magic[:]) {
		case cowdMagic:
			_, err := e.setCOWD(f, index, size, img)
			return err
		case sparseMagic:
			h, err := readSparseHeader(f, size)
			if err != nil {
				return err
			}
			return e.setSparse(f, index, size, h, img)
		}
		return corrupt("Image not in VMDK format")
	}
	e.file, e.index, e.fileSize = f, index, size
	return nil
}

// Info implements sdk.Image.
func (img *image) Info(context.Context) (*sdk.Info, error) {
	l := img.layout.Load()
	info := &sdk.Info{
		VirtualSize:    l.size,
		AllocationUnit: l.unit(),
		SpecificType:   "vmdk",
		Identity:       map[string]string{cidKey: fmt.Sprintf("%08x", img.desc.cid)},
	}
	if img.desc.hasParentHint {
		info.References = append(info.References, sdk.Reference{
			Kind: sdk.RefBacking, Name: img.desc.parentHint, Format: "vmdk", Required: true,
			IdentityKey: cidKey, Identity: fmt.Sprintf("%08x", img.desc.parentCID),
		})
		if img.descAt < 0 { // an ESX server extent knows no content ids
			r := &info.References[len(info.References)-1]
			r.IdentityKey, r.Identity = "", ""
		}
	}
	createType := img.createType
	var facts []sdk.Fact
	seen := make(map[string]bool)
	for _, e := range l.extents {
		if e.role != sdk.RoleMain && e.role != "" && !seen[e.role] {
			seen[e.role] = true
			info.References = append(info.References, sdk.Reference{
				Kind: sdk.RefExtent, Role: e.role, Name: e.line.name, Required: true,
			})
		}
		var f []sdk.Fact
		if e.sparse != nil && e.sparse.compressed {
			f = append(f, sdk.BoolFact("compressed", true))
			createType = streamOptimized
		}
		f = append(f, sdk.IntFact("virtual-size", e.length))
		if !e.zero() {
			f = append(f, sdk.PathFact("filename", e.role))
		}
		if e.sparse != nil {
			f = append(f, sdk.IntFact("cluster-size", e.sparse.grain))
		}
		kind := e.line.kind
		if e.role == sdk.RoleMain && e.line.name == "" {
			kind = "" // qemu-img knows types from extent lines only
		}
		f = append(f, sdk.StringFact("format", kind))
		facts = append(facts, sdk.ObjectFact("", f...))
	}
	info.Specific = []sdk.Fact{
		sdk.UintFact("cid", uint64(img.desc.cid)),
		sdk.UintFact("parent-cid", uint64(img.desc.parentCID)),
		sdk.StringFact("create-type", createType),
		sdk.ListFact("extents", facts...),
	}
	return info, nil
}

// unit is the grain size where all extents are alike, else 0.
func (l *layout) unit() int64 {
	unit := int64(0)
	for i, e := range l.extents {
		if e.sparse == nil || i > 0 && (e.sparse.grain != unit || e.sparse.compressed != l.extents[0].sparse.compressed) {
			return 0
		}
		unit = e.sparse.grain
	}
	return unit
}

// Close implements sdk.Image.
func (img *image) Close() error { return nil }

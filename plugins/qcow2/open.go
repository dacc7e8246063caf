package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
	"github.com/instar-img/instar/sdk/option"
)

// image is an opened image.
type image struct {
	g         geometry
	h         header
	ext       []extension
	readWrite bool
	main      sdk.File
	fileSize  int64

	backing, backingFormat string
	dataName               string // external data file, where h.dataFile()
	snapshots              []snapshot
	bitmaps                []bitmapEntry
	encrypt                []sdk.Fact

	// The state that Map and Decode speak of: the active one or a snapshot's.
	size     int64 // in whole sectors, but see countSectors
	stored   int64 // the size as it is stored
	l1Offset int64
	l1Size   int64

	decoders decoders

	mu       sync.Mutex // guards what follows
	files    []sdk.NamedFile
	cache    tableCache
	sparse   bool // guest clusters may lie in holes of the file
	sparseOK bool // sparse is known
	writer   *writer
}

// readZeros fills b from off; what lies beyond the end of the file is zeros, as
// it is for qemu.
func readZeros(f sdk.File, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if err == nil || errors.Is(err, io.EOF) {
		clear(b[n:])
		return nil
	}
	return err
}

func (format) Open(ctx context.Context, req sdk.OpenRequest) (sdk.Image, error) {
	im := &image{readWrite: req.ReadWrite, files: append([]sdk.NamedFile(nil), req.Files...)}
	for _, f := range req.Files {
		if f.Role == sdk.RoleMain {
			im.main = f.File
		}
	}
	if im.main == nil {
		return nil, fmt.Errorf("no file with role %q: %w", sdk.RoleMain, sdk.ErrInvalid)
	}
	var err error
	if im.fileSize, err = im.main.Size(); err != nil {
		return nil, err
	}
	if err := im.readHeader(req.Check); err != nil {
		return nil, err
	}
	if err := im.checkOptions(req.Options); err != nil {
		return nil, err
	}
	if req.ReadWrite && !req.Check && im.h.incompatible&incompatCorrupt != 0 {
		return nil, &sdk.Error{Text: "qcow2: Image is corrupt; cannot be opened read/write", Class: sdk.ErrReadOnly}
	}
	if im.h.dataFile() && im.dataName == "" {
		return nil, &sdk.Error{Text: "'data-file' is required for this image", Class: sdk.ErrCorrupt}
	}
	im.stored, im.l1Offset, im.l1Size = int64(im.h.size), int64(im.h.l1Offset), int64(im.h.l1Size)
	if !req.Check {
		if im.h.snapshotCount > 0 && im.h.snapshotsOffset >= uint64(im.fileSize) {
			// For QEMU all its entries are empty.
			return nil, fmt.Errorf("snapshot table at %#x of a file of %d bytes: %w", im.h.snapshotsOffset, im.fileSize, sdk.ErrCorrupt)
		}
		t := snapshotTable{im: im, count: im.h.snapshotCount}
		if err := t.read(ctx); err != nil {
			return nil, err
		}
		im.snapshots = t.list
	}
	if im.bitmaps, err = im.readBitmaps(); err != nil {
		return nil, err
	}
	if req.Snapshot != "" {
		if err := im.selectSnapshot(req.Snapshot); err != nil {
			return nil, err
		}
	}
	im.cache.f = im.main
	im.countSectors(ctx)
	return im, nil
}

// checkOptions checks the options of opening, in QEMU's words.
func (im *image) checkOptions(options map[string]string) error {
	text, given := options[keyNoUnref]
	if !given {
		return nil
	}
	on, err := option.ParseBool(text)
	switch {
	case err != nil:
		return &sdk.Error{Text: fmt.Sprintf("Parameter '%s' %v", keyNoUnref, err), Class: sdk.ErrInvalid}
	case on && im.h.version < 3:
		return &sdk.Error{Text: keyNoUnref + " is only supported since qcow2 version 3", Class: sdk.ErrInvalid}
	}
	return nil
}

// countSectors sets the virtual size. For qemu a disk ends with its last whole
// sector. What an image holds behind that is not left out: its disk ends where
// the image says.
func (im *image) countSectors(ctx context.Context) {
	im.size = im.stored &^ (sectorSize - 1)
	if im.size != im.stored && im.holds(ctx, im.size, im.stored-im.size) {
		im.size = im.stored
	}
}

// holds reports whether n bytes, less than a sector, may have other content than
// zeros. What cannot be read cannot be lost.
func (im *image) holds(ctx context.Context, off, n int64) bool {
	held := false
	look := func(e sdk.Extent) bool {
		b := make([]byte, e.Length)
		switch {
		case e.Kind == sdk.Zero:
			return false
		case e.Kind == sdk.Absent:
			return im.backing != ""
		case e.Kind == sdk.Encoded && im.h.crypt != cryptNone:
			return true
		case e.Kind == sdk.Encoded:
			if im.Decode(ctx, e, b) != nil {
				return false
			}
		default:
			f, _, err := im.dataFile()
			if err != nil || readZeros(f, b, e.HostOffset) != nil {
				return false
			}
		}
		return len(bytes.Trim(b, "\x00")) > 0
	}
	err := im.Map(ctx, off, n, func(extents []sdk.Extent) bool {
		held = slices.ContainsFunc(extents, look)
		return !held
	})
	return err == nil && held
}

// readHeader reads and validates the header cluster.
func (im *image) readHeader(check bool) error {
	h := &im.h
	b := make([]byte, 512)
	if err := readZeros(im.main, b, 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	if err := h.decode(b); err != nil {
		return err
	}
	if err := h.validate(); err != nil {
		return err
	}
	cluster := make([]byte, h.clusterSize())
	if err := readZeros(im.main, cluster, 0); err != nil {
		return fmt.Errorf("header: %w", err)
	}
	if err := h.decode(cluster); err != nil { // unknown fields may be longer
		return err
	}
	end := int64(h.backingOffset)
	if end == 0 {
		end = h.clusterSize()
	}
	ext, extErr := decodeExtensions(cluster[min(int64(h.length), end):end])
	if unknown := h.incompatible &^ incompatKnown; unknown != 0 {
		var table []byte
		for _, e := range ext {
			if e.kind == extFeatures {
				table = e.data
			}
		}
		return unsupportedFeature(unknown, table)
	}
	if h.crypt > cryptLUKS {
		return &sdk.Error{Text: fmt.Sprintf("Unsupported encryption method %d", h.crypt), Class: sdk.ErrUnsupported}
	}
	if err := h.validateTables(check); err != nil {
		return err
	}
	im.g = h.geometry()
	if extErr != nil {
		return extErr
	}
	im.ext = ext
	if err := im.readExtensions(); err != nil {
		return err
	}
	if h.backingOffset != 0 {
		n := int64(h.backingSize)
		if n > min(maxNameLength, h.clusterSize()-int64(h.backingOffset)) {
			return &sdk.Error{Text: "Backing file name too long", Class: sdk.ErrCorrupt}
		}
		im.backing = cString(cluster[h.backingOffset:][:n])
	}
	return nil
}

// cString returns b up to its first NUL, which is where qemu's strings end.
func cString(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

func (im *image) readExtensions() error {
	bad := func(format string, args ...any) error {
		return &sdk.Error{Text: fmt.Sprintf(format, args...), Class: sdk.ErrCorrupt}
	}
	luks := false
	for _, e := range im.ext {
		switch e.kind {
		case extBackingFormat:
			if len(e.data) >= 16 {
				return bad("ERROR: ext_backing_format: len=%d too large (>=16)", len(e.data))
			}
			im.backingFormat = cString(e.data)
		case extDataFile:
			im.dataName = cString(e.data)
			if len(im.dataName) > maxNameLength {
				return bad("data file name of %d bytes is too long", len(im.dataName))
			}
		case extCrypto:
			if im.h.crypt != cryptLUKS {
				return bad("CRYPTO header extension only expected with LUKS encryption method")
			}
			if len(e.data) != 16 {
				return bad("CRYPTO header extension size %d, but expected size 16", len(e.data))
			}
			var c cryptoExtension
			if err := c.decode(e.data); err != nil {
				return err
			}
			if c.offset%uint64(im.g.clusterSize) != 0 {
				return bad("Encryption header offset '%d' is not a multiple of cluster size '%d'", c.offset, im.g.clusterSize)
			}
			off, ok := ondisk.Int64(c.offset)
			if !ok || c.length < luksHeaderSize {
				return bad("Encryption header offset '%d' or length '%d' is invalid", c.offset, c.length)
			}
			b, err := sdk.ReadAtMost(im.main, "LUKS header", off, luksHeaderSize, luksHeaderSize)
			if err != nil {
				return err
			}
			var l luksHeader
			if err := l.decode(b); err != nil {
				return err
			}
			im.encrypt, luks = l.facts(), true
		}
	}
	switch im.h.crypt {
	case cryptAES:
		im.encrypt = []sdk.Fact{sdk.StringFact("format", "aes")}
	case cryptLUKS:
		if !luks {
			return bad("Missing CRYPTO header for crypt method %d", cryptLUKS)
		}
	}
	if !im.h.dataFile() {
		im.dataName = ""
		if im.h.autoclear&autoclearDataFileRaw != 0 {
			return bad("data-file-raw requires a data file")
		}
	}
	return nil
}

// bitmapsExt returns the bitmaps extension, nil where there is none that
// counts.
func (im *image) bitmapsExt() (*bitmapsExtension, error) {
	for _, e := range im.ext {
		if e.kind != extBitmaps || im.h.autoclear&autoclearBitmaps == 0 {
			continue
		}
		bad := func(format string, args ...any) (*bitmapsExtension, error) {
			return nil, &sdk.Error{Text: fmt.Sprintf(format, args...), Class: sdk.ErrCorrupt}
		}
		if len(e.data) != bitmapsExtensionSize {
			return bad("bitmaps_ext: Invalid extension length")
		}
		var x bitmapsExtension
		if err := x.decode(e.data); err != nil {
			return bad("bitmaps_ext: Reserved field is not zero")
		}
		switch {
		case x.count > maxBitmaps:
			return bad("bitmaps_ext: image has %d bitmaps, exceeding the QEMU supported maximum of %d", x.count, maxBitmaps)
		case x.count == 0:
			return bad("found bitmaps extension with zero bitmaps")
		case x.dirStart%uint64(im.g.clusterSize) != 0 || x.dirStart > 1<<62:
			return bad("bitmaps_ext: invalid bitmap directory offset")
		case x.dirSize > maxBitmapDirectory:
			return bad("bitmaps_ext: bitmap directory size (%d) exceeds the maximum supported size (%d)", x.dirSize, maxBitmapDirectory)
		}
		return &x, nil
	}
	return nil, nil
}

var _ sdk.Warner = (*image)(nil)

// Warnings has qemu-img's words for bitmaps that do not count.
func (im *image) Warnings() []string {
	if im.h.autoclear&autoclearBitmaps != 0 || !slices.ContainsFunc(im.ext, func(e extension) bool { return e.kind == extBitmaps }) {
		return nil
	}
	text := "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent"
	if im.h.version < 3 {
		text = "This qcow2 v2 image contains bitmaps, but they may have been modified by a program without persistent bitmap support; so now they must all be considered inconsistent"
	}
	return []string{text, "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."}
}

func (im *image) readBitmaps() ([]bitmapEntry, error) {
	x, err := im.bitmapsExt()
	if x == nil || err != nil {
		return nil, err
	}
	if x.dirSize == 0 {
		return nil, &sdk.Error{Text: "Requested bitmap directory size is zero", Class: sdk.ErrCorrupt}
	}
	b, err := sdk.ReadAtMost(im.main, "bitmap directory", int64(x.dirStart), int64(x.dirSize), maxBitmapDirectory)
	if err != nil {
		return nil, err
	}
	return decodeBitmaps(b, x.count, im.g, im.h.wholeSize())
}

func (im *image) selectSnapshot(want string) error {
	var found *snapshot
	for i := range im.snapshots {
		if im.snapshots[i].id == want {
			found = &im.snapshots[i]
			break
		}
	}
	for i := range im.snapshots {
		if found == nil && im.snapshots[i].name == want {
			found = &im.snapshots[i]
		}
	}
	if found == nil {
		return fmt.Errorf("snapshot %q: %w", want, sdk.ErrNotFound)
	}
	if err := im.h.validateTable(found.l1Offset, uint64(found.l1Size), 8, maxL1Bytes, "Snapshot L1 table"); err != nil {
		return err
	}
	size := found.info(im.h.size).DiskSize
	if size < 0 {
		return fmt.Errorf("snapshot %q: disk size %#x: %w", want, uint64(size), sdk.ErrCorrupt)
	}
	im.stored, im.l1Offset, im.l1Size = size, int64(found.l1Offset), int64(found.l1Size)
	return nil
}

// Attach takes the external data file.
func (im *image) Attach(ctx context.Context, files []sdk.NamedFile) error {
	im.mu.Lock()
	im.files = append(im.files, files...)
	im.mu.Unlock()
	im.countSectors(ctx)
	return nil
}

// dataFile returns the file that holds guest clusters and its index.
func (im *image) dataFile() (sdk.File, int, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	role := sdk.RoleMain
	if im.h.dataFile() {
		role = sdk.RoleData
	}
	for i, f := range im.files {
		if f.Role == role {
			return f.File, i, nil
		}
	}
	return nil, 0, fmt.Errorf("data file %q: %w", im.dataName, sdk.ErrNotAttached)
}

func (im *image) Close() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.files, im.main, im.cache = nil, nil, tableCache{}
	return nil
}

// Info lists the facts in the order in which qemu-img prints them.
func (im *image) Info(context.Context) (*sdk.Info, error) {
	h := &im.h
	info := &sdk.Info{
		VirtualSize:    im.size,
		AllocationUnit: im.g.clusterSize,
		Encrypted:      h.crypt != cryptNone,
		Dirty:          h.incompatible&incompatDirty != 0,
		Corrupt:        h.incompatible&incompatCorrupt != 0,
		SpecificType:   "qcow2",
	}
	if im.backing != "" {
		info.References = append(info.References, sdk.Reference{
			Kind: sdk.RefBacking, Name: im.backing, Format: im.backingFormat, Required: true,
		})
	}
	if h.dataFile() {
		info.References = append(info.References, sdk.Reference{
			Kind: sdk.RefData, Role: sdk.RoleData, Name: im.dataName, Format: "raw", Required: true,
		})
	}
	for i := range im.snapshots {
		info.Snapshots = append(info.Snapshots, im.snapshots[i].info(h.size))
	}
	compression := "zlib"
	if h.compression == compressionZstd {
		compression = "zstd"
	}
	v3 := h.version >= 3
	info.HasBitmaps = v3
	for i := range im.bitmaps {
		e := &im.bitmaps[i]
		info.Bitmaps = append(info.Bitmaps, sdk.BitmapInfo{
			Name: e.name, Granularity: 1 << e.granularityBits,
			Enabled: e.flags&bitmapAuto != 0, Inconsistent: e.flags&bitmapInUse != 0,
		})
	}
	add := func(f ...sdk.Fact) { info.Specific = append(info.Specific, f...) }
	if v3 {
		add(sdk.StringFact("compat", "1.1"))
	} else {
		add(sdk.StringFact("compat", "0.10"))
	}
	add(sdk.StringFact("compression-type", compression))
	if v3 {
		add(sdk.BoolFact("lazy-refcounts", h.compatible&compatLazyRefcounts != 0))
		if len(im.bitmaps) > 0 {
			add(sdk.ListFact("bitmaps", bitmapFacts(im.bitmaps)...))
		}
	}
	add(sdk.UintFact("refcount-bits", 1<<h.refcountOrder))
	if h.dataFile() {
		add(sdk.StringFact("data-file", im.dataName))
	}
	if im.encrypt != nil {
		add(sdk.ObjectFact("encrypt", im.encrypt...))
	}
	if v3 {
		if h.dataFile() {
			add(sdk.BoolFact("data-file-raw", h.autoclear&autoclearDataFileRaw != 0))
		}
		add(sdk.BoolFact("corrupt", info.Corrupt), sdk.BoolFact("extended-l2", h.extendedL2()))
	}
	return info, nil
}

func bitmapFacts(list []bitmapEntry) []sdk.Fact {
	facts := make([]sdk.Fact, len(list))
	for i, e := range list {
		var flags []sdk.Fact
		if e.flags&bitmapInUse != 0 {
			flags = append(flags, sdk.StringFact("", "in-use"))
		}
		if e.flags&bitmapAuto != 0 {
			flags = append(flags, sdk.StringFact("", "auto"))
		}
		facts[i] = sdk.ObjectFact("",
			sdk.ListFact("flags", flags...),
			sdk.StringFact("name", e.name),
			sdk.UintFact("granularity", 1<<e.granularityBits))
	}
	return facts
}

// tableCache holds the parts of L1 and L2 tables that were read last.
type tableCache struct {
	f     sdk.File
	mu    sync.Mutex
	clock int64
	parts [tableParts]tablePart
}

const (
	tablePartSize = 64 << 10
	tableParts    = 64
)

type tablePart struct {
	off  int64
	buf  []byte
	used int64
}

// get returns length bytes at off, at most tablePartSize; callers use the same
// boundaries each time. The result must not be changed.
func (c *tableCache) get(off, length int64) ([]byte, error) {
	c.mu.Lock()
	c.clock++
	oldest := 0
	for i := range c.parts {
		p := &c.parts[i]
		if p.buf != nil && p.off == off && int64(len(p.buf)) == length {
			p.used = c.clock
			buf := p.buf
			c.mu.Unlock()
			return buf, nil
		}
		if p.used < c.parts[oldest].used {
			oldest = i
		}
	}
	c.mu.Unlock()
	buf := make([]byte, length)
	if err := readZeros(c.f, buf, off); err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.parts[oldest] = tablePart{off: off, buf: buf, used: c.clock}
	c.mu.Unlock()
	return buf, nil
}

func (c *tableCache) drop() {
	c.mu.Lock()
	c.parts = [tableParts]tablePart{}
	c.mu.Unlock()
}

// l1Entry returns entry i of the L1 table in use, 0 beyond its end.
func (im *image) l1Entry(i int64) (uint64, error) {
	if i >= im.l1Size {
		return 0, nil
	}
	const per = tablePartSize / 8
	first := i / per * per
	b, err := im.cache.get(im.l1Offset+first*8, min(per, im.l1Size-first)*8)
	if err != nil {
		return 0, fmt.Errorf("L1 table: %w", err)
	}
	return binary.BigEndian.Uint64(b[(i-first)*8:]), nil
}

package vhdx

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// Keys of Info.Identity: what a differencing disk has to know of its parent. It
// takes over all that describes the virtual disk (MS-VHDX 2.6.1.2).
const (
	identityDataWrite      = "vhdx-data-write-guid"
	identityDisk           = "vhdx-virtual-disk-id"
	identityLogicalSector  = "vhdx-logical-sector-size"
	identityPhysicalSector = "vhdx-physical-sector-size"
)

type image struct {
	req     sdk.OpenRequest
	file    *storage
	headers headers
	regions spans // the log and the regions
	bat     span
	params  parameters
	geo     geometry
	parent  *locator

	writer writer
}

// Open implements sdk.Format.
func (format) Open(ctx context.Context, req sdk.OpenRequest) (sdk.Image, error) {
	if len(req.Files) == 0 {
		return nil, fmt.Errorf("open: no file: %w", sdk.ErrInvalid)
	}
	if req.Snapshot != "" {
		return nil, fmt.Errorf("open: VHDX has no internal snapshots: %w", sdk.ErrNotFound)
	}
	f, err := newStorage(req.Files[0].File)
	if err != nil {
		return nil, err
	}
	img := &image{req: req, file: f}
	if err := img.readHeaders(); err != nil {
		return nil, err
	}
	if err := img.readLog(ctx); err != nil {
		return nil, err
	}
	if err := img.readRegions(); err != nil {
		return nil, err
	}
	if !req.Check {
		if err := img.validateBAT(ctx); err != nil {
			return nil, err
		}
	}
	return img, img.dropPartSector(ctx)
}

// dropPartSector ends the disk with its last whole sector, as qemu does, where
// the size is no multiple of sectors (which MS-VHDX 2.6.2.2 forbids). An image
// that holds something behind that is refused, and so is writing.
func (img *image) dropPartSector(ctx context.Context) error {
	rest := int64(img.params.virtualSize % uint64(img.params.logicalSector))
	if rest == 0 {
		return nil
	}
	size := int64(img.params.virtualSize) - rest
	empty := !img.req.ReadWrite
	look := func(e sdk.Extent) bool {
		b := make([]byte, e.Length)
		switch e.Kind {
		case sdk.Zero:
			return true
		case sdk.Absent:
			return !img.geo.parent
		case sdk.Data:
			n, err := img.file.ReadAt(b, e.HostOffset)
			return (err == nil || errors.Is(err, io.EOF)) && len(bytes.Trim(b[:n], "\x00")) == 0
		default:
			return false
		}
	}
	if empty {
		if err := img.Map(ctx, size, rest, func(extents []sdk.Extent) bool {
			empty = empty && !slices.ContainsFunc(extents, func(e sdk.Extent) bool { return !look(e) })
			return empty
		}); err != nil && !img.req.Check {
			return err
		}
	}
	if !empty {
		return img.params.errSize()
	}
	whole := img.params
	whole.virtualSize = uint64(size)
	img.geo = newGeometry(&whole)
	return nil
}

func (img *image) readHeaders() error {
	var magic [len(signature)]byte
	if _, err := img.file.ReadAt(magic[:], 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if string(magic[:]) != signature {
		return fmt.Errorf("no VHDX signature: %w", sdk.ErrNotFormat)
	}
	first, err := sdk.ReadAtMost(img.file, "header 1", header1Offset, headerSize, headerSize)
	if err != nil && !errors.Is(err, sdk.ErrCorrupt) {
		return err
	}
	second, err := sdk.ReadAtMost(img.file, "header 2", header2Offset, headerSize, headerSize)
	if err != nil && !errors.Is(err, sdk.ErrCorrupt) {
		return err
	}
	if err := img.headers.choose(first, second); err != nil {
		return err
	}
	return img.headers.get().validate(img.file.fileSize)
}

func (img *image) readLog(ctx context.Context) error {
	h := img.headers.get()
	if h.log == noGUID || h.logLength == 0 {
		return nil
	}
	log := &ring{file: img.file.File, offset: int64(h.logOffset), length: int64(h.logLength)}
	entries, err := log.active(ctx, h.log)
	if err != nil || len(entries) == 0 {
		return err
	}
	return img.file.lay(log, entries)
}

func (img *image) readRegions() error {
	table, err := img.readRegionTable()
	if err != nil {
		return err
	}
	if err := table.validate(img.file.size); err != nil {
		return err
	}
	h := img.headers.get()
	logStart, ok := ondisk.Int64(h.logOffset)
	logEnd, ok2 := ondisk.Add(logStart, int64(h.logLength))
	if !ok || !ok2 {
		return fmt.Errorf("header: log at %#x: %w", h.logOffset, sdk.ErrCorrupt)
	}
	if img.regions, err = table.layout(span{logStart, logEnd}); err != nil {
		return err
	}
	img.bat = table.get(regionBAT)
	if err := img.readMetadata(table.get(regionMetadata)); err != nil {
		return err
	}
	if need := img.geo.entries * entrySize; need > img.bat.end-img.bat.start {
		return fmt.Errorf("bat: region of %#x bytes, want %#x: %w", img.bat.end-img.bat.start, need, sdk.ErrCorrupt)
	}
	return nil
}

// readRegionTable reads the first copy, or the second where that is damaged.
func (img *image) readRegionTable() (*regionTable, error) {
	var first error
	for i, off := range []int64{regionTable1Offset, regionTable2Offset} {
		b, err := sdk.ReadAtMost(img.file, "region table", off, regionTableSize, regionTableSize)
		if err == nil {
			var t regionTable
			if err = t.decode(b); err == nil {
				return &t, nil
			}
			err = fmt.Errorf("region table %d: %w: %w", i+1, err, sdk.ErrCorrupt)
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

func (img *image) readMetadata(r span) error {
	b, err := sdk.ReadAtMost(img.file, "metadata table", r.start, metadataTableSize, metadataTableSize)
	if err != nil {
		return err
	}
	var table metadataTable
	if err := table.decode(b); err != nil {
		return fmt.Errorf("metadata table: %w: %w", err, sdk.ErrCorrupt)
	}
	if err := table.validate(r.end - r.start); err != nil {
		return err
	}
	get := func(m *item) ([]byte, error) {
		return sdk.ReadAtMost(img.file, "metadata item "+m.guid.String(), r.start+int64(m.offset), int64(m.length), maxItemLength)
	}
	if err := img.params.decode(&table, get); err != nil {
		return err
	}
	if err := img.params.validate(); err != nil {
		return err
	}
	img.geo = newGeometry(&img.params)
	if !img.geo.parent {
		return nil
	}
	m := table.known(itemParentLocator)
	if m == nil {
		return fmt.Errorf("metadata: a differencing disk without parent locator: %w", sdk.ErrCorrupt)
	}
	if b, err = get(m); err != nil {
		return err
	}
	img.parent = &locator{}
	if err := img.parent.decode(b); err != nil {
		return fmt.Errorf("parent locator: %w: %w", err, sdk.ErrCorrupt)
	}
	return img.parent.validate()
}

// validateBAT refuses an image for the first thing that a check would report of
// its payload blocks, as qemu-img does.
func (img *image) validateBAT(ctx context.Context) error {
	var first string
	report := func(text string) {
		if first == "" {
			first = text
		}
	}
	return img.eachEntry(ctx, 0, img.geo.entries, func(i, block int64, e batEntry) (bool, error) {
		img.checkPlace(i, block, e, report)
		if first != "" {
			return false, &sdk.Error{Text: first, Class: sdk.ErrCorrupt}
		}
		return true, nil
	})
}

// Info implements sdk.Image.
func (img *image) Info(context.Context) (*sdk.Info, error) {
	info := &sdk.Info{
		VirtualSize:    img.geo.virtualSize,
		AllocationUnit: img.geo.blockSize,
		Dirty:          img.file.dirty(),
		Identity: map[string]string{
			identityDataWrite:      braced(img.headers.get().dataWrite),
			identityDisk:           braced(img.params.diskID),
			identityLogicalSector:  strconv.FormatInt(img.geo.sector, 10),
			identityPhysicalSector: strconv.FormatUint(uint64(img.params.physicalSector), 10),
		},
	}
	if img.parent != nil {
		names := img.parent.names()
		id, _ := parseBraced(img.parent.get(keyLinkage))
		info.References = []sdk.Reference{{
			Kind:         sdk.RefBacking,
			Name:         names[0],
			Alternatives: names[1:],
			Format:       name,
			Required:     true,
			IdentityKey:  identityDataWrite,
			Identity:     braced(id),
		}}
	}
	return info, nil
}

// Close implements sdk.Image.
func (img *image) Close() error { return nil }

package vhd

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
	"github.com/instar-img/instar/sdk/option"
)

var errTooLarge = &sdk.Error{Text: "The image size is too large for file format 'vpc'", Class: sdk.ErrTooBig}

// PlanCreate implements sdk.Creator.
func (format) PlanCreate(_ context.Context, req sdk.CreateRequest) (sdk.Plan, error) {
	if req.Compressed {
		return nil, &sdk.Error{Text: "Compression not supported for this file format", Class: sdk.ErrUnsupported}
	}
	if req.Size < 0 {
		return nil, fmt.Errorf("size %d: %w", req.Size, sdk.ErrInvalid)
	}
	p := &plan{}
	o := req.Options
	sub := o.StringOr(keySubformat, subDynamic)
	differencing := req.Backing != nil || req.BackingName != ""
	switch {
	case sub != subDynamic && sub != subFixed:
		return nil, &sdk.Error{Text: "Invalid parameter '" + sub + "'", Class: sdk.ErrInvalid}
	case differencing && sub == subFixed:
		return nil, fmt.Errorf("subformat fixed with a backing file: a differencing disk is dynamic: %w", sdk.ErrInvalid)
	case differencing:
		p.footer.diskType = typeDifferencing
	case sub == subFixed:
		p.footer.diskType = typeFixed
	default:
		p.footer.diskType = typeDynamic
	}
	if err := p.planSize(req, o.BoolOr(keyForceSize, false)); err != nil {
		return nil, err
	}
	if req.Time-epoch2000 > math.MaxUint32 {
		return nil, &sdk.Error{Text: fmt.Sprintf("time %d: a VHD's time stamp ends at %d", req.Time, epoch2000+math.MaxUint32), Class: sdk.ErrInvalid}
	}
	p.planIdentity(req)

	blockSize := int64(o.UintOr(keyBlockSize, defaultBlockSize))
	file := sdk.PlannedFile{Role: sdk.RoleMain}
	mode := o.StringOr(keyPreallocation, "off")
	if p.footer.diskType == typeFixed {
		if o.IsSet(keyBlockSize) {
			return nil, fmt.Errorf("block_size with subformat fixed: a fixed disk has no blocks: %w", sdk.ErrInvalid)
		}
		p.footer.dataOffset = noOffset
		file.Length = p.size + footerSize
		switch mode {
		case "falloc":
			file.Preallocation = sdk.PreallocFalloc
		case "full":
			file.Preallocation = sdk.PreallocFull
		}
	} else {
		if err := p.planBlocks(blockSize); err != nil {
			return nil, err
		}
		if differencing {
			if err := p.planParent(req); err != nil {
				return nil, err
			}
		}
		p.header.checksum = p.header.sum()
		p.footer.dataOffset = footerSize
	}
	p.footer.checksum = p.footer.sum()

	set := func(v option.Value) option.Value { v.Set = o.IsSet(v.Key); return v }
	p.info = sdk.PlanInfo{
		VirtualSize: p.size,
		Options: option.Values{
			set(option.Value{Key: keySize, Type: option.Size, Uint: uint64(req.Size)}),
			set(option.Value{Key: keySubformat, Type: option.Enum, String: sub}),
			set(option.Value{Key: keyForceSize, Type: option.Bool, Bool: o.BoolOr(keyForceSize, false)}),
		},
		Files: []sdk.PlannedFile{file},
	}
	if p.footer.diskType != typeFixed {
		p.info.AllocationUnit = blockSize
		p.info.Options = append(p.info.Options, set(option.Value{Key: keyBlockSize, Type: option.Size, Uint: uint64(blockSize)}))
	}
	if differencing {
		p.info.Options = append(p.info.Options,
			set(option.Value{Key: keyBackingFile, Type: option.String, String: req.BackingName}),
			set(option.Value{Key: keyBackingFormat, Type: option.String, String: name}))
	}
	p.info.Options = append(p.info.Options,
		set(option.Value{Key: keyNoCOW, Type: option.Bool, Bool: o.BoolOr(keyNoCOW, false)}),
		set(option.Value{Key: keyPreallocation, Type: option.Enum, String: mode}),
		set(option.Value{Key: keyExtentHint, Type: option.Size, Uint: o.UintOr(keyExtentHint, 0)}))
	return p, nil
}

// plan is an image decided on.
type plan struct {
	info   sdk.PlanInfo
	size   int64 // virtual
	footer footer
	// For dynamic and differencing disks:
	header  header
	parent  []byte // what the parent locator points to, whole sectors
	layout  layout
	metaEnd int64 // where the trailing footer of an empty disk lies
}

// planSize settles the disk's size and geometry. Disks are as large as a
// geometry can be, rounded up, unless force is set or they are too large for
// any. A differencing disk is as large as its parent.
func (p *plan) planSize(req sdk.CreateRequest, force bool) error {
	wanted := ondisk.DivUp(req.Size, sectorSize)
	g := largestGeometry
	if !force {
		g = roundGeometry(wanted)
	}
	sectors := wanted
	if !force && g != largestGeometry {
		sectors = g.total()
	}
	p.footer.creator = creatorQEMU
	if force {
		p.footer.creator = creatorQEM2
	}
	if req.Backing != nil && sectors*sectorSize != req.Backing.VirtualSize {
		if wanted*sectorSize != req.Backing.VirtualSize {
			return &sdk.Error{
				Text:  fmt.Sprintf("size %d: a differencing disk is as large as its parent, %d bytes", req.Size, req.Backing.VirtualSize),
				Class: sdk.ErrInvalid,
			}
		}
		// The parent's size is no geometry's, so the child's is stored as it is.
		g, sectors, p.footer.creator = largestGeometry, wanted, creatorQEM2
	}
	if sectors > maxSectors {
		return errTooLarge
	}
	p.size = sectors * sectorSize
	p.footer.geometry = g
	p.footer.originalSize, p.footer.currentSize = uint64(p.size), uint64(p.size)
	return nil
}

// planIdentity fills in the constants, the time and the unique id.
func (p *plan) planIdentity(req sdk.CreateRequest) {
	now := req.Time
	if now == 0 && !req.Reproducible {
		now = time.Now().Unix()
	}
	p.footer.features = 2 // reserved, always set
	p.footer.version = 0x00010000
	p.footer.creatorVersion = 0x00050003 // of Virtual PC 2007
	p.footer.creatorOS = [4]byte{'W', 'i', '2', 'k'}
	p.footer.timestamp = uint32(min(max(now-epoch2000, 0), 1<<32-1))
	if req.Reproducible {
		seed := fmt.Sprintf("%s %d %d", p.footer.diskType, p.size, req.Time)
		p.footer.uniqueID = uuid.NewSHA1(uuid.NameSpaceOID, []byte("instar vpc "+seed))
	} else {
		p.footer.uniqueID = uuid.New()
	}
}

func (p *plan) planBlocks(blockSize int64) error {
	if !ondisk.IsPowerOfTwo(blockSize) || blockSize < minBlockSize || blockSize > 1<<31 {
		return fmt.Errorf("block size %d: %w", blockSize, sdk.ErrInvalid)
	}
	entries := ondisk.DivUp(p.size, blockSize)
	p.header = header{
		dataOffset:  noOffset,
		tableOffset: footerSize + headerSize,
		version:     0x00010000,
		entries:     uint32(entries),
		blockSize:   uint32(blockSize),
	}
	p.layout = newLayout(blockSize)
	p.metaEnd = p.tableEnd()
	if entries > maxEntries || !addressable(p.layout.end(p.metaEnd, entries)-blockSize-p.layout.bitmap) {
		return fmt.Errorf("block_size %d is too small for a disk of %d bytes: %w", blockSize, p.size, sdk.ErrTooBig)
	}
	return nil
}

func (p *plan) tableEnd() int64 {
	end := int64(p.header.tableOffset) + 4*int64(p.header.entries)
	return ondisk.DivUp(end, sectorSize) * sectorSize
}

// planParent links the disk to its parent. The parent's name stands before the
// table, where no writer that counts free space from the table's end reaches.
func (p *plan) planParent(req sdk.CreateRequest) error {
	if req.Backing == nil {
		return fmt.Errorf("backing file %q was not opened: a differencing disk needs its parent's unique id: %w",
			req.BackingName, sdk.ErrInvalid)
	}
	if req.Backing.Format != name {
		return &sdk.Error{
			Text:  fmt.Sprintf("backing file of format %s: the parent of a differencing disk must be a VHD (vpc)", req.Backing.Format),
			Class: sdk.ErrInvalid,
		}
	}
	id, err := uuid.Parse(req.Backing.Identity[identityID])
	if err != nil {
		return fmt.Errorf("backing file: unique id: %w: %w", err, sdk.ErrInvalid)
	}
	stamp, err := strconv.ParseUint(req.Backing.Identity[identityTime], 10, 32)
	if err != nil {
		return fmt.Errorf("backing file: time stamp: %w: %w", err, sdk.ErrInvalid)
	}
	p.header.parentID, p.header.parentTimestamp = id, uint32(stamp)
	if p.parent, err = p.header.setParent(req.BackingName, footerSize+headerSize); err != nil {
		return err
	}
	p.header.tableOffset = uint64(footerSize + headerSize + len(p.parent))
	p.metaEnd = p.tableEnd()
	return nil
}

func (p *plan) Info() sdk.PlanInfo { return p.info }

// tableChunk is how much of a block allocation table is handled at a time.
const tableChunk = 256 << 10

// Emit implements sdk.Plan.
func (p *plan) Emit(ctx context.Context, files []sdk.NamedFile) error {
	if len(files) != 1 {
		return fmt.Errorf("%d files for a plan of one: %w", len(files), sdk.ErrInvalid)
	}
	f := files[0].File
	footer := p.footer.append(nil)
	if p.footer.diskType == typeFixed {
		if _, err := f.WriteAt(footer, p.size); err != nil {
			return fmt.Errorf("write footer: %w", err)
		}
		return nil
	}
	head := p.header.append(bytes.Clone(footer))
	head = append(head, p.parent...)
	if _, err := f.WriteAt(head, 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	free := bytes.Repeat([]byte{0xff}, tableChunk)
	for at := int64(p.header.tableOffset); at < p.metaEnd; at += tableChunk {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := f.WriteAt(free[:min(tableChunk, p.metaEnd-at)], at); err != nil {
			return fmt.Errorf("write block allocation table: %w", err)
		}
	}
	if _, err := f.WriteAt(footer, p.metaEnd); err != nil {
		return fmt.Errorf("write footer: %w", err)
	}
	return nil
}

// Measure implements sdk.Measurer.
func (p *plan) Measure(_ context.Context, req sdk.MeasureRequest) (sdk.MeasureResult, error) {
	res := sdk.MeasureResult{Bitmaps: -1}
	if p.footer.diskType == typeFixed {
		res.Required, res.FullyAllocated = p.size+footerSize, p.size+footerSize
		return res, nil
	}
	all := int64(p.header.entries)
	if req.AllocatedUnits < 0 || req.AllocatedUnits > all {
		return res, fmt.Errorf("%d allocated blocks of %d: %w", req.AllocatedUnits, all, sdk.ErrInvalid)
	}
	res.Required = p.layout.end(p.metaEnd, req.AllocatedUnits) + footerSize
	res.FullyAllocated = p.layout.end(p.metaEnd, all) + footerSize
	return res, nil
}

// appendTable appends BAT entries as they are stored.
func appendTable(b []byte, entries []uint32) []byte {
	for _, e := range entries {
		b = binary.BigEndian.AppendUint32(b, e)
	}
	return b
}

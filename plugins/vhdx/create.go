package vhdx

import (
	"context"
	"encoding/binary"
	"fmt"
	"strconv"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
)

// creator is what the file identifier says of who made the image.
const creator = "instar v" + version

// identifierSize is the length of the file identifier (MS-VHDX 2.2.1).
const identifierSize = 8 + 512

const (
	defaultLogSize = mib
	// dataGap is left free behind the BAT: the metadata region and 4 MiB more.
	dataGap = 5 * mib
)

type plan struct {
	req    sdk.CreateRequest
	params parameters
	geo    geometry
	fixed  bool
	// state of every payload block.
	state     uint8
	logSize   uint32
	bat       span
	dataStart int64
	locator   []byte
	info      sdk.PlanInfo
}

// PlanCreate implements sdk.Creator.
func (format) PlanCreate(_ context.Context, req sdk.CreateRequest) (sdk.Plan, error) {
	p := &plan{req: req}
	size, ok := ondisk.AlignUp(req.Size, 512)
	if !ok || size > maxVirtualSize {
		return nil, &sdk.Error{Text: "Image size too large; max of 64TB", Class: sdk.ErrTooBig}
	}
	logSize, err := roundLogSize(req.Options.UintOr(keyLogSize, defaultLogSize))
	if err != nil {
		return nil, err
	}
	blockSize, err := roundBlockSize(req.Options.UintOr(keyBlockSize, 0), size)
	if err != nil {
		return nil, err
	}
	if req.Compressed {
		return nil, &sdk.Error{Text: "Compression not supported for this file format", Class: sdk.ErrUnsupported}
	}
	p.logSize = logSize
	p.params = parameters{blockSize: blockSize, virtualSize: uint64(size), logicalSector: 512, physicalSector: 512}
	p.fixed = req.Options.StringOr(keySubformat, subformatDynamic) == subformatFixed
	if p.fixed {
		p.params.flags |= leaveBlocksAllocated
	}
	if err := p.parent(); err != nil {
		return nil, err
	}
	p.geo = newGeometry(&p.params)
	p.place()
	p.resolve()
	return p, nil
}

func roundLogSize(v uint64) (uint32, error) {
	const limit = 1 << 32
	if v == 0 {
		return 0, &sdk.Error{Text: "Log size must be a multiple of 1 MB", Class: sdk.ErrInvalid}
	}
	if v > limit-mib {
		return 0, &sdk.Error{Text: "Log size must be smaller than 4 GB", Class: sdk.ErrInvalid}
	}
	return uint32((v + mib - 1) / mib * mib), nil
}

// roundBlockSize rounds a block size up to a whole MiB and down to the largest;
// 0 stands for one that suits the virtual size.
func roundBlockSize(v uint64, size int64) (uint32, error) {
	switch {
	case v == 0 && size > 32<<40:
		return 64 * mib, nil
	case v == 0 && size > 100<<30:
		return 32 * mib, nil
	case v == 0 && size > 1<<30:
		return 16 * mib, nil
	case v == 0:
		return 8 * mib, nil
	case v > maxBlockSize:
		return maxBlockSize, nil
	}
	v = (v + mib - 1) / mib * mib
	if !ondisk.IsPowerOfTwo(int64(v)) {
		return 0, &sdk.Error{Text: "Block size must be a power of two", Class: sdk.ErrInvalid}
	}
	return uint32(v), nil
}

// parent makes the parent locator of a differencing disk.
func (p *plan) parent() error {
	if p.req.BackingName == "" {
		return nil
	}
	b := p.req.Backing
	switch {
	case b == nil:
		return fmt.Errorf("backing file %q: a differencing VHDX records its parent's id, so the parent has to be opened (no -u): %w", p.req.BackingName, sdk.ErrInvalid)
	case b.Format != name:
		return fmt.Errorf("backing file %q: the parent of a differencing VHDX is a VHDX, not %s: %w", p.req.BackingName, b.Format, sdk.ErrInvalid)
	case p.fixed:
		return fmt.Errorf("subformat fixed: a disk with a backing file is a differencing disk: %w", sdk.ErrInvalid)
	case p.req.Options.IsSet(keyBlockStateZero) && p.req.Options.BoolOr(keyBlockStateZero, false):
		return fmt.Errorf("block_state_zero on: blocks of zeros would hide the backing file: %w", sdk.ErrInvalid)
	case int64(p.params.virtualSize) != b.VirtualSize:
		return fmt.Errorf("size %d: a differencing VHDX is as large as its parent, %d: %w", p.req.Size, b.VirtualSize, sdk.ErrInvalid)
	}
	id, ok := parseBraced(b.Identity[identityDataWrite])
	disk, ok2 := parseBraced(b.Identity[identityDisk])
	logical, err := strconv.ParseUint(b.Identity[identityLogicalSector], 10, 32)
	physical, err2 := strconv.ParseUint(b.Identity[identityPhysicalSector], 10, 32)
	if !ok || !ok2 || err != nil || err2 != nil {
		return fmt.Errorf("backing file %q: its ids or sector sizes are not known: %w", p.req.BackingName, sdk.ErrInvalid)
	}
	p.params.diskID = disk
	p.params.logicalSector, p.params.physicalSector = uint32(logical), uint32(physical)
	if err := p.params.validate(); err != nil {
		return fmt.Errorf("backing file %q: %w", p.req.BackingName, err)
	}
	path, err := relativePath(p.req.BackingName)
	if err != nil {
		return err
	}
	l := locator{kind: locatorVHDX, pairs: []pair{{keyLinkage, braced(id)}, {keyRelativePath, path}}}
	p.params.flags |= hasParent
	p.locator = l.append(nil)
	return nil
}

// place decides where everything lies, as qemu-img does: log, BAT, metadata,
// room, blocks.
func (p *plan) place() {
	entries := p.geo.entries
	if p.geo.blocks == 0 {
		// qemu-img counts the blocks of an empty disk modulo 2^32, and opens no
		// image whose table is smaller.
		entries = (1<<32 - 1) / p.geo.ratio
	}
	p.bat.start = headerSectionEnd + int64(p.logSize)
	p.bat.end = p.bat.start + ondisk.DivUp(entries*entrySize, mib)*mib
	p.dataStart = p.bat.end + dataGap

	zero := p.req.Options.BoolOr(keyBlockStateZero, p.prealloc() == sdk.PreallocOff || !p.fixed)
	switch {
	case p.locator != nil:
		p.state = blockNotPresent
	case zero:
		p.state = blockZero
	case p.fixed:
		p.state = blockFullyPresent
	default:
		p.state = blockNotPresent
	}
	p.info = sdk.PlanInfo{
		VirtualSize:    p.geo.virtualSize,
		AllocationUnit: p.geo.blockSize,
		Files:          []sdk.PlannedFile{{Role: sdk.RoleMain, Preallocation: p.prealloc()}},
	}
	if p.prealloc() != sdk.PreallocOff {
		p.info.Files[0].Length = p.length()
	}
}

func (p *plan) prealloc() sdk.Preallocation {
	switch p.req.Options.StringOr(keyPreallocation, preallocOff) {
	case preallocFalloc:
		return sdk.PreallocFalloc
	case preallocFull:
		return sdk.PreallocFull
	}
	return sdk.PreallocOff
}

// length is how long the file becomes.
func (p *plan) length() int64 {
	switch {
	case !p.fixed:
		return p.dataStart
	case p.state == blockFullyPresent:
		return p.dataStart + p.geo.blocks*p.geo.blockSize
	}
	return p.dataStart + p.geo.virtualSize
}

// resolve lists every option with the value it came to.
func (p *plan) resolve() {
	for _, k := range (format{}).Describe().Create {
		v, given := p.req.Options.Lookup(k.Name)
		v.Key, v.Type = k.Name, k.Type
		switch k.Name {
		case keySize:
			v.Uint = p.params.virtualSize
		case keyLogSize:
			v.Uint = uint64(p.logSize)
		case keyBlockSize:
			v.Uint = uint64(p.params.blockSize)
		case keySubformat:
			v.String = subformatDynamic
			if p.fixed {
				v.String = subformatFixed
			}
		case keyBlockStateZero:
			v.Bool = p.state == blockZero
		case keyPreallocation:
			v.String = p.req.Options.StringOr(keyPreallocation, preallocOff)
		case keyNocow:
		case keyBackingFormat:
			if p.locator == nil {
				continue
			}
			v.String = name
		default:
			if !given {
				continue
			}
		}
		p.info.Options = append(p.info.Options, v)
	}
}

// Info implements sdk.Plan.
func (p *plan) Info() sdk.PlanInfo { return p.info }

// Measure implements sdk.Measurer.
func (p *plan) Measure(_ context.Context, req sdk.MeasureRequest) (sdk.MeasureResult, error) {
	full := p.dataStart + p.geo.blocks*p.geo.blockSize
	res := sdk.MeasureResult{Required: full, FullyAllocated: full, Bitmaps: -1}
	if !p.fixed {
		res.Required = p.dataStart + min(max(req.AllocatedUnits, 0), p.geo.blocks)*p.geo.blockSize
	}
	return res, nil
}

// Emit implements sdk.Plan.
func (p *plan) Emit(ctx context.Context, files []sdk.NamedFile) error {
	if len(files) != 1 {
		return fmt.Errorf("emit: %d files, want 1: %w", len(files), sdk.ErrInvalid)
	}
	f := files[0].File
	size, err := f.Size()
	if err != nil {
		return err
	}
	ids := p.guids()
	if p.locator == nil {
		if p.params.diskID, err = ids.next(); err != nil {
			return err
		}
	}
	w := &emitter{f: f, old: size}
	id := make([]byte, identifierSize)
	copy(id, appendUTF16([]byte(signature), creator))
	w.write(0, id, 0)
	if err := p.emitHeaders(w, &ids); err != nil {
		return err
	}
	p.emitRegions(w)
	w.write(p.bat.end, p.params.append(nil, p.locator), mib)
	if err := p.emitBAT(ctx, w); err != nil {
		return err
	}
	if w.err != nil {
		return fmt.Errorf("emit: %w", w.err)
	}
	if size < p.length() {
		return f.Truncate(p.length())
	}
	return nil
}

func (p *plan) guids() guids {
	if !p.req.Reproducible {
		return guids{}
	}
	seed := []byte(name)
	for _, v := range []uint64{uint64(p.req.Time), p.params.virtualSize, uint64(p.params.blockSize), uint64(p.params.flags), uint64(p.logSize), uint64(p.state)} {
		seed = binary.LittleEndian.AppendUint64(seed, v)
	}
	return guids{seed: append(seed, p.locator...)}
}

func (p *plan) emitHeaders(w *emitter, ids *guids) error {
	h := header{version: 1, logLength: p.logSize, logOffset: headerSectionEnd}
	var err error
	if h.fileWrite, err = ids.next(); err != nil {
		return err
	}
	if h.dataWrite, err = ids.next(); err != nil {
		return err
	}
	start, err := ids.next()
	if err != nil {
		return err
	}
	h.sequence = uint64(binary.LittleEndian.Uint32(start[:]))
	w.write(header1Offset, h.append(nil), 0)
	h.sequence++
	w.write(header2Offset, h.append(nil), 0)
	return nil
}

func (p *plan) emitRegions(w *emitter) {
	t := regionTable{regions: []region{
		{guid: regionBAT, offset: uint64(p.bat.start), length: uint32(p.bat.end - p.bat.start)},
		{guid: regionMetadata, offset: uint64(p.bat.end), length: mib},
	}}
	b := t.append(nil)
	w.write(regionTable1Offset, b, 0)
	w.write(regionTable2Offset, b, 0)
}

func (p *plan) emitBAT(ctx context.Context, w *emitter) error {
	g := &p.geo
	buf := make([]byte, 0, min(g.entries, batChunk)*entrySize)
	at := p.bat.start
	if p.state != blockNotPresent {
		for i := range g.entries {
			e := batEntry(0)
			if block, ok := g.block(i); ok {
				e = batEntry(p.state)
				if p.state == blockFullyPresent {
					e = makeEntry(p.state, p.dataStart+block*g.blockSize)
				}
			}
			buf = binary.LittleEndian.AppendUint64(buf, uint64(e))
			if len(buf) == batChunk*entrySize {
				w.write(at, buf, 0)
				at += int64(len(buf))
				buf = buf[:0]
				if err := ctx.Err(); err != nil {
					return err
				}
			}
		}
	}
	w.write(at, buf, p.bat.end-at)
	return nil
}

// emitter writes into a file whose old content reaches up to old: a device's may
// be anything.
type emitter struct {
	f   sdk.File
	old int64
	err error
}

// write puts b at off. Old content behind it, up to length bytes from off, is
// made zero.
func (w *emitter) write(off int64, b []byte, length int64) {
	if w.err == nil && len(b) > 0 {
		_, w.err = w.f.WriteAt(b, off)
	}
	end := min(off+length, w.old)
	var buf, zeros []byte
	for off += int64(len(b)); w.err == nil && off < end; {
		if buf == nil {
			buf, zeros = make([]byte, 256<<10), make([]byte, 256<<10)
		}
		n := min(end-off, int64(len(buf)))
		if _, w.err = w.f.ReadAt(buf[:n], off); w.err != nil {
			return
		}
		if string(buf[:n]) != string(zeros[:n]) {
			_, w.err = w.f.WriteAt(zeros[:n], off)
		}
		off += n
	}
}

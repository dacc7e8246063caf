package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
	"github.com/instar-img/instar/sdk/option"
)

// plan is an image decided on.
type plan struct {
	g        geometry
	version  uint32
	size     int64 // virtual, whole sectors
	prealloc string
	header   header
	ext      []extension
	backing  string
	options  option.Values
	alloc    *allocator // of the image without guest clusters
	l1       int64      // cluster of the L1 table, 0 for none
	length   int64      // of a file with guest clusters reserved by the core
}

func invalid(format string, args ...any) error {
	return &sdk.Error{Text: fmt.Sprintf(format, args...), Class: sdk.ErrInvalid}
}

// PlanCreate checks in the order in which qemu-img does.
func (format) PlanCreate(_ context.Context, req sdk.CreateRequest) (sdk.Plan, error) {
	o := req.Options
	version := uint32(3)
	switch compat := o.StringOr(keyCompat, "v3"); compat {
	case "0.10", "v2":
		version = 2
	case "1.1", "v3":
	default:
		return nil, invalid("Parameter 'version' does not accept value '%s'", compat)
	}
	var (
		clusterSize = o.UintOr(keyClusterSize, 65536)
		extended    = o.BoolOr(keyExtendedL2, false)
		prealloc    = o.StringOr(keyPrealloc, "off")
		lazy        = o.BoolOr(keyLazy, false)
		width       = o.UintOr(keyRefcountBits, 16)
		compression = o.StringOr(keyCompression, "zlib")
		backingFmt  = o.StringOr(keyBackingFmt, "")
		backing     = req.BackingName
	)
	if backing == "" {
		backing = o.StringOr(keyBackingFile, "")
	}
	switch prealloc {
	case "off", "metadata", "falloc", "full":
	default:
		return nil, invalid("Parameter 'preallocation' does not accept value '%s'", prealloc)
	}
	if compression != "zlib" && compression != "zstd" {
		return nil, invalid("Parameter 'compression-type' does not accept value '%s'", compression)
	}
	const needsV3 = "compatibility level 1.1 %s above (use version=v3 or greater)"
	if extended && version < 3 {
		return nil, invalid("Extended L2 entries are only supported with "+needsV3, "and")
	}
	if clusterSize < 1<<minClusterBits || clusterSize > 1<<maxClusterBits || bits.OnesCount64(clusterSize) != 1 {
		return nil, invalid(clusterSizeText)
	}
	if extended && clusterSize < subclusters<<minClusterBits {
		return nil, invalid("Extended L2 entries are only supported with cluster sizes of at least %d bytes", subclusters<<minClusterBits)
	}
	if backing != "" && prealloc != "off" && !extended {
		return nil, invalid("Backing file and preallocation can only be used at the same time if extended_l2 is on")
	}
	if backing == "" && backingFmt != "" {
		return nil, invalid("Backing format cannot be used without backing file")
	}
	if lazy && version < 3 {
		return nil, invalid("Lazy refcounts only supported with "+needsV3, "and")
	}
	if width == 0 || width > 64 || bits.OnesCount64(width) != 1 {
		return nil, invalid(refcountBitsText)
	}
	if version < 3 && width != 16 {
		return nil, invalid("Different refcount widths than 16 bits require "+needsV3, "or")
	}
	if compression != "zlib" && version < 3 {
		return nil, invalid("Non-zlib compression type is only supported with "+needsV3, "and")
	}
	if req.Size < 0 || req.Size > math.MaxInt64-511 {
		return nil, invalid("Could not resize image: Image size cannot be negative")
	}
	if size := (req.Size + 511) &^ 511; size > maxLength {
		return nil, &sdk.Error{Text: fmt.Sprintf("Could not resize image: offset(%d) exceeds maximum(%d)", size, int64(maxLength)), Class: sdk.ErrTooBig}
	}

	p := &plan{version: version, prealloc: prealloc, backing: backing, size: (req.Size + 511) &^ 511}
	p.g = newGeometry(uint32(bits.TrailingZeros64(clusterSize)), extended, uint32(bits.TrailingZeros64(width)))
	h := &p.header
	*h = header{version: version, clusterBits: p.g.clusterBits, size: uint64(p.size), refcountOrder: p.g.order, length: headerLength}
	if lazy {
		h.compatible |= compatLazyRefcounts
	}
	if extended {
		h.incompatible |= incompatExtendedL2
	}
	if compression == "zstd" {
		h.incompatible |= incompatCompression
		h.compression = compressionZstd
	}
	if err := p.layOut(); err != nil {
		return nil, err
	}
	if backingFmt != "" {
		p.ext = append(p.ext, extension{extBackingFormat, []byte(backingFmt)})
	}
	// qemu-img leaves the table out of small clusters, for the backing file's
	// name to have room.
	if version >= 3 && clusterSize > 4096 {
		p.ext = append(p.ext, extension{extFeatures, featureTable()})
	}
	if backing != "" {
		reason := ""
		if len(backing) > maxNameLength {
			reason = "Invalid argument"
		} else if _, err := p.headerCluster(); err != nil {
			reason = "No space left on device"
		}
		if reason != "" {
			return nil, invalid("Could not assign backing file '%s' with format '%s': %s", backing, backingFmt, reason)
		}
	}
	p.options = resolve(req, version, clusterSize, width, compression, prealloc, backing)
	return p, nil
}

// resolve lists every option with the value the image gets.
func resolve(req sdk.CreateRequest, version uint32, clusterSize, width uint64, compression, prealloc, backing string) option.Values {
	var values option.Values
	for _, key := range schema() {
		if key.Disposition == option.Deferred {
			continue
		}
		v, ok := req.Options.Lookup(key.Name)
		if !ok {
			v = option.Value{Key: key.Name, Type: key.Type}
		}
		switch key.Name {
		case keySize:
			v.Uint = uint64(req.Size)
		case keyClusterSize:
			v.Uint = clusterSize
		case keyRefcountBits:
			v.Uint = width
		case keyCompression:
			v.String = compression
		case keyPrealloc:
			v.String = prealloc
		case keyCompat:
			if !ok {
				v.String = "v3"
			}
		case keyBackingFile:
			v.String = backing
			if backing == "" {
				continue
			}
		case keyBackingFmt, "nocow", "extent_size_hint":
			if !ok {
				continue
			}
		}
		values = append(values, v)
	}
	return values
}

// layOut places header, refcount structures and L1 table, and with falloc and
// full computes the length of the file.
func (p *plan) layOut() error {
	h := &p.header
	entries := h.l1Needed()
	if entries > maxL1Bytes/8 {
		return errTooLarge
	}
	h.l1Size = uint32(entries)
	p.alloc = newAllocator(p.g)
	if entries > 0 {
		var err error
		if p.l1, err = p.alloc.alloc(p.g.clusters(int64(entries) * 8)); err != nil {
			return err
		}
	}
	if p.prealloc == "falloc" || p.prealloc == "full" {
		return p.reserve()
	}
	return nil
}

// reserve makes the refcount structures for all guest clusters and takes those
// clusters, in one run. The L2 tables follow in eachL2.
func (p *plan) reserve() error {
	clusters := p.g.clusters(p.size)
	// One table more than there can be: qemu-img's estimate.
	tables := divUp(clusters, p.g.l2Entries) + 1
	start, err := p.alloc.growTable(p.alloc.used.end(), clusters+tables, true, 0, 0)
	if err != nil {
		return err
	}
	if got, err := p.alloc.allocAt(start, clusters); err != nil || got != clusters {
		return errTooLarge
	}
	p.length, _ = ondisk.Mul(start+clusters, p.g.clusterSize)
	if p.length == 0 {
		return errTooLarge
	}
	return nil
}

// mapping is n guest clusters of one L2 table that lie in a row.
type mapping struct{ guest, host, n int64 }

// eachMapping allocates L2 tables and, for preallocation=metadata, guest
// clusters as qemu-img does, and reports both in guest order. It returns the
// end of the last guest cluster, in bytes of the file.
func (p *plan) eachMapping(table func(l1Index, cluster int64) error, data func(mapping) error) (int64, error) {
	if p.prealloc == "off" || p.size == 0 {
		return 0, nil
	}
	// qemu-img goes by slices of L2 tables, by its cache's default entry size.
	slice := min(p.g.l2Entries, 65536/p.g.entrySize)
	clusters := p.g.clusters(p.size)
	lastTable := int64(-1)
	needTable := func(guest int64) error {
		index := guest / p.g.l2Entries
		if index == lastTable {
			return nil
		}
		cluster, err := p.alloc.alloc(1)
		if err != nil {
			return err
		}
		lastTable = index
		return table(index, cluster)
	}
	if p.prealloc != "metadata" {
		host := p.length/p.g.clusterSize - clusters
		for guest := int64(0); guest < clusters; {
			if err := needTable(guest); err != nil {
				return 0, err
			}
			n := min(clusters-guest, p.g.l2Entries-guest%p.g.l2Entries)
			if err := data(mapping{guest, host + guest, n}); err != nil {
				return 0, err
			}
			guest += n
		}
		return p.length, nil
	}
	request := int64(math.MaxInt32) / p.g.clusterSize // clusters in one request
	end := int64(0)
	for guest := int64(0); guest < clusters; {
		left := min(clusters-guest, request)
		expect := int64(-1) // where the request would go on
		for left > 0 {
			n := min(left, slice-guest%slice)
			if err := needTable(guest); err != nil {
				return 0, err
			}
			host := expect
			var err error
			if expect < 0 {
				host, err = p.alloc.alloc(n)
			} else {
				n, err = p.alloc.allocAt(expect, n)
			}
			if err != nil {
				return 0, err
			}
			if n == 0 {
				break
			}
			if err := data(mapping{guest, host, n}); err != nil {
				return 0, err
			}
			guest, left, expect = guest+n, left-n, host+n
			end = expect
		}
	}
	// The last cluster need not be whole in the file.
	cut := clusters*p.g.clusterSize - divUp(p.size, p.g.subSize)*p.g.subSize
	return end*p.g.clusterSize - cut, nil
}

func (p *plan) Info() sdk.PlanInfo {
	file := sdk.PlannedFile{Role: sdk.RoleMain, Length: p.length}
	switch p.prealloc {
	case "falloc":
		file.Preallocation = sdk.PreallocFalloc
	case "full":
		file.Preallocation = sdk.PreallocFull
	}
	return sdk.PlanInfo{
		VirtualSize:    p.size,
		AllocationUnit: p.g.clusterSize,
		Options:        p.options,
		Files:          []sdk.PlannedFile{file},
	}
}

// headerCluster returns the first cluster.
func (p *plan) headerCluster() ([]byte, error) {
	h := p.header
	h.l1Offset = uint64(p.l1 * p.g.clusterSize)
	h.reftableOffset = uint64(p.alloc.tableCluster * p.g.clusterSize)
	h.reftableClusters = uint32(p.alloc.tableClusters)
	return encodeHeader(h, p.ext, p.backing)
}

// encodeHeader returns the header cluster: fields, extensions and the backing
// file's name.
func encodeHeader(h header, ext []extension, backing string) ([]byte, error) {
	var tail []byte
	for _, e := range ext {
		tail = appendExtension(tail, e)
	}
	tail = appendExtension(tail, extension{kind: extEnd})
	fixed := len(h.append(nil))
	if h.version >= 3 {
		h.length = uint32(fixed)
	}
	if backing != "" {
		h.backingOffset = uint64(fixed + len(tail))
		h.backingSize = uint32(len(backing))
		tail = append(tail, backing...)
	}
	if int64(fixed+len(tail)) > h.clusterSize() {
		return nil, fmt.Errorf("header does not fit into a cluster of %d bytes: %w", h.clusterSize(), sdk.ErrTooBig)
	}
	b := append(h.append(nil), tail...)
	return append(b, make([]byte, h.clusterSize()-int64(len(b)))...), nil
}

// Emit writes the guest clusters' tables first and the header last, so that
// nothing looks like an image before it is one.
func (p *plan) Emit(ctx context.Context, files []sdk.NamedFile) error {
	f := files[0].File
	w := &batch{f: f}
	l1 := make([]byte, int64(p.header.l1Size)*8)
	table := make([]byte, p.g.clusterSize)
	tableAt := int64(-1)
	flush := func() error {
		if tableAt < 0 {
			return nil
		}
		if err := w.write(tableAt*p.g.clusterSize, table); err != nil {
			return err
		}
		return ctx.Err()
	}
	end, err := p.eachMapping(func(index, cluster int64) error {
		if err := flush(); err != nil {
			return err
		}
		clear(table)
		tableAt = cluster
		binary.BigEndian.PutUint64(l1[index*8:], uint64(cluster*p.g.clusterSize)|flagCopied)
		return nil
	}, func(m mapping) error {
		entry := uint64(m.host*p.g.clusterSize) | flagCopied
		b := table[m.guest%p.g.l2Entries*p.g.entrySize:][:m.n*p.g.entrySize]
		step, inc := int(p.g.entrySize), uint64(p.g.clusterSize)
		for i := 0; i < len(b); i += step {
			binary.BigEndian.PutUint64(b[i:], entry)
			entry += inc
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := flush(); err != nil {
		return err
	}
	if len(l1) > 0 {
		if err := w.write(p.l1*p.g.clusterSize, l1); err != nil {
			return err
		}
	}
	if err := p.writeRefcounts(ctx, w); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	if size, err := f.Size(); err != nil {
		return err
	} else if end = max(end, p.length); end > size {
		// Clusters allocated beyond the end would not be readable. A device
		// that is too small says so here.
		if err := f.Truncate(end); err != nil {
			return err
		}
	}
	b, err := p.headerCluster()
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, 0)
	return err
}

// writeRefcounts writes the refcount blocks and the table.
func (p *plan) writeRefcounts(ctx context.Context, w *batch) error {
	full := make([]byte, p.g.clusterSize)
	fillOnes(full, 0, p.g.blockEntries, p.g.order)
	part := make([]byte, p.g.clusterSize)
	table := make([]byte, p.alloc.tableClusters*p.g.clusterSize)
	next := 0 // first span that can matter
	for i, cluster := range p.alloc.table {
		if cluster == 0 {
			continue
		}
		binary.BigEndian.PutUint64(table[i*8:], uint64(cluster*p.g.clusterSize))
		lo, hi := int64(i)*p.g.blockEntries, int64(i+1)*p.g.blockEntries
		for next < len(p.alloc.used) && p.alloc.used[next].end <= lo {
			next++
		}
		block := full
		if next == len(p.alloc.used) || p.alloc.used[next].start > lo || p.alloc.used[next].end < hi {
			block = part
			clear(part)
			for _, s := range p.alloc.used[next:] {
				if s.start >= hi {
					break
				}
				fillOnes(part, max(s.start, lo)-lo, min(s.end, hi)-lo, p.g.order)
			}
		}
		if err := w.write(cluster*p.g.clusterSize, block); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return w.write(p.alloc.tableCluster*p.g.clusterSize, table)
}

// fillOnes sets refcounts [start, end) of a block to 1.
func fillOnes(block []byte, start, end int64, order uint32) {
	for i := start; i < end; i++ {
		setRefcount(block, i, order, 1)
	}
}

// batch joins writes that follow each other.
type batch struct {
	f   sdk.File
	off int64
	buf []byte
}

const batchSize = 1 << 20

func (w *batch) write(off int64, b []byte) error {
	if len(w.buf) > 0 && (w.off+int64(len(w.buf)) != off || len(w.buf)+len(b) > batchSize) {
		if err := w.flush(); err != nil {
			return err
		}
	}
	if len(w.buf) == 0 {
		w.off = off
		if len(b) >= batchSize {
			_, err := w.f.WriteAt(b, off)
			return err
		}
	}
	w.buf = append(w.buf, b...)
	return nil
}

func (w *batch) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	_, err := w.f.WriteAt(w.buf, w.off)
	w.buf = w.buf[:0]
	return err
}

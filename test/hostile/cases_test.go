//go:build linux

package hostile

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"unicode/utf16"

	"golang.org/x/sys/unix"
)

// qcow is a qcow2 image of one gigabyte, as its header says it, whose parts
// tests bend.
type qcow struct {
	version, backingOffset, backingSize, clusterBits, size, crypt uint64
	l1Size, l1Offset, reftable, reftableClusters                  uint64
	snapshots, snapshotsOffset                                    uint64
	incompat, compat, autoclear, refcountOrder, headerLength      uint64
	extensions                                                    []byte
	at                                                            map[int64][]byte
	length                                                        int64
}

const cluster = 64 << 10

// newQcow has its refcount table in cluster 1, a refcount block in 2, its L1
// table in 3, an L2 table in 4 and a data cluster in 5.
func newQcow() *qcow {
	q := &qcow{version: 3, clusterBits: 16, size: 1 << 30, l1Size: 2, l1Offset: 3 * cluster, reftable: cluster, reftableClusters: 1,
		refcountOrder: 4, headerLength: 104, at: map[int64][]byte{}, length: 6 * cluster}
	q.put64(cluster, 2*cluster)
	for i := range int64(6) {
		q.put(2*cluster+2*i, []byte{0, 1})
	}
	q.put64(3*cluster, 4*cluster|1<<63)
	q.put64(4*cluster, 5*cluster|1<<63)
	q.put(5*cluster, bytes.Repeat([]byte("guest   "), cluster/8))
	return q
}

func (q *qcow) put(off int64, b []byte)   { q.at[off] = b }
func (q *qcow) put64(off int64, v uint64) { q.put(off, binary.BigEndian.AppendUint64(nil, v)) }
func (q *qcow) extend(kind uint32, b []byte) {
	q.extensions = binary.BigEndian.AppendUint32(q.extensions, kind)
	q.extensions = binary.BigEndian.AppendUint32(q.extensions, uint32(len(b)))
	q.extensions = append(q.extensions, b...)
	q.extensions = append(q.extensions, make([]byte, -len(b)&7)...)
}

// backing names a backing file of format raw.
func (q *qcow) backing(name string) *qcow {
	q.extend(0xe2792aca, []byte("raw"))
	q.backingOffset, q.backingSize = 1024, uint64(len(name))
	q.put(1024, []byte(name))
	return q
}

func (q *qcow) bytes() []byte {
	be := binary.BigEndian
	b := []byte("QFI\xfb")
	for _, f := range []struct {
		v    uint64
		size int
	}{{q.version, 4}, {q.backingOffset, 8}, {q.backingSize, 4}, {q.clusterBits, 4}, {q.size, 8}, {q.crypt, 4}, {q.l1Size, 4}, {q.l1Offset, 8},
		{q.reftable, 8}, {q.reftableClusters, 4}, {q.snapshots, 4}, {q.snapshotsOffset, 8}, {q.incompat, 8}, {q.compat, 8}, {q.autoclear, 8}, {q.refcountOrder, 4}, {q.headerLength, 4}} {
		if f.size == 4 {
			b = be.AppendUint32(b, uint32(f.v))
		} else {
			b = be.AppendUint64(b, f.v)
		}
	}
	b = append(b, q.extensions...)
	out := make([]byte, q.length)
	copy(out, b)
	for off, part := range q.at {
		copy(out[off:], part)
	}
	return out
}

// verbs are the command lines that read one image, @.
var verbs = []string{
	"info @", "info --output json @", "info --backing-chain @", "map @", "check @", "measure -O qcow2 @", "compare @ @",
	"convert -O raw @ out", "convert -O qcow2 -c @ out", "dd -O raw if=@ of=out bs=64k count=4", "inspect @",
}

// hostile is an image and what must become of it.
type hostile struct {
	name  string
	bytes []byte
	// refuse lists the verbs that must fail, "all" for every one.
	refuse string
	want   string // in the error, where refused
	format string // -f, empty: detected
	few    bool   // verbs are run: those that read everything, and untrusted
}

// fewVerbs read, of an image, all that there is to be read.
var fewVerbs = []string{"info @", "map @", "check @", "convert -O raw @ out", "inspect @"}

// survive runs every verb over an image, with and without --untrusted.
func (h hostile) survive(t *testing.T) {
	t.Helper()
	t.Parallel()
	dir, runtime := t.TempDir(), runtimeDir(t)
	write(t, dir, "image", h.bytes)
	verbs, trust := verbs, []bool{false, true}
	if h.few {
		verbs, trust = fewVerbs, trust[1:]
	}
	for _, verb := range verbs {
		for _, untrusted := range trust {
			words := strings.Fields(strings.ReplaceAll(verb, "@", "image"))
			if h.format != "" && words[0] != "inspect" {
				words = append(words, "-f", h.format)
				if words[0] == "compare" {
					words = append(words, "-F", h.format)
				}
			}
			if untrusted {
				if twice := verb == "info @" || !strings.HasPrefix(verb, "info") && words[0] != "measure" && words[0] != "compare"; !twice {
					continue // what it reads others do under the same limits
				}
				words = append(words, "--untrusted")
			}
			r := command{Argv: words, Dir: dir, Env: []string{"XDG_RUNTIME_DIR=" + runtime}}.run(t)
			if len(r.Crashed) > 0 {
				t.Errorf("%s: a plugin died: %v\n%s", words, r.Crashed, clip(r.Stderr))
			}
			refused := h.refuse == "all" || strings.Contains(h.refuse, words[0])
			switch {
			case words[0] == "inspect":
				if r.Code != 0 && r.Code != 1 || ((h.refuse == "all" || strings.Contains(h.refuse, "info")) && r.Code != 1) {
					t.Errorf("%s: exit code %d\n%s%s", words, r.Code, clip(r.Stdout), clip(r.Stderr))
				}
				if untrusted {
					continue
				}
			case refused || r.Code != 0 && r.Stdout == "":
				if words[0] == "check" {
					// Before it fails it says what it found.
					if i := strings.LastIndex(r.Stderr, "instar: "); i > 0 {
						r.Stderr = r.Stderr[i:]
					}
				}
				line := r.oneLine(t)
				if refused && !strings.Contains(line, h.want) {
					t.Errorf("%s: %s, want %q in it", words, line, h.want)
				}
			}
			if r.Code != 0 {
				if got := listing(t, dir); got != "image" {
					t.Errorf("%s failed and left %s", words, got)
				}
			}
			os.Remove(filepath.Join(dir, "out"))
		}
	}
	noSocketDirs(t, runtime)
}

func le(parts ...any) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		if err := binary.Write(&b, binary.LittleEndian, p); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

// bomb is a deflate stream of zeros, a thousand times as long as itself.
func bomb(n int) []byte {
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, 9)
	w.Write(make([]byte, n))
	w.Close()
	return b.Bytes()
}

// compressed returns an image of which cluster 0 is stored compressed.
func compressed(data []byte, at uint64, sectors uint64, zstd bool) *qcow {
	q := newQcow()
	q.put64(4*cluster, 1<<62|sectors<<54|at)
	q.put(5*cluster, data[:min(len(data), cluster)])
	if zstd {
		q.incompat, q.headerLength = 1<<3, 112
		q.extensions = append([]byte{1, 0, 0, 0, 0, 0, 0, 0}, q.extensions...)
	}
	return q
}

func qcowCases() []hostile {
	var out []hostile
	add := func(name, refuse, want string, bend func(q *qcow)) {
		q := newQcow()
		bend(q)
		out = append(out, hostile{name: name, bytes: q.bytes(), refuse: refuse, want: want})
	}
	for _, bits := range []uint64{0, 8, 22, 33, 63, 1 << 31, 1<<32 - 1} { // 10
		add(fmt.Sprintf("10 cluster_bits %d", bits), "all", "cluster size", func(q *qcow) { q.clusterBits = bits })
	}
	add("11 l1_size", "all", "L1", func(q *qcow) { q.l1Size = 1<<32 - 1 })
	add("11 l1 beyond the file", "", "", func(q *qcow) { q.l1Offset = 1 << 50 })
	add("11 l1 unaligned", "all", "", func(q *qcow) { q.l1Offset = 3*cluster + 8 })
	add("12 size 2^63-1", "all", "", func(q *qcow) { q.size = 1<<63 - 1 })
	add("12 size 2^64-1", "all", "", func(q *qcow) { q.size = 1<<64 - 1 })
	add("12 size beyond l1", "all", "", func(q *qcow) { q.size = 1 << 40 })
	add("13 refcount_order", "all", "", func(q *qcow) { q.refcountOrder = 7 })
	add("13 refcount_order max", "all", "", func(q *qcow) { q.refcountOrder = 1<<32 - 1 })
	add("13 no refcount table", "info map convert compare dd measure", "", func(q *qcow) { q.reftableClusters = 0 })
	add("13 huge refcount table", "all", "", func(q *qcow) { q.reftableClusters = 1<<32 - 1 })
	add("13 refcount table is the header", "", "", func(q *qcow) { q.reftable = 0 })
	add("14 extension length", "all", "", func(q *qcow) {
		q.extensions = []byte{0xe2, 0x79, 0x2a, 0xca, 0xff, 0xff, 0xff, 0xff}
	})
	add("14 unknown extension length", "all", "", func(q *qcow) {
		q.extensions = []byte{1, 2, 3, 4, 0xff, 0xff, 0xff, 0xf8}
	})
	add("15 snapshots", "all", "", func(q *qcow) { q.snapshots, q.snapshotsOffset = 65537, 5*cluster })
	add("15 snapshot table past the end", "info map convert compare dd measure", "", func(q *qcow) { q.snapshots, q.snapshotsOffset = 1, 1<<40 })
	add("15 snapshot table max", "all", "", func(q *qcow) { q.snapshots, q.snapshotsOffset = 1<<32-1, 1<<64-cluster })
	add("16 snapshot name", "", "", func(q *qcow) {
		name := "\x1b[2J\x1b]0;owned\x07\nfile format: faked"
		q.snapshots, q.snapshotsOffset = 1, 5*cluster
		entry := binary.BigEndian.AppendUint64(nil, 3*cluster)
		entry = binary.BigEndian.AppendUint32(entry, 2)
		entry = binary.BigEndian.AppendUint16(entry, 1)
		entry = binary.BigEndian.AppendUint16(entry, uint16(len(name)))
		entry = append(entry, make([]byte, 20)...)
		entry = binary.BigEndian.AppendUint32(entry, 16)
		entry = binary.BigEndian.AppendUint64(append(entry, make([]byte, 8)...), 1<<30)
		q.put(5*cluster, append(append(entry, '1'), name...))
	})
	for where, off := range map[string]uint64{"header": 0, "L1": 3 * cluster, "itself": 4 * cluster, "refcounts": 2 * cluster, "refcount table": cluster} {
		add("17 L2 into "+where, "", "", func(q *qcow) {
			q.put64(4*cluster, off|1<<63)
			if off == 0 {
				q.put64(4*cluster, 512|1<<63)
			}
		})
	}
	add("18 shared cluster", "", "", func(q *qcow) { q.put64(4*cluster+8, 5*cluster|1<<63) })
	add("17 L1 to itself", "", "", func(q *qcow) { q.put64(3*cluster, 3*cluster|1<<63) })
	add("17 L1 unaligned", "", "", func(q *qcow) { q.put64(3*cluster, (4*cluster+512)|1<<63) })
	add("17 L2 beyond the file", "", "", func(q *qcow) { q.put64(3*cluster, 1<<50|1<<63) })
	add("17 data beyond the file", "", "", func(q *qcow) { q.put64(4*cluster, 1<<55|1<<63) })
	add("17 reserved bits", "", "", func(q *qcow) { q.put64(4*cluster, 1<<56|5*cluster|1<<63) })
	for _, bit := range []int{5, 17, 40, 63} {
		add(fmt.Sprintf("20 incompatible bit %d", bit), "all", "", func(q *qcow) { q.incompat = 1 << bit })
	}
	add("21 dirty", "", "", func(q *qcow) { q.incompat = 1 })
	add("21 corrupt", "", "", func(q *qcow) { q.incompat = 2 })
	// Cases of our own. CVE-2014-0144 is the class of all that follow from fields of
	// a qcow2 header that nobody looked at: lengths, offsets, sizes of tables.
	add("version 4", "all", "version", func(q *qcow) { q.version = 4 })
	add("header longer than a cluster", "all", "", func(q *qcow) { q.headerLength = 1 << 31 })
	add("header shorter than itself", "all", "", func(q *qcow) { q.headerLength = 8 })
	add("backing name past the cluster", "all", "", func(q *qcow) { q.backingOffset, q.backingSize = cluster-4, 1023 })
	add("backing name of 4 GiB", "all", "", func(q *qcow) { q.backingOffset, q.backingSize = 512, 1<<32-1 })
	add("backing offset 2^63", "all", "", func(q *qcow) { q.backingOffset, q.backingSize = 1<<63, 8 })
	add("crypt method", "all", "", func(q *qcow) { q.crypt = 77 })
	add("LUKS without header", "all", "", func(q *qcow) { q.crypt = 2 })
	add("LUKS header of 2^64", "all", "", func(q *qcow) {
		q.crypt = 2
		q.extend(0x0537be77, bytes.Repeat([]byte{0xff}, 16))
	})
	add("bitmaps 2^32", "all", "", func(q *qcow) {
		q.autoclear = 1
		q.extend(0x23852875, append([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, bytes.Repeat([]byte{0xff}, 16)...))
	})
	add("bitmap directory beyond the file", "", "", func(q *qcow) {
		q.autoclear = 1
		q.extend(0x23852875, binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64([]byte{0, 0, 0, 1, 0, 0, 0, 0}, 32), 1<<40))
	})
	// The class of CVE-2024-32498 and CVE-2024-4467, without what those name.
	add("data-file bit without a name", "all", "", func(q *qcow) { q.incompat = 4 })
	// The class of https://bugs.launchpad.net/qemu/+bug/1728615: refcount blocks where
	// none can be.
	add("refcount block beyond the file", "", "", func(q *qcow) { q.put64(cluster, 1<<50) })
	add("refcount block unaligned", "", "", func(q *qcow) { q.put64(cluster, 2*cluster+512) })
	// Small images that take long, as in CVE-2015-5162.
	add("refcount blocks all one", "", "", func(q *qcow) {
		q.put(cluster, bytes.Repeat(binary.BigEndian.AppendUint64(nil, 2*cluster), cluster/8))
	})
	add("L1 all one L2", "", "", func(q *qcow) {
		q.l1Size, q.size = cluster/8, cluster/8*(cluster/8)*cluster
		q.put(3*cluster, bytes.Repeat(binary.BigEndian.AppendUint64(nil, 4*cluster|1<<63), cluster/8))
		q.put(4*cluster, bytes.Repeat(binary.BigEndian.AppendUint64(nil, 1), cluster/8))
	})
	add("extended L2 with tiny clusters", "all", "", func(q *qcow) { q.incompat, q.clusterBits = 16, 9 })
	zlib := func(name, refuse string, data []byte, at, sectors uint64, zstd bool) {
		out = append(out, hostile{name: name, bytes: compressed(data, at, sectors, zstd).bytes(), refuse: refuse})
	}
	zlib("19 compressed beyond the end", "convert dd compare", nil, 1<<40, 3, false)
	zlib("19 deflate bomb", "", bomb(32<<20), 5*cluster, 100, false)
	zlib("19 deflate garbage", "convert dd", bytes.Repeat([]byte{0xff}, cluster), 5*cluster, 100, false)
	zlib("19 deflate too short", "convert dd", bomb(512), 5*cluster, 1, false)
	zlib("19 zstd window of 2 GiB", "convert dd", append([]byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8}, make([]byte, 1000)...), 5*cluster, 10, true)
	// A frame of one run-length block of 128 KiB after the other.
	rle := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58}
	for range 10_000 {
		n := uint32(128<<10)<<3 | 1<<1
		rle = append(rle, byte(n), byte(n>>8), byte(n>>16), 'x')
	}
	zlib("19 zstd bomb", "", rle, 5*cluster, 120, true)
	zlib("19 zstd garbage", "convert dd", bytes.Repeat([]byte{0xff}, cluster), 5*cluster, 100, true)
	return out
}

func vmdkHeader(capacity, grain, descOffset, descSize uint64, gtes uint32, rgd, gd, overhead uint64) []byte {
	b := le([]byte("KDMV"), uint32(1), uint32(3), capacity, grain, descOffset, descSize, gtes, rgd, gd, overhead, byte(0), []byte("\n \r\n"), uint16(0))
	out := make([]byte, 64<<10)
	copy(out, b)
	copy(out[512:], "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW 2048 SPARSE \"image\"\n")
	return out
}

func descriptor(extents ...string) []byte {
	return []byte("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n" + strings.Join(extents, "\n") + "\n")
}

func vmdkCases() []hostile {
	sparse := func(name, refuse string, b []byte) hostile {
		return hostile{name: name, bytes: b, refuse: refuse, format: "vmdk"}
	}
	return []hostile{
		sparse("23 capacity 0", "all", vmdkHeader(0, 128, 0, 0, 512, 21, 26, 128)),
		sparse("23 grain 0", "all", vmdkHeader(2048, 0, 1, 20, 512, 21, 26, 128)),
		sparse("23 grain 3", "all", vmdkHeader(2048, 3, 1, 20, 512, 21, 26, 128)),
		sparse("23 grain 2^40", "all", vmdkHeader(2048, 1<<40, 1, 20, 512, 21, 26, 128)),
		sparse("23 grain 2^63", "all", vmdkHeader(2048, 1<<63, 1, 20, 512, 21, 26, 128)),
		sparse("23 capacity 2^63", "all", vmdkHeader(1<<63, 128, 1, 20, 512, 21, 26, 128)),
		sparse("23 capacity 2^54", "all", vmdkHeader(1<<54, 128, 1, 20, 512, 21, 26, 128)),
		sparse("23 tables of 0", "all", vmdkHeader(2048, 128, 1, 20, 0, 21, 26, 128)),
		sparse("23 tables of 2^32-1", "all", vmdkHeader(2048, 128, 1, 20, 1<<32-1, 21, 26, 128)),
		sparse("23 descriptor of 1 GiB", "all", vmdkHeader(2048, 128, 1, 2<<20, 512, 21, 26, 128)),
		sparse("23 descriptor past 2^63", "all", vmdkHeader(2048, 128, 1<<60, 1<<60, 512, 21, 26, 128)),
		// Cases of our own: the class of CVE-2014-0143, sizes and sums of them that
		// overflow, and CVE-2014-0144, tables that are not where they must be.
		sparse("directory past the end", "map convert dd compare", vmdkHeader(2048, 128, 1, 20, 512, 0, 1<<50, 128)),
		sparse("directory is the header", "", vmdkHeader(2048, 128, 1, 20, 512, 0, 0, 128)),
		sparse("no extents", "all", descriptor()),
		sparse("extent of 2^63 sectors", "all", descriptor(`RW 9223372036854775807 ZERO`)),
		sparse("extents past 2^63", "all", descriptor(`RW 9007199254740991 ZERO`, `RW 9007199254740991 ZERO`, `RW 9007199254740991 ZERO`)),
		sparse("negative extent", "all", descriptor(`RW -1 ZERO`)),
		sparse("a hundred thousand extents", "", descriptor(strings.Repeat("RW 1 ZERO\n", 100_000))),
		sparse("a line without end", "all", append(descriptor(), bytes.Repeat([]byte("x"), 1<<20)...)),
		// The class of CVE-2022-47951: a descriptor of a kind that names something else.
		sparse("create type", "all", bytes.Replace(descriptor(`RW 1 ZERO`), []byte("monolithicFlat"), []byte("vmfsRawDeviceMap"), 1)),
	}
}

func vhdSum(b []byte, at int) {
	binary.BigEndian.PutUint32(b[at:], 0)
	sum := uint32(0)
	for _, c := range b {
		sum += uint32(c)
	}
	binary.BigEndian.PutUint32(b[at:], ^sum)
}

// vhd is a dynamic disk of 1 GiB, bent after its parts are made and before
// their sums are.
func vhd(bend func(footer, header []byte)) []byte {
	be := binary.BigEndian
	footer, header := make([]byte, 512), make([]byte, 1024)
	copy(footer, "conectix")
	be.PutUint32(footer[8:], 2)
	be.PutUint32(footer[12:], 0x10000)
	be.PutUint64(footer[16:], 512)
	copy(footer[28:], "win ")
	be.PutUint64(footer[40:], 1<<30)
	be.PutUint64(footer[48:], 1<<30)
	be.PutUint32(footer[56:], 0x0822103f)
	be.PutUint32(footer[60:], 3)
	copy(header, "cxsparse")
	be.PutUint64(header[8:], 1<<64-1)
	be.PutUint64(header[16:], 1536)
	be.PutUint32(header[24:], 0x10000)
	be.PutUint32(header[28:], 512)
	be.PutUint32(header[32:], 2<<20)
	bend(footer, header)
	vhdSum(footer, 64)
	vhdSum(header, 36)
	out := append(append([]byte(nil), footer...), header...)
	out = append(out, bytes.Repeat([]byte{0xff}, 2048)...)
	return append(out, footer...)
}

// vhdParent is a disk that differs from one of that name.
func vhdParent(name string) []byte {
	var text []byte
	for _, u := range utf16.Encode([]rune(name)) {
		text = binary.LittleEndian.AppendUint16(text, u)
	}
	be := binary.BigEndian
	b := vhd(func(f, h []byte) {
		be.PutUint32(f[60:], 4)
		copy(h[576:], "W2ru")
		be.PutUint32(h[580:], 512)
		be.PutUint32(h[584:], uint32(len(text)))
		be.PutUint64(h[592:], 512+1024+2048)
	})
	end := len(b) - 512
	return slices.Concat(b[:end], text, make([]byte, 2048-len(text)), b[end:])
}

func vhdCases() []hostile {
	be := binary.BigEndian
	one := func(name, refuse string, bend func(f, h []byte)) hostile {
		return hostile{name: name, bytes: vhd(bend), refuse: refuse, format: "vpc"}
	}
	return []hostile{
		one("24 table past the end", "all", func(_, h []byte) { be.PutUint64(h[16:], 1<<40) }),
		one("24 table at 2^64-512", "all", func(_, h []byte) { be.PutUint64(h[16:], 1<<64-512) }),
		one("24 entries 2^32-1", "all", func(_, h []byte) { be.PutUint32(h[28:], 1<<32-1) }),
		one("24 entries 0", "all", func(_, h []byte) { be.PutUint32(h[28:], 0) }),
		one("24 block size 0", "all", func(_, h []byte) { be.PutUint32(h[32:], 0) }),
		one("24 block size 3", "all", func(_, h []byte) { be.PutUint32(h[32:], 3) }),
		// Block sizes and numbers of entries: CVE-2014-0144 in qemu's vpc, and CVE-2014-0142
		// for what is divided by.
		one("24 block size 2^31", "", func(_, h []byte) { be.PutUint32(h[32:], 1<<31) }),
		// Cases of our own, of the same class.
		one("size 2^64-1", "all", func(f, _ []byte) { be.PutUint64(f[48:], 1<<64-1) }),
		one("type 99", "all", func(f, _ []byte) { be.PutUint32(f[60:], 99) }),
		one("header past the end", "all", func(f, _ []byte) { be.PutUint64(f[16:], 1<<40) }),
		one("header at 2^64-1", "all", func(f, _ []byte) { be.PutUint64(f[16:], 1<<64-2) }),
	}
}

func TestImages(t *testing.T) {
	for _, group := range [][]hostile{qcowCases(), vmdkCases(), vhdCases()} {
		for _, h := range group {
			t.Run(h.name, h.survive)
		}
	}
}

// naming returns images that name another file, by what it is to them.
func naming(name string) map[string][]byte {
	data := newQcow()
	data.incompat, data.autoclear = 4, 0
	data.extend(0x44415441, []byte(name))
	vmdkParent := bytes.Replace(descriptor(`RW 2048 ZERO`), []byte("parentCID=ffffffff"), []byte("parentCID=12345678\nparentFileNameHint=\""+name+"\""), 1)
	return map[string][]byte{
		"qcow2 backing":   newQcow().backing(name).bytes(),
		"qcow2 data file": data.bytes(),
		"vmdk extent":     descriptor(`RW 2048 FLAT "` + name + `" 0`),
		"vmdk parent":     vmdkParent,
		"vhd parent":      vhdParent(name),
		"vhdx parent":     newVHDX().parent(name).bytes(),
	}
}

// Cases 1 to 4 and 22: what an image names is not opened under --untrusted, an
// extent file outside the image's directory never. They, and the names of our own,
// are drawn from CVE-2015-5163 (backing file), CVE-2024-32498 (data file),
// CVE-2022-47951 (extent of a VMDK) and CVE-2024-4467 (a name that begins json:).
func TestReferences(t *testing.T) {
	outside := t.TempDir()
	secret := write(t, outside, "secret", bytes.Repeat([]byte("secret  "), 1<<17))
	for label, name := range map[string]string{
		"absolute": secret, "up": "../" + filepath.Base(outside) + "/secret", "link": "link", "directory link": "dir/secret",
		"json": `json:{"driver":"file","filename":"` + secret + `"}`, "file": "file:" + secret, "nbd": "nbd://127.0.0.1:9/x", "http": "http://127.0.0.1:9/x",
		"data": "fd:0", "proc": "/proc/self/fd/0", "newline": "x\ninstar: faked\x1b[2J",
	} {
		for kind, image := range naming(name) {
			if strings.HasPrefix(kind, "vmdk") && strings.ContainsAny(name, "\"\n") {
				continue // the descriptor cannot say it
			}
			t.Run(label+"/"+kind, func(t *testing.T) {
				t.Parallel()
				dir := filepath.Join(filepath.Dir(outside), strings.ReplaceAll(label+kind, " ", "-"))
				if err := os.Mkdir(dir, 0o755); err != nil {
					t.Fatal(err)
				}
				runtime := runtimeDir(t)
				write(t, dir, "image", image)
				if err := os.Symlink(secret, filepath.Join(dir, "link")); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(outside, filepath.Join(dir, "dir")); err != nil {
					t.Fatal(err)
				}
				for _, untrusted := range []bool{true, false} {
					for _, verb := range append(verbs, "info @", "convert -O raw @ out") {
						words := strings.Fields(strings.ReplaceAll(verb, "@", "image"))
						if untrusted {
							words = append(words, "--untrusted")
						} else if kind != "vmdk extent" && (label == "absolute" || label == "up" || label == "link" || label == "directory link") {
							continue // followed, as qemu-img does
						}
						r := command{Argv: words, Dir: dir, Env: []string{"XDG_RUNTIME_DIR=" + runtime}}.run(t)
						if strings.Contains(r.Stdout+r.Stderr, "secret  secret") {
							t.Errorf("%s: it leaked", words)
						}
						b, err := os.ReadFile(filepath.Join(dir, "out"))
						if err == nil && bytes.Contains(b, []byte("secret")) {
							t.Errorf("%s: it leaked into the output", words)
						}
						if words[0] == "convert" || words[0] == "inspect" {
							if r.Code != 1 {
								t.Errorf("%s: exit code %d\n%s%s", words, r.Code, clip(r.Stdout), clip(r.Stderr))
							}
							if words[0] == "convert" {
								r.oneLine(t)
							}
							if err == nil {
								t.Errorf("%s failed and left its output", words)
							}
						}
						os.Remove(filepath.Join(dir, "out"))
					}
				}
				noSocketDirs(t, runtime)
			})
		}
	}
}

// The file that was named was not even opened.
func TestReferencesAreNotOpened(t *testing.T) {
	dir := t.TempDir()
	secret := write(t, dir, "secret", bytes.Repeat([]byte("secret  "), 1<<17))
	for kind, image := range naming("secret") {
		write(t, dir, "image", image)
		opened := watch(t, secret)
		for _, verb := range verbs {
			words := append(strings.Fields(strings.ReplaceAll(verb, "@", "image")), "--untrusted")
			command{Argv: words, Dir: dir}.run(t)
			if opened() {
				t.Errorf("%s: %s opened the file it names", kind, words)
			}
			os.Remove(filepath.Join(dir, "out"))
		}
		// That the watch sees what there is to see.
		command{Argv: []string{"convert", "-O", "raw", "image", "out"}, Dir: dir}.run(t)
		os.Remove(filepath.Join(dir, "out"))
		if kind != "vmdk parent" && !opened() {
			t.Errorf("%s: the watch is blind", kind)
		}
	}
}

// Cases 5 and 6: chains without end.
func TestChains(t *testing.T) {
	dir := t.TempDir()
	overlay := func(name, backing string) {
		q := newQcow()
		q.extend(0xe2792aca, []byte("qcow2"))
		q.backingOffset, q.backingSize = 1024, uint64(len(backing))
		q.put(1024, []byte(backing))
		q.put64(4*cluster, 0)
		write(t, dir, name, q.bytes())
	}
	overlay("self", "self")
	overlay("a", "b")
	overlay("b", "./a")
	for i := range 1000 {
		overlay(fmt.Sprint("c", i), fmt.Sprint("c", i+1))
	}
	overlay("c1000", "")
	if err := os.Symlink("self2", filepath.Join(dir, "loop")); err != nil {
		t.Fatal(err)
	}
	overlay("self2", "loop")
	for name, want := range map[string][]string{"self": {"cycle", "self"}, "a": {"cycle", "a", "b"}, "self2": {"cycle"}, "c0": {"200"}} {
		for _, verb := range []string{"info --backing-chain @", "map @", "convert -O raw @ out", "compare @ @", "dd if=@ of=out", "measure -O raw @"} {
			words := strings.Fields(strings.ReplaceAll(verb, "@", name))
			r := command{Argv: words, Dir: dir}.run(t)
			line := r.oneLine(t)
			for _, w := range want {
				if !strings.Contains(line, w) {
					t.Errorf("%s: %s, want %q in it", words, line, w)
				}
			}
		}
	}
}

// Case 7: what is no plain file is not opened.
func TestSpecialFiles(t *testing.T) {
	dir := t.TempDir()
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(socket)
	if err := unix.Bind(socket, &unix.SockaddrUnix{Name: filepath.Join(dir, "socket")}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"fifo", "socket", "/dev/zero", "/dev/tty", "/", "/dev/stdin"} {
		write(t, dir, "image", newQcow().backing(name).bytes())
		command{Argv: []string{"convert", "-O", "raw", "image", "out"}, Dir: dir}.run(t).oneLine(t)
		write(t, dir, "image", descriptor(`RW 2048 FLAT "`+name+`" 0`))
		command{Argv: []string{"convert", "-O", "raw", "image", "out"}, Dir: dir}.run(t).oneLine(t)
		command{Argv: []string{"info", name}, Dir: dir}.run(t).oneLine(t)
		command{Argv: []string{"inspect", name}, Dir: dir}.run(t).oneLine(t)
	}
}

// Cases 8 and 9: what an image is taken for. That what was raw yesterday is a
// qcow2 image today is CVE-2024-40767 and CVE-2026-24708.
func TestTakenFor(t *testing.T) {
	dir := t.TempDir()
	q := newQcow().backing("/etc/passwd").bytes()
	write(t, dir, "nested", q)
	r := command{Argv: []string{"convert", "-f", "raw", "-O", "raw", "nested", "out"}, Dir: dir}.run(t)
	if got, err := os.ReadFile(filepath.Join(dir, "out")); r.Code != 0 || err != nil || !bytes.Equal(got, q) {
		t.Errorf("raw did not stay raw: %s %v", r.Stderr, err)
	}
	tail := vhd(func(_, _ []byte) {})
	for name, head := range map[string][]byte{
		"qcow2 and vpc": newQcow().bytes(), "vmdk and vpc": vmdkHeader(2048, 128, 1, 20, 512, 21, 26, 128), "vhdx and vpc": append([]byte("vhdxfile"), make([]byte, 1<<20)...),
	} {
		write(t, dir, "both", append(append([]byte(nil), head...), tail[len(tail)-512:]...))
		for _, verb := range []string{"info @", "map @", "convert -O raw @ out2", "check @", "measure -O raw @", "dd if=@ of=out2"} {
			words := strings.Fields(strings.ReplaceAll(verb, "@", "both"))
			line := command{Argv: append(words, "--untrusted"), Dir: dir}.run(t).oneLine(t)
			if !strings.Contains(line, "vpc") {
				t.Errorf("%s: %s: %s", name, words, line)
			}
		}
		if r := (command{Argv: []string{"info", "both"}, Dir: dir}).run(t); !strings.Contains(r.Stderr, "warning") {
			t.Errorf("%s: no warning: %s", name, r.Stderr)
		}
		if r := (command{Argv: []string{"inspect", "both"}, Dir: dir}).run(t); r.Code != 1 || !strings.Contains(r.Stdout, "ambiguous") {
			t.Errorf("%s: inspect said %s", name, r.Stdout)
		}
	}
}

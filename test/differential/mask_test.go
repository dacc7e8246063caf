//go:build linux

package differential

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"

	"golang.org/x/sys/unix"
)

// span is a range of host bytes that differs from run to run: random ids,
// timestamps, and checksums over them.
type span struct{ offset, length int64 }

// randomSpans returns the ranges of an image's main file that hold random or
// time-dependent values. The structures are read from the file itself; what is
// not where it should be is not masked, so that the comparison shows it.
func randomSpans(f *os.File, format string, size int64) []span {
	switch format {
	case "qcow2":
		return freeClusters(f, size)
	case "vpc":
		spans := vpcFooter(size - 512)
		head := make([]byte, 8)
		if _, err := f.ReadAt(head, 0); err == nil && string(head) == "conectix" {
			spans = append(spans, vpcFooter(0)...)
		}
		return spans
	case "vhdx":
		spans := []span{{8, 512}} // creator, names the program and its version
		for _, header := range []int64{64 << 10, 128 << 10} {
			spans = append(spans, span{header + 4, 60}) // checksum, sequence number, three GUIDs
		}
		if metadata, ok := vhdxMetadata(f); ok {
			spans = append(spans, span{metadata + 64<<10 + 16, 16}) // page 83 data
		}
		return spans
	}
	return nil
}

// freeClusters returns the clusters of a qcow2 file that its refcounts call
// free: qemu-img leaves refcount tables behind there, where it made larger ones
// (docs/divergences.md).
func freeClusters(f *os.File, size int64) []span {
	head := make([]byte, 112)
	if _, err := f.ReadAt(head, 0); err != nil || string(head[:4]) != "QFI\xfb" {
		return nil
	}
	bits := min(21, uint(binary.BigEndian.Uint32(head[20:]))) // at most 2 MiB
	cluster := int64(1) << bits
	order := uint(4) // 16 bits
	if binary.BigEndian.Uint32(head[4:]) >= 3 {
		order = min(6, uint(binary.BigEndian.Uint32(head[96:])))
	}
	tableAt := int64(binary.BigEndian.Uint64(head[48:]))
	table := make([]byte, int64(min(binary.BigEndian.Uint32(head[56:]), 64))*cluster)
	if _, err := f.ReadAt(table, tableAt); err != nil && !errors.Is(err, io.EOF) {
		return nil
	}
	var free []span
	perBlock := cluster * 8 >> order
	block := make([]byte, cluster)
	for i := int64(0); i*cluster < size; i++ {
		if i%perBlock == 0 {
			at := int64(0)
			if entry := i / perBlock * 8; entry < int64(len(table)) {
				at = int64(binary.BigEndian.Uint64(table[entry:]))
			}
			clear(block)
			if at != 0 {
				if _, err := f.ReadAt(block, at); err != nil && !errors.Is(err, io.EOF) {
					return nil
				}
			}
		}
		first, width := (i%perBlock)<<order, int64(1)<<order // in bits
		count := false
		if width < 8 {
			count = block[first/8]>>(first%8)&(1<<width-1) != 0
		} else {
			for _, b := range block[first/8 : (first+width)/8] {
				count = count || b != 0
			}
		}
		if n := len(free); count {
			continue
		} else if n > 0 && free[n-1].offset+free[n-1].length == i*cluster {
			free[n-1].length += cluster
		} else {
			free = append(free, span{i * cluster, cluster})
		}
	}
	return free
}

func vpcFooter(at int64) []span {
	return []span{{at + 24, 4}, {at + 64, 4 + 16}} // timestamp; checksum and unique id
}

// vhdxMetadata returns the host offset of the metadata region (VHDX 1.0, 2.2.3).
func vhdxMetadata(f *os.File) (int64, bool) {
	id, _ := hex.DecodeString("06a27c8b90479a4bb8fe575f050f886e")
	table := make([]byte, 1024)
	if _, err := f.ReadAt(table, 192<<10); err != nil {
		return 0, false
	}
	at := bytes.Index(table, id)
	if at < 0 || at+24 > len(table) {
		return 0, false
	}
	return int64(binary.LittleEndian.Uint64(table[at+16:])), true
}

// contentID matches the line of a VMDK descriptor that holds a random number,
// of one to eight digits, and what pads the descriptor: zeros or spaces.
var contentID = regexp.MustCompile(`(?m)^CID=[0-9a-f]{1,8}$`)

const descriptorMark = "# Disk DescriptorFile"

// vmdkDescriptor returns the descriptor with its random line masked, and where
// in the file it stands.
func vmdkDescriptor(f *os.File, size int64) (string, span, error) {
	head := make([]byte, min(size, 64<<10))
	if _, err := f.ReadAt(head, 0); err != nil && !errors.Is(err, io.EOF) {
		return "", span{}, err
	}
	at := int64(0)
	length := size
	if bytes.HasPrefix(head, []byte("KDMV")) && len(head) >= 512 {
		at = int64(binary.LittleEndian.Uint64(head[28:])) * 512
		length = int64(binary.LittleEndian.Uint64(head[36:])) * 512
	}
	if length == 0 { // an extent of a split image has none
		return "", span{}, nil
	}
	if at < 0 || length < 0 || at+length > int64(len(head)) || !bytes.HasPrefix(head[at:], []byte(descriptorMark)) {
		return "", span{}, nil
	}
	text := bytes.TrimRight(head[at:at+length], "\x00")
	return contentID.ReplaceAllString(string(text), "CID=masked"), span{at, length}, nil
}

// wholeBlocks reports whether instar makes the file longer than qemu-img does:
// a VHDX whose blocks are all fully present holds all of the last one
// (docs/divergences.md).
func (c triple) wholeBlocks() bool {
	return c.format == "vhdx" && c.option("subformat") == "fixed" && c.option("block_state_zero") == "off"
}

// differ returns where two files of an image differ outside what is random, as
// text, or "".
func differ(c triple, a, b string) (string, error) {
	fa, err := os.Open(a)
	if err != nil {
		return "", err
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		return "", err
	}
	defer fb.Close()
	sa, err := fa.Stat()
	if err != nil {
		return "", err
	}
	sb, err := fb.Stat()
	if err != nil {
		return "", err
	}

	masked := randomSpans(fa, c.format, sa.Size())
	if c.format == "vmdk" {
		da, at, err := vmdkDescriptor(fa, sa.Size())
		if err != nil {
			return "", err
		}
		db, _, err := vmdkDescriptor(fb, sb.Size())
		if err != nil {
			return "", err
		}
		if da != db {
			return fmt.Sprintf("descriptors differ:\n%s\n--- and\n%s", da, db), nil
		}
		masked = append(masked, at)
		if at.offset == 0 && at.length > 0 { // a descriptor file holds nothing else
			return "", nil
		}
	}
	if sa.Size() != sb.Size() && !(c.wholeBlocks() && sb.Size() > sa.Size() && sb.Size()%mib == 0) {
		return fmt.Sprintf("lengths differ: %d and %d", sa.Size(), sb.Size()), nil
	}

	const block = 64 << 10
	pa, pb := make([]byte, block), make([]byte, block)
	for off := int64(0); ; off += block {
		off, err = nextData(fa, fb, off)
		if errors.Is(err, io.EOF) {
			return "", nil
		} else if err != nil {
			return "", err
		}
		off -= off % block
		na, err := fa.ReadAt(pa, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		nb, err := fb.ReadAt(pb, off)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		for _, m := range masked {
			for i := max(m.offset, off); i < min(m.offset+m.length, off+block); i++ {
				pa[i-off], pb[i-off] = 0, 0
			}
		}
		for i := range min(na, nb) {
			if pa[i] != pb[i] {
				end := min(i+32, na)
				return fmt.Sprintf("at host offset %#x: %x and %x", off+int64(i), pa[i:end], pb[i:end]), nil
			}
		}
	}
}

// nextData returns the first offset from off at which either file has data.
func nextData(a, b *os.File, off int64) (int64, error) {
	next := int64(-1)
	for _, f := range []*os.File{a, b} {
		at, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			continue
		} else if err != nil {
			return 0, fmt.Errorf("looking for data in %s: %w", f.Name(), err)
		}
		if next < 0 || at < next {
			next = at
		}
	}
	if next < 0 {
		return 0, io.EOF
	}
	return next, nil
}

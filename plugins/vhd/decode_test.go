package vhd

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"

	"github.com/google/uuid"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

func sampleFooter() footer {
	f := footer{
		features: 2, version: 0x10000, dataOffset: 512, timestamp: 3, creator: creatorQEM2,
		creatorVersion: 0x50003, creatorOS: [4]byte{'W', 'i', '2', 'k'}, originalSize: 1 << 20,
		currentSize: 1 << 20, geometry: largestGeometry, diskType: typeDifferencing,
		uniqueID: uuid.NameSpaceOID, savedState: 1,
	}
	f.reserved[426] = 7
	f.checksum = f.sum()
	return f
}

func sampleHeader() header {
	h := header{
		dataOffset: noOffset, tableOffset: 1536, version: 0x10000, entries: 4, blockSize: 1 << 20,
		parentID: uuid.NameSpaceURL, parentTimestamp: 9, reserved1: 1,
	}
	h.locators[7] = locator{platform: platformMac, dataSpace: 1, dataLength: 2, reserved: 3, dataOffset: 4}
	h.parentName[511], h.reserved2[255] = 1, 2
	h.checksum = h.sum()
	return h
}

func TestRoundTrip(t *testing.T) {
	f := sampleFooter()
	b := f.append(nil)
	var g footer
	if err := g.decode(b); err != nil || g != f || len(b) != footerSize {
		t.Errorf("footer: %d bytes, %+v, %v, want %+v", len(b), g, err, f)
	}
	h := sampleHeader()
	b = h.append(nil)
	var i header
	if err := i.decode(b); err != nil || i != h || len(b) != headerSize {
		t.Errorf("header: %d bytes, %+v, %v, want %+v", len(b), i, err, h)
	}
}

func FuzzDecodeFooter(f *testing.F) {
	sample := sampleFooter()
	f.Add(sample.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var x footer
		if err := x.decode(b); err != nil {
			return
		}
		if got := x.append(nil); !bytes.Equal(got[:shortFooterSize], b[:shortFooterSize]) {
			t.Errorf("% x became % x", b, got)
		}
		if x.validate() == nil && x.virtualSectors() > maxSectors {
			t.Errorf("valid with %d sectors", x.virtualSectors())
		}
	})
}

func FuzzDecodeHeader(f *testing.F) {
	sample := sampleHeader()
	f.Add(sample.append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		var x header
		if err := x.decode(b); err != nil {
			return
		}
		if got := x.append(nil); !bytes.Equal(got, b[:headerSize]) {
			t.Errorf("% x became % x", b, got)
		}
		if x.validate(1<<20, 1<<30) == nil && (4*int64(x.entries) > 1<<20 || int64(x.entries)*int64(x.blockSize) < 1<<30) {
			t.Errorf("valid: %+v", x)
		}
	})
}

// FuzzOpen takes the parts of an image, seals them with right checksums and
// does everything that can be done with the result.
func FuzzOpen(f *testing.F) {
	foot, head := sampleFooter(), sampleHeader()
	f.Add(foot.append(nil), head.append(nil), []byte{0, 0, 0, 4, 255, 255, 255, 255})
	foot.diskType = typeDynamic
	f.Add(foot.append(nil), head.append(nil), bytes.Repeat([]byte{0, 0, 0, 9}, 3))
	foot.diskType = typeFixed
	f.Add(foot.append(nil), []byte{}, []byte{})
	f.Fuzz(func(t *testing.T, foot, head, rest []byte) {
		var x footer
		if x.decode(append(foot, make([]byte, max(0, footerSize-len(foot)))...)[:footerSize]) != nil {
			return
		}
		x.checksum = x.sum()
		b := x.append(nil)
		b = append(b, head...)
		b = append(b, rest...)
		b = append(b, make([]byte, 4096)...)
		if len(b) > 1<<16 {
			return
		}
		if len(head) >= headerSize && string(head[:len(headerCookie)]) == headerCookie {
			sealedHeader(b, footerSize)
		}
		b = x.append(b)
		file := formattest.ReadOnly(formattest.MemFile(b))
		for _, check := range []bool{false, true} {
			img, err := New().Open(context.Background(), sdk.OpenRequest{Check: check, Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: file}}})
			if err != nil {
				continue
			}
			info, err := img.Info(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			extents, mapErr := formattest.MapRange(context.Background(), img, 0, min(info.VirtualSize, 64<<20))
			if mapErr == nil && !check {
				for _, e := range extents {
					if e.Kind == sdk.Data && e.HostOffset+e.Length > int64(len(b)) && info.AllocationUnit != 0 && e.HostOffset >= int64(len(b)) {
						t.Errorf("extent %+v in a file of %d bytes", e, len(b))
					}
				}
			}
			if check {
				if _, err := img.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Message: func(string) {}}); err != nil {
					t.Error(err)
				}
			}
		}
	})
}

func FuzzParentName(f *testing.F) {
	f.Add([]byte("a\x00b\x00"), uint32(platformRelative))
	f.Add([]byte("file://localhost/x"), uint32(platformMac))
	f.Fuzz(func(t *testing.T, b []byte, p uint32) {
		var h header
		h.locators[0] = locator{platform: platform(p), dataLength: uint32(len(b))}
		img := &image{header: h, file: formattest.MemFile(b)}
		ref, err := img.parent()
		if (err == nil) != (ref.Name != "") {
			t.Errorf("name %q, %v", ref.Name, err)
		}
	})
}

// The table's entries beyond the disk's end are allowed, and none of them is
// read for a map.
func TestTableLongerThanDisk(t *testing.T) {
	path := formattest.Create(t, New(), t.TempDir(), "x", 3<<20, "force_size=on")
	b := read(t, path)
	binary.BigEndian.PutUint32(b[footerSize+28:], 100)
	sealedHeader(b, footerSize)
	o := formattest.Open(t, New(), write(t, b), false)
	if got := o.Map(); len(got) != 1 || got[0].Kind != sdk.Zero {
		t.Errorf("map %+v", got)
	}
}

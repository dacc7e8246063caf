package vhdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
	"github.com/instar-img/instar/sdk/ondisk"
)

// update is one change that a log makes: a sector, or zeros where data is nil.
type update struct {
	offset uint64
	data   []byte
	zeros  uint64
}

// logOf appends an entry for updates.
func logOf(b []byte, h logHeader, updates ...update) []byte {
	at := len(b)
	h.descriptors = uint32(len(updates))
	data := 0
	for _, u := range updates {
		if u.data != nil {
			data++
		}
	}
	h.length = uint32((h.descriptorSectors() + int64(data)) * sectorSize)
	b = h.append(b)
	var sectors []byte
	for _, u := range updates {
		d := logDescriptor{zero: u.data == nil, offset: u.offset, length: u.zeros, sequence: h.sequence}
		if u.data != nil {
			copy(d.leading[:], u.data)
			copy(d.trailing[:], u.data[sectorSize-4:])
			sectors = appendDataSector(sectors, u.data, h.sequence)
		}
		b = d.append(b)
	}
	b = append(b, make([]byte, at+int(h.descriptorSectors())*sectorSize-len(b))...)
	b = append(b, sectors...)
	seal(b[at:])
	return b
}

// small returns the bytes of an image of 4 MiB with blocks of 1 MiB, of which
// block 1 is present and full of 0x11.
func small(t testing.TB, opts string) []byte {
	t.Helper()
	if opts != "" {
		opts = "," + opts
	}
	path := formattest.Create(t, New(), t.TempDir(), "a", 4*mib, "block_size=1M"+opts)
	formattest.Write(t, New(), path, map[int64][]byte{mib: bytes.Repeat([]byte{0x11}, mib)}, false)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// setLog gives both headers a log id and puts log where the log lies.
func setLog(b []byte, id ondisk.GUID, log []byte) []byte {
	b = setHeaders(b, func(h *header) { h.log = id })
	copy(b[mib:2*mib], log)
	return b
}

func setHeaders(b []byte, edit func(*header)) []byte {
	b = bytes.Clone(b)
	for _, off := range []int{header1Offset, header2Offset} {
		var h header
		if err := h.decode(b[off:]); err != nil {
			panic(err)
		}
		edit(&h)
		copy(b[off:], h.append(nil))
	}
	return b
}

func open(b []byte, check bool) (sdk.Image, error) {
	f := formattest.ReadOnly(formattest.MemFile(b))
	return New().Open(context.Background(), sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: f}}, Check: check})
}

func save(t testing.TB, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.vhdx")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// batSector returns the first sector of the table with one entry changed.
func batSector(b []byte, i int, e batEntry) []byte {
	s := bytes.Clone(b[2*mib:][:sectorSize])
	binary.LittleEndian.PutUint64(s[8*i:], uint64(e))
	return s
}

var testLog = testGUID(0x40)

func entryAt(sequence uint64, tail uint32, size int) logHeader {
	return logHeader{tail: tail, sequence: sequence, log: testLog, flushed: uint64(size), last: uint64(size)}
}

func full(b byte) []byte { return bytes.Repeat([]byte{b}, sectorSize) }

// dirtyImage has a log that makes block 2 present, behind the end of the file
// where it grows, fills a sector of block 1 with 0x77 and another one with zeros, and does some
// of it twice.
func dirtyImage(t testing.TB, grows bool) []byte {
	t.Helper()
	b := small(t, "")
	end := len(b)
	if !grows {
		b = append(b, make([]byte, mib)...)
	}
	block1 := binary.LittleEndian.Uint64(b[2*mib+8:]) & offsetMask
	grown := entryAt(6, 0, end)
	grown.last = uint64(end + mib)
	log := logOf(nil, entryAt(5, 0, end), update{offset: block1 + 8192, data: full(0x66)}, update{offset: 2 * mib, data: batSector(b, 2, 0)})
	log = logOf(log, grown,
		update{offset: 2 * mib, data: batSector(b, 2, makeEntry(blockFullyPresent, int64(end)))},
		update{offset: block1 + 8192, data: full(0x77)},
		update{offset: block1 + 16384, zeros: 8192})
	return setLog(b, testLog, log)
}

func dirtyContent() []byte {
	want := make([]byte, 4*mib)
	copy(want[mib:], bytes.Repeat([]byte{0x11}, mib))
	copy(want[mib+8192:], full(0x77))
	clear(want[mib+16384:][:8192])
	return want
}

func TestReadDirtyLog(t *testing.T) {
	path := save(t, dirtyImage(t, true))
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	o := formattest.Open(t, New(), path, false)
	if !o.Info.Dirty {
		t.Error("not dirty")
	}
	if !bytes.Equal(o.Read(0, 4*mib), dirtyContent()) {
		t.Error("the log is not replayed in memory")
	}
	// Ranges that cut the changed sectors.
	for _, off := range []int64{mib + 8191, mib + 8193, mib + 12287, mib + 16385} {
		if got := o.Read(off, 5000); !bytes.Equal(got, dirtyContent()[off:][:5000]) {
			t.Errorf("read at %#x", off)
		}
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
		t.Errorf("reading wrote: %v", err)
	}
}

func check(t testing.TB, path string, fix sdk.Fix) (*sdk.CheckResult, []string) {
	t.Helper()
	o, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{Check: true, ReadWrite: fix != sdk.FixNone})
	if err != nil {
		t.Fatal(err)
	}
	var messages []string
	res, err := o.Image.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Fix: fix, Message: func(m string) { messages = append(messages, m) }})
	if err != nil {
		t.Fatal(err)
	}
	return res, messages
}

func TestReplay(t *testing.T) {
	b := dirtyImage(t, true)
	path := save(t, b)
	if res, messages := check(t, path, sdk.FixNone); res.Corruptions != 1 || len(messages) != 1 {
		t.Errorf("check: %+v %q", res, messages)
	}
	if after, err := os.ReadFile(path); err != nil || !bytes.Equal(b, after) {
		t.Fatal("a check wrote")
	}
	if res, messages := check(t, path, sdk.FixAll); res.Corruptions != 0 || res.CorruptionsFixed != 1 || len(messages) != 0 {
		t.Errorf("repair: %+v %q", res, messages)
	}
	if res, _ := check(t, path, sdk.FixAll); *res != (sdk.CheckResult{}) {
		t.Errorf("second repair: %+v", res)
	}
	o := formattest.Open(t, New(), path, false)
	if o.Info.Dirty || !bytes.Equal(o.Read(0, 4*mib), dirtyContent()) {
		t.Errorf("dirty %v, or content wrong", o.Info.Dirty)
	}

	// qemu-img replays to the same content, and finds ours clean. (It does not
	// make the file grow by whole MiB.)
	theirs := save(t, dirtyImage(t, false))
	if out := formattest.Oracle(t, "qemu-img", "check", "-r", "all", theirs); !strings.Contains(out, "1 corruptions") {
		t.Errorf("qemu-img check -r all: %s", out)
	}
	formattest.Oracle(t, "qemu-img", "compare", "-f", "vhdx", "-F", "vhdx", path, theirs)
	formattest.Oracle(t, "qemu-img", "check", path)
}

// TestWriteReplays opens a dirty image for writing.
func TestWriteReplays(t *testing.T) {
	path := save(t, dirtyImage(t, true))
	formattest.Write(t, New(), path, map[int64][]byte{3 * mib: bytes.Repeat([]byte{0x33}, mib)}, false)
	want := dirtyContent()
	copy(want[3*mib:], bytes.Repeat([]byte{0x33}, mib))
	if o := formattest.Open(t, New(), path, false); !bytes.Equal(o.Read(0, 4*mib), want) || o.Info.Dirty {
		t.Error("content")
	}
	formattest.Oracle(t, "qemu-img", "check", path)
}

// TestReplayCrash stops a replay after every write.
func TestReplayCrash(t *testing.T) {
	b := dirtyImage(t, true)
	var log formattest.Recorder
	img, err := New().Open(context.Background(), sdk.OpenRequest{Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: log.File(formattest.MemFile(bytes.Clone(b)))}}, Check: true, ReadWrite: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.(sdk.Checker).Check(context.Background(), sdk.CheckRequest{Fix: sdk.FixAll}); err != nil {
		t.Fatal(err)
	}
	states, dirty := 0, 0
	log.Crashes(func(c formattest.Crash) {
		states++
		got, err := formattest.ReadState(New(), nil, c.State)
		if err != nil || !bytes.Equal(got, dirtyContent()) {
			t.Fatalf("%s: content differs (%v)", c.What, err)
		}
		if checkState(t, c) {
			dirty++
		}
	})
	if states < 10 || dirty == 0 || dirty == states {
		t.Errorf("%d states, %d of them with a log", states, dirty)
	}
}

// logged builds an image around a log.
func logged(t testing.TB, log func(b []byte) []byte) []byte {
	b := small(t, "")
	return setLog(b, testLog, log(b))
}

func TestLogSequences(t *testing.T) {
	block1 := uint64(8 * mib)
	mark := func(v byte) update { return update{offset: block1, data: full(v)} }
	other := testGUID(0x77)
	for _, c := range []struct {
		name string
		log  func(b []byte) []byte
		want byte  // first byte of block 1
		err  error // of opening
	}{
		{"nothing was logged", func([]byte) []byte { return nil }, 0x11, nil},
		{"other id", func(b []byte) []byte {
			h := entryAt(1, 0, len(b))
			h.log = other
			return logOf(nil, h, mark(1))
		}, 0x11, nil},
		{"one entry", func(b []byte) []byte { return logOf(nil, entryAt(1, 0, len(b)), mark(1)) }, 1, nil},
		{"entry without descriptors", func(b []byte) []byte { return logOf(nil, entryAt(1, 0, len(b))) }, 0x11, nil},
		{"two entries", func(b []byte) []byte {
			return logOf(logOf(nil, entryAt(1, 0, len(b)), mark(1)), entryAt(2, 0, len(b)), mark(2))
		}, 2, nil},
		{"second entry does not follow", func(b []byte) []byte {
			return logOf(logOf(nil, entryAt(7, 0, len(b)), mark(1)), entryAt(3, 8192, len(b)), mark(2))
		}, 1, nil},
		{"newest sequence wins", func(b []byte) []byte {
			return logOf(logOf(nil, entryAt(3, 0, len(b)), mark(1)), entryAt(7, 8192, len(b)), mark(2))
		}, 2, nil},
		{"tail skips the first entry", func(b []byte) []byte {
			return logOf(logOf(nil, entryAt(1, 0, len(b)), update{offset: block1 + 4096, data: full(9)}), entryAt(2, 8192, len(b)), mark(2))
		}, 2, nil},
		{"torn second entry", func(b []byte) []byte {
			log := logOf(logOf(nil, entryAt(1, 0, len(b)), mark(1)), entryAt(2, 0, len(b)), mark(2))
			log[3*sectorSize+50]++
			return log
		}, 1, nil},
		{"wrapped entry", func(b []byte) []byte {
			e := logOf(nil, entryAt(1, mib-4096, len(b)), mark(5))
			log := make([]byte, mib)
			copy(log[mib-4096:], e[:4096])
			copy(log, e[4096:])
			return log
		}, 5, nil},
		{"sequence over the end", func(b []byte) []byte {
			log := make([]byte, mib)
			copy(log[mib-8192:], logOf(nil, entryAt(1, mib-8192, len(b)), mark(5)))
			copy(log, logOf(nil, entryAt(2, mib-8192, len(b)), mark(6)))
			return log
		}, 6, nil},

		{"bad checksum", func(b []byte) []byte {
			log := logOf(nil, entryAt(1, 0, len(b)), mark(1))
			log[5000]++
			return log
		}, 0, sdk.ErrCorrupt},
		{"sequence number 0", func(b []byte) []byte { return logOf(nil, entryAt(0, 0, len(b)), mark(1)) }, 0, sdk.ErrCorrupt},
		{"tail outside the sequence", func(b []byte) []byte { return logOf(nil, entryAt(1, 8192, len(b)), mark(1)) }, 0, sdk.ErrCorrupt},
		{"tail outside the log", func(b []byte) []byte { return logOf(nil, entryAt(1, 1<<30, len(b)), mark(1)) }, 0, sdk.ErrCorrupt},
		{"descriptor of another sequence", func(b []byte) []byte {
			log := logOf(nil, entryAt(1, 0, len(b)), mark(1))
			log[logHeaderSize+24] = 9
			seal(log)
			return log
		}, 0, sdk.ErrCorrupt},
		{"data sector of another sequence", func(b []byte) []byte {
			log := logOf(nil, entryAt(1, 0, len(b)), mark(1))
			log[2*sectorSize-1] = 9
			seal(log)
			return log
		}, 0, sdk.ErrCorrupt},
		{"more descriptors than fit", func(b []byte) []byte {
			log := logOf(nil, entryAt(1, 0, len(b)), mark(1))
			binary.LittleEndian.PutUint32(log[24:], 1<<32-1)
			seal(log)
			return log
		}, 0, sdk.ErrCorrupt},
		{"entry longer than the log", func(b []byte) []byte {
			log := logOf(nil, entryAt(1, 0, len(b)), mark(1))
			binary.LittleEndian.PutUint32(log[8:], 1<<31)
			seal(log)
			return log
		}, 0, sdk.ErrCorrupt},
		{"file is truncated", func(b []byte) []byte { return logOf(nil, entryAt(1, 0, len(b)+mib), mark(1)) }, 0, sdk.ErrCorrupt},
		{"file becomes endless", func(b []byte) []byte {
			h := entryAt(1, 0, len(b))
			h.last = 1 << 62
			return logOf(nil, h, mark(1))
		}, 0, sdk.ErrCorrupt},
		{"changes the header", func(b []byte) []byte {
			return logOf(nil, entryAt(1, 0, len(b)), update{offset: header1Offset, data: full(1)})
		}, 0, sdk.ErrCorrupt},
		{"changes the log", func(b []byte) []byte {
			return logOf(nil, entryAt(1, 0, len(b)), update{offset: mib + 4096, data: full(1)})
		}, 0, sdk.ErrCorrupt},
		{"zeros over everything", func(b []byte) []byte {
			return logOf(nil, entryAt(1, 0, len(b)), update{offset: 2 * mib, zeros: 1 << 46})
		}, 0, sdk.ErrUnsupported},
		{"zeros that overflow", func(b []byte) []byte {
			return logOf(nil, entryAt(1, 0, len(b)), update{offset: 1<<63 - 4096, zeros: 1<<63 - 4096})
		}, 0, sdk.ErrCorrupt},
		{"damages the region table", func(b []byte) []byte {
			return logOf(nil, entryAt(1, 0, len(b)), update{offset: regionTable1Offset, data: full(1)}, update{offset: regionTable2Offset, data: full(1)})
		}, 0, sdk.ErrCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := save(t, logged(t, c.log))
			o, err := formattest.TryOpen(t, New(), path, sdk.OpenRequest{})
			if !errors.Is(err, c.err) || (err != nil) != (c.err != nil) {
				t.Fatalf("%v, want %v", err, c.err)
			}
			if err == nil && o.Read(mib, 1)[0] != c.want {
				t.Errorf("block 1 begins with %#x, want %#x", o.Read(mib, 1)[0], c.want)
			}
		})
	}
}

// counter counts the bytes read.
type counter struct {
	sdk.File
	n int64
}

func (c *counter) ReadAt(p []byte, off int64) (int, error) {
	c.n += int64(len(p))
	return c.File.ReadAt(p, off)
}

// TestLogIsReadOnce: a log made to be read over and over is not.
func TestLogIsReadOnce(t *testing.T) {
	const length = 16 * mib
	fill := func(unit []byte) []byte {
		b := make([]byte, 0, length)
		for len(b)+len(unit) <= length {
			b = append(b, unit...)
		}
		return append(b, make([]byte, length-len(b))...)
	}
	// Each sector claims to begin an entry as long as the log.
	long := logOf(nil, logHeader{sequence: 1, log: testLog}, update{offset: 8 * mib, data: full(1)})[:sectorSize]
	binary.LittleEndian.PutUint32(long[8:], length)
	endless := logHeader{length: length, sequence: 1, descriptors: 1, log: testLog}
	first := logDescriptor{offset: 8 * mib, length: sectorSize, sequence: 1}
	one := append(first.append(endless.append(nil)), make([]byte, sectorSize-96)...)
	one = append(one, fill(appendDataSector(nil, full(1), 1))...)[:length]
	// A ring of entries that follow each other, of which none is the last.
	var chain []byte
	for i := uint64(1); len(chain) < length; i++ {
		chain = logOf(chain, logHeader{sequence: i, log: testLog, tail: 4096})
	}
	for name, log := range map[string][]byte{
		"sectors that claim the whole log": fill(long),
		"one entry that is the whole log":  one,
		"a ring of entries":                chain,
		"the same entry again and again":   fill(logOf(nil, logHeader{sequence: 1, log: testLog})),
		"nothing":                          make([]byte, length),
	} {
		f := &counter{File: formattest.MemFile(log)}
		r := &ring{file: f, length: length}
		entries, err := r.active(context.Background(), testLog)
		if f.n > 4*length {
			t.Errorf("%s: %d bytes of %d read", name, f.n, length)
		}
		if err != nil && !errors.Is(err, sdk.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		t.Logf("%s: %d bytes read, %d entries, %v", name, f.n, len(entries), err)
	}
}

func FuzzLog(f *testing.F) {
	f.Add(logOf(nil, entryAt(1, 0, 0), update{offset: 8 * mib, data: full(1)}))
	f.Add(logOf(logOf(nil, entryAt(1, 0, 0), update{offset: 2 * mib, data: full(1)}), entryAt(2, 0, 0), update{offset: 3 * mib, zeros: 8192}))
	f.Add(logOf(nil, entryAt(3, 0, 0), update{offset: 2 * mib, data: full(3)}, update{offset: 2 * mib, zeros: 4096}))
	base := small(f, "")
	f.Fuzz(func(t *testing.T, log []byte) {
		// Checksums would end every search for something interesting.
		for at := 0; at+logHeaderSize <= len(log); at += sectorSize {
			var h logHeader
			if h.decode(log[at:]) == nil && h.length >= sectorSize && int64(h.length) <= int64(len(log)-at) {
				seal(log[at:][:h.length])
			}
		}
		img, err := open(setLog(base, testLog, log), false)
		if err != nil {
			return
		}
		err = img.Map(context.Background(), 0, img.(*image).geo.virtualSize, func(x []sdk.Extent) bool {
			for _, e := range x {
				if e.Kind == sdk.Encoded {
					if err := img.(sdk.Decoder).Decode(context.Background(), e, make([]byte, e.Length)); err != nil {
						t.Fatal(err)
					}
				}
			}
			return true
		})
		if err != nil && !errors.Is(err, sdk.ErrCorrupt) {
			t.Fatal(err)
		}
	})
}

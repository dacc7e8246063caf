// Package sdk is what the author of a format plugin implements.
//
// A format is one value that implements Format and as many of the optional
// interfaces as it can; serve.Main turns it into a program that the instar core
// can start. The core never hands over a path: a plugin gets open files with
// roles, parses and emits metadata, and says where guest bytes lie. The core
// moves the bytes.
//
// Units: every size, length and offset is in bytes unless its name says
// otherwise. "Guest" offsets are positions in the virtual disk, "host" offsets
// are positions in a file.
package sdk

import (
	"context"
	"fmt"
	"hash/fnv"
	"io"
	"strconv"
	"strings"
	"unicode"

	"github.com/instar-img/instar/sdk/option"
)

// Protocol is the protocol major this SDK speaks.
const Protocol = 1

// Roles of the files that a plugin is given. Further files of a multi-file
// format have roles that the plugin chooses itself (in PlannedFile.Role or
// Reference.Role), such as "extent:1".
const (
	RoleMain = "main"      // the file the user named
	RoleData = "data-file" // an external data file
)

// File is an open descriptor that the core handed over. Reads beyond the end
// return io.EOF. Files opened for reading refuse writes.
type File interface {
	io.ReaderAt
	io.WriterAt
	// Size returns the current length: of a block device its capacity.
	Size() (int64, error)
	// Truncate sets the length of a regular file.
	Truncate(size int64) error
	// Sync returns when what was written is on stable storage.
	Sync() error
}

// NamedFile is a file with its role. The position of a NamedFile in the list
// of an image's files (those of OpenRequest.Files, then those attached, in
// order) is its index in Extent.File and Placement.File.
type NamedFile struct {
	Role string
	File File
}

// Capabilities that a manifest lists. The core offers a verb for a format only
// when the manifest lists what the verb needs.
const (
	CapOpen   = "open"   // Format.Open: info, map, compare, convert from
	CapCreate = "create" // Creator: create, convert to
	CapCheck  = "check"  // images implement Checker
	CapRepair = "repair" // Checker honours CheckRequest.Fix
	CapWrite  = "write"  // images implement Writer: convert to
	CapDecode = "decode" // images implement Decoder
)

// Probe is one test of a file's content for a format.
type Probe struct {
	// Offset of Bytes from the start of the file, or from its end when negative.
	Offset int64 `json:"offset"`
	// Bytes that must stand there, in hexadecimal. Empty matches any file:
	// such a probe marks the fallback format.
	Bytes string `json:"bytes"`
	// Score of a match: the highest wins. 100 is certain, 1 is the fallback's.
	Score int `json:"score"`
	// FoldCase compares ASCII letters in Bytes without regard to case.
	FoldCase bool `json:"fold-case,omitempty"`
	// AfterComments counts Offset from behind the comments that a text begins
	// with: lines whose first byte is '#', and lines of spaces alone. Bytes must
	// end within the first CommentReach bytes of the file.
	AfterComments bool `json:"after-comments,omitempty"`
}

// CommentReach is how far a Probe with AfterComments looks, in bytes.
const CommentReach = 512

// Rule is something that Inspect finds broken.
type Rule struct {
	Name    string `json:"name"`    // lower case with dashes, as in "unknown-features"
	Meaning string `json:"meaning"` // what breaks it, on one line
}

// Valid reports whether a rule can have this name and this meaning.
func (r Rule) Valid() bool {
	return r.Name != "" && len(r.Name) <= 64 && strings.Trim(r.Name, "abcdefghijklmnopqrstuvwxyz-") == "" &&
		r.Meaning != "" && len(r.Meaning) <= 256 && !strings.ContainsFunc(r.Meaning, unicode.IsControl)
}

// Manifest is what the core knows of a plugin without starting it.
type Manifest struct {
	Name         string   `json:"name"`               // canonical name: what info and fmt= print
	Aliases      []string `json:"aliases,omitempty"`  // other names -f takes
	Suffixes     []string `json:"suffixes,omitempty"` // usual file name suffixes, no dot
	Version      string   `json:"version"`            // of the plugin
	Protocols    []int    `json:"protocols"`          // majors spoken
	Capabilities []string `json:"capabilities"`
	Probes       []Probe  `json:"probes,omitempty"`
	// Rules are those that Inspect knows, beside the core's.
	Rules []Rule `json:"rules,omitempty"`
	// BackingFormats are the formats a backing file may have; empty means any.
	BackingFormats []string `json:"backing-formats,omitempty"`
	// Connection is ConnectionInherited where the program takes the connection that
	// it inherits. Package serve sets it.
	Connection string `json:"connection,omitempty"`
	// OpenOptions are the keys that OpenRequest.Options may have.
	OpenOptions []string `json:"open-options,omitempty"`
	// RuntimeRoots are directories and files that a plugin which is not one static
	// binary must read and execute (its interpreter, say). Relative ones lie beside
	// the program.
	RuntimeRoots []string `json:"runtime-roots,omitempty"`
}

// ConnectionInherited is a Manifest.Connection: see handshake.ConnectionKey.
const ConnectionInherited = "inherited"

// Has reports whether the manifest lists a capability.
func (m *Manifest) Has(capability string) bool {
	for _, c := range m.Capabilities {
		if c == capability {
			return true
		}
	}
	return false
}

// Fingerprint tells manifests apart, at less cost than their JSON.
func (m *Manifest) Fingerprint() string {
	h := fnv.New64a()
	fmt.Fprintf(h, "%+v", *m) // does not tell nil from empty, which JSON does not either
	return strconv.FormatUint(h.Sum64(), 16)
}

// Description is all that a plugin says of itself: what its manifest says and
// the options it takes.
type Description struct {
	Manifest Manifest
	// Create is the schema of create and of convert's target options. The order
	// of its keys is the order in which their values are printed.
	Create option.Schema
}

// Format is a disk image format. Implementations are safe for concurrent use.
type Format interface {
	// Describe returns constants.
	Describe() Description
	// Open parses the metadata of an image and keeps the files until Close.
	Open(ctx context.Context, req OpenRequest) (Image, error)
}

// OpenRequest says what to open.
type OpenRequest struct {
	// Files holds the main file, and others where the core knew them already.
	Files []NamedFile
	// ReadWrite is set when the files may be written. Where it is not, a plugin
	// must not write, and replays logs in memory only.
	ReadWrite bool
	// Check is set for check and repair: open what can be opened, so that Check
	// can report the rest.
	Check bool
	// Snapshot selects an internal snapshot, by id, else by name; empty means
	// the active state. Map and Decode then speak of the snapshot.
	Snapshot string
	// Name is the base name of the main file, for formats whose metadata names
	// their own files. It is data, not something that can be opened.
	Name string
	// Guessed: nobody has said that the file is of this format. The fallback format
	// refuses then what bears the mark of another.
	Guessed bool
	// Options are what the user says of how the file is to be read, by the keys that
	// the manifest lists as OpenOptions. The values are as they were given.
	Options map[string]string
}

// Image is an opened image: one layer, metadata only. Methods are safe for
// concurrent use. The optional interfaces are Checker, Decoder, Attacher, Warner
// and Writer.
type Image interface {
	// Info describes the image. It is called once, right after Open, and again
	// after Attach.
	Info(ctx context.Context) (*Info, error)
	// Map calls yield with runs of extents of the guest range [off, off+length):
	// ascending, contiguous, starting at off, each non-empty, neighbours that
	// continue each other merged. It stops early without error when yield
	// returns false. The range lies inside the virtual size. Where a part cannot be
	// mapped, what lies before it is yielded before the error.
	Map(ctx context.Context, off, length int64, yield func([]Extent) bool) error
	// Close drops the files. The core closes them itself.
	Close() error
}

// Warner is implemented by images that have something to tell a user who opens
// them, beside their Info.
type Warner interface {
	// Warnings returns one line each, as they stand behind "warning: ". It is called
	// once, right after Open. The core prints MaxWarnings of an image at most.
	Warnings() []string
}

// MaxWarnings is how many warnings of an image count.
const MaxWarnings = 8

// As returns img as one of the optional interfaces (Checker, Decoder, Attacher,
// Writer), or false where the image does not have it. It serves images at the
// other end of a wire too, where a type assertion cannot tell.
func As[T any](img Image) (T, bool) {
	if s, ok := img.(interface{ Supports(iface any) bool }); ok && !s.Supports((*T)(nil)) {
		var none T
		return none, false
	}
	t, ok := img.(T)
	return t, ok
}

// ExtentKind says what a guest range of one layer holds.
type ExtentKind uint8

const (
	Absent  ExtentKind = iota // nothing in this layer: ask the backing file, else zeros
	Zero                      // reads as zeros
	Data                      // plain bytes in a file
	Encoded                   // compressed or encrypted: only Decoder can read it
)

// Extent is a guest range whose bytes lie in one place.
type Extent struct {
	Offset int64 // guest offset
	Length int64
	Kind   ExtentKind
	// File is the index of the file that holds HostOffset.
	File int
	// HostOffset of the bytes (Data), of the encoded bytes (Encoded), or of the
	// space that a Zero or Absent extent has allocated; -1 where there is none.
	HostOffset int64
	// EncodedLength is the number of host bytes of an Encoded extent.
	EncodedLength int64
	// Sparse marks Data whose host range may have holes that read as zeros
	// (preallocated metadata, flat extents), so that a caller may look for them.
	Sparse bool
	// Raw marks Sparse Data of which the file alone tells whether it is data: its
	// holes are zeros of the disk, not zeros in data (raw).
	Raw bool
}

// Decoder is implemented by images that yield Encoded extents.
type Decoder interface {
	// Decode fills dst, which is as long as e, with the guest bytes of e, an
	// Encoded extent as Map yielded it. It is called concurrently.
	Decode(ctx context.Context, e Extent, dst []byte) error
}

// Attacher is implemented by images that need more files than the main one.
type Attacher interface {
	// Attach hands over files for References, by role. Roles that the core's
	// policy refused are missing: reads of what they hold then fail with
	// ErrNotAttached.
	Attach(ctx context.Context, files []NamedFile) error
}

// ReferenceKind says what a name found in an image stands for.
type ReferenceKind string

const (
	RefBacking ReferenceKind = "backing"   // the next layer, opened by its own plugin
	RefData    ReferenceKind = "data-file" // guest bytes, attached to this plugin
	RefExtent  ReferenceKind = "extent"    // a part of a multi-file image, attached to this plugin
)

// Reference is a name of another file, found in an image. The plugin reports it
// verbatim; the core decides whether it is opened.
type Reference struct {
	Kind ReferenceKind
	Role string // of the file when attached; empty for RefBacking
	Name string // as stored in the image
	// Alternatives are other stored names for the same file, tried in order
	// after Name.
	Alternatives []string
	Format       string // the format the image says it has, empty if it does not say
	Required     bool   // reading fails without it
	// Identity, where not empty, must equal the entry of the same key in the
	// referenced image's Info.Identity (a VHD parent's unique id).
	IdentityKey, Identity string
}

// Info describes an opened image.
type Info struct {
	VirtualSize    int64
	AllocationUnit int64 // cluster, grain or block size; 0 where the format has none
	Encrypted      bool
	Compressed     bool // info's "compressed": all data is
	Dirty          bool // info's "dirty-flag"
	Corrupt        bool
	References     []Reference
	Snapshots      []Snapshot
	// HasBitmaps: the image can have persistent bitmaps; Bitmaps are those it has.
	HasBitmaps bool
	Bitmaps    []BitmapInfo
	// SpecificType is "type" of format-specific; Specific its "data", in the
	// order in which the format defines it. Both empty: the image has none.
	SpecificType string
	Specific     []Fact
	// Identity holds ids that an overlay may need to know of its backing file,
	// and that are not printed (a VHD's unique id, a VMDK's CID).
	Identity map[string]string
}

// Fact is one named value of format-specific information. Name is the JSON key
// ("lazy-refcounts"); as text its dashes become spaces. Exactly one field
// beside Name is used; a Fact in a List has no Name.
type Fact struct {
	Name   string
	Bool   *bool
	Int    *int64
	Uint   *uint64
	String *string
	// FileRole stands for the path of the file with this role, which only the
	// core knows.
	FileRole string
	Object   []Fact // where IsObject
	List     []Fact // where IsList
	IsObject bool
	IsList   bool
}

// Constructors for facts.
func BoolFact(name string, v bool) Fact        { return Fact{Name: name, Bool: &v} }
func IntFact(name string, v int64) Fact        { return Fact{Name: name, Int: &v} }
func UintFact(name string, v uint64) Fact      { return Fact{Name: name, Uint: &v} }
func StringFact(name, v string) Fact           { return Fact{Name: name, String: &v} }
func PathFact(name, role string) Fact          { return Fact{Name: name, FileRole: role} }
func ObjectFact(name string, v ...Fact) Fact   { return Fact{Name: name, Object: v, IsObject: true} }
func ListFact(name string, items ...Fact) Fact { return Fact{Name: name, List: items, IsList: true} }

// Snapshot is an internal snapshot.
type Snapshot struct {
	ID, Name    string
	VMStateSize int64
	DateSec     int64 // since the Unix epoch
	DateNsec    int64
	VMClockNsec int64
	Icount      int64 // -1 where unknown
	DiskSize    int64 // virtual size when it was taken
}

// Checker is implemented by images whose consistency can be checked.
type Checker interface {
	Check(ctx context.Context, req CheckRequest) (*CheckResult, error)
}

// Fix says what Check may repair.
type Fix uint8

const (
	FixNone  Fix = iota
	FixLeaks     // space that nothing refers to
	FixAll       // that, and corruptions where a repair is possible
)

// CheckRequest asks for a check. Fix other than FixNone needs an image opened
// with ReadWrite.
type CheckRequest struct {
	Fix Fix
	// Message is called with each finding, a line of text without newline.
	Message func(string)
	// Progress is called now and then with the work done so far, 0 to 1.
	Progress func(float64)
}

// CheckResult counts what a check found; a nil pointer is a value that the
// format has no notion of. Corruptions and Leaks are what remains.
type CheckResult struct {
	CheckErrors        int64 // things that could not be read
	Corruptions        int64
	CorruptionsFixed   int64
	Leaks              int64
	LeaksFixed         int64
	ImageEndOffset     int64 // 0 where unknown
	TotalClusters      int64 // 0: no allocation statistics
	AllocatedClusters  int64
	FragmentedClusters int64
	CompressedClusters int64
}

// Creator is implemented by formats that can be created.
type Creator interface {
	// PlanCreate checks everything and decides everything, and touches no file.
	PlanCreate(ctx context.Context, req CreateRequest) (Plan, error)
}

// CreateRequest asks for an empty image.
type CreateRequest struct {
	// Options are valid by the schema; keys that the user did not set and that
	// have no default are missing.
	Options option.Values
	Size    int64 // virtual size asked for
	// Backing is the backing file where there is one that could be opened (nil
	// for none, or when BackingUnchecked).
	Backing *BackingInfo
	// BackingName is the backing file's name as the user gave it, empty for none.
	BackingName string
	// Name is the base name of the main file, for formats whose metadata names
	// their own files.
	Name string
	// Compressed asks for a target whose units will be written encoded
	// (convert -c).
	Compressed bool
	// Reproducible asks for metadata that depends on the request alone: no
	// random ids, Time instead of the clock.
	Reproducible bool
	Time         int64 // seconds since the Unix epoch; 0: the current time
}

// BackingInfo describes an opened backing image.
type BackingInfo struct {
	Format      string
	VirtualSize int64
	Identity    map[string]string
	Specific    []Fact
}

// Plan is an image decided on but not written. Exactly one Emit follows, or none.
type Plan interface {
	Info() PlanInfo
	// Emit writes the metadata of an empty image into files, one for each
	// PlannedFile in order. They are empty but for what PlannedFile asked for;
	// holes read as zeros on regular files. On a device (OnDevice) nothing may be
	// assumed of old content.
	Emit(ctx context.Context, files []NamedFile) error
}

// Measurer is implemented by plans whose host space can be computed.
type Measurer interface {
	// Measure returns what `measure` prints: the file bytes needed when the
	// guest content occupies allocatedUnits of PlanInfo.AllocationUnit, and when
	// every unit does.
	Measure(ctx context.Context, req MeasureRequest) (MeasureResult, error)
}

// MeasureRequest describes the content to come.
type MeasureRequest struct {
	AllocatedUnits int64
	// Bitmaps of the source that would be copied.
	Bitmaps []BitmapInfo
}

// BitmapInfo describes a persistent bitmap: which guest ranges were written.
type BitmapInfo struct {
	Name         string
	Granularity  int64 // bytes of guest for each bit
	Enabled      bool  // it records writes
	Inconsistent bool  // it was in use when the image was not closed
}

// Inspector is implemented by images that know more of their own safety than
// Info and Check tell: features that a gatekeeper may want to refuse.
type Inspector interface {
	Inspect(ctx context.Context) (*Inspection, error)
}

// Inspection is for gatekeepers.
type Inspection struct {
	// Features in use, by their names in the format's specification.
	Features []string
	// Findings each break a rule.
	Findings []Finding
}

// Finding is one reason not to accept an image. Rule is the name of one of the
// manifest's rules.
type Finding struct{ Rule, Text string }

// BitmapReader is implemented by images whose bitmaps can be read.
type BitmapReader interface {
	// ReadBitmap calls yield with the dirty guest ranges of a bitmap, ascending,
	// until it returns false.
	ReadBitmap(ctx context.Context, name string, yield func([]Run) bool) error
}

// BitmapWriter is implemented by images opened with ReadWrite that can be given
// bitmaps, between BeginWrite and Finish.
type BitmapWriter interface {
	// WriteBitmap adds dirty guest ranges to a bitmap, which the first call makes.
	WriteBitmap(ctx context.Context, b BitmapInfo, runs []Run) error
}

// MeasureResult is in bytes.
type MeasureResult struct {
	Required       int64
	FullyAllocated int64
	Bitmaps        int64 // -1: the format has none
}

// PlanInfo is what a plan will make.
type PlanInfo struct {
	VirtualSize    int64 // after rounding
	AllocationUnit int64
	// Options holds every option with its resolved value, in schema order.
	Options option.Values
	Files   []PlannedFile
}

// Preallocation of a planned file, done by the core before Emit.
type Preallocation uint8

const (
	PreallocOff    Preallocation = iota // length only, no blocks
	PreallocFalloc                      // blocks reserved (posix_fallocate)
	PreallocFull                        // zeros written
)

// PlannedFile is a file wanted by a plan. The first has RoleMain.
type PlannedFile struct {
	Role string
	// Name is the base name of a further file, empty for the main file, made
	// from CreateRequest.Name: no separators, in the same directory.
	Name          string
	Length        int64 // the core truncates to it before Emit; 0: Emit sets the length
	Preallocation Preallocation
}

// Writer is implemented by images opened with ReadWrite into which guest data
// can be put. One BeginWrite, then Place, Zero and Encode with ascending guest
// offsets, then Finish.
type Writer interface {
	BeginWrite(ctx context.Context, req WriteRequest) (WriteInfo, error)
	// Place allocates host space for guest runs and returns where each byte of
	// them goes: ascending, covering the runs exactly. Runs are whole units but
	// for the end of the disk. What was there before is superseded: the core
	// writes every byte of a run.
	Place(ctx context.Context, runs []Run) ([]Placement, error)
	// Zero makes guest runs read as zeros whatever a backing file holds.
	Zero(ctx context.Context, runs []Run) error
	// Encode stores units in encoded form, in order. Encode what can be encoded
	// side by side (Parallel), place it in the order given, so that the output
	// depends on the input alone.
	Encode(ctx context.Context, units []Unit) error
	// Finish writes the tables. The image is valid when it returns, and only then.
	Finish(ctx context.Context) error
}

// WriteRequest says what the core is about to write.
type WriteRequest struct {
	Compressed   bool // use Encode
	Reproducible bool
}

// WriteInfo is how a target wants to be written.
type WriteInfo struct {
	Unit       int64 // runs and encoded units are whole units
	EncodeOnly bool  // Place is not supported (streamOptimized)
	// ReadsZero: units never written read as zeros (no old content, no backing).
	ReadsZero bool
	// InPlace: guest offset and host offset in the first file are the same
	// everywhere, and no metadata tells what is stored, so that Place need not be
	// called.
	InPlace bool
	// Ahead: the core may have runs placed before it knows whether they hold
	// anything but zeros, and later give some to Zero, in any order: those in whose
	// places it has written nothing. They are free for what is placed after.
	Ahead bool
}

// Unit is the guest content of one allocation unit, cut only by the end of the
// disk.
type Unit struct {
	Offset int64 // guest offset
	Data   []byte
}

// Run is a guest range.
type Run struct{ Offset, Length int64 }

// Placement says where the bytes of a guest run go.
type Placement struct {
	Offset     int64 // guest offset
	Length     int64
	File       int // index of the file
	HostOffset int64
}

// Package wire converts between the sdk's types and the protobuf messages that
// carry them. It holds no state and does no I/O: both halves of the wire use it.
package wire

import (
	"fmt"
	"math"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// OptionKeys and FromOptionKeys convert a schema.
func OptionKeys(s option.Schema) []*pb.OptionKey {
	out := make([]*pb.OptionKey, len(s))
	for i := range s {
		k := &s[i]
		out[i] = &pb.OptionKey{
			Name: k.Name, Type: optionTypes.to(k.Type), DefaultValue: k.Default,
			Min: k.Min, Max: k.Max, PowerOfTwo: k.PowerOfTwo, ZeroOk: k.ZeroOK,
			Allowed: k.Allowed, FoldCase: k.FoldCase, Synonyms: k.Synonyms, Help: k.Help,
			Disposition: pb.Disposition(k.Disposition + 1), Reason: k.Reason,
			RangeText: k.RangeText, Extra: k.Extra,
		}
	}
	return out
}

func FromOptionKeys(in []*pb.OptionKey) (option.Schema, error) {
	out := make(option.Schema, len(in))
	for i, k := range in {
		t, err := optionTypes.from(k.GetType())
		if err != nil {
			return nil, fmt.Errorf("option %q: %w", k.GetName(), err)
		}
		d := max(k.GetDisposition()-1, 0)
		if k.GetDisposition() < 0 || d > pb.Disposition(option.Deprecated) {
			return nil, fmt.Errorf("option %q: unknown disposition %d", k.GetName(), k.GetDisposition())
		}
		out[i] = option.Key{
			Name: k.GetName(), Type: t, Default: k.GetDefaultValue(),
			Min: k.GetMin(), Max: k.GetMax(), PowerOfTwo: k.GetPowerOfTwo(), ZeroOK: k.GetZeroOk(),
			Allowed: k.GetAllowed(), FoldCase: k.GetFoldCase(), Synonyms: k.GetSynonyms(), Help: k.GetHelp(),
			Disposition: option.Disposition(d), Reason: k.GetReason(),
			RangeText: k.GetRangeText(), Extra: k.GetExtra(),
		}
	}
	return out, nil
}

type typeTable [option.Enum + 1]pb.OptionType

// optionTypes is indexed by option.Type.
var optionTypes = typeTable{
	option.String: pb.OptionType_OPTION_TYPE_STRING,
	option.Bool:   pb.OptionType_OPTION_TYPE_BOOL,
	option.Size:   pb.OptionType_OPTION_TYPE_SIZE,
	option.Uint:   pb.OptionType_OPTION_TYPE_UINT,
	option.Enum:   pb.OptionType_OPTION_TYPE_ENUM,
}

func (t *typeTable) to(x option.Type) pb.OptionType { return t[x] }

func (t *typeTable) from(x pb.OptionType) (option.Type, error) {
	for i, v := range t {
		if v == x {
			return option.Type(i), nil
		}
	}
	return 0, fmt.Errorf("unknown option type %d", x)
}

// OptionValues and FromOptionValues convert validated values.
func OptionValues(v option.Values) []*pb.OptionValue {
	out := make([]*pb.OptionValue, len(v))
	for i, x := range v {
		out[i] = &pb.OptionValue{Key: x.Key, Type: optionTypes.to(x.Type),
			UintValue: x.Uint, BoolValue: x.Bool, StringValue: Text(x.String), Set: x.Set}
	}
	return out
}

func FromOptionValues(in []*pb.OptionValue) (option.Values, error) {
	out := make(option.Values, len(in))
	for i, x := range in {
		t, err := optionTypes.from(x.GetType())
		if err != nil {
			return nil, fmt.Errorf("option %q: %w", x.GetKey(), err)
		}
		out[i] = option.Value{Key: x.GetKey(), Type: t, Uint: x.GetUintValue(),
			Bool: x.GetBoolValue(), String: FromText(x.GetStringValue()), Set: x.GetSet()}
	}
	return out, nil
}

// BackingInfo and FromBackingInfo convert; nil stays nil.
func BackingInfo(b *sdk.BackingInfo) *pb.BackingInfo {
	if b == nil {
		return nil
	}
	return &pb.BackingInfo{Format: Text(b.Format), VirtualSize: b.VirtualSize, Identity: identity(b.Identity), Specific: facts(b.Specific)}
}

func FromBackingInfo(b *pb.BackingInfo) *sdk.BackingInfo {
	if b == nil {
		return nil
	}
	return &sdk.BackingInfo{Format: FromText(b.GetFormat()), VirtualSize: b.GetVirtualSize(), Identity: fromIdentity(b.GetIdentity()), Specific: fromFacts(b.GetSpecific(), 0)}
}

// CreateRequest and FromCreateRequest convert.
func CreateRequest(r sdk.CreateRequest) *pb.PlanCreateRequest {
	return &pb.PlanCreateRequest{
		Options: OptionValues(r.Options), Size: r.Size, Backing: BackingInfo(r.Backing),
		BackingName: Text(r.BackingName), Name: Text(r.Name), Compressed: r.Compressed,
		Reproducible: r.Reproducible, Time: r.Time,
	}
}

func FromCreateRequest(r *pb.PlanCreateRequest) (sdk.CreateRequest, error) {
	values, err := FromOptionValues(r.GetOptions())
	if err != nil {
		return sdk.CreateRequest{}, err
	}
	return sdk.CreateRequest{
		Options: values, Size: r.GetSize(), Backing: FromBackingInfo(r.GetBacking()),
		BackingName: FromText(r.GetBackingName()), Name: FromText(r.GetName()), Compressed: r.GetCompressed(),
		Reproducible: r.GetReproducible(), Time: r.GetTime(),
	}, nil
}

// PlanInfo fills the response for a plan; FromPlanInfo reads it.
func PlanInfo(p sdk.PlanInfo) *pb.PlanCreateResponse {
	files := make([]*pb.PlannedFile, len(p.Files))
	for i, f := range p.Files {
		files[i] = &pb.PlannedFile{Role: f.Role, Name: Text(f.Name), Length: f.Length, Preallocation: pb.Preallocation(f.Preallocation + 1)}
	}
	return &pb.PlanCreateResponse{VirtualSize: p.VirtualSize, AllocationUnit: p.AllocationUnit,
		Options: OptionValues(p.Options), Files: files}
}

func FromPlanInfo(p *pb.PlanCreateResponse) (sdk.PlanInfo, error) {
	values, err := FromOptionValues(p.GetOptions())
	if err != nil {
		return sdk.PlanInfo{}, err
	}
	files := make([]sdk.PlannedFile, len(p.GetFiles()))
	for i, f := range p.GetFiles() {
		pre := max(f.GetPreallocation()-1, 0)
		if f.GetPreallocation() < 0 || pre > pb.Preallocation(sdk.PreallocFull) {
			return sdk.PlanInfo{}, fmt.Errorf("planned file %q: unknown preallocation %d", f.GetRole(), f.GetPreallocation())
		}
		files[i] = sdk.PlannedFile{Role: f.GetRole(), Name: FromText(f.GetName()), Length: f.GetLength(), Preallocation: sdk.Preallocation(pre)}
	}
	return sdk.PlanInfo{VirtualSize: p.GetVirtualSize(), AllocationUnit: p.GetAllocationUnit(), Options: values, Files: files}, nil
}

// Info and FromInfo convert.
func Info(in *sdk.Info) *pb.Info {
	out := &pb.Info{
		VirtualSize: in.VirtualSize, AllocationUnit: in.AllocationUnit,
		Encrypted: in.Encrypted, Compressed: in.Compressed, Dirty: in.Dirty, Corrupt: in.Corrupt, HasBitmaps: in.HasBitmaps,
		SpecificType: Text(in.SpecificType), Specific: facts(in.Specific), Identity: identity(in.Identity),
	}
	out.Bitmaps = Bitmaps(in.Bitmaps)
	for _, r := range in.References {
		out.References = append(out.References, &pb.Reference{
			Kind: string(r.Kind), Role: r.Role, Name: Text(r.Name), Alternatives: texts(r.Alternatives),
			Format: Text(r.Format), Required: r.Required, IdentityKey: Text(r.IdentityKey), Identity: Text(r.Identity),
		})
	}
	for _, s := range in.Snapshots {
		out.Snapshots = append(out.Snapshots, &pb.Snapshot{
			Id: Text(s.ID), Name: Text(s.Name), VmStateSize: s.VMStateSize, DateSec: s.DateSec, DateNsec: s.DateNsec,
			VmClockNsec: s.VMClockNsec, Icount: s.Icount, DiskSize: s.DiskSize,
		})
	}
	return out
}

func FromInfo(in *pb.Info) (*sdk.Info, error) {
	if in == nil {
		return nil, fmt.Errorf("plugin sent no image information")
	}
	out := &sdk.Info{
		VirtualSize: in.GetVirtualSize(), AllocationUnit: in.GetAllocationUnit(),
		Encrypted: in.GetEncrypted(), Compressed: in.GetCompressed(), Dirty: in.GetDirty(), Corrupt: in.GetCorrupt(), HasBitmaps: in.GetHasBitmaps(),
		SpecificType: FromText(in.GetSpecificType()), Specific: fromFacts(in.GetSpecific(), 0), Identity: fromIdentity(in.GetIdentity()),
	}
	if out.VirtualSize < 0 || out.AllocationUnit < 0 {
		return nil, fmt.Errorf("plugin sent a negative size (virtual size %d, allocation unit %d)", out.VirtualSize, out.AllocationUnit)
	}
	out.Bitmaps = FromBitmaps(in.GetBitmaps())
	for _, r := range in.GetReferences() {
		kind := sdk.ReferenceKind(r.GetKind())
		switch kind {
		case sdk.RefBacking, sdk.RefData, sdk.RefExtent:
		default:
			return nil, fmt.Errorf("plugin sent a reference of unknown kind %q", r.GetKind())
		}
		out.References = append(out.References, sdk.Reference{
			Kind: kind, Role: r.GetRole(), Name: FromText(r.GetName()), Alternatives: fromTexts(r.GetAlternatives()),
			Format: FromText(r.GetFormat()), Required: r.GetRequired(), IdentityKey: FromText(r.GetIdentityKey()), Identity: FromText(r.GetIdentity()),
		})
	}
	for _, s := range in.GetSnapshots() {
		out.Snapshots = append(out.Snapshots, sdk.Snapshot{
			ID: FromText(s.GetId()), Name: FromText(s.GetName()), VMStateSize: s.GetVmStateSize(), DateSec: s.GetDateSec(), DateNsec: s.GetDateNsec(),
			VMClockNsec: s.GetVmClockNsec(), Icount: s.GetIcount(), DiskSize: s.GetDiskSize(),
		})
	}
	return out, nil
}

// Bitmaps and FromBitmaps convert.
func Bitmaps(in []sdk.BitmapInfo) []*pb.BitmapInfo {
	var out []*pb.BitmapInfo
	for i := range in {
		out = append(out, Bitmap(in[i]))
	}
	return out
}

func FromBitmaps(in []*pb.BitmapInfo) []sdk.BitmapInfo {
	var out []sdk.BitmapInfo
	for _, b := range in {
		out = append(out, FromBitmap(b))
	}
	return out
}

// Bitmap and FromBitmap convert one.
func Bitmap(b sdk.BitmapInfo) *pb.BitmapInfo {
	return &pb.BitmapInfo{Name: Text(b.Name), Granularity: b.Granularity, Enabled: b.Enabled, Inconsistent: b.Inconsistent}
}

func FromBitmap(b *pb.BitmapInfo) sdk.BitmapInfo {
	return sdk.BitmapInfo{Name: FromText(b.GetName()), Granularity: b.GetGranularity(), Enabled: b.GetEnabled(), Inconsistent: b.GetInconsistent()}
}

func facts(in []sdk.Fact) []*pb.Fact {
	out := make([]*pb.Fact, len(in))
	for i := range in {
		f := &in[i]
		p := &pb.Fact{Name: Text(f.Name)}
		switch {
		case f.Bool != nil:
			p.Value = &pb.Fact_BoolValue{BoolValue: *f.Bool}
		case f.Int != nil:
			p.Value = &pb.Fact_IntValue{IntValue: *f.Int}
		case f.Uint != nil:
			p.Value = &pb.Fact_UintValue{UintValue: *f.Uint}
		case f.String != nil:
			p.Value = &pb.Fact_StringValue{StringValue: Text(*f.String)}
		case f.FileRole != "":
			p.Value = &pb.Fact_FileRole{FileRole: f.FileRole}
		case f.IsObject:
			p.Value = &pb.Fact_Object{Object: &pb.Facts{Facts: facts(f.Object)}}
		case f.IsList:
			p.Value = &pb.Fact_List{List: &pb.Facts{Facts: facts(f.List)}}
		}
		out[i] = p
	}
	return out
}

// maxFactDepth bounds the nesting of facts from an untrusted plugin.
const maxFactDepth = 16

func fromFacts(in []*pb.Fact, depth int) []sdk.Fact {
	if len(in) == 0 || depth > maxFactDepth {
		return nil
	}
	out := make([]sdk.Fact, 0, len(in))
	for _, p := range in {
		name := FromText(p.GetName())
		switch v := p.GetValue().(type) {
		case *pb.Fact_BoolValue:
			out = append(out, sdk.BoolFact(name, v.BoolValue))
		case *pb.Fact_IntValue:
			out = append(out, sdk.IntFact(name, v.IntValue))
		case *pb.Fact_UintValue:
			out = append(out, sdk.UintFact(name, v.UintValue))
		case *pb.Fact_StringValue:
			out = append(out, sdk.StringFact(name, FromText(v.StringValue)))
		case *pb.Fact_FileRole:
			out = append(out, sdk.PathFact(name, v.FileRole))
		case *pb.Fact_Object:
			out = append(out, sdk.ObjectFact(name, fromFacts(v.Object.GetFacts(), depth+1)...))
		case *pb.Fact_List:
			out = append(out, sdk.ListFact(name, fromFacts(v.List.GetFacts(), depth+1)...))
		}
	}
	return out
}

// Attributes of an extent in MapImageResponse.
const (
	attrKind      = 0xf
	attrSparse    = 1 << 4
	attrHost      = 1 << 5
	attrRaw       = 1 << 6
	attrFileShift = 8
)

// AppendExtents adds extents to a response.
func AppendExtents(r *pb.MapImageResponse, extents []sdk.Extent) {
	for i := range extents {
		e := &extents[i]
		attr := uint64(e.Kind)
		if e.Sparse {
			attr |= attrSparse
		}
		if e.Raw {
			attr |= attrRaw
		}
		if e.HostOffset >= 0 {
			attr |= attrHost | uint64(e.File)<<attrFileShift
			r.HostOffset = append(r.HostOffset, uint64(e.HostOffset))
		}
		if e.Kind == sdk.Encoded {
			r.EncodedLength = append(r.EncodedLength, uint64(e.EncodedLength))
		}
		r.Length = append(r.Length, uint64(e.Length))
		r.Attributes = append(r.Attributes, attr)
	}
}

// FromExtents appends the extents of a response to dst; the first begins at
// guest offset off. It checks what can be checked without knowing the files:
// no empty extents, none beyond end, no overflow.
func FromExtents(dst []sdk.Extent, r *pb.MapImageResponse, off, end int64) ([]sdk.Extent, error) {
	if len(r.GetAttributes()) != len(r.GetLength()) {
		return nil, fmt.Errorf("plugin sent a map of %d lengths and %d attributes", len(r.GetLength()), len(r.GetAttributes()))
	}
	host, enc := r.GetHostOffset(), r.GetEncodedLength()
	for i, l := range r.GetLength() {
		attr := r.GetAttributes()[i]
		e := sdk.Extent{Offset: off, Kind: sdk.ExtentKind(attr & attrKind), Sparse: attr&attrSparse != 0, Raw: attr&attrRaw != 0, HostOffset: -1}
		if l == 0 || l > uint64(end-off) {
			return nil, fmt.Errorf("plugin sent an extent of %d bytes at %#x, beyond the range asked for (%#x)", l, off, end)
		}
		e.Length = int64(l)
		if e.Kind > sdk.Encoded {
			return nil, fmt.Errorf("plugin sent an extent of unknown kind %d", e.Kind)
		}
		if attr&attrHost != 0 {
			if len(host) == 0 || host[0] > math.MaxInt64 || attr>>attrFileShift > math.MaxInt32 {
				return nil, fmt.Errorf("plugin sent a map with bad host offsets")
			}
			e.HostOffset, host = int64(host[0]), host[1:]
			e.File = int(attr >> attrFileShift)
		} else if e.Kind == sdk.Data || e.Kind == sdk.Encoded {
			return nil, fmt.Errorf("plugin sent a data extent at %#x without a host offset", off)
		}
		if e.Kind == sdk.Encoded {
			if len(enc) == 0 || enc[0] > math.MaxInt64 {
				return nil, fmt.Errorf("plugin sent a map with bad encoded lengths")
			}
			e.EncodedLength, enc = int64(enc[0]), enc[1:]
		}
		dst = append(dst, e)
		off += e.Length
	}
	return dst, nil
}

// CheckResult and FromCheckResult convert.
func CheckResult(r *sdk.CheckResult) *pb.CheckResult {
	return &pb.CheckResult{
		CheckErrors: r.CheckErrors, Corruptions: r.Corruptions, CorruptionsFixed: r.CorruptionsFixed,
		Leaks: r.Leaks, LeaksFixed: r.LeaksFixed, ImageEndOffset: r.ImageEndOffset,
		TotalClusters: r.TotalClusters, AllocatedClusters: r.AllocatedClusters,
		FragmentedClusters: r.FragmentedClusters, CompressedClusters: r.CompressedClusters,
	}
}

func FromCheckResult(r *pb.CheckResult) *sdk.CheckResult {
	return &sdk.CheckResult{
		CheckErrors: r.GetCheckErrors(), Corruptions: r.GetCorruptions(), CorruptionsFixed: r.GetCorruptionsFixed(),
		Leaks: r.GetLeaks(), LeaksFixed: r.GetLeaksFixed(), ImageEndOffset: r.GetImageEndOffset(),
		TotalClusters: r.GetTotalClusters(), AllocatedClusters: r.GetAllocatedClusters(),
		FragmentedClusters: r.GetFragmentedClusters(), CompressedClusters: r.GetCompressedClusters(),
	}
}

// Runs and FromRuns convert.
func Runs(in []sdk.Run) []*pb.Run {
	out := make([]*pb.Run, len(in))
	for i, r := range in {
		out[i] = &pb.Run{Offset: r.Offset, Length: r.Length}
	}
	return out
}

func FromRuns(in []*pb.Run) []sdk.Run {
	out := make([]sdk.Run, len(in))
	for i, r := range in {
		out[i] = sdk.Run{Offset: r.GetOffset(), Length: r.GetLength()}
	}
	return out
}

// Placements and FromPlacements convert.
func Placements(in []sdk.Placement) []*pb.Placement {
	out := make([]*pb.Placement, len(in))
	for i, p := range in {
		out[i] = &pb.Placement{Offset: p.Offset, Length: p.Length, File: int32(p.File), HostOffset: p.HostOffset}
	}
	return out
}

func FromPlacements(in []*pb.Placement) []sdk.Placement {
	out := make([]sdk.Placement, len(in))
	for i, p := range in {
		out[i] = sdk.Placement{Offset: p.GetOffset(), Length: p.GetLength(), File: int(p.GetFile()), HostOffset: p.GetHostOffset()}
	}
	return out
}

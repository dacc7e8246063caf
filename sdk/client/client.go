// Package client is the core's half of the wire: it makes an sdk.Format of a
// connection to a plugin. What a plugin answers is checked for all that can be
// known without the files; protobuf types do not leave this package.
package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"google.golang.org/grpc"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/internal/wire"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// FileSender passes descriptors to the plugin.
type FileSender interface {
	// SendFile returns the ticket by which requests name the descriptor. The
	// caller keeps f.
	SendFile(f *os.File) (ticket uint32, err error)
}

// Format is a format at the other end of a connection. It implements
// sdk.Format and sdk.Creator.
type Format struct {
	rpc   pb.FormatServiceClient
	files FileSender

	expect func(sdk.Description) error
	prints string // the fingerprint of the manifest that is accepted unseen

	describeOnce sync.Once
	description  sdk.Description
	err          error
}

// maxMessage bounds one answer of a plugin, in bytes.
const maxMessage = 16 << 20

// Connect makes a format of a connection. What the plugin says of itself, when
// that is needed, accept may refuse. manifest is what it is expected to say; nil
// expects nothing.
func Connect(conn grpc.ClientConnInterface, files FileSender, manifest *sdk.Manifest, accept func(sdk.Description) error) *Format {
	f := &Format{rpc: pb.NewFormatServiceClient(conn), files: files, expect: accept}
	if manifest != nil {
		f.prints = manifest.Fingerprint()
	}
	return f
}

func (f *Format) describe(ctx context.Context) (sdk.Description, error) {
	var d sdk.Description
	wire.WarmCreate()
	r, err := f.rpc.Describe(ctx, &pb.DescribeRequest{}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return d, wire.FromStatus(err)
	}
	if err := json.Unmarshal(r.GetManifest(), &d.Manifest); err != nil {
		return d, fmt.Errorf("plugin's manifest: %w", err)
	}
	if d.Create, err = wire.FromOptionKeys(r.GetCreateSchema()); err != nil {
		return d, fmt.Errorf("plugin's create options: %w", err)
	}
	return d, nil
}

// Ready asks the plugin what it is, once, and returns why that will not do.
func (f *Format) Ready(ctx context.Context) error {
	f.describeOnce.Do(func() {
		if f.description, f.err = f.describe(ctx); f.err == nil {
			f.err = f.expect(f.description)
		}
	})
	return f.err
}

// Describe returns what the plugin said to Ready.
func (f *Format) Describe() sdk.Description { return f.description }

// send passes descriptors on and returns their tickets.
func (f *Format) send(files []sdk.NamedFile) ([]*pb.FileTicket, error) {
	out := make([]*pb.FileTicket, len(files))
	for i, nf := range files {
		osf, ok := sdk.OSFile(nf.File)
		if !ok {
			return nil, fmt.Errorf("file %q: not an open descriptor: %w", nf.Role, sdk.ErrInvalid)
		}
		t, err := f.files.SendFile(osf)
		if err != nil {
			return nil, fmt.Errorf("file %q: %w", nf.Role, err)
		}
		out[i] = &pb.FileTicket{Ticket: t, Role: nf.Role}
	}
	return out, nil
}

// PlanCreate has the plugin decide on an image.
func (f *Format) PlanCreate(ctx context.Context, req sdk.CreateRequest) (sdk.Plan, error) {
	r, err := f.rpc.PlanCreate(ctx, wire.CreateRequest(req))
	if err != nil {
		return nil, wire.FromStatus(err)
	}
	info, err := wire.FromPlanInfo(r)
	if err != nil {
		return nil, err
	}
	if info.VirtualSize < 0 || info.AllocationUnit < 0 {
		return nil, fmt.Errorf("plugin planned negative sizes (%d, %d)", info.VirtualSize, info.AllocationUnit)
	}
	return &plan{format: f, id: r.GetPlan(), info: info, measurable: r.GetMeasurable()}, nil
}

type plan struct {
	format     *Format
	id         uint64
	info       sdk.PlanInfo
	measurable bool
}

func (p *plan) Info() sdk.PlanInfo { return p.info }

func (p *plan) Emit(ctx context.Context, files []sdk.NamedFile) error {
	tickets, err := p.format.send(files)
	if err != nil {
		return err
	}
	_, err = p.format.rpc.EmitPlan(ctx, &pb.EmitPlanRequest{Plan: p.id, Files: tickets})
	return wire.FromStatus(err)
}

// Measure implements sdk.Measurer.
func (p *plan) Measure(ctx context.Context, req sdk.MeasureRequest) (sdk.MeasureResult, error) {
	if !p.measurable {
		return sdk.MeasureResult{}, fmt.Errorf("measure: %w", sdk.ErrUnsupported)
	}
	r, err := p.format.rpc.MeasurePlan(ctx, &pb.MeasurePlanRequest{Plan: p.id, AllocatedUnits: req.AllocatedUnits, Bitmaps: wire.Bitmaps(req.Bitmaps)})
	if err != nil {
		return sdk.MeasureResult{}, wire.FromStatus(err)
	}
	if r.GetRequired() < 0 || r.GetFullyAllocated() < 0 {
		return sdk.MeasureResult{}, fmt.Errorf("plugin measured negative sizes (%d, %d)", r.GetRequired(), r.GetFullyAllocated())
	}
	return sdk.MeasureResult{Required: r.GetRequired(), FullyAllocated: r.GetFullyAllocated(), Bitmaps: r.GetBitmaps()}, nil
}

// Open has the plugin open an image, and need not be preceded by Ready: it fails
// where that would. The concrete type is *Image.
func (f *Format) Open(ctx context.Context, req sdk.OpenRequest) (sdk.Image, error) {
	tickets, err := f.send(req.Files)
	if err != nil {
		return nil, err
	}
	wire.WarmOpen()
	r, err := f.rpc.OpenImage(ctx, &pb.OpenImageRequest{
		Files: tickets, ReadWrite: req.ReadWrite, Check: req.Check, Snapshot: wire.Text(req.Snapshot), Name: wire.Text(req.Name),
		Guessed: req.Guessed, Options: wire.Options(req.Options),
	}, grpc.MaxCallRecvMsgSize(maxMessage))
	if r.GetManifest() == "" || r.GetManifest() != f.prints {
		if notReady := f.Ready(ctx); notReady != nil {
			return nil, notReady
		}
	}
	if err != nil {
		return nil, wire.FromStatus(err)
	}
	info, err := wire.FromInfo(r.GetInfo())
	if err != nil {
		return nil, err
	}
	return &Image{
		readWrite: req.ReadWrite,
		format:    f, id: r.GetImage(), info: info, warnings: wire.FromWarnings(r.GetWarnings()),
		checker: r.GetChecker(), decoder: r.GetDecoder(), attacher: r.GetAttacher(), writer: r.GetWriter(),
		bitmapReader: r.GetBitmapReader(), bitmapWriter: r.GetBitmapWriter(), inspector: r.GetInspector(),
	}, nil
}

// Image is an image that a plugin has open.
type Image struct {
	format *Format
	id     uint64
	info   *sdk.Info

	warnings []string

	checker, decoder, attacher, writer    bool
	bitmapReader, bitmapWriter, inspector bool
	readWrite                             bool

	scratchMu sync.Mutex
	scratch   *Window
}

// Supports tells sdk.As which optional interfaces the image really has.
func (m *Image) Supports(iface any) bool {
	switch iface.(type) {
	case *sdk.Checker:
		return m.checker
	case *sdk.Decoder, *WindowDecoder:
		return m.decoder
	case *sdk.Attacher:
		return m.attacher
	case *sdk.Writer, *WindowEncoder:
		return m.writer
	case *sdk.Inspector:
		return m.inspector
	case *sdk.Warner:
		return len(m.warnings) > 0
	case *sdk.BitmapReader:
		return m.bitmapReader
	case *sdk.BitmapWriter:
		return m.bitmapWriter
	}
	return false
}

// Info returns what the plugin said of the image when it was opened or files
// were attached.
func (m *Image) Info(context.Context) (*sdk.Info, error) { return m.info, nil }

// Warnings implements sdk.Warner. There are not many, and each is one line.
func (m *Image) Warnings() []string { return m.warnings }

// closeTimeout bounds the wait for a plugin that has nothing left to do for an
// image.
const closeTimeout = 2 * time.Second

// Close has the plugin drop the image. Nobody waits for that where the image
// was only read.
func (m *Image) Close() error {
	if m.scratch != nil {
		_ = m.scratch.Close() // memory only
	}
	if !m.readWrite {
		go func() { _ = m.drop() }()
		return nil
	}
	return m.drop()
}

func (m *Image) drop() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	_, err := m.format.rpc.CloseImage(ctx, &pb.CloseImageRequest{Image: m.id})
	return wire.FromStatus(err)
}

// Attach implements sdk.Attacher.
func (m *Image) Attach(ctx context.Context, files []sdk.NamedFile) error {
	tickets, err := m.format.send(files)
	if err != nil {
		return err
	}
	r, err := m.format.rpc.AttachFiles(ctx, &pb.AttachFilesRequest{Image: m.id, Files: tickets}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return wire.FromStatus(err)
	}
	m.info, err = wire.FromInfo(r.GetInfo())
	return err
}

// A plugin ended a map before its end, or sent a part without extents.
var (
	errMapShort = errors.New("plugin's map ends early")
	errMapEmpty = errors.New("plugin sent a part of a map without extents")
)

// Map streams the image's extents. Each is inside the range, non-empty and
// follows on the one before; whether its host range lies inside its file is the
// caller's to check.
func (m *Image) Map(ctx context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	if length == 0 {
		return nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := m.format.rpc.MapImage(ctx, &pb.MapImageRequest{Image: m.id, Offset: off, Length: length}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return wire.FromStatus(err)
	}
	end := off + length
	var extents []sdk.Extent
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return wire.FromStatus(err)
		}
		extents, err = wire.FromExtents(extents[:0], r, off, end)
		if err != nil {
			return err
		}
		if len(extents) == 0 {
			return errMapEmpty // no progress, and could go on for ever
		}
		last := extents[len(extents)-1]
		off = last.Offset + last.Length
		if !yield(extents) {
			return nil
		}
	}
	if off != end {
		return fmt.Errorf("%w: at %#x of %#x", errMapShort, off, end)
	}
	return nil
}

// Check implements sdk.Checker.
func (m *Image) Check(ctx context.Context, req sdk.CheckRequest) (*sdk.CheckResult, error) {
	stream, err := m.format.rpc.CheckImage(ctx, &pb.CheckImageRequest{Image: m.id, Fix: pb.Fix(req.Fix + 1)}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return nil, wire.FromStatus(err)
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, errors.New("plugin ended a check without a result")
		}
		if err != nil {
			return nil, wire.FromStatus(err)
		}
		if req.Message != nil {
			for _, text := range r.GetMessages() {
				req.Message(wire.OneLine(text))
			}
		}
		if req.Progress != nil && r.GetProgress() > 0 {
			req.Progress(r.GetProgress())
		}
		if r.GetResult() != nil {
			return wire.FromCheckResult(r.GetResult()), nil
		}
	}
}

// BeginWrite implements sdk.Writer.
func (m *Image) BeginWrite(ctx context.Context, req sdk.WriteRequest) (sdk.WriteInfo, error) {
	r, err := m.format.rpc.BeginWrite(ctx, &pb.BeginWriteRequest{Image: m.id, Compressed: req.Compressed, Reproducible: req.Reproducible})
	if err != nil {
		return sdk.WriteInfo{}, wire.FromStatus(err)
	}
	if r.GetUnit() <= 0 {
		return sdk.WriteInfo{}, fmt.Errorf("plugin wants units of %d bytes", r.GetUnit())
	}
	return sdk.WriteInfo{Unit: r.GetUnit(), EncodeOnly: r.GetEncodeOnly(), ReadsZero: r.GetReadsZero(), InPlace: r.GetInPlace(), Ahead: r.GetAhead()}, nil
}

// Place implements sdk.Writer. The answer covers the runs exactly, in order.
func (m *Image) Place(ctx context.Context, runs []sdk.Run) ([]sdk.Placement, error) {
	r, err := m.format.rpc.PlaceRuns(ctx, &pb.PlaceRunsRequest{Image: m.id, Runs: wire.Runs(runs)}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return nil, wire.FromStatus(err)
	}
	placements := wire.FromPlacements(r.GetPlacements())
	if err := checkCover(runs, placements); err != nil {
		return nil, err
	}
	return placements, nil
}

// checkCover reports whether placements cover runs exactly, in order.
func checkCover(runs []sdk.Run, placements []sdk.Placement) error {
	i := 0
	for _, run := range runs {
		at, end := run.Offset, run.Offset+run.Length
		for at < end {
			if i == len(placements) {
				return fmt.Errorf("plugin placed nothing at guest offset %#x", at)
			}
			p := placements[i]
			if p.Offset != at || p.Length <= 0 || p.Length > end-at || p.HostOffset < 0 || p.HostOffset+p.Length < 0 {
				return fmt.Errorf("plugin placed guest %#x+%#x at host %#x where %#x+%#x was asked for", p.Offset, p.Length, p.HostOffset, at, end-at)
			}
			at += p.Length
			i++
		}
	}
	if i != len(placements) {
		return fmt.Errorf("plugin placed %d runs more than were asked for", len(placements)-i)
	}
	return nil
}

// Zero implements sdk.Writer.
func (m *Image) Zero(ctx context.Context, runs []sdk.Run) error {
	_, err := m.format.rpc.ZeroRuns(ctx, &pb.ZeroRunsRequest{Image: m.id, Runs: wire.Runs(runs)})
	return wire.FromStatus(err)
}

// Finish implements sdk.Writer.
func (m *Image) Finish(ctx context.Context) error {
	_, err := m.format.rpc.FinishWrite(ctx, &pb.FinishWriteRequest{Image: m.id})
	return wire.FromStatus(err)
}

// ReadBitmap implements sdk.BitmapReader.
func (m *Image) ReadBitmap(ctx context.Context, name string, yield func([]sdk.Run) bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := m.format.rpc.ReadBitmap(ctx, &pb.ReadBitmapRequest{Image: m.id, Name: wire.Text(name)}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return wire.FromStatus(err)
	}
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return wire.FromStatus(err)
		}
		if !yield(wire.FromRuns(r.GetRuns())) {
			return nil
		}
	}
}

// WriteBitmap implements sdk.BitmapWriter.
func (m *Image) WriteBitmap(ctx context.Context, b sdk.BitmapInfo, runs []sdk.Run) error {
	_, err := m.format.rpc.WriteBitmap(ctx, &pb.WriteBitmapRequest{Image: m.id, Bitmap: wire.Bitmap(b), Runs: wire.Runs(runs)})
	return wire.FromStatus(err)
}

// Inspect implements sdk.Inspector.
func (m *Image) Inspect(ctx context.Context) (*sdk.Inspection, error) {
	r, err := m.format.rpc.InspectImage(ctx, &pb.InspectImageRequest{Image: m.id}, grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return nil, wire.FromStatus(err)
	}
	in := &sdk.Inspection{Features: r.GetFeatures()}
	for _, f := range r.GetFindings() {
		in.Findings = append(in.Findings, sdk.Finding{Rule: f.GetRule(), Text: f.GetText()})
	}
	return in, nil
}

// Package server is the plugin's half of the wire: it serves one sdk.Format.
package server

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/internal/wire"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// FileSource hands out the descriptors that arrived for tickets, each once.
type FileSource interface {
	Take(ctx context.Context, ticket uint32) (*os.File, error)
}

// Server implements the FormatService for one format.
type Server struct {
	pb.UnimplementedFormatServiceServer

	format     sdk.Format
	connection string // that of the manifest
	files      FileSource

	spread func() // has the program use all processors

	mu     sync.Mutex // of the next three
	lastID uint64
	plans  map[uint64]sdk.Plan
	images map[uint64]*image

	windowMu sync.Mutex // held while a window is being mapped
	windows  map[uint32]*window
}

// image is an open image with the descriptors it was given.
type image struct {
	sdk.Image
	files []*os.File
}

// New returns a server for format, whose descriptors come from files. connection
// is what its manifest says of that.
func New(format sdk.Format, files FileSource, connection string) *Server {
	return &Server{
		format: format, files: files, connection: connection, plans: map[uint64]sdk.Plan{}, images: map[uint64]*image{}, windows: map[uint32]*window{},
		spread: sync.OnceFunc(func() { runtime.GOMAXPROCS(runtime.NumCPU()) }),
	}
}

// Describe returns what the format says of itself.
func (s *Server) Describe(context.Context, *pb.DescribeRequest) (*pb.DescribeResponse, error) {
	d := s.format.Describe()
	manifest, err := json.Marshal(s.manifest())
	if err != nil {
		return nil, wire.Status(err)
	}
	return &pb.DescribeResponse{Manifest: manifest, CreateSchema: wire.OptionKeys(d.Create)}, nil
}

func (s *Server) manifest() *sdk.Manifest {
	m := s.format.Describe().Manifest
	m.Connection = s.connection
	return &m
}

func (s *Server) newID() uint64 {
	s.lastID++
	return s.lastID
}

// take collects the descriptors that tickets name. On failure none stays open.
func (s *Server) take(ctx context.Context, tickets []*pb.FileTicket) (named []sdk.NamedFile, opened []*os.File, err error) {
	for _, t := range tickets {
		f, err := s.files.Take(ctx, t.GetTicket())
		if err != nil {
			closeAll(opened)
			return nil, nil, fmt.Errorf("file %q: %w", t.GetRole(), err)
		}
		opened = append(opened, f)
		named = append(named, sdk.NamedFile{Role: t.GetRole(), File: sdk.NewFile(f)})
	}
	return named, opened, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// PlanCreate decides on an image and keeps the plan.
func (s *Server) PlanCreate(ctx context.Context, r *pb.PlanCreateRequest) (*pb.PlanCreateResponse, error) {
	creator, ok := s.format.(sdk.Creator)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "this format cannot be created")
	}
	req, err := wire.FromCreateRequest(r)
	if err != nil {
		return nil, wire.Status(err)
	}
	plan, err := creator.PlanCreate(ctx, req)
	if err != nil {
		return nil, wire.Status(err)
	}
	resp := wire.PlanInfo(plan.Info())
	_, resp.Measurable = plan.(sdk.Measurer)
	s.mu.Lock()
	defer s.mu.Unlock()
	resp.Plan = s.newID()
	s.plans[resp.Plan] = plan
	return resp, nil
}

func (s *Server) plan(id uint64, drop bool) (sdk.Plan, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.plans[id]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "no plan %d", id)
	}
	if drop {
		delete(s.plans, id)
	}
	return p, nil
}

// MeasurePlan computes the host space of a planned image.
func (s *Server) MeasurePlan(ctx context.Context, r *pb.MeasurePlanRequest) (*pb.MeasurePlanResponse, error) {
	p, err := s.plan(r.GetPlan(), false)
	if err != nil {
		return nil, err
	}
	m, ok := p.(sdk.Measurer)
	if !ok {
		return nil, wire.Status(fmt.Errorf("measure: %w", sdk.ErrUnsupported))
	}
	res, err := m.Measure(ctx, sdk.MeasureRequest{AllocatedUnits: r.GetAllocatedUnits(), Bitmaps: wire.FromBitmaps(r.GetBitmaps())})
	if err != nil {
		return nil, wire.Status(err)
	}
	return &pb.MeasurePlanResponse{Required: res.Required, FullyAllocated: res.FullyAllocated, Bitmaps: res.Bitmaps}, nil
}

// EmitPlan writes a planned image and drops the plan.
func (s *Server) EmitPlan(ctx context.Context, r *pb.EmitPlanRequest) (*pb.EmitPlanResponse, error) {
	p, err := s.plan(r.GetPlan(), true)
	if err != nil {
		return nil, err
	}
	named, opened, err := s.take(ctx, r.GetFiles())
	if err != nil {
		return nil, wire.Status(err)
	}
	defer closeAll(opened)
	if err := p.Emit(ctx, named); err != nil {
		return nil, wire.Status(err)
	}
	return &pb.EmitPlanResponse{}, nil
}

// ReleasePlan drops a plan.
func (s *Server) ReleasePlan(_ context.Context, r *pb.ReleasePlanRequest) (*pb.ReleasePlanResponse, error) {
	_, err := s.plan(r.GetPlan(), true)
	return &pb.ReleasePlanResponse{}, err
}

// OpenImage opens an image and describes it.
func (s *Server) OpenImage(ctx context.Context, r *pb.OpenImageRequest) (*pb.OpenImageResponse, error) {
	named, opened, err := s.take(ctx, r.GetFiles())
	if err != nil {
		return nil, wire.Status(err)
	}
	img, err := s.format.Open(ctx, sdk.OpenRequest{
		Files: named, ReadWrite: r.GetReadWrite(), Check: r.GetCheck(), Snapshot: wire.FromText(r.GetSnapshot()), Name: wire.FromText(r.GetName()),
		Guessed: r.GetGuessed(), Options: wire.FromOptions(r.GetOptions()),
	})
	if err != nil {
		closeAll(opened)
		return nil, wire.Status(err)
	}
	info, err := img.Info(ctx)
	if err != nil {
		_ = img.Close() // the error that matters is Info's
		closeAll(opened)
		return nil, wire.Status(err)
	}
	resp := &pb.OpenImageResponse{Info: wire.Info(info), Manifest: s.manifest().Fingerprint()}
	if w, ok := sdk.As[sdk.Warner](img); ok {
		resp.Warnings = wire.Warnings(w.Warnings())
	}
	_, resp.Checker = sdk.As[sdk.Checker](img)
	_, resp.Decoder = sdk.As[sdk.Decoder](img)
	_, resp.Attacher = sdk.As[sdk.Attacher](img)
	_, resp.Writer = sdk.As[sdk.Writer](img)
	_, resp.BitmapReader = sdk.As[sdk.BitmapReader](img)
	_, resp.BitmapWriter = sdk.As[sdk.BitmapWriter](img)
	_, resp.Inspector = sdk.As[sdk.Inspector](img)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.images) > 0 {
		s.spread()
	}
	resp.Image = s.newID()
	s.images[resp.Image] = &image{Image: img, files: opened}
	return resp, nil
}

// image returns an open image to somebody who wants more of it than its info,
// which may be work for several processors: the core starts a plugin with one.
func (s *Server) image(id uint64) (*image, error) {
	s.spread()
	s.mu.Lock()
	defer s.mu.Unlock()
	img, ok := s.images[id]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "no image %d", id)
	}
	return img, nil
}

// capability returns an open image as one of the optional interfaces.
func capability[T any](s *Server, id uint64) (T, error) {
	img, err := s.image(id)
	if err != nil {
		var none T
		return none, err
	}
	t, ok := sdk.As[T](img.Image)
	if !ok {
		return t, status.Errorf(codes.Unimplemented, "the image does not implement %T", (*T)(nil))
	}
	return t, nil
}

// AttachFiles hands further files to an image.
func (s *Server) AttachFiles(ctx context.Context, r *pb.AttachFilesRequest) (*pb.AttachFilesResponse, error) {
	img, err := s.image(r.GetImage())
	if err != nil {
		return nil, err
	}
	attacher, err := capability[sdk.Attacher](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	named, opened, err := s.take(ctx, r.GetFiles())
	if err != nil {
		return nil, wire.Status(err)
	}
	s.mu.Lock()
	img.files = append(img.files, opened...)
	s.mu.Unlock()
	if err := attacher.Attach(ctx, named); err != nil {
		return nil, wire.Status(err)
	}
	info, err := img.Info(ctx)
	if err != nil {
		return nil, wire.Status(err)
	}
	return &pb.AttachFilesResponse{Info: wire.Info(info)}, nil
}

// mapBatch is the number of extents in one message: enough to make the cost of
// a message small, few enough to stay far below gRPC's message limit.
const mapBatch = 16384

// MapImage streams the extents of a guest range.
func (s *Server) MapImage(r *pb.MapImageRequest, stream pb.FormatService_MapImageServer) error {
	img, err := s.image(r.GetImage())
	if err != nil {
		return err
	}
	batch := &pb.MapImageResponse{}
	var sendErr error
	flush := func() bool {
		if len(batch.Length) == 0 {
			return true
		}
		sendErr = stream.Send(batch)
		batch = &pb.MapImageResponse{}
		return sendErr == nil
	}
	err = img.Map(stream.Context(), r.GetOffset(), r.GetLength(), func(extents []sdk.Extent) bool {
		for len(extents) > 0 {
			n := min(len(extents), mapBatch-len(batch.Length))
			wire.AppendExtents(batch, extents[:n])
			extents = extents[n:]
			if len(batch.Length) >= mapBatch && !flush() {
				return false
			}
		}
		return stream.Context().Err() == nil
	})
	if err != nil {
		flush() // what was found before the error is true and wanted
		return wire.Status(err)
	}
	if sendErr == nil {
		flush()
	}
	return sendErr
}

// DecodeExtents decodes extents into the window, on all cores.
func (s *Server) DecodeExtents(ctx context.Context, r *pb.DecodeExtentsRequest) (*pb.DecodeExtentsResponse, error) {
	decoder, err := capability[sdk.Decoder](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	w, err := s.window(ctx, r.GetWindow())
	if err != nil {
		return nil, wire.Status(err)
	}
	todo := r.GetExtents()
	errs := make([]error, len(todo))
	_ = sdk.Parallel(len(todo), func(i int) error { // each error is reported with its extent
		e := todo[i]
		dst, err := w.slice(e.GetWindowOffset(), e.GetLength())
		if err == nil {
			err = decoder.Decode(ctx, sdk.Extent{
				Offset: e.GetOffset(), Length: e.GetLength(), Kind: sdk.Encoded, File: int(e.GetFile()),
				HostOffset: e.GetHostOffset(), EncodedLength: e.GetEncodedLength(),
			}, dst)
		}
		errs[i] = err
		return nil
	})
	resp := &pb.DecodeExtentsResponse{}
	for i, err := range errs {
		if err != nil {
			d, _ := wire.Detail(err)
			resp.Failed = append(resp.Failed, &pb.DecodeFailure{Index: int32(i), Text: wire.Prose(err.Error()), Detail: d})
		}
	}
	return resp, nil
}

// CheckImage checks an image; messages and progress are streamed.
func (s *Server) CheckImage(r *pb.CheckImageRequest, stream pb.FormatService_CheckImageServer) error {
	checker, err := capability[sdk.Checker](s, r.GetImage())
	if err != nil {
		return err
	}
	if r.GetFix() < pb.Fix_FIX_NONE || r.GetFix() > pb.Fix_FIX_ALL {
		return status.Errorf(codes.InvalidArgument, "unknown fix %d", r.GetFix())
	}
	// Findings are batched: a badly broken image has millions.
	const batch = 256
	pending := &pb.CheckImageResponse{}
	var mu sync.Mutex
	var sendErr error
	flush := func() {
		if sendErr == nil && (len(pending.Messages) > 0 || pending.Progress > 0) {
			sendErr = stream.Send(pending)
		}
		pending = &pb.CheckImageResponse{}
	}
	result, err := checker.Check(stream.Context(), sdk.CheckRequest{
		Fix: sdk.Fix(r.GetFix() - 1),
		Message: func(m string) {
			mu.Lock()
			defer mu.Unlock()
			pending.Messages = append(pending.Messages, wire.Prose(m))
			if len(pending.Messages) >= batch {
				flush()
			}
		},
		Progress: func(p float64) {
			mu.Lock()
			defer mu.Unlock()
			pending.Progress = p
			flush()
		},
	})
	mu.Lock()
	defer mu.Unlock()
	flush()
	if err != nil {
		return wire.Status(err)
	}
	if sendErr != nil {
		return sendErr
	}
	return stream.Send(&pb.CheckImageResponse{Result: wire.CheckResult(result)})
}

// InspectImage says what a gatekeeper should know.
func (s *Server) InspectImage(ctx context.Context, r *pb.InspectImageRequest) (*pb.InspectImageResponse, error) {
	i, err := capability[sdk.Inspector](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	in, err := i.Inspect(ctx)
	if err != nil {
		return nil, wire.Status(err)
	}
	resp := &pb.InspectImageResponse{}
	for _, f := range in.Features {
		resp.Features = append(resp.Features, wire.Prose(f))
	}
	for _, f := range in.Findings {
		resp.Findings = append(resp.Findings, &pb.Finding{Rule: f.Rule, Text: wire.Prose(f.Text)})
	}
	return resp, nil
}

// CloseImage closes an image and its files.
func (s *Server) CloseImage(_ context.Context, r *pb.CloseImageRequest) (*pb.CloseImageResponse, error) {
	img, err := s.image(r.GetImage())
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	delete(s.images, r.GetImage())
	s.mu.Unlock()
	err = img.Close()
	closeAll(img.files)
	return &pb.CloseImageResponse{}, wire.Status(err)
}

// BeginWrite starts the writing of guest data.
func (s *Server) BeginWrite(ctx context.Context, r *pb.BeginWriteRequest) (*pb.BeginWriteResponse, error) {
	w, err := capability[sdk.Writer](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	info, err := w.BeginWrite(ctx, sdk.WriteRequest{Compressed: r.GetCompressed(), Reproducible: r.GetReproducible()})
	if err != nil {
		return nil, wire.Status(err)
	}
	return &pb.BeginWriteResponse{Unit: info.Unit, EncodeOnly: info.EncodeOnly, ReadsZero: info.ReadsZero, InPlace: info.InPlace, Ahead: info.Ahead}, nil
}

// PlaceRuns allocates host space.
func (s *Server) PlaceRuns(ctx context.Context, r *pb.PlaceRunsRequest) (*pb.PlaceRunsResponse, error) {
	w, err := capability[sdk.Writer](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	p, err := w.Place(ctx, wire.FromRuns(r.GetRuns()))
	if err != nil {
		return nil, wire.Status(err)
	}
	return &pb.PlaceRunsResponse{Placements: wire.Placements(p)}, nil
}

// ZeroRuns makes guest runs read as zeros.
func (s *Server) ZeroRuns(ctx context.Context, r *pb.ZeroRunsRequest) (*pb.ZeroRunsResponse, error) {
	w, err := capability[sdk.Writer](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	return &pb.ZeroRunsResponse{}, wire.Status(w.Zero(ctx, wire.FromRuns(r.GetRuns())))
}

// EncodeUnits stores units that stand in the window, on all cores where the
// image allows it.
func (s *Server) EncodeUnits(ctx context.Context, r *pb.EncodeUnitsRequest) (*pb.EncodeUnitsResponse, error) {
	wr, err := capability[sdk.Writer](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	w, err := s.window(ctx, r.GetWindow())
	if err != nil {
		return nil, wire.Status(err)
	}
	units := r.GetUnits()
	batch := make([]sdk.Unit, len(units))
	for i, u := range units {
		src, err := w.slice(u.GetWindowOffset(), u.GetLength())
		if err != nil {
			return nil, wire.Status(err)
		}
		batch[i] = sdk.Unit{Offset: u.GetOffset(), Data: src}
	}
	return &pb.EncodeUnitsResponse{}, wire.Status(wr.Encode(ctx, batch))
}

// FinishWrite makes the image valid.
func (s *Server) FinishWrite(ctx context.Context, r *pb.FinishWriteRequest) (*pb.FinishWriteResponse, error) {
	w, err := capability[sdk.Writer](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	return &pb.FinishWriteResponse{}, wire.Status(w.Finish(ctx))
}

// ReadBitmap streams the dirty ranges of a bitmap.
func (s *Server) ReadBitmap(r *pb.ReadBitmapRequest, stream pb.FormatService_ReadBitmapServer) error {
	b, err := capability[sdk.BitmapReader](s, r.GetImage())
	if err != nil {
		return err
	}
	var sendErr error
	err = b.ReadBitmap(stream.Context(), wire.FromText(r.GetName()), func(runs []sdk.Run) bool {
		for len(runs) > 0 && sendErr == nil {
			n := min(len(runs), mapBatch)
			sendErr = stream.Send(&pb.ReadBitmapResponse{Runs: wire.Runs(runs[:n])})
			runs = runs[n:]
		}
		return sendErr == nil
	})
	if err != nil {
		return wire.Status(err)
	}
	return sendErr
}

// WriteBitmap adds dirty ranges to a bitmap of a target.
func (s *Server) WriteBitmap(ctx context.Context, r *pb.WriteBitmapRequest) (*pb.WriteBitmapResponse, error) {
	w, err := capability[sdk.BitmapWriter](s, r.GetImage())
	if err != nil {
		return nil, err
	}
	return &pb.WriteBitmapResponse{}, wire.Status(w.WriteBitmap(ctx, wire.FromBitmap(r.GetBitmap()), wire.FromRuns(r.GetRuns())))
}

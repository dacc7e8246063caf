package wire

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"unicode"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/option"
	pb "github.com/instar-img/instar/sdk/proto/instar/format/v1"
)

// classes names the error classes on the wire, most specific first.
var classes = []struct {
	name string
	err  error
	code codes.Code
}{
	{"corrupt", sdk.ErrCorrupt, codes.DataLoss},
	{"unsupported", sdk.ErrUnsupported, codes.Unimplemented},
	{"invalid", sdk.ErrInvalid, codes.InvalidArgument},
	{"not-format", sdk.ErrNotFormat, codes.InvalidArgument},
	{"not-attached", sdk.ErrNotAttached, codes.FailedPrecondition},
	{"read-only", sdk.ErrReadOnly, codes.FailedPrecondition},
	{"not-found", sdk.ErrNotFound, codes.NotFound},
	{"too-big", sdk.ErrTooBig, codes.OutOfRange},
}

// Detail returns err's class, errno and option error, and its status code.
func Detail(err error) (*pb.ErrorDetail, codes.Code) {
	d := &pb.ErrorDetail{Hint: Prose(sdk.HintOf(err))}
	code := codes.Unknown
	for _, c := range classes {
		if errors.Is(err, c.err) {
			d.Class, code = c.name, c.code
			break
		}
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		d.Errno = int32(errno)
	}
	var oe *option.Error
	if errors.As(err, &oe) {
		d.Option = &pb.OptionError{Key: Text(oe.Key), Value: Text(oe.Value), Reason: Text(oe.Reason), Accepted: texts(oe.Accepted), Text: Text(oe.Text)}
		code = codes.InvalidArgument
	}
	return d, code
}

// Status makes the status that carries err; nil stays nil.
func Status(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, context.Canceled) {
		return status.Error(codes.Canceled, Prose(err.Error()))
	}
	d, code := Detail(err)
	s, derr := status.New(code, Prose(err.Error())).WithDetails(d)
	if derr != nil {
		return status.Error(code, Prose(err.Error()))
	}
	return s.Err()
}

// FromStatus is the inverse of Status: the error has the same text, and
// errors.Is and errors.As find the same class, errno and option error. Without
// detail the code tells the class. Other errors than plugins' own are of the
// transport: they are put into words.
func FromStatus(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	if s.Code() == codes.Canceled {
		return &remoteError{text: OneLine(s.Message()), class: context.Canceled}
	}
	for _, x := range s.Details() {
		if d, ok := x.(*pb.ErrorDetail); ok {
			return FromDetail(s.Message(), d)
		}
	}
	switch s.Code() {
	case codes.Unavailable:
		return err
	case codes.ResourceExhausted:
		return &remoteError{text: "the plugin's answer is too large to be taken", class: sdk.ErrTooBig}
	case codes.Unimplemented:
		break // gRPC says so of methods that the plugin lacks
	default:
		// Plugins in other languages may leave the detail away.
		for _, c := range classes {
			if c.code == s.Code() {
				return &remoteError{text: OneLine(s.Message()), class: c.err}
			}
		}
	}
	return &remoteError{text: fmt.Sprintf("the request to the plugin failed (%v: %s)", s.Code(), OneLine(s.Message()))}
}

// maxText bounds the text of an error that a plugin sends, in bytes.
const maxText = 2048

// OneLine returns a text as one line of bounded length: what a plugin says must
// not pass for what the core says, nor steer a terminal.
func OneLine(s string) string { return oneLine(s, maxText) }

func oneLine(s string, most int) string {
	cut := len(s) > most
	if cut {
		s = s[:most]
	}
	s = strings.ToValidUTF8(s, "?")
	for _, r := range s {
		if unicode.IsControl(r) {
			var b strings.Builder
			for _, r := range s {
				if unicode.IsControl(r) {
					b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
				} else {
					b.WriteRune(r)
				}
			}
			s = b.String()
			break
		}
	}
	if cut {
		s += "..."
	}
	return s
}

// Warnings returns texts for people as UTF-8.
func Warnings(in []string) []string { return each(in, Prose) }

// maxWarning bounds a warning, in bytes.
const maxWarning = 512

// FromWarnings returns what of a plugin's warnings a user gets to see.
func FromWarnings(in []string) []string {
	more := len(in) - sdk.MaxWarnings
	out := each(in[:min(len(in), sdk.MaxWarnings)], func(s string) string { return oneLine(s, maxWarning) })
	if more > 0 {
		out = append(out, fmt.Sprintf("%d more warnings are left out", more))
	}
	return out
}

// FromDetail rebuilds an error of its text and detail.
func FromDetail(text string, d *pb.ErrorDetail) error {
	if o := d.GetOption(); o != nil {
		oe := &option.Error{Key: FromText(o.GetKey()), Value: FromText(o.GetValue()), Reason: FromText(o.GetReason()), Accepted: fromTexts(o.GetAccepted()), Text: FromText(o.GetText())}
		if oe.Error() == text {
			return oe
		}
		return &remoteError{text: OneLine(text), class: oe}
	}
	e := &remoteError{text: OneLine(text), hint: OneLine(d.GetHint())}
	for _, c := range classes {
		if c.name == d.GetClass() {
			e.class = c.err
		}
	}
	if d.GetErrno() > 0 {
		e.errno = syscall.Errno(d.GetErrno())
	}
	return e
}

// remoteError is an error that a plugin returned.
type remoteError struct {
	text  string
	class error
	errno error
	hint  string
}

// ErrorHint is what sdk.HintOf returns.
func (e *remoteError) ErrorHint() string { return e.hint }

func (e *remoteError) Error() string { return e.text }

func (e *remoteError) Unwrap() []error {
	var out []error
	if e.class != nil {
		out = append(out, e.class)
	}
	if e.errno != nil {
		out = append(out, e.errno)
	}
	return out
}

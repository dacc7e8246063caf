// Command instar-format-boxed is a format plugin as a third party would write
// it: a raw disk in a box, behind a header of one sector. docs/plugins.md walks
// through it.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/ondisk"
	"github.com/instar-img/instar/sdk/option"
	"github.com/instar-img/instar/sdk/serve"
)

func main() { serve.Main(boxed{}) }

const (
	magic      = "BOXEDIMG"
	headerSize = 512
)

// header is the first sector of a file.
type header struct {
	virtualSize int64
	colour      string // of the box, at most 16 bytes
}

func (h *header) append(b []byte) []byte {
	b = append(b, magic...)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.virtualSize))
	b = append(b, h.colour...)
	return append(b, make([]byte, headerSize-len(b))...)
}

func (h *header) decode(b []byte) error {
	c := ondisk.NewCursor(b, binary.LittleEndian)
	if string(c.Bytes(len(magic))) != magic {
		return fmt.Errorf("no %s at the start: %w", magic, sdk.ErrNotFormat)
	}
	size, ok := ondisk.Int64(c.U64())
	if !ok {
		return fmt.Errorf("virtual size does not fit in 63 bits: %w", sdk.ErrCorrupt)
	}
	colour := c.Bytes(16)
	if err := c.Err(); err != nil {
		return fmt.Errorf("header: %w: %w", err, sdk.ErrCorrupt)
	}
	for len(colour) > 0 && colour[len(colour)-1] == 0 {
		colour = colour[:len(colour)-1]
	}
	h.virtualSize, h.colour = size, string(colour)
	return nil
}

// validate checks what a header says against the length of its file.
func (h *header) validate(fileLength int64) error {
	if !ondisk.Within(headerSize, h.virtualSize, fileLength) {
		return fmt.Errorf("virtual size %d does not fit in a file of %d bytes: %w", h.virtualSize, fileLength, sdk.ErrCorrupt)
	}
	return nil
}

type boxed struct{}

func (boxed) Describe() sdk.Description {
	return sdk.Description{
		Manifest: sdk.Manifest{
			Name:         "boxed",
			Suffixes:     []string{"box"},
			Version:      "1.0.0",
			Protocols:    []int{sdk.Protocol},
			Capabilities: []string{sdk.CapOpen, sdk.CapCreate},
			Probes:       []sdk.Probe{{Bytes: "424f584544494d47", Score: 100}},
		},
		Create: option.Schema{
			{Name: "size", Type: option.Size, Help: "Virtual disk size"},
			{
				Name: "colour", Type: option.Enum, Allowed: []string{"brown", "white"},
				Default: "brown", Help: "Colour of the box",
			},
		},
	}
}

// Open parses the header; nothing else is read until somebody asks.
func (boxed) Open(_ context.Context, req sdk.OpenRequest) (sdk.Image, error) {
	file := req.Files[0].File
	length, err := file.Size()
	if err != nil {
		return nil, err
	}
	sector := make([]byte, headerSize)
	if n, err := file.ReadAt(sector, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	} else if n < headerSize {
		return nil, fmt.Errorf("%d bytes are no header: %w", n, sdk.ErrNotFormat)
	}
	var h header
	if err := h.decode(sector); err != nil {
		return nil, err
	}
	if err := h.validate(length); err != nil {
		return nil, err
	}
	return &image{h}, nil
}

type image struct{ header header }

func (i *image) Info(context.Context) (*sdk.Info, error) {
	return &sdk.Info{
		VirtualSize:  i.header.virtualSize,
		SpecificType: "boxed",
		Specific:     []sdk.Fact{sdk.StringFact("box-colour", i.header.colour)},
	}, nil
}

// Map says where guest bytes lie: all of them behind the header.
func (i *image) Map(_ context.Context, off, length int64, yield func([]sdk.Extent) bool) error {
	if !ondisk.Within(off, length, i.header.virtualSize) {
		return fmt.Errorf("map %#x+%#x: %w", off, length, sdk.ErrInvalid)
	}
	if length > 0 {
		yield([]sdk.Extent{{
			Offset: off, Length: length, Kind: sdk.Data,
			HostOffset: headerSize + off, Sparse: true, Raw: true,
		}})
	}
	return nil
}

func (i *image) Close() error { return nil }

// PlanCreate decides on everything and touches no file.
func (boxed) PlanCreate(_ context.Context, req sdk.CreateRequest) (sdk.Plan, error) {
	if req.BackingName != "" {
		return nil, fmt.Errorf("a box has no backing file: %w", sdk.ErrUnsupported)
	}
	length, ok := ondisk.Add(headerSize, req.Size)
	if !ok {
		return nil, fmt.Errorf("%d bytes and a header: %w", req.Size, sdk.ErrTooBig)
	}
	return &plan{
		header: header{virtualSize: req.Size, colour: req.Options.StringOr("colour", "brown")},
		info: sdk.PlanInfo{
			VirtualSize: req.Size,
			Options:     req.Options,
			Files:       []sdk.PlannedFile{{Role: sdk.RoleMain, Length: length}},
		},
	}, nil
}

type plan struct {
	header header
	info   sdk.PlanInfo
}

func (p *plan) Info() sdk.PlanInfo { return p.info }

func (p *plan) Emit(_ context.Context, files []sdk.NamedFile) error {
	_, err := files[0].File.WriteAt(p.header.append(nil), 0)
	return err
}

package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/instar-img/instar/sdk"
)

// maxInterim bounds the main file of an image of several files in which names
// are looked for, in bytes.
const maxInterim = 4 << 20

// interim returns what makes main files that name further files otherwise
// (output.Options.Interim). Where the names stand in the file is the format's
// business: they are replaced wherever they do, and the plugin, which opens the
// result, says whether it is the same image with the other names.
func interim(ctx context.Context, creator sdk.Creator, req *CreateRequest, plan sdk.PlanInfo) func(main, to *os.File, names map[string]string) error {
	format, ok := creator.(sdk.Format)
	if !ok || !req.Plugin.Manifest.Has(sdk.CapOpen) {
		return nil
	}
	return func(main, to *os.File, names map[string]string) error {
		b, err := io.ReadAll(io.NewSectionReader(main, 0, maxInterim+1))
		if err != nil {
			return err
		}
		if len(b) > maxInterim {
			return errors.New("its main file is large")
		}
		var pairs []string
		for from, with := range names {
			pairs = append(pairs, from, with)
		}
		if _, err := to.WriteAt([]byte(strings.NewReplacer(pairs...).Replace(string(b))), 0); err != nil {
			return err
		}
		image, err := format.Open(ctx, sdk.OpenRequest{
			Files: []sdk.NamedFile{{Role: sdk.RoleMain, File: sdk.NewFile(to)}}, Name: filepath.Base(req.Path),
		})
		if err != nil {
			return err
		}
		defer image.Close()
		info, err := image.Info(ctx)
		if err != nil {
			return err
		}
		named := map[string]bool{}
		for _, ref := range info.References {
			named[ref.Name] = true
		}
		for from, with := range names {
			if !named[with] || named[from] || info.VirtualSize != plan.VirtualSize {
				return fmt.Errorf("its main file does not say plainly that %s belongs to it", from)
			}
		}
		return nil
	}
}

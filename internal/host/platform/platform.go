// Package platform knows what platforms ask of the images that are uploaded to
// them. The rules are data, each with its source; the code knows no platform.
package platform

import (
	"archive/tar"
	_ "embed" // the rules
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
)

//go:embed platforms.json
var rules []byte

// Platform is where an image is to run.
type Platform struct {
	Name    string `json:"name"`
	Title   string `json:"title"`
	Format  string `json:"format"`
	Options string `json:"options"` // as -o takes them
	// SizeMultiple is what the virtual size is rounded up to, in bytes; 0: nothing.
	SizeMultiple int64 `json:"size-multiple"`
	// Wrap is the container the image is put in, "tar.gz" or empty, and Member
	// its name there.
	Wrap   string `json:"wrap"`
	Member string `json:"member"`
	Rules  []Rule `json:"rules"`
}

// Rule is one thing that a platform asks for, and who says so.
type Rule struct {
	Rule   string `json:"rule"`
	Source string `json:"source"`
}

// All returns the platforms.
func All() ([]Platform, error) {
	var all []Platform
	if err := json.Unmarshal(rules, &all); err != nil {
		return nil, fmt.Errorf("platform rules: %w", err)
	}
	return all, nil
}

// ByName returns a platform.
func ByName(name string) (*Platform, error) {
	all, err := All()
	if err != nil {
		return nil, err
	}
	for i := range all {
		if all[i].Name == name {
			return &all[i], nil
		}
	}
	return nil, fmt.Errorf("unknown platform %q (known: %s)", name, strings.Join(names(all), ", "))
}

// Names returns the names of the platforms.
func Names() ([]string, error) {
	all, err := All()
	return names(all), err
}

func names(all []Platform) []string {
	list := make([]string, len(all))
	for i := range all {
		list[i] = all[i].Name
	}
	return list
}

// RoundSize returns a virtual size that the platform takes.
func (p *Platform) RoundSize(size int64) (int64, error) {
	if p.SizeMultiple <= 0 || size%p.SizeMultiple == 0 {
		return size, nil
	}
	rounded := size - size%p.SizeMultiple + p.SizeMultiple
	if rounded < size {
		return 0, fmt.Errorf("virtual size %d cannot be rounded up to a multiple of %d", size, p.SizeMultiple)
	}
	return rounded, nil
}

// Archive writes the container that the platform asks for, with one member of
// size bytes that content writes. date is in seconds since the Unix epoch.
func (p *Platform) Archive(w io.Writer, size, date int64, content func(io.Writer) error) error {
	if p.Wrap != "tar.gz" {
		return fmt.Errorf("platform %s: unknown container %q", p.Name, p.Wrap)
	}
	z := gzip.NewWriter(w)
	t := tar.NewWriter(z)
	header := &tar.Header{Typeflag: tar.TypeReg, Name: p.Member, Size: size, Mode: 0o644, Format: tar.FormatGNU}
	if date > 0 {
		header.ModTime = time.Unix(date, 0)
	}
	if err := t.WriteHeader(header); err != nil {
		return err
	}
	if err := content(t); err != nil {
		return err
	}
	if err := t.Close(); err != nil {
		return err
	}
	return z.Close()
}

package qcow2

import (
	"bytes"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// FuzzCryptoExtension decodes the place of a LUKS header, and opens an image that
// has it.
func FuzzCryptoExtension(f *testing.F) {
	f.Add((&cryptoExtension{0x10000, 592}).append(nil))
	f.Add((&cryptoExtension{1<<64 - 512, 1024}).append(nil))
	f.Add((&cryptoExtension{512, 1<<64 - 1}).append(nil))
	base := emitted(f, "cluster_size=512")
	f.Fuzz(func(t *testing.T, b []byte) {
		var e cryptoExtension
		if e.decode(b) == nil && !bytes.Equal(e.append(nil), b[:16]) {
			t.Errorf("%+v of %x", e, b)
		}
		image := bytes.Clone(base)
		image[35] = 2 // encryption method: LUKS
		copy(image[headerLength:480], appendExtension(nil, extension{extCrypto, b[:min(len(b), 64)]}))
		files := []sdk.NamedFile{{Role: sdk.RoleMain, File: formattest.ReadOnly(formattest.MemFile(image))}}
		if img, err := New().Open(t.Context(), sdk.OpenRequest{Files: files}); err == nil {
			_, _ = img.Info(t.Context()) // what does not hold a header is an error
		}
	})
}

package vhdx

import (
	"context"
	"testing"

	"github.com/instar-img/instar/sdk"
	"github.com/instar-img/instar/sdk/formattest"
)

// BenchmarkTable opens, checks and maps a fixed disk of 1 TiB in blocks of 1 MiB.
func BenchmarkTable(b *testing.B) {
	path := formattest.Create(b, New(), b.TempDir(), "a", 1<<40, "block_size=1M,subformat=fixed,block_state_zero=off")
	ctx := context.Background()
	o := formattest.Open(b, New(), path, false)
	b.Run("open", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := New().Open(ctx, sdk.OpenRequest{Files: o.Files}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("check", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := o.Image.(sdk.Checker).Check(ctx, sdk.CheckRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("map", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := o.Image.Map(ctx, 0, 1<<40, func([]sdk.Extent) bool { return true }); err != nil {
				b.Fatal(err)
			}
		}
	})
}

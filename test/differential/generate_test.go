//go:build linux

package differential

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
)

// triple is one random request to create an image.
type triple struct {
	format  string
	options []string // key=value
	size    string   // as on the command line
	backing string   // base name of a file in the fixture directory, or ""
	baseFmt string
}

func (c triple) args() []string {
	args := []string{"create", "-f", c.format}
	if c.backing != "" {
		args = append(args, "-b", c.backing, "-F", c.baseFmt)
	}
	if len(c.options) > 0 {
		args = append(args, "-o", strings.Join(c.options, ","))
	}
	args = append(args, "image")
	if c.size != "" {
		args = append(args, c.size)
	}
	return args
}

func (c triple) option(key string) string {
	value := ""
	for _, o := range c.options {
		if k, v, _ := strings.Cut(o, "="); k == key {
			value = v
		}
	}
	return value
}

// values are what a generated key may take. Those that qemu-img refuses are
// there too, but rarer: a triple is tried with at most one of them.
type values struct {
	key  string
	good []string
	bad  []string
}

var (
	bools   = []string{"on", "off"}
	badBool = []string{"maybe", "1", ""}
)

var formats = []string{"raw", "qcow2", "vmdk", "vpc", "vhdx"}

var keys = map[string][]values{
	"raw": {
		{"preallocation", []string{"off", "falloc", "full"}, []string{"metadata", "Off"}},
		{"nocow", bools, badBool},
	},
	"qcow2": {
		{"cluster_size", []string{"512", "1k", "2k", "4096", "16k", "32k", "65536", "128k", "1M", "2M"}, []string{"256", "1000", "4M", "0", "-1", "65537", "x"}},
		{"compat", []string{"0.10", "1.1", "v2", "v3"}, []string{"1.0", "V3", "2"}},
		{"refcount_bits", []string{"1", "2", "4", "8", "16", "32", "64"}, []string{"0", "3", "128", "-1", "16k"}},
		{"extended_l2", bools, badBool},
		{"lazy_refcounts", bools, badBool},
		{"compression_type", []string{"zlib", "zstd"}, []string{"lz4", "ZSTD"}},
		{"preallocation", []string{"off", "metadata", "falloc", "full"}, []string{"none"}},
		{"nocow", bools, badBool},
	},
	"vmdk": {
		{"subformat", []string{"monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"}, []string{"sparse", "monolithicsparse"}},
		{"adapter_type", []string{"ide", "lsilogic", "buslogic", "legacyESX"}, []string{"scsi", "IDE"}},
		{"compat6", bools, badBool},
		{"hwversion", []string{"4", "6", "14"}, nil},
		{"toolsversion", []string{"2147483647", "10"}, nil},
		{"zeroed_grain", bools, badBool},
	},
	"vpc": {
		{"subformat", []string{"dynamic", "fixed"}, []string{"differencing", "Fixed"}},
		{"force_size", bools, badBool},
	},
	"vhdx": {
		{"subformat", []string{"dynamic", "fixed"}, []string{"Dynamic"}},
		{"block_size", []string{"0", "1M", "2M", "8M", "32M", "256M"}, []string{"512k", "3M", "512M", "x"}},
		{"log_size", []string{"1M", "2M", "64M"}, []string{"0", "512k", "1500k", "4G", "8G"}},
		{"block_state_zero", bools, badBool},
	},
}

const (
	mib = int64(1) << 20
	gib = int64(1) << 30
	tib = int64(1) << 40
)

// edges are sizes at which something changes in one of the formats.
var edges = []int64{
	0, 1, 511, 512, 513, 4096, mib - 1, mib, mib + 1, 33 * mib,
	2*gib - 512, 2 * gib, 2*gib + 512, 4 * gib, 127 * gib,
	2040*gib - 512, 2040 * gib, 2040*gib + 512, 2 * tib, 16 * tib,
	64*tib - 512, 64 * tib, 64*tib + 512, 1<<63 - 512, 1<<63 - 1,
}

var badSizes = []string{"x", "1Z", "1.5", "1e3", "9223372036854775808", "18446744073709551616", "1M1", "0x"}

// generate returns the n-th triple of a seed for a format.
func generate(seed, n uint64, format string) triple {
	r := rand.New(rand.NewPCG(seed, n))
	c := triple{format: format}
	bad := r.IntN(5) == 0 // one wrong value somewhere

	for _, k := range keys[format] {
		if r.IntN(3) != 0 {
			continue
		}
		v := k.good[r.IntN(len(k.good))]
		if bad && len(k.bad) > 0 && r.IntN(2) == 0 {
			v, bad = k.bad[r.IntN(len(k.bad))], false
		}
		c.options = append(c.options, k.key+"="+v)
	}
	r.Shuffle(len(c.options), func(i, j int) { c.options[i], c.options[j] = c.options[j], c.options[i] })
	if len(c.options) > 0 && r.IntN(8) == 0 { // a key twice: the last value wins
		k := keys[format][r.IntN(len(keys[format]))]
		c.options = append(c.options, k.key+"="+k.good[r.IntN(len(k.good))])
	}

	size := edges[r.IntN(len(edges))]
	if r.IntN(3) == 0 {
		size = r.Int64N(gib)
	}
	size = min(size, c.largest())
	switch {
	case bad:
		c.size = badSizes[r.IntN(len(badSizes))]
	case size > 0 && size%gib == 0 && r.IntN(2) == 0:
		c.size = fmt.Sprintf("%dG", size/gib)
	case size == 33*mib:
		c.size = "32.9999M"
	default:
		c.size = strconv.FormatInt(size, 10)
	}
	if r.IntN(6) == 0 {
		c.options = append(c.options, "size="+c.size)
		c.size = ""
	}

	if bases := backings[format]; len(bases) > 0 && r.IntN(6) == 0 {
		b := bases[r.IntN(len(bases))]
		c.backing, c.baseFmt = b.name, b.format
		if r.IntN(3) == 0 { // the size of the backing file
			c.size = ""
			c.options = slices.DeleteFunc(c.options, func(o string) bool { return strings.HasPrefix(o, "size=") })
		}
	}
	return c
}

// largest bounds the size of a triple to what can be made in well under a
// second and a few MiB of disk.
func (c triple) largest() int64 {
	switch {
	case c.option("preallocation") == "full", c.option("preallocation") == "falloc":
		return 4*mib + 1
	case c.option("preallocation") == "metadata" && strings.HasSuffix(c.option("cluster_size"), "12"):
		return 16 * mib
	case c.option("preallocation") == "metadata":
		return 256 * mib
	case strings.HasPrefix(c.option("subformat"), "twoGb"):
		return 7*gib + 512
	case c.format == "vhdx" && c.option("subformat") == "fixed":
		return 2 * tib // a block allocation table full of entries
	case c.format == "vhdx" && c.option("block_size") == "1M":
		return 16 * tib
	}
	return 1<<63 - 1
}

type base struct{ name, format string }

// backings are the files that prepare makes, by the format of the overlay.
var backings = map[string][]base{
	"qcow2": {{"base.raw", "raw"}, {"base.qcow2", "qcow2"}, {"base.vmdk", "vmdk"}, {"base.vpc", "vpc"}, {"base.vhdx", "vhdx"}},
	"vmdk":  {{"base.vmdk", "vmdk"}},
}

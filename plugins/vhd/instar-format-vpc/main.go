// Command instar-format-vpc is the VHD format, which qemu calls vpc, as a
// plugin of instar.
package main

import (
	"github.com/instar-img/instar/plugins/vhd"
	"github.com/instar-img/instar/sdk/serve"
)

func main() { serve.Main(vhd.New()) }

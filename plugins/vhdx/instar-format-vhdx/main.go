// Command instar-format-vhdx is the plugin for the VHDX format.
package main

import (
	"github.com/instar-img/instar/plugins/vhdx"
	"github.com/instar-img/instar/sdk/serve"
)

func main() { serve.Main(vhdx.New()) }

// Command instar-format-vmdk is the VMDK format as a plugin of instar.
package main

import (
	"github.com/instar-img/instar/plugins/vmdk"
	"github.com/instar-img/instar/sdk/serve"
)

func main() { serve.Main(vmdk.New()) }

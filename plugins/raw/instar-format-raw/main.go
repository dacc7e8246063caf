// Command instar-format-raw is the raw format as a plugin of instar.
package main

import (
	"github.com/instar-img/instar/plugins/raw"
	"github.com/instar-img/instar/sdk/serve"
)

func main() { serve.Main(raw.New()) }

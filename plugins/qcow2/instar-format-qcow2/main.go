// The qcow2 plugin program.
package main

import (
	"github.com/instar-img/instar/plugins/qcow2"
	"github.com/instar-img/instar/sdk/serve"
)

func main() { serve.Main(qcow2.New()) }

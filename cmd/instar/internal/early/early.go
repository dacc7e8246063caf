// Package early is initialised before the packages that take long, by importing
// none of them: the likely plugin starts meanwhile.
package early

import (
	"os"

	"github.com/instar-img/instar/internal/host/ahead"
)

func init() { ahead.Begin(os.Args) }

// Command instar creates, inspects, checks, compares and converts virtual disk
// images. It knows verbs and no formats: each format is a plugin program.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	_ "github.com/instar-img/instar/cmd/instar/internal/early" // starts a plugin
)

// version is set by the build.
var version = "0.1.0"

func main() {
	os.Exit(run(os.Args))
}

// run executes one command line and returns the exit code.
func run(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	defer stop()
	a := &app{name: filepath.Base(args[0]), out: &standardOutput{File: os.Stdout}, err: os.Stderr}
	root := a.rootCommand()
	line, err := normalise(root, args[1:])
	if err == nil {
		root.SetArgs(line)
		err = root.ExecuteContext(ctx)
	}
	defer func() { a.close(err != nil) }()
	if err == nil {
		return 0
	}
	code, message := a.exit(ctx, err)
	if message != "" {
		fmt.Fprintf(a.err, "%s: %s\n", a.name, message)
	}
	return code
}

package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/instar-img/instar/internal/host/ahead"
)

// qemuName is the name under which the program is called in qemu-img's place.
// Callers then read its version and its help as they read qemu-img's.
const qemuName = "qemu-img"

// qemuVersion is the version of qemu-img whose layout is printed by default.
func qemuVersion() string {
	if v := os.Getenv("INSTAR_QEMU_VERSION"); v == "7.2" {
		return v
	}
	return "10.0"
}

// versionLine is what -V prints. Callers look for "qemu-img version ([0-9.]*)".
func (a *app) versionLine() string {
	if a.name == qemuName {
		return fmt.Sprintf("qemu-img version %s.0 (instar %s)\n", qemuVersion(), version)
	}
	return "instar version " + version + "\n"
}

// qemuSyntax are qemu-img 7.2's lines for the verbs that are here. Callers look
// in them for options, and for verbs.
const qemuSyntax = `
  check [--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt] [-r [leaks | all]] [-T src_cache] [-U] filename
  compare [--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] [-U] filename1 filename2
  convert [--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] [--bitmaps] [-U] [-C] [-c] [-p] [-q] [-n] [-f fmt] [-t cache] [-T src_cache] [-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] [-S sparse_size] [-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename [filename2 [...]] output_filename
  create [--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o options] filename [size]
  dd [--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] [skip=blocks] if=input of=output
  info [--object objectdef] [--image-opts] [-f fmt] [--output=ofmt] [--backing-chain] [-U] filename
  map [--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] [--max-length=len] [--output=ofmt] [-U] filename
  measure [--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef] [--image-opts] [-f fmt] [-l snapshot_param] filename]
`

// qemuHelp is what --help prints under qemu-img's name.
func (a *app) qemuHelp() string {
	var b strings.Builder
	b.WriteString(a.versionLine())
	b.WriteString(`usage: qemu-img [standard options] command [command options]
QEMU disk image utility

    '-h', '--help'       display this help and exit
    '-V', '--version'    output version information and exit
    '-T', '--trace'      accepted, without effect

Command syntax:` + qemuSyntax + `
'qemu-img COMMAND --help' describes the options of a command, also those that
instar adds. Commands of instar's own: inspect, plugin, completion.
`)
	if names := formatList(); names != "" {
		b.WriteString("\nSupported formats: " + names + "\n")
	}
	return b.String()
}

// formatList names the installed formats, as qemu-img lists its own.
func formatList() string {
	set, err := ahead.Find()
	if err != nil {
		return ""
	}
	var names []string
	for _, p := range set.Plugins() {
		names = append(names, p.Manifest.Name)
	}
	return strings.Join(names, " ")
}

// registerUsage has the root command print its version and its help.
func (a *app) registerUsage(root *cobra.Command) {
	root.SetVersionTemplate(a.versionLine())
	if a.name != qemuName {
		return
	}
	help := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		if cmd != root {
			help(cmd, args)
			return
		}
		fmt.Fprint(a.out, a.qemuHelp())
	})
}

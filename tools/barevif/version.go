package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"barevif/telemetry"
	"barevif/tools/cli"
	"barevif/tools/internal/release"
	"barevif/tools/internal/stat"

	"github.com/spf13/cobra"
)

func versionCommand(p *cli.Program) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Say which barevif this is, and which layouts it speaks",
		Long: `version says what this program was built of: its version, the commit if it was built
from a clone, and Go's version. The layouts are those that programs of different
versions have to agree on, where they read each other's counters:

  counters   the blocks in pins, maps and memfds; "barevif stat" reads its own alone
  JSON       "version" of what "barevif stat --json" prints`,
		Args: cli.Arguments(0),
		RunE: func(*cobra.Command, []string) error {
			info, _ := debug.ReadBuildInfo()
			return printVersion(p.Stdout, info)
		},
	}
}

// printVersion writes the version of this program from info, which may be nil.
func printVersion(w io.Writer, info *debug.BuildInfo) error {
	version, commit := release.Of(info)
	if commit != "" {
		commit = "commit     " + commit + "\n"
	}
	_, err := fmt.Fprintf(w, "barevif    %s\n%sGo         %s %s/%s\ncounters   layout %d, %#016x\nJSON       %d\n",
		version, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH, telemetry.LayoutVersion, telemetry.Layout(), stat.Version)
	return err
}

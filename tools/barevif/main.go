// Command barevif shows and runs Xen paravirtual network cards owned by Go
// programs: a demonstration in one command, and the same pieces as processes of
// their own, on an emulated Xen or a real one. See its --help.
package main

import (
	"barevif/tools/cli"
	"barevif/tools/internal/netns"

	"github.com/spf13/cobra"
)

func main() {
	if !netns.Main() {
		cli.Main(rootCommand)
	}
}

const about = `barevif gives a Go program a Xen paravirtual network card of its own.

A card (a vif) has two ends in two domains, which share rings and pages:

  frontend   belongs to the appliance: a Go program that owns the card and brings
             its own TCP/IP. Here: "serve"; "attach" hands the card to its kernel.
  backend    belongs to the driver domain, and joins the card to a network: a TAP
             of its kernel, or an interface that is there. Here: "back"; "bridge"
             joins cards to each other.
  xenstore   a small tree of values through which the two find each other.
  toolstack  what writes a new card into xenstore, and takes it out again.

No Xen is needed to see it work: "demo" does all of it in one process, "host" is
an emulated Xen that the other commands join as domains, each a process.`

const examples = `  # everything at once, without root
  barevif demo

  # the same in processes of their own, each in a terminal, the second as root
  barevif host
  barevif back --addr 10.9.0.1/24
  barevif serve --addr 10.9.0.2/24
  curl http://10.9.0.2/`

// rootCommand builds the command with all its subcommands.
func rootCommand(p *cli.Program) *cobra.Command {
	root := &cobra.Command{
		Use:     "barevif",
		Short:   "A Xen paravirtual network card for Go programs",
		Long:    about,
		Example: examples,
		Annotations: map[string]string{
			"bench": `it is a command of its own: "go run ./test/bench" in a clone`,
			"check": `it is a command of its own: "go run ./test/check" in a clone`,
		},
	}
	for _, add := range []func(*cli.Program) *cobra.Command{demoCommand, hostCommand, backCommand, bridgeCommand, serveCommand, attachCommand, statCommand, ringCommand, dumpCommand, imageCommand, xenCommand, versionCommand} {
		root.AddCommand(add(p))
	}
	return root
}

// Command barevif shows and runs Xen paravirtual network cards owned by Go
// programs: a demonstration in one command, and the same pieces as processes of
// their own, on an emulated Xen or a real one. See its --help.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"barevif/tools/internal/netns"

	"github.com/spf13/cobra"
)

func main() {
	if netns.Main() {
		return
	}
	signal.Ignore(syscall.SIGPIPE) // a closed output pipe must not keep us from cleaning up
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// Exit codes of the command.
const (
	exitOK          = 0
	exitFailed      = 1   // something went wrong while it ran
	exitUsage       = 2   // the command line makes no sense
	exitRefused     = 3   // the machine does not allow what is needed
	exitInterrupted = 130 // a signal came before the work was done
)

const about = `barevif gives a Go program a Xen paravirtual network card of its own.

A card (a vif) has two ends in two domains, which share rings and pages:

  frontend   belongs to the appliance: a Go program that owns the card and brings
             its own TCP/IP. Here: "serve"; "attach" hands the card to its kernel.
  backend    belongs to the driver domain, and joins the card to a network: a TAP
             of its kernel, or an interface that is there. Here: "back".
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

const exitCodes = `
Exit status: 0 success, 1 failure, 2 wrong usage, 3 the machine does not allow
what is needed, 130 interrupted before the work was done.
`

// program is the common part of all subcommands.
type program struct {
	stdout, stderr io.Writer
	verbose        int
}

// log returns a logger at level warn; -v lowers the level to info, -vv to debug.
func (p *program) log() *slog.Logger {
	level := slog.LevelWarn
	switch {
	case p.verbose == 1:
		level = slog.LevelInfo
	case p.verbose > 1:
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(p.stderr, &slog.HandlerOptions{Level: level}))
}

// root builds the root command.
func (p *program) root() *cobra.Command {
	root := &cobra.Command{
		Use:           "barevif",
		Short:         "A Xen paravirtual network card for Go programs",
		Long:          about,
		Example:       examples,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetOut(helpOutput{p})
	root.SetErr(p.stderr)
	root.PersistentFlags().CountVarP(&p.verbose, "verbose", "v", "log to stderr what happens; twice: in detail")
	root.SetHelpTemplate(root.HelpTemplate() + exitCodes)
	for _, add := range []func(*program) *cobra.Command{demoCommand, hostCommand, backCommand, serveCommand, attachCommand, checkCommand, statCommand, xenCommand, benchCommand, versionCommand} {
		root.AddCommand(add(p))
	}
	root.SetFlagErrorFunc(flagError)
	root.SetHelpCommand(helpCommand())
	return root
}

// run runs the command line and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	p := &program{stdout: stdout, stderr: stderr}
	root := p.root()
	root.SetArgs(args)
	started := false
	noteStart(root, &started)
	cmd, err := root.ExecuteContextC(ctx)
	if _, _, unknown := root.Find(args); err != nil && !started && unknown != nil {
		err = unknownCommand(root, firstWord(args))
	}
	return p.report(ctx, cmd, err, started)
}

// noteStart makes cmd set *started when its work begins. An error before that is an error of
// the command line.
func noteStart(cmd *cobra.Command, started *bool) {
	if do := cmd.RunE; do != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			*started = true
			return do(cmd, args)
		}
	}
	for _, c := range cmd.Commands() {
		noteStart(c, started)
	}
}

// report prints err with its advice and returns the exit code.
func (p *program) report(ctx context.Context, cmd *cobra.Command, err error, started bool) int {
	if err == nil {
		return exitOK
	}
	if p.outputGone(err) {
		return exitOK
	}
	help := cmd.CommandPath() + " --help"
	if a, ok := errors.AsType[*advice](err); !started && !ok {
		err = &advice{err: err, usage: true}
	} else if !started {
		a.usage = true
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		fmt.Fprintf(p.stderr, "%s: interrupted\n", cmd.CommandPath())
		return exitInterrupted
	}
	fmt.Fprintf(p.stderr, "%s: %v\n", cmd.CommandPath(), err)
	code := exitFailed
	if a, ok := errors.AsType[*advice](err); ok {
		fmt.Fprintf(p.stderr, "  next: %s\n", cmp.Or(a.next, help))
		if a.usage {
			code = exitUsage
		} else if a.refused {
			code = exitRefused
		}
	}
	return code
}

// advice is an error with advice on what to do next.
type advice struct {
	err     error
	next    string // the advice; "" refers to the help of the command
	refused bool   // the machine does not allow it
	usage   bool   // a value on the command line is wrong
}

func (a *advice) Error() string { return a.err.Error() }
func (a *advice) Unwrap() error { return a.err }

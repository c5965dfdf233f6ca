// Package cli is what the commands of this project have in common: errors that say what to
// do next, flags that say which values they take, and exit codes.
package cli

import (
	"cmp"
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes of a command.
const (
	ExitOK          = 0
	ExitFailed      = 1   // something went wrong while it ran
	ExitUsage       = 2   // the command line makes no sense
	ExitRefused     = 3   // the machine does not allow what is needed
	ExitInterrupted = 130 // a signal came before the work was done
)

const exitCodes = `
Exit status: 0 success, 1 failure, 2 wrong usage, 3 the machine does not allow
what is needed, 130 interrupted before the work was done.
`

// Program is the common part of all subcommands.
type Program struct {
	Stdout, Stderr io.Writer
	Verbose        int
	Format         LogFormat
	sayMu          sync.Mutex // guards Stdout in Say
	helpErr        error      // of writing what cobra prints
}

// Main runs the command that build makes on the arguments of this process, until it
// ends or a signal does it, and ends the process.
func Main(build func(*Program) *cobra.Command) {
	signal.Ignore(syscall.SIGPIPE) // a closed output pipe must not keep us from cleaning up
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(Run(ctx, build, os.Args[1:], os.Stdout, os.Stderr))
}

// Run runs the command that build makes on args and returns the exit code.
func Run(ctx context.Context, build func(*Program) *cobra.Command, args []string, stdout, stderr io.Writer) int {
	p := &Program{Stdout: stdout, Stderr: stderr}
	root := p.Command(build)
	root.SetArgs(args)
	started := false
	root.InitDefaultCompletionCmd(args...)
	completionCommand(root)
	noteStart(root, &started)
	cmd, err := root.ExecuteContextC(ctx)
	if _, _, unknown := root.Find(args); err != nil && !started && unknown != nil {
		err = unknownCommand(root, firstWord(args))
	}
	if err == nil && p.helpErr != nil {
		err, started = p.helpErr, true
	}
	return p.report(ctx, cmd, err, started)
}

// Command returns the command that build makes, with the flags, the help and the errors
// that all commands have.
func (p *Program) Command(build func(*Program) *cobra.Command) *cobra.Command {
	root := build(p)
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetOut(helpOutput{p})
	root.SetErr(p.Stderr)
	root.PersistentFlags().CountVarP(&p.Verbose, "verbose", "v", "log to stderr what happens; twice: in detail")
	p.registerFormat(root)
	root.SetHelpTemplate(root.HelpTemplate() + exitCodes)
	root.SetFlagErrorFunc(flagError)
	root.SetHelpCommand(helpCommand())
	return root
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
func (p *Program) report(ctx context.Context, cmd *cobra.Command, err error, started bool) int {
	if err == nil {
		return ExitOK
	}
	if p.outputGone(err) {
		return ExitOK
	}
	help := cmd.CommandPath() + " --help"
	if a, ok := errors.AsType[*Advice](err); !started && !ok {
		err = &Advice{Err: err, Usage: true}
	} else if !started {
		a.Usage = true
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		p.fail(cmd.CommandPath(), "interrupted", "", ExitInterrupted)
		return ExitInterrupted
	}
	code, next := ExitFailed, ""
	if a, ok := errors.AsType[*Advice](err); ok {
		next = cmp.Or(a.Next, help)
		if a.Usage {
			code = ExitUsage
		} else if a.Refused {
			code = ExitRefused
		}
	}
	p.fail(cmd.CommandPath(), err.Error(), next, code)
	return code
}

// Advice is an error with advice on what to do next.
type Advice struct {
	Err     error
	Next    string // the advice; "" refers to the help of the command
	Refused bool   // the machine does not allow it
	Usage   bool   // a value on the command line is wrong
}

func (a *Advice) Error() string { return a.Err.Error() }
func (a *Advice) Unwrap() error { return a.Err }

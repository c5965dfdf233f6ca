package cli

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// BadValue is the error for an invalid value of a flag. want says what is valid, after "not".
func BadValue(flag, value, want string) error {
	return &Advice{Err: fmt.Errorf("--%s %q: not %s", flag, value, want), Usage: true}
}

// DomainNumber describes the values of --dom. 32752 is hypercall.DomSelf.
const DomainNumber = "the number of a domain from 1 to 32751"

// allowedBy describes the values of a flag, by name, if its type alone says too little.
var allowedBy = map[string]string{
	"dom":   DomainNumber,
	"port":  "a port from 1 to 65535",
	"check": "a port from 1 to 65535, or 0 for none",
}

// allowed describes the values that the flag takes. cause is why a value was refused.
func allowed(f *pflag.Flag, cause error) string {
	if want, ok := allowedBy[f.Name]; ok {
		return want
	}
	switch f.Value.Type() {
	case "uint16":
		return "a number from 0 to 65535"
	case "int", "count":
		return "a number"
	case "float64":
		return "a number such as 0.5"
	case "duration":
		return "a time such as 500ms, 2s or 1m"
	case "bool":
		return "true or false"
	}
	return cause.Error()
}

// flagError turns an error of pflag into one in this program's words. For a flag that cmd
// had once, like "--plot", its Annotations say what to use now.
func flagError(cmd *cobra.Command, err error) error {
	if e, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		return BadValue(e.GetFlag().Name, e.GetValue(), allowed(e.GetFlag(), e.Unwrap()))
	}
	if e, ok := errors.AsType[*pflag.ValueRequiredError](err); ok {
		_, usage := pflag.UnquoteUsage(e.GetFlag())
		return &Advice{Err: fmt.Errorf("--%s needs a value: %s", e.GetFlag().Name, usage), Usage: true}
	}
	if e, ok := errors.AsType[*pflag.NotExistError](err); ok {
		name := "--" + e.GetSpecifiedName()
		if len(e.GetSpecifiedShortnames()) > 0 {
			name = "-" + e.GetSpecifiedName()[:1]
		}
		return &Advice{Err: fmt.Errorf("%q is no flag of %q", name, cmd.CommandPath()), Next: cmp.Or(cmd.Annotations[name], flagsOf(cmd)), Usage: true}
	}
	if e, ok := errors.AsType[*pflag.InvalidSyntaxError](err); ok {
		return &Advice{Err: fmt.Errorf("%q is no flag of %q", e.GetSpecifiedFlag(), cmd.CommandPath()), Next: flagsOf(cmd), Usage: true}
	}
	return err
}

func flagsOf(cmd *cobra.Command) string {
	var names []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if !f.Hidden {
			names = append(names, "--"+f.Name)
		}
	})
	return fmt.Sprintf("%s --help explains its flags: %s", cmd.CommandPath(), strings.Join(names, " "))
}

// Exclusive makes cmd refuse more than one of the flags.
func Exclusive(cmd *cobra.Command, names ...string) {
	cmd.MarkFlagsMutuallyExclusive(names...) // for shell completion
	before := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		var given []string
		for _, name := range names {
			if f := cmd.Flags().Lookup(name); f != nil && f.Changed {
				given = append(given, fmt.Sprintf("--%s %q", name, f.Value))
			}
		}
		if len(given) > 1 {
			return &Advice{
				Err:   fmt.Errorf("%s: only one of them can be given", strings.Join(given, " and ")),
				Next:  "leave out all of them but one; " + cmd.CommandPath() + " --help explains them",
				Usage: true,
			}
		}
		if before != nil {
			return before(cmd, args)
		}
		return nil
	}
}

// Arguments allows up to most arguments.
func Arguments(most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) <= most:
			return nil
		case cmd.HasAvailableSubCommands():
			return unknownCommand(cmd, args[0])
		case most == 0:
			return &Advice{Err: fmt.Errorf("%q: %q takes flags alone", args[0], cmd.CommandPath()), Next: flagsOf(cmd), Usage: true}
		}
		return &Advice{Err: fmt.Errorf("%q: %q takes one argument at most", args[most], cmd.CommandPath()), Next: cmd.UseLine(), Usage: true}
	}
}

// OneArgument requires exactly one argument. next says where the user finds it.
func OneArgument(name, next string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return &Advice{Err: fmt.Errorf("%s is missing", name), Next: next, Usage: true}
		}
		return Arguments(1)(cmd, args)
	}
}

// unknownCommand is the error for an unknown command. It suggests similar commands of
// parent, or lists all. For a command that parent had once, its Annotations say what to use
// now.
func unknownCommand(parent *cobra.Command, name string) error {
	err := fmt.Errorf("%q is no command of %q", name, parent.CommandPath())
	if now, ok := parent.Annotations[name]; ok {
		return &Advice{Err: err, Next: now, Usage: true}
	}
	parent.SuggestionsMinimumDistance = 2
	like := parent.SuggestionsFor(name)
	next := fmt.Sprintf("%s --help explains its commands:", parent.CommandPath())
	if len(like) > 0 {
		next = "did you mean"
	} else {
		for _, c := range parent.Commands() {
			if c.IsAvailableCommand() {
				like = append(like, c.Name())
			}
		}
	}
	next += " " + strings.Join(Quoted(like), ", ")
	if strings.HasPrefix(next, "did") {
		next += "?"
	}
	return &Advice{Err: err, Next: next, Usage: true}
}

// completionCommand gives cobra's completion command an error for a shell that it does not know.
func completionCommand(root *cobra.Command) {
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			c.Args = Arguments(0)
			c.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		}
	}
}

// helpCommand is cobra's help command with an error for an unknown command.
func helpCommand() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "Explain a command",
		RunE: func(c *cobra.Command, args []string) error {
			cmd, rest, err := c.Root().Find(args)
			if err != nil || cmd.HasAvailableSubCommands() && len(rest) > 0 {
				if cmd == nil {
					cmd, rest = c.Root(), args
				}
				return unknownCommand(cmd, rest[0])
			}
			cmd.InitDefaultHelpFlag()
			return cmd.Help()
		},
	}
}

// firstWord returns the first argument that is not a flag.
func firstWord(args []string) string {
	i := slices.IndexFunc(args, func(a string) bool { return !strings.HasPrefix(a, "-") })
	if i < 0 {
		return ""
	}
	return args[i]
}

// Quoted puts names in quotation marks, so that none reads like a number.
func Quoted(names []string) (out []string) {
	for _, n := range names {
		out = append(out, fmt.Sprintf("%q", n))
	}
	return out
}

// ListenRefused adds advice to the error of listening at addr. flag is the flag for the
// address.
func ListenRefused(err error, addr, flag string) error {
	a := &Advice{Err: fmt.Errorf("listen at %s: %w", addr, Bare(err)), Next: "name another with --" + flag}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		a.Err = fmt.Errorf("another program listens at %s already", addr)
		a.Next = `end it ("ss -lntup" names it), or name another port with --` + flag
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		a.Err = fmt.Errorf("%s is no address of this machine", addr)
		a.Next = `"ip -brief address" lists its addresses`
	case errors.Is(err, fs.ErrPermission):
		a.Refused = true
		a.Next = "ports below 1024 are for root: name another with --" + flag
	}
	return a
}

// Bare returns the error of a system call without the wrapping of package net.
func Bare(err error) error {
	if e, ok := errors.AsType[*os.SyscallError](err); ok {
		return e.Err
	}
	return err
}

// outputGone reports whether err means that the reader of our output has ended, as "head"
// does once it has enough lines.
func (p *Program) outputGone(err error) bool {
	out, ok := p.Stdout.(*os.File)
	if !ok || !errors.Is(err, syscall.EPIPE) {
		return false
	}
	e, ok := errors.AsType[*fs.PathError](err)
	return ok && e.Path == out.Name()
}

// helpOutput is the writer for what cobra prints, such as the help. Cobra prints a write error
// itself and goes on, so helpOutput keeps the first one, and Run returns it. A reader that has
// ended, such as head, is no error.
type helpOutput struct{ p *Program }

func (h helpOutput) Write(b []byte) (int, error) {
	if h.p.helpErr == nil {
		if _, err := h.p.Stdout.Write(b); !h.p.outputGone(err) {
			h.p.helpErr = err
		}
	}
	return len(b), nil
}

// UnknownHost is the error for a name that resolves to no address.
func UnknownHost(e *net.DNSError) error {
	return &Advice{Err: fmt.Errorf("no host %q is known", e.Name), Next: "give its address, such as 10.9.0.2", Usage: true}
}

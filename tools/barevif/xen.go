package main

import (
	"errors"
	"fmt"

	"barevif/hypercall/xendev"
	"barevif/tools/cli"
	"barevif/tools/xenhost"

	"github.com/spf13/cobra"
)

func xenCommand(p *cli.Program) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "xen",
		Short: "Report on the Xen domain this machine is",
		Long: `xen prints where it runs: Xen's version, this domain's number and kind, the
modules and device nodes a card needs, grant frames and ports in use, limits, and
the vifs of this domain with who owns each. What cannot be read says why.

Two things it can do with a vif: take it from the kernel's xen-netfront, so that a
program may own it, and release it to the kernel again. Both need root.`,
		Example: `  barevif xen
  barevif xen take 0
  barevif xen release 0`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			r := xenhost.Inspect(cmd.Context(), xendev.Config{})
			fmt.Fprint(p.Stdout, r.String())
			if errors.Is(r.Domain.Err, xendev.ErrNotXen) {
				return notXen(xendev.ErrNotXen)
			}
			return nil
		},
	}
	for _, c := range []struct {
		use, short string
		do         func(xendev.Config, string) error
		owned      bool // it is for vifs of the kernel's driver
	}{
		{"take ID", "Take vif ID of this domain from the kernel's driver", xenhost.Take, true},
		{"release ID", "Give vif ID of this domain to the kernel's driver", xenhost.Release, false},
	} {
		cmd.AddCommand(&cobra.Command{
			Use: c.use, Short: c.short, Args: cli.OneArgument("the ID of a vif", `"barevif xen" lists them`),
			ValidArgsFunction: completeXen(c.owned),
			RunE:              func(_ *cobra.Command, args []string) error { return notXen(c.do(xendev.Config{}, args[0])) },
		})
	}
	return cmd
}

// notXen gives an error for a machine that is no Xen domain advice, and returns any other as it is.
func notXen(err error) error {
	if !errors.Is(err, xendev.ErrNotXen) {
		return err
	}
	return &cli.Advice{Err: err, Next: `an emulated one needs nothing: "barevif demo"`, Refused: true}
}

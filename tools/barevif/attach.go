package main

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
)

func attachCommand(p *cli.Program) *cobra.Command {
	a := attach{front: front{Program: p, offload: true}}
	cmd := &cobra.Command{
		Use:   "attach",
		Short: "Be a guest: own a vif and give it to the kernel as a TAP",
		Long: `attach connects to a vif of its domain and joins it to a TAP, until a signal ends it:
an interface of this machine's kernel with the vif's MAC and MTU, for whatever uses
the kernel's TCP/IP. It needs CAP_NET_ADMIN.

When the backend goes, attach waits and connects again when one comes back. The TAP
stays meanwhile. If the vif was plugged again with another MAC or MTU, the TAP gets
those.

On a real Xen (--xen) the kernel's xen-netfront must not own the vif; --take takes
it away from it.`,
		Example: `  barevif attach --addr 10.9.0.2/24
  barevif attach --xen --take --vif 1 --tap card1 --addr 192.0.2.7/24`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.run(cmd.Context()) },
	}
	a.register(cmd)
	cmd.Flags().StringVar(&a.tap, "tap", "xvif%i", "`name` of the TAP: %i is the vif")
	cmd.Flags().StringVar(&a.addr, "addr", "", "`address` of this machine on it: IP/BITS")
	return cmd
}

type attach struct {
	front
	tap, addr string
}

func (a *attach) run(ctx context.Context) error {
	var addr netip.Prefix
	if a.addr != "" {
		var err error
		if addr, err = netip.ParsePrefix(a.addr); err != nil || addr.Addr().Is4In6() {
			return cli.BadValue("addr", a.addr, "an address with a prefix, like 10.9.0.2/24")
		}
	}
	return a.own(ctx, func(_ *domain.Domain, dev *pvnet.Device) (*use, error) { return a.join(dev, addr) })
}

// join joins the vif to a new TAP, until the device ends.
func (a *attach) join(dev *pvnet.Device, addr netip.Prefix) (*use, error) {
	name := strings.ReplaceAll(a.tap, "%i", dev.ID())
	tap, err := openTAP(link.TAPConfig{Name: name, MTU: dev.MTU()})
	if err != nil {
		return nil, linkRefused(err)
	}
	if err = setMAC(tap.Name(), dev.MAC()); err == nil {
		err = addAddress(tap.Name(), addr)
	}
	if err != nil {
		tap.Close()
		return nil, err
	}
	var joint link.Joint
	failed, ended := make(chan error, 1), make(chan struct{})
	go func() {
		defer close(ended)
		// No context: the joint ends only with the device.
		if err := joint.Run(context.Background(), dev, tap); err != nil {
			failed <- fmt.Errorf("vif %s lost its network: %w", a.vif, err)
		}
	}()
	return &use{
		says:   fmt.Sprintf("the kernel has it as %s", tap.Name()),
		failed: failed,
		renew: func() error {
			if err := setMAC(tap.Name(), dev.MAC()); err != nil {
				return err
			}
			return setMTU(tap.Name(), dev.MTU())
		},
		close: func() error {
			<-ended
			st := dev.Stats()
			fmt.Fprintf(a.Stdout, "vif %s: gone; %s\n", a.vif, tally("backend", &st, joint.Stats()))
			return tap.Close()
		},
	}, nil
}

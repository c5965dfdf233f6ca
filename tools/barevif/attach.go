package main

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/pvnet/netif"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
)

func attachCommand(p *cli.Program) *cobra.Command {
	a := attach{front: front{Program: p, offload: true}}
	cmd := &cobra.Command{
		Use:   "attach",
		Short: "Be a guest: own vifs and give each to the kernel as a TAP",
		Long: `attach connects to a vif of its domain and joins it to a TAP, until a signal ends it:
an interface of this machine's kernel with the vif's MAC and MTU, for whatever uses
the kernel's TCP/IP. It needs CAP_NET_ADMIN.

With --vif several times it does that for each vif, with a TAP of its own; --addr then
says whose it is: --addr 1=10.9.1.2/24. ` + severalVifs + `

When the backend goes, attach waits and connects again when one comes back. The TAP
stays, without a carrier meanwhile, and so it does while the backend says that the
network behind it is gone; when it comes back the addresses of the TAP are announced
to the neighbours. If the vif gets another MTU, or is plugged again with another MAC,
the TAP gets those.

With --addr auto the TAP gets the addresses that the toolstack has for the guest of the
vif, which are ip= in a domain's configuration. When the toolstack changes them, the TAP
gets the new ones and loses those that attach gave it before; addresses of others stay.

An upgrade loses no frame: attach --take-over takes the vif over from the attach that has
it now, within milliseconds, and that one ends with status 0. The TAP stays, with its
addresses and connections; the backend notices nothing. SIGUSR2 makes a running attach
start itself again in this way: with the file that is at its program's path now, and
the same arguments. If the new one cannot take a vif, the old one says why and goes
on.

On a real Xen (--xen) the kernel's xen-netfront must not own the vif; --take takes
it away from it.`,
		Example: `  barevif attach --addr 10.9.0.2/24
  barevif attach --vif 0 --vif 1 --addr 0=10.9.0.2/24 --addr 1=10.9.1.2/24
  barevif attach --xen --addr auto
  barevif attach --addr 10.9.0.2/24 --take-over
  barevif attach --xen --take --vif 1 --tap card1 --addr 192.0.2.7/24`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.run(cmd.Context()) },
	}
	a.register(cmd)
	cmd.Flags().StringVar(&a.tap, "tap", "xvif"+vifMark, "`name` of each TAP: "+vifMark+" is the vif")
	cmd.Flags().StringArrayVar(&a.addrs, "addr", nil, "`address` of this machine on a TAP: IP/BITS; auto: those that the toolstack has for it, auto/BITS: with BITS where it says none; default: no address. Of several vifs: ID=IP/BITS; repeatable")
	cli.FixedValues(cmd, "addr", autoAddr)
	completes(cmd, completeNothing, "tap")
	return cmd
}

type attach struct {
	front
	tap   string
	addrs []string
}

// addresses returns the addresses that --addr has, by vif.
func (a *attach) addresses() (map[string]autoAddress, error) {
	if len(a.vifs) > 1 && !strings.Contains(a.tap, vifMark) {
		return nil, &cli.Advice{
			Err:  fmt.Errorf("--tap %q: one name for %d TAPs", a.tap, len(a.vifs)),
			Next: "put " + vifMark + " into it, which is the vif: --tap " + a.tap + vifMark, Usage: true,
		}
	}
	for _, vif := range a.vifs {
		if name := strings.ReplaceAll(a.tap, vifMark, vif); !isInterfaceName(name) {
			return nil, cli.BadValue("tap", a.tap, "the name of an interface, 1 to 15 characters with "+vifMark+" replaced")
		}
	}
	values, err := (&vifValues{flag: "addr", given: a.addrs}).of(a.vifs, isLiteral)
	if err != nil {
		return nil, err
	}
	addrs := make(map[string]autoAddress)
	for vif, s := range values {
		if s == "" { // no address
			continue
		}
		if addrs[vif], err = parseAuto(s); err != nil {
			return nil, err
		}
	}
	return addrs, nil
}

func (a *attach) run(ctx context.Context) error {
	addrs, err := a.addresses()
	if err != nil {
		return err
	}
	return a.own(ctx, func(_ *domain.Domain, dev *pvnet.Device) (*use, error) {
		addr := addrs[dev.ID()]
		if !addr.on {
			return a.join(dev, dev.TakenFiles(), nil, addr.addr)
		}
		taken := dev.TakenFiles()
		g, err := addr.of(ctx, dev)
		if err != nil && len(taken) > 0 { // the vif works: an end would lose it
			a.Log().Error("the TAP of a vif that was taken over keeps its addresses, whatever the toolstack has, until attach is started anew", "vif", dev.ID(), "err", err)
			return a.join(dev, taken, nil)
		}
		if err != nil {
			return nil, err
		}
		if len(g.Addrs) == 0 {
			a.Log().Warn("the TAP gets no address: the toolstack has none for this vif", "vif", dev.ID(), "key", netif.KeyIP)
		}
		if g.Gateway.IsValid() {
			a.Log().Info("the toolstack names a router, to which attach makes no route", "vif", dev.ID(), "router", g.Gateway)
		}
		return a.join(dev, taken, &addr, g.Addrs...)
	})
}

// join joins the vif to a new TAP, or to the one that was taken over with it, until the device
// ends. The TAP has the addresses, and if auto is not nil those that the toolstack has later in
// their place.
func (a *attach) join(dev *pvnet.Device, taken []*os.File, auto *autoAddress, addrs ...netip.Prefix) (*use, error) {
	tap, given, err := a.open(dev, taken, auto != nil, addrs)
	if err != nil {
		return nil, err
	}
	var joint link.Joint
	failed, ended := make(chan error, 1), make(chan struct{})
	var following sync.WaitGroup
	if auto != nil {
		following.Go(func() { a.followAddresses(dev, &joint, auto, given) })
	}
	go func() {
		defer close(ended)
		// No context: the joint ends only with the device.
		if err := joint.Run(context.Background(), dev, queuesOfLink(tap)...); err != nil {
			failed <- fmt.Errorf("vif %s lost its network: %w", dev.ID(), err)
		}
	}()
	return &use{
		says:   fmt.Sprintf("the kernel has it as %s%s", tap.Name(), addressed(addrs)),
		failed: failed,
		// Not while the joint is held: another process is about to have the TAP. If it does not
		// take it, the changes come then.
		renew: func() (err error) {
			joint.Change(context.Background(), dev, func() {
				if err = setMAC(tap.Name(), dev.MAC()); err == nil {
					err = setMTU(tap.Name(), dev.MTU())
				}
			})
			return err
		},
		link: func(up bool) (err error) {
			joint.Change(context.Background(), dev, func() {
				err = tap.SetCarrier(up)
				if up && err == nil {
					err = announce(tap.Name())
				}
			})
			return err
		},
		close: func() error {
			<-ended
			following.Wait()
			st, end := dev.Stats(), "gone"
			if joint.Held() {
				end = "handed over"
			}
			a.Say("vif %s: %s; %s", dev.ID(), end, tally("backend", &st, joint.Stats()))
			return tap.Close()
		},
		hold: joined(dev, tap, &joint),
	}, nil
}

// addressed says which addresses an interface has, as the end of a line.
func addressed(addrs []netip.Prefix) string {
	if len(addrs) == 0 || !addrs[0].IsValid() {
		return ""
	}
	return ", " + join(addrs)
}

// followAddresses gives the TAP the addresses that the toolstack has for it later, in place of
// those that were given to it, until the device ends.
func (a *attach) followAddresses(dev *pvnet.Device, joint *link.Joint, auto *autoAddress, given *tapAddresses) {
	auto.follow(context.Background(), dev, a.Log(), func(g pvnet.GuestAddresses) (err error) {
		changed := false
		joint.Change(context.Background(), dev, func() { changed, err = given.set(g.Addrs) })
		if changed {
			a.Say("vif %s: the toolstack has other addresses for it: %s has %s", dev.ID(), given.tap, cmp.Or(join(given.addrs), "none of them"))
		}
		return err
	})
}

// open returns the TAP that was taken over with a vif, or a new one, and which
// addresses this program has given to it. follows says that they are to follow the toolstack.
func (a *attach) open(dev *pvnet.Device, taken []*os.File, follows bool, addrs []netip.Prefix) (*tap, *tapAddresses, error) {
	if len(taken) > 0 {
		t, err := adoptFor(dev, taken)
		if err == nil && !follows {
			return t, nil, nil
		}
		if err == nil {
			// The other process has given the TAP the addresses: they are ours from now on.
			given, err := adoptAddresses(t.Name(), addrs)
			if err != nil {
				a.Log().Error("a TAP that was taken over does not have the addresses of the toolstack", "vif", dev.ID(), "err", err)
			}
			return t, given, nil
		}
		a.Log().Warn("the TAP of a vif that was taken over cannot be used, and is opened anew", "vif", dev.ID(), "err", err)
	}
	name := strings.ReplaceAll(a.tap, vifMark, dev.ID())
	t, err := openTAP(link.TAPConfig{Name: name, MTU: dev.MTU()}, dev.Queues())
	if err != nil {
		return nil, nil, linkRefused(err)
	}
	given := &tapAddresses{tap: t.Name()}
	if err = setMAC(t.Name(), dev.MAC()); err == nil {
		_, err = given.set(addrs)
	}
	if err != nil {
		t.Close()
		return nil, nil, err
	}
	return t, given, nil
}

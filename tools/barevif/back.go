package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"barevif/pvnet"
	"barevif/pvnet/link"
	"barevif/tools/cli"
	"barevif/tools/domain"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func backCommand(p *cli.Program) *cobra.Command {
	b := back{Program: p}
	cmd := &cobra.Command{
		Use:   "back",
		Short: "Be the driver domain: serve vifs, each joined to a TAP or an interface",
		Long: `back serves every vif whose backend is this domain, until a signal ends it, and
joins each to a network of this machine's kernel:

  a TAP        the default: an interface made for the vif, "vif1.0" for vif 0 of
               domain 1. Give it an address with --addr, or put it on a bridge with
               --bridge. It needs CAP_NET_ADMIN.
  --packet IF  the interface IF, which then carries the vif's frames beside its own.
               It needs CAP_NET_RAW. For one vif; IF should have no address.

SIGUSR1 ends it without closing the vifs: the next back goes on where this one
stopped, and the frontends see a pause.

When a frontend goes and comes back, or the vif is taken away and added again, back
goes on. Started again after it was killed, it finds its vifs and reconnects them.`,
		Example: `  barevif back --addr 10.9.0.1/24
  barevif back --addr 1.0=10.9.0.1/24 --addr 3.0=10.9.1.1/24
  barevif back --tap card%d --bridge xenbr0
  barevif back --packet eth1
  barevif back --xen --type barevif`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return b.run(cmd.Context()) },
	}
	b.domain.Register(cmd, 2)
	b.counters.register(cmd)
	cmd.Flags().StringVar(&b.tap, "tap", "vif%d.%i", "`name` of each TAP: %d is the frontend's domain, %i the vif")
	cmd.Flags().StringArrayVar(&b.addrs, "addr", nil, "`address` of this machine on a vif's TAP: DOM.ID=IP/BITS, or IP/BITS for the first that connects; repeatable")
	cmd.Flags().StringVar(&b.bridge, "bridge", "", "put the TAPs on this `bridge`")
	cmd.Flags().StringVar(&b.packet, "packet", "", "join the vif to this `interface` instead of a TAP")
	cmd.Flags().StringVar(&b.typ, "type", "vif", "backend `type` to serve; one of its own keeps the kernel's netback away")
	cmd.Flags().IntVar(&b.queues, "queues", 1, "`queues` to offer per vif")
	cmd.Flags().BoolVar(&b.remove, "remove", false, "remove a vif's directory once it was taken away, where no xl devd does")
	cli.Exclusive(cmd, "packet", "addr")
	cli.Exclusive(cmd, "packet", "bridge")
	cli.Exclusive(cmd, "packet", "tap")
	return cmd
}

type back struct {
	*cli.Program
	domain                   domain.Flags
	counters                 counterFlag
	tap, bridge, packet, typ string
	addrs                    []string
	queues                   int
	remove                   bool
	slog                     *slog.Logger

	printMu  sync.Mutex // vifs come and go at any time
	prefixMu sync.Mutex
	prefix   map[string]netip.Prefix // guarded by prefixMu: by vif, like "1.0"; "" is for the first vif that connects
}

func (b *back) run(ctx context.Context) error {
	if b.queues < 1 || b.queues > 64 {
		return cli.BadValue("queues", strconv.Itoa(b.queues), "a number from 1 to 64")
	}
	if err := b.parseAddrs(); err != nil {
		return err
	}
	counters, err := b.counters.store()
	if err != nil {
		return err
	}
	if err := b.probe(); err != nil {
		return err
	}
	dom, err := b.domain.Open(ctx)
	if err != nil {
		return err
	}
	defer dom.End()
	b.slog = b.Log()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	handover := make(chan os.Signal, 1)
	signal.Notify(handover, syscall.SIGUSR1)
	defer signal.Stop(handover)
	go func() {
		select {
		case <-handover:
			cancel(pvnet.ErrHandover)
		case <-ctx.Done():
		}
	}()

	b.say("domain %d serves vifs of type %s; a signal ends it", dom.ID(), b.typ)
	done := make(chan error, 1)
	go func() {
		done <- pvnet.Serve(ctx, dom, pvnet.ServeConfig{
			Config:  pvnet.Config{Queues: b.queues, Offload: true, Counters: counters, Logger: b.slog},
			Type:    b.typ,
			Hotplug: true,
			Remove:  b.remove,
		}, func(dev *pvnet.Device) { b.serve(ctx, dev) })
	}()
	select {
	case err = <-done:
	case <-dom.Gone:
		// The xenstore is gone, so the vifs cannot be closed there. But they must end:
		// the pins of their counters would outlive this process.
		cancel(domain.ErrHostGone)
		return dom.Lost(b.say, done)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, pvnet.ErrHandover) {
		return nil // a signal
	}
	return err
}

func (b *back) say(format string, args ...any) {
	b.printMu.Lock()
	defer b.printMu.Unlock()
	fmt.Fprintf(b.Stdout, format+"\n", args...)
}

// parseAddrs reads --addr.
func (b *back) parseAddrs() error {
	b.prefix = make(map[string]netip.Prefix)
	for _, s := range b.addrs {
		vif, addr, ok := strings.Cut(s, "=")
		if !ok {
			vif, addr = "", s
		} else if dom, id, two := strings.Cut(vif, "."); !two || !isNumber(dom) || !isNumber(id) {
			return cli.BadValue("addr", s, "for a vif DOM.ID")
		}
		p, err := netip.ParsePrefix(addr)
		if err != nil || !p.Addr().IsValid() || p.Addr().Is4In6() {
			return cli.BadValue("addr", s, "an address with a prefix, like 10.9.0.1/24")
		}
		if _, twice := b.prefix[vif]; twice {
			return cli.BadValue("addr", s, "the only address of that vif; name the vif: 1.0="+addr)
		}
		b.prefix[vif] = p
	}
	return nil
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}

// probe checks that this process may open links, before a vif needs one.
func (b *back) probe() error {
	if b.packet != "" {
		l, err := link.OpenPacket(b.packet)
		if err != nil {
			return linkRefused(err)
		}
		return l.Close()
	}
	if b.bridge != "" {
		if l, err := netlink.LinkByName(b.bridge); err != nil {
			return &cli.Advice{Err: fmt.Errorf("bridge %s: %w", b.bridge, err), Next: "make it: ip link add " + b.bridge + " type bridge"}
		} else if l.Type() != "bridge" {
			return &cli.Advice{Err: fmt.Errorf("%s is a %s, no bridge", b.bridge, l.Type()), Next: "name a bridge with --bridge"}
		}
	}
	l, err := link.OpenTAP(link.TAPConfig{Name: "barevif%d"})
	if err != nil {
		return linkRefused(err)
	}
	return l.Close()
}

// linkRefused adds advice to the error of a link that could not be opened.
func linkRefused(err error) error {
	const setcap = `"setcap cap_net_admin,cap_net_raw+ep" on the built program`
	a := &cli.Advice{Err: err, Next: "-v may say more"}
	node := false // whether the error is about /dev/net/tun, not about an interface
	if oe, ok := errors.AsType[*link.OpenError](err); ok && oe.Next != "" {
		bare := *oe
		bare.Next = "" // printed as a.next, not twice
		a.Err, a.Next = &bare, oe.Next
		node = oe.Step == "open /dev/net/tun"
	}
	switch {
	case errors.Is(err, unix.EACCES), node && errors.Is(err, unix.EPERM):
		// The mode of the node forbids it. The capabilities alone do not open the node,
		// and without them the opened node makes no TAP.
		a.Refused = true
		a.Next = "run as root, or let this user open it (chmod 0666 /dev/net/tun) and " + setcap + `; "barevif demo" needs neither`
	case errors.Is(err, unix.EPERM):
		a.Refused = true
		a.Next = "run as root, or " + setcap + `; "barevif demo" needs neither`
	case node:
		a.Refused = true
		a.Next += `; "barevif demo" needs no TAP`
	case errors.Is(err, unix.ENODEV):
		a.Next = `name an interface of this machine: "ip -brief link" lists them`
	}
	return a
}

// serve joins one vif to a link until the vif is removed or ctx ends. An error of this vif
// does not affect the others.
func (b *back) serve(ctx context.Context, dev *pvnet.Device) {
	vif := fmt.Sprintf("%d.%s", dev.Peer(), dev.ID())
	l, err := b.open(dev, vif)
	if err != nil {
		b.slog.Error("a vif has no network and is closed", "vif", vif, "err", err)
		dev.Disconnect()
		return
	}
	defer l.Close()
	b.say("vif %s: joined to %s, MTU %d; counters: %s", vif, l.Name(), l.MTU(), mirrored(dev))
	var following sync.WaitGroup
	following.Go(func() { b.follow(dev, vif, l.Name()) })
	var j link.Joint
	err = j.Run(ctx, dev, l)
	if err != nil && ctx.Err() == nil {
		b.slog.Error("a vif lost its network and is closed", "vif", vif, "err", err)
	}
	dev.Disconnect()
	following.Wait()
	st := dev.Stats()
	b.say("vif %s: gone; %s", vif, tally("frontend", &st, j.Stats()))
}

// follow prints the changes of the vif's link state until the device has ended.
func (b *back) follow(dev *pvnet.Device, vif, name string) {
	up := false
	for ev := range dev.Links(context.Background()) {
		switch {
		case ev.Up:
			if b.packet == "" {
				if err := addAddress(name, b.addressOf(vif, true)); err != nil {
					b.slog.Error("a vif's TAP has no address", "vif", vif, "err", err)
				}
				if err := setMTU(name, ev.MTU); err != nil {
					b.slog.Error("a vif's TAP has another MTU than the vif", "vif", vif, "err", err)
				}
			}
			b.say("vif %s: connected to domain %d, MTU %d, %s", vif, dev.Peer(), ev.MTU, dev.Budget())
		case up:
			b.say("vif %s: down: %s", vif, ev.Reason)
		}
		up = ev.Up
	}
}

// mirrored says where other processes can read the counters of a device.
func mirrored(dev *pvnet.Device) string {
	kind, reason := dev.Counters().Backend()
	if reason != "" {
		return fmt.Sprintf("%s (%s)", kind, reason)
	}
	return kind
}

// open opens the link of a vif.
func (b *back) open(dev *pvnet.Device, vif string) (link.Link, error) {
	if b.packet != "" {
		return asLink(link.OpenPacket(b.packet))
	}
	name := strings.NewReplacer("%d", strconv.Itoa(int(dev.Peer())), "%i", dev.ID()).Replace(b.tap)
	tap, err := openTAP(link.TAPConfig{Name: name, MTU: dev.MTU()})
	if err != nil {
		return nil, linkRefused(err)
	}
	// The address that Linux's netback gives to each of its interfaces. A bridge takes the
	// lowest address of its ports. If that were a random one, a restart would change the
	// bridge's address, and neighbours that know the old one could not reach this machine.
	if err = setMAC(tap.Name(), dev.MAC()); err == nil {
		err = addAddress(tap.Name(), b.addressOf(vif, false))
	}
	if err == nil && b.bridge != "" {
		err = setBridge(tap.Name(), b.bridge)
	}
	if err != nil {
		tap.Close()
		return nil, err
	}
	return tap, nil
}

// addressOf returns the address for the vif's TAP, invalid if there is none. An address
// given without a vif goes to the first vif that connects without an address of its own,
// and stays with it: two interfaces with one address would be of no use.
func (b *back) addressOf(vif string, connected bool) netip.Prefix {
	b.prefixMu.Lock()
	defer b.prefixMu.Unlock()
	p, own := b.prefix[vif]
	if any, ok := b.prefix[""]; ok && connected && !own {
		delete(b.prefix, "")
		b.prefix[vif] = any
		return any
	}
	return p
}

func asLink[L link.Link](l L, err error) (link.Link, error) {
	if err != nil {
		return nil, linkRefused(err)
	}
	return l, nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"barevif/pvnet"
	"barevif/pvnet/handover"
	"barevif/pvnet/link"
	"barevif/tools/cli"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func backCommand(p *cli.Program) *cobra.Command {
	b := back{backend: backend{Program: p, name: "back"}, takeovers: takeovers{command: "back", pause: "send the other back SIGUSR1"}}
	cmd := &cobra.Command{
		Use:   "back",
		Short: "Be the driver domain: serve vifs, each joined to a TAP or an interface",
		Long: `back serves every vif whose backend is this domain, until a signal ends it, and
joins each to a network of this machine's kernel:

  a TAP        the default: an interface made for the vif, "vif1.0" for vif 0 of
               domain 1. Give it an address with --addr, or put it on a bridge with
               --bridge. It needs CAP_NET_ADMIN.
  --packet IF  the interface IF, which then carries the vif's frames beside its own.
               It needs CAP_NET_RAW. For one vif; IF should have no address. Frames
               take the vif's queues by their flow, or as the frontend asks.

Frames for a guest that takes none wait for --drain and are then dropped. If it takes
none for --stall, the carrier of its TAP goes off until it takes frames again. Other
guests notice nothing of it.

What the toolstack wrote about a vif, as xl's vif= has it, says more, and wins over
--tap, --bridge, and an --addr that names no vif:

  bridge      the TAP is put on it. While there is none of that name the vif does not
              connect: hotplug-status is "error", hotplug-error says why, and so does
              the log. It connects when the bridge is made. xenbr0, which libxl writes
              where it was told nothing, does not count beside --bridge or --addr.
  vifname     the TAP's name, if it is free
  script      vif-bridge, or none: as above. vif-route: the TAP has the address of
              gatewaydev, and a route to each address of ip. back runs no scripts: a vif
              with any other is refused, unless --bridge or --addr says what to do.
  mac         with --lock-mac the bridge takes frames of the guest from this address
              alone; otherwise it is checked, and a wrong one is a line in the log
  type        vif. A line in the log if there is an emulated card too
  ip          without vif-route, and gatewaydev: a line in the log, nothing more

A key that is not honoured is named in the log, once per vif; vlan is refused. --hotplug
says who sets TAPs up: keys, back as above; script, the script that the toolstack runs,
for which back waits as netback does; flags, back by its flags alone; auto, in domain 0,
where libxl runs it, the script if it is not vif-barevif, and elsewhere back.

The frontends learn what happens to that network. While the TAP, or the bridge it is
on, is set down, or the interface IF has no carrier, their vifs have none: back writes
the key "carrier". If the MTU of the TAP or of IF is changed, back writes "mtu" to both
ends' directories; and if the toolstack writes the vif's mtu, the TAP gets it.

An upgrade loses no frame: back --take-over takes the vifs over from the back that
serves them now, one after another and each within milliseconds, and that one ends
with status 0. TAPs stay, with their addresses and their places on a bridge. SIGUSR2
makes a running back start itself again in this way: with the file that is at its
program's path now, and the same arguments. If the new one cannot take a vif, the old
one says why and goes on with it until it ends.

SIGUSR1 ends it without closing the vifs: the next back goes on where this one
stopped, and the frontends see a pause.

When a frontend goes and comes back, or the vif is taken away and added again, back
goes on. Started again after it was killed, it finds its vifs and reconnects them.`,
		Example: `  barevif back --addr 10.9.0.1/24
  barevif back --addr 1.0=10.9.0.1/24 --addr 3.0=10.9.1.1/24
  barevif back --tap card%d --bridge xenbr0
  barevif back --packet eth1
  barevif back --xen
  barevif back --xen --type barevif
  barevif back --xen --bridge xenbr0 --take-over`,
		Args: cli.Arguments(0),
		RunE: func(cmd *cobra.Command, _ []string) error { return b.run(cmd.Context()) },
	}
	b.register(cmd)
	cmd.Flags().StringVar(&b.tap, "tap", "vif%d.%i", "`name` of each TAP: %d is the frontend's domain, %i the vif")
	cmd.Flags().StringArrayVar(&b.addrs, "addr", nil, "`address` of this machine on a vif's TAP: DOM.ID=IP/BITS, or IP/BITS for the first that connects; repeatable")
	cmd.Flags().StringVar(&b.bridge, "bridge", "", "put the TAPs on this `bridge`")
	cmd.Flags().StringVar(&b.packet, "packet", "", "join the vif to this `interface` instead of a TAP")
	cmd.Flags().StringVar(&b.hotplug, "hotplug", hotplugAuto, "`who` sets TAPs up: keys, script, flags, or auto as above")
	cmd.Flags().BoolVar(&b.lockMAC, "lock-mac", false, "hold the guest of a vif on a bridge to the vif's mac; Linux 5.18")
	b.takeovers.register(cmd, "take the vifs over from the back that serves them now, which then ends")
	cli.FixedValues(cmd, "hotplug", hotplugAuto, hotplugKeys, hotplugScript, hotplugFlags)
	completes(cmd, completeInterfaces, "packet", "bridge")
	completes(cmd, completeNothing, "tap", "addr")
	cli.Exclusive(cmd, "packet", "addr")
	cli.Exclusive(cmd, "packet", "bridge")
	cli.Exclusive(cmd, "packet", "tap")
	cli.Exclusive(cmd, "packet", "lock-mac")
	return cmd
}

type back struct {
	backend
	takeovers           takeovers
	tap, bridge, packet string
	hotplug             string
	lockMAC             bool
	addrs               []string
	network             interfaces

	prefixMu sync.Mutex
	prefix   map[string]netip.Prefix // guarded by prefixMu: by vif, like "1.0"; "" is for the first vif that connects
}

func (b *back) run(ctx context.Context) error {
	queues, counters, err := b.check()
	if err != nil {
		return err
	}
	switch b.hotplug {
	case hotplugAuto, hotplugKeys, hotplugScript, hotplugFlags:
	default:
		return cli.BadValue("hotplug", b.hotplug, "auto, keys, script or flags")
	}
	if !isInterfaceName(strings.NewReplacer("%d", "1", "%i", "0").Replace(b.tap)) {
		return cli.BadValue("tap", b.tap, "the name of an interface, 1 to 15 characters with %d and %i replaced")
	}
	if err := b.parseAddrs(); err != nil {
		return err
	}
	if err := b.probe(); err != nil {
		return err
	}
	b.slog = b.Log()
	b.domain.Beside = b.takeovers.takeOver
	dom, err := b.domain.Open(ctx)
	if err != nil {
		return err
	}
	defer dom.End()
	inspector, endInspect, err := b.inspect.listen(b.slog)
	if err != nil {
		return err
	}
	defer endInspect()
	file := fmt.Sprintf("back-%d-%s%s.handover", dom.ID(), strings.ReplaceAll(b.typ, "/", "_"), b.selection())
	if err := b.takeovers.begin(b.Say, b.slog, &b.domain, file, handover.Identity{Domain: dom.ID(), Type: b.typ}); err != nil {
		return err
	}
	takeOver, err := b.takeovers.dial(ctx, false)
	if err != nil {
		return err
	}
	defer b.takeovers.close()

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer b.network.follow(ctx, b.slog)()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1, syscall.SIGUSR2)
	defer signal.Stop(signals)
	go func() {
		for {
			select {
			case s := <-signals:
				if s == syscall.SIGUSR1 {
					cancel(pvnet.ErrHandover)
					return
				}
				b.takeovers.startSuccessor(b.slog)
			case <-ctx.Done():
				return
			}
		}
	}()

	go b.news.run(ctx)
	go b.takeovers.run(ctx, func() { cancel(pvnet.ErrHandover) })
	b.Say("domain %d serves vifs of type %s; a signal ends it", dom.ID(), b.typ)
	cfg := b.serveConfig(queues, counters, inspector)
	cfg.LendRx, cfg.TakeOver = true, takeOver
	return b.serveVifs(ctx, cancel, dom, cfg, b.serve)
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
		p, err := parseAddr(s, addr, "10.9.0.1/24")
		if err != nil {
			return err
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
	var j link.Joint
	ran := make(chan error, 1)
	run := func(l link.Link) { ran <- j.Run(ctx, dev, queuesOfLink(l)...) }
	taken := b.takenOver(dev, vif)
	if taken != nil { // at once: the vif stands still
		go run(taken)
	}
	l, p := b.attach(ctx, dev, vif, taken)
	if l == nil {
		dev.Disconnect()
		if taken != nil {
			<-ran
			taken.Close()
		}
		return
	}
	defer l.Close()
	if taken == nil {
		b.Say("vif %s: joined to %s, MTU %d%s; counters: %s", vif, l.Name(), l.MTU(), p, mirrored(dev))
	} else { // its counters come later
		b.Say("vif %s: taken over, joined to %s, MTU %d%s", vif, l.Name(), l.MTU(), p)
	}
	var following sync.WaitGroup
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	if i, err := net.InterfaceByName(l.Name()); err == nil { // else it is gone already, as Run finds
		watch := b.network.watch(i.Index, func(s interfaceState) { b.tell(dev, vif, s) })
		defer watch.end()
		following.Go(func() { b.followVif(inner, dev, vif, watch, p) })
		if p.bridge != "" {
			following.Go(func() { b.keepOnBridge(inner, vif, i.Index, p) })
		}
	}
	defer b.takeovers.add(joined(dev, l, &j))()
	if taken == nil {
		run(l)
	}
	err := <-ran
	if err != nil && ctx.Err() == nil {
		b.slog.Error("a vif lost its network and is closed", "vif", vif, "err", err)
	}
	dev.Disconnect()
	cancel()
	following.Wait()
	st := dev.Stats()
	end := "gone"
	if j.Held() {
		end = "handed over"
	}
	b.Say("vif %s: %s; %s", vif, end, tally("frontend", &st, j.Stats()))
}

// tell tells the frontend what has become of the interface behind its vif.
func (b *back) tell(dev *pvnet.Device, vif string, s interfaceState) {
	carrier := s.up
	if b.packet != "" {
		carrier = s.carrier
	}
	_ = dev.SetCarrier(carrier) // fails for a device that has ended
	if s.mtu == 0 || s.mtu == dev.MTU() {
		return
	}
	if err := dev.SetMTU(s.mtu); err != nil && !errors.Is(err, pvnet.ErrDisconnected) {
		b.slog.Error("a vif keeps its MTU", "vif", vif, "err", err)
	}
}

// followVif follows the vif's link state until the device has ended.
func (b *back) followVif(ctx context.Context, dev *pvnet.Device, vif string, tap *interfaceWatch, p plan) {
	b.follow(dev, vif, func(ev pvnet.LinkEvent) {
		if b.packet != "" {
			return
		}
		if err := tap.setMTU(ev.MTU); err != nil {
			b.slog.Error("a vif's TAP has another MTU than the vif", "vif", vif, "err", err)
		}
	}, func() {
		if b.packet == "" {
			b.adapt(vif, tap.index, p)
			b.recheck(ctx, dev, vif, p)
		}
	})
}

// adapt gives a TAP the address that it has only once the vif is connected.
func (b *back) adapt(vif string, index int, p plan) {
	name, err := nameOf(index)
	if err == nil && !p.keyed {
		err = addAddress(name, b.addressOf(vif, true))
	}
	if err != nil {
		b.slog.Error("a vif's TAP has no address", "vif", vif, "err", err)
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

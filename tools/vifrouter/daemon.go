package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
	"barevif/pvnet/router"
	"barevif/telemetry"
	"barevif/tools/vifrouter/config"
	"barevif/tools/vifrouter/dhcpd"
	"barevif/tools/vifrouter/dnsproxy"
	"barevif/tools/vifrouter/slaac"
)

// A daemon is a running router: the plane that moves frames, and beside it what gives vifs their
// addresses, answers guests, and follows the uplink and the configuration.
type daemon struct {
	ended atomic.Bool // close was called, so that the end of what listens on the router's addresses is no error

	domain hypercall.Domain
	say    func(format string, args ...any)
	log    *slog.Logger
	device pvnet.Config // of every vif
	began  time.Time
	losses []telemetry.Field // the counters of a vif that are reasons for lost frames

	core  *router.Router
	plane *plane
	local *localStack
	names *dnsproxy.Server

	mu         sync.Mutex
	cfg        *config.Config           // guarded by mu; never nil
	vifs       map[router.PortID]*guest // guarded by mu: those of guests, admitted or not
	pools      map[string]*dhcpd.Pool   // guarded by mu: by network
	up         *uplink                  // guarded by mu; nil: not connected
	lease      uplinkLease              // guarded by mu: of the uplink's DHCP
	auto       slaac.Settings           // guarded by mu: of the uplink's routers
	refused6   []netip.Prefix           // guarded by mu: prefixes that routers announced, were left out, and are in the log
	claimed6   []netip.Addr             // guarded by mu: addresses that other stations at the uplink have, and that are in the log
	services   map[netip.Addr]*service  // guarded by mu: name servers by address
	applied    router.Config            // guarded by mu: what the core has
	reloads    uint64                   // guarded by mu
	refused    uint64                   // guarded by mu: reloads with an error
	duplicates uint64                   // guarded by mu: times that an address of the uplink was another station's
	read       time.Time                // guarded by mu: when cfg was read
	tried      time.Time                // guarded by mu: when a reload was tried last; zero: never
	wrong      string                   // guarded by mu: the error of that reload
	file       string                   // guarded by mu once it runs: where cfg was read; "": it has no file
	upDown     string                   // guarded by mu: why the uplink is down

	clients clientTable
	listens listening
}

// uplinkPort is the PortID of the uplink. Those of guests follow.
const uplinkPort router.PortID = 0

// newDaemon makes a router in domain. The caller calls run, which ends all of it, or close.
func newDaemon(domain hypercall.Domain, cfg *config.Config, device pvnet.Config, say func(string, ...any), log *slog.Logger) (*daemon, error) {
	core, err := router.New(router.Limits{Flows: cfg.Limits.Flows, FlowsPerPort: cfg.Limits.FlowsPerGuest})
	if err != nil {
		return nil, err
	}
	local, err := newLocalStack()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	d := &daemon{
		began: now, read: now, losses: losses(), domain: domain, say: say, log: log, device: device, core: core, local: local, plane: newPlane(core, local), cfg: cfg,
		vifs: map[router.PortID]*guest{}, pools: map[string]*dhcpd.Pool{}, services: map[netip.Addr]*service{},
	}
	d.names = dnsproxy.New(dnsproxy.Config{Dial: d.dialServer, Client: d.clients.find, Now: time.Now, Logger: log})
	d.plane.deliver = d.deliver
	d.listens.init(d.plane)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.applyLocked(); err != nil {
		d.names.Close()
		local.close()
		return nil, err
	}
	return d, nil
}

// run serves vifs and the uplink until ctx ends. It returns nil after a signal.
func (d *daemon) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() { d.plane.runLocal(ctx) })
	wg.Go(func() { d.plane.runNeighbours(ctx) })
	wg.Go(func() { d.runUplink(ctx) })
	wg.Go(func() { d.listens.run(ctx) })
	err := pvnet.Serve(ctx, d.domain, pvnet.ServeConfig{Config: d.device, Hold: true, Remove: d.domain.ID() != 0}, func(dev *pvnet.Device) { d.serve(ctx, dev) })
	cancel(nil)
	wg.Wait()
	d.close()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// receive moves what arrives at a vif's port until its device has ended. If that is not possible any more while
// the device goes on, it says why and ends the device: its link would be up, and all that is sent to it lost.
func (d *daemon) receive(p *port, vif string) {
	if err := d.plane.receive(p); receivesNothing(err) {
		d.log.Error("a vif can no longer be received from and is closed", "vif", vif, "err", err)
		p.dev.Disconnect()
	}
}

// receivesNothing reports whether the error of receive means that the device may go on and only receiving has
// ended. A device that has ended, also by its peer's fault, has said so itself.
func receivesNothing(err error) bool { return err != nil && !errors.Is(err, pvnet.ErrDisconnected) }

// close ends the router's own TCP/IP and its name servers. Its caller has ended what moves frames, or has not begun it.
func (d *daemon) close() {
	d.ended.Store(true)
	d.mu.Lock()
	for at, s := range d.services {
		s.close()
		delete(d.services, at)
	}
	d.mu.Unlock()
	d.local.close()
	d.names.Close()
}

// fixedChanges are what a reload cannot change.
func fixedChanges(old, now *config.Config) (list []string) {
	if old.Uplink.Vif != now.Uplink.Vif {
		list = append(list, "uplink vif")
	}
	if old.Limits != now.Limits {
		list = append(list, "flows")
	}
	if old.Metrics.Addr != now.Metrics.Addr || old.Metrics.Machine != now.Metrics.Machine {
		list = append(list, "metrics")
	}
	return list
}

// reload makes cfg the configuration, between two batches of frames. On an error the old one
// stays.
func (d *daemon) reload(cfg *config.Config) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.cfg
	if fixed := fixedChanges(old, cfg); len(fixed) > 0 {
		return fmt.Errorf("a reload cannot change %q: end the router and start it again, or leave them as they were", fixed)
	}
	d.cfg = cfg
	d.reassignLocked()
	if err := d.applyLocked(); err != nil {
		d.cfg = old
		d.reassignLocked()
		return errors.Join(err, d.applyLocked())
	}
	if d.up != nil {
		nudge(d.up.reloaded)
	}
	for name := range d.pools {
		if cfg.NetworkOf(name) == nil {
			delete(d.pools, name)
			d.names.Forget(name)
		}
	}
	return nil
}

// reassignLocked gives all vifs what the configuration has for them now: first those with a
// fixed address, which may have been another's.
func (d *daemon) reassignLocked() {
	var list []*guest
	for _, g := range d.vifs {
		g.giveLocked()
		list = append(list, g)
	}
	slices.SortFunc(list, func(a, b *guest) int { return int(a.id) - int(b.id) })
	for _, fixed := range [...]bool{true, false} {
		for _, g := range list {
			one := d.cfg.GuestOf(uint16(g.dev.Peer()), g.dev.ID(), g.mac)
			if (one != nil && one.Addr.IsValid()) == fixed {
				d.assignLocked(g)
			}
		}
	}
}

// applyLocked gives the core, the router's own TCP/IP and its services the configuration, for
// the vifs that there are now.
func (d *daemon) applyLocked() error {
	c := d.compileLocked()
	if err := d.core.Configure(c); err != nil {
		return err
	}
	d.applied = c
	var own []netip.Addr
	clients := map[netip.Prefix]dnsproxy.Client{}
	for _, p := range c.Ports {
		for _, a := range p.Addrs {
			if !slices.Contains(own, a.Addr()) {
				own = append(own, a.Addr())
			}
		}
		if p.ID != uplinkPort {
			for _, s := range p.Sources {
				clients[s] = dnsproxy.Client{ID: p.Name, Group: p.Group}
			}
		}
	}
	d.clients.set(clients)
	err := d.local.setAddrs(own)
	d.names.SetServers(d.serversLocked())
	d.serveNamesLocked()
	for _, g := range d.vifs {
		g.tellLocked()
	}
	d.listenLocked()
	return err
}

// serversLocked returns the name servers to ask.
func (d *daemon) serversLocked() (list []netip.AddrPort) {
	if len(d.cfg.DNS.Upstream) > 0 || d.cfg.DNS.Off {
		return d.cfg.DNS.Upstream
	}
	for _, a := range slices.Concat(d.lease.dns, d.auto.DNS) {
		list = append(list, netip.AddrPortFrom(a, 53))
	}
	return list
}

// guestMAC is the router's MAC on every vif of a guest, which is the one of a backend in Xen.
var guestMAC = [6]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}

// nowhere is a group that no port has: rules about a guest that is not there match it, and so nothing.
const nowhere = "(nowhere)"

// compileLocked returns the core's configuration.
func (d *daemon) compileLocked() router.Config {
	cfg := d.cfg
	c := router.Config{Default: action(cfg.Default), LocalDefault: router.Drop, ClampMSS: true}
	if cfg.Default == config.Reject {
		c.LocalDefault = router.Reject
	}
	if d.up != nil {
		d.compileUplinkLocked(&c)
	}
	ids := map[string][]router.PortID{} // of guests by name
	for _, g := range d.sortedLocked() {
		if !g.admitted {
			continue
		}
		ids[g.name] = append(ids[g.name], g.id)
		p := router.Port{ID: g.id, Name: g.vif, Group: g.network, MAC: guestMAC, MTU: max(g.dev.MTU(), router.MinMTU), SourceMAC: g.mac}
		if g.addr.IsValid() {
			p.Addrs = append(p.Addrs, single(g.router))
			p.Sources = append(p.Sources, single(g.addr))
			c.Routes = append(c.Routes, router.Route{Prefix: single(g.addr), Out: g.id})
		}
		if g.prefix.IsValid() && p.MTU >= leastMTU6 {
			p.Addrs = append(p.Addrs, netip.PrefixFrom(g.router6(), 64))
			p.Sources = append(p.Sources, g.prefix)
		}
		c.Ports = append(c.Ports, p)
	}
	for i := range cfg.Rules {
		c.Rules = append(c.Rules, compileRule(&cfg.Rules[i], ids))
	}
	for i := range cfg.Forwards {
		f := &cfg.Forwards[i]
		c.Forwards = append(c.Forwards, router.Forward{
			In: router.Match{Ports: []router.PortID{uplinkPort}}, Addr: f.At, Proto: f.Proto, Ports: router.PortRange{First: f.First, Last: f.Last}, To: f.To, ToPort: f.ToPort,
		})
		c.Rules = append(c.Rules, router.Rule{
			In: router.Match{Ports: []router.PortID{uplinkPort}}, Dst: []netip.Prefix{single(f.To)}, Protocols: []uint8{f.Proto},
			DstPorts: []router.PortRange{{First: f.ToPort, Last: f.ToPort + f.Last - f.First}}, Action: router.Accept,
		})
	}
	c.Rules = append(c.Rules, ownRules(cfg)...)
	return c
}

// leastMTU6 is the smallest MTU of a link for IPv6 (RFC 8200).
const leastMTU6 = 1280

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func action(a config.Action) router.Action {
	return [...]router.Action{config.Drop: router.Drop, config.Allow: router.Accept, config.Reject: router.Reject}[a]
}

// compileRule translates a rule. ids are the ports of guests.
func compileRule(r *config.Rule, ids map[string][]router.PortID) router.Rule {
	place := func(p config.Place) (m router.Match) {
		switch p.Kind {
		case config.AtUplink:
			m.Ports = []router.PortID{uplinkPort}
		case config.AtRouter:
			m.Ports = []router.PortID{router.LocalPort}
		case config.InNetwork:
			m.Groups = []string{p.Name}
		case config.AtGuest:
			if m.Ports = ids[p.Name]; len(m.Ports) == 0 {
				m.Groups = []string{nowhere}
			}
		}
		return m
	}
	ports := func(list []config.Ports) (out []router.PortRange) {
		for _, p := range list {
			out = append(out, router.PortRange{First: p.First, Last: p.Last})
		}
		return out
	}
	out := router.Rule{
		Name: r.Name, In: place(r.From), Out: place(r.To), Family: r.Family, Src: r.Source, Dst: r.Dest, Protocols: r.Proto,
		SrcPorts: ports(r.SrcPorts), DstPorts: ports(r.DstPorts), ICMPTypes: r.Types, Action: action(r.Action),
	}
	if r.Related {
		out.States |= router.StateRelated
	}
	if r.Invalid {
		out.States |= router.StateInvalid
	}
	return out
}

// Numbers of the Internet protocols, sizes of their headers in bytes, and the ports that guests may have.
const (
	protoICMP    = 1
	protoICMPv6  = 58
	protoTCP     = 6
	protoUDP     = 17
	typeEcho4    = 8   // ICMP echo request
	typeEcho6    = 128 // ICMPv6 echo request
	portDNS      = 53
	portServer   = 67 // of DHCP
	portClient   = 68 // of DHCP
	ipHeader4    = 20 // without options
	headerOfUDP  = 8
	mostGuests   = int(router.MaxPorts) - 1
	firstGuestID = uplinkPort + 1
)

// ownRules returns the rules that admit what the router itself offers to guests, and what its DHCP
// client needs. They come after the rules of the file, which can drop it.
func ownRules(cfg *config.Config) (list []router.Rule) {
	local := router.Match{Ports: []router.PortID{router.LocalPort}}
	var guests router.Match
	for i := range cfg.Networks {
		guests.Groups = append(guests.Groups, cfg.Networks[i].Name)
	}
	if len(guests.Groups) == 0 {
		guests.Groups = []string{nowhere}
	}
	one := func(n uint16) []router.PortRange { return []router.PortRange{{First: n, Last: n}} }
	if cfg.Lease > 0 {
		list = append(list, router.Rule{Name: "router-dhcp", In: guests, Out: local, Family: 4, Protocols: []uint8{protoUDP}, DstPorts: one(portServer), Action: router.Accept})
	}
	if !cfg.DNS.Off {
		list = append(list, router.Rule{Name: "router-dns", In: guests, Out: local, Protocols: []uint8{protoTCP, protoUDP}, DstPorts: one(portDNS), Action: router.Accept})
	}
	list = append(list,
		router.Rule{Name: "router-echo", In: guests, Out: local, Protocols: []uint8{protoICMP}, ICMPTypes: []uint8{typeEcho4}, Action: router.Accept},
		router.Rule{Name: "router-echo6", In: guests, Out: local, Protocols: []uint8{protoICMPv6}, ICMPTypes: []uint8{typeEcho6}, Action: router.Accept},
	)
	if cfg.Uplink.DHCP {
		list = append(list, router.Rule{Name: "router-uplink-dhcp", In: router.Match{Ports: []router.PortID{uplinkPort}}, Out: local, Family: 4,
			Protocols: []uint8{protoUDP}, SrcPorts: one(portServer), DstPorts: one(portClient), Action: router.Accept})
	}
	return list
}

// sortedLocked returns the vifs of guests in the order of their ports.
func (d *daemon) sortedLocked() []*guest {
	list := make([]*guest, 0, len(d.vifs))
	for _, g := range d.vifs {
		list = append(list, g)
	}
	slices.SortFunc(list, func(a, b *guest) int { return int(a.id) - int(b.id) })
	return list
}

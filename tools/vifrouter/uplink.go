package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/netstack/dhcp"
	"barevif/pvnet/router"
	"barevif/tools/vifrouter/config"
	"barevif/tools/vifrouter/slaac"
)

// An uplink is the frontend of the uplink's vif, from its first connection until its device ends.
type uplink struct {
	dev      *pvnet.Device
	port     *port
	links    chan dhcp.Link // for the DHCP client: at most one, the latest state
	links6   chan dhcp.Link // for the discovery of routers: at most one, the latest state
	received chan []byte    // messages for the DHCP client
	adverts  chan advert    // for the discovery of routers
	claims   chan claim     // for the discovery of routers: about addresses that the link is asked for
	reloaded chan struct{}  // for the discovery of routers: there is another configuration
	link     dhcp.Link      // guarded by daemon.mu: the latest state
	stop     func()         // guarded by daemon.mu: ends the DHCP client; nil: none runs
	stop6    func()         // guarded by daemon.mu: ends the discovery of routers; nil: none runs
}

// tellLocked replaces what links holds by the latest state.
func (up *uplink) tellLocked(links chan dhcp.Link) {
	select {
	case <-links:
	default:
	}
	links <- up.link // does not wait: whoever sends holds daemon.mu, and has emptied it
}

// An uplinkLease is the lease of the uplink's DHCP client.
type uplinkLease struct {
	addr   netip.Prefix // zero: none
	routes []dhcp.Route
	dns    []netip.Addr
	until  time.Time // when it expires, unless it is renewed
}

// retryUplink is how long the router waits before it looks for its uplink again.
const retryUplink = 2 * time.Second

// mostReceived is how many messages may wait for the DHCP client.
const mostReceived = 16

// runUplink connects to the uplink, and again whenever its device has ended, until ctx ends.
func (d *daemon) runUplink(ctx context.Context) {
	said := ""
	for ctx.Err() == nil {
		d.mu.Lock()
		vif := d.cfg.Uplink.Vif
		d.mu.Unlock()
		dev, err := pvnet.Connect(ctx, d.domain, vif, d.device)
		if err == nil {
			said = ""
			if err = d.useUplink(ctx, dev); err != nil {
				d.log.Error("the uplink cannot be used", "vif", vif, "err", err)
			}
			dev.Disconnect()
		} else if ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			d.mu.Lock()
			d.upDown = said
			d.mu.Unlock()
			d.log.Warn("the uplink is not there", "vif", vif, "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryUplink):
		}
	}
}

// useUplink routes over the uplink until its device ends.
func (d *daemon) useUplink(ctx context.Context, dev *pvnet.Device) error {
	p, err := d.plane.newPort(uplinkPort, dev)
	if err != nil {
		return err
	}
	up := &uplink{
		dev: dev, port: p, links: make(chan dhcp.Link, 1), links6: make(chan dhcp.Link, 1),
		received: make(chan []byte, mostReceived), adverts: make(chan advert, mostAdverts),
		claims: make(chan claim, mostClaims), reloaded: make(chan struct{}, 1),
	}
	p.owner = up
	d.plane.add(p)
	d.mu.Lock()
	d.up = up
	err = d.applyLocked()
	d.mu.Unlock()
	if err != nil {
		d.log.Error("the configuration does not go with the uplink", "err", err)
	}
	d.say("uplink vif %s: MAC %v, MTU %d, backend in domain %d", dev.ID(), dev.MAC(), dev.MTU(), dev.Peer())
	var wg sync.WaitGroup
	wg.Go(func() { d.receive(p, dev.ID()) })
	inner, cancel := context.WithCancel(ctx)
	wg.Go(func() { d.followUplink(inner, up) })
	select {
	case <-ctx.Done():
		dev.Disconnect()
	case <-dev.Done():
	}
	cancel()
	wg.Wait()
	d.mu.Lock()
	d.endClientLocked(up)
	d.endDiscoveryLocked(up)
	d.up, d.lease, d.auto = nil, uplinkLease{}, slaac.Settings{}
	d.listens.down()
	err = d.applyLocked()
	d.mu.Unlock()
	d.plane.remove(p)
	return err
}

// followUplink applies what changes of the uplink, and tells the DHCP client.
func (d *daemon) followUplink(ctx context.Context, up *uplink) {
	mac, mtu, was := up.dev.MAC(), up.dev.MTU(), false
	var link dhcp.Link
	for ev := range up.dev.Links(ctx) {
		if ev.Up && (!was || ev.MAC != link.MAC) {
			link.Ups++
			d.listens.up(ev.MAC)
		} else if !ev.Up {
			d.listens.down()
		}
		link.Up, link.Room = ev.Up, ev.MTU
		if ev.Up {
			link.MAC = ev.MAC
		}
		d.mu.Lock()
		d.upDown = ev.Reason
		up.link = link
		up.tellLocked(up.links)
		up.tellLocked(up.links6)
		d.mu.Unlock()
		switch {
		case ev.Up && !was:
			d.say("uplink vif %s: connected, MAC %v, MTU %d", up.dev.ID(), ev.MAC, ev.MTU)
		case !ev.Up && was:
			d.say("uplink vif %s: down: %s", up.dev.ID(), ev.Reason)
		}
		was = ev.Up
		if ev.Up && (ev.MAC != mac || ev.MTU != mtu) {
			mac, mtu = ev.MAC, ev.MTU
			d.mu.Lock()
			err := d.applyLocked()
			d.mu.Unlock()
			if err != nil {
				d.log.Error("the router does not follow its uplink", "err", err)
			}
		}
	}
}

// compileUplinkLocked adds the uplink to the core's configuration. The core takes one route for a prefix. The
// uplink's own link goes before the routes of the file, and those before what servers and routers announced, so
// that nobody out there can make the core refuse a configuration.
func (d *daemon) compileUplinkLocked(c *router.Config) {
	u := &d.cfg.Uplink
	p := router.Port{
		ID: uplinkPort, Name: "uplink", MAC: d.up.dev.MAC(), MTU: max(d.up.dev.MTU(), router.MinMTU), Masquerade: u.NAT4, Masquerade6: u.NAT6,
		Listens: u.Auto6 || u.IPv6.IsValid(),
	}
	var announced []router.Route
	route := func(to netip.Prefix, via netip.Addr) {
		announced = append(announced, router.Route{Prefix: to, Out: uplinkPort, Via: via})
	}
	all4, all6 := netip.PrefixFrom(netip.IPv4Unspecified(), 0), netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	switch {
	case u.DHCP && d.lease.addr.IsValid():
		p.Addrs = append(p.Addrs, d.lease.addr)
		for _, r := range d.lease.routes {
			if r.Via.IsValid() && !d.lease.addr.Contains(r.Via) { // a router outside the lease's network (RFC 3442)
				route(single(r.Via), netip.Addr{})
			}
			route(r.To, r.Via)
		}
	case u.DHCP:
		// The route admits the answers of DHCP servers, whose source is any address that is no guest's.
		// No guest's packet leaves by it: without an address the uplink can neither translate nor solicit.
		route(all4, netip.Addr{})
	case u.IPv4.IsValid():
		p.Addrs = append(p.Addrs, u.IPv4)
		if u.Via4.IsValid() {
			route(all4, u.Via4)
		}
	}
	leaves6 := true // static routes of IPv6 lead somewhere
	if u.Auto6 {
		leaves6 = d.compileAutoLocked(&p, route)
	} else if u.IPv6.IsValid() && p.MTU >= leastMTU6 {
		p.Addrs = append(p.Addrs, u.IPv6)
		if u.Via6.IsValid() {
			route(all6, u.Via6)
		}
	}
	routed := map[netip.Prefix]bool{}
	for _, a := range p.Addrs {
		routed[a.Masked()] = true
	}
	add := func(r router.Route) {
		if !routed[r.Prefix] {
			routed[r.Prefix] = true
			c.Routes = append(c.Routes, r)
		}
	}
	for _, r := range d.cfg.Routes {
		if r.Via.Is4() || p.MTU >= leastMTU6 && leaves6 {
			add(router.Route{Prefix: r.Prefix, Out: uplinkPort, Via: r.Via})
		}
	}
	for _, r := range announced {
		add(r)
	}
	c.Ports = append(c.Ports, p)
	d.clientLocked()
	d.discoverLocked()
}

// clientLocked starts or ends the uplink's DHCP client, as the configuration wants.
func (d *daemon) clientLocked() {
	switch {
	case d.up == nil || d.cfg.Uplink.DHCP == (d.up.stop != nil):
	case d.up.stop != nil:
		d.endClientLocked(d.up)
	default:
		ctx, cancel := context.WithCancel(context.Background())
		up := d.up
		up.tellLocked(up.links) // a client that ran before may have taken it
		go func() {
			dhcp.Run(ctx, dhcp.Config{
				Broadcast: func(m []byte) error {
					all := [6]byte{255, 255, 255, 255, 255, 255}
					d.plane.write(uplinkPort, udpFrame(up.dev.MAC(), all, netip.AddrPortFrom(netip.IPv4Unspecified(), portClient),
						netip.AddrPortFrom(netip.AddrFrom4([4]byte{255, 255, 255, 255}), portServer), m))
					return nil
				},
				Unicast: func(m []byte, to netip.Addr) error {
					d.mu.Lock()
					own := d.lease.addr.Addr()
					d.mu.Unlock()
					if !own.IsValid() {
						return errors.New("there is no lease")
					}
					d.plane.sendLocal(udpFrame([6]byte{}, [6]byte{}, netip.AddrPortFrom(own, portClient), netip.AddrPortFrom(to, portServer), m))
					return nil
				},
				Received: up.received, Links: up.links, Hostname: "vifrouter", Logger: d.log,
				Leased: func(l *dhcp.Lease) error { return d.leased(ctx, l) },
			})
		}()
		up.stop = cancel
	}
}

func (d *daemon) endClientLocked(up *uplink) {
	if up.stop != nil {
		up.stop()
		up.stop, d.lease = nil, uplinkLease{}
	}
}

// fromServer gives the DHCP client a copy of a message. It drops the message if too many wait.
func (d *daemon) fromServer(p *port, m []byte) bool {
	up, ok := p.owner.(*uplink)
	if !ok {
		return false
	}
	select {
	case up.received <- append([]byte(nil), m...):
	default:
	}
	return true
}

// leased makes l the uplink's lease; nil: it has none any more. A DHCP server at the uplink cannot take a
// guest's network: a lease that overlaps one is refused, and a route into one is left out.
func (d *daemon) leased(ctx context.Context, l *dhcp.Lease) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	old := d.lease
	d.lease = uplinkLease{}
	if l != nil {
		if name := overlapping(d.cfg, l.Addr.Masked()); name != "" {
			d.lease = old
			return fmt.Errorf("%v overlaps the network %s of guests", l.Addr, name)
		}
		d.lease = uplinkLease{addr: l.Addr, dns: l.DNS, until: time.Now().Add(l.Expire)}
		for _, r := range l.Routes {
			name := overlapping(d.cfg, r.To)
			switch {
			case name != "" && r.To.Bits() > 0 && within(d.cfg, r.To):
				d.log.Warn("a route of the uplink's DHCP server is left out, since it leads away from guests", "to", r.To, "network", name)
			case r.Via == l.Addr.Addr():
			default:
				d.lease.routes = append(d.lease.routes, r)
			}
		}
	}
	if err := d.applyLocked(); err != nil {
		d.lease = old
		return errors.Join(err, d.applyLocked())
	}
	if l != nil && l.Addr != old.addr {
		d.say("uplink: address %v by DHCP", l.Addr)
	} else if l == nil && old.addr.IsValid() {
		d.say("uplink: no address any more")
	}
	return nil
}

// overlapping returns the network of guests that a prefix overlaps, or "".
func overlapping(c *config.Config, p netip.Prefix) string {
	for i := range c.Networks {
		if n := &c.Networks[i]; n.IPv4.IsValid() && n.IPv4.Overlaps(p) {
			return n.Name
		}
	}
	return ""
}

// within reports whether a network of guests contains a prefix.
func within(c *config.Config, p netip.Prefix) bool {
	for i := range c.Networks {
		if n := &c.Networks[i]; n.IPv4.IsValid() && n.IPv4.Overlaps(p) && p.Bits() >= n.IPv4.Bits() {
			return true
		}
	}
	return false
}

// dialServer connects to a name server, from the router's address at the uplink or, for one in a
// network of guests, there.
func (d *daemon) dialServer(ctx context.Context, network string, to netip.AddrPort) (net.Conn, error) {
	d.mu.Lock()
	own := d.ownAddressLocked(to.Addr())
	d.mu.Unlock()
	if !own.IsValid() {
		return nil, fmt.Errorf("the router has no address from which it reaches %v", to.Addr())
	}
	return d.local.dial(ctx, network, own, to)
}

func (d *daemon) ownAddressLocked(to netip.Addr) netip.Addr {
	for i := range d.cfg.Networks {
		if n := &d.cfg.Networks[i]; n.IPv4.IsValid() && n.IPv4.Contains(to) {
			return n.Router
		}
	}
	for _, p := range d.applied.Ports {
		if p.ID != uplinkPort {
			continue
		}
		for _, a := range p.Addrs {
			if a.Addr().Is4() == to.Is4() {
				return a.Addr()
			}
		}
	}
	return netip.Addr{}
}

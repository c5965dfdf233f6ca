package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/packet"
	"barevif/pvnet/router"
	"barevif/tools/vifrouter/config"
	"barevif/tools/vifrouter/dhcpd"
	"barevif/tools/vifrouter/mld"
	"barevif/tools/vifrouter/radv"
	"barevif/tools/vifrouter/slaac"
)

// A guest is a vif that the router serves.
type guest struct {
	d    *daemon
	id   router.PortID
	dev  *pvnet.Device
	vif  string         // "3.0"
	key  string         // by which its network's pool knows it again: its MAC, or vif without one
	mac  pvnet.MAC      // as the toolstack wrote it; zero: it wrote none
	told []netip.Prefix // addresses that the toolstack has for it (ip=)
	port *port

	solicited chan struct{} // holds one: a router solicitation came
	changed   chan struct{} // holds one: advert has changed

	// What follows is guarded by d.mu.

	admitted bool
	why      error  // it is not admitted because of this
	name     string // of its guest line
	network  string
	router   netip.Addr   // the router's IPv4 address
	addr     netip.Addr   // the guest's; zero: none
	prefix   netip.Prefix // the guest's /64; zero: none
	subnet   int          // number of prefix among the /64s of its network; -1: none
	pool     *dhcpd.Pool  // of its network
	server   *dhcpd.Link  // nil without IPv4
	advert   radv.Link    // without Source: nothing is advertised
	down     string       // why its link is down
	declined time.Time    // when the log said last that it declines its address and keeps it
}

// router6 is the router's address in the guest's /64: its first.
func (g *guest) router6() netip.Addr { return g.prefix.Masked().Addr().Next() }

// serve serves a vif until it is removed, or ctx ends.
func (d *daemon) serve(ctx context.Context, dev *pvnet.Device) {
	g, err := d.newGuest(ctx, dev)
	if err != nil {
		d.log.Error("a vif cannot be served", "vif", fmt.Sprintf("%d.%s", dev.Peer(), dev.ID()), "err", err)
		dev.Refuse(err)
		<-dev.Done()
		return
	}
	d.mu.Lock()
	d.assignLocked(g)
	err = d.applyLocked()
	admitted, why := g.admitted, g.why
	d.mu.Unlock()
	if err != nil {
		d.log.Error("the configuration does not go with a vif", "vif", g.vif, "err", err)
	}
	if !admitted {
		d.log.Warn("a vif is refused", "vif", g.vif, "mac", g.mac, "why", why)
	}
	var wg sync.WaitGroup
	inner, cancel := context.WithCancel(ctx)
	wg.Go(func() { d.receive(g.port, g.vif) })
	wg.Go(func() { g.advertise(inner) })
	wg.Go(func() { g.follow(inner) })
	<-dev.Done()
	cancel()
	wg.Wait()
	d.mu.Lock()
	delete(d.vifs, g.id)
	g.giveLocked()
	err = d.applyLocked()
	d.mu.Unlock()
	d.plane.remove(g.port)
	if err != nil {
		d.log.Error("the configuration does not go with the vifs that are left", "err", err)
	}
	d.say("vif %s: gone", g.vif)
}

// newGuest makes the port of a vif.
func (d *daemon) newGuest(ctx context.Context, dev *pvnet.Device) (*guest, error) {
	g := &guest{d: d, dev: dev, vif: fmt.Sprintf("%d.%s", dev.Peer(), dev.ID()), solicited: make(chan struct{}, 1), changed: make(chan struct{}, 1), subnet: -1}
	ts, err := dev.Toolstack(ctx)
	if err != nil {
		return nil, fmt.Errorf("read what the toolstack wrote: %w", err)
	}
	for _, bad := range ts.Bad {
		d.log.Warn("a key of the toolstack cannot be used", "vif", g.vif, "err", bad)
	}
	g.mac, g.told, g.key = ts.MAC, ts.IPs, ts.MAC.String()
	if g.mac == (pvnet.MAC{}) {
		g.key = g.vif
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	id := firstGuestID
	for ; d.vifs[id] != nil; id++ {
	}
	if id >= router.MaxPorts {
		return nil, fmt.Errorf("there are %d vifs already", mostGuests)
	}
	g.id = id
	if g.port, err = d.plane.newPort(id, dev); err != nil {
		return nil, err
	}
	g.port.owner = g
	d.vifs[id] = g
	d.plane.add(g.port)
	return g, nil
}

// giveLocked gives back the address and the /64 that the vif has of its network.
func (g *guest) giveLocked() {
	if g.addr.IsValid() && g.pool != nil {
		g.pool.Give(g.key, g.addr)
	}
	g.subnet, g.admitted = -1, false
}

// errNoGuest is why a vif is refused that the configuration does not name.
var errNoGuest = errors.New(`no guest line of the configuration matches it, and there is none for "*"`)

// assignLocked gives a vif what the configuration has for it, or refuses it.
func (d *daemon) assignLocked(g *guest) {
	was, wasIn := g.addr, g.network
	g.admitted, g.addr, g.prefix = false, netip.Addr{}, netip.Prefix{}
	g.why = d.tryAssignLocked(g)
	if g.admitted = g.why == nil; !g.admitted {
		g.giveLocked() // tryAssignLocked may have found an address, but no /64
		g.addr, g.prefix = netip.Addr{}, netip.Prefix{}
		g.dev.Refuse(g.why)
		return
	}
	if g.addr != was || g.network != wasIn {
		v6 := ""
		if g.prefix.IsValid() {
			v6 = fmt.Sprintf(", %v", g.prefix)
		}
		v4 := ""
		if g.addr.IsValid() {
			v4 = fmt.Sprintf(", %v", g.addr)
		}
		d.say("vif %s: guest %s in network %s%s%s", g.vif, g.name, g.network, v4, v6)
	}
	g.dev.Offer(true)
}

// tryAssignLocked gives a vif an address and a /64 of its network. The error says why the vif is refused.
func (d *daemon) tryAssignLocked(g *guest) error {
	line := d.cfg.GuestOf(uint16(g.dev.Peer()), g.dev.ID(), g.mac)
	if line == nil {
		return errNoGuest
	}
	n := d.cfg.NetworkOf(line.Network) // there is one: the configuration was checked
	g.name, g.network, g.router = line.Name, n.Name, n.Router
	if n.IPv4.IsValid() {
		g.pool = d.poolLocked(n)
		addr, err := g.pool.Take(time.Now(), g.key, d.wanted(g, line, n))
		if err != nil {
			return fmt.Errorf("network %s: %w", n.Name, err)
		}
		g.addr = addr
	}
	if n.IPv6.IsValid() {
		if g.subnet = d.freeSubnetLocked(n); g.subnet < 0 {
			return fmt.Errorf("network %s: every /64 of %v is in use", n.Name, n.IPv6)
		}
		g.prefix = subnetOf(n.IPv6, g.subnet)
	}
	return nil
}

// wanted returns the address that a vif must have: that of its guest line, or the toolstack's if it may have it.
// The zero address means any of the pool.
func (d *daemon) wanted(g *guest, line *config.Guest, n *config.Network) netip.Addr {
	if line.Addr.IsValid() {
		return line.Addr
	}
	for _, p := range g.told {
		a := p.Addr()
		if !a.Is4() || !n.IPv4.Contains(a) || a == n.Router {
			continue
		}
		taken := false
		for i := range d.cfg.Guests { // a guest line may have it, for another guest
			taken = taken || d.cfg.Guests[i].Addr == a
		}
		if !taken {
			return a
		}
	}
	return netip.Addr{}
}

// poolLocked returns the pool of a network, as the configuration has it now.
func (d *daemon) poolLocked(n *config.Network) *dhcpd.Pool {
	var fixed []netip.Addr
	for i := range d.cfg.Guests {
		if a := d.cfg.Guests[i].Addr; a.IsValid() && n.IPv4.Contains(a) {
			fixed = append(fixed, a)
		}
	}
	p := d.pools[n.Name]
	if p == nil {
		p = dhcpd.NewPool(n.First, n.Last, fixed...)
		d.pools[n.Name] = p
	} else {
		p.Resize(n.First, n.Last, fixed...)
	}
	return p
}

// freeSubnetLocked returns the number of a /64 that no vif of the network has; -1: none.
func (d *daemon) freeSubnetLocked(n *config.Network) int {
	used := map[int]bool{}
	for _, g := range d.vifs {
		if g.network == n.Name && g.subnet >= 0 {
			used[g.subnet] = true
		}
	}
	for i := range 1 << min(64-n.IPv6.Bits(), 16) {
		if !used[i] {
			return i
		}
	}
	return -1
}

// subnetOf returns /64 number i of a prefix.
func subnetOf(p netip.Prefix, i int) netip.Prefix {
	b := p.Masked().Addr().As16()
	b[6] |= byte(i >> 8)
	b[7] |= byte(i)
	return netip.PrefixFrom(netip.AddrFrom16(b), 64)
}

// tellLocked updates what router advertisements and DHCP tell the guest.
func (g *guest) tellLocked() {
	mtu := g.dev.MTU()
	before := g.advert
	g.advert = radv.Link{MAC: guestMAC, Source: packet.LinkLocal(guestMAC), MTU: mtu}
	var dns4, dns6 []netip.Addr
	if g.admitted && g.prefix.IsValid() && mtu >= leastMTU6 {
		g.advert.Prefix = g.prefix
		if !g.d.cfg.DNS.Off {
			dns6 = []netip.Addr{g.router6()}
		}
		g.advert.DNS = dns6
	} else if g.advert = before; before.Source.IsValid() {
		g.advert.Ceasing = true
	}
	if !sameLink(&before, &g.advert) {
		nudge(g.changed)
	}
	if !g.admitted || !g.addr.IsValid() || g.d.cfg.Lease == 0 {
		g.server = nil
		return
	}
	if !g.d.cfg.DNS.Off {
		dns4 = []netip.Addr{g.router}
	}
	o := dhcpd.Offer{Addr: g.addr, Router: g.router, DNS: dns4, MTU: mtu, Lease: g.d.cfg.Lease}
	if g.server == nil {
		g.server = dhcpd.NewLink(g.mac, o)
	} else {
		g.server.SetOffer(o)
	}
}

func sameLink(a, b *radv.Link) bool {
	return a.Prefix == b.Prefix && a.MTU == b.MTU && a.Ceasing == b.Ceasing && len(a.DNS) == len(b.DNS)
}

// nudge makes c, which has room for one, hold one.
func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// follow applies what changes of the vif while it is there.
func (g *guest) follow(ctx context.Context) {
	mtu, up := g.dev.MTU(), false
	for ev := range g.dev.Links(ctx) {
		if ev.Up && !up {
			g.d.say("vif %s: connected to domain %d, MTU %d", g.vif, g.dev.Peer(), ev.MTU)
			nudge(g.changed)
		} else if !ev.Up && up {
			g.d.say("vif %s: down: %s", g.vif, ev.Reason)
		}
		up = ev.Up
		g.d.mu.Lock()
		g.down = ev.Reason
		g.d.mu.Unlock()
		if ev.MTU != 0 && ev.MTU != mtu {
			mtu = ev.MTU
			g.d.mu.Lock()
			err := g.d.applyLocked()
			g.d.mu.Unlock()
			if err != nil {
				g.d.log.Error("a vif keeps its MTU in the router", "vif", g.vif, "mtu", mtu, "err", err)
			}
		}
	}
}

// advertise sends router advertisements until ctx ends: when the guest asks, when what it is told
// changes, and every now and then.
func (g *guest) advertise(ctx context.Context) {
	var last time.Time
	next := time.NewTimer(radv.Interval)
	defer next.Stop()
	for {
		least := radv.MinDelayBetweenRAs
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		case <-g.solicited:
			least = radv.MinDelayBetweenAnswers
		case <-g.changed:
		}
		if wait := least - time.Since(last); !last.IsZero() && wait > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
		g.d.mu.Lock()
		l := g.advert
		g.d.mu.Unlock()
		if l.Source.IsValid() {
			last = time.Now()
			g.d.plane.write(g.id, radv.Append(nil, &l))
		}
		next.Reset(radv.Interval)
	}
}

// deliver handles the frames for the router that its TCP/IP does not: DHCP, and the discovery of routers,
// neighbours and listeners. It reports whether it did. The frame is lent.
func (d *daemon) deliver(p *port, frame []byte, h *packet.Headers) bool {
	switch {
	case h.Proto == protoUDP && h.Version == 4 && h.L5 != 0:
		to := uint16(frame[h.L4+2])<<8 | uint16(frame[h.L4+3])
		if p.id == uplinkPort {
			return to == portClient && d.fromServer(p, frame[h.L5:h.End])
		}
		if g, ok := p.owner.(*guest); ok && to == portServer {
			g.handleDHCP([6]byte(frame[6:12]), frame[h.L5:h.End])
			return true
		}
	case h.Proto == protoICMPv6 && h.Version == 6 && h.L4 != 0 && h.End > h.L4:
		if p.id == uplinkPort {
			switch frame[h.L4] {
			case slaac.Type:
				return d.fromRouter(p, frame, h)
			case slaac.TypeSolicitation, slaac.TypeAdvertisement:
				return d.fromNeighbour(p, frame, h)
			case mld.TypeQuery:
				d.listens.hear(frame, h)
				return true
			}
			return false
		}
		if g, ok := p.owner.(*guest); ok && frame[h.L4] == radv.TypeRouterSolicitation && frame[h.L3+7] == 255 {
			nudge(g.solicited)
			return true
		}
	}
	return false
}

// handleDHCP answers a DHCP message of the guest, from the station with that MAC.
func (g *guest) handleDHCP(from [6]byte, m []byte) {
	d := g.d
	d.mu.Lock()
	server, own := g.server, g.router
	d.mu.Unlock()
	if server == nil {
		return
	}
	r, declined := server.Handle(time.Now(), from, m)
	if declined {
		d.declined(g)
	}
	if r != nil {
		d.plane.write(g.id, udpFrame(guestMAC, r.ToMAC, netip.AddrPortFrom(own, portServer), netip.AddrPortFrom(r.To, portClient), r.Message))
	}
}

// declinedEvery is how often the log says that a guest declines its address and keeps it.
const declinedEvery = 10 * time.Minute

// declined gives a vif another address of the pool, if there is one: its guest has found that another station
// has the one it got (DHCPDECLINE).
func (d *daemon) declined(g *guest) {
	d.mu.Lock()
	defer d.mu.Unlock()
	line := d.cfg.GuestOf(uint16(g.dev.Peer()), g.dev.ID(), g.mac)
	if line == nil || line.Addr.IsValid() || g.pool == nil || !g.pool.Spoil(time.Now(), g.key, g.addr) {
		if now := time.Now(); now.Sub(g.declined) >= declinedEvery { // a guest can do so ten times a second
			g.declined = now
			d.log.Warn("a guest declines its address, and keeps it", "vif", g.vif, "address", g.addr)
		}
		return
	}
	d.log.Warn("a guest declines its address, and gets another", "vif", g.vif, "address", g.addr)
	g.subnet = -1
	d.assignLocked(g)
	if err := d.applyLocked(); err != nil {
		d.log.Error("the configuration does not go with a vif", "vif", g.vif, "err", err)
	}
}

// udpFrame returns the Ethernet frame of an IPv4 UDP datagram, with complete checksums.
func udpFrame(from, to [6]byte, src, dst netip.AddrPort, payload []byte) []byte {
	n := ipHeader4 + headerOfUDP + len(payload)
	b := make([]byte, ethernet, ethernet+n)
	copy(b, to[:])
	copy(b[6:], from[:])
	b[12], b[13] = packet.IPv4>>8, packet.IPv4&255
	b = append(b, 0x45, 0, byte(n>>8), byte(n), 0, 0, 0, 0, 64, protoUDP, 0, 0)
	s, t := src.Addr().As4(), dst.Addr().As4()
	b = append(append(b, s[:]...), t[:]...)
	ip := b[ethernet:]
	sum := packet.Checksum(ip[:ipHeader4])
	ip[10], ip[11] = byte(sum>>8), byte(sum)
	size := headerOfUDP + len(payload)
	b = append(b, byte(src.Port()>>8), byte(src.Port()), byte(dst.Port()>>8), byte(dst.Port()), byte(size>>8), byte(size), 0, 0)
	b = append(b, payload...)
	ip = b[ethernet:]
	sum = ^packet.Fold(packet.Add(packet.Add(protoUDP+uint64(size), ip[12:20]), ip[ipHeader4:]))
	if sum == 0 {
		sum = 0xffff
	}
	ip[ipHeader4+6], ip[ipHeader4+7] = byte(sum>>8), byte(sum)
	return b
}

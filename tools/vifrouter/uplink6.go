package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/netstack/dhcp"
	"barevif/pvnet/packet"
	"barevif/pvnet/router"
	"barevif/tools/vifrouter/config"
	"barevif/tools/vifrouter/slaac"
)

// How often routers of the uplink's link are asked for an advertisement until one comes: RFC 4861,
// section 10, and then, as RFC 7559 has it, twice as long each time.
const (
	solicitFirst = 4 * time.Second
	solicitMost  = time.Hour
	mostAdverts  = 8 // advertisements that may wait to be read
	mostClaims   = 8 // claims that may wait to be read
	// leastChange is the least time between two changes of the router's configuration, so that a station
	// which announces something else in each message does not keep the router busy.
	leastChange = time.Second
)

// An advert is a copy of a router advertisement.
type advert struct {
	from    netip.Addr
	message []byte
}

// fromRouter keeps a router advertisement for the goroutine that reads them. The core has
// checked its hop limit and its checksum.
func (d *daemon) fromRouter(p *port, frame []byte, h *packet.Headers) bool {
	up, ok := p.owner.(*uplink)
	if !ok || h.End > len(frame) {
		return false
	}
	a := advert{netip.AddrFrom16([16]byte(frame[h.L3+8 : h.L3+24])), slices.Clone(frame[h.L4:h.End])}
	select {
	case up.adverts <- a:
	default:
	}
	return true
}

// A claim is a copy of a neighbour solicitation or advertisement for a tentative address of the router.
type claim struct {
	mac      pvnet.MAC
	src, dst netip.Addr
	message  []byte
}

// fromNeighbour keeps a claim for the goroutine that reads them: of neighbour discovery the core passes on only
// messages for tentative addresses. It has checked hop limit and checksum.
func (d *daemon) fromNeighbour(p *port, frame []byte, h *packet.Headers) bool {
	up, ok := p.owner.(*uplink)
	if !ok || h.End > len(frame) {
		return false
	}
	ip := frame[h.L3:]
	one := claim{pvnet.MAC(frame[6:12]), netip.AddrFrom16([16]byte(ip[8:24])), netip.AddrFrom16([16]byte(ip[24:40])), slices.Clone(frame[h.L4:h.End])}
	select {
	case up.claims <- one:
	default:
	}
	return true
}

// forgetAdverts drops the adverts and claims that came while no discovery ran: they may be old.
func (up *uplink) forgetAdverts() {
	for {
		select {
		case <-up.adverts:
		case <-up.claims:
		default:
			return
		}
	}
}

// discoverLocked starts or ends the discovery of routers, as the configuration wants.
func (d *daemon) discoverLocked() {
	switch {
	case d.up == nil || d.cfg.Uplink.Auto6 == (d.up.stop6 != nil):
	case d.up.stop6 != nil:
		d.endDiscoveryLocked(d.up)
	default:
		ctx, cancel := context.WithCancel(context.Background())
		d.up.stop6 = cancel
		d.up.tellLocked(d.up.links6) // a discovery that ran before may have taken it
		go d.discover(ctx, d.up)
	}
}

func (d *daemon) endDiscoveryLocked(up *uplink) {
	if up.stop6 != nil {
		up.stop6()
		up.stop6, d.auto = nil, slaac.Settings{}
	}
}

// discover follows the routers of the uplink's link until ctx ends.
func (d *daemon) discover(ctx context.Context, up *uplink) {
	var link dhcp.Link
	for !link.Up {
		select {
		case <-ctx.Done():
			return
		case link = <-up.links6:
		}
	}
	up.forgetAdverts()
	var client slaac.Client
	client.Reset(link.MAC)
	hear := func(m claim) {
		if a, ok := client.Claimed(time.Now(), m.mac, m.src, m.dst, m.message); ok {
			d.claimed(ctx, a, m.mac)
		}
	}
	said, down := "", false
	wait, asked := solicitFirst, time.Time{} // wait 0: a router has answered, so that none is solicited
	var changed time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case l := <-up.links6:
			if down = !l.Up; down {
				client.Again(time.Now()) // the solicitations may have been lost
			}
			if down || l.Ups == link.Ups {
				continue
			}
			if l.MAC != link.MAC {
				client.Reset(l.MAC)
			}
			link = l
			client.Again(time.Now())
			wait, asked = solicitFirst, time.Time{}
		case <-up.reloaded: // what is left out may be another
		case m := <-up.claims:
			hear(m)
		case m := <-up.adverts:
			a, err := slaac.Parse(m.from, m.message)
			if err != nil {
				if err.Error() != said { // the log must not grow with what a station sends
					said = err.Error()
					d.log.Warn("a router advertisement at the uplink cannot be used", "err", err)
				}
				continue
			}
			client.Hear(time.Now(), a)
			if a.Lifetime > 0 {
				wait = 0
			}
		case <-timer.C:
		}
		for range len(up.claims) { // before Settings takes a tentative address for ours: this goroutine may be late
			hear(<-up.claims)
		}
		now := time.Now()
		if wait > 0 && !now.Before(asked.Add(wait)) {
			if !asked.IsZero() {
				wait = min(2*wait, solicitMost)
			}
			wait += rand.N(wait/10 + 1)
			asked = now
			d.plane.write(uplinkPort, slaac.Solicit(nil, link.MAC))
		}
		s := client.Settings(now)
		if s.Router == (netip.Addr{}) && wait == 0 {
			wait, asked = solicitFirst, now // the last router is gone
		}
		next := s.Next
		soon := func(t time.Time) {
			if next.IsZero() || t.Before(next) {
				next = t
			}
		}
		if wait > 0 {
			soon(asked.Add(wait))
		}
		if now.Sub(changed) < leastChange {
			soon(changed.Add(leastChange))
		} else if did, err := d.discovered(ctx, &client, now); err != nil {
			d.log.Error("what routers of the uplink announce cannot be used", "err", err)
			changed = now
		} else {
			if did {
				changed = now
			}
			// discovered has told the core which addresses are tentative: claims come here from now on.
			if !down {
				frames := client.Probes(now)
				if len(frames) > 0 {
					d.listenFirst(ctx, client.Settings(now).Listening)
				}
				for _, frame := range frames {
					d.plane.write(uplinkPort, frame)
				}
			}
			if s = client.Settings(now); !s.Next.IsZero() {
				soon(s.Next)
			}
		}
		if !next.IsZero() {
			timer.Reset(max(time.Until(next), time.Millisecond))
		}
	}
}

// claimed notes that another station of the uplink's link has an address that would be the router's.
func (d *daemon) claimed(ctx context.Context, a netip.Addr, by pvnet.MAC) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	d.duplicates++
	if slices.Contains(d.claimed6, a) || len(d.claimed6) > slaac.MaxPrefixes {
		return // logged once for an address: the log must not grow with what stations send
	}
	d.claimed6 = append(d.claimed6, a)
	d.log.Warn("an address that the uplink would have is another station's and is not used: give the uplink's vif another MAC, "+
		`or write an address with "uplink ipv6 ADDRESS via ROUTER"; the link is asked again every ten minutes`, "address", a, "station", by)
}

// discovered applies what routers announced to the uplink. No router can take a guest's network: a prefix that
// overlaps one is left out, and the link is asked for no address of it. It reports whether anything but times has
// changed.
func (d *daemon) discovered(ctx context.Context, client *slaac.Client, now time.Time) (changed bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if ctx.Err() != nil {
		return false, nil
	}
	var guests []netip.Prefix // as a reload may just have made them
	for i := range d.cfg.Networks {
		if n := &d.cfg.Networks[i]; n.IPv6.IsValid() {
			guests = append(guests, n.IPv6)
		}
	}
	client.Exclude(guests)
	s, old := client.Settings(now), d.auto
	// Once for a prefix, until it is no longer a network of guests.
	d.refused6 = slices.DeleteFunc(d.refused6, func(p netip.Prefix) bool { return overlapping6(d.cfg, p) == "" })
	for _, p := range s.Excluded {
		if !slices.Contains(d.refused6, p) && len(d.refused6) < slaac.MaxPrefixes {
			d.refused6 = append(d.refused6, p)
			d.log.Warn("a prefix that a router of the uplink announces is left out, since it is a network of guests: the uplink asks for no address of it", "prefix", p, "network", overlapping6(d.cfg, p))
		}
	}
	same := s.Router == old.Router && s.MTU == old.MTU && slices.Equal(s.OnLink, old.OnLink) && slices.Equal(s.DNS, old.DNS) && slices.Equal(s.Tentative, old.Tentative) &&
		slices.EqualFunc(s.Addrs, old.Addrs, func(a, b slaac.Address) bool { return a.Prefix == b.Prefix })
	d.auto = s
	if same {
		d.listenLocked()
		return false, nil
	}
	if err := d.applyLocked(); err != nil {
		d.auto = old
		return false, errors.Join(err, d.applyLocked())
	}
	has := func(list []slaac.Address, p netip.Prefix) bool {
		return slices.ContainsFunc(list, func(a slaac.Address) bool { return a.Prefix == p })
	}
	for _, a := range s.Addrs {
		if !has(old.Addrs, a.Prefix) {
			d.say("uplink: address %v, of a prefix that a router announces", a.Prefix)
			d.claimed6 = slices.DeleteFunc(d.claimed6, func(one netip.Addr) bool { return one == a.Prefix.Addr() })
		}
	}
	for _, a := range old.Addrs {
		if !has(s.Addrs, a.Prefix) {
			d.say("uplink: address %v is over", a.Prefix)
		}
	}
	switch {
	case s.Router == old.Router:
	case s.Router.IsValid():
		d.say("uplink: IPv6 router %v", s.Router)
	default:
		d.say("uplink: no IPv6 router any more")
	}
	return true, nil
}

// compileAutoLocked adds what routers announced to the uplink's port, and reports whether it has an
// address of that. What a reload has just made a network of guests counts no more: discovered follows.
func (d *daemon) compileAutoLocked(p *router.Port, route func(to netip.Prefix, via netip.Addr)) bool {
	s := &d.auto
	p.Tentative = s.Tentative
	if p.MTU < leastMTU6 {
		return false
	}
	// The link's MTU is that of all its frames: IPv4 is cut to it as well.
	if s.MTU != 0 {
		p.MTU = min(p.MTU, s.MTU)
	}
	own := false
	for _, a := range s.Addrs {
		if overlapping6(d.cfg, netip.PrefixFrom(a.Prefix.Addr(), 64).Masked()) == "" {
			p.Addrs, own = append(p.Addrs, a.Prefix), true
		}
	}
	if !own {
		return false // packets that leave would have no source address
	}
	for _, on := range s.OnLink {
		if overlapping6(d.cfg, on) == "" {
			route(on, netip.Addr{})
		}
	}
	if s.Router.IsValid() {
		route(netip.PrefixFrom(netip.IPv6Unspecified(), 0), s.Router)
	}
	return true
}

// overlapping6 returns the network of guests that an IPv6 prefix overlaps, or "".
func overlapping6(c *config.Config, p netip.Prefix) string {
	for i := range c.Networks {
		if n := &c.Networks[i]; n.IPv6.IsValid() && n.IPv6.Overlaps(p) {
			return n.Name
		}
	}
	return ""
}

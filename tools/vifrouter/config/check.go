package config

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"barevif/pvnet"
	"barevif/pvnet/packet"
)

// check checks that the lines go together, and finds out which names are guests.
func (p *parser) check() {
	p.checkUplink()
	p.checkNetworks()
	p.checkGuests()
	p.checkRoutes()
	for i := range p.c.Rules {
		r := &p.c.Rules[i]
		p.name2place(&r.From, r.line)
		p.name2place(&r.To, r.line)
	}
	p.checkForwards()
	p.checkServices()
}

func (p *parser) checkUplink() {
	u := &p.c.Uplink
	if u.Vif == "" {
		if _, said := p.seen["uplink vif"]; !said && !p.complainedOfVif() {
			p.add(0, "the file names no uplink", `write "uplink vif 0"`)
		}
	}
	if !u.DHCP && !u.Auto6 && !u.IPv4.IsValid() && !u.IPv6.IsValid() && p.seen["uplink ipv4"]+p.seen["uplink ipv6"] == 0 {
		p.add(u.line, "the uplink has no address", `write "uplink ipv4 dhcp", or an address`)
	}
	if u.NAT4 && !u.DHCP && !u.IPv4.IsValid() && p.seen["uplink nat"] > 0 && p.seen["uplink ipv4"] == 0 {
		p.add(p.seen["uplink nat"], "there is no IPv4 address at the uplink to translate to", `write "uplink ipv4 …", or leave ipv4 out of nat`)
	}
	if u.NAT6 && !u.Auto6 && !u.IPv6.IsValid() && p.seen["uplink ipv6"] == 0 {
		p.add(p.seen["uplink nat"], "there is no IPv6 address at the uplink to translate to", `write "uplink ipv6 …", or leave ipv6 out of nat`)
	}
}

// complainedOfVif reports whether an error is about the uplink's vif already.
func (p *parser) complainedOfVif() bool {
	return slices.ContainsFunc(p.errs, func(e *Error) bool { return e.Instead == uplinkForms || e.Instead == vifForm })
}

func (p *parser) checkNetworks() {
	var known []struct {
		prefix netip.Prefix
		of     string
	}
	add := func(line int, prefix netip.Prefix, of string) {
		if !prefix.IsValid() {
			return
		}
		for _, k := range known {
			if k.prefix.Overlaps(prefix) {
				p.add(line, fmt.Sprintf("the prefix %v of %s overlaps %v of %s", prefix, of, k.prefix, k.of), "choose another prefix")
				return
			}
		}
		known = append(known, struct {
			prefix netip.Prefix
			of     string
		}{prefix, of})
	}
	u := &p.c.Uplink
	add(u.line, u.IPv4.Masked(), "the uplink")
	add(u.line, u.IPv6.Masked(), "the uplink")
	if len(p.c.Networks) == 0 && len(p.errs) == 0 { // an error may be about a line that should have made one
		p.add(0, "the file has no network for guests", networkForms)
	}
	for i := range p.c.Networks {
		n := &p.c.Networks[i]
		add(n.line, n.IPv4, "network "+n.Name)
		add(n.line, n.IPv6, "network "+n.Name)
	}
}

func (p *parser) checkGuests() {
	if len(p.c.Guests) == 0 && len(p.errs) == 0 {
		p.add(0, "the file names no guests", `write "guest * in NETWORK", or a line for each`)
	}
	addrs := map[netip.Addr]string{}
	type identity struct {
		mac    pvnet.MAC
		domain uint16
		vif    string
	}
	ids := map[identity]string{}
	for i := range p.c.Guests {
		g := &p.c.Guests[i]
		n := p.c.NetworkOf(g.Network)
		if n == nil {
			p.add(g.line, fmt.Sprintf("there is no network %q", g.Network), "write a network line for it, or name another")
			continue
		}
		if g.Name != "*" {
			if p.c.NetworkOf(g.Name) != nil {
				p.add(g.line, fmt.Sprintf("a network is called %q too", g.Name), "choose another name, since rules name both")
			}
			id := identity{g.MAC, g.Domain, g.Vif}
			if other, twice := ids[id]; twice {
				p.add(g.line, fmt.Sprintf("the guest %q is the same vif as %q", g.Name, other), "leave one of the lines")
			}
			if j := slices.IndexFunc(p.c.Guests[:i], func(o Guest) bool { return o.covers(g) }); j >= 0 && ids[id] == "" {
				o := &p.c.Guests[j]
				p.add(g.line, fmt.Sprintf("no vif becomes the guest %q, since %q in line %d takes all of them", g.Name, o.Name, o.line), "put this line before that one")
			}
			ids[id] = g.Name
		}
		if g.Addr.IsValid() {
			switch other, twice := addrs[g.Addr]; {
			case !n.IPv4.IsValid() || !inside(n.IPv4, g.Addr):
				p.add(g.line, fmt.Sprintf("%v is no host of the network %s", g.Addr, n.Name), "choose an address of its ipv4 prefix")
			case g.Addr == n.Router:
				p.add(g.line, fmt.Sprintf("%v is the router's own address", g.Addr), "choose another")
			case twice:
				p.add(g.line, fmt.Sprintf("the guest %q has the address %v too", other, g.Addr), "give each guest an address of its own")
			}
			addrs[g.Addr] = g.Name
		}
	}
}

// covers reports whether each vif that may be the guest o may be g as well. "*" covers no other.
func (g *Guest) covers(o *Guest) bool {
	return g.Name != "*" && (g.MAC == pvnet.MAC{} || g.MAC == o.MAC) && (g.Domain == 0 || g.Domain == o.Domain) && (g.Vif == "" || g.Vif == o.Vif)
}

func (p *parser) checkRoutes() {
	u := &p.c.Uplink
	lines := map[netip.Prefix]int{} // of routes by their prefixes
	for _, r := range p.c.Routes {
		own, via := u.IPv4, u.Via4
		if r.Via.Is6() {
			own, via = u.IPv6, u.Via6
		}
		switch at, twice := lines[r.Prefix]; {
		case twice:
			p.add(r.line, fmt.Sprintf("line %d has a route to %v already", at, r.Prefix), "leave one of the lines")
		case r.Prefix.Bits() == 0 && via.IsValid():
			p.add(r.line, fmt.Sprintf("the uplink's line names a router to all other networks already, %v", via), `leave the route out, or "via" there`)
		case own.IsValid() && r.Prefix == own.Masked():
			p.add(r.line, fmt.Sprintf("%v is the uplink's own link, which needs no router", r.Prefix), "leave the route out")
		}
		lines[r.Prefix] = r.line
		switch {
		case r.Via.Is4() && u.DHCP:
			p.add(r.line, "the uplink's address is not known yet, and a route needs one", "give the uplink a static address, or have its DHCP server announce the route")
		case r.Via.Is6() && u.Auto6 && !r.Via.IsLinkLocalUnicast():
			p.add(r.line, "the uplink's address is not known yet, and a route needs one", "name the router by its link-local address, or give the uplink a static one")
		case r.Via.Is6() && u.Auto6:
		case !own.IsValid():
			if len(p.errs) == 0 {
				p.add(r.line, "the uplink has no address of that family", "write one, or leave the route out")
			}
		case own.Addr() == r.Via || !own.Contains(r.Via) && !r.Via.IsLinkLocalUnicast(), r.Via.Is4() && own.Bits() < 31 && !inside(own.Masked(), r.Via):
			p.add(r.line, fmt.Sprintf("%v is not another address of %v", r.Via, own.Masked()), "write the address of a router on the uplink's link")
		}
		for i := range p.c.Networks {
			for _, n := range []netip.Prefix{p.c.Networks[i].IPv4, p.c.Networks[i].IPv6} {
				if n.IsValid() && n.Overlaps(r.Prefix) && n.Bits() <= r.Prefix.Bits() {
					p.add(r.line, fmt.Sprintf("%v is in the network %s", r.Prefix, p.c.Networks[i].Name), "leave the route out")
				}
			}
		}
	}
}

// name2place finds out whether a name is a network's or a guest's.
func (p *parser) name2place(at *Place, line int) {
	if at.Kind != InNetwork || p.c.NetworkOf(at.Name) != nil {
		return
	}
	for i := range p.c.Guests {
		if p.c.Guests[i].Name == at.Name && at.Name != "*" {
			at.Kind = AtGuest
			return
		}
	}
	p.add(line, fmt.Sprintf("no network and no guest is called %q", at.Name), "write any, uplink, router, or the name of a network or of a guest")
}

// routers6 reports whether an address of an IPv6 network is the router's in one of its /64, or that
// of all routers there (RFC 4291, 2.6.1).
func (n *Network) routers6(a netip.Addr) bool {
	b := a.As16()
	return n.IPv6.IsValid() && n.IPv6.Contains(a) && binary.BigEndian.Uint64(b[8:]) <= 1
}

// portDHCP is where a DHCP client hears its servers.
const portDHCP = 68

func (p *parser) checkForwards() {
	u := &p.c.Uplink
	for i := range p.c.Forwards {
		f := &p.c.Forwards[i]
		inNetwork := false
		for j := range p.c.Networks {
			n := &p.c.Networks[j]
			if f.To == n.Router {
				p.add(f.line, fmt.Sprintf("%v is the router itself", f.To), `write a rule to it: "allow from uplink to router …"`)
			}
			switch {
			case n.IPv4.IsValid() && n.IPv4.Contains(f.To):
				inNetwork = true
				if !inside(n.IPv4, f.To) {
					p.add(f.line, fmt.Sprintf("%v is no host of the network %s", f.To, n.Name), "forward to the address of a guest")
				}
			case n.IPv6.IsValid() && n.IPv6.Contains(f.To):
				inNetwork = true
				if n.routers6(f.To) {
					p.add(f.line, fmt.Sprintf("%v is the router itself: the first address of each /64 is", f.To), "forward to the address of a guest")
				}
			}
		}
		if len(p.errs) == 0 && (f.To.Is4() && !u.DHCP && !u.IPv4.IsValid() || f.To.Is6() && !u.Auto6 && !u.IPv6.IsValid()) {
			p.add(f.line, fmt.Sprintf("the uplink has no address of the family of %v to forward from", f.To), "give it one, or leave the forward out")
		}
		if u.DHCP && f.To.Is4() && f.Proto == packet.UDP && f.First <= portDHCP && portDHCP <= f.Last {
			p.add(f.line, fmt.Sprintf("port %d is that of the uplink's DHCP client", portDHCP), "leave it out")
		}
		if !inNetwork && len(p.errs) == 0 {
			p.add(f.line, fmt.Sprintf("%v is in no network", f.To), "forward to the address of a guest")
		}
		unknown := u.DHCP && f.At.Is4() || u.Auto6 && f.At.Is6() // it may become the uplink's
		if f.At.IsValid() && !unknown && f.At != u.IPv4.Addr() && f.At != u.IPv6.Addr() && len(p.errs) == 0 {
			p.add(f.line, fmt.Sprintf("%v is no address of the uplink", f.At), `leave "at" out`)
		}
		for _, g := range p.c.Forwards[:i] {
			if f.Proto == g.Proto && f.First <= g.Last && g.First <= f.Last && f.To.Is4() == g.To.Is4() && (f.At == g.At || !f.At.IsValid() || !g.At.IsValid()) {
				p.add(f.line, fmt.Sprintf("ports of this forward are those of line %d too", g.line), "let each port lead to one guest")
				break
			}
		}
	}
}

func (p *parser) checkServices() {
	u, d, m := &p.c.Uplink, &p.c.DNS, &p.c.Metrics
	if len(p.errs) == 0 && !d.Off && len(d.Upstream) == 0 && !u.DHCP && !u.Auto6 {
		p.add(d.line, "nothing says where names are looked up, since the uplink has no DHCP lease and no announcements of routers", `write "dns to ADDRESS" or "dns off"`)
	}
	for _, to := range d.Upstream {
		a := to.Addr()
		if a == u.IPv4.Addr() || a == u.IPv6.Addr() || slices.ContainsFunc(p.c.Networks, func(n Network) bool { return a == n.Router || n.routers6(a) }) {
			p.add(d.line, fmt.Sprintf("%v is the router itself, which would ask itself without end", a), "name another server")
		}
	}
	if m.Addr.IsValid() && !m.Machine && len(p.errs) == 0 {
		atUplink := m.Addr.Addr() == u.IPv4.Addr() || m.Addr.Addr() == u.IPv6.Addr()
		own := atUplink
		for i := range p.c.Networks {
			own = own || m.Addr.Addr() == p.c.Networks[i].Router
		}
		switch {
		case !own:
			p.add(m.line, fmt.Sprintf("%v is no address of the router", m.Addr.Addr()), "write the router's address in a network, or metrics machine")
		case m.Addr.Port() == 53 && !d.Off:
			p.add(m.line, "port 53 is that of the name server", "choose another")
		}
		for _, f := range p.c.Forwards {
			if atUplink && f.Proto == packet.TCP && f.First <= m.Addr.Port() && m.Addr.Port() <= f.Last && f.To.Is4() == m.Addr.Addr().Is4() && (!f.At.IsValid() || f.At == m.Addr.Addr()) {
				p.add(m.line, fmt.Sprintf("line %d forwards the port %d to a guest", f.line, m.Addr.Port()), "choose another")
			}
		}
	}
}

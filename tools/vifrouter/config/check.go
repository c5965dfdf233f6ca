package config

import (
	"fmt"
	"net/netip"
	"slices"

	"barevif/pvnet"
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

func (p *parser) checkRoutes() {
	u := &p.c.Uplink
	for _, r := range p.c.Routes {
		own := u.IPv4
		if r.Via.Is6() {
			own = u.IPv6
		}
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
		case own.Addr() == r.Via || !own.Contains(r.Via) && !r.Via.IsLinkLocalUnicast():
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
			inNetwork = inNetwork || n.IPv4.IsValid() && n.IPv4.Contains(f.To) || n.IPv6.IsValid() && n.IPv6.Contains(f.To)
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
	if m.Addr.IsValid() && !m.Machine && len(p.errs) == 0 {
		own := m.Addr.Addr() == u.IPv4.Addr() || m.Addr.Addr() == u.IPv6.Addr()
		for i := range p.c.Networks {
			own = own || m.Addr.Addr() == p.c.Networks[i].Router
		}
		switch {
		case !own:
			p.add(m.line, fmt.Sprintf("%v is no address of the router", m.Addr.Addr()), "write the router's address in a network, or metrics machine")
		case m.Addr.Port() == 53 && !d.Off:
			p.add(m.line, "port 53 is that of the name server", "choose another")
		}
	}
}

package config

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"barevif/pvnet"
	"barevif/pvnet/packet"
)

// Parse checks the text of a file; name is for its errors, which are Errors.
func Parse(name string, text []byte) (*Config, error) {
	p := &parser{file: name, c: &Config{Lease: time.Hour, Uplink: Uplink{NAT4: true}}, seen: map[string]int{}}
	if len(text) > MaxFile {
		p.add(0, fmt.Sprintf("the file is longer than %d bytes", MaxFile), "make it shorter")
		return nil, p.errs
	}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		p.line = n
		if len(p.errs) >= MaxErrors {
			p.fail(fmt.Sprintf("the lines before have %d errors, and nothing from here on was read", len(p.errs)), "mend those first")
			return nil, p.errs
		}
		line = strings.TrimRight(line, "\r\n")
		switch {
		case len(line) > MaxLine:
			p.fail(fmt.Sprintf("the line is longer than %d bytes", MaxLine), "split it")
			continue
		case !utf8.ValidString(line) || strings.ContainsFunc(line, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }):
			p.fail("the line has bytes that are no text", "write plain text")
			continue
		}
		line, _, _ = strings.Cut(line, "#")
		if p.words = strings.Fields(line); len(p.words) > 0 {
			p.statement()
		}
	}
	p.check()
	if len(p.errs) > 0 {
		slices.SortStableFunc(p.errs, func(a, b *Error) int { return a.Line - b.Line })
		return nil, p.errs
	}
	return p.c, nil
}

// A parser reads a file. Its methods that take words report what is wrong themselves, and then
// return false.
type parser struct {
	file  string
	line  int
	words []string // that are left of the line
	c     *Config
	errs  Errors
	seen  map[string]int // statements that may come once, and their lines
}

func (p *parser) add(line int, what, instead string) {
	p.errs = append(p.errs, &Error{p.file, line, what, instead})
}

func (p *parser) fail(what, instead string) bool {
	p.add(p.line, what, instead)
	return false
}

// next takes a word; it returns "" at the end of the line.
func (p *parser) next() string {
	if len(p.words) == 0 {
		return ""
	}
	w := p.words[0]
	p.words = p.words[1:]
	return w
}

// value takes the value of a word.
func (p *parser) value(of, instead string) (string, bool) {
	w := p.next()
	if w == "" {
		return "", p.fail(fmt.Sprintf("%q has no value", of), instead)
	}
	return w, true
}

// end reports whether the line has ended.
func (p *parser) end(instead string) bool {
	if len(p.words) > 0 {
		return p.fail(fmt.Sprintf("%q is too much", p.words[0]), instead)
	}
	return true
}

// once reports whether a statement is there for the first time.
func (p *parser) once(what string) bool {
	if at, ok := p.seen[what]; ok {
		return p.fail(fmt.Sprintf("%q is there already, in line %d", what, at), "leave one of the lines")
	}
	p.seen[what] = p.line
	return true
}

// room reports whether there may be one more of what n are there. It says once that there may not.
func (p *parser) room(what string, n, most int) bool {
	if n < most {
		return true
	}
	if said := "too many " + what; p.seen[said] == 0 {
		p.seen[said] = p.line
		p.fail(fmt.Sprintf("there are too many %s", what), fmt.Sprintf("have at most %d", most))
	}
	return false
}

// statements are the first words of lines.
var statements = []string{"uplink", "route", "network", "guest", "allow", "drop", "reject", "default", "forward", "dhcp", "dns", "metrics", "flows"}

func (p *parser) statement() {
	switch w := p.next(); w {
	case "uplink":
		p.uplink()
	case "route":
		p.route()
	case "network":
		p.network()
	case "guest":
		p.guest()
	case "allow":
		p.rule(Allow)
	case "drop":
		p.rule(Drop)
	case "reject":
		p.rule(Reject)
	case "default":
		p.defaultAction()
	case "forward":
		p.forward()
	case "dhcp":
		p.dhcp()
	case "dns":
		p.dns()
	case "metrics":
		p.metrics()
	case "flows":
		p.flows()
	default:
		p.fail(fmt.Sprintf("%q is no statement", w), "begin with one of: "+strings.Join(statements, ", "))
	}
}

const uplinkForms = `write "uplink vif 0", "uplink ipv4 dhcp", "uplink ipv4 192.0.2.2/24 via 192.0.2.1", "uplink ipv6 auto", "uplink ipv6 2001:db8::2/64 via 2001:db8::1" or "uplink nat ipv4"`

func (p *parser) uplink() {
	u := &p.c.Uplink
	switch w := p.next(); w {
	case "vif":
		id, ok := p.vif()
		if ok && p.end(uplinkForms) && p.once("uplink vif") {
			u.Vif, u.line = id, p.line
		}
	case "ipv4", "ipv6":
		if !p.once("uplink " + w) {
			return
		}
		if len(p.words) > 0 && p.words[0] == "dhcp" {
			if w == "ipv6" {
				p.fail("DHCP for IPv6 is not supported at the uplink", `write "uplink ipv6 auto" for what its routers announce, or an address: "uplink ipv6 2001:db8::2/64 via 2001:db8::1"`)
				return
			}
			p.next()
			if p.end(uplinkForms) {
				u.DHCP = true
			}
			return
		}
		if len(p.words) > 0 && p.words[0] == "auto" {
			if w == "ipv4" {
				p.fail("no router announces addresses of IPv4", `write "uplink ipv4 dhcp", or an address: "uplink ipv4 192.0.2.2/24 via 192.0.2.1"`)
				return
			}
			p.next()
			if p.end(`write "uplink ipv6 auto" alone: routers say the rest`) {
				u.Auto6 = true
			}
			return
		}
		p.uplinkAddress(w)
	case "nat":
		if !p.once("uplink nat") {
			return
		}
		u.NAT4, u.NAT6 = false, false
		if len(p.words) == 0 {
			p.fail(`"nat" has no value`, `write "uplink nat ipv4", "uplink nat ipv4 ipv6" or "uplink nat none"`)
		}
		for first := true; len(p.words) > 0; first = false {
			switch f := p.next(); {
			case f == "ipv4" && !u.NAT4:
				u.NAT4 = true
			case f == "ipv6" && !u.NAT6:
				u.NAT6 = true
			case f == "none" && first && len(p.words) == 0:
			default:
				p.fail(fmt.Sprintf("%q makes no sense here", f), `write "uplink nat ipv4", "uplink nat ipv4 ipv6" or "uplink nat none"`)
				return
			}
		}
	default:
		p.fail(fmt.Sprintf("%q is nothing of an uplink", w), uplinkForms)
	}
}

// uplinkAddress reads "ADDR/BITS [via ADDR]" of family w.
func (p *parser) uplinkAddress(w string) {
	six := w == "ipv6"
	u := &p.c.Uplink
	a, ok := p.ownAddress(w, six)
	if !ok {
		return
	}
	var via netip.Addr
	if len(p.words) > 0 {
		if word := p.next(); word != "via" {
			p.fail(fmt.Sprintf("%q makes no sense here", word), uplinkForms)
			return
		}
		if via, ok = p.addr("via", six); !ok {
			return
		}
		if via == a.Addr() || !a.Contains(via) && !(six && via.IsLinkLocalUnicast()) || !six && a.Bits() < 31 && !inside(a.Masked(), via) {
			p.fail(fmt.Sprintf("the router %v is not another address of %v", via, a.Masked()), "write the address of a router on the uplink's link")
			return
		}
	}
	if !p.end(uplinkForms) {
		return
	}
	if six {
		u.IPv6, u.Via6 = a, via
	} else {
		u.IPv4, u.Via4 = a, via
	}
}

// ownAddress reads an address with the length of its prefix.
func (p *parser) ownAddress(of string, six bool) (netip.Prefix, bool) {
	instead := "write ADDRESS/BITS, such as 192.0.2.2/24"
	if six {
		instead = "write ADDRESS/BITS, such as 2001:db8::2/64"
	}
	w, ok := p.value(of, instead)
	if !ok {
		return netip.Prefix{}, false
	}
	a, err := netip.ParsePrefix(w)
	if err != nil || a.Addr().Is6() != six || a.Addr().Is4In6() {
		return a, p.fail(fmt.Sprintf("%q is no %s address with a length", w, of), instead)
	}
	if !host(a.Addr()) || a.Bits() == 0 || !six && a.Bits() < 31 && (a.Addr() == a.Masked().Addr() || a.Addr() == lastOf(a)) {
		return a, p.fail(fmt.Sprintf("%v is no address that a host can have", a), instead)
	}
	return a, true
}

// host reports whether a host can have the address.
func host(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !(a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240))
}

// lastOf returns the last address of an IPv4 prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

func (p *parser) addr(of string, six bool) (netip.Addr, bool) {
	instead := "write an address, such as 192.0.2.1"
	if six {
		instead = "write an address, such as 2001:db8::1"
	}
	w, ok := p.value(of, instead)
	if !ok {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(w)
	if err != nil || a.Is6() != six || a.Is4In6() || a.Zone() != "" || !host(a) && !(six && a.IsLinkLocalUnicast()) {
		return a, p.fail(fmt.Sprintf("%q is no such address", w), instead)
	}
	return a, true
}

const vifForm = `write the number of a vif, such as "vif 0"`

// vif reads the number of a vif.
func (p *parser) vif() (string, bool) {
	w, ok := p.value("vif", vifForm)
	if !ok {
		return "", false
	}
	if n, err := strconv.ParseUint(w, 10, 16); err != nil || strconv.FormatUint(n, 10) != w {
		return "", p.fail(fmt.Sprintf("%q is no number of a vif", w), vifForm)
	}
	return w, true
}

func (p *parser) route() {
	const instead = `write "route 192.0.2.128/25 via 192.0.2.9"`
	w := p.next()
	to, err := netip.ParsePrefix(w)
	switch {
	case err != nil || to != to.Masked() || to.Addr().Is4In6():
		p.fail(fmt.Sprintf("%q is no prefix", w), instead)
	case !host(to.Addr()) && !(to.Addr().IsUnspecified() && to.Bits() < 8):
		p.fail(fmt.Sprintf("%v is no prefix of addresses that hosts beyond a router can have", to), instead)
	case p.next() != "via":
		p.fail(`"via" is missing`, instead)
	default:
		if via, ok := p.addr("via", to.Addr().Is6()); ok && p.end(instead) && p.room("routes", len(p.c.Routes), MaxRoutes) {
			p.c.Routes = append(p.c.Routes, Route{to, via, p.line})
		}
	}
}

// reserved are names with another meaning.
var reserved = []string{"any", "uplink", "router"}

// name reads a name of the user's.
func (p *parser) name(of, instead string) (string, bool) {
	w, ok := p.value(of, instead)
	if !ok {
		return "", false
	}
	bad := strings.ContainsFunc(w, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_')
	})
	switch {
	case bad || len(w) > MaxName:
		return "", p.fail(fmt.Sprintf("%q is no name", w), fmt.Sprintf("use up to %d letters, digits, - and _", MaxName))
	case slices.Contains(reserved, w):
		return "", p.fail(fmt.Sprintf("the name %q has a meaning already", w), "choose another")
	}
	return w, true
}

const networkForms = `write "network NAME ipv4 10.137.0.0/24 router 10.137.0.1 pool 10.137.0.100-10.137.0.199" or "network NAME ipv6 fd00:137::/56"`

func (p *parser) network() {
	name, ok := p.name("network", networkForms)
	if !ok {
		return
	}
	n := p.c.NetworkOf(name)
	if n == nil {
		if !p.room("networks", len(p.c.Networks), MaxNetworks) {
			return
		}
		p.c.Networks = append(p.c.Networks, Network{Name: name, line: p.line})
		n = &p.c.Networks[len(p.c.Networks)-1]
	}
	family := p.next()
	if family != "ipv4" && family != "ipv6" {
		p.fail(fmt.Sprintf("%q is nothing of a network", family), networkForms)
		return
	}
	if !p.once("network " + name + " " + family) {
		return
	}
	w := p.next()
	prefix, err := netip.ParsePrefix(w)
	six := family == "ipv6"
	if err != nil || prefix.Addr().Is6() != six || prefix.Addr().Is4In6() {
		p.fail(fmt.Sprintf("%q is no %s prefix", w, family), networkForms)
		return
	}
	if prefix != prefix.Masked() {
		p.fail(fmt.Sprintf("%v has bits behind its length", prefix), fmt.Sprintf("write %v", prefix.Masked()))
		return
	}
	if six {
		switch {
		case prefix.Bits() < 48 || prefix.Bits() > 64:
			p.fail(fmt.Sprintf("%v cannot be shared out", prefix), "take a prefix of 48 to 64 bits, of which each vif gets a /64")
		case !prefix.Addr().IsGlobalUnicast():
			p.fail(fmt.Sprintf("%v is no prefix for hosts", prefix), "take a global or a unique local prefix, such as fd00:137::/56")
		case p.end(networkForms):
			n.IPv6 = prefix
		}
		return
	}
	if prefix.Bits() < 8 || prefix.Bits() > 30 || !host(prefix.Addr()) {
		p.fail(fmt.Sprintf("%v is no prefix for guests", prefix), "take a prefix of 8 to 30 bits of addresses that hosts can have, such as 10.137.0.0/24")
		return
	}
	p.network4(n, prefix)
}

func (p *parser) network4(n *Network, prefix netip.Prefix) {
	if len(p.words) == 0 || p.next() != "router" {
		p.fail(`"router" is missing`, networkForms)
		return
	}
	router, ok := p.addr("router", false)
	if !ok {
		return
	}
	if !inside(prefix, router) {
		p.fail(fmt.Sprintf("the router %v is no host of %v", router, prefix), "give the router an address of the network, usually the first")
		return
	}
	var first, last netip.Addr
	if len(p.words) > 0 {
		if w := p.next(); w != "pool" {
			p.fail(fmt.Sprintf("%q makes no sense here", w), networkForms)
			return
		}
		w, _ := p.value("pool", networkForms)
		a, b, _ := strings.Cut(w, "-")
		var err1, err2 error
		first, err1 = netip.ParseAddr(a)
		last, err2 = netip.ParseAddr(b)
		switch {
		case err1 != nil || err2 != nil:
			p.fail(fmt.Sprintf("%q is no range of addresses", w), "write it as 10.137.0.100-10.137.0.199")
			return
		case !inside(prefix, first) || !inside(prefix, last) || last.Less(first):
			p.fail(fmt.Sprintf("the pool %s is no range of hosts of %v", w, prefix), "write the first and the last address, both of the network")
			return
		case number(last)-number(first) >= MaxPool:
			p.fail("the pool is too large", fmt.Sprintf("have at most %d addresses in it", MaxPool))
			return
		case !router.Less(first) && !last.Less(router):
			p.fail(fmt.Sprintf("the router's address %v is in the pool", router), "leave it out of the pool")
			return
		}
	}
	if p.end(networkForms) {
		n.IPv4, n.Router, n.First, n.Last = prefix, router, first, last
	}
}

// inside reports whether a is a host of an IPv4 prefix.
func inside(prefix netip.Prefix, a netip.Addr) bool {
	return prefix.Contains(a) && a != prefix.Addr() && a != lastOf(prefix)
}

// number returns an IPv4 address as a number.
func number(a netip.Addr) uint32 {
	b := a.As4()
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

const guestForms = `write "guest NAME in NETWORK mac 00:16:3e:00:00:07 domain 3 vif 0 ipv4 10.137.0.7", with what is known of them, or "guest * in NETWORK"`

func (p *parser) guest() {
	g := Guest{line: p.line}
	if len(p.words) > 0 && p.words[0] == "*" {
		g.Name = p.next()
	} else {
		var ok bool
		if g.Name, ok = p.name("guest", guestForms); !ok {
			return
		}
	}
	if !p.once("guest " + g.Name) {
		return
	}
	if !p.room("guests", len(p.c.Guests), MaxGuests) {
		return
	}
	if p.next() != "in" {
		p.fail(`"in" is missing`, guestForms)
		return
	}
	var ok bool
	if g.Network, ok = p.value("in", guestForms); !ok {
		return
	}
	had := map[string]bool{}
	for len(p.words) > 0 {
		w := p.next()
		if had[w] {
			p.fail(fmt.Sprintf("%q comes twice", w), guestForms)
			return
		}
		had[w] = true
		if !p.guestWord(&g, w) {
			return
		}
	}
	switch {
	case g.Name == "*" && len(had) > 0:
		p.fail(`"guest *" are all that no other line names`, `write "guest * in NETWORK" alone`)
		return
	case g.Name != "*" && !had["mac"] && !had["domain"] && !had["vif"]:
		p.fail(fmt.Sprintf("nothing says which vif the guest %q is", g.Name), "add mac, domain or vif")
		return
	}
	p.c.Guests = append(p.c.Guests, g)
}

func (p *parser) guestWord(g *Guest, w string) bool {
	switch w {
	case "mac":
		v, ok := p.value(w, guestForms)
		if !ok {
			return false
		}
		mac, err := net.ParseMAC(v)
		if err != nil || len(mac) != 6 || mac[0]&1 != 0 || pvnet.MAC(mac) == (pvnet.MAC{}) {
			return p.fail(fmt.Sprintf("%q is no MAC of a card", v), "write it as 00:16:3e:00:00:07")
		}
		g.MAC = pvnet.MAC(mac)
	case "domain":
		v, ok := p.value(w, guestForms)
		if !ok {
			return false
		}
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n == 0 || n >= 0x7ff0 {
			return p.fail(fmt.Sprintf("%q is no number of a guest's domain", v), "write a number from 1 to 32751")
		}
		g.Domain = uint16(n)
	case "vif":
		var ok bool
		g.Vif, ok = p.vif()
		return ok
	case "ipv4":
		var ok bool
		g.Addr, ok = p.addr(w, false)
		return ok
	default:
		return p.fail(fmt.Sprintf("%q is nothing of a guest", w), guestForms)
	}
	return true
}

const ruleForms = `write "allow from PLACE to PLACE", with PLACE any, uplink, router, a network or a guest, and then if wanted: family, proto, port, sport, type, source, dest, state, name`

func (p *parser) rule(a Action) {
	r := Rule{Action: a, line: p.line}
	if p.next() != "from" {
		p.fail(`"from" is missing`, ruleForms)
		return
	}
	var ok bool
	if r.From, ok = p.place("from"); !ok {
		return
	}
	if p.next() != "to" {
		p.fail(`"to" is missing`, ruleForms)
		return
	}
	if r.To, ok = p.place("to"); !ok {
		return
	}
	had := map[string]bool{}
	for len(p.words) > 0 {
		w := p.next()
		if had[w] {
			p.fail(fmt.Sprintf("%q comes twice", w), "put all values behind one, with commas: port 80,443")
			return
		}
		had[w] = true
		if !p.ruleWord(&r, w) {
			return
		}
	}
	if p.ruleFits(&r) && p.room("rules", len(p.c.Rules), MaxRules) {
		p.c.Rules = append(p.c.Rules, r)
	}
}

// place reads a place. name2place finds out later whether a name is a network's or a guest's.
func (p *parser) place(of string) (Place, bool) {
	w, ok := p.value(of, ruleForms)
	if !ok {
		return Place{}, false
	}
	switch w {
	case "any":
		return Place{Kind: Anywhere}, true
	case "uplink":
		return Place{Kind: AtUplink}, true
	case "router":
		return Place{Kind: AtRouter}, true
	}
	return Place{Kind: InNetwork, Name: w}, true
}

// protocols are the names of protocols.
var protocols = map[string]uint8{"tcp": packet.TCP, "udp": packet.UDP, "icmp": icmp, "icmpv6": icmpv6, "gre": packet.GRE, "sctp": packet.SCTP, "esp": 50, "ah": 51}

const (
	icmp   = 1
	icmpv6 = 58
)

func (p *parser) ruleWord(r *Rule, w string) bool {
	v, ok := p.value(w, ruleForms)
	if !ok {
		return false
	}
	list := strings.Split(v, ",")
	switch w {
	case "family":
		switch v {
		case "ipv4":
			r.Family = 4
		case "ipv6":
			r.Family = 6
		default:
			return p.fail(fmt.Sprintf("%q is no family", v), "write ipv4 or ipv6")
		}
	case "proto":
		for _, s := range list {
			n, known := protocols[s]
			if i, err := strconv.ParseUint(s, 10, 8); err == nil {
				n, known = uint8(i), true
			}
			if !known {
				return p.fail(fmt.Sprintf("%q is no protocol", s), "write tcp, udp, icmp, icmpv6, gre, sctp, esp, ah or a number up to 255")
			}
			r.Proto = append(r.Proto, n)
		}
	case "port", "sport":
		for _, s := range list {
			ports, err := parsePorts(s)
			if err != nil {
				return p.fail(err.Error(), "write ports from 1 to 65535, such as 80,443 or 8000-8010")
			}
			if w == "port" {
				r.DstPorts = append(r.DstPorts, ports)
			} else {
				r.SrcPorts = append(r.SrcPorts, ports)
			}
		}
	case "type":
		for _, s := range list {
			n, err := strconv.ParseUint(s, 10, 8)
			if err != nil {
				return p.fail(fmt.Sprintf("%q is no type of ICMP", s), "write numbers up to 255, such as 8 for the echo request of icmp")
			}
			r.Types = append(r.Types, uint8(n))
		}
	case "source", "dest":
		for _, s := range list {
			a, err := parseNet(s)
			if err != nil {
				return p.fail(err.Error(), "write addresses or prefixes, such as 192.0.2.7,2001:db8::/32")
			}
			if w == "source" {
				r.Source = append(r.Source, a)
			} else {
				r.Dest = append(r.Dest, a)
			}
		}
	case "state":
		for _, s := range list {
			switch s {
			case "related":
				r.Related = true
			case "invalid":
				r.Invalid = true
			case "established":
				return p.fail("packets of a flow pass because it was allowed", "leave out the line that allows the flow")
			default:
				return p.fail(fmt.Sprintf("%q is no state", s), "write related or invalid; without state a rule is about new flows")
			}
		}
	case "name":
		p.words = append([]string{v}, p.words...)
		var ok bool
		r.Name, ok = p.name("name", ruleForms)
		return ok
	default:
		return p.fail(fmt.Sprintf("%q is nothing of a rule", w), ruleForms)
	}
	return true
}

// ruleFits checks that the parts of a rule go together.
func (p *parser) ruleFits(r *Rule) bool {
	only := func(protos ...uint8) bool {
		return len(r.Proto) > 0 && !slices.ContainsFunc(r.Proto, func(n uint8) bool { return !slices.Contains(protos, n) })
	}
	switch {
	case r.From.Kind == AtRouter && r.To.Kind == AtRouter:
		return p.fail("no packet goes from the router to itself", "name another place")
	case len(r.SrcPorts)+len(r.DstPorts) > 0 && !only(packet.TCP, packet.UDP):
		return p.fail("ports are of tcp and udp alone", `add "proto tcp", "proto udp" or "proto tcp,udp"`)
	case len(r.Types) > 0 && !only(icmp) && !only(icmpv6):
		return p.fail("types are of icmp or icmpv6 alone", `add "proto icmp" or "proto icmpv6"`)
	case r.Family == 4 && slices.Contains(r.Proto, icmpv6), r.Family == 6 && slices.Contains(r.Proto, icmp):
		return p.fail("the protocol is of the other family", "icmp is of ipv4, icmpv6 of ipv6")
	}
	for _, list := range [][]netip.Prefix{r.Source, r.Dest} {
		for _, a := range list {
			if r.Family == 4 && a.Addr().Is6() || r.Family == 6 && a.Addr().Is4() {
				return p.fail(fmt.Sprintf("%v is of the other family", a), "leave out the family, or the address")
			}
		}
	}
	if !matchable(r, true) && !matchable(r, false) {
		return p.fail("no packet has all of it: its addresses, or its protocol, are of different families", "name what is of one family, and write a rule for each")
	}
	return true
}

// matchable reports whether a packet of a family can have what a rule names.
func matchable(r *Rule, six bool) bool {
	foreign, family := uint8(icmpv6), 4
	if six {
		foreign, family = icmp, 6
	}
	of := func(list []netip.Prefix) bool {
		return len(list) == 0 || slices.ContainsFunc(list, func(a netip.Prefix) bool { return a.Addr().Is6() == six })
	}
	protocol := len(r.Proto) == 0 || slices.ContainsFunc(r.Proto, func(n uint8) bool { return n != foreign })
	return (r.Family == 0 || r.Family == family) && protocol && of(r.Source) && of(r.Dest)
}

func parsePorts(s string) (Ports, error) {
	a, b, two := strings.Cut(s, "-")
	if !two {
		b = a
	}
	first, err1 := strconv.ParseUint(a, 10, 16)
	last, err2 := strconv.ParseUint(b, 10, 16)
	if err1 != nil || err2 != nil || first == 0 || first > last {
		return Ports{}, fmt.Errorf("%q is no port and no range of ports", s)
	}
	return Ports{uint16(first), uint16(last)}, nil
}

func parseNet(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" && !a.Is4In6() {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	n, err := netip.ParsePrefix(s)
	if err != nil || n.Addr().Is4In6() {
		return n, fmt.Errorf("%q is no address and no prefix", s)
	}
	if n != n.Masked() {
		return n, fmt.Errorf("%q has bits behind its length, and is %v", s, n.Masked())
	}
	return n, nil
}

func (p *parser) defaultAction() {
	const instead = `write "default drop", "default reject" or "default allow"`
	w := p.next()
	i := slices.Index([]string{"drop", "allow", "reject"}, w)
	if i < 0 {
		p.fail(fmt.Sprintf("%q is no default", w), instead)
		return
	}
	if p.end(instead) && p.once("default") {
		p.c.Default = Action(i)
	}
}

const forwardForms = `write "forward tcp 8080 to 10.137.1.7:80" or "forward udp 5000-5010 to 10.137.0.10 at 192.0.2.2"`

func (p *parser) forward() {
	f := Forward{line: p.line}
	switch w := p.next(); w {
	case "tcp":
		f.Proto = packet.TCP
	case "udp":
		f.Proto = packet.UDP
	default:
		p.fail(fmt.Sprintf("%q is not forwarded", w), forwardForms)
		return
	}
	w, ok := p.value("forward", forwardForms)
	if !ok {
		return
	}
	ports, err := parsePorts(w)
	if err != nil {
		p.fail(err.Error(), forwardForms)
		return
	}
	f.First, f.Last, f.ToPort = ports.First, ports.Last, ports.First
	if p.next() != "to" {
		p.fail(`"to" is missing`, forwardForms)
		return
	}
	if w, ok = p.value("to", forwardForms); !ok {
		return
	}
	if ap, err := netip.ParseAddrPort(w); err == nil {
		f.To, f.ToPort = ap.Addr(), ap.Port()
	} else if f.To, err = netip.ParseAddr(w); err != nil {
		p.fail(fmt.Sprintf("%q is no address", w), forwardForms)
		return
	}
	switch {
	case !host(f.To) || f.To.Is4In6() || f.To.Zone() != "":
		p.fail(fmt.Sprintf("%v is no address of a guest", f.To), forwardForms)
		return
	case f.ToPort == 0 || int(f.ToPort)+int(f.Last-f.First) > 65535:
		p.fail("the ports end behind 65535, or begin with 0", forwardForms)
		return
	}
	if len(p.words) > 0 {
		if w := p.next(); w != "at" {
			p.fail(fmt.Sprintf("%q makes no sense here", w), forwardForms)
			return
		}
		if f.At, ok = p.addr("at", f.To.Is6()); !ok {
			return
		}
	}
	if p.end(forwardForms) && p.room("forwards", len(p.c.Forwards), MaxForwards) {
		p.c.Forwards = append(p.c.Forwards, f)
	}
}

func (p *parser) dhcp() {
	const instead = `write "dhcp lease 12h" or "dhcp off"`
	if !p.once("dhcp") {
		return
	}
	switch w := p.next(); w {
	case "off":
		if p.end(instead) {
			p.c.Lease = 0
		}
	case "lease":
		v, ok := p.value("lease", instead)
		if !ok {
			return
		}
		d, err := time.ParseDuration(v)
		if err != nil || d < 2*time.Minute || d > 30*24*time.Hour {
			p.fail(fmt.Sprintf("%q is no time of a lease", v), "write a time from 2m to 720h, such as 12h")
			return
		}
		if p.end(instead) {
			p.c.Lease = d
		}
	default:
		p.fail(fmt.Sprintf("%q is nothing of dhcp", w), instead)
	}
}

func (p *parser) dns() {
	const instead = `write "dns to 192.0.2.53", "dns uplink" or "dns off"`
	if !p.once("dns") {
		return
	}
	p.c.DNS.line = p.line
	switch w := p.next(); w {
	case "off":
		p.c.DNS.Off = p.end(instead)
	case "uplink":
		p.end(instead)
	case "to":
		if len(p.words) == 0 {
			p.fail(`"to" has no value`, instead)
		}
		for len(p.words) > 0 {
			v := p.next()
			ap, err := netip.ParseAddrPort(v)
			if err != nil {
				var a netip.Addr
				a, err = netip.ParseAddr(v)
				ap = netip.AddrPortFrom(a, 53)
			}
			if err != nil || !host(ap.Addr()) || ap.Addr().Is4In6() || ap.Addr().Zone() != "" || ap.Port() == 0 {
				p.fail(fmt.Sprintf("%q is no name server", v), instead)
				return
			}
			if len(p.c.DNS.Upstream) == MaxServers {
				p.fail("there are too many name servers", fmt.Sprintf("name at most %d", MaxServers))
				return
			}
			if slices.Contains(p.c.DNS.Upstream, ap) {
				p.fail(fmt.Sprintf("%q comes twice", v), "name each server once")
				return
			}
			p.c.DNS.Upstream = append(p.c.DNS.Upstream, ap)
		}
	default:
		p.fail(fmt.Sprintf("%q is nothing of dns", w), instead)
	}
}

func (p *parser) metrics() {
	const instead = `write "metrics router 10.137.0.1:9100" or "metrics machine 127.0.0.1:9100"`
	w := p.next()
	if w != "router" && w != "machine" {
		p.fail(fmt.Sprintf("%q says not who serves the counters", w), instead)
		return
	}
	v, ok := p.value(w, instead)
	if !ok || !p.once("metrics") {
		return
	}
	ap, err := netip.ParseAddrPort(v)
	if err != nil || ap.Port() == 0 || ap.Addr().Is4In6() || w == "router" && ap.Addr().Zone() != "" {
		p.fail(fmt.Sprintf("%q is no address with a port", v), instead)
		return
	}
	if p.end(instead) {
		p.c.Metrics = Metrics{ap, w == "machine", p.line}
	}
}

func (p *parser) flows() {
	const instead = `write "flows 65536" or "flows 65536 per-guest 16384"`
	if !p.once("flows") {
		return
	}
	count := func(of string) (int, bool) {
		v, ok := p.value(of, instead)
		if !ok {
			return 0, false
		}
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil || n < 64 || n > 1<<22 {
			return 0, p.fail(fmt.Sprintf("%q is no size of the table of flows", v), "write a number from 64 to 4194304")
		}
		return int(n), true
	}
	l := &p.c.Limits
	var ok bool
	if l.Flows, ok = count("flows"); !ok || len(p.words) == 0 {
		return
	}
	if w := p.next(); w != "per-guest" {
		p.fail(fmt.Sprintf("%q makes no sense here", w), instead)
		return
	}
	if l.FlowsPerGuest, ok = count("per-guest"); !ok || !p.end(instead) {
		return
	}
	if l.FlowsPerGuest > l.Flows {
		p.fail("one guest cannot have more flows than there are", instead)
	}
}

package router

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"barevif/pvnet/packet"
)

// A snapshot is a compiled Config. It does not change, but for the counters of its rules,
// which are guarded by Router.mu.
type snapshot struct {
	gen      uint32 // set by Configure
	ports    []*port
	own      map[addr]struct{} // the router's unicast addresses, without the link-local ones of IPv6
	bcast    map[addr]PortID   // directed broadcasts of the ports' prefixes
	routes   routes
	forwards []forward
	rules    []rule
	def      Action
	localDef Action
	clamp    bool
	times    Timeouts
}

// A port is a compiled Port.
type port struct {
	Port
	born      uint32 // generation since which it is the same port: flows older than that end
	sources   []prefix
	onLink    []prefix
	addrs     []addr   // the router's own, without the link-local one of IPv6
	addrNets  []prefix // of each of addrs
	tentative []addr
	linkLocal addr // zero without IPv6
	guardMAC  bool // SourceMAC is set
}

type portSet struct {
	any   bool // all but LocalPort
	local bool
	bits  [MaxPorts / 64]uint64
}

func (s *portSet) has(id PortID) bool {
	if id == LocalPort {
		return s.local
	}
	return s.any || s.bits[id/64]&(1<<(id%64)) != 0
}

type forward struct {
	in    portSet
	addr  addr
	any   bool // any own address
	is4   bool
	proto uint32
	ports PortRange
	to    addr
	first uint16 // the port that ports.First becomes
}

type rule struct {
	name         string
	in, out      portSet
	family       int
	src, dst     []prefix
	protos       [4]uint64 // a bit for each protocol; not used with anyProto
	anyProto     bool
	sport, dport []PortRange
	types        [4]uint64 // a bit for each ICMP type; not used with anyType
	anyType      bool
	states       States
	action       Action
	matched      uint64 // guarded by Router.mu
}

// A hop is the next hop of a packet.
type hop struct {
	out PortID
	via addr // zero: the destination itself
}

// routes are the routes by the lengths of their prefixes, the longest first.
type routes []struct {
	bits uint8
	mask addr
	to   map[addr]hop
}

func (r routes) find(a addr) (hop, bool) {
	for i := range r {
		l := &r[i]
		if l.bits < 96 && a.is4() {
			break // shorter prefixes are IPv6's
		}
		if h, ok := l.to[addr{a.hi & l.mask.hi, a.lo & l.mask.lo}]; ok {
			return h, true
		}
	}
	return hop{}, false
}

func (s *snapshot) port(id PortID) *port {
	if int(id) < len(s.ports) {
		return s.ports[id]
	}
	return nil
}

func compile(c *Config) (*snapshot, error) {
	s := &snapshot{own: map[addr]struct{}{}, bcast: map[addr]PortID{}, def: c.Default, localDef: c.LocalDefault, clamp: c.ClampMSS}
	var bad complaints
	for i := range c.Ports {
		s.addPort(&c.Ports[i], i, &bad)
	}
	s.addRoutes(c, &bad)
	s.addForwards(c, &bad)
	s.addRules(c, &bad)
	if c.Default > Reject || c.LocalDefault > Reject {
		bad.add("the default", "is no action: use Drop, Accept or Reject")
	}
	s.times = c.Timeouts.filled(&bad)
	if err := bad.err(); err != nil {
		return nil, err
	}
	return s, nil
}

func (t Timeouts) filled(bad *complaints) Timeouts {
	fill := func(d *time.Duration, name string, def time.Duration) {
		switch {
		case *d == 0:
			*d = def
		case *d < time.Second || *d > 30*24*time.Hour:
			bad.add("timeout "+name, "is %v: use between 1 s and 30 days, or 0 for %v", *d, def)
		}
	}
	fill(&t.TCPOpening, "TCPOpening", 60*time.Second)
	fill(&t.TCPEstablished, "TCPEstablished", 124*time.Minute)
	fill(&t.TCPClosing, "TCPClosing", 4*time.Minute)
	fill(&t.TCPClosed, "TCPClosed", 60*time.Second)
	fill(&t.TCPReset, "TCPReset", 10*time.Second)
	fill(&t.UDPNew, "UDPNew", 30*time.Second)
	fill(&t.UDP, "UDP", 5*time.Minute)
	fill(&t.ICMP, "ICMP", 60*time.Second)
	fill(&t.Other, "Other", 10*time.Minute)
	return t
}

func (s *snapshot) addPort(c *Port, i int, bad *complaints) {
	where := fmt.Sprintf("port %d", c.ID)
	if c.Name != "" {
		where += " (" + c.Name + ")"
	}
	if c.ID >= MaxPorts {
		bad.add(where, "has an ID that is not below %d", MaxPorts)
		return
	}
	if s.port(c.ID) != nil {
		bad.add(where, "has the ID of another port, %q: choose one for each", s.port(c.ID).Name)
		return
	}
	if c.MAC == [6]byte{} || c.MAC[0]&1 != 0 {
		bad.add(where, "has the MAC %x: write the unicast MAC of the router on this port", c.MAC)
	}
	if c.SourceMAC[0]&1 != 0 {
		bad.add(where, "guards the source MAC %x: write a unicast MAC, or none to guard none", c.SourceMAC)
	}
	p := &port{Port: *c, guardMAC: c.SourceMAC != [6]byte{}}
	if p.MTU == 0 {
		p.MTU = 1500
	}
	for _, a := range c.Tentative {
		if !a.Is6() || a.Is4In6() || a.Zone() != "" || a.IsMulticast() || a.IsUnspecified() || a.IsLoopback() {
			bad.add(where, "has the tentative address %v: write one of IPv6 that a host may have, without a zone", a)
			continue
		}
		p.tentative = append(p.tentative, toAddr(a))
	}
	six := false
	for _, a := range c.Addrs {
		if !a.IsValid() || a.Addr().Zone() != "" || a.Addr().Is4In6() {
			bad.add(where, "has the address %v: write it with a prefix, without a zone", a)
			continue
		}
		x := toAddr(a.Addr())
		if x.reserved() || x.multicast() {
			bad.add(where, "has the address %v: write a unicast address that a host may have", a)
			continue
		}
		six = six || !x.is4()
		net := toPrefix(a)
		if x.is4() {
			if a.Bits() <= 30 {
				all := addr{0, net.lo | ^net.mask.lo}
				if x == all || x == net.addr {
					bad.add(where, "has the address %v, which is the network's own or its broadcast address: write that of a host", a)
					continue
				}
				s.bcast[all] = c.ID
			}
		}
		if x.linkLocal() && !x.is4() {
			p.linkLocal = x
			continue
		}
		if slices.Contains(p.addrs, x) {
			bad.add(where, "has the address %v twice: leave one out", a.Addr())
			continue
		}
		s.own[x] = struct{}{} // several ports may have it, each with one client on a /32
		p.addrs = append(p.addrs, x)
		p.addrNets = append(p.addrNets, net)
		if a.Bits() < a.Addr().BitLen() { // otherwise there is no other host
			p.onLink = append(p.onLink, net)
		}
	}
	if six && p.linkLocal == (addr{}) {
		p.linkLocal = toAddr(packet.LinkLocal(c.MAC))
	}
	least := MinMTU
	if six {
		least = 1280
	}
	if p.MTU < least || p.MTU > MaxMTU {
		bad.add(where, "has an MTU of %d bytes: use %d to %d", c.MTU, least, MaxMTU)
	}
	for _, src := range c.Sources {
		if !validPrefix(src) {
			bad.add(where, "has the source %v: write a prefix of IPv4 or IPv6", src)
			continue
		}
		p.sources = append(p.sources, toPrefix(src))
	}
	for len(s.ports) <= int(c.ID) {
		s.ports = append(s.ports, nil)
	}
	s.ports[c.ID] = p
}

func validPrefix(p netip.Prefix) bool {
	return p.IsValid() && !p.Addr().Is4In6() && p.Addr().Zone() == ""
}

func (s *snapshot) addRoutes(c *Config, bad *complaints) {
	var all [129]map[addr]hop
	add := func(where string, p prefix, h hop) {
		m := all[p.bits]
		if m == nil {
			m = map[addr]hop{}
			all[p.bits] = m
		}
		if old, ok := m[p.addr]; ok && old != h {
			bad.add(where, "goes to port %d what another route for the same prefix sends to port %d: leave one", h.out, old.out)
		}
		m[p.addr] = h
	}
	for _, p := range s.ports {
		if p == nil {
			continue
		}
		for _, net := range p.onLink {
			if net.bits == 128 {
				continue // the router's own address alone, which several ports may have
			}
			add(fmt.Sprintf("port %d (%s)", p.ID, p.Name), net, hop{out: p.ID})
		}
	}
	if len(c.Routes) > MaxRoutes {
		bad.add("the routes", "are %d: at most %d", len(c.Routes), MaxRoutes)
		return
	}
	for i := range c.Routes { // what is on a link may be the Via of other routes
		if r := &c.Routes[i]; !r.Via.IsValid() && validPrefix(r.Prefix) && s.port(r.Out) != nil {
			out := s.port(r.Out)
			out.onLink = append(out.onLink, toPrefix(r.Prefix))
		}
	}
	for i, r := range c.Routes {
		where := fmt.Sprintf("route %d", i)
		if !validPrefix(r.Prefix) {
			bad.add(where, "has the prefix %v: write one of IPv4 or IPv6", r.Prefix)
			continue
		}
		out := s.port(r.Out)
		if out == nil {
			bad.add(where, "goes out of port %d, which is not there: leave the route out, or add the port", r.Out)
			continue
		}
		h := hop{out: r.Out}
		if r.Via.IsValid() {
			h.via = toAddr(r.Via)
			switch {
			case r.Via.Is4() != r.Prefix.Addr().Is4():
				bad.add(where, "sends %v to %v, of the other family", r.Prefix, r.Via)
				continue
			case h.via.reserved() || h.via.multicast():
				bad.add(where, "goes via %v, which is no host", r.Via)
				continue
			case !containsAny(out.onLink, h.via) && !h.via.linkLocal():
				bad.add(where, "goes via %v, which is in no prefix of port %d (%s)", r.Via, r.Out, out.Name)
				continue
			}
			if _, own := s.own[h.via]; own {
				bad.add(where, "goes via %v, which is the router itself", r.Via)
				continue
			}
		}
		add(where, toPrefix(r.Prefix), h)
	}
	for n := 128; n >= 0; n-- {
		if all[n] != nil {
			s.routes = append(s.routes, struct {
				bits uint8
				mask addr
				to   map[addr]hop
			}{uint8(n), maskOf(n), all[n]})
		}
	}
}

// set compiles a Match. It does not refuse a port that is not there: a later Configure may add it.
func (s *snapshot) set(where string, m *Match, bad *complaints) (set portSet) {
	set.any = len(m.Ports) == 0 && len(m.Groups) == 0
	for _, id := range m.Ports {
		switch {
		case id == LocalPort:
			set.local = true
		case id >= MaxPorts:
			bad.add(where, "names port %d: ports are below %d", id, MaxPorts)
		default:
			set.bits[id/64] |= 1 << (id % 64)
		}
	}
	for _, g := range m.Groups {
		if g == "" {
			bad.add(where, "names a group without a name: leave it out")
			continue
		}
		for _, p := range s.ports {
			if p != nil && p.Group == g {
				set.bits[p.ID/64] |= 1 << (p.ID % 64)
			}
		}
	}
	return set
}

func (s *snapshot) addForwards(c *Config, bad *complaints) {
	if len(c.Forwards) > MaxForwards {
		bad.add("the forwards", "are %d: at most %d", len(c.Forwards), MaxForwards)
		return
	}
	for i := range c.Forwards {
		f := &c.Forwards[i]
		where := fmt.Sprintf("forward %d", i)
		if f.Ports.First > f.Ports.Last || f.Ports.First == 0 {
			bad.add(where, "has the ports %d to %d: write the lower one first, from 1 on", f.Ports.First, f.Ports.Last)
			continue
		}
		if f.Proto != packet.TCP && f.Proto != packet.UDP {
			bad.add(where, "is for protocol %d: use TCP (6) or UDP (17), which have ports", f.Proto)
		}
		if !f.To.IsValid() || f.To.Is4In6() || f.To.Zone() != "" {
			bad.add(where, "has no host to forward to: set To to an IPv4 or IPv6 address without a zone")
			continue
		}
		x := forward{in: s.set(where, &f.In, bad), any: !f.Addr.IsValid(), proto: uint32(f.Proto), ports: f.Ports, to: toAddr(f.To), first: cmp.Or(f.ToPort, f.Ports.First)}
		if x.in.local {
			bad.add(where, "is for packets of the router itself, which are not forwarded: leave LocalPort out")
		}
		x.is4 = x.to.is4()
		if int(x.first)+int(f.Ports.Last-f.Ports.First) > 65535 {
			bad.add(where, "ends beyond port 65535: choose a lower ToPort, or fewer ports")
		}
		if x.to.reserved() || x.to.multicast() || x.to.linkLocal() {
			bad.add(where, "goes to %v: write the unicast address of a host, not a link-local one", f.To)
		}
		if _, own := s.own[x.to]; own {
			bad.add(where, "goes to %v, which is the router itself: let a rule accept the ports instead", f.To)
		}
		if !x.any {
			if x.addr = toAddr(f.Addr); f.Addr.Is4() != f.To.Is4() {
				bad.add(where, "goes from %v to %v, of the other family", f.Addr, f.To)
			}
		}
		s.forwards = append(s.forwards, x)
	}
}

// forwarded returns the forward for a packet that came in by port in.
func (s *snapshot) forwarded(in PortID, t *tuple) *forward {
	for i := range s.forwards {
		f := &s.forwards[i]
		if f.proto != t.proto || t.dport() < f.ports.First || t.dport() > f.ports.Last || !f.in.has(in) {
			continue
		}
		if f.any {
			if _, own := s.own[t.dst]; !own || t.dst.is4() != f.is4 {
				continue
			}
		} else if f.addr != t.dst {
			continue
		}
		return f
	}
	return nil
}

// reservedPort reports whether a port of an address is forwarded, so that masquerading
// leaves it alone.
func (s *snapshot) reservedPort(a addr, proto uint32, n uint16) bool {
	for i := range s.forwards {
		f := &s.forwards[i]
		if f.proto == proto && n >= f.ports.First && n <= f.ports.Last && (f.any && f.is4 == a.is4() || f.addr == a) {
			return true
		}
	}
	return false
}

func (s *snapshot) addRules(c *Config, bad *complaints) {
	if len(c.Rules) > MaxRules {
		bad.add("the rules", "are %d: at most %d", len(c.Rules), MaxRules)
		return
	}
	for i := range c.Rules {
		where := fmt.Sprintf("rule %d", i)
		if c.Rules[i].Name != "" {
			where += " (" + c.Rules[i].Name + ")"
		}
		s.rules = append(s.rules, s.rule(where, &c.Rules[i], bad))
	}
}

func (s *snapshot) rule(where string, c *Rule, bad *complaints) rule {
	r := rule{
		name: c.Name, in: s.set(where, &c.In, bad), out: s.set(where, &c.Out, bad), family: c.Family,
		sport: slices.Clone(c.SrcPorts), dport: slices.Clone(c.DstPorts), states: c.States, action: c.Action,
		anyProto: len(c.Protocols) == 0, anyType: len(c.ICMPTypes) == 0,
	}
	if c.Action > Reject {
		bad.add(where, "has no action: use Drop, Accept or Reject")
	}
	if c.Family != 0 && c.Family != 4 && c.Family != 6 {
		bad.add(where, "is for IP version %d: use 4, 6, or 0 for both", c.Family)
	}
	nets := func(list []netip.Prefix, which string) (ps []prefix) {
		for _, p := range list {
			if !validPrefix(p) {
				bad.add(where, "has the %s %v: write a prefix of IPv4 or IPv6", which, p)
				continue
			}
			if c.Family == 4 && !p.Addr().Is4() || c.Family == 6 && p.Addr().Is4() {
				bad.add(where, "has the %s %v but is for IP version %d", which, p, c.Family)
			}
			ps = append(ps, toPrefix(p))
		}
		return ps
	}
	r.src, r.dst = nets(c.Src, "source"), nets(c.Dst, "destination")
	ports, echo := len(c.Protocols) > 0, len(c.Protocols) > 0
	for _, p := range c.Protocols {
		r.protos[p/64] |= 1 << (p % 64)
		ports = ports && hasPorts(uint32(p))
		echo = echo && isEcho(uint32(p))
	}
	if len(c.SrcPorts)+len(c.DstPorts) > 0 && !ports {
		bad.add(where, "has port numbers: name the protocols TCP (6) or UDP (17), and no others")
	}
	for _, p := range slices.Concat(c.SrcPorts, c.DstPorts) {
		if p.First > p.Last {
			bad.add(where, "has the ports %d to %d: write the lower one first", p.First, p.Last)
		}
	}
	if len(c.ICMPTypes) > 0 && !echo {
		bad.add(where, "has ICMP types: name the protocols ICMP (1) or ICMPv6 (58), and no others")
	}
	for _, n := range c.ICMPTypes {
		r.types[n/64] |= 1 << (n % 64)
	}
	const all = StateNew | StateRelated | StateInvalid | StateEstablished
	switch {
	case r.states == 0:
		r.states = StateNew
	case r.states&^all != 0:
		bad.add(where, "has the states %#x, some of which do not exist", uint8(r.states))
	case r.states&StateEstablished != 0 && r.action != Accept:
		bad.add(where, "drops packets of established flows: take away the rule that accepts the flow instead")
	}
	return r
}

// A candidate is what rules are compared with: a packet, or the first packet of a flow.
type candidate struct {
	in, out      PortID
	src, dst     addr
	sport, dport uint16
	proto        uint8
	icmpType     uint8
	state        States
}

func bit(set *[4]uint64, n uint8) bool { return set[n/64]&(1<<(n%64)) != 0 }

func inRanges(rs []PortRange, n uint16) bool {
	for _, r := range rs {
		if n >= r.First && n <= r.Last {
			return true
		}
	}
	return false
}

// decide returns what the filter says of a packet. With count it counts the packet for the rule that matched.
func (s *snapshot) decide(q *candidate, count bool) Action {
	for i := range s.rules {
		r := &s.rules[i]
		if r.states&q.state == 0 || !r.in.has(q.in) || !r.out.has(q.out) {
			continue
		}
		if r.family != 0 && (r.family == 4) != q.src.is4() {
			continue
		}
		if !r.anyProto && !bit(&r.protos, q.proto) || !r.anyType && !bit(&r.types, q.icmpType) {
			continue
		}
		if len(r.sport) > 0 && !inRanges(r.sport, q.sport) || len(r.dport) > 0 && !inRanges(r.dport, q.dport) {
			continue
		}
		if len(r.src) > 0 && !containsAny(r.src, q.src) || len(r.dst) > 0 && !containsAny(r.dst, q.dst) {
			continue
		}
		if count {
			r.matched++
		}
		return r.action
	}
	switch {
	case q.state == StateRelated, q.in == LocalPort:
		return Accept
	case q.state == StateInvalid:
		return Drop
	case q.out == LocalPort:
		return s.localDef
	}
	return s.def
}

// admits reports whether packets of a source may come in by a port, as its neighbours or
// from behind them.
func (s *snapshot) admits(p *port, src addr) bool {
	if len(p.sources) > 0 && !containsAny(p.sources, src) {
		return false
	}
	if _, own := s.own[src]; own {
		return false
	}
	if p.AnySource {
		return true
	}
	h, ok := s.routes.find(src)
	return ok && h.out == p.ID
}

// natAddr returns the port's address to use as the source of packets to dst whose next hop is next: one in a
// prefix with next, or else the first of the family.
func (p *port) natAddr(dst, next addr) (a addr, ok bool) {
	for i, own := range p.addrs {
		if own.is4() != dst.is4() {
			continue
		}
		if p.addrNets[i].contains(next) {
			return own, true
		}
		if !ok {
			a, ok = own, true
		}
	}
	return a, ok
}

// has reports whether a is one of the port's own addresses.
func (p *port) has(a addr) bool {
	return slices.Contains(p.addrs, a) || a == p.linkLocal && a != addr{}
}

func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }

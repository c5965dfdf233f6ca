package pcapfilter

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"golang.org/x/net/bpf"
)

// parser is a recursive descent over the tokens. As in libpcap "and" and "or" bind alike
// and to the left, and "vlan" moves all headers of what is behind it.
type parser struct {
	tokens []token
	at     int
	depth  int
	link   int        // offset of the EtherType
	last   qualifiers // of the last primitive with an id, for an id alone
	known  bool       // last is set
}

// net is the offset of the header behind Ethernet.
func (p *parser) net() int { return p.link + 2 }

func (p *parser) peek() token { return p.tokens[p.at] }

func (p *parser) take() token {
	t := p.tokens[p.at]
	if t.kind != end {
		p.at++
	}
	return t
}

// accept takes the next token if it is one of the words or operators.
func (p *parser) accept(texts ...string) bool {
	t := p.peek()
	for _, s := range texts {
		if (t.kind == word || t.kind == operator) && t.text == s {
			p.at++
			return true
		}
	}
	return false
}

func (p *parser) fail(t token, why string) error { return &SyntaxError{t.text, why} }

func (p *parser) parse() (test, error) {
	t, err := p.expression()
	if err == nil && p.peek().kind != end {
		err = p.fail(p.peek(), `"and" or "or" is missing before it`)
	}
	return t, err
}

func (p *parser) expression() (test, error) {
	if p.depth++; p.depth > maxDepth {
		return nil, p.fail(p.peek(), "too deep")
	}
	defer func() { p.depth-- }()
	left, err := p.term()
	for err == nil {
		var right test
		switch {
		case p.accept("and", "&&"):
			if right, err = p.term(); err == nil {
				left = and(left, right)
			}
		case p.accept("or", "||"):
			if right, err = p.term(); err == nil {
				left = or(left, right)
			}
		default:
			return left, nil
		}
	}
	return nil, err
}

func (p *parser) term() (test, error) {
	if p.depth++; p.depth > maxDepth {
		return nil, p.fail(p.peek(), "too deep")
	}
	defer func() { p.depth-- }()
	if p.accept("not", "!") {
		t, err := p.term()
		if err != nil {
			return nil, err
		}
		return not(t), nil
	}
	// "(" begins a group or an arithmetic expression.
	mark := *p
	t, err := p.relation()
	if t != nil || err != nil && p.at > mark.at+1 && mark.peek().text != "(" {
		return t, err
	}
	*p = mark
	if p.accept("(") {
		t, err := p.expression()
		if err != nil {
			return nil, err
		}
		if !p.accept(")") {
			return nil, p.fail(p.peek(), `")" is missing`)
		}
		return t, nil
	}
	return p.primitive()
}

// qualifiers are what a primitive says of its id: "tcp src port".
type qualifiers struct {
	proto string // "": none
	dir   string // "src", "dst", "src or dst", "src and dst"
	typ   string // "host", "net", "port", "portrange", "proto"
}

// unsupported are words of pcap-filter(7) that are refused with a reason.
var unsupported = map[string]string{
	"inbound": "not for a vif; see --direction", "outbound": "not for a vif; see --direction",
	"gateway": "names of hosts are not looked up", "protochain": "it would need a loop",
	"mpls": "not compiled here", "pppoed": "not compiled here", "pppoes": "not compiled here", "geneve": "not compiled here",
	"llc": "not compiled here", "iso": "not compiled here", "stp": "not compiled here", "ipx": "not compiled here",
	"netbeui": "not compiled here", "decnet": "not compiled here", "lat": "not compiled here", "moprc": "not compiled here",
	"mopdl": "not compiled here", "fddi": "a vif has no such frames", "tr": "a vif has no such frames",
	"wlan": "a vif has no such frames", "link": `write "ether"`, "ifname": "not for a vif", "on": "not for a vif",
	"rnr": "not for a vif", "reason": "not for a vif", "action": "not for a vif", "clnp": "not compiled here",
	"esis": "not compiled here", "isis": "not compiled here",
}

// etherTypes are the protocols on Ethernet, ipProtos those on IP.
var etherTypes = map[string]uint32{
	"ip": 0x800, "ip6": 0x86dd, "arp": 0x806, "rarp": 0x8035, "atalk": 0x809b, "aarp": 0x80f3,
}

var ipProtos = map[string]uint32{
	"icmp": 1, "igmp": 2, "tcp": 6, "igrp": 9, "udp": 17, "esp": 50, "ah": 51, "icmp6": 58, "pim": 103, "vrrp": 112,
	"carp": 112, "sctp": 132,
}

func (p *parser) primitive() (test, error) {
	first := p.peek()
	switch {
	case first.kind == end:
		return nil, p.fail(first, "something is missing")
	case first.kind == number || first.kind == address:
		if !p.known {
			if first.kind == number {
				return nil, p.fail(first, `a qualifier such as "port" or "host" is missing before it`)
			}
			return p.id(qualifiers{typ: "host"})
		}
		return p.id(p.last)
	case first.kind == operator:
		return nil, p.fail(first, "not expected here")
	case p.accept("vlan"):
		return p.vlan()
	case p.accept("greater"):
		n, err := p.number()
		return length(bpf.JumpGreaterOrEqual, n), err
	case p.accept("less"):
		n, err := p.number()
		return length(bpf.JumpLessOrEqual, n), err
	case p.accept("broadcast"):
		return p.toAll(), nil
	case p.accept("multicast"):
		return toMany(), nil
	}
	var q qualifiers
	if proto := p.peek(); proto.kind == word {
		_, onEther := etherTypes[proto.text]
		_, onIP := ipProtos[proto.text]
		if onEther || onIP || proto.text == "ether" {
			p.at++
			q.proto = proto.text
		}
	}
	if q.proto != "" {
		switch {
		case p.accept("broadcast"):
			if q.proto != "ether" {
				return nil, p.fail(first, "the broadcast address of its network is not known")
			}
			return p.toAll(), nil
		case p.accept("multicast"):
			switch q.proto {
			case "ether":
				return toMany(), nil
			case "ip":
				return and(p.ether("ip"), field(p.net()+16, 1, ^uint32(0), bpf.JumpGreaterOrEqual, 224)), nil
			case "ip6":
				return and(p.ether("ip6"), is(p.net()+24, 1, 0xff)), nil
			}
			return nil, p.fail(first, "it has no multicast")
		}
	}
	if err := p.direction(&q); err != nil {
		return nil, err
	}
	for _, typ := range []string{"host", "net", "portrange", "port", "proto"} {
		if p.accept(typ) {
			q.typ = typ
			break
		}
	}
	if q.typ == "" && q.dir == "" && q.proto != "" {
		if t := p.peek(); t.kind == number || t.kind == address { // "ip 10.0.0.1"
			return p.id(qualifiers{proto: q.proto, typ: "host"})
		}
		if q.proto == "ether" {
			return nil, p.fail(p.peek(), `"host", "src", "dst", "proto", "broadcast" or "multicast" is missing`)
		}
		return p.protocol(q.proto), nil
	}
	if q == (qualifiers{}) {
		if why, ok := unsupported[first.text]; ok {
			return nil, p.fail(first, why)
		}
		return nil, p.fail(first, "unknown; names of hosts and networks are not looked up")
	}
	if q.typ == "" {
		q.typ = "host"
	}
	return p.id(q)
}

// direction takes "src", "dst", "src or dst" and "src and dst".
func (p *parser) direction(q *qualifiers) error {
	switch {
	case p.accept("src"):
		q.dir = "src"
	case p.accept("dst"):
		q.dir = "dst"
	default:
		return nil
	}
	mark := p.at
	for _, how := range []string{"or", "and"} {
		if p.accept(how, map[string]string{"or": "||", "and": "&&"}[how]) {
			if p.accept("src", "dst") && p.tokens[p.at-1].text != q.dir {
				q.dir = "src " + how + " dst"
				return nil
			}
			p.at = mark
		}
	}
	return nil
}

// both combines the tests of source and destination as the direction says.
func (q *qualifiers) both(src, dst test) test {
	switch q.dir {
	case "src":
		return src
	case "dst":
		return dst
	case "src and dst":
		return and(src, dst)
	}
	return or(src, dst)
}

// id compiles a primitive whose qualifiers are known, up to its id.
func (p *parser) id(q qualifiers) (test, error) {
	p.last, p.known = q, true
	switch q.typ {
	case "port", "portrange":
		return p.ports(q)
	case "proto":
		return p.proto(q)
	case "net":
		return p.network(q)
	}
	return p.host(q)
}

func (p *parser) number() (uint32, error) {
	t := p.take()
	if t.kind != number {
		return 0, p.fail(t, "a number is missing before it")
	}
	return t.val, nil
}

func length(cond bpf.JumpTest, n uint32) test {
	return func(c *code, t, f label) {
		c.emit(bpf.LoadExtension{Num: bpf.ExtLen})
		c.jump(op{cond: cond, val: n}, t, f)
	}
}

func (p *parser) toAll() test { return and(is(2, 4, 0xffffffff), is(0, 2, 0xffff)) }

func toMany() test { return field(0, 1, 1, bpf.JumpNotEqual, 0) }

func (p *parser) ether(name string) test { return is(p.link, 2, etherTypes[name]) }

// vlan compiles "vlan" and "vlan ID". Behind it, all headers are 4 bytes later.
func (p *parser) vlan() (test, error) {
	t := or(is(p.link, 2, 0x8100), is(p.link, 2, 0x88a8), is(p.link, 2, 0x9100))
	if id := p.peek(); id.kind == number {
		p.at++
		if id.val > 0x0fff {
			return nil, p.fail(id, "a VLAN has a number from 0 to 4095")
		}
		t = and(t, field(p.link+2, 2, 0x0fff, bpf.JumpEqual, id.val))
	}
	p.link += 4
	return t, nil
}

// on4 and on6 are true for a packet of IPv4, or of IPv6, that has the protocol. Of a
// fragment of IPv6, the protocol is in the fragment's header.
func (p *parser) on4(proto uint32) test { return and(p.ether("ip"), is(p.net()+9, 1, proto)) }

func (p *parser) on6(proto uint32) test {
	return and(p.ether("ip6"), or(is(p.net()+6, 1, proto), and(is(p.net()+6, 1, 44), is(p.net()+40, 1, proto))))
}

// protocol compiles the name of a protocol alone.
func (p *parser) protocol(name string) test {
	proto, ok := ipProtos[name]
	switch {
	case !ok:
		return p.ether(name)
	case name == "icmp" || name == "igmp" || name == "igrp" || name == "vrrp" || name == "carp":
		return p.on4(proto)
	case name == "icmp6":
		return p.on6(proto)
	}
	return or(p.on4(proto), p.on6(proto))
}

// proto compiles "proto ID", "ip proto ID" and so on.
func (p *parser) proto(q qualifiers) (test, error) {
	if q.dir != "" {
		return nil, &SyntaxError{q.dir, "a protocol has no direction"}
	}
	t := p.take()
	name := strings.TrimPrefix(t.text, `\`)
	if q.proto == "ether" {
		n, ok := etherTypes[name]
		if t.kind == number {
			n, ok = t.val, t.val <= 0xffff
		}
		if !ok || t.kind != number && t.kind != word {
			return nil, p.fail(t, "no protocol of Ethernet: a number up to 65535, ip, ip6, arp, rarp, atalk or aarp")
		}
		if n <= 1500 { // an IEEE 802.3 frame, with an LLC header
			return and(field(p.link, 2, ^uint32(0), bpf.JumpLessOrEqual, 1500), is(p.net(), 1, n)), nil
		}
		return is(p.link, 2, n), nil
	}
	n, ok := ipProtos[name]
	if t.kind == number {
		n, ok = t.val, t.val <= 0xff
	}
	if !ok || t.kind != number && t.kind != word {
		return nil, p.fail(t, "no protocol of IP: a number up to 255, or a name such as tcp")
	}
	switch q.proto {
	case "":
		return or(p.on4(n), p.on6(n)), nil
	case "ip":
		return p.on4(n), nil
	case "ip6":
		return p.on6(n), nil
	}
	return nil, p.fail(t, "only ip, ip6 and ether have a proto")
}

// host compiles an address of one station.
func (p *parser) host(q qualifiers) (test, error) {
	t := p.take()
	if q.proto == "ether" {
		mac, ok := parseMAC(t.text)
		if t.kind != address || !ok {
			return nil, p.fail(t, "not an Ethernet address")
		}
		at := func(off int) test {
			return and(is(off+2, 4, binary.BigEndian.Uint32(mac[2:])), is(off, 2, uint32(binary.BigEndian.Uint16(mac[:]))))
		}
		return q.both(at(6), at(0)), nil
	}
	if t.kind == address && isMAC(t.text) {
		return nil, p.fail(t, `an Ethernet address: write "ether host" before it`)
	}
	a, err := netip.ParseAddr(t.text)
	if t.kind != address || err != nil || a.Zone() != "" {
		if t.kind == address && strings.Contains(t.text, "/") {
			return nil, p.fail(t, `a network: write "net" before it`)
		}
		return nil, p.fail(t, "not an address; names of hosts are not looked up")
	}
	return p.addresses(q, t, netip.PrefixFrom(a, a.BitLen()))
}

// network compiles a network: with a prefix length, with a mask, or by its first bytes.
func (p *parser) network(q qualifiers) (test, error) {
	t := p.take()
	text := t.text
	if t.kind != number && t.kind != address {
		return nil, p.fail(t, "not a network; names of networks are not looked up")
	}
	addr, length, has := strings.Cut(text, "/")
	v6 := strings.Contains(addr, ":")
	parts := strings.Count(addr, ".") + 1
	if !v6 {
		addr += strings.Repeat(".0", max(4-parts, 0))
	}
	a, err := netip.ParseAddr(addr)
	if err != nil {
		return nil, p.fail(t, "not a network")
	}
	bits := a.BitLen()
	switch {
	case has:
		if bits, err = strconv.Atoi(length); err != nil || bits > a.BitLen() {
			return nil, p.fail(t, "not the length of a prefix")
		}
	case p.accept("mask"):
		m := p.take()
		mask, err := netip.ParseAddr(m.text)
		if err != nil || !mask.Is4() || v6 {
			return nil, p.fail(m, "not a mask")
		}
		b := mask.As4()
		ones, size := net.IPMask(b[:]).Size()
		if size == 0 {
			return nil, p.fail(m, "a mask with holes is not compiled here")
		}
		bits = ones
	case !v6:
		bits = 8 * parts
	}
	n := netip.PrefixFrom(a, bits)
	if n.Masked().Addr() != a {
		return nil, p.fail(t, "bits behind the prefix are set")
	}
	return p.addresses(q, t, n)
}

// addresses compares the addresses of a packet with a network.
func (p *parser) addresses(q qualifiers, t token, n netip.Prefix) (test, error) {
	if n.Addr().Is6() && !n.Addr().Is4In6() {
		if q.proto != "" && q.proto != "ip6" {
			return nil, p.fail(t, "an address of IPv6 behind "+q.proto)
		}
		return and(p.ether("ip6"), q.both(inside6(p.net()+8, n), inside6(p.net()+24, n))), nil
	}
	b := n.Addr().As4()
	mask := ^uint32(0) << (32 - n.Bits())
	inside := func(off int) test { return field(off, 4, mask, bpf.JumpEqual, binary.BigEndian.Uint32(b[:])) }
	ip := and(p.ether("ip"), q.both(inside(p.net()+12), inside(p.net()+16)))
	arp := func(name string) test { return and(p.ether(name), q.both(inside(p.net()+14), inside(p.net()+24))) }
	switch q.proto {
	case "":
		return or(ip, arp("arp"), arp("rarp")), nil
	case "ip":
		return ip, nil
	case "arp", "rarp":
		return arp(q.proto), nil
	}
	return nil, p.fail(t, "an address of IPv4 behind "+q.proto)
}

// inside6 compares an address of IPv6, word by word.
func inside6(off int, n netip.Prefix) test {
	b := n.Addr().As16()
	var tests []test
	for i := 0; i < 4 && i*32 < n.Bits(); i++ {
		mask := ^uint32(0) << max(0, 32*(i+1)-n.Bits())
		tests = append(tests, field(off+4*i, 4, mask, bpf.JumpEqual, binary.BigEndian.Uint32(b[4*i:])))
	}
	if tests == nil {
		return func(c *code, t, _ label) { c.emit(bpf.LoadConstant{}); c.jump(op{cond: bpf.JumpEqual}, t, t) }
	}
	return and(tests...)
}

// ports compiles "port ID" and "portrange ID-ID".
func (p *parser) ports(q qualifiers) (test, error) {
	protos := []uint32{132, 6, 17}
	switch q.proto {
	case "":
	case "tcp", "udp", "sctp":
		protos = []uint32{ipProtos[q.proto]}
	default:
		return nil, &SyntaxError{q.proto, "it has no ports; tcp, udp and sctp have"}
	}
	low, err := p.port(&protos, q.proto)
	if err != nil {
		return nil, err
	}
	high := low
	if q.typ == "portrange" && p.accept("-") {
		if high, err = p.port(&protos, q.proto); err != nil {
			return nil, err
		}
	}
	low, high = min(low, high), max(low, high)
	var on4, on6 []test
	for _, proto := range protos {
		on4, on6 = append(on4, is(p.net()+9, 1, proto)), append(on6, is(p.net()+6, 1, proto))
	}
	at4 := func(off int) test {
		if low == high {
			return behindIP(p.net(), off, bpf.JumpEqual, low)
		}
		return and(behindIP(p.net(), off, bpf.JumpGreaterOrEqual, low), behindIP(p.net(), off, bpf.JumpLessOrEqual, high))
	}
	at6 := func(off int) test {
		off += p.net() + 40
		if low == high {
			return is(off, 2, low)
		}
		return and(field(off, 2, ^uint32(0), bpf.JumpGreaterOrEqual, low), field(off, 2, ^uint32(0), bpf.JumpLessOrEqual, high))
	}
	ip := and(p.ether("ip"), or(on4...), unfragmented(p.net()), q.both(at4(0), at4(2)))
	ip6 := and(p.ether("ip6"), or(on6...), q.both(at6(0), at6(2)))
	return or(ip6, ip), nil
}

// port takes a port, by number or by its name in the services of this machine. A service
// of one protocol alone leaves that one.
func (p *parser) port(protos *[]uint32, proto string) (uint32, error) {
	t := p.take()
	switch t.kind {
	case number:
		if t.val > 0xffff {
			return 0, p.fail(t, "a port is a number up to 65535")
		}
		return t.val, nil
	case word:
		var found []uint32
		port := 0
		for _, name := range []string{"tcp", "udp"} {
			if proto != "" && proto != name {
				continue
			}
			if n, err := net.LookupPort(name, t.text); err == nil && (port == 0 || n == port) {
				found, port = append(found, ipProtos[name]), n
			}
		}
		if len(found) == 1 {
			*protos = found
		}
		if port != 0 {
			return uint32(port), nil
		}
	}
	return 0, p.fail(t, "not a port, and not the name of a service")
}

func parseNumber(s string) (uint32, error) {
	v, err := strconv.ParseUint(s, 0, 32)
	if err != nil {
		return 0, &SyntaxError{s, "not a number of 32 bits, and not an address"}
	}
	return uint32(v), nil
}

// parseMAC parses six bytes with ":" or "-" between them, each of one or two digits.
func parseMAC(s string) (mac [6]byte, ok bool) {
	sep := ":"
	if strings.Contains(s, "-") {
		sep = "-"
	}
	parts := strings.Split(s, sep)
	if len(parts) != len(mac) {
		return mac, false
	}
	for i, part := range parts {
		v, err := strconv.ParseUint(part, 16, 8)
		if err != nil || len(part) > 2 {
			return mac, false
		}
		mac[i] = byte(v)
	}
	return mac, true
}

func isMAC(s string) bool {
	_, ok := parseMAC(s)
	return ok
}

// isAddress reports whether s is an address, a network, or the first bytes of one: with a
// dot or two colons at least.
func isAddress(s string) bool {
	addr, length, prefix := strings.Cut(s, "/")
	if prefix {
		if _, err := strconv.ParseUint(length, 10, 8); err != nil {
			return false
		}
	}
	if !prefix && isMAC(s) {
		return true
	}
	if _, err := netip.ParseAddr(addr); err == nil {
		return true
	}
	parts := strings.Split(addr, ".")
	if len(parts) < 2 || len(parts) > 4 {
		return false
	}
	for _, part := range parts {
		if _, err := strconv.ParseUint(part, 10, 8); err != nil {
			return false
		}
	}
	return true
}

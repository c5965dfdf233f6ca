package router

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"barevif/pvnet/packet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func TestWhatIsDroppedAndWhy(t *testing.T) {
	edit := func(f func(b []byte)) func(*Packet) {
		return func(p *Packet) { f(p.Head) }
	}
	fixed4 := func(f func(h header.IPv4)) func(*Packet) {
		return func(p *Packet) {
			h := header.IPv4(p.Head[14:])
			f(h)
			h.SetChecksum(0)
			h.SetChecksum(^h.CalculateChecksum())
		}
	}
	good := udp(clientA, "10.1.0.5", 4000, server, 53)
	with := func(f func(*spec)) spec { s := good; f(&s); return s }
	for _, c := range []struct {
		name string
		s    spec
		edit func(*Packet)
		want Reason
	}{
		{"no such port", good, func(p *Packet) { p.In = 7 }, ReasonNoPort},
		{"a port beyond all", good, func(p *Packet) { p.In = 5000 }, ReasonNoPort},
		{"no frame", good, func(p *Packet) { p.Head = p.Head[:13] }, ReasonMalformed},
		{"no length", good, func(p *Packet) { p.Total = -5 }, ReasonMalformed},
		{"half an IP header", good, func(p *Packet) { p.Head = p.Head[:30] }, ReasonMalformed},
		{"half a UDP header", good, func(p *Packet) { p.Head = p.Head[:14+20+4] }, ReasonMalformed},
		{"longer than the frame", good, func(p *Packet) { p.Total -= 3 }, ReasonMalformed},
		{"version 5", good, edit(func(b []byte) { b[14] = 0x55 }), ReasonMalformed},
		{"wrong IP checksum", good, edit(func(b []byte) { b[14+10]++ }), ReasonChecksum},
		{"reserved flag", good, fixed4(func(h header.IPv4) { h[6] |= 0x80 }), ReasonMalformed},
		{"UDP longer than its packet", good, edit(func(b []byte) { b[14+20+4] = 1 }), ReasonMalformed},
		{"not IP", good, edit(func(b []byte) { b[12], b[13] = 0x88, 0xcc }), ReasonNotIP},
		{"a tag", good, edit(func(b []byte) { b[12], b[13] = 0x81, 0 }), ReasonTagged},
		{"another station", with(func(s *spec) { s.dmac = macB }), nil, ReasonNotForUs},
		{"a broadcast frame", with(func(s *spec) { s.dmac = [6]byte{255, 255, 255, 255, 255, 255} }), nil, ReasonNotForUs},
		{"a group as source", with(func(s *spec) { s.smac = [6]byte{1, 0, 0x5e, 0, 0, 1} }), nil, ReasonSourceMAC},
		{"another source MAC", with(func(s *spec) { s.in, s.src, s.smac = clientB, "10.2.0.5", hostA }), nil, ReasonSourceMAC},
		{"another's address", with(func(s *spec) { s.src = "10.2.0.5" }), nil, ReasonSpoofed},
		{"the router's address", with(func(s *spec) { s.src = "10.1.0.1" }), nil, ReasonSpoofed},
		{"a client's from outside", with(func(s *spec) { s.in, s.src, s.dst = uplink, "10.1.0.5", "10.2.0.5" }), nil, ReasonSpoofed},
		{"from loopback", with(func(s *spec) { s.src = "127.0.0.1" }), nil, ReasonMartian},
		{"from a group", with(func(s *spec) { s.src = "224.0.0.1" }), nil, ReasonMartian},
		{"from everybody", with(func(s *spec) { s.src = "255.255.255.255" }), nil, ReasonMartian},
		{"from the whole network", with(func(s *spec) { s.src = "10.1.0.255" }), nil, ReasonMartian},
		{"from nobody", with(func(s *spec) { s.src = "0.0.0.0" }), nil, ReasonMartian},
		{"to loopback", with(func(s *spec) { s.dst = "127.0.0.1" }), nil, ReasonMartian},
		{"to class E", with(func(s *spec) { s.dst = "250.0.0.1" }), nil, ReasonMartian},
		{"to another network's broadcast", with(func(s *spec) { s.dst = "10.2.0.255" }), nil, ReasonMartian},
		{"to link-local", with(func(s *spec) { s.dst = "169.254.1.1" }), nil, ReasonMartian},
		{"to mapped", udp(clientA, "fd01::5", 1, "::ffff:10.2.0.5", 2), nil, ReasonMartian},
		{"from mapped", udp(clientA, "::ffff:10.1.0.5", 1, "2001:db8:1::9", 2), nil, ReasonMartian},
		{"link-local beyond the link", udp(clientA, "fe80::5", 1, "2001:db8:1::9", 2), nil, ReasonMartian},
		{"to a neighbour's link-local", udp(clientA, "fd01::5", 1, "fe80::9", 2), nil, ReasonMartian},
		{"not allowed", udp(uplink, server, 1, "10.1.0.5", 2), nil, ReasonFiltered},
		{"client to client", udp(clientA, "10.1.0.5", 1, "10.2.0.5", 2), nil, ReasonFiltered},
		{"to the router", udp(clientA, "10.1.0.5", 1, "10.1.0.1", 53), nil, ReasonFiltered},
		{"loose source routing", with(func(s *spec) { s.ipOptions = []byte{1, 131, 7, 4, 10, 0, 0, 1} }), nil, ReasonSourceRoute},
		{"strict source routing", with(func(s *spec) { s.ipOptions = []byte{137, 7, 4, 10, 0, 0, 1} }), nil, ReasonSourceRoute},
		{"an option without end", with(func(s *spec) { s.ipOptions = []byte{7, 40, 4, 0} }), nil, ReasonMalformed},
		{"an option of no length", with(func(s *spec) { s.ipOptions = []byte{7, 0, 4, 0} }), nil, ReasonMalformed},
		{"partial without ports", spec{in: clientA, src: "10.1.0.5", dst: server, proto: 47, payload: make([]byte, 8), partial: true}, nil, ReasonMalformed},
		{"GSO without a partial checksum", tcp(clientA, "10.1.0.5", 1, server, 2, ack), func(p *Packet) { p.GSO = 100 }, ReasonMalformed},
		{"GSO of UDP", with(func(s *spec) { s.partial = true; s.gso = 100 }), nil, ReasonMalformed},
		{"half an echo", echo(clientA, "10.1.0.5", server, 1, false), func(p *Packet) { p.Head = p.Head[:14+20+4] }, ReasonMalformed},
		{"discovery in IPv4", spec{in: clientA, src: "10.1.0.5", dst: "10.1.0.1", proto: 1, icmp: 135, ttl: 255, payload: make([]byte, 16)}, nil, ReasonInvalid},
		{"discovery in a fragment", func() spec {
			s := discoverySpec(clientA, "fd01::5", "fd01::1", 135, "fd01::1", nil)
			return spec{in: clientA, src: s.src, dst: s.dst, proto: 44, ttl: 255, payload: append([]byte{58, 0, 0, 0, 0, 0, 0, 1}, s.frame()[54:]...)}
		}(), nil, ReasonMalformed},
		{"discovery of which the end is missing", discoverySpec(clientA, "fd01::5", "fd01::1", 135, "fd01::1", make([]byte, 8)), func(p *Packet) { p.Head = p.Head[:len(p.Head)-4] }, ReasonMalformed},
		{"timestamp", spec{in: clientA, src: "10.1.0.5", dst: server, proto: 1, icmp: 13, payload: make([]byte, 12)}, nil, ReasonInvalid},
	} {
		w := newWorld(t, Limits{}, nil)
		p := c.s.packet()
		if c.edit != nil {
			c.edit(&p)
		}
		w.process(&p)
		if p.Verdict != VerdictDrop || p.Reason != c.want {
			t.Errorf("%s: %v because of %v, want it dropped because of %v", c.name, p.Verdict, p.Reason, c.want)
		}
		if c.want == ReasonNoPort {
			if w.Stats().NoPort != 1 {
				t.Errorf("%s: not counted", c.name)
			}
			continue
		}
		if s, _ := w.PortStats(p.In); s.Dropped[c.want] != 1 || s.Drops() != 1 {
			t.Errorf("%s: counted as %v", c.name, s.Dropped)
		}
		if n := w.Stats().Flows; n != 0 {
			t.Errorf("%s: made a flow", c.name)
		}
	}
}

func TestAPortWithoutIPv6HasNoAddressOfIt(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) {
		c.Ports[2].Addrs, c.Routes = pfx("192.0.2.2/24"), c.Routes[:1]
		c.Ports[2].AnySource, c.LocalDefault = true, Accept
	})
	w.dropped(udp(uplink, "2001:db8::9", 1, "::", 2), ReasonMartian)
	w.dropped(discoverySpec(uplink, "fe80::9", "ff02::1:ff00:0", 135, "::", nil), ReasonNotForUs)
	if ask := w.AppendSolicit(nil, uplink, ip("fe80::9")); len(ask) != 0 {
		t.Fatalf("asks from no address: %x", ask)
	}
}

func TestTheTTLRunsOut(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	for _, s := range []spec{udp(clientA, "10.1.0.5", 4000, server, 33434), tcp(clientA, "fd01::5", 4000, "2001:db8:1::9", 80, syn)} {
		want, from := [2]uint8{11, 0}, "10.1.0.1"
		if ip(s.src).Is6() {
			want, from = [2]uint8{3, 0}, "fd01::1"
		}
		for _, ttl := range []uint8{1, 2} {
			s.ttl = ttl
			if ttl == 2 {
				if got := w.forwarded(s, uplink); got.ttl != 1 {
					t.Fatalf("%+v", got)
				}
				continue
			}
			typ, code, frame := w.refused(s, ReasonTTL)
			if got := look(frame); [2]uint8{typ, code} != want || got.src != from {
				t.Fatalf("type %d code %d from %s", typ, code, got.src)
			}
			if !bytes.HasSuffix(frame, s.frame()[14:]) {
				t.Fatal("the error does not quote the packet")
			}
			if [6]byte(frame[:6]) != hostA || [6]byte(frame[6:12]) != macA {
				t.Fatalf("the frame goes from and to %x", frame[:12])
			}
			if w.Stats().Flows != 0 {
				t.Fatal("a packet that died made a flow")
			}
		}
		w.Flush(clientA)
		w.neighbours()
	}
	// Not for packets of the router's own, and not for those to it.
	s := udp(clientA, "10.1.0.5", 4000, "10.1.0.1", 53)
	s.ttl = 1
	w.cfg.LocalDefault = Accept
	w.configure()
	if p := w.send(s); p.Verdict != VerdictLocal {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	s = udp(LocalPort, "192.0.2.2", 4000, server, 53)
	s.ttl = 1
	if got := w.forwarded(s, uplink); got.ttl != 1 {
		t.Fatalf("%+v", got)
	}
}

func TestWhatIsTooBigForThePort(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Ports[2].MTU = 1400 })
	s := udp(clientA, "10.1.0.5", 4000, server, 53)
	s.payload, s.df = make([]byte, 1400-28), true
	w.forwarded(s, uplink)
	s.payload = append(s.payload, 0)
	typ, code, frame := w.refused(s, ReasonTooBig)
	if typ != 3 || code != 4 || binary.BigEndian.Uint32(frame[38:]) != 1400 {
		t.Fatalf("type %d code %d: %x", typ, code, frame[34:42])
	}
	if len(frame) != 14+576 {
		t.Fatalf("the error has %d bytes", len(frame))
	}
	s6 := udp(clientA, "fd01::5", 4000, "2001:db8:1::9", 53)
	s6.payload = make([]byte, 1400-48)
	w.forwarded(s6, uplink)
	s6.payload = append(s6.payload, 0)
	typ, code, frame = w.refused(s6, ReasonTooBig)
	if typ != 2 || code != 0 || binary.BigEndian.Uint32(frame[58:]) != 1400 || len(frame) != MaxReply {
		t.Fatalf("type %d code %d, %d bytes: %x", typ, code, len(frame), frame[54:62])
	}
	// Segments count, not the whole.
	g := tcp(clientA, "10.1.0.5", 4000, server, 80, syn)
	w.forwarded(g, uplink)
	g.flags, g.partial, g.gso, g.payload = ack, true, 1360, make([]byte, 9000)
	w.forwarded(g, uplink)
	g.gso = 1361
	w.refused(g, ReasonTooBig)
	// What may be fragmented is.
	s.df = false
	p := w.send(s)
	if p.Verdict != VerdictFragment || p.Out != uplink || p.MTU != 1400 {
		t.Fatalf("%v to %d bytes because of %v", p.Verdict, p.MTU, p.Reason)
	}
	s.payload = s.payload[:1]
	p.Head, p.Total = s.frame(), len(s.frame())
	if w.process(&p); p.Verdict != VerdictForward || p.MTU != 0 {
		t.Fatalf("%v to %d bytes because of %v", p.Verdict, p.MTU, p.Reason)
	}
	w.idle()
}

func TestRepliesAreLimited(t *testing.T) {
	w := newWorld(t, Limits{Replies: 5}, nil)
	s := udp(clientA, "10.1.0.5", 4000, server, 33434)
	s.ttl = 1
	replies := func(n int) (got int) {
		for range n {
			if w.send(s).Verdict == VerdictReply {
				got++
			}
		}
		return got
	}
	if n := replies(50); n != 5 {
		t.Fatalf("%d replies at once", n)
	}
	w.at += 400 * time.Millisecond
	if n := replies(50); n != 2 {
		t.Fatalf("%d replies after 400 ms", n)
	}
	w.at += time.Hour
	w.neighbours()
	if n := replies(50); n != 5 {
		t.Fatalf("%d replies after an hour", n)
	}
	if c, _ := w.PortStats(clientA); c.Replies != 12 || c.Unanswered != 138 || c.Dropped[ReasonTTL] != 150 {
		t.Fatalf("%+v", c)
	}
	b := udp(clientB, "10.2.0.5", 4000, server, 33434)
	b.ttl = 1
	w.refused(b, ReasonTTL) // another's limit is its own
}

func TestNothingRepliesToErrorsGroupsAndLaterFragments(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) {
		c.Rules = []Rule{{Out: Match{Ports: []PortID{LocalPort}}, Action: Reject}, {Out: Match{Ports: []PortID{uplink}}, Action: Accept}}
		c.Default = Reject
	})
	w.refused(udp(clientA, "10.1.0.5", 4000, "10.1.0.1", 53), ReasonFiltered)
	w.dropped(udp(clientA, "10.1.0.5", 4000, "10.1.0.255", 53), ReasonFiltered)
	w.dropped(udp(clientA, "10.1.0.5", 4000, "224.0.0.251", 5353), ReasonFiltered)
	s := udp(clientA, "0.0.0.0", 68, "255.255.255.255", 67)
	s.dmac = [6]byte{255, 255, 255, 255, 255, 255}
	w.dropped(s, ReasonFiltered)
	typ, code, _ := w.refused(udp(clientA, "10.1.0.5", 4000, "10.2.0.5", 53), ReasonFiltered)
	if typ != 3 || code != 13 {
		t.Fatalf("type %d code %d", typ, code)
	}
	typ, code, _ = w.refused(udp(clientA, "fd01::5", 4000, "fd02::5", 53), ReasonFiltered)
	if typ != 1 || code != 1 {
		t.Fatalf("type %d code %d", typ, code)
	}
	p := w.send(udp(clientA, "10.1.0.5", 4000, server, 53))
	e := icmpError(uplink, server, "192.0.2.2", 3, 3, 0, p.Head)
	e.ttl = 1
	w.dropped(e, ReasonTTL)
	f := spec{in: clientA, src: "10.1.0.5", dst: server, proto: 17, fragment: 100, payload: make([]byte, 8), ttl: 1}
	w.dropped(f, ReasonFragment)
}

func TestNoRoute(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Routes = nil; c.Default = Accept; c.Rules = nil })
	typ, code, _ := w.refused(udp(clientA, "10.1.0.5", 4000, server, 53), ReasonNoRoute)
	if typ != 3 || code != 0 {
		t.Fatalf("type %d code %d", typ, code)
	}
	typ, code, _ = w.refused(udp(clientA, "fd01::5", 4000, "2001:db8:1::9", 53), ReasonNoRoute)
	if typ != 1 || code != 0 {
		t.Fatalf("type %d code %d", typ, code)
	}
	w.forwarded(udp(clientA, "10.1.0.5", 4000, "10.2.0.5", 53), clientB)
}

func TestTheLongestPrefixDecides(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) {
		c.Default, c.Rules = Accept, nil
		c.Ports[1].Sources = append(c.Ports[1].Sources, pfx("203.0.113.0/24", "2001:db8:1::/48")...)
		c.Routes = append(c.Routes, Route{Prefix: netip.MustParsePrefix("203.0.113.0/24"), Out: clientB, Via: ip("10.2.0.5")},
			Route{Prefix: netip.MustParsePrefix(server + "/32"), Out: uplink, Via: ip("192.0.2.1")},
			Route{Prefix: netip.MustParsePrefix("2001:db8:1::/48"), Out: clientB, Via: ip("fd02::5")})
	})
	w.forwarded(udp(clientA, "10.1.0.5", 1, server, 2), uplink)
	w.forwarded(udp(clientA, "10.1.0.5", 1, "203.0.113.8", 2), clientB)
	w.forwarded(udp(clientA, "10.1.0.5", 1, "203.0.114.8", 2), uplink)
	w.forwarded(udp(clientA, "fd01::5", 1, "2001:db8:1::8", 2), clientB)
	w.forwarded(udp(clientA, "fd01::5", 1, "2001:db8:2::8", 2), uplink)
	w.dropped(udp(uplink, "203.0.113.8", 1, "10.1.0.5", 2), ReasonSpoofed) // it is behind client B
}

func TestAPacketWaitsForItsNeighbour(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Rules = []Rule{{Action: Accept}} })
	s := udp(clientA, "10.1.0.5", 4000, "10.2.0.77", 53)
	p := w.send(s)
	if p.Verdict != VerdictNeighbour || p.Out != clientB || p.Next != ip("10.2.0.77") || p.Reason != ReasonNoNeighbour {
		t.Fatalf("%+v", p)
	}
	ask := w.AppendSolicit(nil, p.Out, p.Next)
	want := append([]byte{255, 255, 255, 255, 255, 255}, macB[:]...)
	want = append(want, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	want = append(append(want, macB[:]...), 10, 2, 0, 1, 0, 0, 0, 0, 0, 0, 10, 2, 0, 77)
	if !bytes.Equal(ask, want) {
		t.Fatalf("ARP request\n got %x\nwant %x", ask, want)
	}
	// The answer.
	answer := bytes.Clone(ask)
	copy(answer, macB[:])
	copy(answer[6:], hostB[:])
	answer[21] = 2
	copy(answer[22:], append(append([]byte{}, hostB[:]...), 10, 2, 0, 77))
	copy(answer[32:], append(append([]byte{}, macB[:]...), 10, 2, 0, 1))
	a := Packet{In: clientB, Head: answer, Total: len(answer)}
	w.process(&a)
	if !a.Learnt || a.Next != ip("10.2.0.77") || a.Verdict != VerdictDrop || a.Reason != ReasonNone {
		t.Fatalf("%+v", a)
	}
	w.process(&p)
	if p.Verdict != VerdictForward || [6]byte(p.Head[:6]) != hostB {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	// After a minute the router wants it confirmed, and after two it must be.
	w.at += 61 * time.Second
	asks := 0
	for range 10 {
		if p := w.send(s); p.Ask && p.Next == ip("10.2.0.77") && p.Verdict == VerdictForward {
			asks++
		}
	}
	w.at += 2 * time.Second
	if p := w.send(s); !p.Ask || asks != 1 {
		t.Fatalf("asked %d times in a second, then %v", asks, p.Ask)
	}
	w.at += 56500 * time.Millisecond
	if p := w.send(s); !p.Ask || p.Verdict != VerdictForward {
		t.Fatalf("%+v", p)
	}
	w.at += 700 * time.Millisecond
	if p = w.send(s); p.Verdict != VerdictNeighbour {
		t.Fatalf("%+v", p)
	}
	w.Unreachable(w.at, &p)
	if frame := p.AppendReply(nil); p.Verdict != VerdictReply || frame[34] != 3 || frame[35] != 1 || p.Out != clientA {
		t.Fatalf("%v: %x", p.Verdict, frame)
	}
	// IPv6
	s6 := udp(clientA, "fd01::5", 4000, "fd02::77", 53)
	if p = w.send(s6); p.Verdict != VerdictNeighbour || p.Next != ip("fd02::77") {
		t.Fatalf("%+v", p)
	}
	ask = w.AppendSolicit(nil, p.Out, p.Next)
	checkSums(t, ask, false)
	if got := look(ask); got.dst != "ff02::1:ff00:77" || got.src != "fd02::1" || got.ttl != 255 || !bytes.Equal(ask[:6], []byte{0x33, 0x33, 255, 0, 0, 0x77}) {
		t.Fatalf("%+v: %x", got, ask)
	}
	adv := discoverySpec(clientB, "fd02::77", "fd02::1", 136, "fd02::77", []byte{2, 1, hostB[0], hostB[1], hostB[2], hostB[3], hostB[4], hostB[5]})
	if a := w.send(adv); !a.Learnt || a.Next != ip("fd02::77") {
		t.Fatalf("%+v", a)
	}
	w.forwarded(s6, clientB)
	w.Forget(clientB, ip("fd02::77"))
	if p = w.send(s6); p.Verdict != VerdictNeighbour {
		t.Fatalf("%+v", p)
	}
	w.Unreachable(w.at, &p)
	if frame := p.AppendReply(nil); p.Verdict != VerdictReply || frame[54] != 1 || frame[55] != 3 {
		t.Fatalf("%v: %x", p.Verdict, frame)
	}
	w.idle()
}

// discoverySpec is a neighbour solicitation or advertisement.
func discoverySpec(in PortID, src, dst string, typ uint8, target string, options []byte) spec {
	s := spec{in: in, src: src, dst: dst, proto: 58, icmp: typ, ttl: 255, payload: append(ip(target).AsSlice(), options...)}
	if ip(dst).IsMulticast() {
		b := ip(dst).As16()
		s.dmac = [6]byte{0x33, 0x33, b[12], b[13], b[14], b[15]}
	}
	return s
}

func TestTheRouterAnswersARP(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	arp := func(in PortID, op byte, from [6]byte, sender string, target string) Packet {
		b := append([]byte{255, 255, 255, 255, 255, 255}, from[:]...)
		b = append(b, 8, 6, 0, 1, 8, 0, 6, 4, 0, op)
		b = append(append(b, from[:]...), ip(sender).AsSlice()...)
		b = append(append(b, 0, 0, 0, 0, 0, 0), ip(target).AsSlice()...)
		return Packet{In: in, Head: b, Total: len(b)}
	}
	do := func(p Packet) Packet {
		batch := []Packet{p}
		w.Process(w.at, batch)
		return batch[0]
	}
	p := do(arp(clientA, 1, hostA, "10.1.0.9", "10.1.0.1"))
	if p.Verdict != VerdictReply || p.Out != clientA || !p.Learnt || p.Next != ip("10.1.0.9") || p.Reason != ReasonNone {
		t.Fatalf("%+v", p)
	}
	want := append(append(append([]byte{}, hostA[:]...), macA[:]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
	want = append(append(append(append(want, macA[:]...), 10, 1, 0, 1), hostA[:]...), 10, 1, 0, 9)
	if got := p.AppendReply(nil); !bytes.Equal(got, want) {
		t.Fatalf("\n got %x\nwant %x", got, want)
	}
	if p = do(arp(clientA, 1, hostA, "0.0.0.0", "10.1.0.1")); p.Verdict != VerdictReply || p.Learnt { // a probe for the router's address
		t.Fatalf("%+v", p)
	}
	for name, c := range map[string]struct {
		p    Packet
		want Reason
	}{
		"for another":              {arp(clientA, 1, hostA, "10.1.0.10", "10.1.0.11"), ReasonNotForUs},
		"another's address":        {arp(clientA, 1, hostA, "10.2.0.5", "10.1.0.1"), ReasonSpoofed},
		"the router's address":     {arp(clientA, 2, hostA, "10.1.0.1", "10.1.0.1"), ReasonSpoofed},
		"beyond the link":          {arp(uplink, 2, gatewayMAC, server, "192.0.2.2"), ReasonSpoofed},
		"another's MAC":            {arp(clientB, 1, hostA, "10.2.0.5", "10.2.0.1"), ReasonSourceMAC},
		"of another than it is by": {func() Packet { p := arp(clientA, 1, hostA, "10.1.0.9", "10.1.0.1"); p.Head[22] = 4; return p }(), ReasonSourceMAC},
		"cut short":                {func() Packet { p := arp(clientA, 1, hostA, "10.1.0.9", "10.1.0.1"); p.Total--; return p }(), ReasonMalformed},
		"of another network":       {func() Packet { p := arp(clientA, 1, hostA, "10.1.0.9", "10.1.0.1"); p.Head[15] = 6; return p }(), ReasonMalformed},
		"of the router itself":     {arp(LocalPort, 1, macA, "10.1.0.1", "10.1.0.5"), ReasonNotIP},
	} {
		if p := do(c.p); p.Verdict != VerdictDrop || p.Reason != c.want || p.Learnt {
			t.Errorf("%s: %v because of %v, learnt %v; want %v", name, p.Verdict, p.Reason, p.Learnt, c.want)
		}
	}
}

func TestTheRouterAnswersSolicitations(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	option := []byte{1, 1, hostA[0], hostA[1], hostA[2], hostA[3], hostA[4], hostA[5]}
	for _, target := range []string{"fd01::1", "fe80::ff:fe00:1"} {
		p := w.send(discoverySpec(clientA, "fe80::5", "ff02::1:ff00:1", 135, target, option))
		frame := p.AppendReply(nil)
		if p.Verdict != VerdictReply || !p.Learnt {
			t.Fatalf("%v because of %v", p.Verdict, p.Reason)
		}
		if got := look(frame); got.src != target || got.dst != "fe80::5" || got.ttl != 255 || frame[54] != 136 || frame[58] != 0xe0 || !bytes.Equal(frame[len(frame)-6:], macA[:]) {
			t.Fatalf("%+v: %x", got, frame)
		}
	}
	p := w.send(discoverySpec(clientA, "::", "ff02::1:ff00:1", 135, "fd01::1", nil)) // somebody wants the address
	frame := p.AppendReply(nil)
	if got := look(frame); p.Verdict != VerdictReply || got.dst != "ff02::1" || frame[58] != 0xa0 || p.Learnt {
		t.Fatalf("%v: %x", p.Verdict, frame)
	}
	good := discoverySpec(clientA, "fd01::5", "fd01::1", 135, "fd01::1", option)
	for name, c := range map[string]struct {
		edit func(*spec)
		want Reason
	}{
		"from afar":             {func(s *spec) { s.ttl = 254 }, ReasonMalformed},
		"another code":          {func(s *spec) { s.code = 1 }, ReasonMalformed},
		"cut short":             {func(s *spec) { s.payload = s.payload[:15] }, ReasonMalformed},
		"an option of 0":        {func(s *spec) { s.payload = append(s.payload[:16:16], 1, 0, 0, 0, 0, 0, 0, 0) }, ReasonMalformed},
		"an option too long":    {func(s *spec) { s.payload = append(s.payload[:16:16], 1, 9, 0, 0, 0, 0, 0, 0) }, ReasonMalformed},
		"a group's MAC":         {func(s *spec) { s.payload = append(s.payload[:16:16], 1, 1, 3, 0, 0, 0, 0, 0) }, ReasonSourceMAC},
		"another's address":     {func(s *spec) { s.src = "fd02::5" }, ReasonSpoofed},
		"the router's address":  {func(s *spec) { s.src = "fd01::1" }, ReasonSpoofed},
		"for another":           {func(s *spec) { s.src = "::"; s.payload = ip("fd01::9").AsSlice() }, ReasonNotForUs},
		"advertises the router": {func(s *spec) { s.icmp = 136 }, ReasonSpoofed},
		"to another":            {func(s *spec) { s.dst = "fd02::5" }, ReasonNotForUs},
	} {
		s := good
		c.edit(&s)
		if p := w.send(s); p.Verdict != VerdictDrop || p.Reason != c.want || p.Learnt {
			t.Errorf("%s: %v because of %v, learnt %v; want %v", name, p.Verdict, p.Reason, p.Learnt, c.want)
		}
	}
	broken := good.packet()
	broken.Head[14+40+2]++
	w.process(&broken)
	if broken.Reason != ReasonChecksum {
		t.Fatalf("%v because of %v", broken.Verdict, broken.Reason)
	}
	// A guarded MAC holds for what is advertised, too.
	s := discoverySpec(clientB, "fd02::5", "fd02::1", 136, "fd02::5", []byte{2, 1, 2, 9, 9, 9, 9, 9})
	w.dropped(s, ReasonSourceMAC)
	// Solicitations of routers are for the router's own software.
	rs := spec{in: clientA, src: "fe80::5", dst: "ff02::2", proto: 58, icmp: 133, ttl: 255, dmac: [6]byte{0x33, 0x33, 0, 0, 0, 2}}
	if p := w.send(rs); p.Verdict != VerdictLocal {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
}

// What stations of the link say of an address that the router asks about comes to the caller, from
// whatever address; the router answers for none of them, and learns no neighbour.
func TestWhatOthersSayOfATentativeAddress(t *testing.T) {
	const tentative = "2001:db8:7::9"
	w := newWorld(t, Limits{}, func(c *Config) { c.Ports[2].Tentative = []netip.Addr{ip(tentative), ip("fe80::9")} })
	mac := []byte{2, 1, 2, 0, 0, 0, 0, 7}
	for name, s := range map[string]spec{
		"who wants it, too":     discoverySpec(uplink, "::", "ff02::1:ff00:9", 135, tentative, nil),
		"who has it":            discoverySpec(uplink, tentative, "ff02::1", 136, tentative, mac),
		"who has it, link-only": discoverySpec(uplink, "fe80::9", "ff02::1", 136, "fe80::9", mac),
		"who asks for it":       discoverySpec(uplink, "2001:db8::1", "ff02::1:ff00:9", 135, tentative, nil),
	} {
		if p := w.send(s); p.Verdict != VerdictLocal || p.Learnt || p.Out != LocalPort {
			t.Errorf("%s: %v because of %v, learnt %v", name, p.Verdict, p.Reason, p.Learnt)
		}
	}
	for name, c := range map[string]struct {
		s    spec
		want Reason
	}{
		"of another address": {discoverySpec(uplink, "::", "ff02::1:ff00:8", 135, "2001:db8:7::8", nil), ReasonNotForUs},
		"at another port":    {discoverySpec(clientA, "::", "ff02::1:ff00:9", 135, tentative, nil), ReasonNotForUs},
		"cut short": {func() spec {
			s := discoverySpec(uplink, "::", "ff02::1:ff00:9", 135, tentative, nil)
			s.payload = s.payload[:15]
			return s
		}(), ReasonMalformed},
		"from afar": {func() spec {
			s := discoverySpec(uplink, "::", "ff02::1:ff00:9", 135, tentative, nil)
			s.ttl = 254
			return s
		}(), ReasonMalformed},
		"what is no neighbour": {discoverySpec(uplink, tentative, "ff02::1", 136, "2001:db8:7::8", mac), ReasonSpoofed},
	} {
		if p := w.send(c.s); p.Verdict != VerdictDrop || p.Reason != c.want {
			t.Errorf("%s: %v because of %v, want %v", name, p.Verdict, p.Reason, c.want)
		}
	}
	w.cfg.Ports[2].Tentative = nil
	w.configure()
	w.dropped(discoverySpec(uplink, tentative, "ff02::1", 136, tentative, mac), ReasonSpoofed)
}

// query makes a query of multicast listener discovery, with a router alert (RFC 2710, section 3): one of all
// groups from a station of the uplink's link. edit changes the frame, before its checksum is computed.
func query(edit func(frame []byte)) Packet {
	s := discoverySpec(uplink, "fe80::77", "ff02::1", listenerQuery, "::", nil)
	s.ttl = 1
	f := s.frame()
	f = slices.Insert(f, 54, 58, 0, 5, 2, 0, 0, 1, 0)
	f[19], f[20] = f[19]+8, 0
	if edit != nil {
		edit(f)
	}
	sumInto(58, netip.AddrFrom16([16]byte(f[22:])), netip.AddrFrom16([16]byte(f[38:])), f[62:], false, false)
	return Packet{In: uplink, Head: f, Total: len(f)}
}

func TestQueriesForListeners(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) {
		c.Ports[2].Listens = true
		c.Rules = append([]Rule{{Name: "all", Out: Match{Ports: []PortID{LocalPort}}, States: StateNew | StateInvalid, Action: Drop}}, c.Rules...)
	})
	put := func(at int, a string) func([]byte) { return func(f []byte) { copy(f[at:], ip(a).AsSlice()) } }
	own := w.snap.port(uplink).linkLocal.netip().String()
	for name, edit := range map[string]func([]byte){
		"to all stations":     nil,
		"for a group":         func(f []byte) { put(38, "ff02::1:ff00:2")(f); put(70, "ff02::1:ff00:2")(f) },
		"to the router alone": put(38, "2001:db8::2"),
		"to its link's":       put(38, own),
	} {
		p := query(edit)
		if w.process(&p); p.Verdict != VerdictLocal || p.Out != LocalPort || p.Learnt {
			t.Errorf("%s: %v because of %v", name, p.Verdict, p.Reason)
		}
	}
	for name, c := range map[string]struct {
		p    Packet
		want Reason
	}{
		"from afar": {query(func(f []byte) { f[21] = 2 }), ReasonMalformed},
		"without options": {func() Packet {
			s := discoverySpec(uplink, "fe80::77", "ff02::1", listenerQuery, "::", nil)
			s.ttl = 1
			return s.packet()
		}(), ReasonMalformed},
		"with a routing header":  {query(func(f []byte) { f[20] = 43; f[56], f[57] = 0, 0 }), ReasonMalformed},
		"not in the head":        {func() Packet { p := query(nil); p.Head = p.Head[:len(p.Head)-1]; return p }(), ReasonMalformed},
		"with a wrong sum":       {func() Packet { p := query(nil); p.Head[64]++; return p }(), ReasonChecksum},
		"from a global address":  {query(put(22, "2001:db8::1")), ReasonSpoofed},
		"from no address":        {query(put(22, "::")), ReasonSpoofed},
		"from the router":        {query(put(22, own)), ReasonSpoofed},
		"to another station":     {query(put(38, "2001:db8::9")), ReasonNotForUs},
		"at a port without them": {func() Packet { p := query(nil); p.In = clientA; return p }(), ReasonFiltered},
	} {
		if w.process(&c.p); c.p.Verdict != VerdictDrop || c.p.Reason != c.want {
			t.Errorf("%s: %v because of %v, want %v", name, c.p.Verdict, c.p.Reason, c.want)
		}
	}
	w.cfg.Ports[2].Listens = false
	w.configure()
	unheard := query(nil)
	if w.process(&unheard); unheard.Verdict != VerdictDrop || unheard.Reason != ReasonFiltered {
		t.Errorf("where nobody listens: %v because of %v", unheard.Verdict, unheard.Reason)
	}
	// As other discovery, it costs nothing.
	w.cfg.Ports[2].Listens = true
	w.configure()
	batch := []Packet{query(nil)}
	if n := testing.AllocsPerRun(100, func() { w.Process(w.at, batch) }); n != 0 || batch[0].Verdict != VerdictLocal {
		t.Errorf("%v allocations, %v because of %v", n, batch[0].Verdict, batch[0].Reason)
	}
}

func TestNeighboursAreBounded(t *testing.T) {
	w := newWorld(t, Limits{Neighbours: 16}, nil)
	for i := range 200 {
		w.at += time.Millisecond
		if err := w.Learn(w.at, clientA, netip.AddrFrom4([4]byte{10, 1, 0, byte(2 + i)}), hostA); err != nil {
			t.Fatal(err)
		}
	}
	if s, _ := w.PortStats(clientA); s.Neighbours != 16 {
		t.Fatalf("%d neighbours", s.Neighbours)
	}
	if s, _ := w.PortStats(uplink); s.Neighbours != 2 {
		t.Fatalf("the uplink has %d neighbours left", s.Neighbours)
	}
	for _, c := range []struct {
		id  PortID
		a   string
		mac [6]byte
	}{{7, "10.1.0.5", hostA}, {LocalPort, "10.1.0.5", hostA}, {clientA, "10.2.0.5", hostA}, {clientA, "10.1.0.1", hostA}, {clientA, "10.1.0.255", hostA}, {clientA, "10.1.0.5", [6]byte{}}, {clientA, "10.1.0.5", [6]byte{1}}, {clientA, "ff02::1", hostA}} {
		if w.Learn(w.at, c.id, ip(c.a), c.mac) == nil {
			t.Errorf("learnt %+v", c)
		}
	}
	if w.Learn(w.at, clientA, netip.Addr{}, hostA) == nil {
		t.Error("learnt no address")
	}
}

func TestTheRoutersOwnPackets(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) {
		c.Rules = append(c.Rules, Rule{Name: "dns", In: Match{Groups: []string{"clients"}}, Out: Match{Ports: []PortID{LocalPort}}, Protocols: []uint8{packet.UDP}, DstPorts: []PortRange{{53, 53}}, Action: Accept})
	})
	// A client asks the router.
	p := w.send(udp(clientA, "10.1.0.5", 4000, "10.1.0.1", 53))
	if p.Verdict != VerdictLocal || p.Out != LocalPort || p.Translated {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	if got := w.forwarded(udp(LocalPort, "10.1.0.1", 53, "10.1.0.5", 4000), clientA); got.ttl != 64 {
		t.Fatalf("%+v", got)
	}
	w.dropped(udp(clientA, "10.1.0.5", 4000, "10.1.0.1", 54), ReasonFiltered)
	// The router asks a server.
	if got := w.forwarded(udp(LocalPort, "192.0.2.2", 5000, server, 53), uplink); got.src != "192.0.2.2" || got.sport != 5000 {
		t.Fatalf("%+v", got)
	}
	if p = w.send(udp(uplink, server, 53, "192.0.2.2", 5000)); p.Verdict != VerdictLocal {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	w.dropped(udp(uplink, server, 54, "192.0.2.2", 5000), ReasonFiltered)
	// An error about it comes back to it.
	sent := w.send(udp(LocalPort, "192.0.2.2", 5000, server, 53))
	if p = w.send(icmpError(uplink, server, "192.0.2.2", 3, 3, 0, sent.Head)); p.Verdict != VerdictLocal {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	// Its port is taken by a client's flow: it gets another, and does not notice.
	client := w.forwarded(udp(clientA, "10.1.0.5", 4000, server, 99), uplink)
	own := w.forwarded(udp(LocalPort, "192.0.2.2", client.sport, server, 99), uplink)
	if own.sport == client.sport {
		t.Fatal("two flows have the same answers")
	}
	p = w.send(udp(uplink, server, 99, "192.0.2.2", own.sport))
	if got := look(p.Head); p.Verdict != VerdictLocal || got.dport != client.sport || !p.Translated {
		t.Fatalf("%v: %+v", p.Verdict, got)
	}
	w.forwarded(udp(uplink, server, 99, "192.0.2.2", client.sport), clientA)
	// It talks to itself without the filter's help, and without a flow.
	flows := w.Stats().Flows
	if p = w.send(udp(LocalPort, "192.0.2.2", 1, "10.1.0.1", 2)); p.Verdict != VerdictLocal || w.Stats().Flows != flows {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	// A rule may name it.
	w.cfg.Rules = append([]Rule{{In: Match{Ports: []PortID{LocalPort}}, Dst: pfx(server + "/32"), Action: Drop}}, w.cfg.Rules...)
	w.configure()
	w.dropped(udp(LocalPort, "192.0.2.2", 5000, server, 53), ReasonFiltered)
	w.forwarded(udp(LocalPort, "192.0.2.2", 5000, "203.0.113.8", 53), uplink)
	// DHCP: no flow, and an address yet to come.
	w.cfg.LocalDefault = Accept
	w.configure()
	d := udp(clientA, "0.0.0.0", 68, "255.255.255.255", 67)
	d.dmac = [6]byte{255, 255, 255, 255, 255, 255}
	n := w.Stats().Flows
	if p = w.send(d); p.Verdict != VerdictLocal || w.Stats().Flows != n {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	w.idle()
}

func TestTheMSSIsClamped(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.ClampMSS = true; c.Ports[2].MTU = 1400 })
	mss := func(f []byte, n int) uint16 { return binary.BigEndian.Uint16(f[n+22:]) }
	s := tcp(clientA, "10.1.0.5", 4000, server, 80, syn)
	s.options = []byte{2, 4, 1460 >> 8, 1460 & 255}
	p := w.send(s)
	if got := mss(p.Head, 34); got != 1360 {
		t.Fatalf("MSS %d", got)
	}
	back := tcp(uplink, server, 80, "192.0.2.2", look(p.Head).sport, synAck)
	back.options = s.options
	if p = w.send(back); mss(p.Head, 34) != 1360 {
		t.Fatalf("MSS %d", mss(p.Head, 34))
	}
	s6 := tcp(clientA, "fd01::5", 4000, "2001:db8:1::9", 80, syn)
	s6.options = s.options
	if p = w.send(s6); mss(p.Head, 54) != 1340 {
		t.Fatalf("MSS %d", mss(p.Head, 54))
	}
	for name, options := range map[string][]byte{"small": {2, 4, 4, 0}, "cut": {2}, "of length 0": {2, 0, 255, 255}, "behind the end": {0, 2, 4, 255}, "too long": {3, 9, 255, 255}} {
		s.options = options
		s.sport++
		p := w.send(s)
		if got := p.Head[14+20+20:]; p.Verdict != VerdictForward || !bytes.Equal(got[:len(options)], options) {
			t.Errorf("%s: %v %x", name, p.Verdict, got)
		}
	}
	w.idle()
}

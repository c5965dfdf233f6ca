package router

import (
	"encoding/binary"
	"testing"

	"barevif/pvnet/packet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

func forwardsTo(c *Config) {
	c.Forwards = []Forward{
		{In: Match{Ports: []PortID{uplink}}, Proto: packet.TCP, Ports: PortRange{8000, 8009}, To: ip("10.1.0.5"), ToPort: 80},
		{Proto: packet.UDP, Addr: ip("192.0.2.2"), Ports: PortRange{53, 53}, To: ip("10.2.0.5")},
	}
	c.Rules = append(c.Rules, Rule{Name: "in", In: Match{Ports: []PortID{uplink}}, Dst: pfx("10.1.0.5/32"), Protocols: []uint8{6}, DstPorts: []PortRange{{80, 89}}, Action: Accept},
		Rule{Name: "dns", Dst: pfx("10.2.0.5/32"), Protocols: []uint8{17}, DstPorts: []PortRange{{53, 53}}, Action: Accept})
}

func TestAForwardedPort(t *testing.T) {
	w := newWorld(t, Limits{}, forwardsTo)
	got := w.forwarded(tcp(uplink, server, 5000, "192.0.2.2", 8003, syn), clientA)
	if got.src != server || got.sport != 5000 || got.dst != "10.1.0.5" || got.dport != 83 {
		t.Fatalf("%+v", got)
	}
	back := w.forwarded(tcp(clientA, "10.1.0.5", 83, server, 5000, synAck), uplink)
	if back.src != "192.0.2.2" || back.sport != 8003 || back.dst != server || back.dport != 5000 {
		t.Fatalf("%+v", back)
	}
	w.dropped(tcp(uplink, server, 5000, "192.0.2.2", 8010, syn), ReasonFiltered) // to the router itself
	w.dropped(tcp(clientB, "10.2.0.5", 5000, "192.0.2.2", 8003, syn), ReasonFiltered)
	w.idle()
}

func TestAForwardAcrossClientsAndBackToTheSame(t *testing.T) {
	w := newWorld(t, Limits{}, forwardsTo)
	got := w.forwarded(udp(clientA, "10.1.0.5", 5000, "192.0.2.2", 53), clientB)
	if got.src != "10.1.0.5" || got.dst != "10.2.0.5" {
		t.Fatalf("%+v", got)
	}
	if back := w.forwarded(udp(clientB, "10.2.0.5", 53, "10.1.0.5", 5000), clientA); back.src != "192.0.2.2" || back.sport != 53 {
		t.Fatalf("%+v", back)
	}
	// The server itself, through the forward: without another source it would answer itself.
	got = w.forwarded(udp(clientB, "10.2.0.5", 5000, "192.0.2.2", 53), clientB)
	if got.src != "10.2.0.1" || got.dst != "10.2.0.5" || got.dport != 53 {
		t.Fatalf("%+v", got)
	}
	if back := w.forwarded(udp(clientB, "10.2.0.5", 53, "10.2.0.1", got.sport), clientB); back.src != "192.0.2.2" || back.dst != "10.2.0.5" || back.dport != 5000 {
		t.Fatalf("%+v", back)
	}
	w.idle()
}

func TestASourceHasOnePortForAllDestinations(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	one := w.forwarded(udp(clientA, "10.1.0.5", 5000, server, 53), uplink)
	two := w.forwarded(udp(clientA, "10.1.0.5", 5000, "203.0.113.8", 123), uplink)
	if one.sport != two.sport {
		t.Fatalf("ports %d and %d", one.sport, two.sport)
	}
	other := newWorld(t, Limits{}, nil)
	same := 0
	for i := range uint16(20) {
		a := w.forwarded(udp(clientA, "10.1.0.5", 6000+i, server, 53), uplink)
		b := other.forwarded(udp(clientA, "10.1.0.5", 6000+i, server, 53), uplink)
		if a.sport == b.sport {
			same++
		}
	}
	if same > 5 {
		t.Fatal("the ports of two routers are the same, so they can be guessed")
	}
}

func TestIPv6IsNotTranslatedUnlessAsked(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	if got := w.forwarded(tcp(clientA, "fd01::5", 4000, "2001:db8:1::9", 80, syn), uplink); got.src != "fd01::5" || got.sport != 4000 {
		t.Fatalf("%+v", got)
	}
	w.cfg.Ports[2].Masquerade6 = true
	w.configure()
	// The flow that was not translated is over.
	w.dropped(tcp(clientA, "fd01::5", 4000, "2001:db8:1::9", 80, ack), ReasonInvalid)
	for _, s := range []spec{
		tcp(clientA, "fd01::5", 4001, "2001:db8:1::9", 80, syn), udp(clientA, "fd01::5", 4001, "2001:db8:1::9", 80), echo(clientA, "fd01::5", "2001:db8:1::9", 5, false),
	} {
		got := w.forwarded(s, uplink)
		if got.src != "2001:db8::2" {
			t.Fatalf("%+v", got)
		}
		back := s
		back.in, back.src, back.sport, back.dst, back.dport = uplink, s.dst, s.dport, got.src, got.sport
		if s.proto == 58 {
			back.sport, back.icmp = got.sport, 129
		}
		if s.proto == 6 {
			back.flags = synAck
		}
		if got := w.forwarded(back, clientA); got.dst != "fd01::5" {
			t.Fatalf("%+v", got)
		}
	}
	w.idle()
}

func TestChecksumsOfEveryKindStayRight(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Ports[2].Masquerade6 = true; c.ClampMSS = true })
	for n := range 600 {
		payload := make([]byte, n%97)
		for i := range payload {
			payload[i] = byte(n * (i + 3))
		}
		for _, six := range []bool{false, true} {
			src, dst := "10.1.0.5", server
			if six {
				src, dst = "fd01::5", "2001:db8:1::9"
			}
			for _, s := range []spec{
				{proto: 6, flags: syn, options: []byte{1, 2, 4, 0xff, 0xff, 1, 1, 1}},
				{proto: 6, flags: syn, options: []byte{2, 4, 0xff, 0xff}, partial: true},
				{proto: 17}, {proto: 17, partial: true}, {proto: 17, noSum: !six},
			} {
				s.in, s.src, s.dst, s.sport, s.dport, s.payload = clientA, src, dst, uint16(n*7), uint16(n*13), payload
				w.forwarded(s, uplink)
			}
			s := echo(clientA, src, dst, uint16(n), false)
			s.payload = payload
			w.forwarded(s, uplink)
		}
		w.at += 40e9
		w.neighbours()
		w.Tick(w.at)
	}
	w.idle()
}

func TestAUDPChecksumThatBecomesZero(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	s := udp(clientA, "10.1.0.5", 5000, server, 53)
	s.payload = []byte{0, 0}
	got := w.send(s)
	// The payload word that makes the sum 0xffff after the translation, and the field 0.
	sum := header.UDP(got.Head[34:]).Checksum()
	binary.BigEndian.PutUint16(s.payload, sum)
	p := w.send(s)
	if c := header.UDP(p.Head[34:]).Checksum(); c != 0xffff {
		t.Fatalf("checksum %#x", c)
	}
}

func TestAnICMPErrorFromOutsideFindsTheClient(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Ports[2].Masquerade6 = true })
	for _, s := range []spec{
		tcp(clientA, "10.1.0.5", 4000, server, 80, syn), udp(clientA, "10.1.0.5", 4000, server, 53), echo(clientA, "10.1.0.5", server, 77, false),
		{in: clientA, src: "10.1.0.5", dst: server, sport: 4001, dport: 9, proto: 17, noSum: true, payload: []byte{1}},
		{in: clientA, src: "10.1.0.5", dst: server, proto: 47, payload: make([]byte, 20)},
		tcp(clientA, "fd01::5", 4000, "2001:db8:1::9", 80, syn), udp(clientA, "fd01::5", 4000, "2001:db8:1::9", 53), echo(clientA, "fd01::5", "2001:db8:1::9", 77, false),
	} {
		p := w.send(s)
		if p.Verdict != VerdictForward {
			t.Fatalf("%+v: %v because of %v", s, p.Verdict, p.Reason)
		}
		far, us, typ := "198.51.100.1", "192.0.2.2", uint8(11)
		if ip(s.src).Is6() {
			far, us, typ = "2001:db8:2::1", "2001:db8::2", 3
		}
		for _, cut := range []int{len(p.Head), 0} {
			quoted := p.Head
			if cut == 0 { // the least that has to be quoted
				n := 14 + 20 + 8
				if ip(s.src).Is6() {
					n = 14 + 40 + 8
				}
				quoted = p.Head[:n]
			}
			e := icmpError(uplink, far, us, typ, 0, 0, quoted)
			got := w.send(e)
			if got.Verdict != VerdictForward || got.Out != clientA {
				t.Fatalf("%+v: %v because of %v", e, got.Verdict, got.Reason)
			}
			outer := look(got.Head)
			if outer.src != far || outer.dst != s.src {
				t.Fatalf("the error goes from and to %+v", outer)
			}
			at := 14 + 28
			if got.Head[12] != 8 {
				at = 14 + 48
			}
			in := append(make([]byte, 14), got.Head[at:]...)
			copy(in[12:], got.Head[12:14])
			if inner := look(in); inner.src != s.src || inner.sport != s.sport || inner.dst != s.dst || inner.dport != s.dport {
				t.Fatalf("the error quotes %+v, sent was %+v", inner, s)
			}
			if cut != 0 {
				checkSums(t, in, false) // the quoted packet is right again, too
			}
		}
		// About a packet nobody sent.
		quoted := p.Head
		if ip(s.src).Is6() {
			quoted[14+39]++
		} else {
			quoted[14+19]++
			header.IPv4(quoted[14:]).SetChecksum(0)
			header.IPv4(quoted[14:]).SetChecksum(^header.IPv4(quoted[14:]).CalculateChecksum())
		}
		w.dropped(icmpError(uplink, far, us, typ, 0, 0, quoted), ReasonInvalid)
	}
	w.idle()
}

func TestAnICMPErrorFromAClientSpeaksWithTheRoutersAddress(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	got := w.forwarded(udp(clientA, "10.1.0.5", 4000, server, 53), uplink)
	answered := w.send(udp(uplink, server, 53, "192.0.2.2", got.sport))
	e := icmpError(clientA, "10.1.0.5", server, 3, 3, 0, answered.Head)
	out := w.send(e)
	if out.Verdict != VerdictForward || out.Out != uplink {
		t.Fatalf("%v because of %v", out.Verdict, out.Reason)
	}
	if s := look(out.Head); s.src != "192.0.2.2" || s.dst != server {
		t.Fatalf("%+v", s)
	}
	in := append(make([]byte, 14), out.Head[14+28:]...)
	in[12] = 8
	if inner := look(in); inner.dst != "192.0.2.2" || inner.dport != got.sport || inner.src != server || inner.sport != 53 {
		t.Fatalf("%+v", inner)
	}
	// The same error in the name of the server, from the client, is spoofed.
	e.src = server
	w.dropped(e, ReasonSpoofed)
	w.idle()
}

func TestAnICMPErrorAboutAForwardedPort(t *testing.T) {
	w := newWorld(t, Limits{}, forwardsTo)
	p := w.send(tcp(uplink, server, 5000, "192.0.2.2", 8003, syn))
	out := w.send(icmpError(clientA, "10.1.0.5", server, 3, 1, 0, p.Head))
	if out.Verdict != VerdictForward || out.Out != uplink {
		t.Fatalf("%v because of %v", out.Verdict, out.Reason)
	}
	if s := look(out.Head); s.src != "192.0.2.2" || s.dst != server {
		t.Fatalf("%+v", s)
	}
	in := append(make([]byte, 14), out.Head[14+28:]...)
	in[12] = 8
	if inner := look(in); inner.dst != "192.0.2.2" || inner.dport != 8003 || inner.src != server || inner.sport != 5000 {
		t.Fatalf("%+v", inner)
	}
	w.idle()
}

func TestErrorsThatBelongToNoFlow(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	p := w.send(udp(clientA, "10.1.0.5", 4000, server, 53))
	good := icmpError(uplink, "198.51.100.1", "192.0.2.2", 3, 1, 0, p.Head)
	for name, edit := range map[string]func(*spec){
		"source quench":          func(s *spec) { s.icmp = 4 },
		"redirect":               func(s *spec) { s.icmp = 5 },
		"to another host":        func(s *spec) { s.dst = "10.1.0.6" },
		"quotes nothing":         func(s *spec) { s.payload = nil },
		"quotes half a header":   func(s *spec) { s.payload = s.payload[:20] },
		"quotes 7 bytes":         func(s *spec) { s.payload = s.payload[:27] },
		"quotes a later piece":   func(s *spec) { s.payload[7] = 1 },
		"quotes another version": func(s *spec) { s.payload[0] = 0x65 },
		"quotes an error": func(s *spec) {
			s.payload[9] = 1
			s.payload[20] = 3
		},
	} {
		s := good
		s.payload = append([]byte(nil), good.payload...)
		edit(&s)
		if got := w.send(s); got.Verdict != VerdictDrop || got.Reason != ReasonInvalid {
			t.Errorf("%s: %v because of %v", name, got.Verdict, got.Reason)
		}
	}
	short := good.packet() // the head ends before the error
	short.Head = short.Head[:14+28+28]
	batch := []Packet{short}
	if w.Process(w.at, batch); batch[0].Verdict != VerdictForward {
		t.Errorf("an error of which the end is not in the head: %v because of %v", batch[0].Verdict, batch[0].Reason)
	}
	s := good
	s.fragment = 0x2000
	w.dropped(s, ReasonFragment)
	// It must come from where the packets went.
	s = good
	s.in, s.src = clientB, "10.2.0.5"
	w.dropped(s, ReasonSpoofed)
	w.forwarded(good, clientA)
	w.cfg.Rules = append([]Rule{{States: StateRelated, Protocols: []uint8{1}, ICMPTypes: []uint8{3}, Action: Drop}}, w.cfg.Rules...)
	w.configure()
	w.dropped(good, ReasonFiltered)
	w.idle()
}

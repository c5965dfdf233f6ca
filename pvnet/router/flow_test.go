package router

import (
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

const (
	syn    = header.TCPFlagSyn
	synAck = header.TCPFlagSyn | header.TCPFlagAck
	ack    = header.TCPFlagAck
	fin    = header.TCPFlagFin | header.TCPFlagAck
	rst    = header.TCPFlagRst | header.TCPFlagAck
)

const server = "203.0.113.7"

// open opens a TCP connection from client A through the masquerading uplink, and returns the
// port that the server sees.
func (w *world) open(sport uint16) uint16 {
	w.t.Helper()
	out := w.forwarded(tcp(clientA, "10.1.0.5", sport, server, 80, syn), uplink)
	w.forwarded(tcp(uplink, server, 80, "192.0.2.2", out.sport, synAck), clientA)
	w.forwarded(tcp(clientA, "10.1.0.5", sport, server, 80, ack), uplink)
	return out.sport
}

func (w *world) only() *flow {
	w.t.Helper()
	var one *flow
	for i := range w.table.flows {
		if f := &w.table.flows[i]; f.used {
			if one != nil {
				w.t.Fatal("there is more than one flow")
			}
			one = f
		}
	}
	if one == nil {
		w.t.Fatal("there is no flow")
	}
	return one
}

func TestATCPConnectionFromOpenToClosed(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	got := w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, syn), uplink)
	if got.src != "192.0.2.2" || got.dst != server || got.dport != 80 || got.ttl != 63 || got.sport < 1024 {
		t.Fatalf("the server sees %+v", got)
	}
	p := w.send(tcp(clientA, "10.1.0.5", 4000, server, 80, syn)) // again
	if [6]byte(p.Head[:6]) != gatewayMAC || [6]byte(p.Head[6:12]) != macUp {
		t.Fatalf("the frame goes from and to the stations %x", p.Head[:12])
	}
	back := w.forwarded(tcp(uplink, server, 80, "192.0.2.2", got.sport, synAck), clientA)
	if back.src != server || back.sport != 80 || back.dst != "10.1.0.5" || back.dport != 4000 {
		t.Fatalf("the client sees %+v", back)
	}
	f := w.only()
	wantState := func(s state, life time.Duration) {
		t.Helper()
		if f.state != s || f.deadline != int64(w.at+life) {
			t.Fatalf("the flow is in state %d for %v, want %d for %v", f.state, time.Duration(f.deadline)-w.at, s, life)
		}
	}
	wantState(answered, time.Minute)
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), uplink)
	wantState(established, 124*time.Minute)
	w.at += time.Hour
	w.neighbours()
	w.forwarded(tcp(uplink, server, 80, "192.0.2.2", got.sport, fin), clientA)
	wantState(closing, 4*time.Minute)
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), uplink)
	wantState(closing, 4*time.Minute)
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, fin), uplink)
	wantState(closed, time.Minute)
	w.forwarded(tcp(uplink, server, 80, "192.0.2.2", got.sport, ack), clientA)
	wantState(closed, time.Minute)
	// The same ports again: a new flow.
	serial := f.serial
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, syn), uplink)
	if f = w.only(); f.serial == serial || f.state != opening {
		t.Fatal("a SYN after the end made no new flow")
	}
	w.at += 2 * time.Minute
	w.neighbours()
	w.dropped(tcp(uplink, server, 80, "192.0.2.2", got.sport, synAck), ReasonInvalid)
	w.idle()
}

func TestARSTEndsAFlowUnlessItsReceiverGoesOn(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	port := w.open(4000)
	w.forwarded(tcp(uplink, server, 80, "192.0.2.2", port, rst), clientA)
	f := w.only()
	if f.state != reset || f.deadline != int64(w.at+10*time.Second) {
		t.Fatalf("state %d after a RST", f.state)
	}
	serial := f.serial
	w.forwarded(tcp(uplink, server, 80, "192.0.2.2", port, syn), clientA) // nor is it over for who forged the RST
	if f.serial != serial || !f.used {
		t.Fatal("a RST and a SYN from outside ended the flow")
	}
	// What was on its way, and what the sender of the RST sends, does not revive it.
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), uplink)
	w.at += 3 * time.Second
	w.forwarded(tcp(uplink, server, 80, "192.0.2.2", port, ack), clientA)
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, rst), uplink)
	if f.state != reset || f.deadline != int64(w.at+7*time.Second) {
		t.Fatalf("state %d, %v to live", f.state, time.Duration(f.deadline)-w.at)
	}
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), uplink)
	if f.state != established {
		t.Fatal("the client went on after a RST that it did not believe, but its flow ends")
	}
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, rst), uplink)
	w.at += 11 * time.Second
	w.dropped(tcp(uplink, server, 80, "192.0.2.2", port, ack), ReasonInvalid)
	w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), ReasonInvalid)
	w.idle()
}

func TestARefusedConnectionIsOverSoon(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	got := w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 81, syn), uplink)
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 81, header.TCPFlagRst), uplink)
	if w.only().state != opening {
		t.Fatal("the first side ended what the other has not answered")
	}
	w.forwarded(tcp(uplink, server, 81, "192.0.2.2", got.sport, rst), clientA)
	if w.only().state != reset {
		t.Fatal("the flow goes on")
	}
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 81, syn), uplink)
	if w.only().state != opening {
		t.Fatal("a second attempt made no new flow")
	}
	w.idle()
}

func TestAConnectionOpenedFromBothSides(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Ports[2].Masquerade = false })
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, syn), uplink)
	w.forwarded(tcp(uplink, server, 80, "10.1.0.5", 4000, syn), clientA)
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, synAck), uplink)
	w.forwarded(tcp(uplink, server, 80, "10.1.0.5", 4000, synAck), clientA)
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), uplink)
	if s := w.only().state; s != established {
		t.Fatalf("state %d", s)
	}
	w.idle()
}

func TestTCPWithoutSYNBeginsNothing(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	for _, flags := range []header.TCPFlags{ack, fin, rst, synAck, ack | header.TCPFlagPsh} {
		w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, flags), ReasonInvalid)
	}
	for _, flags := range []header.TCPFlags{0, header.TCPFlagFin, syn | header.TCPFlagFin, syn | header.TCPFlagRst, fin | syn, rst | header.TCPFlagFin, header.TCPFlagUrg} {
		w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, flags), ReasonInvalid)
	}
	if n := w.Stats().Flows; n != 0 {
		t.Fatalf("%d flows", n)
	}
	w.cfg.Rules = append(w.cfg.Rules, Rule{States: StateInvalid, Dst: pfx("10.2.0.0/24", server+"/32"), Action: Accept})
	w.configure()
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, "10.2.0.5", 80, ack), clientB)
	w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), ReasonInvalid) // nobody knows the port it should get
	if n := w.Stats().Flows; n != 0 {
		t.Fatalf("%d flows", n)
	}
}

func TestPacketsOfOthersSweepWhatIsOver(t *testing.T) {
	w := newWorld(t, Limits{Flows: 1024}, nil)
	for i := range uint16(200) {
		w.forwarded(udp(clientA, "10.1.0.5", 1000+i, server, 53), uplink)
	}
	for range 200 { // some seconds of traffic, without a Tick
		w.at += 200 * time.Millisecond
		w.neighbours()
		for range 10 {
			w.forwarded(udp(clientB, "10.2.0.5", 9, server, 53), uplink)
		}
	}
	if n := w.Stats().Flows; n != 1 {
		t.Fatalf("%d flows", n)
	}
	w.idle()
}

func TestUDPLivesLongerOnceItIsAnswered(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	got := w.forwarded(udp(clientA, "10.1.0.5", 5353, server, 53), uplink)
	f := w.only()
	if f.deadline != int64(w.at+30*time.Second) {
		t.Fatal(time.Duration(f.deadline) - w.at)
	}
	back := w.forwarded(udp(uplink, server, 53, "192.0.2.2", got.sport), clientA)
	if back.dst != "10.1.0.5" || back.dport != 5353 {
		t.Fatalf("%+v", back)
	}
	if f.deadline != int64(w.at+5*time.Minute) {
		t.Fatal(time.Duration(f.deadline) - w.at)
	}
	// Another host, or another port, is no answer.
	w.dropped(udp(uplink, "203.0.113.8", 53, "192.0.2.2", got.sport), ReasonFiltered)
	w.dropped(udp(uplink, server, 54, "192.0.2.2", got.sport), ReasonFiltered)
	w.at += 5*time.Minute + time.Second
	w.neighbours()
	w.dropped(udp(uplink, server, 53, "192.0.2.2", got.sport), ReasonFiltered)
	w.idle()
}

func TestEchoesAreToldApartByTheirIdentifiers(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	one := w.forwarded(echo(clientA, "10.1.0.5", server, 7, false), uplink)
	two := w.forwarded(echo(clientB, "10.2.0.5", server, 7, false), uplink)
	if one.src != "192.0.2.2" || two.src != one.src || one.sport == two.sport {
		t.Fatalf("%+v and %+v", one, two)
	}
	if back := w.forwarded(echo(uplink, server, "192.0.2.2", two.sport, true), clientB); back.dst != "10.2.0.5" || back.sport != 7 {
		t.Fatalf("%+v", back)
	}
	if back := w.forwarded(echo(uplink, server, "192.0.2.2", one.sport, true), clientA); back.dst != "10.1.0.5" || back.sport != 7 {
		t.Fatalf("%+v", back)
	}
	w.dropped(echo(clientA, "10.1.0.5", server, 9, true), ReasonInvalid)
	six := w.forwarded(echo(clientA, "fd01::5", "2001:db8:1::9", 7, false), uplink)
	if six.src != "fd01::5" || six.sport != 7 || six.ttl != 63 {
		t.Fatalf("%+v", six)
	}
	w.forwarded(echo(uplink, "2001:db8:1::9", "fd01::5", 7, true), clientA)
	w.dropped(echo(uplink, "2001:db8:1::9", "fd01::5", 0, true), ReasonInvalid)
	w.idle()
}

func TestOtherProtocolsByTheirAddresses(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	gre := spec{in: clientA, src: "10.1.0.5", dst: server, proto: 47, payload: []byte{0, 0, 8, 0, 1, 2}}
	if got := w.forwarded(gre, uplink); got.src != "192.0.2.2" {
		t.Fatalf("%+v", got)
	}
	back := spec{in: uplink, src: server, dst: "192.0.2.2", proto: 47, payload: []byte{0, 0, 8, 0, 1, 2}}
	if got := w.forwarded(back, clientA); got.dst != "10.1.0.5" {
		t.Fatalf("%+v", got)
	}
	// Nothing tells the packets of a second client apart.
	gre.in, gre.src = clientB, "10.2.0.5"
	w.dropped(gre, ReasonTranslation)
	w.idle()
}

func TestAFloodingClientKeepsToItsQuota(t *testing.T) {
	w := newWorld(t, Limits{Flows: 64, FlowsPerPort: 16}, nil)
	port := w.open(1)
	for i := range uint16(15) {
		w.open(10 + i)
	}
	w.dropped(tcp(clientA, "10.1.0.5", 99, server, 80, syn), ReasonFlowQuota)
	if s, _ := w.PortStats(clientA); s.Refused != 1 || s.Flows != 16 || s.FlowsMost != 16 || s.Evicted != 0 {
		t.Fatalf("%+v", s)
	}
	// Half-open ones give way to each other, but not those that are established.
	w.forwarded(tcp(clientA, "10.1.0.5", 1, server, 80, rst), uplink)
	w.at += 11 * time.Second
	for i := range uint16(100) {
		w.forwarded(tcp(clientA, "10.1.0.5", 1000+i, server, 80, syn), uplink)
		w.forwarded(udp(clientB, "10.2.0.5", 1000+i%8, server, 53), uplink)
	}
	s, _ := w.PortStats(clientA)
	if s.Flows != 16 || s.Evicted == 0 {
		t.Fatalf("%+v", s)
	}
	for i := range uint16(15) {
		w.forwarded(tcp(clientA, "10.1.0.5", 10+i, server, 80, ack), uplink)
	}
	if s, _ := w.PortStats(clientB); s.Flows != 8 || s.Evicted != 0 {
		t.Fatalf("%+v", s)
	}
	w.dropped(tcp(uplink, server, 80, "192.0.2.2", port, ack), ReasonInvalid)
	w.consistent()
	w.idle()
}

func TestAFullTableGoesToWhoHasLessThanItsShare(t *testing.T) {
	w := newWorld(t, Limits{Flows: 32, FlowsPerPort: 32, NATPerPort: 64}, nil)
	for i := range uint16(32) {
		w.open(100 + i)
	}
	w.dropped(tcp(clientA, "10.1.0.5", 99, server, 80, syn), ReasonFlowQuota)
	// A share is 32/4: the ports and the router itself.
	for i := range uint16(8) {
		w.forwarded(udp(clientB, "10.2.0.5", 1000+i, server, 53), uplink)
	}
	w.consistent()
	a, _ := w.PortStats(clientA)
	b, _ := w.PortStats(clientB)
	if a.Flows != 24 || a.Evicted != 8 || b.Flows != 8 || b.Evicted != 0 {
		t.Fatalf("a %+v\nb %+v", a, b)
	}
	// The oldest went.
	w.dropped(tcp(clientA, "10.1.0.5", 100, server, 80, ack), ReasonInvalid)
	w.forwarded(tcp(clientA, "10.1.0.5", 131, server, 80, ack), uplink)
	// Above its share it lives with its own, here half-open, flows.
	w.forwarded(udp(clientB, "10.2.0.5", 2000, server, 53), uplink)
	if b, _ = w.PortStats(clientB); b.Flows != 8 || b.Evicted != 1 {
		t.Fatalf("%+v", b)
	}
	w.idle()
}

func TestAFullTableOfEstablishedFlowsRefuses(t *testing.T) {
	w := newWorld(t, Limits{Flows: 8, FlowsPerPort: 8}, func(c *Config) { c.Rules = []Rule{{Action: Accept}}; c.Ports[2].Masquerade = false })
	for i := range uint16(4) {
		w.forwarded(udp(clientA, "10.1.0.5", 100+i, "10.2.0.5", 53), clientB)
		w.forwarded(udp(clientB, "10.2.0.5", 53, "10.1.0.5", 100+i), clientA)
		w.forwarded(udp(clientB, "10.2.0.5", 100+i, "10.1.0.5", 53), clientA)
		w.forwarded(udp(clientA, "10.1.0.5", 53, "10.2.0.5", 100+i), clientB)
	}
	w.dropped(udp(clientA, "10.1.0.5", 200, "10.2.0.5", 53), ReasonFlowTable)
	if s := w.Stats(); s.Flows != 8 || s.Refused != 1 || s.FlowsMost != 8 || s.FlowLimit != 8 || s.PortLimit != 8 {
		t.Fatalf("%+v", s)
	}
	w.idle()
}

// The router's own flows, which guests cause by their questions, give way to each other whatever their
// state is, the oldest first, and so that no other port loses one.
func TestTheRoutersOwnFlowsGiveWayToEachOther(t *testing.T) {
	w := newWorld(t, Limits{Flows: 64, FlowsPerPort: 16}, nil)
	w.open(1)
	asks := func(port uint16) { w.forwarded(udp(LocalPort, "192.0.2.2", port, server, 53), uplink) }
	answers := func(port uint16) spec { return udp(uplink, server, 53, "192.0.2.2", port) }
	answered := func(port uint16) {
		t.Helper()
		if p := w.send(answers(port)); p.Verdict != VerdictLocal {
			t.Fatalf("port %d: %v because of %v", port, p.Verdict, p.Reason)
		}
	}
	asks(2000) // and is not answered yet when the table is full
	for i := range uint16(100) {
		w.at += time.Second
		asks(3000 + i)
		if i == 10 {
			answered(2000)
		}
		answered(3000 + i)
	}
	if s, _ := w.PortStats(LocalPort); s.Refused != 0 || s.Flows != 16 || s.Evicted != 85 {
		t.Fatalf("%+v", s)
	}
	answered(3099)
	w.dropped(answers(3083), ReasonFiltered) // it is no answer any more
	w.forwarded(tcp(clientA, "10.1.0.5", 1, server, 80, ack), uplink)
	// One that waits for its answer outlasts older ones that have theirs.
	asks(4000)
	w.at += time.Second
	for i := range uint16(15) {
		asks(5000 + i)
		answered(5000 + i)
	}
	answered(4000)
	w.consistent()
	w.idle()
}

func TestPortNumbersRunOut(t *testing.T) {
	w := newWorld(t, Limits{Flows: 1 << 17, FlowsPerPort: 1 << 17, NATPerPort: 64512}, nil)
	none := 0
	for i := range 70000 {
		p := udp(clientA, "10.1.0.5", uint16(i), server, 53)
		if i >= 65536 {
			p = udp(clientA, "10.1.0.6", uint16(i), server, 53)
		}
		switch got := w.send(p); {
		case got.Verdict == VerdictForward:
		case got.Reason == ReasonTranslation:
			none++
		default:
			t.Fatalf("%v because of %v", got.Verdict, got.Reason)
		}
	}
	if s, _ := w.PortStats(clientA); s.Flows > 64512 || s.Flows < 60000 || none == 0 {
		t.Fatalf("%d flows to one destination, %d without a port", s.Flows, none)
	}
	// To another destination the same numbers are free.
	w.forwarded(udp(clientB, "10.2.0.5", 9, "203.0.113.8", 53), uplink)
	w.idle()
}

func TestAClientHasItsQuotaOfPortNumbers(t *testing.T) {
	w := newWorld(t, Limits{NATPerPort: 4}, nil)
	for i := range uint16(4) {
		w.open(100 + i)
	}
	w.dropped(udp(clientA, "10.1.0.5", 9, server, 53), ReasonFlowQuota)
	w.forwarded(udp(clientA, "fd01::5", 9, "2001:db8:1::9", 53), uplink) // needs none
	w.dropped(udp(clientA, "10.1.0.5", 9, server, 53), ReasonFlowQuota)
	w.forwarded(udp(clientB, "10.2.0.5", 9, server, 53), uplink)
	w.idle()
}

package router

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"testing"
	"time"

	"barevif/pvnet/packet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// A conn is a TCP connection of client A with the server, whose segments the test makes. Both
// sides have sent nothing but their SYNs, so that their next byte is number 8.
type conn struct {
	*world
	port uint16 // that the server sees
}

func (w *world) connect(scale ...byte) conn {
	w.t.Helper()
	s := tcp(clientA, "10.1.0.5", 4000, server, 80, syn)
	s.options = scale
	out := w.forwarded(s, uplink)
	s = tcp(uplink, server, 80, "192.0.2.2", out.sport, synAck)
	s.options = scale
	w.forwarded(s, clientA)
	w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, ack), uplink)
	return conn{w, out.sport}
}

// from makes a segment of a side.
func (c conn) from(d int, flags header.TCPFlags, seq, ack uint32) spec {
	s := tcp(clientA, "10.1.0.5", 4000, server, 80, flags)
	if d == answer {
		s = tcp(uplink, server, 80, "192.0.2.2", c.port, flags)
	}
	s.seq, s.ack = seq, ack
	return s
}

func (c conn) passes(s spec) {
	c.t.Helper()
	to := uplink
	if s.in == uplink {
		to = clientA
	}
	c.forwarded(s, to)
}

func TestARSTOutsideOfTheWindowIsDropped(t *testing.T) {
	for d, name := range []string{"from the client", "from the server"} {
		t.Run(name, func(t *testing.T) {
			c := newWorld(t, Limits{}, nil).connect()
			for _, flags := range []header.TCPFlags{header.TCPFlagRst, rst} {
				// The receiver expects byte 8 and has room for 1000.
				for _, seq := range []uint32{7, 1010, 0x80000008, 0xffffffff, 7 + 1<<31} {
					c.dropped(c.from(d, flags, seq, 8), ReasonWindow)
				}
			}
			f := c.only()
			if f.state != established || f.deadline != int64(c.at+124*time.Minute) {
				t.Fatalf("state %d for %v", f.state, time.Duration(f.deadline)-c.at)
			}
			p := clientA
			if d == answer {
				p = uplink
			}
			if s, _ := c.PortStats(p); s.Dropped[ReasonWindow] != 10 {
				t.Errorf("%d counted", s.Dropped[ReasonWindow])
			}
			c.passes(c.from(d, header.TCPFlagRst, 1009, 0)) // the last number that a side may have come to
			if f.state != reset {
				t.Fatalf("state %d", f.state)
			}
		})
	}
}

func TestAFINOutsideOfTheWindowIsDropped(t *testing.T) {
	for d, name := range []string{"from the client", "from the server"} {
		t.Run(name, func(t *testing.T) {
			c := newWorld(t, Limits{}, nil).connect()
			for _, s := range []spec{
				c.from(d, fin, 6, 8), c.from(d, fin, 1010, 8), c.from(d, fin, 1<<31, 8), // not expected
				c.from(d, fin, 8, 9), c.from(d, fin, 8, 1<<31), c.from(d, fin, 8, 0xffff0007), // acknowledges what was not sent, or is too old
			} {
				c.dropped(s, ReasonWindow)
			}
			f := c.only()
			if f.state != established {
				t.Fatalf("state %d", f.state)
			}
			c.passes(c.from(d, fin, 8, 8))
			if f.state != closing {
				t.Fatalf("state %d", f.state)
			}
			c.passes(c.from(d, fin, 8, 8)) // again
		})
	}
}

// What is neither RST nor FIN is forwarded also outside of the windows, and changes nothing: not the
// windows, so that a RST that fits it does not fit, nor the flow's state.
func TestSegmentsOutsideOfTheWindowChangeNothing(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	c := w.connect()
	f := w.only()
	before := f.window
	data := c.from(answer, ack, 5000000, 8)
	data.payload = make([]byte, 100)
	for _, s := range []spec{data, c.from(answer, ack, 8, 7000000), c.from(orig, ack, 7000000, 8), c.from(answer, syn, 7000000, 0), c.from(orig, syn, 7000000, 0), c.from(answer, synAck, 7, 8)} {
		w.at += time.Minute
		w.neighbours()
		c.passes(s)
		if f.window != before || f.state != established {
			t.Fatalf("%+v: state %d\n%+v\n%+v", s, f.state, before, f.window)
		}
		if f.deadline != int64(w.at+124*time.Minute) {
			t.Fatal("the flow does not live on")
		}
	}
	w.dropped(c.from(answer, rst, 5000100, 8), ReasonWindow)
	// Nor does it revive a flow after a RST.
	c.passes(c.from(answer, rst, 8, 8))
	w.at += 3 * time.Second
	c.passes(c.from(orig, ack, 9000000, 8))
	if f.state != reset {
		t.Fatalf("state %d after a segment outside of the window", f.state)
	}
	c.passes(c.from(orig, ack, 8, 8))
	if f.state != established {
		t.Fatalf("state %d", f.state)
	}
}

// The windows follow data, acknowledgements and offers, also across 2^32 and with window scaling,
// which counts only if both sides ask for it.
func TestWindowsFollowAConnection(t *testing.T) {
	for _, c := range []struct {
		name            string
		client, server  []byte // options
		shift           uint32
		clientISN, srvs uint32
	}{
		{"plain", nil, nil, 0, 100, 200},
		{"one side scales", []byte{3, 3, 7}, nil, 0, 100, 200},
		{"the other side scales", nil, []byte{1, 3, 3, 7}, 0, 100, 200},
		{"both scale", []byte{2, 4, 5, 0xb4, 1, 3, 3, 7}, []byte{4, 2, 3, 3, 7}, 7, 100, 200},
		{"more than there is", []byte{3, 3, 200}, []byte{3, 3, 255}, mostShift, 100, 200},
		{"wraps", []byte{3, 3, 7}, []byte{3, 3, 7}, 7, 0xfffffff0, 0xffffff00},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, Limits{}, nil)
			open := tcp(clientA, "10.1.0.5", 4000, server, 80, syn)
			open.seq, open.options = c.clientISN, c.client
			k := conn{w, w.forwarded(open, uplink).sport}
			s := k.from(answer, synAck, c.srvs, c.clientISN+1)
			s.options = c.server
			k.passes(s)
			mine, its := c.clientISN+1, c.srvs+1
			k.passes(k.from(orig, ack, mine, its))
			// The client has 1000<<shift bytes of room.
			k.dropped(k.from(answer, rst, its+1000<<c.shift+2, mine), ReasonWindow)
			for range 40 { // the server sends, the client acknowledges
				s := k.from(answer, ack, its, mine)
				s.payload = make([]byte, 700)
				k.passes(s)
				its += 700
				k.passes(k.from(orig, ack, mine, its))
			}
			f := w.only()
			if got := f.window[answer]; got.acked != its || got.end != its || got.edge != its+1000<<c.shift || got.most != 1000<<c.shift {
				t.Fatalf("%+v, at byte %d", got, its)
			}
			k.dropped(k.from(answer, rst, its-1, mine), ReasonWindow) // was received before
			k.dropped(k.from(answer, rst, c.srvs+1, mine), ReasonWindow)
			k.dropped(k.from(answer, rst, its+1000<<c.shift+2, mine), ReasonWindow)
			k.passes(k.from(orig, fin, mine, its))
			k.passes(k.from(answer, fin, its, mine+1))
			k.passes(k.from(orig, ack, mine+1, its+1))
			if f.state != closed {
				t.Fatalf("state %d", f.state)
			}
		})
	}
}

func TestAConnectionIsRefusedByItsOwnNumbersAlone(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	k := conn{w, w.forwarded(tcp(clientA, "10.1.0.5", 4000, server, 80, syn), uplink).sport}
	k.dropped(k.from(answer, header.TCPFlagRst, 8, 0), ReasonWindow) // acknowledges nothing
	k.dropped(k.from(answer, rst, 0, 9), ReasonWindow)
	k.dropped(k.from(answer, rst, 0, 7), ReasonWindow)
	k.passes(k.from(answer, synAck, 500, 77)) // of an earlier connection: the client resets that
	k.passes(k.from(answer, ack, 500, 77))
	k.passes(k.from(orig, header.TCPFlagRst, 77, 0))
	f := w.only()
	if f.state != opening {
		t.Fatalf("state %d", f.state)
	}
	again := tcp(clientA, "10.1.0.5", 4000, server, 80, syn) // of another attempt, with other numbers
	again.seq = 3000
	k.passes(again)
	k.dropped(k.from(answer, rst, 0, 8), ReasonWindow)
	k.passes(k.from(answer, rst, 1, 3001))
	if f.state != reset {
		t.Fatalf("state %d", f.state)
	}
}

// A SYN may carry data (RFC 7413), which its answer takes or not.
func TestAFastOpen(t *testing.T) {
	for _, taken := range []uint32{8, 108} {
		w := newWorld(t, Limits{}, nil)
		s := tcp(clientA, "10.1.0.5", 4000, server, 80, syn)
		s.payload = make([]byte, 100)
		k := conn{w, w.forwarded(s, uplink).sport}
		k.passes(k.from(answer, synAck, 7, taken))
		k.passes(k.from(orig, ack, taken, 8))
		if f := w.only(); f.state != established || f.window[orig].end != 108 || f.window[orig].acked != taken {
			t.Fatalf("%+v", f)
		}
	}
}

// Of a first fragment nobody knows how long the packet is: the answers to all of it fit.
func TestAFragmentedSegmentIsFollowed(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	k := w.connect()
	s := k.from(orig, ack, 8, 8)
	s.payload, s.fragment = make([]byte, 500), 0x2000
	k.passes(s)
	k.passes(k.from(answer, ack, 8, 908))
	k.passes(k.from(orig, fin, 908, 8))
	if f := w.only(); f.state != closing || f.window[orig].edge != 1908 {
		t.Fatalf("%+v", f)
	}
}

// An ICMP error passes if the TCP segment that it quotes is under way, and belongs to the flow of the
// one that says so: of both families, in both directions, with translation, whatever it quotes beyond
// the 8 bytes that it has to.
func TestAnICMPErrorQuotesWhatIsUnderWay(t *testing.T) {
	for _, six := range []bool{false, true} {
		client, far, us := "10.1.0.5", server, "192.0.2.2"
		beyond := [2]string{"198.51.100.1", "10.1.0.6"} // who tells the client, and who tells the server
		if six {
			client, far, us = "fd01::5", "2001:db8:1::9", "2001:db8::2"
			beyond = [2]string{"2001:db8:2::1", "fd01::6"}
		}
		w := newWorld(t, Limits{}, func(c *Config) { c.Ports[2].Masquerade6 = true })
		// sends sends a segment and returns it as it left the router.
		var port uint16
		sends := func(d int, flags header.TCPFlags, seq, ack uint32, n int) []byte {
			t.Helper()
			s := tcp(clientA, client, 4000, far, 80, flags)
			if d == answer {
				s = tcp(uplink, far, 80, us, port, flags)
			}
			s.seq, s.ack, s.payload = seq, ack, make([]byte, n)
			p := w.send(s)
			if p.Verdict != VerdictForward {
				t.Fatalf("%+v: %v because of %v", s, p.Verdict, p.Reason)
			}
			return p.Head
		}
		// told processes the ICMP error of a host beyond the router that a frame was too big. It quotes the
		// frame with sequence number seq.
		told := func(d int, frame []byte, seq uint32, want Reason) {
			t.Helper()
			l3 := 20
			if six {
				l3 = 40
			}
			for _, n := range []int{len(frame), 14 + l3 + 8} {
				quoted := append([]byte(nil), frame[:n]...)
				binary.BigEndian.PutUint32(quoted[14+l3+4:], seq)
				e := icmpError([2]PortID{uplink, clientA}[d], beyond[d], look(frame).src, 3, 4, 1400, quoted)
				if six {
					e.icmp, e.code = 2, 0
				}
				p := w.send(e)
				if want != ReasonNone {
					if p.Verdict != VerdictDrop || p.Reason != want {
						t.Errorf("IPv6 %v, direction %d, byte %d, %d bytes quoted: %v because of %v", six, d, seq, n, p.Verdict, p.Reason)
					}
					continue
				}
				if p.Verdict != VerdictForward || p.Out != [2]PortID{clientA, uplink}[d] {
					t.Errorf("IPv6 %v, direction %d, byte %d, %d bytes quoted: %v out of %d because of %v", six, d, seq, n, p.Verdict, p.Out, p.Reason)
					continue
				}
				inner := append(append([]byte(nil), p.Head[:14]...), p.Head[14+l3+8:]...)
				if got := binary.BigEndian.Uint32(inner[14+l3+4:]); got != seq {
					t.Errorf("byte %d became %d", seq, got)
				}
				if got := look(inner); got.src != [2]string{client, far}[d] || got.dst != [2]string{far, us}[d] || got.sport != [2]uint16{4000, 80}[d] || got.dport != [2]uint16{80, port}[d] {
					t.Errorf("it quotes %+v", got)
				}
			}
		}
		open := sends(orig, syn, 999, 0, 0)
		port = look(open).sport
		told(orig, open, 999, ReasonNone)
		told(orig, open, 1000, ReasonNone)
		for _, seq := range []uint32{998, 1001, 999 + 1<<31, 0} {
			told(orig, open, seq, ReasonQuote)
		}
		early := sends(answer, ack, 5000, 1, 0) // of a connection before: nobody knows its numbers
		for _, seq := range []uint32{5000, 0, 0xffffffff} {
			told(answer, early, seq, ReasonQuote)
		}
		accept := sends(answer, synAck, 0xfffffff0, 1000, 0)
		told(answer, accept, 0xfffffff0, ReasonNone)
		told(answer, accept, 0xffffffef, ReasonQuote)
		told(answer, accept, 0xfffffff2, ReasonQuote)
		sends(orig, ack, 1000, 0xfffffff1, 0)
		its := uint32(0xfffffff1)
		// The server has 400 bytes under way, across 2^32, and the client acknowledged 100 of them.
		data := sends(answer, ack, its, 1000, 400)
		sends(orig, ack, 1000, its+100, 0)
		for _, seq := range []uint32{its + 99, its + 100, its + 250, its + 399, its + 400} {
			told(answer, data, seq, ReasonNone)
		}
		for _, seq := range []uint32{its, its + 98, its + 401, its + 1<<31} {
			told(answer, data, seq, ReasonQuote)
		}
		// What the flow does not believe to be under way is not, though it was forwarded.
		stray := sends(answer, ack, 7000000, 1000, 10)
		told(answer, stray, 7000000, ReasonQuote)
		// The client ends its side: the FIN counts.
		last := sends(orig, fin, 1000, its+400, 50)
		told(orig, last, 1051, ReasonNone)
		told(orig, last, 1052, ReasonQuote)
		told(orig, last, 998, ReasonQuote)
		up, _ := w.PortStats(uplink)
		a, _ := w.PortStats(clientA)
		if up.Dropped[ReasonQuote] != 2*6 || a.Dropped[ReasonQuote] != 2*10 || up.Dropped[ReasonInvalid]+a.Dropped[ReasonInvalid] != 0 {
			t.Errorf("IPv6 %v: %v and %v were counted", six, up.Dropped, a.Dropped)
		}
		w.idle()
	}
}

// The same holds for connections of the router's own, and of hosts that a port is forwarded to.
func TestAnICMPErrorAboutTheRoutersOwnConnection(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	s := tcp(LocalPort, "192.0.2.2", 4000, server, 80, syn)
	s.dmac, s.smac = macUp, macUp
	p := w.send(s)
	if p.Verdict != VerdictForward {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	e := icmpError(uplink, "198.51.100.1", "192.0.2.2", 3, 1, 0, p.Head)
	if got := w.send(e); got.Verdict != VerdictLocal {
		t.Fatalf("%v because of %v", got.Verdict, got.Reason)
	}
	e.payload[20+7]++
	if got := w.send(e); got.Verdict != VerdictLocal { // the byte behind the SYN
		t.Fatalf("%v because of %v", got.Verdict, got.Reason)
	}
	e.payload[20+7]++
	w.dropped(e, ReasonQuote)

	w = newWorld(t, Limits{}, forwardsTo)
	p = w.send(tcp(uplink, server, 5000, "192.0.2.2", 8003, syn))
	e = icmpError(clientA, "10.1.0.5", server, 3, 1, 0, p.Head)
	w.forwarded(e, uplink)
	e.payload[20+4] ^= 0x80
	w.dropped(e, ReasonQuote)
}

func TestAFlowHasABoundedSize(t *testing.T) {
	if n := reflect.TypeFor[flow]().Size(); n != 264 {
		t.Errorf("an entry of the table has %d bytes; the package comment says 264", n)
	}
}

// An end is one side of a TCP connection that keeps to the rules. What it sends is decided by
// fuzzed bytes.
type end struct {
	isn, una, nxt uint32 // of its own bytes
	rcv           uint32 // what it expects
	edge          uint32 // how far it may send
	shift         uint8
	win           uint32 // that it offers, in bytes
	closed        bool   // it has sent its FIN
}

// FuzzWindows lets two honest ends of a connection talk through a flow: data, retransmissions,
// windows that open and close, acknowledgements that come late, FIN and RST. No RST or FIN that its
// receiver would believe is refused; a RST that its receiver would not believe is, unless the flow
// cannot know that yet; the bounds always include those of the ends; and an ICMP error may quote what
// an end has sent and its receiver has not, and nothing far from it.
func FuzzWindows(f *testing.F) {
	f.Add(uint32(7), uint32(7), uint8(0), uint8(0), []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Add(uint32(0xfffffff0), uint32(0x7fffffff), uint8(7), uint8(9), []byte("some data, and then some more, in both directions"))
	f.Add(uint32(0), uint32(1), uint8(14), uint8(14), []byte{0x10, 0x20, 0x81, 0x55, 0xa3, 0x12, 0xfe, 0x44, 0x9a, 0x30, 0xc8, 0x0f})
	f.Fuzz(func(t *testing.T, isnA, isnB uint32, shiftA, shiftB uint8, moves []byte) {
		if len(moves) > 4096 {
			return
		}
		var fl flow
		ends := [2]*end{
			{isn: isnA, una: isnA + 1, nxt: isnA + 1, rcv: isnB + 1, shift: shiftA % (mostShift + 1), win: 60000},
			{isn: isnB, una: isnB + 1, nxt: isnB + 1, rcv: isnA + 1, shift: shiftB % (mostShift + 1), win: 50000},
		}
		give := func(d int, flags uint8, s segment) fit {
			s.fit = fl.judge(d, flags, &s)
			if s.fit == within {
				fl.track(d, flags, &s)
			}
			return s.fit
		}
		give(orig, tcpSYN, segment{seq: isnA, end: isnA + 1, win: 60000, shift: ends[0].shift, scales: true})
		fl.state = answered
		if give(answer, tcpSYN|tcpACK, segment{seq: isnB, end: isnB + 1, ack: isnA + 1, win: 50000, shift: ends[1].shift, scales: true}) != within {
			t.Fatal("the answer does not fit")
		}
		ends[0].edge, ends[1].edge = isnA+1+50000, isnB+1+60000
		if give(orig, tcpACK, segment{seq: isnA + 1, end: isnA + 1, ack: isnB + 1, win: 60000 >> ends[0].shift}) != within {
			t.Fatal("the third segment does not fit")
		}
		ends[1].edge = isnB + 1 + 60000
		fl.state = established
		for i, m := range moves {
			d := int(m & 1)
			me, it := ends[d], ends[1-d]
			arg := uint32(m >> 4)
			s := segment{seq: me.nxt, end: me.nxt, ack: me.rcv, win: min(me.win>>me.shift, 0xffff)}
			offer := func() { // what this end says of its room, as the other end will understand it
				if edge := s.ack + s.win<<me.shift; !upTo(edge, it.edge) {
					it.edge = edge
				}
				if !upTo(s.ack, it.una) {
					it.una = s.ack
				}
			}
			switch m >> 1 & 7 {
			case 0, 1: // new data, as far as it may
				room := me.edge - me.nxt
				if me.closed || !upTo(me.nxt, me.edge) {
					room = 0
				}
				s.end = s.seq + min(room, arg*arg*300)
				me.nxt = s.end
				if upTo(it.rcv, s.end) && upTo(s.seq, it.rcv) {
					it.rcv = s.end
				}
			case 2: // what was sent already
				s.seq = me.una
				if upTo(it.rcv, s.end) {
					it.rcv = s.end
				}
			case 3: // room grows or shrinks; an offer is not taken back
				me.win = arg * arg * 4000
			case 4: // an old acknowledgement comes late
				s.ack -= min(arg*100, me.rcv-(it.isn+1))
				if give(d, tcpACK, s) == without {
					t.Fatalf("move %d: an acknowledgement is dropped", i)
				}
				continue
			case 5: // FIN
				if !me.closed {
					if !upTo(me.nxt, me.edge) {
						continue
					}
					me.closed = true
					me.nxt++
				}
				s.seq, s.end = me.nxt-1, me.nxt
				if got := give(d, tcpFIN|tcpACK, s); got != within {
					t.Fatalf("move %d: FIN %d of an end with %+v is judged %d: %+v", i, s.seq, *me, got, fl.window)
				}
				if it.rcv == s.seq {
					it.rcv = s.end
				}
				offer()
				continue
			case 6: // its own RST, which ends nothing here
				if got := fl.judge(d, tcpRST, &segment{seq: me.nxt, end: me.nxt}); got != within {
					t.Fatalf("move %d: RST %d of an end with %+v is judged %d: %+v", i, me.nxt, *me, got, fl.window)
				}
				continue
			case 7: // a forged one
				far := arg * arg * 1000003
				for _, seq := range []uint32{fl.window[d].edge + 2 + far, fl.window[d].acked - 1 - far} {
					if got := fl.judge(d, tcpRST|tcpACK, &segment{seq: seq, end: seq, ack: me.rcv}); got != without {
						t.Fatalf("move %d: RST %d from outside fits: %+v", i, seq, fl.window)
					}
				}
				continue
			}
			if got := give(d, tcpACK, s); got == without {
				t.Fatalf("move %d: %+v is dropped", i, s)
			}
			offer()
			for x, e := range ends {
				far := arg * arg * 1000003
				if missing := ends[1-x].rcv; !fl.underWay(x, missing) || !fl.underWay(x, e.nxt) || fl.underWay(x, fl.window[x].end+1+far) || fl.underWay(x, fl.window[x].acked-2-far) {
					t.Fatalf("move %d: side %d is at %+v, and the flow says %+v", i, x, *e, fl.window[x])
				}
				if w := &fl.window[x]; !upTo(e.nxt, w.end) || !upTo(w.acked, e.nxt) || !upTo(e.edge, w.edge) {
					t.Fatalf("move %d: side %d is at %+v, and the flow says %+v", i, x, *e, *w)
				}
			}
		}
	})
}

// Rejected TCP gets the reset that its receiver would send (RFC 9293, 3.10.7.1), the rest an ICMP
// error.
func TestRejectedTCPIsReset(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Default = Reject; c.Rules = nil })
	for _, six := range []bool{false, true} {
		src, dst := "10.1.0.5", server
		if six {
			src, dst = "fd01::5", "2001:db8:1::9"
		}
		for _, c := range []struct {
			flags    header.TCPFlags
			seq, ack uint32
			payload  int
			want     header.TCPFlags
			wantSeq  uint32
			wantAck  uint32
		}{
			{syn, 0xffffffff, 0, 0, header.TCPFlagRst | header.TCPFlagAck, 0, 0},
			{syn, 1000, 0, 77, header.TCPFlagRst | header.TCPFlagAck, 0, 1078},
		} {
			t.Run(fmt.Sprint(dst, c.flags, c.payload), func(t *testing.T) {
				s := tcp(clientA, src, 4000, dst, 80, c.flags)
				s.seq, s.ack, s.payload = c.seq, c.ack, make([]byte, c.payload)
				w.isReset(s, c.want, c.wantSeq, c.wantAck)
			})
		}
	}
	// Packets of no flow are refused with what they acknowledge.
	w.cfg.Rules = []Rule{{States: StateInvalid, Action: Reject}}
	w.configure()
	w.at += time.Minute
	w.neighbours()
	s := tcp(clientA, "10.1.0.5", 4000, server, 80, ack)
	s.seq, s.ack, s.payload = 3, 12345, make([]byte, 10)
	w.isReset(s, header.TCPFlagRst, 12345, 0)
	s.flags = fin
	w.isReset(s, header.TCPFlagRst, 12345, 0)
	s.flags = header.TCPFlagFin | header.TCPFlagUrg | header.TCPFlagAck
	w.isReset(s, header.TCPFlagRst, 12345, 0)
	w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, rst), ReasonFiltered) // a reset gets no answer
	w.dropped(tcp(clientA, "10.1.0.5", 4000, server, 80, header.TCPFlagRst), ReasonFiltered)
	typ, code, _ := w.refused(udp(clientA, "10.1.0.5", 4000, "10.2.0.5", 53), ReasonFiltered)
	if typ != 3 || code != 13 {
		t.Fatalf("UDP got type %d code %d", typ, code)
	}
	// Nobody knows how much a first fragment has: it gets an ICMP error.
	s = tcp(clientA, "10.1.0.5", 4000, server, 80, syn)
	s.fragment = 0x2000
	if p := w.send(s); p.Verdict != VerdictReply || p.AppendReply(nil)[23] != icmp4 {
		t.Fatalf("%+v", p)
	}
}

// A long frame that is cut later is as long as it says, and a reset has its port's limit of replies.
func TestAResetOfALongFrameAndItsLimit(t *testing.T) {
	w := newWorld(t, Limits{Replies: 5}, func(c *Config) { c.Default = Reject; c.Rules = nil })
	s := tcp(clientA, "10.1.0.5", 4000, server, 80, syn)
	s.seq, s.payload, s.partial, s.gso = 5, make([]byte, 9000), true, 1448
	w.isReset(s, header.TCPFlagRst|header.TCPFlagAck, 0, 9006)
	n := 1
	for range 20 {
		if p := w.send(tcp(clientA, "10.1.0.5", 4000, server, 80, syn)); p.Verdict == VerdictReply {
			n++
		}
	}
	if n != 5 {
		t.Errorf("%d replies", n)
	}
}

// isReset requires that a packet is answered with a reset in its receiver's name.
func (w *world) isReset(s spec, flags header.TCPFlags, seq, ack uint32) {
	w.t.Helper()
	p := w.send(s) // which compares the checksums with gVisor's
	if p.Verdict != VerdictReply || p.Out != s.in || p.Reason != ReasonFiltered {
		w.t.Fatalf("%v out of %d because of %v", p.Verdict, p.Out, p.Reason)
	}
	b := p.AppendReply(nil)
	h, ok := packet.Parse(b, len(b))
	if !ok || h.Proto != packet.TCP || h.End != len(b) || h.L5 != len(b) {
		w.t.Fatalf("no segment without data: %x", b)
	}
	if got := look(b); got.src != s.dst || got.dst != s.src || got.sport != s.dport || got.dport != s.sport || got.ttl != 64 {
		w.t.Fatalf("%+v", got)
	}
	if [6]byte(b) != hostA || [6]byte(b[6:]) != macA {
		w.t.Fatalf("from and to the stations %x", b[:12])
	}
	l4 := header.TCP(b[h.L4:])
	if l4.Flags() != flags || l4.SequenceNumber() != seq || l4.AckNumber() != ack || l4.WindowSize() != 0 || binary.BigEndian.Uint16(l4[18:]) != 0 {
		w.t.Fatalf("%v seq %d ack %d, want %v seq %d ack %d", l4.Flags(), l4.SequenceNumber(), l4.AckNumber(), flags, seq, ack)
	}
}

package router

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// The ports of the tests' router.
const (
	clientA PortID = 1
	clientB PortID = 2
	uplink  PortID = 9
)

var (
	macA       = [6]byte{2, 0, 0, 0, 0, 1} // the router's
	macB       = [6]byte{2, 0, 0, 0, 0, 2}
	macUp      = [6]byte{2, 0, 0, 0, 0, 9}
	hostA      = [6]byte{2, 0, 0, 0, 1, 1} // its neighbours'
	hostB      = [6]byte{2, 0, 0, 0, 1, 2}
	gatewayMAC = [6]byte{2, 0, 0, 0, 1, 9}
)

// A world is a router with two clients and an uplink, whose neighbours are known.
type world struct {
	*Router
	t   testing.TB
	at  time.Duration
	cfg Config
}

func pfx(s ...string) (list []netip.Prefix) {
	for _, x := range s {
		list = append(list, netip.MustParsePrefix(x))
	}
	return list
}

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

func baseConfig() Config {
	return Config{
		Ports: []Port{
			{ID: clientA, Name: "a", Group: "clients", MAC: macA, Addrs: pfx("10.1.0.1/24", "fd01::1/64"), Sources: pfx("10.1.0.0/24", "fd01::/64")},
			{ID: clientB, Name: "b", Group: "clients", MAC: macB, Addrs: pfx("10.2.0.1/24", "fd02::1/64"), Sources: pfx("10.2.0.0/24", "fd02::/64"), SourceMAC: hostB},
			{ID: uplink, Name: "up", MAC: macUp, Addrs: pfx("192.0.2.2/24", "2001:db8::2/64"), Masquerade: true},
		},
		Routes: []Route{
			{Prefix: netip.MustParsePrefix("0.0.0.0/0"), Out: uplink, Via: ip("192.0.2.1")},
			{Prefix: netip.MustParsePrefix("::/0"), Out: uplink, Via: ip("2001:db8::1")},
		},
		Rules: []Rule{
			{Name: "out", In: Match{Groups: []string{"clients"}}, Out: Match{Ports: []PortID{uplink}}, Action: Accept},
		},
	}
}

func newWorld(t testing.TB, limits Limits, edit func(*Config)) *world {
	t.Helper()
	r, err := New(limits)
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Router: r, t: t, at: time.Hour, cfg: baseConfig()}
	if edit != nil {
		edit(&w.cfg)
	}
	w.configure()
	w.neighbours()
	return w
}

func (w *world) configure() {
	w.t.Helper()
	if err := w.Configure(w.cfg); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) neighbours() {
	w.t.Helper()
	for _, n := range []struct {
		id  PortID
		a   string
		mac [6]byte
	}{
		{clientA, "10.1.0.5", hostA}, {clientA, "10.1.0.6", hostA}, {clientA, "fd01::5", hostA},
		{clientB, "10.2.0.5", hostB}, {clientB, "fd02::5", hostB},
		{uplink, "192.0.2.1", gatewayMAC}, {uplink, "2001:db8::1", gatewayMAC},
	} {
		if p := w.snap.port(n.id); p == nil || p.linkLocal == (addr{}) && ip(n.a).Is6() {
			continue
		}
		if err := w.Learn(w.at, n.id, ip(n.a), n.mac); err != nil {
			w.t.Fatal(err)
		}
	}
}

// A spec describes a packet.
type spec struct {
	in         PortID
	src, dst   string
	sport      uint16 // the identifier of an echo
	dport      uint16
	proto      uint8
	flags      header.TCPFlags
	icmp, code uint8
	rest       uint32 // the second word of an ICMP error, or the MTU
	payload    []byte
	ttl        uint8
	df         bool
	id         uint16
	options    []byte // of TCP
	ipOptions  []byte
	noSum      bool // UDP without a checksum
	partial    bool
	gso        uint16
	fragment   uint16 // IPv4: flags and offset
	dmac, smac [6]byte
	seq, ack   uint32 // of TCP; 0: those of a connection whose two sides begin at 7 and have sent nothing
	win        uint16 // 0: 1000
}

func (s *spec) seqOr() uint32 {
	switch {
	case s.seq != 0:
		return s.seq
	case s.flags&header.TCPFlagSyn != 0:
		return 7
	}
	return 8
}

func (s *spec) ackOr() uint32 {
	if s.ack == 0 && s.flags&header.TCPFlagAck != 0 {
		return 8
	}
	return s.ack
}

func (s *spec) winOr() uint16 {
	if s.win == 0 {
		return 1000
	}
	return s.win
}

func tcp(in PortID, src string, sport uint16, dst string, dport uint16, flags header.TCPFlags) spec {
	return spec{in: in, src: src, dst: dst, sport: sport, dport: dport, proto: 6, flags: flags}
}

func udp(in PortID, src string, sport uint16, dst string, dport uint16) spec {
	return spec{in: in, src: src, dst: dst, sport: sport, dport: dport, proto: 17, payload: []byte("datagram")}
}

func echo(in PortID, src, dst string, id uint16, reply bool) spec {
	s := spec{in: in, src: src, dst: dst, sport: id, proto: 1, icmp: 8, payload: []byte("ping")}
	if ip(src).Is6() {
		s.proto, s.icmp = 58, 128
	}
	switch {
	case reply && s.icmp == 8:
		s.icmp = 0
	case reply:
		s.icmp = 129
	}
	return s
}

// icmpError is an error about the packet in frame.
func icmpError(in PortID, src, dst string, typ, code uint8, rest uint32, frame []byte) spec {
	s := spec{in: in, src: src, dst: dst, proto: 1, icmp: typ, code: code, rest: rest, payload: bytes.Clone(frame[14:])}
	if ip(src).Is6() {
		s.proto = 58
	}
	return s
}

func tcpipAddr(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// frame makes the packet, by gVisor's headers.
func (s spec) frame() []byte {
	src, dst := ip(s.src), ip(s.dst)
	var l4 []byte
	switch s.proto {
	case 6:
		n := 20 + (len(s.options)+3)/4*4
		l4 = make([]byte, n, n+len(s.payload))
		h := header.TCP(l4)
		h.Encode(&header.TCPFields{SrcPort: s.sport, DstPort: s.dport, SeqNum: s.seqOr(), AckNum: s.ackOr(), DataOffset: uint8(n), Flags: s.flags, WindowSize: s.winOr()})
		copy(l4[20:], s.options)
		l4 = append(l4, s.payload...)
	case 17:
		l4 = make([]byte, 8, 8+len(s.payload))
		header.UDP(l4).Encode(&header.UDPFields{SrcPort: s.sport, DstPort: s.dport, Length: uint16(8 + len(s.payload))})
		l4 = append(l4, s.payload...)
	case 1, 58:
		l4 = make([]byte, 8, 8+len(s.payload))
		l4[0], l4[1] = s.icmp, s.code
		if isError(map[uint8]uint8{1: 4, 58: 6}[s.proto], s.icmp) {
			binary.BigEndian.PutUint32(l4[4:], s.rest)
		} else {
			binary.BigEndian.PutUint16(l4[4:], s.sport)
		}
		l4 = append(l4, s.payload...)
	default:
		l4 = bytes.Clone(s.payload)
	}
	ttl := s.ttl
	if ttl == 0 {
		ttl = 64
	}
	f := make([]byte, 14)
	dmac, smac := s.dmac, s.smac
	if dmac == [6]byte{} {
		dmac = map[PortID][6]byte{clientA: macA, clientB: macB, uplink: macUp}[s.in]
	}
	if smac == [6]byte{} {
		smac = map[PortID][6]byte{clientA: hostA, clientB: hostB, uplink: gatewayMAC}[s.in]
	}
	copy(f, dmac[:])
	copy(f[6:], smac[:])
	if src.Is4() {
		binary.BigEndian.PutUint16(f[12:], 0x0800)
		h := make([]byte, 20+(len(s.ipOptions)+3)/4*4)
		copy(h[20:], s.ipOptions)
		h[0] = 0x40 | uint8(len(h)/4)
		binary.BigEndian.PutUint16(h[2:], uint16(len(h)+len(l4)))
		binary.BigEndian.PutUint16(h[4:], s.id)
		frag := s.fragment
		if s.df {
			frag |= 0x4000
		}
		binary.BigEndian.PutUint16(h[6:], frag)
		h[8], h[9] = ttl, s.proto
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		header.IPv4(h).SetChecksum(^header.IPv4(h).CalculateChecksum())
		f = append(f, h...)
	} else {
		binary.BigEndian.PutUint16(f[12:], 0x86dd)
		h := make([]byte, 40)
		header.IPv6(h).Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(l4)), TransportProtocol: tcpip.TransportProtocolNumber(s.proto), HopLimit: ttl,
			SrcAddr: tcpipAddr(src), DstAddr: tcpipAddr(dst),
		})
		f = append(f, h...)
	}
	sumInto(s.proto, src, dst, l4, s.noSum, s.partial)
	return append(f, l4...)
}

// sumInto writes the checksum of a transport header, by gVisor.
func sumInto(proto uint8, src, dst netip.Addr, l4 []byte, none, partial bool) {
	pseudo := header.PseudoHeaderChecksum(tcpip.TransportProtocolNumber(proto), tcpipAddr(src), tcpipAddr(dst), uint16(len(l4)))
	field := -1
	switch proto {
	case 6:
		field = 16
	case 17:
		field = 6
	case 1:
		field, pseudo = 2, 0
	case 58:
		field = 2
	}
	if field < 0 || len(l4) < field+2 {
		return
	}
	l4[field], l4[field+1] = 0, 0
	sum := ^checksum.Checksum(l4, pseudo)
	switch {
	case none:
		sum = 0
	case partial:
		sum = pseudo
	case proto == 17 && sum == 0:
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(l4[field:], sum)
}

func (s spec) packet() Packet {
	f := s.frame()
	return Packet{In: s.in, Head: f, Total: len(f), Partial: s.partial, GSO: s.gso}
}

// send gives a packet to the router and checks what came of it: that its checksums are those
// which gVisor computes, and that the head is unchanged unless it goes on.
func (w *world) send(s spec) Packet {
	w.t.Helper()
	p := s.packet()
	w.process(&p)
	return p
}

func (w *world) process(p *Packet) {
	w.t.Helper()
	before := bytes.Clone(p.Head)
	batch := []Packet{*p}
	w.Process(w.at, batch)
	*p = batch[0]
	switch p.Verdict {
	case VerdictForward, VerdictLocal, VerdictFragment:
		checkSums(w.t, p.Head, p.Partial)
	default:
		if !bytes.Equal(before, p.Head) {
			w.t.Fatalf("%v changed the head\n%x\n%x", p.Verdict, before, p.Head)
		}
	}
	if p.Verdict == VerdictReply {
		checkSums(w.t, p.AppendReply(nil), false)
	}
}

// checkSums recomputes the checksums of a frame by gVisor, which makes them anew from all bytes,
// and compares.
func checkSums(t testing.TB, f []byte, partial bool) {
	t.Helper()
	want := bytes.Clone(f)
	switch binary.BigEndian.Uint16(f[12:]) {
	case 0x0800:
		h := header.IPv4(want[14:])
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		if h.FragmentOffset() == 0 && !h.More() {
			a, b := netip.AddrFrom4(h.SourceAddress().As4()), netip.AddrFrom4(h.DestinationAddress().As4())
			l4 := h.Payload()
			none := h.Protocol() == 17 && l4[6]|l4[7] == 0
			sumInto(h.Protocol(), a, b, l4, none, partial)
		}
	case 0x86dd:
		h := header.IPv6(want[14:])
		a, b := netip.AddrFrom16(h.SourceAddress().As16()), netip.AddrFrom16(h.DestinationAddress().As16())
		sumInto(uint8(h.NextHeader()), a, b, h.Payload(), false, partial)
	}
	if !bytes.Equal(f, want) {
		t.Fatalf("wrong checksums:\n got %x\nwant %x", f, want)
	}
}

// A seen is what a frame says.
type seen struct {
	src, dst     string
	sport, dport uint16
	ttl          uint8
}

func look(f []byte) seen {
	var s seen
	var l4 []byte
	var proto uint8
	if f[12] == 8 {
		h := header.IPv4(f[14:])
		a, b := h.SourceAddress(), h.DestinationAddress()
		s.src, s.dst, s.ttl, proto, l4 = a.String(), b.String(), h.TTL(), h.Protocol(), h[h.HeaderLength():]
	} else {
		h := header.IPv6(f[14:])
		a, b := h.SourceAddress(), h.DestinationAddress()
		s.src, s.dst, s.ttl, proto, l4 = a.String(), b.String(), h.HopLimit(), uint8(h.NextHeader()), h[40:]
	}
	switch {
	case (proto == 6 || proto == 17) && len(l4) >= 4:
		s.sport, s.dport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
	case (proto == 1 || proto == 58) && len(l4) >= 8:
		s.sport = binary.BigEndian.Uint16(l4[4:])
	}
	return s
}

// forwarded requires that a packet goes out of a port and returns what it says then.
func (w *world) forwarded(s spec, out PortID) seen {
	w.t.Helper()
	p := w.send(s)
	if p.Verdict != VerdictForward || p.Out != out {
		w.t.Fatalf("%+v: %v out of %d because of %v; want it forwarded out of %d", s, p.Verdict, p.Out, p.Reason, out)
	}
	return look(p.Head)
}

// dropped requires that a packet is dropped, without a reply, for a reason.
func (w *world) dropped(s spec, why Reason) {
	w.t.Helper()
	if p := w.send(s); p.Verdict != VerdictDrop || p.Reason != why {
		w.t.Fatalf("%+v: %v because of %v; want it dropped because of %v", s, p.Verdict, p.Reason, why)
	}
}

// refused requires that a packet is answered with an ICMP error, and returns its type and code.
func (w *world) refused(s spec, why Reason) (typ, code uint8, frame []byte) {
	w.t.Helper()
	p := w.send(s)
	if p.Verdict != VerdictReply || p.Reason != why || p.Out != s.in {
		w.t.Fatalf("%+v: %v because of %v; want a reply because of %v", s, p.Verdict, p.Reason, why)
	}
	frame = p.AppendReply(nil)
	n := 54
	if frame[12] == 8 {
		n = 34
	}
	if got := look(frame); got.dst != s.src {
		w.t.Fatalf("the reply goes to %v", got.dst)
	}
	return frame[n], frame[n+1], frame
}

// idle requires that no flow is left after all timeouts, so that every entry is free again.
func (w *world) idle() {
	w.t.Helper()
	w.at += 24 * time.Hour
	for range 20 {
		w.Tick(w.at)
	}
	if n := w.Stats().Flows; n != 0 {
		w.t.Fatalf("%d flows live on after a day", n)
	}
	w.consistent()
	free := 0
	for i := w.table.free; i != none; i = w.table.flows[i].next[0] {
		free++
	}
	if free != len(w.table.flows) {
		w.t.Fatalf("%d of %d entries are free", free, len(w.table.flows))
	}
}

// consistent compares the chains and lists with the flows in use.
func (w *world) consistent() {
	w.t.Helper()
	used, chained, listed := 0, 0, 0
	for i := range w.table.flows {
		if w.table.flows[i].used {
			used++
		}
	}
	for _, n := range w.table.buckets {
		for ; n != none; n = w.table.flows[n>>1].next[n&1] {
			chained++
			if chained > 2*used {
				w.t.Fatal("a chain has no end, or flows that are not in use")
			}
		}
	}
	for id := range MaxPorts + 1 {
		s := &w.local
		if id < MaxPorts {
			if s = w.states[id]; s == nil {
				continue
			}
		}
		n := 0
		for class := range s.lists {
			before := none
			for i := s.lists[class].first; i != none; i = w.table.flows[i].after {
				if f := &w.table.flows[i]; f.before != before || int(f.listed) != class || !f.used {
					w.t.Fatalf("flow %d is in a list it is not of", i)
				}
				before = i
				n++
			}
			if before != s.lists[class].last {
				w.t.Fatal("a list has the wrong end")
			}
		}
		if n != s.flows {
			w.t.Fatalf("port %d has %d flows in lists, and counts %d", id, n, s.flows)
		}
		listed += n
	}
	if chained != 2*used || listed != used || w.table.n != used {
		w.t.Fatalf("%d flows in use, %d counted, %d nodes in chains, %d in lists", used, w.table.n, chained, listed)
	}
}

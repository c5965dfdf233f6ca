package router

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// pieces cuts an IPv4 packet by a Fragmenter.
func pieces(t *testing.T, frame []byte, mtu int) (list [][]byte) {
	t.Helper()
	var f Fragmenter
	if !f.Init(frame, len(frame), mtu) {
		t.Fatal("the Fragmenter refuses the frame")
	}
	for {
		head, from, n, ok := f.Next()
		if !ok {
			return list
		}
		piece := append(bytes.Clone(head), frame[from:from+n]...)
		if len(piece) > 14+mtu {
			t.Fatalf("a fragment of %d bytes for an MTU of %d", len(piece)-14, mtu)
		}
		list = append(list, piece)
	}
}

func TestFragmentsFollowTheFirst(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	s := udp(clientA, "10.1.0.5", 4000, server, 53)
	s.id, s.payload = 77, bytes.Repeat([]byte("0123456789"), 400)
	list := pieces(t, s.frame(), 1500)
	if len(list) != 3 {
		t.Fatalf("%d fragments", len(list))
	}
	send := func(b []byte) Packet {
		t.Helper()
		p := Packet{In: clientA, Head: bytes.Clone(b), Total: len(b)}
		w.process(&p)
		return p
	}
	if p := send(list[1]); p.Verdict != VerdictDrop || p.Reason != ReasonFragment {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	var got []byte
	var first Packet
	for i, b := range list {
		p := send(b)
		if p.Verdict != VerdictForward || p.Out != uplink {
			t.Fatalf("fragment %d: %v because of %v", i, p.Verdict, p.Reason)
		}
		if i == 0 {
			first = p
		}
		if p.Hash != first.Hash {
			t.Fatal("the fragments of a packet are spread")
		}
		if s := look(p.Head); s.src != "192.0.2.2" || s.dst != server {
			t.Fatalf("%+v", s)
		}
		got = append(got, p.Head[34:]...)
	}
	// Together they have the right checksum.
	want := bytes.Clone(got)
	sumInto(17, ip("192.0.2.2"), ip(server), want, false, false)
	if !bytes.Equal(got, want) {
		t.Fatal("the checksum of the whole packet is wrong")
	}
	// Not those of another packet, nor after the time, nor from elsewhere.
	other := bytes.Clone(list[2])
	other[14+5]++
	header.IPv4(other[14:]).SetChecksum(0)
	header.IPv4(other[14:]).SetChecksum(^header.IPv4(other[14:]).CalculateChecksum())
	if p := send(other); p.Reason != ReasonFragment {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	p := Packet{In: clientB, Head: bytes.Clone(list[2]), Total: len(list[2])}
	copy(p.Head, macB[:])
	copy(p.Head[6:], hostB[:])
	if w.process(&p); p.Reason != ReasonFragment {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	w.cfg.Rules = nil
	w.configure()
	if p := send(list[2]); p.Reason != ReasonFragment || w.Stats().Flows != 0 {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	w.cfg = baseConfig()
	w.configure()
	send(list[0])
	w.at += 31 * time.Second
	if p := send(list[2]); p.Reason != ReasonFragment {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	w.idle()
}

func TestFragmentsThatHideTheirHeader(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	frag := func(proto uint8, fragment uint16, n int) spec {
		// The transport header's bytes are the payload here, so that it may be cut short.
		return spec{in: clientA, src: "10.1.0.5", dst: server, proto: 255, fragment: fragment, payload: make([]byte, n), id: 9, noSum: true}
	}
	send := func(proto uint8, fragment uint16, n int) Packet {
		p := frag(proto, fragment, n).packet()
		h := header.IPv4(p.Head[14:])
		h[9] = proto
		if n >= 20 && proto == 6 {
			h[20+12], h[20+13] = 0x80, byte(syn)
			if n < 32 {
				h[20+12] = 0x50
			}
		}
		h.SetChecksum(0)
		h.SetChecksum(^h.CalculateChecksum())
		w.process(&p)
		return p
	}
	for _, c := range []struct {
		proto    uint8
		fragment uint16
		n        int
		want     Reason
	}{
		{6, 0x2000, 8, ReasonTinyFragment},
		{6, 0x2000, 16, ReasonTinyFragment},
		{17, 0x2000, 0, ReasonTinyFragment},
		{1, 0x2000, 0, ReasonTinyFragment},
		{6, 0x2001, 8, ReasonFragment}, // no first one yet
		{6, 0x2000, 32, ReasonNone},    // a header of 32 bytes
		{6, 0x2001, 8, ReasonTinyFragment},
		{6, 0x2003, 8, ReasonTinyFragment},
		{6, 0x2004, 8, ReasonNone},
		{6, 0x0005, 1, ReasonNone},
		{6, 0x1fff, 8, ReasonMalformed}, // ends behind 64 KiB
		{6, 0x0004, 0, ReasonMalformed},
	} {
		p := send(c.proto, c.fragment, c.n)
		if p.Reason != c.want || (p.Verdict == VerdictForward) != (c.want == ReasonNone) {
			t.Errorf("%+v: %v because of %v", c, p.Verdict, p.Reason)
		}
	}
	p := send(6, 0x0005, 8)
	p.Partial = true
	copy(p.Head, macA[:])
	copy(p.Head[6:], hostA[:])
	if w.process(&p); p.Reason != ReasonMalformed {
		t.Errorf("partial: %v because of %v", p.Verdict, p.Reason)
	}
	w.idle()
}

func TestAFloodOfFirstFragmentsHurtsItsOwnPort(t *testing.T) {
	w := newWorld(t, Limits{Fragments: 8}, nil)
	s := udp(clientB, "10.2.0.5", 4000, server, 53)
	s.id, s.fragment = 5, 0x2000
	w.forwarded(s, uplink)
	for i := range 1000 {
		f := udp(clientA, "10.1.0.5", 4000, server, 53)
		f.id, f.fragment = uint16(i), 0x2000
		w.forwarded(f, uplink)
	}
	later := spec{in: clientB, src: "10.2.0.5", dst: server, proto: 17, id: 5, fragment: 1, payload: make([]byte, 8), noSum: true}
	p := later.packet()
	copy(p.Head[34:], make([]byte, 8))
	if w.process(&p); p.Verdict != VerdictForward {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	if n := len(w.states[clientA].fragments); n != 8 {
		t.Fatalf("%d places", n)
	}
}

// fragment6 is an IPv6 fragment of UDP with data from offset on.
func fragment6(id uint32, offset int, more bool, data []byte) Packet {
	s := spec{in: clientA, src: "fd01::5", dst: "2001:db8:1::9", proto: 44}
	ext := make([]byte, 8)
	ext[0] = 17
	binary.BigEndian.PutUint16(ext[2:], uint16(offset))
	if more {
		ext[3] |= 1
	}
	binary.BigEndian.PutUint32(ext[4:], id)
	s.payload = append(ext, data...)
	return s.packet()
}

func TestFragmentsOfIPv6(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Ports[2].Masquerade6 = true })
	whole := make([]byte, 64)
	header.UDP(whole).Encode(&header.UDPFields{SrcPort: 4000, DstPort: 53, Length: 64})
	sumInto(17, ip("fd01::5"), ip("2001:db8:1::9"), whole, false, false)
	do := func(p Packet) Packet {
		batch := []Packet{p}
		w.Process(w.at, batch)
		return batch[0]
	}
	if p := do(fragment6(1, 32, false, whole[32:])); p.Reason != ReasonFragment {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	if p := do(fragment6(1, 0, true, nil)); p.Reason != ReasonTinyFragment {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	first, last := do(fragment6(1, 0, true, whole[:32])), do(fragment6(1, 32, false, whole[32:]))
	if first.Verdict != VerdictForward || last.Verdict != VerdictForward {
		t.Fatalf("%v, %v because of %v", first.Verdict, last.Verdict, last.Reason)
	}
	got := append(bytes.Clone(first.Head[14+48:]), last.Head[14+48:]...)
	want := bytes.Clone(got)
	sumInto(17, ip("2001:db8::2"), ip("2001:db8:1::9"), want, false, false)
	if look(last.Head).src != "2001:db8::2" || !bytes.Equal(got, want) {
		t.Fatal("the whole packet is not what it should be")
	}
	if p := do(fragment6(2, 32, false, whole[32:])); p.Reason != ReasonFragment {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	// An atomic fragment is a whole packet.
	if p := do(fragment6(3, 0, false, whole)); p.Verdict != VerdictForward {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	w.idle()
}

func TestAFragmentWaitsWithTheFirst(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Default = Accept })
	s := udp(clientA, "10.1.0.5", 4000, "10.2.0.77", 53)
	s.payload = make([]byte, 3000)
	list := pieces(t, s.frame(), 1500)
	for range 2 {
		for i, b := range list {
			p := Packet{In: clientA, Head: bytes.Clone(b), Total: len(b)}
			w.process(&p)
			if w.states[clientB].neighbours[toAddr(ip("10.2.0.77"))] == nil {
				if p.Verdict != VerdictNeighbour {
					t.Fatalf("fragment %d: %v because of %v", i, p.Verdict, p.Reason)
				}
			} else if p.Verdict != VerdictForward {
				t.Fatalf("fragment %d: %v because of %v", i, p.Verdict, p.Reason)
			}
		}
		if err := w.Learn(w.at, clientB, ip("10.2.0.77"), hostB); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRoutingHeadersAreNotFollowed(t *testing.T) {
	w := newWorld(t, Limits{}, nil)
	ext := func(left byte) spec {
		e := make([]byte, 24)
		e[0], e[1], e[3] = 17, 2, left
		u := udp(clientA, "fd01::5", 1, "2001:db8:1::9", 2).frame()[54:]
		return spec{in: clientA, src: "fd01::5", dst: "2001:db8:1::9", proto: 43, payload: append(e, u...)}
	}
	w.dropped(ext(1), ReasonSourceRoute)
	if p := w.send(ext(0)); p.Verdict != VerdictForward {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
	// A chain that does not end, or leaves the head, hides the transport header.
	long := spec{in: clientA, src: "fd01::5", dst: "2001:db8:1::9", proto: 60}
	for range 12 {
		long.payload = append(long.payload, 60, 0, 1, 4, 0, 0, 0, 0)
	}
	w.dropped(long, ReasonMalformed)
	p := ext(0).packet()
	p.Head = p.Head[:14+40+10]
	if w.process(&p); p.Reason != ReasonMalformed {
		t.Fatalf("%v because of %v", p.Verdict, p.Reason)
	}
}

func TestTheFragmenterMakesWhatAReceiverPutsTogether(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		s := udp(clientA, "10.1.0.5", 1, server, 2)
		s.id = uint16(random.Uint32())
		s.payload = make([]byte, random.IntN(5000))
		for i := range s.payload {
			s.payload[i] = byte(random.Uint32())
		}
		if random.IntN(2) == 0 {
			s.ipOptions = []byte{1, 0x83, 3, 4, 7, 3, 4, 0x94, 4, 0, 0} // one to be copied, one not, one to be copied
		}
		frame := append(s.frame(), make([]byte, random.IntN(10))...) // and padding
		mtu := 68 + random.IntN(1500)
		list := [][]byte{frame}
		for range 1 + random.IntN(2) { // and again, on a narrower link
			var next [][]byte
			for _, b := range list {
				next = append(next, pieces(t, b, mtu)...)
			}
			list = next
			mtu = max(mtu-200, 68)
		}
		got := make([]byte, len(s.frame())-14-20-len(s.ipOptions)-(4-len(s.ipOptions)%4)%4)
		seen := 0
		for _, b := range list {
			h := header.IPv4(b[14:])
			if !h.IsValid(len(b)-14) || !h.IsChecksumValid() || h.ID() != s.id {
				t.Fatalf("no valid fragment: %x", b)
			}
			seen += copy(got[h.FragmentOffset():], h.Payload())
			if last := int(h.FragmentOffset())+len(h.Payload()) == len(got); last == h.More() {
				t.Fatal("the wrong fragment is the last one")
			}
			if h.FragmentOffset() > 0 && len(s.ipOptions) > 0 && !bytes.Equal(h.Options(), []byte{0x83, 3, 4, 0x94, 4, 0, 0, 0}) {
				t.Fatalf("options %x", []byte(h.Options()))
			}
		}
		if a := netip.MustParseAddr("10.1.0.5"); seen != len(got) || !bytes.Equal(got, s.frame()[len(s.frame())-len(got):]) || !a.Is4() {
			t.Fatal("the pieces are not the packet")
		}
	}
	var f Fragmenter
	df := udp(clientA, "10.1.0.5", 1, server, 2)
	df.df = true
	odd := udp(clientA, "10.1.0.5", 1, server, 2)
	odd.ipOptions = []byte{1, 1, 1, 7}
	for name, frame := range map[string][]byte{"half an option": odd.frame(), "DF": df.frame(), "IPv6": udp(clientA, "fd01::5", 1, "2001:db8:1::9", 2).frame(), "nothing": nil, "cut": df.frame()[:20]} {
		if f.Init(frame, len(frame), 1000) {
			t.Error(name)
		}
	}
	ok := udp(clientA, "10.1.0.5", 1, server, 2).frame()
	if f.Init(ok, len(ok), 27) || f.Init(ok, -1, 1000) {
		t.Error("too small")
	}
}

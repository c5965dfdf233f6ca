package packet

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"testing"
)

// chop cuts b into pieces anywhere, some of them empty.
func chop(b []byte, seed uint64) (pieces [][]byte) {
	rng := rand.New(rand.NewPCG(seed, 7))
	for len(b) > 0 {
		n := min([]int{rng.IntN(3), rng.IntN(200), rng.IntN(5000)}[rng.IntN(3)], len(b))
		pieces, b = append(pieces, b[:n:n]), b[n:]
	}
	return pieces
}

// simple returns a TCP or UDP packet over IPv4 or IPv6.
func simple(v6, udp bool, n int) *spec {
	return &spec{in: ipSpec{v6: v6, id: 7}, udp: udp, flags: 0x18, size: 1448, payload: fill(n, 3), seed: 5}
}

func TestHeadersOfEveryKind(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for tags := range 3 {
			for _, udp := range []bool{false, true} {
				s := simple(v6, udp, 100)
				s.tags = tags
				b := s.whole()
				want := Headers{Kind: IPv4, Tags: uint8(tags), Version: 4, Proto: TCP, L3: 14 + 4*tags, L4: 34 + 4*tags, L5: 54 + 4*tags, End: len(b)}
				if tags > 0 {
					want.VLAN = 5
				}
				if v6 {
					want.Kind, want.Version, want.L4, want.L5 = IPv6, 6, want.L4+20, want.L5+20
				}
				if udp {
					want.Proto, want.L5 = UDP, want.L5-12
				}
				if h, ok := Parse(b, len(b)); !ok || h != want {
					t.Errorf("IPv6 %v, %d tags, UDP %v:\n%+v, want\n%+v", v6, tags, udp, h, want)
				}
				// Padding is not part of the packet; a frame shorter than its length is no packet.
				if h, ok := Parse(b, len(b)+9); !ok || h.End != len(b) {
					t.Errorf("padded: %+v", h)
				}
				if h, ok := Parse(b, len(b)-1); ok || h.Version != 0 || h.Kind != want.Kind {
					t.Errorf("cut short: %+v, %v", h, ok)
				}
			}
		}
	}
}

func TestExtensionHeadersArePassed(t *testing.T) {
	for _, c := range []struct {
		exts []int
		want Extensions
	}{
		{[]int{0}, HasOptions}, {[]int{60}, HasOptions}, {[]int{43}, HasRouting | HasRoutingLeft},
		{[]int{44}, HasFragmentHeader}, {[]int{51}, HasAuth},
		{[]int{0, 60, 43, 44, 51, 60}, HasOptions | HasRouting | HasRoutingLeft | HasFragmentHeader | HasAuth},
	} {
		for _, udp := range []bool{false, true} {
			s := simple(true, udp, 100)
			s.in.exts = c.exts
			b := s.whole()
			h, ok := Parse(b, len(b))
			if !ok || h.L4 != s.inner() || h.Extensions != c.want || h.Fragment != Whole || h.L5 != len(b)-100 {
				t.Errorf("%v: %+v", c.exts, h)
			}
			if p, ok := h.Partial(b); !ok || p.Start != h.L4 {
				t.Errorf("%v: no checksum", c.exts)
			}
			b[20] = 59 // no next header
			if h, ok := Parse(b, len(b)); !ok || h.Proto != 59 || h.L4 != 54 || h.L5 != 0 {
				t.Errorf("nothing behind: %+v", h)
			}
		}
	}
}

// A chain of extension headers is followed up to a bound.
func TestAChainOfExtensionHeadersIsBounded(t *testing.T) {
	chain := func(number byte, n, size int) []byte {
		b := simple(true, true, 100).whole()
		head, rest := b[:54:54], b[54:]
		head[20] = number
		for i := range n {
			e := make([]byte, size)
			e[0], e[1] = number, byte(size/8-1)
			if i == n-1 {
				e[0] = UDP
			}
			head = append(head, e...)
		}
		b = append(head, rest...)
		copy(b[18:], u16(len(b)-54))
		return b
	}
	for _, c := range []struct {
		n, size int
		found   bool
	}{{8, 8, true}, {9, 8, false}, {1, 216, true}, {1, 224, false}, {2, 108 &^ 7, true}, {3, 80, false}} {
		b := chain(60, c.n, c.size)
		h, ok := Parse(b, len(b))
		if !ok || (h.L4 != 0) != c.found || c.found && h.L4 != 54+c.n*c.size {
			t.Errorf("%d of %d bytes: %+v, %v", c.n, c.size, h, ok)
		}
		if _, ok := h.Partial(b); ok != c.found {
			t.Errorf("%d of %d bytes: a checksum: %v", c.n, c.size, ok)
		}
	}
	// One that is longer than the packet, or than the head.
	b := chain(60, 1, 16)
	for _, n := range []int{54, 55, 61, 62, 69} {
		if h, ok := Parse(b[:n], len(b)); !ok || h.L4 != 0 || h.Proto != 60 {
			t.Errorf("a head of %d bytes: %+v, %v", n, h, ok)
		}
	}
	for _, size := range []int{0, 7, 15} { // the rest is padding
		copy(b[18:], u16(size))
		if h, ok := Parse(b, len(b)); !ok || h.L4 != 0 || h.Proto != 60 {
			t.Errorf("longer than a packet of %d bytes: %+v, %v", size, h, ok)
		}
	}
}

func TestFragments(t *testing.T) {
	for _, c := range []struct {
		frag int
		want Fragment
	}{{0x4000, Whole}, {0x2000, First}, {1, Later}, {0x2001, Later}, {0x1fff, Later}, {0x1000, Later}, {0x8000, Whole}} {
		b := simple(false, true, 100).whole()
		copy(b[20:], u16(c.frag))
		h, ok := Parse(b, len(b))
		if !ok || h.Fragment != c.want || (h.L4 != 0) != (c.want != Later) {
			t.Errorf("IPv4 %#x: %+v", c.frag, h)
		}
		if _, ok := h.Partial(b); ok != (c.want == Whole) {
			t.Errorf("IPv4 %#x: a checksum: %v", c.frag, ok)
		}
		cut := Cut{Proto: UDP, Size: 10}
		if _, ok := cut.Find(b, len(b)); ok != (c.want == Whole) {
			t.Errorf("IPv4 %#x: is cut: %v", c.frag, ok)
		}
	}
	for _, c := range []struct {
		frag int
		want Fragment
	}{{0, Whole}, {1, First}, {8, Later}, {9, Later}, {0xfff8, Later}, {0x8000, Later}, {6, Whole}} {
		s := simple(true, true, 100)
		s.in.exts = []int{44}
		b := s.whole()
		copy(b[56:], u16(c.frag))
		h, ok := Parse(b, len(b))
		if !ok || h.Fragment != c.want || h.Proto != UDP || (h.L4 != 0) != (c.want != Later) {
			t.Errorf("IPv6 %#x: %+v", c.frag, h)
		}
		if _, ok := h.Partial(b); ok != (c.want == Whole) {
			t.Errorf("IPv6 %#x: a checksum: %v", c.frag, ok)
		}
	}
}

// None of these is an IP packet with a transport header and a checksum.
func TestHeadersThatDoNotHoldTogether(t *testing.T) {
	type change func(b []byte) []byte
	for name, c := range map[string]struct {
		v6, udp        bool
		change         change
		ip, l4, l5, ck bool
	}{
		"an IHL of 4":         {change: func(b []byte) []byte { b[14] = 0x44; return b }},
		"an IHL of 0":         {change: func(b []byte) []byte { b[14] = 0x40; return b }},
		"version 5":           {change: func(b []byte) []byte { b[14] = 0x55; return b }},
		"IPv6 in IPv4's":      {change: func(b []byte) []byte { b[14] = 0x65; return b }},
		"IPv4 in IPv6's":      {v6: true, change: func(b []byte) []byte { b[14] = 0x45; return b }},
		"length below IHL":    {change: func(b []byte) []byte { copy(b[16:], u16(19)); return b }},
		"length of 0":         {change: func(b []byte) []byte { copy(b[16:], u16(0)); return b }},
		"length beyond":       {change: func(b []byte) []byte { copy(b[16:], u16(len(b)-13)); return b }},
		"IPv6 length beyond":  {v6: true, change: func(b []byte) []byte { copy(b[18:], u16(len(b)-53)); return b }},
		"not IP":              {change: func(b []byte) []byte { b[12] = 0x88; return b }},
		"three tags":          {change: func(b []byte) []byte { return join(b[:12], bytes.Repeat([]byte{0x81, 0, 0, 1}, 3), b[12:]) }},
		"half an IPv4 header": {change: func(b []byte) []byte { return b[:33] }},
		"half an IPv6 header": {v6: true, change: func(b []byte) []byte { return b[:53] }},
		"half a tag":          {change: func(b []byte) []byte { b[12], b[13] = 0x81, 0; return b[:15] }},
		"no EtherType":        {change: func(b []byte) []byte { return b[:13] }},
		"options beyond":      {change: func(b []byte) []byte { b[14] = 0x4f; return b[:60] }, ip: true},
		"TCP of 8 bytes":      {change: func(b []byte) []byte { b[46] = 0x20; return b }, ip: true, l4: true, ck: true},
		"TCP of 60 bytes":     {change: func(b []byte) []byte { b[46] = 0xf0; copy(b[16:], u16(59+20)); return b }, ip: true, l4: true, ck: true},
		"19 bytes of TCP":     {change: func(b []byte) []byte { copy(b[16:], u16(39)); return b }, ip: true, l4: true},
		"7 bytes of UDP":      {udp: true, change: func(b []byte) []byte { copy(b[16:], u16(27)); return b }, ip: true, l4: true},
		"no field of TCP":     {change: func(b []byte) []byte { return b[:51] }, ip: true, l4: true},
		"a field of TCP":      {change: func(b []byte) []byte { return b[:52] }, ip: true, l4: true, ck: true},
		"no field of UDP":     {udp: true, change: func(b []byte) []byte { return b[:41] }, ip: true, l4: true},
		"a field of UDP":      {udp: true, change: func(b []byte) []byte { return b[:42] }, ip: true, l4: true, l5: true, ck: true},
		"SCTP":                {change: func(b []byte) []byte { b[23] = SCTP; return b }, ip: true, l4: true},
		"good":                {change: func(b []byte) []byte { return b }, ip: true, l4: true, l5: true, ck: true},
	} {
		b := simple(c.v6, c.udp, 100).whole()
		total := len(b)
		b = c.change(b)
		total = max(total, len(b))
		h, ok := Parse(b, total)
		if ok != c.ip || (h.Version != 0) != c.ip || (h.L4 != 0) != c.l4 || (h.L5 != 0) != c.l5 {
			t.Errorf("%s: %+v, %v", name, h, ok)
		}
		if p, ok := h.Partial(b); ok != c.ck || ok && p.Field+2 > len(b) {
			t.Errorf("%s: %+v, %v", name, p, ok)
		}
	}
}

// Linux leaves the length field of a packet of more than 64 KiB at 0, or writes the
// length of a jumbogram.
func TestBigPacketsHaveTheirLength(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		s := simple(v6, false, 100000)
		s.behind = 0
		b := s.whole()
		if h, ok := Parse(b[:200], len(b)); !ok || h.End != len(b) || h.L5 != len(b)-100000 {
			t.Errorf("IPv6 %v: %+v, %v", v6, h, ok)
		}
		// 65535 bytes fit the field: a length of 0 means 0.
		if h, ok := Parse(b[:200], 14+0xffff); ok && h.End != 54 {
			t.Errorf("IPv6 %v: %+v, %v", v6, h, ok)
		}
	}
	for _, alone := range []bool{true, false} {
		s := simple(true, false, 100000)
		s.in.exts, s.in.alone = []int{-1}, alone
		b := s.whole()
		h, ok := Parse(b[:200], len(b)+5)
		if !ok || h.End != len(b) || h.Extensions != HasOptions|HasJumbo {
			t.Errorf("%+v, %v", h, ok)
		}
		if _, ok := Parse(b[:200], len(b)-1); ok {
			t.Error("a jumbogram that is longer than its frame")
		}
		at, _ := jumbo(b[14:])
		copy(b[14+at+2:], []byte{0, 0, 0xff, 0xff})
		if h, ok := Parse(b[:200], len(b)); !ok || h.Extensions&HasJumbo != 0 {
			t.Errorf("a jumbogram of 65535 bytes: %+v, %v", h, ok)
		}
		copy(b[14+at+2:], []byte{0xff, 0xff, 0xff, 0xff})
		if h, ok := Parse(b[:200], len(b)); !ok || h.Extensions&HasJumbo != 0 {
			t.Errorf("a jumbogram of 4 GiB: %+v, %v", h, ok)
		}
	}
}

func TestSumAgreesWithTheSlowOne(t *testing.T) {
	b := fill(300, 77)
	for n := range b {
		if got, want := Fold(Add(0, b[:n])), refSum(b[:n]); got%0xffff != want%0xffff {
			t.Fatalf("%d bytes: %#x, want %#x", n, got, want)
		}
		if Checksum(b[:n]) != ^Fold(Add(0, b[:n])) {
			t.Fatal("another checksum")
		}
	}
	ones := bytes.Repeat([]byte{0xff}, 1<<16)
	if got := Fold(Add(0xffff<<32, ones)); got != 0xffff {
		t.Fatalf("%#x", got)
	}
}

func TestACompletedChecksumIsRight(t *testing.T) {
	for i := range uint64(300) {
		rng := rand.New(rand.NewPCG(i, 1))
		s := anySpec(rng)
		s.out, s.payload = nil, s.payload[:min(len(s.payload), 3000)]
		if s.in.alone || len(s.in.exts) > 0 && s.in.exts[0] < 0 {
			continue // so short it is no jumbogram
		}
		want := s.build(s.payload, 0, 0, true)
		b := s.build(s.payload, -1, 0, true)
		h, ok := Parse(b, len(b))
		if !ok {
			t.Fatalf("%+v", s)
		}
		p, ok := h.Partial(b)
		if !ok || !p.Complete(chop(b, i)) {
			t.Fatalf("%+v: %+v", s, p)
		}
		if got := b[p.Field : p.Field+2]; !bytes.Equal(got, want[p.Field:p.Field+2]) || p.Size() != 2 {
			t.Fatalf("%x, want %x", got, want[p.Field:p.Field+2])
		}
	}
}

// A UDP checksum is never 0, since 0 means that there is none; a TCP checksum may be 0.
func TestAChecksumOfZero(t *testing.T) {
	for proto, want := range map[uint8]byte{TCP: 0, UDP: 0xff, GRE: 0xff, 0: 0xff} {
		b := make([]byte, 40)
		b[20], b[21] = 0xff, 0xff
		p := Partial{Start: 14, Field: 20, End: 40, Proto: proto}
		if !p.Complete([][]byte{b[:21], b[21:]}) || b[20] != want || b[21] != want {
			t.Errorf("protocol %d: % x", proto, b[20:22])
		}
	}
}

func TestAChecksumThatIsNotThereIsNotWritten(t *testing.T) {
	for _, p := range []Partial{
		{Start: 34, Field: 99, End: 100}, {Start: 34, Field: 98, End: 99}, {Start: 99, Field: 99, End: 100}, {Start: 34, Field: 50, End: 101},
		{Start: -1, Field: 50, End: 100}, {Start: 34, Field: 33, End: 100}, {Start: 34, Field: 97, End: 100, Proto: SCTP},
	} {
		b := make([]byte, 100)
		for i := range b {
			b[i] = 1
		}
		if p.Complete([][]byte{b[:50], b[50:]}) || bytes.ContainsFunc(b, func(r rune) bool { return r != 1 }) {
			t.Errorf("%+v", p)
		}
	}
}

// sctp returns an SCTP packet with a CRC of 0.
func sctp(v6 bool, n int) (b []byte, at int) {
	s := simple(v6, true, n+4)
	b = s.whole()
	at = s.inner()
	if v6 {
		b[20] = SCTP
	} else {
		b[23] = SCTP
		copy(b[24:], []byte{0, 0})
		copy(b[24:], u16(int(^refSum(b[14:34]))))
	}
	clear(b[at+8 : at+12])
	return b, at
}

func TestSCTPHasACRC(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		for n := range 70 {
			b, at := sctp(v6, n)
			crc := refCRC(b[at:])
			copy(b[at+8:], []byte{1, 2, 3, 4}) // whatever is there before
			b = append(b, 9, 9, 9)             // padding
			p, ok := PartialAt(b, len(b), at, 8)
			if !ok || p.Proto != SCTP || p.Size() != 4 || !p.Complete(chop(b, uint64(n))) {
				t.Fatalf("%+v", p)
			}
			if !bytes.Equal(b[at+8:at+12], crc[:]) {
				t.Fatalf("%d bytes: % x, want % x", n, b[at+8:at+12], crc)
			}
		}
	}
	// The same in a tunnel.
	inner, at := sctp(false, 50)
	outer := &spec{out: &ipSpec{}, tunnel: "vxlan"}
	b := join(make([]byte, 12), u16(IPv4), outer.around(inner[14:], IPv4, -1))
	at += len(b) - len(inner)
	crc := refCRC(b[at:])
	p, ok := PartialAt(b, len(b), at, 8)
	if !ok || p.Proto != SCTP || !p.Complete([][]byte{b}) || !bytes.Equal(b[at+8:at+12], crc[:]) {
		t.Errorf("in a tunnel: %+v, % x, want % x", p, b[at+8:at+12], crc)
	}
}

// The checksum position that a kernel gives is accepted where it is possible.
func TestWhichChecksumAPlaceHas(t *testing.T) {
	tcp, crc := simple(false, false, 100).whole(), func() []byte { b, _ := sctp(false, 50); return b }()
	for _, c := range []struct {
		name         string
		b            []byte
		start, field int
		ok           bool
		proto        uint8
	}{
		{"TCP", tcp, 34, 16, true, TCP},
		{"elsewhere in TCP", tcp, 34, 6, true, TCP},
		{"somewhere", tcp, 38, 4, true, 0},
		{"at its end", tcp, len(tcp) - 2, 0, true, 0},
		{"beyond its end", tcp, len(tcp) - 1, 0, false, 0},
		{"far beyond", tcp, 0xffff, 0xffff, false, 0},
		{"SCTP", crc, 34, 8, true, SCTP},
		{"a sum of SCTP", crc, 34, 16, false, SCTP},
		{"perhaps of SCTP", crc, 38, 8, false, 0},
		{"perhaps of SCTP, in what is no IP", make([]byte, 100), 38, 8, false, 0},
		{"in no IP", make([]byte, 100), 38, 16, true, 0},
	} {
		p, ok := PartialAt(c.b, len(c.b), c.start, c.field)
		if ok != c.ok || p.Proto != c.proto {
			t.Errorf("%s: %+v, %v", c.name, p, ok)
		}
	}
}

// cutAll returns the packets that a Cutter makes.
func cutAll(t testing.TB, frame []byte, cut Cut, seed uint64) (all [][]byte) {
	t.Helper()
	var c Cutter
	head := frame[:min(len(frame), MaxCutHeaders)]
	if !c.Init(head, len(frame), cut) {
		t.Fatalf("not cut: %+v", cut)
	}
	src, room := chop(frame, seed), make([][]byte, 3, len(frame))
	for c.Left() > 0 {
		left, want, header := c.Left(), c.Len(), c.HeaderLen()
		h, payload := c.Next(src, room)
		b := join(append([][]byte{h}, payload[3:]...)...)
		if len(b) != want || len(h) != header || c.Left() != left-1 {
			t.Fatalf("%d bytes, %d were said; %d are left of %d", len(b), want, c.Left(), left)
		}
		all = append(all, b)
	}
	return all
}

func same(t testing.TB, what string, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s: %d packets, want %d", what, len(got), len(want))
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("%s: packet %d of %d, %d bytes, want %d\n% x, want\n% x", what, i, len(want), len(got[i]), len(want[i]), got[i][:min(len(got[i]), 200)], want[i][:min(len(want[i]), 200)])
		}
	}
}

func TestPacketsAreThoseOfTheReference(t *testing.T) {
	kinds := map[string]int{}
	for i := range uint64(1200) {
		s := anySpec(rand.New(rand.NewPCG(i, 2)))
		before := s.whole()
		frame := bytes.Clone(before)
		same(t, fmt.Sprintf("%d: %+v", i, s.cut()), cutAll(t, frame, s.cut(), i), s.pieces())
		if !bytes.Equal(frame, before) {
			t.Fatal("the frame itself has changed")
		}
		kinds[fmt.Sprintf("%s v6=%t udp=%t big=%t", s.tunnel, s.in.v6, s.udp, len(s.payload) > 65535)]++
	}
	if len(kinds) < 36 {
		t.Errorf("%d kinds only: %v", len(kinds), kinds)
	}
}

// Without a partial checksum the pseudo-header's sum is made from the addresses.
func TestACompleteChecksumIsMadeAgain(t *testing.T) {
	for i := range uint64(300) {
		s := anySpec(rand.New(rand.NewPCG(i, 3)))
		s.in.exts = nil
		frame := s.whole()
		cut := s.cut()
		copy(frame[cut.L4+map[bool]int{true: 6, false: 16}[s.udp]:], []byte{1, 2})
		cut.Partial = false
		same(t, fmt.Sprint(i), cutAll(t, frame, cut, i), s.pieces())
	}
	s := simple(true, false, 3000)
	s.in.exts = []int{43}
	cut := s.cut()
	if _, ok := cut.Find(s.whole(), len(s.whole())); !ok {
		t.Error("a routed packet with a partial checksum is not cut")
	}
	cut.Partial = false
	if _, ok := cut.Find(s.whole(), len(s.whole())); ok {
		t.Error("a routed packet with a complete checksum is cut: its last address is not looked for")
	}
}

// A new Cutter with Skip continues a cut that was begun elsewhere.
func TestACutGoesOn(t *testing.T) {
	for i := range uint64(300) {
		s := anySpec(rand.New(rand.NewPCG(i, 4)))
		frame, want := s.whole(), s.pieces()
		var c Cutter
		c.Init(frame, len(frame), s.cut())
		skipped := int(i) % len(want)
		c.Skip(skipped * s.size)
		if c.Done() != skipped*s.size {
			t.Fatalf("%d bytes done", c.Done())
		}
		for n := skipped; n < len(want); n++ {
			head, payload := c.Next([][]byte{frame}, nil)
			same(t, fmt.Sprint(i), [][]byte{append(bytes.Clone(head), payload[0]...)}, want[n:n+1])
		}
	}
}

// Cutting in two stages gives the same pieces as cutting at once.
func TestPiecesThatAreCutAgain(t *testing.T) {
	for i := range uint64(300) {
		s := anySpec(rand.New(rand.NewPCG(i, 5)))
		if s.out != nil || s.udp {
			continue
		}
		frame, cut := s.whole(), s.cut()
		var c Cutter
		cut.Whole = 1 + int(i)*200
		if !c.Init(frame, len(frame), cut) {
			t.Fatalf("%+v", cut)
		}
		var all [][]byte
		for c.Left() > 0 {
			again := c.Again()
			h, payload := c.Next([][]byte{frame}, nil)
			b := append(bytes.Clone(h), payload[0]...)
			if len(payload[0]) > max(cut.Whole, s.size) || again != (len(payload[0]) > s.size) {
				t.Fatalf("%d bytes of payload, %v", len(payload[0]), again)
			}
			if again {
				second := s.cut()
				second.L4 = 0
				all = append(all, cutAll(t, b, second, i)...)
			} else {
				all = append(all, b)
			}
		}
		same(t, fmt.Sprint(i), all, s.pieces())
	}
}

func TestWhatCannotBeCut(t *testing.T) {
	for name, f := range map[string]func(s *spec, b *[]byte, c *Cut){
		"a size of 0":                func(s *spec, b *[]byte, c *Cut) { c.Size = 0 },
		"a negative size":            func(s *spec, b *[]byte, c *Cut) { c.Size = -5 },
		"more than there may be":     func(s *spec, b *[]byte, c *Cut) { s.payload = fill(MostCuts+1, 1); *b = s.whole(); c.Size = 1 },
		"UDP, which is TCP":          func(s *spec, b *[]byte, c *Cut) { c.Proto = UDP },
		"IPv6, which is IPv4":        func(s *spec, b *[]byte, c *Cut) { c.Version = 6 },
		"a fragment":                 func(s *spec, b *[]byte, c *Cut) { (*b)[20] |= 0x20 },
		"a short TCP header":         func(s *spec, b *[]byte, c *Cut) { (*b)[46] = 0x40 },
		"a head without all of it":   func(s *spec, b *[]byte, c *Cut) { *b = (*b)[:53] },
		"an authentication header":   func(s *spec, b *[]byte, c *Cut) { s.in.v6, s.in.exts = true, []int{51}; *b = s.whole(); *c = s.cut() },
		"no tunnel":                  func(s *spec, b *[]byte, c *Cut) { c.L4 = 50 },
		"packets beyond 64 KiB":      func(s *spec, b *[]byte, c *Cut) { s.payload = fill(140000, 1); *b = s.whole(); c.Size = 65530 },
		"GRE that numbers":           func(s *spec, b *[]byte, c *Cut) { inTunnel(s, "gre"); *b = s.whole(); (*b)[34] |= 0x10; *c = s.cut() },
		"GRE of another version":     func(s *spec, b *[]byte, c *Cut) { inTunnel(s, "gre"); *b = s.whole(); (*b)[35] |= 1; *c = s.cut() },
		"GRE with a route":           func(s *spec, b *[]byte, c *Cut) { inTunnel(s, "gre"); *b = s.whole(); (*b)[34] |= 0x40; *c = s.cut() },
		"GRE without room for a sum": func(s *spec, b *[]byte, c *Cut) { inTunnel(s, "gre"); *b = s.whole(); (*b)[34] |= 0x80; *c = s.cut() },
		"a fragment of a tunnel":     func(s *spec, b *[]byte, c *Cut) { inTunnel(s, "vxlan"); *b = s.whole(); (*b)[20] |= 0x20; *c = s.cut() },
		"TCP in TCP":                 func(s *spec, b *[]byte, c *Cut) { inTunnel(s, "vxlan"); *b = s.whole(); (*b)[23] = TCP; *c = s.cut() },
		"a wrong inner sum":          func(s *spec, b *[]byte, c *Cut) { inTunnel(s, "vxlan"); *b = s.whole(); (*b)[64+10]++; *c = s.cut() },
		"an inner packet that ends": func(s *spec, b *[]byte, c *Cut) {
			inTunnel(s, "vxlan")
			*b = s.whole()
			shorten((*b)[64:])
			*c = s.cut()
		},
		"an inner fragment": func(s *spec, b *[]byte, c *Cut) { inTunnel(s, "vxlan"); *b = s.whole(); split((*b)[64:]); *c = s.cut() },
		"IPv6 in IPIP": func(s *spec, b *[]byte, c *Cut) {
			inTunnel(s, "ip")
			s.in.v6 = true
			*b = s.whole()
			(*b)[23] = IPIP
			*c = s.cut()
		},
		"something before IPIP's": func(s *spec, b *[]byte, c *Cut) {
			inTunnel(s, "gre")
			*b = s.whole()
			(*b)[23] = IPIP
			*c = s.cut()
		},
		"a tunnel that is routed": func(s *spec, b *[]byte, c *Cut) {
			inTunnel(s, "vxlan")
			s.out.v6, s.out.exts = true, []int{43}
			*b, *c = s.whole(), s.cut()
		},
		"an authentication header around": func(s *spec, b *[]byte, c *Cut) {
			inTunnel(s, "vxlan")
			s.out.v6, s.out.exts = true, []int{51}
			*b, *c = s.whole(), s.cut()
		},
		"an authentication header within": func(s *spec, b *[]byte, c *Cut) {
			inTunnel(s, "vxlan")
			s.in.v6, s.in.exts = true, []int{51}
			*b, *c = s.whole(), s.cut()
		},
	} {
		s := simple(false, false, 3000)
		b, c := s.whole(), s.cut()
		f(s, &b, &c)
		var cutter Cutter
		if cutter.Init(b, max(len(b), len(s.whole())), c) {
			t.Errorf("%s: was cut", name)
		}
	}
	s := simple(false, false, 0)
	var c Cutter
	if !c.Init(s.whole(), len(s.whole()), s.cut()) || c.Left() != 0 {
		t.Error("no payload makes packets")
	}
}

// A fragment of a tunnel does not hold the whole inner packet.
func TestAFragmentIsNoTunnel(t *testing.T) {
	s := simple(false, false, 100)
	inTunnel(s, "vxlan")
	b, l4 := s.whole(), s.inner()
	h, _ := Parse(b, len(b))
	if in, ok := h.Tunnelled(b, l4); !ok || in.L4 != l4 || in.L3 != l4-20 {
		t.Errorf("%+v, %v", in, ok)
	}
	b[20] |= 0x20
	h, _ = Parse(b, len(b))
	if in, ok := h.Tunnelled(b, l4); ok {
		t.Errorf("%+v", in)
	}
}

func inTunnel(s *spec, kind string) { s.tunnel, s.out = kind, &ipSpec{} }

// resum recomputes the checksum of an IPv4 header.
func resum(ip []byte) {
	copy(ip[10:], []byte{0, 0})
	copy(ip[10:], u16(int(^refSum(ip[:20]))))
}

func shorten(ip []byte) { ip[3]--; resum(ip) }
func split(ip []byte)   { ip[6] |= 0x20; resum(ip) }

func TestNothingAllocates(t *testing.T) {
	s := anySpec(rand.New(rand.NewPCG(1, 6)))
	inTunnel(s, "vxlan")
	s.sum, s.payload, s.size = true, fill(30000, 1), 1448
	frame, crc := s.whole(), func() []byte { b, _ := sctp(false, 50); return b }()
	cut := s.cut()
	pieces := chop(frame, 1)
	var room [8192][]byte
	var c Cutter
	n := testing.AllocsPerRun(20, func() {
		if !c.Init(frame, len(frame), cut) {
			t.Fatal("not cut")
		}
		for c.Left() > 0 {
			c.Next(pieces, room[:0])
		}
		p, _ := PartialAt(frame, len(frame), cut.L4, 16)
		p.Complete(pieces)
		p, _ = PartialAt(crc, len(crc), 34, 8)
		if !p.Complete([][]byte{crc}) {
			t.Fatal("no CRC")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzParse(f *testing.F) {
	for i := range uint64(40) {
		s := anySpec(rand.New(rand.NewPCG(i, 7)))
		s.payload = s.payload[:min(len(s.payload), 100)]
		b := s.whole()
		f.Add(b, len(b), len(b)+s.behind)
		f.Add(b, 60, len(b))
	}
	f.Add([]byte{}, 0, 0)
	f.Fuzz(func(t *testing.T, b []byte, known, total int) {
		total = min(max(total, 0), 1<<20)
		head := b[:min(max(known, 0), len(b), total)]
		h, ok := Parse(head, total)
		want, wantOK := refParse(head, total)
		if !wantOK { // without a packet only the Ethernet header counts
			want = Headers{Kind: want.Kind, VLAN: want.VLAN, Tags: want.Tags}
			h.Extensions = 0
		}
		if h != want || ok != wantOK {
			t.Fatalf("% x of %d:\n%+v %v, want\n%+v %v", head, total, h, ok, want, wantOK)
		}
		if ok && (h.L3 < 14 || h.L4 > len(head) || h.L5 > len(head) || h.L4 > h.End || h.L5 > h.End || h.End > total) {
			t.Fatalf("% x of %d: %+v", head, total, h)
		}
		if p, ok := h.Partial(head); ok && (p.Field+2 > len(head) || p.End > total || p.Field+2 > p.End) {
			t.Fatalf("% x of %d: %+v", head, total, p)
		}
		for l4 := range min(len(head)+3, 200) {
			if in, ok := h.Tunnelled(head, l4); ok && (in.L4 != l4 || in.L3 < h.L4 || in.End != h.End || in.L5 > len(head)) {
				t.Fatalf("% x of %d: %+v in %+v", head, total, in, h)
			}
		}
	})
}

func FuzzComplete(f *testing.F) {
	b, at := sctp(true, 33)
	f.Add(b, uint16(at), uint16(8), uint64(1))
	for i := range uint64(20) {
		s := anySpec(rand.New(rand.NewPCG(i, 8)))
		s.payload = s.payload[:min(len(s.payload), 100)]
		f.Add(s.whole(), uint16(s.inner()), uint16(16), i)
	}
	f.Add([]byte{}, uint16(0), uint16(0), uint64(0))
	f.Fuzz(func(t *testing.T, b []byte, start, field uint16, seed uint64) {
		before := bytes.Clone(b)
		p, ok := PartialAt(b, len(b), int(start), int(field))
		if !ok {
			return
		}
		if !p.Complete(chop(b, seed)) {
			t.Fatalf("%+v is not completed", p)
		}
		want := bytes.Clone(before)
		if p.Proto == SCTP {
			clear(want[p.Field : p.Field+4])
			crc := refCRC(want[p.Start:p.End])
			copy(want[p.Field:], crc[:])
		} else {
			sum := ^refSum(want[p.Start:p.End])
			if p.Proto == TCP && sum%0xffff == 0 || p.Proto != TCP && sum == 0 {
				sum = uint16(b[p.Field])<<8 | uint16(b[p.Field+1]) // either, but UDP's is not 0
				if sum%0xffff != 0 || p.Proto != TCP && sum == 0 {
					t.Fatalf("%+v: %#x", p, sum)
				}
			}
			copy(want[p.Field:], u16(int(sum)))
		}
		if !bytes.Equal(b, want) {
			t.Fatalf("%+v of % x:\n% x, want\n% x", p, before, b, want)
		}
	})
}

// FuzzCut cuts packets of every kind and compares the result with the reference. If bytes
// of the packet were changed first, it requires only that no payload is lost and all
// lengths are right.
func FuzzCut(f *testing.F) {
	for i := range uint64(60) {
		f.Add(i, uint16(1+100*i), uint16(3000*i), []byte{})
		f.Add(i, uint16(500), uint16(3000), []byte{byte(i), 3, byte(i + 1), 0xff})
	}
	f.Fuzz(func(t *testing.T, kind uint64, size, payload uint16, changes []byte) {
		s := anySpec(rand.New(rand.NewPCG(kind, 9)))
		if len(s.payload) <= 65535 { // not one that is big
			s.size = max(1, int(size)%60000)
			s.payload = fill(min(int(payload), 60000, MostCuts*s.size), kind)
		}
		frame, cut := s.whole(), s.cut()
		if len(changes) < 2 {
			same(t, fmt.Sprintf("%+v", cut), cutAll(t, frame, cut, kind), s.pieces())
			return
		}
		for len(changes) >= 2 {
			frame[int(changes[0])%len(frame)] = changes[1]
			changes = changes[2:]
		}
		in, ok := cut.Find(frame, len(frame))
		if !ok {
			return
		}
		rest := frame[in.L5:in.End]
		for _, b := range cutAll(t, frame, cut, kind) {
			h, ok := Parse(b, len(b))
			if ok && cut.L4 != h.L4 && in.Extensions&HasJumbo == 0 {
				h, ok = h.Tunnelled(b, cut.L4)
			}
			n := len(b) - h.L5
			if !ok || h.End != len(b) || n == 0 || n > cut.Size || !bytes.HasPrefix(rest, b[h.L5:]) {
				t.Fatalf("%d bytes: %+v, %v", len(b), h, ok)
			}
			rest = rest[n:]
		}
		if len(rest) > 0 {
			t.Fatalf("%d bytes are missing", len(rest))
		}
	})
}

func TestTheFragmentHeaderIsFound(t *testing.T) {
	head := make([]byte, 14+40+8+8+8)
	head[12], head[13] = 0x86, 0xdd
	ip := head[14:]
	ip[0], ip[5], ip[6] = 0x60, 24, 60 // destination options, then the fragment header, then UDP
	ip[40], ip[42], ip[43] = 44, 1, 4
	ip[48], ip[51] = 17, 1
	h, ok := Parse(head, len(head))
	if !ok || h.FragmentAt != 14+48 || h.Fragment != First || h.L4 != 14+56 {
		t.Errorf("%+v, %v", h, ok)
	}
	ip[51] = 8 // not the first
	if h, ok = Parse(head, len(head)); !ok || h.FragmentAt != 14+48 || h.Fragment != Later {
		t.Errorf("%+v, %v", h, ok)
	}
	if h, ok = Parse(head[:14+48+7], len(head)); !ok || h.FragmentAt != 0 {
		t.Errorf("cut short: %+v, %v", h, ok)
	}
}

func TestAQuotedPacketMayBeCutShort(t *testing.T) {
	head := make([]byte, 50+20+8)
	ip := head[50:]
	ip[0], ip[2], ip[9] = 0x45, 4, 17 // 1024 bytes of UDP, 28 of which are here
	h, ok := Quoted(head, 50, 4)
	if !ok || h.Kind != IPv4 || h.Version != 4 || h.L3 != 50 || h.L4 != 70 || h.L5 != 78 || h.End != 50+1024 {
		t.Errorf("%+v, %v", h, ok)
	}
	ip[9] = 6
	if h, ok = Quoted(head, 50, 4); !ok || h.L4 != 70 || h.L5 != 0 {
		t.Errorf("%+v, %v", h, ok)
	}
	six := make([]byte, 50+40+8)
	six[50], six[54], six[56] = 0x60, 4, 17
	if h, ok = Quoted(six, 50, 6); !ok || h.Kind != IPv6 || h.Version != 6 || h.L4 != 90 || h.L5 != 98 || h.End != 50+40+1024 {
		t.Errorf("%+v, %v", h, ok)
	}
	for _, c := range []struct {
		head    []byte
		at      int
		version uint8
	}{{head, -1, 4}, {head, len(head) + 1, 4}, {head, len(head), 4}, {head[:69], 50, 4}, {head, 50, 6}, {six, 50, 4}, {six[:89], 50, 6}} {
		if h, ok := Quoted(c.head, c.at, c.version); ok {
			t.Errorf("%d bytes from %d, version %d: %+v", len(c.head), c.at, c.version, h)
		}
	}
}

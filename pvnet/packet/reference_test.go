package packet

import (
	"encoding/binary"
	"math/rand/v2"
)

// The reference below is written from the RFCs, as plainly as possible, and shares no
// line with the code under test.

// refSum is the ones' complement sum of 16-bit words (RFC 1071).
func refSum(parts ...[]byte) uint16 {
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	if len(all)%2 == 1 {
		all = append(all, 0)
	}
	sum := 0
	for i := 0; i < len(all); i += 2 {
		if sum += int(all[i])*256 + int(all[i+1]); sum > 0xffff {
			sum -= 0xffff
		}
	}
	return uint16(sum)
}

// refCRC is CRC32c bit by bit, in the order SCTP sends its bytes (RFC 9260, appendix A).
func refCRC(b []byte) [4]byte {
	crc := ^uint32(0)
	for _, c := range b {
		for bit := range 8 {
			out := crc&1 != uint32(c>>bit&1)
			if crc >>= 1; out {
				crc ^= 0x82f63b78 // 0x1edc6f41, reversed
			}
		}
	}
	crc = ^crc
	return [4]byte{byte(crc), byte(crc >> 8), byte(crc >> 16), byte(crc >> 24)}
}

// A refReader reads a frame of which only some bytes are known, and stops at the first
// unknown byte.
type refReader struct {
	known []byte
	total int
}

type refStop struct{}

func (r *refReader) octet(i int) int {
	if i >= len(r.known) {
		panic(refStop{})
	}
	return int(r.known[i])
}

func (r *refReader) word(i int) int { return r.octet(i)<<8 + r.octet(i+1) }

func (r *refReader) need(end, limit int) {
	if end > len(r.known) || end > limit {
		panic(refStop{})
	}
}

// refParse is Parse: IEEE 802.1Q and 802.1ad, RFC 791, 8200, 4302, 2675, 9293 and 768.
func refParse(known []byte, total int) (h Headers, ok bool) {
	defer func() {
		if e := recover(); e != nil && e != any(refStop{}) {
			panic(e)
		}
	}()
	r := &refReader{known, total}
	at := 12
	kind := r.word(at)
	h.Kind = uint16(kind)
	for h.Tags < 2 && (kind == 0x8100 || kind == 0x88a8) {
		tci := r.word(at + 2)
		if h.Tags++; h.Tags == 1 {
			h.VLAN = uint16(tci)
		}
		at += 4
		kind = r.word(at)
		h.Kind = uint16(kind)
	}
	at += 2
	switch kind {
	case 0x0800:
		return refIPv4(r, h, at, &ok)
	case 0x86dd:
		return refIPv6(r, h, at, &ok)
	}
	return h, false
}

func refIPv4(r *refReader, h Headers, at int, done *bool) (out Headers, ok bool) {
	out = h
	defer func() {
		if e := recover(); e != nil && e != any(refStop{}) {
			panic(e)
		}
		ok = *done
	}()
	r.need(at+20, r.total+1<<30)
	ihl := r.octet(at) & 0xf
	length := r.word(at + 2)
	if length == 0 && r.total-at >= 65536 {
		length = r.total - at
	}
	if r.octet(at)>>4 != 4 || ihl < 5 || length < 4*ihl || length > r.total-at {
		return
	}
	*done = true
	out.Version, out.Proto, out.L3, out.End = 4, uint8(r.octet(at+9)), at, at+length
	flags, offset := r.word(at+6)>>13, r.word(at+6)&0x1fff
	if offset > 0 {
		out.Fragment = Later
		return
	}
	if flags&1 == 1 {
		out.Fragment = First
	}
	r.need(at+4*ihl, r.total)
	out.L4 = at + 4*ihl
	refPayload(r, &out)
	return
}

func refIPv6(r *refReader, h Headers, at int, done *bool) (out Headers, ok bool) {
	out = h
	defer func() {
		if e := recover(); e != nil && e != any(refStop{}) {
			panic(e)
		}
		ok = *done
	}()
	r.need(at+40, r.total+1<<30)
	if r.octet(at)>>4 != 6 {
		return
	}
	length := r.word(at + 4)
	if length == 0 {
		switch jumbo := refJumbo(r, at); {
		case jumbo > 0:
			length = jumbo
			out.Extensions |= HasJumbo
		case r.total-at-40 >= 65536:
			length = r.total - at - 40
		}
	}
	if at+40+length > r.total {
		out.Extensions = 0
		return
	}
	*done = true
	out.Version, out.Proto, out.L3, out.End = 6, uint8(r.octet(at+6)), at, at+40+length
	next := at + 40
	for count := 0; ; count++ {
		size := 0
		switch out.Proto {
		case 0, 43, 60, 51, 44:
		default:
			out.L4 = next
			refPayload(r, &out)
			return
		}
		if count == 8 || next+8 > at+256 {
			return
		}
		r.need(next+8, out.End)
		switch out.Proto {
		case 0, 60:
			out.Extensions |= HasOptions
			size = (r.octet(next+1) + 1) * 8
		case 43:
			out.Extensions |= HasRouting
			if r.octet(next+3) > 0 {
				out.Extensions |= HasRoutingLeft
			}
			size = (r.octet(next+1) + 1) * 8
		case 51:
			out.Extensions |= HasAuth
			size = (r.octet(next+1) + 2) * 4
		case 44:
			out.Extensions |= HasFragmentHeader
			out.FragmentAt = next
			size = 8
			if r.word(next+2)/8 > 0 {
				out.Fragment, out.Proto = Later, uint8(r.octet(next))
				return
			}
			if r.word(next+2)%2 == 1 {
				out.Fragment = First
			}
		}
		if next+size > at+256 {
			return
		}
		r.need(next+size, out.End)
		out.Proto = uint8(r.octet(next))
		next += size
	}
}

// refJumbo looks through the hop-by-hop options if they are the first extension header.
func refJumbo(r *refReader, at int) (length int) {
	defer func() {
		if e := recover(); e != nil && e != any(refStop{}) {
			panic(e)
		}
	}()
	if r.octet(at+6) != 0 {
		return 0
	}
	r.octet(at + 47)
	end := min(at+40+8+8*r.octet(at+41), at+256)
	for p := at + 42; p+1 < end; {
		if r.octet(p) == 0 {
			p++
			continue
		}
		n := r.octet(p + 1)
		if r.octet(p) == 0xc2 && n == 4 && p+6 <= end {
			if v := r.word(p+2)<<16 + r.word(p+4); v > 65535 && v < 1<<31 {
				return v
			}
			return 0
		}
		p += 2 + n
	}
	return 0
}

func refPayload(r *refReader, h *Headers) {
	switch h.Proto {
	case 17:
		r.need(h.L4+8, h.End)
		h.L5 = h.L4 + 8
	case 6:
		r.need(h.L4+20, h.End)
		n := 4 * (r.octet(h.L4+12) >> 4)
		if n < 20 {
			return
		}
		r.need(h.L4+n, h.End)
		h.L5 = h.L4 + n
	}
}

// A spec is a packet that is built layer by layer: the whole packet to be cut, or one of
// the packets that it is cut into.
type spec struct {
	tags    int
	out     *ipSpec // the tunnel's IP header
	tunnel  string  // "vxlan", "geneve", "gre", "gretap", "ip", "udp"
	key     bool    // GRE has a key
	sum     bool    // the tunnel has a checksum
	options int     // bytes of Geneve options
	in      ipSpec
	udp     bool // datagrams, not TCP
	tcp     int  // bytes of TCP options
	seq     uint32
	flags   byte
	payload []byte
	size    int
	behind  int // bytes behind the packet
	seed    uint64
}

type ipSpec struct {
	v6      bool
	options int   // bytes of IPv4 options
	exts    []int // IPv6 extension headers by number; -1 is hop-by-hop with a jumbo length
	alone   bool  // the jumbo length has no other options beside it
	id      uint16
}

// fill is bytes that look like anything.
func fill(n int, seed uint64) []byte {
	b := make([]byte, n)
	rng := rand.New(rand.NewPCG(seed, 99))
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func u16(v int) []byte { return []byte{byte(v >> 8), byte(v)} }

func join(parts ...[]byte) (all []byte) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// ip puts an IP header in front of what is behind it. It gives the sum of the
// pseudo-header too.
func (p *ipSpec) ip(proto int, seed uint64, cutInto int, body func(pseudo func(n int) uint16) []byte) []byte {
	addrs := fill(32, seed)
	if !p.v6 {
		src, dst := addrs[:4], addrs[4:8]
		behind := body(func(n int) uint16 {
			return refSum(src, dst, []byte{0, byte(proto)}, u16(n>>16), u16(n))
		})
		options := fill(p.options, seed+1)
		length := 20 + len(options) + len(behind)
		if length > 65535 {
			length = 0
		}
		h := join([]byte{0x40 | byte(5+len(options)/4), 0}, u16(length), u16(int(p.id)+max(cutInto, 0)), []byte{0x40, 0, 64, byte(proto), 0, 0}, src, dst, options)
		copy(h[10:], u16(int(^refSum(h))))
		return join(h, behind)
	}
	src, dst := addrs[:16], addrs[16:]
	final := dst
	for i, e := range p.exts {
		if e == 43 {
			final = fill(16, seed+uint64(i)+77)
		}
	}
	behind := body(func(n int) uint16 {
		return refSum(src, final, u16(n>>16), u16(n), []byte{0, 0, 0, byte(proto)})
	})
	// The extension headers, the last first.
	chain, next := []byte(nil), proto
	jumboAt := -1
	for i := len(p.exts) - 1; i >= 0; i-- {
		var e []byte
		number := p.exts[i]
		switch number {
		case -1:
			if number = 0; cutInto >= 0 { // no longer
				if p.alone {
					continue // as Linux does
				}
				e = []byte{byte(next), 1, 1, 4, 0, 0, 0, 0, 1, 6, 0, 0, 0, 0, 0, 0}
			} else if p.alone {
				e = []byte{byte(next), 0, 0xc2, 4, 0, 0, 0, 0}
				jumboAt = len(chain) + 4
			} else {
				e = []byte{byte(next), 1, 0xc2, 4, 0, 0, 0, 0, 1, 6, 0, 0, 0, 0, 0, 0}
				jumboAt = len(chain) + 12
			}
		case 0, 60:
			n := 1 + int(seed>>i&0xff)%3
			e = join([]byte{byte(next), byte(n - 1), 1, byte(8*n - 4)}, make([]byte, 8*n-4))
		case 43: // segment routing, one left (RFC 8754)
			e = join([]byte{byte(next), 2, 4, 1, 0, 0, 0, 0}, final)
		case 44: // of a whole packet
			e = join([]byte{byte(next), 0, 0, 0}, fill(4, seed+2))
		case 51:
			e = join([]byte{byte(next), 4, 0, 0}, fill(20, seed+3))
		}
		chain, next = join(e, chain), number
	}
	if jumboAt >= 0 {
		binary.BigEndian.PutUint32(chain[len(chain)-jumboAt:], uint32(len(chain)+len(behind)))
	}
	length := len(chain) + len(behind)
	if length > 65535 {
		length = 0
	}
	return join([]byte{0x60, 1, 2, 3}, u16(length), []byte{byte(next), 64}, src, dst, chain, behind)
}

// whole returns the packet to cut; its innermost checksum is partial.
func (s *spec) whole() []byte { return s.build(s.payload, -1, 0, true) }

// pieces returns the packets it is to be cut into.
func (s *spec) pieces() (all [][]byte) {
	for at := 0; at < len(s.payload); at += s.size {
		end := min(at+s.size, len(s.payload))
		all = append(all, s.build(s.payload[at:end], len(all), at, end == len(s.payload)))
	}
	return all
}

// build returns the packet with this payload: piece n, or the whole if n is negative.
func (s *spec) build(payload []byte, n, at int, last bool) []byte {
	number := max(n, 0)
	transport := func(pseudo func(int) uint16) []byte {
		var h []byte
		field := 16
		if s.udp {
			h = join([]byte{1, 2, 3, 4}, u16(8+len(payload)), []byte{0, 0})
			field = 6
		} else {
			flags := s.flags
			if !last {
				flags &= 0xff - 1 - 8 // FIN, PSH
			}
			if number > 0 {
				flags &= 0x7f // CWR
			}
			h = join([]byte{1, 2, 3, 4}, binary.BigEndian.AppendUint32(nil, s.seq+uint32(at)), fill(4, s.seed+5),
				[]byte{byte(5+s.tcp/4) << 4, flags}, fill(2, s.seed+6), []byte{0, 0, 0, 0}, fill(s.tcp, s.seed+7))
		}
		sum := pseudo(len(h) + len(payload))
		if n >= 0 {
			if sum = ^refSum(u16(int(sum)), h, payload); sum == 0 && s.udp {
				sum = 0xffff
			}
		}
		copy(h[field:], u16(int(sum)))
		return join(h, payload)
	}
	proto := 6
	if s.udp {
		proto = 17
	}
	packet, kind := s.in.ip(proto, s.seed+10, n, transport), 0x0800
	if s.in.v6 {
		kind = 0x86dd
	}
	if s.out != nil {
		packet, kind = s.around(packet, kind, n), 0x0800
		if s.out.v6 {
			kind = 0x86dd
		}
	}
	frame := []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2}
	for i := range s.tags {
		frame = join(frame, u16([]int{0x88a8, 0x8100}[i%2]), u16(i*77+5))
	}
	frame = join(frame, u16(kind), packet)
	if n < 0 {
		frame = append(frame, make([]byte, s.behind)...)
	}
	return frame
}

// around builds the tunnel around a packet.
func (s *spec) around(packet []byte, kind, n int) []byte {
	ethernet := join(fill(12, s.seed+20), u16(kind), packet)
	udp := func(inner []byte) []byte {
		return s.out.ip(17, s.seed+30, n, func(pseudo func(int) uint16) []byte {
			length := 8 + len(inner)
			h := join([]byte{0xc0, 1, 0x12, 0xb5}, u16(length), []byte{0, 0})
			if length > 65535 {
				copy(h[4:], u16(0))
			}
			if s.sum {
				sum := pseudo(length) // until it is cut
				if n >= 0 {
					if sum = ^refSum(u16(int(sum)), h, inner); sum == 0 {
						sum = 0xffff
					}
				}
				copy(h[6:], u16(int(sum)))
			}
			return join(h, inner)
		})
	}
	gre := func(protocol int, inner []byte) []byte {
		flags, rest := 0, []byte(nil)
		if s.sum {
			flags, rest = flags|0x8000, make([]byte, 4)
		}
		if s.key {
			flags, rest = flags|0x2000, join(rest, fill(4, s.seed+40))
		}
		h := join(u16(flags), u16(protocol), rest)
		if s.sum {
			copy(h[4:], u16(int(^refSum(h, inner))))
		}
		return s.out.ip(47, s.seed+30, n, func(func(int) uint16) []byte { return join(h, inner) })
	}
	switch s.tunnel {
	case "vxlan": // RFC 7348
		return udp(join([]byte{8, 0, 0, 0, 0, 1, 2, 0}, ethernet))
	case "geneve": // RFC 8926
		return udp(join([]byte{byte(s.options / 4), 0, 0x65, 0x58, 0, 1, 2, 0}, fill(s.options, s.seed+50), ethernet))
	case "udp": // the packet itself is the payload, as Linux's FOU has it
		return udp(packet)
	case "gre": // RFC 2784
		return gre(kind, packet)
	case "gretap":
		return gre(0x6558, ethernet)
	}
	proto := 4
	if s.in.v6 {
		proto = 41
	}
	return s.out.ip(proto, s.seed+30, n, func(func(int) uint16) []byte { return packet })
}

// inner returns the offset of the transport header of the packet to cut.
func (s *spec) inner() int {
	header := 20 + s.tcp
	if s.udp {
		header = 8
	}
	return len(s.whole()) - s.behind - len(s.payload) - header
}

func (s *spec) cut() Cut {
	c := Cut{Proto: TCP, Version: 4, Size: s.size, L4: s.inner(), Partial: true}
	if s.in.v6 {
		c.Version = 6
	}
	if s.udp {
		c.Proto = UDP
	}
	return c
}

func (s *spec) options6(rng *rand.Rand) (exts []int) {
	for _, e := range []int{0, 60, 43, 44, 60} {
		if rng.IntN(4) == 0 {
			exts = append(exts, e)
		}
	}
	return exts
}

// anySpec is one of every kind.
func anySpec(rng *rand.Rand) *spec {
	s := &spec{tags: rng.IntN(3), seed: rng.Uint64(), udp: rng.IntN(4) == 0, seq: rng.Uint32(), flags: byte(rng.Uint32()), tcp: 4 * rng.IntN(11)}
	s.in = ipSpec{v6: rng.IntN(2) == 0, id: uint16(rng.Uint32())}
	if s.in.v6 {
		s.in.exts = s.options6(rng)
	} else {
		s.in.options = 4 * rng.IntN(11)
	}
	if rng.IntN(2) == 0 {
		s.out = &ipSpec{v6: rng.IntN(2) == 0, id: uint16(rng.Uint32())}
		s.tunnel = []string{"vxlan", "geneve", "gre", "gretap", "ip", "udp"}[rng.IntN(6)]
		s.key, s.sum = rng.IntN(2) == 0, rng.IntN(2) == 0
		s.options = 4 * rng.IntN(20)
		if s.out.v6 {
			if rng.IntN(4) == 0 {
				s.out.exts = []int{60} // the encapsulation limit is one
			}
		} else {
			s.out.options = 4 * rng.IntN(3)
		}
	}
	s.size = []int{8 + rng.IntN(100), 536, 1448, 1 + rng.IntN(9000), 1 + rng.IntN(40000)}[rng.IntN(5)]
	n := 1 + rng.IntN(4*s.size)
	if rng.IntN(16) == 0 {
		n = 60000
	}
	if rng.IntN(16) == 0 && !s.udp { // BIG TCP
		s.size = 2000 + rng.IntN(20000)
		n = 65536 + rng.IntN(100000)
		if s.in.v6 && s.out == nil && rng.IntN(2) == 0 {
			s.in.exts, s.in.alone = []int{-1}, rng.IntN(2) == 0
			if rng.IntN(2) == 0 {
				s.in.exts = append(s.in.exts, 60)
			}
		}
	} else {
		n = min(n, 60000)
		if rng.IntN(4) == 0 {
			s.behind = rng.IntN(50)
		}
	}
	s.payload = fill(n, s.seed+60)
	return s
}

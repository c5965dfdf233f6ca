package packet

import "encoding/binary"

// A Cut says how to cut a packet into segments.
type Cut struct {
	Proto   uint8 // protocol of the packet to cut: TCP, or UDP for datagrams
	Version uint8 // version of its IP: 4 or 6; 0 for either
	Size    int   // bytes of payload in each segment but the last
	L4      int   // offset of its transport header if a tunnel carries it; else 0
	Partial bool  // its checksum field holds the pseudo-header's sum; else the sum is made from its addresses

	// Whole is how many bytes of payload a frame may carry that another will cut again:
	// such a frame gets a partial checksum. 0: no such frames. TCP only.
	Whole int
}

// MostCuts bounds the segments of one packet. Linux sends no TCP segment of less than 8
// bytes but the last (TCP_MIN_SND_MSS of include/net/tcp.h, less the options), and 64 KiB
// hold no more of these.
const MostCuts = 65536 / 8

// MaxCutHeaders is the greatest length of the headers of a packet to cut, in bytes: TCP
// in a tunnel over IPv6, with Geneve and all its options.
const MaxCutHeaders = 576

// A Cutter cuts a long packet into frames of the link's size, as Linux does for a device
// without the offload (tcp_gso_segment of net/ipv4/tcp_offload.c, __udp_gso_segment and
// skb_udp_tunnel_segment of net/ipv4/udp_offload.c). It needs no memory but itself.
type Cutter struct {
	head [MaxCutHeaders]byte // headers of the next frame
	size int                 // bytes used of head
	in   Headers             // positions in head of the packet's headers
	out  Headers             // positions in head of its tunnel's headers; Version 0: there is no tunnel
	sum  int                 // offset of the tunnel's checksum in head; 0: it has none

	data int // offset of the payload in the original frame
	left int // bytes of payload still to be cut
	at   int // bytes of payload already cut
	n    int // segments already cut
	each int // bytes of payload in a segment
	step int // bytes of payload in a frame: one segment, or several that another will cut

	pseudo uint64 // sum of the pseudo-header, without the length
	seq    uint32
	flags  byte
	inID   uint16 // identification field of IPv4; outID is the tunnel's
	outID  uint16
}

// Find finds the headers of the packet to cut in a frame of total bytes that begins with
// head. It reports false for a frame that does not match the Cut, whose headers are
// inconsistent or not all in head, or that makes more than MostCuts segments or one of
// more than 64 KiB. It also reports false for a frame that only its sender could cut: a
// fragment, one with an authentication header, or a tunnel with sequence numbers.
func (cut *Cut) Find(head []byte, total int) (h Headers, ok bool) {
	h, _, _, ok = cut.find(head, total)
	return h, ok
}

// find also returns the tunnel's headers, if there is one, and the offset of its
// checksum.
func (cut *Cut) find(head []byte, total int) (in, out Headers, sum int, ok bool) {
	in, ok = Parse(head, total)
	if !ok || in.Fragment != Whole || in.Extensions&HasAuth != 0 {
		return in, out, 0, false
	}
	ip := in.L3 // start of the outermost IP header
	if cut.L4 != 0 && cut.L4 != in.L4 {
		out = in
		if in, ok = out.Tunnelled(head, cut.L4); !ok || in.Extensions&HasAuth != 0 {
			return in, out, 0, false
		}
		if sum, ok = tunnel(head, &out, &in); !ok {
			return in, out, 0, false
		}
	}
	switch {
	case in.L5 == 0, in.L5 > MaxCutHeaders, in.Proto != cut.Proto, cut.Version != 0 && in.Version != cut.Version:
		return in, out, sum, false
	case in.Extensions&HasRoutingLeft != 0 && !cut.Partial:
		return in, out, sum, false // the last destination, which the pseudo-header needs, is not in the IP header
	}
	payload := in.End - in.L5
	return in, out, sum, cut.Size > 0 && payload <= MostCuts*cut.Size && in.L5-ip+min(payload, cut.Size) <= 0xffff
}

// tunnel reports whether out is a tunnel that can carry several packets like in. It also
// returns the offset of the tunnel's checksum, or 0.
func tunnel(head []byte, out, in *Headers) (sum int, ok bool) {
	if out.Extensions&(HasJumbo|HasRoutingLeft) != 0 {
		return 0, false
	}
	t := head[out.L4:in.L3]
	switch out.Proto {
	case IPIP, IP6:
		return 0, len(t) == 0 && (out.Proto == IPIP) == (in.Version == 4)
	case UDP:
		if t[6]|t[7] != 0 {
			sum = out.L4 + 6
		}
	case GRE: // RFC 2784 and 2890
		const hasSum, hasRouting, hasSequence, version = 0x8000, 0x4000, 0x1000, 7
		flags := binary.BigEndian.Uint16(t)
		if flags&(hasRouting|hasSequence|version) != 0 || flags&hasSum != 0 && len(t) < 8 {
			return 0, false
		}
		if flags&hasSum != 0 {
			sum = out.L4 + 4
		}
	}
	return sum, true
}

// Init makes c cut a frame of total bytes that begins with head. It reports false where
// [Cut.Find] does.
func (c *Cutter) Init(head []byte, total int, cut Cut) (ok bool) {
	if c.in, c.out, c.sum, ok = cut.find(head, total); !ok {
		return false
	}
	in := &c.in
	c.left, c.at, c.n = in.End-in.L5, 0, 0
	c.each, c.step = cut.Size, cut.Size
	if in.Proto == TCP && c.out.Version == 0 {
		c.step = max(cut.Whole/cut.Size, 1) * cut.Size
	}
	c.data = in.L5
	c.size = copy(c.head[:], head[:in.L5])
	l4 := head[in.L4:in.L5]
	field := 6
	if in.Proto == TCP {
		field = 16
		c.seq, c.flags = binary.BigEndian.Uint32(l4[4:]), l4[13]
	}
	if cut.Partial { // take out the length that the sender's sum includes
		c.pseudo = uint64(binary.BigEndian.Uint16(l4[field:])) + uint64(^Fold(uint64(in.End-in.L4)))
	} else {
		c.pseudo = uint64(in.Pseudo(head, 0))
	}
	c.inID, c.outID = identification(head, in), identification(head, &c.out)
	if in.Extensions&HasJumbo != 0 {
		c.dropJumbo()
	}
	return true
}

func identification(head []byte, h *Headers) uint16 {
	if h.Version != 4 {
		return 0
	}
	return binary.BigEndian.Uint16(head[h.L3+4:])
}

// dropJumbo removes the length of a jumbogram from the headers. If it is the only option
// it removes the options header, as Linux does (ipv6_hopopt_jumbo_remove); else it
// overwrites the option with padding.
func (c *Cutter) dropJumbo() {
	ip := c.head[c.in.L3:c.size]
	if ip[41] != 0 {
		at, _ := jumbo(ip)
		copy(ip[at:], []byte{1, 4, 0, 0, 0, 0}) // PadN
		return
	}
	ip[6] = ip[40]
	copy(ip[40:], ip[48:])
	c.size -= 8
	c.in.L4 -= 8
	c.in.L5 -= 8
}

// Left returns how many frames are still to come.
func (c *Cutter) Left() int { return (c.left + c.step - 1) / c.step }

// Len returns the length of the next frame in bytes; no later one is longer.
func (c *Cutter) Len() int { return c.size + min(c.step, c.left) }

// HeaderLen returns the length of each frame's headers in bytes.
func (c *Cutter) HeaderLen() int { return c.size }

// Done returns how many bytes of payload have been cut.
func (c *Cutter) Done() int { return c.at }

// Skip treats as many bytes of payload as done says as cut, a number that Done returned
// earlier.
func (c *Cutter) Skip(done int) {
	done = min(max(done, 0), c.left)
	c.n += (done + c.each - 1) / c.each
	c.at += done
	c.left -= done
}

// Again reports whether another will cut the next frame again.
func (c *Cutter) Again() bool { return min(c.step, c.left) > c.each }

// Next makes the next frame. src are the pieces of the frame whose head Init got. head
// are the new frame's headers, valid until the next call. payload are slices of src,
// appended to dst. Left must not be 0; for a packet without payload it is 0 from the
// start.
func (c *Cutter) Next(src, dst [][]byte) (head []byte, payload [][]byte) {
	again := c.Again()
	n := min(c.step, c.left)
	payload, from := dst, c.data+c.at
	at := 0
	for _, p := range src {
		lo, hi := max(from-at, 0), min(from+n-at, len(p))
		at += len(p)
		if lo < hi {
			payload = append(payload, p[lo:hi])
		}
	}
	var sum uint16 // sum of the payload
	if !again {
		sum = sumPieces(payload[len(dst):], 0, n)
	}

	head = c.head[:c.size]
	c.left -= n
	c.transport(head[c.in.L4:], n, sum, again)
	ip(head, &c.in, n, c.inID+uint16(c.n))
	if c.out.Version != 0 {
		c.envelope(head, n, sum)
		ip(head, &c.out, n, c.outID+uint16(c.n))
	}
	c.at += n
	c.n += (n + c.each - 1) / c.each
	return head, payload
}

// transport writes the transport header of a segment with n bytes of payload.
func (c *Cutter) transport(l4 []byte, n int, sum uint16, again bool) {
	length := len(l4) + n
	field := 6
	if c.in.Proto == UDP {
		binary.BigEndian.PutUint16(l4[4:], uint16(length))
	} else {
		field = 16
		binary.BigEndian.PutUint32(l4[4:], c.seq+uint32(c.at))
		l4[13] = c.flags
		if c.left > 0 {
			l4[13] &^= tcpFIN | tcpPSH
		}
		if c.n > 0 {
			l4[13] &^= tcpCWR
		}
	}
	pseudo := c.pseudo + uint64(length)
	if again {
		binary.BigEndian.PutUint16(l4[field:], Fold(pseudo))
		return
	}
	l4[field], l4[field+1] = 0, 0
	// The header has an even length, so the payload begins a 16-bit word.
	binary.BigEndian.PutUint16(l4[field:], fieldValue(Fold(Add(pseudo+uint64(sum), l4)), c.in.Proto))
}

// TCP flags that only the first or the last segment keeps.
const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

// envelope writes the tunnel's header around a finished packet.
func (c *Cutter) envelope(head []byte, n int, sum uint16) {
	t := head[c.out.L4:]
	pseudo, proto := uint64(0), c.out.Proto
	if proto == UDP {
		binary.BigEndian.PutUint16(t[4:], uint16(len(t)+n))
		pseudo = uint64(c.out.Pseudo(head, len(t)+n))
	}
	if c.sum != 0 {
		field := head[c.sum : c.sum+2]
		field[0], field[1] = 0, 0
		whole := Fold(Add(pseudo+uint64(swapped(sum, len(t)&1 != 0)), t))
		if proto == GRE {
			proto = TCP // like TCP's, the checksum may be 0
		}
		binary.BigEndian.PutUint16(field, fieldValue(whole, proto))
	}
}

// ip writes the IP header h of a packet that ends n bytes after head.
func ip(head []byte, h *Headers, n int, id uint16) {
	p := head[h.L3:]
	if h.Version == 6 {
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40+n))
		return
	}
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)+n))
	binary.BigEndian.PutUint16(p[4:], id)
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], Checksum(p[:h.L4-h.L3]))
}

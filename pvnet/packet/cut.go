package packet

import "encoding/binary"

// A Cut says how a packet is to be cut.
type Cut struct {
	Proto   uint8 // TCP, or UDP for datagrams
	Version uint8 // of its IP: 4 or 6; 0 for either
	Size    int   // bytes of its payload in each packet but the last
	L4      int   // where its header is, if the frame is a tunnel that carries it; else 0
	Partial bool  // its checksum field holds the sum of the pseudo-header; else that is made of its addresses

	// Whole is how many bytes of payload a frame may carry that is to be cut again by
	// another: it gets a partial checksum. 0: none is. TCP only.
	Whole int
}

// MostCuts bounds what one packet is cut into. Linux sends no TCP segments of less than 8
// bytes but the last (TCP_MIN_SND_MSS of include/net/tcp.h, less the options): 64 KiB hold
// no more of those.
const MostCuts = 65536 / 8

// MaxCutHeaders is how long the headers of what is cut can be: of a TCP packet in a tunnel over
// IPv6, of Geneve with all its options.
const MaxCutHeaders = 576

// A Cutter makes packets of a link's size out of a long one, as Linux does for a card
// without the offload (tcp_gso_segment of net/ipv4/tcp_offload.c, __udp_gso_segment and
// skb_udp_tunnel_segment of net/ipv4/udp_offload.c). It needs no more memory than itself.
type Cutter struct {
	head [MaxCutHeaders]byte // the headers of the next packet
	size int                 // bytes of head
	in   Headers             // of what is cut, in head
	out  Headers             // of its tunnel, in head; Version 0: there is none
	sum  int                 // where the tunnel has a checksum, in head; 0: nowhere

	data int // where the payload begins in the frame
	left int // bytes of payload still to be cut
	at   int // bytes of payload cut
	n    int // packets made
	each int // bytes of payload in a packet
	step int // bytes of payload in a frame: one packet, or as many as it is to be cut into

	pseudo uint64 // the sum of the pseudo-header, without the length
	seq    uint32
	flags  byte
	inID   uint16 // of IPv4, as outID
	outID  uint16
}

// Find finds the headers of what is to be cut in a frame of total bytes that begins with
// head. It reports false for a frame that is not what the Cut says, whose headers do not
// hold together or are not all in head, that makes more than MostCuts packets or one of more than
// 64 KiB, or that only its sender could cut: a fragment, one with an authentication header, a tunnel
// that numbers its packets.
func (cut *Cut) Find(head []byte, total int) (h Headers, ok bool) {
	h, _, _, ok = cut.find(head, total)
	return h, ok
}

// find gives the headers of the tunnel too, if there is one, and where it has a checksum.
func (cut *Cut) find(head []byte, total int) (in, out Headers, sum int, ok bool) {
	in, ok = Parse(head, total)
	if !ok || in.Fragment != Whole || in.Extensions&HasAuth != 0 {
		return in, out, 0, false
	}
	ip := in.L3 // of the outermost
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
		return in, out, sum, false // the pseudo-header has an address that is not in the IP header
	}
	payload := in.End - in.L5
	return in, out, sum, cut.Size > 0 && payload <= MostCuts*cut.Size && in.L5-ip+min(payload, cut.Size) <= 0xffff
}

// tunnel reports whether out is a tunnel that can be around several packets like in, and
// where it has a checksum, or 0.
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

// Init makes c cut a frame of total bytes that begins with head. It reports what
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
	if cut.Partial { // less the length it was made with
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

// dropJumbo takes the length of a jumbogram out of the headers: the options with it, if
// there are no others, as Linux does (ipv6_hopopt_jumbo_remove), or else one of padding goes
// there.
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

// Left is how many frames are still to come.
func (c *Cutter) Left() int { return (c.left + c.step - 1) / c.step }

// Len is how long the next frame will be; none is longer.
func (c *Cutter) Len() int { return c.size + min(c.step, c.left) }

// HeaderLen is how many bytes of headers each frame has.
func (c *Cutter) HeaderLen() int { return c.size }

// Done is how many bytes of payload were cut.
func (c *Cutter) Done() int { return c.at }

// Skip takes frames of so many bytes of payload for cut that Done gave before.
func (c *Cutter) Skip(done int) {
	done = min(max(done, 0), c.left)
	c.n += (done + c.each - 1) / c.each
	c.at += done
	c.left -= done
}

// Again reports whether the next frame is one to be cut again.
func (c *Cutter) Again() bool { return min(c.step, c.left) > c.each }

// Next makes the next frame of the one in src, the pieces of what Init was given the head
// of: its headers, which are good until the call after, and its payload in slices of src,
// which it appends to dst. There must be some Left: there is none at all of a packet
// without payload.
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
	var sum uint16 // of the payload
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

// transport makes the header of a segment with n bytes of payload.
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
	// The header has an even length: the payload begins a word.
	binary.BigEndian.PutUint16(l4[field:], written(Fold(Add(pseudo+uint64(sum), l4)), c.in.Proto))
}

// Flags of a TCP header that only the first or the last segment keeps.
const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

// envelope makes the header of a tunnel around what is finished.
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
			proto = TCP // it may be 0, as TCP's
		}
		binary.BigEndian.PutUint16(field, written(whole, proto))
	}
}

// ip makes an IP header of a packet that ends n bytes behind head.
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

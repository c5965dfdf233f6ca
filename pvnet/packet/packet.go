// Package packet finds and rewrites the headers of an Ethernet frame: it parses them,
// sums bytes, completes checksums and cuts long packets.
//
// It has no buffers of its own. It reads headers from the head of a frame, its first
// contiguous bytes. It reaches the other bytes through pieces: slices that make up the
// frame one after the other. Nothing allocates.
//
// A frame is hostile input. Each offset in a [Headers] was checked against the head and
// against the length of the frame. It is valid only as long as the bytes do not change:
// parse a private copy.
package packet

import "encoding/binary"

// EtherTypes.
const (
	IPv4 = 0x0800
	IPv6 = 0x86dd
	VLAN = 0x8100 // IEEE 802.1Q
	QinQ = 0x88a8 // IEEE 802.1ad
)

// Protocols of IP.
const (
	IPIP = 4 // an IPv4 packet
	TCP  = 6
	UDP  = 17
	IP6  = 41 // an IPv6 packet
	GRE  = 47
	SCTP = 132
)

// Numbers of the IPv6 extension headers.
const (
	hopByHop    = 0
	routing     = 43
	fragment    = 44
	authHeader  = 51
	destination = 60
)

// Bounds of a chain of IPv6 headers, which are Linux's (MAX_IPV6_HDR_LEN of
// net/core/skbuff.c).
const (
	maxChain      = 256 // bytes, including the fixed header
	maxExtensions = 8
)

// MaxHeaders is how many bytes a head must have for all headers of a TCP packet to be
// found: Ethernet with two tags, IPv6 with its extension headers, TCP with options.
const MaxHeaders = 14 + 8 + maxChain + 60

// Fragment says which part of a packet the frame carries.
type Fragment uint8

const (
	Whole Fragment = iota
	First          // the transport header is here, but not all of its payload
	Later          // no transport header
)

// Extensions says which IPv6 extension headers precede the transport header.
type Extensions uint8

const (
	HasOptions        Extensions = 1 << iota // hop-by-hop or destination options
	HasRouting                               // a routing header
	HasRoutingLeft                           // a routing header with segments left: it holds the packet's last destination
	HasFragmentHeader                        // a fragment header, also on a whole packet
	HasAuth                                  // an authentication header, which covers the bytes behind it
	HasJumbo                                 // a hop-by-hop option with the length of a jumbogram (RFC 2675)
)

// Headers says where the headers of a frame are, as byte offsets into it. An offset of 0
// means that the head has no such header.
type Headers struct {
	Kind       uint16 // EtherType after the tags
	VLAN       uint16 // tag control information of the first tag, if there are Tags
	Tags       uint8  // VLAN tags, at most 2
	Version    uint8  // IP version: 4 or 6; 0 if the frame is not IP or its header is inconsistent
	Proto      uint8  // protocol after the IP headers
	Fragment   Fragment
	Extensions Extensions

	L3  int // the IP header
	L4  int // the transport header of any protocol; may equal End
	L5  int // the payload of TCP or UDP; 0 if their header is incomplete
	End int // end of the IP packet: bytes behind it are padding

	FragmentAt int // the IPv6 fragment header, the last one if there are several
}

// Parse finds the headers of a frame of total bytes that begins with head. It reports
// whether the frame holds a whole IP packet; the fields of the Ethernet header are set in
// any case.
//
// A length of 0 in a packet of more than 64 KiB, which Linux writes (BIG TCP), means the
// rest of the frame.
func Parse(head []byte, total int) (h Headers, ok bool) {
	at := 12
	for {
		if len(head) < at+2 {
			return h, false
		}
		h.Kind = binary.BigEndian.Uint16(head[at:])
		at += 2
		if h.Kind != VLAN && h.Kind != QinQ || h.Tags == 2 {
			break
		}
		if len(head) < at+2 {
			return h, false
		}
		if h.Tags == 0 {
			h.VLAN = binary.BigEndian.Uint16(head[at:])
		}
		h.Tags++
		at += 2
	}
	switch h.Kind {
	case IPv4:
		return h, h.ipv4(head, at, total)
	case IPv6:
		return h, h.ipv6(head, at, total)
	}
	return h, false
}

// ipv4 sets the fields of h from an IPv4 header at offset at.
func (h *Headers) ipv4(head []byte, at, total int) bool {
	if len(head) < at+20 || head[at]>>4 != 4 {
		return false
	}
	ip := head[at:]
	hdr, size := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if size == 0 && total-at > 0xffff {
		size = total - at
	}
	if hdr < 20 || size < hdr || at+size > total {
		return false
	}
	h.Version, h.Proto, h.L3, h.End = 4, ip[9], at, at+size
	switch frag := binary.BigEndian.Uint16(ip[6:]); {
	case frag&0x1fff != 0:
		h.Fragment = Later
		return true
	case frag&0x2000 != 0:
		h.Fragment = First
	}
	if len(head) >= at+hdr {
		h.L4 = at + hdr
		h.transport(head)
	}
	return true
}

// ipv6 sets the fields of h from an IPv6 header at offset at. L4 stays 0 if the chain of
// extension headers is too long, or leaves the head or the packet.
func (h *Headers) ipv6(head []byte, at, total int) bool {
	if len(head) < at+40 || head[at]>>4 != 6 {
		return false
	}
	ip := head[at:]
	size := int(binary.BigEndian.Uint16(ip[4:]))
	if size == 0 {
		if _, n := jumbo(ip); n > 0 {
			size = n
			h.Extensions |= HasJumbo
		} else if total-at-40 > 0xffff {
			size = total - at - 40
		}
	}
	if size > total-at-40 {
		return false
	}
	h.Version, h.Proto, h.L3, h.End = 6, ip[6], at, at+40+size
	limit := min(len(head), h.End, at+maxChain)
	p := at + 40
	for range maxExtensions + 1 {
		if !isExtension(h.Proto) {
			h.L4 = p
			h.transport(head)
			return true
		}
		if p+8 > limit {
			return true
		}
		ext := head[p:]
		if h.Proto == fragment {
			h.FragmentAt = p
		}
		n := h.extension(ext)
		if h.Fragment == Later {
			h.Proto = ext[0]
			return true
		}
		if p+n > limit {
			return true
		}
		h.Proto = ext[0]
		p += n
	}
	return true
}

func isExtension(proto uint8) bool {
	switch proto {
	case hopByHop, routing, fragment, authHeader, destination:
		return true
	}
	return false
}

// extension notes what the IPv6 extension header at the beginning of ext, whose number is
// h.Proto, says of the packet, and returns the header's size. ext has at least 8 bytes.
func (h *Headers) extension(ext []byte) (size int) {
	switch h.Proto {
	case routing:
		h.Extensions |= HasRouting
		if ext[3] != 0 {
			h.Extensions |= HasRoutingLeft
		}
	case authHeader:
		h.Extensions |= HasAuth
		return 4 * (2 + int(ext[1]))
	case fragment:
		h.Extensions |= HasFragmentHeader
		switch frag := binary.BigEndian.Uint16(ext[2:]); {
		case frag&0xfff8 != 0:
			h.Fragment = Later
		case frag&1 != 0:
			h.Fragment = First
		}
		return 8
	default:
		h.Extensions |= HasOptions
	}
	return 8 * (1 + int(ext[1]))
}

// jumbo finds the jumbo payload option of an IPv6 packet. It returns the offset of the
// option's type byte from the fixed header, and the length in the option; 0 if there is
// no such option within the bound of a chain of headers.
func jumbo(ip []byte) (at, size int) {
	if ip[6] != hopByHop || len(ip) < 48 {
		return 0, 0
	}
	for p, end := 42, min(48+8*int(ip[41]), len(ip), maxChain); p+2 <= end; {
		switch n := int(ip[p+1]); {
		case ip[p] == 0: // Pad1
			p++
		case ip[p] == 0xc2 && n == 4 && p+6 <= end:
			// A length below 64 KiB makes no jumbogram (RFC 2675).
			if v := binary.BigEndian.Uint32(ip[p+2:]); v > 0xffff && v < 1<<31 {
				return p, int(v)
			}
			return 0, 0
		default:
			p += 2 + n
		}
	}
	return 0, 0
}

// transport sets L5, the payload of TCP or UDP.
func (h *Headers) transport(head []byte) {
	room := min(len(head), h.End) - h.L4
	switch {
	case h.Proto == UDP && room >= 8:
		h.L5 = h.L4 + 8
	case h.Proto == TCP && room >= 20:
		if n := int(head[h.L4+12]>>4) * 4; n >= 20 && n <= room {
			h.L5 = h.L4 + n
		}
	}
}

// Addresses returns the packet's source and destination address, one after the other: 8
// or 32 bytes of head. The packet must be IP.
func (h *Headers) Addresses(head []byte) []byte {
	if h.Version == 4 {
		return head[h.L3+12 : h.L3+20]
	}
	return head[h.L3+8 : h.L3+40]
}

// Pseudo returns the folded sum of the pseudo-header for a TCP or UDP segment of n bytes.
func (h *Headers) Pseudo(head []byte, n int) uint16 {
	return Fold(Add(uint64(h.Proto)+uint64(n), h.Addresses(head)))
}

// Tunnelled finds the headers of a packet in the tunnel h: the packet whose transport
// header is at offset l4. The tunnel is UDP (VXLAN, Geneve and others), GRE or IP in IP.
// The bytes between the tunnel's header and the inner packet are not interpreted, but the
// inner packet must end where the outer one does.
func (h *Headers) Tunnelled(head []byte, l4 int) (in Headers, ok bool) {
	least := h.L4
	switch h.Proto {
	case IPIP, IP6:
	case GRE:
		least += 4
	case UDP:
		least += 8
	default:
		return in, false
	}
	if h.L4 == 0 || h.Fragment != Whole || l4 > min(len(head), h.End) {
		return in, false
	}
	ends := func() bool { return in.L4 == l4 && in.End == h.End && in.Fragment == Whole }
	for at := l4 - 20; at >= max(least, l4-60); at -= 4 {
		in = Headers{Kind: IPv4}
		if in.ipv4(head, at, h.End) && ends() && Fold(Add(0, head[at:l4])) == 0xffff {
			return in, true
		}
	}
	for at := l4 - 40; at >= max(least, l4-maxChain); at -= 8 {
		in = Headers{Kind: IPv6}
		if in.ipv6(head, at, h.End) && ends() {
			return in, true
		}
	}
	return Headers{}, false
}

// Quoted finds the headers of the packet that an ICMP error quotes from offset at on. The
// head must end where the error does. The quotation may be cut short: End may be behind the
// head, and L5 is 0 if the transport header is not complete.
func Quoted(head []byte, at int, version uint8) (h Headers, ok bool) {
	if at < 0 || at > len(head) {
		return h, false
	}
	if version == 4 {
		h.Kind = IPv4
		return h, h.ipv4(head, at, at+0xffff)
	}
	h.Kind = IPv6
	return h, h.ipv6(head, at, at+40+0xffff)
}

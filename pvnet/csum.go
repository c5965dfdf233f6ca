package pvnet

import (
	"encoding/binary"
	"math/bits"
)

// Protocols with a checksum that may be left blank.
const (
	protoTCP = 6
	protoUDP = 17
)

// headers is where a frame's IP packet and its TCP or UDP segment lie.
type headers struct {
	addrs   []byte // source and destination address
	addrsAt int    // where they are
	l4      int    // where the segment starts
	length  int    // bytes of the segment, by the IP header
	proto   byte
}

// parse finds the headers of a frame of total bytes that begins with head. A
// fragment, or what is not IP, has none. IPv6 extension headers count as the
// segment, of a protocol that is neither TCP nor UDP.
func parse(head []byte, total int) (h headers, ok bool) {
	at := 12
	var kind uint16
	for range 3 { // up to two VLAN tags
		if len(head) < at+2 {
			return h, false
		}
		kind = binary.BigEndian.Uint16(head[at:])
		at += 2
		if kind != 0x8100 && kind != 0x88a8 {
			break
		}
		at += 2
	}
	switch {
	case kind == 0x0800 && len(head) >= at+20 && head[at]>>4 == 4:
		hdr := int(head[at]&15) * 4
		size := int(binary.BigEndian.Uint16(head[at+2:]))
		if hdr < 20 || size < hdr || at+size > total || binary.BigEndian.Uint16(head[at+6:])&0x3fff != 0 {
			return h, false
		}
		return headers{head[at+12 : at+20], at + 12, at + hdr, size - hdr, head[at+9]}, true
	case kind == 0x86dd && len(head) >= at+40 && head[at]>>4 == 6:
		size := int(binary.BigEndian.Uint16(head[at+4:]))
		if at+40+size > total {
			return h, false
		}
		return headers{head[at+8 : at+40], at + 8, at + 40, size, head[at+6]}, true
	}
	return h, false
}

// field finds the checksum field of a TCP or UDP segment, which must be in the
// frame's first piece.
func (f *Frame) field() (h headers, field int, ok bool) {
	head := f.Bytes()
	if h, ok = parse(head, int(f.total)); !ok {
		return h, 0, false
	}
	least := 20
	switch h.proto {
	case protoTCP:
		field = h.l4 + 16
	case protoUDP:
		field, least = h.l4+6, 8
	default:
		return h, 0, false
	}
	return h, field, h.length >= least && len(head) >= field+2
}

// completeChecksum finishes a TCP or UDP checksum whose field holds the sum of
// the pseudo-header, as XEN_NETTXF_csum_blank says. The frame must be private
// and have one holder. It reports false for what has no such checksum.
func (f *Frame) completeChecksum() bool {
	h, field, ok := f.field()
	if !ok {
		return false
	}
	sum, odd, at := uint64(0), false, 0
	for p := range f.Pieces() {
		lo, hi := max(h.l4-at, 0), min(h.l4+h.length-at, len(p))
		at += len(p)
		if lo >= hi {
			continue
		}
		s := uint64(fold(add(0, p[lo:hi])))
		if odd {
			s = s>>8 | s<<8&0xff00
		}
		sum += s
		odd = odd != ((hi-lo)&1 != 0)
	}
	c := ^fold(sum)
	if c == 0 && h.proto == protoUDP {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(f.Bytes()[field:], c)
	f.csum = ChecksumVerified
	return true
}

// add adds b as big-endian 16-bit words, padded with zero. The sum of the words as a
// little-endian machine has them is the same with its bytes swapped (RFC 1071).
func add(sum uint64, b []byte) uint64 {
	var s, carry uint64
	for len(b) >= 32 {
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b), carry)
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b[8:]), carry)
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b[16:]), carry)
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b[24:]), carry)
		b = b[32:]
	}
	for len(b) >= 8 {
		s, carry = bits.Add64(s, binary.LittleEndian.Uint64(b), carry)
		b = b[8:]
	}
	tail := uint64(0)
	for i, c := range b {
		tail |= uint64(c) << (8 * i)
	}
	s, carry = bits.Add64(s, tail, carry)
	s, carry = bits.Add64(s, 0, carry)
	return sum + uint64(bits.ReverseBytes16(fold(s>>32+s&0xffffffff+carry)))
}

func fold(sum uint64) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// flow is a hash of the frame's addresses and ports: equal for all frames of a
// flow, in one direction.
func flow(head []byte) uint32 {
	h, ok := parse(head, MaxFrame)
	if !ok {
		return fnv(2166136261, head[:min(len(head), 12)])
	}
	sum := fnv(2166136261, h.addrs)
	if (h.proto == protoTCP || h.proto == protoUDP) && len(head) >= h.l4+4 {
		sum = fnv(sum, head[h.l4:h.l4+4])
	}
	return sum
}

func fnv(h uint32, b []byte) uint32 {
	for _, c := range b {
		h = (h ^ uint32(c)) * 16777619
	}
	return h
}

package packet

import (
	"encoding/binary"
	"hash/crc32"
	"math/bits"
)

// Add adds b to sum as big-endian 16-bit words, with an odd byte padded by zero.
func Add(sum uint64, b []byte) uint64 {
	// The sum of the words in little-endian order is the same sum with its bytes swapped
	// (RFC 1071).
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
	return sum + uint64(bits.ReverseBytes16(Fold(s>>32+s&0xffffffff+carry)))
}

// Fold reduces sum to 16 bits by ones' complement addition.
func Fold(sum uint64) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

// Checksum returns the internet checksum of b (RFC 1071).
func Checksum(b []byte) uint16 { return ^Fold(Add(0, b)) }

// swapped returns a folded sum, with its bytes swapped if the summed bytes began inside a
// word.
func swapped(sum uint16, odd bool) uint16 {
	if odd {
		return bits.ReverseBytes16(sum)
	}
	return sum
}

// sumPieces returns the folded sum of bytes from to end of the pieces; byte from begins a
// word.
func sumPieces(pieces [][]byte, from, end int) uint16 {
	sum, odd, at := uint64(0), false, 0
	for _, p := range pieces {
		lo, hi := max(from-at, 0), min(end-at, len(p))
		at += len(p)
		if lo < hi {
			sum += uint64(swapped(Fold(Add(0, p[lo:hi])), odd))
			odd = odd != ((hi-lo)&1 != 0)
		}
	}
	return Fold(sum)
}

// sumCRC adds bytes from to end of the pieces to a CRC32c.
func sumCRC(crc uint32, pieces [][]byte, from, end int) uint32 {
	table := crc32.MakeTable(crc32.Castagnoli) // crc32 caches this table
	at := 0
	for _, p := range pieces {
		if lo, hi := max(from-at, 0), min(end-at, len(p)); lo < hi {
			crc = crc32.Update(crc, table, p[lo:hi])
		}
		at += len(p)
	}
	return crc
}

// put writes b at offset at of the pieces. The caller has made sure that they reach that
// far.
func put(pieces [][]byte, at int, b []byte) {
	for _, p := range pieces {
		if at < len(p) {
			n := copy(p[at:], b)
			if b, at = b[n:], at+n; len(b) == 0 {
				return
			}
		}
		at -= len(p)
	}
}

// A Partial is a checksum that is still to be completed. Its field holds the sum of the
// pseudo-header; the sum of the bytes from Start to End is missing.
type Partial struct {
	Start int // offset of the transport header in the frame
	Field int // offset of the checksum field
	End   int // offset of the end of the summed bytes
	Proto uint8
}

// Partial returns the checksum of the packet's TCP or UDP. It reports false for a
// fragment, another protocol, or a field that is not in head.
func (h *Headers) Partial(head []byte) (p Partial, ok bool) {
	p = Partial{Start: h.L4, End: h.End, Proto: h.Proto}
	least := 20
	switch h.Proto {
	case TCP:
		p.Field = h.L4 + 16
	case UDP:
		p.Field, least = h.L4+6, 8
	default:
		return p, false
	}
	return p, h.L4 != 0 && h.Fragment == Whole && h.End-h.L4 >= least && len(head) >= p.Field+2
}

// Size returns the length of the field in bytes: 2, or 4 for the CRC32c of SCTP (RFC
// 9260).
func (p *Partial) Size() int {
	if p.Proto == SCTP {
		return 4
	}
	return 2
}

// PartialAt returns the checksum that a virtio_net_hdr describes: that of the header at
// offset start of a frame of total bytes, with its field at start+field, over all
// following bytes. It takes the protocol from the frame's headers, or from those of the
// packet in its tunnel. It reports false for a field outside the frame, or at a place
// that the protocol does not use.
func PartialAt(head []byte, total, start, field int) (p Partial, ok bool) {
	p = Partial{Start: start, Field: start + field, End: total}
	const sctpField = 8
	h, ok := Parse(head, total)
	if ok && h.L4 != start {
		h, ok = h.Tunnelled(head, start)
	}
	switch {
	case ok:
		p.Proto = h.Proto
		if h.Proto == SCTP {
			p.End = h.End // a CRC must not include padding
		}
	case field == sctpField:
		return p, false // SCTP uses this place, but the packet is not known to be SCTP
	}
	if p.Proto == SCTP && field != sctpField {
		return p, false
	}
	return p, start >= 0 && field >= 0 && p.Field+p.Size() <= p.End
}

// Complete writes the checksum into the pieces, which must not be shared. It reports
// false, and writes nothing, if they do not hold all the bytes to be summed.
//
// A UDP checksum of 0 becomes 0xffff, since 0 means that there is none; an unknown
// protocol is treated likewise. A TCP checksum may be 0.
func (p *Partial) Complete(pieces [][]byte) bool {
	held := 0
	for _, b := range pieces {
		held += len(b)
	}
	if p.Start < 0 || p.Field < p.Start || p.Field+p.Size() > p.End || p.End > held {
		return false
	}
	if p.Proto == SCTP {
		crc := sumCRC(0, pieces, p.Start, p.Field)
		crc = crc32.Update(crc, crc32.MakeTable(crc32.Castagnoli), noCRC)
		crc = sumCRC(crc, pieces, p.Field+4, p.End)
		var b [4]byte
		binary.LittleEndian.PutUint32(b[:], crc)
		put(pieces, p.Field, b[:])
		return true
	}
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], fieldValue(sumPieces(pieces, p.Start, p.End), p.Proto))
	put(pieces, p.Field, b[:])
	return true
}

// noCRC stands for the CRC's own field, which counts as zero. It is never written. As a
// local variable it would escape and be allocated each time.
var noCRC = make([]byte, 4)

// fieldValue returns the value for a checksum field of the protocol, from a sum.
func fieldValue(sum uint16, proto uint8) uint16 {
	if sum == 0xffff && proto != TCP {
		return 0xffff
	}
	return ^sum
}

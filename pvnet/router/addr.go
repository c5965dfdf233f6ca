package router

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

	"barevif/pvnet/packet"
)

// An addr is an IP address; an IPv4 address is its IPv4-mapped IPv6 address, so that both
// families are in one space. IPv6 packets with such an address are dropped (ReasonMartian).
type addr struct{ hi, lo uint64 }

// mapped is the prefix ::ffff:0:0/96, as the low half of an addr has it.
const mapped = 0xffff << 32

func addr4(b []byte) addr { return addr{0, mapped | uint64(binary.BigEndian.Uint32(b))} }

func addr16(b []byte) addr {
	return addr{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

func toAddr(a netip.Addr) addr {
	b := a.As16()
	return addr16(b[:])
}

func (a addr) is4() bool { return a.hi == 0 && a.lo>>32 == 0xffff }

// put writes a into b: 4 or 16 bytes.
func (a addr) put(b []byte) {
	if len(b) == 4 {
		binary.BigEndian.PutUint32(b, uint32(a.lo))
		return
	}
	binary.BigEndian.PutUint64(b, a.hi)
	binary.BigEndian.PutUint64(b[8:], a.lo)
}

func (a addr) netip() netip.Addr {
	var b [16]byte
	a.put(b[:])
	return netip.AddrFrom16(b).Unmap()
}

// sum returns the sum of a's 16-bit words. The words that an IPv4 address has in front add
// nothing: 0xffff is 0.
func (a addr) sum() uint64 {
	return a.hi>>32 + a.hi&0xffffffff + a.lo>>32 + a.lo&0xffffffff
}

func (a addr) linkLocal() bool {
	if a.is4() {
		return uint32(a.lo)>>16 == 169<<8|254
	}
	return a.hi>>54 == 0xfe80>>6
}

func (a addr) multicast() bool {
	if a.is4() {
		return uint32(a.lo)>>28 == 0xe
	}
	return a.hi>>56 == 0xff
}

// unspecified is 0.0.0.0 or ::.
func (a addr) unspecified() bool { return a.hi == 0 && (a.lo == 0 || a.lo == mapped) }

// reserved reports whether a is neither source nor unicast destination of any packet that is
// forwarded or received: 0/8, 127/8 and 240/4, and of IPv6 ::/96, which has :: and the loopback
// address in it.
func (a addr) reserved() bool {
	if a.is4() {
		n := uint32(a.lo) >> 24
		return n == 0 || n == 127 || n >= 240
	}
	return a.hi == 0 && a.lo>>32 == 0
}

var broadcast = addr{0, mapped | 0xffffffff}

// A prefix is a set of addresses of one family, in the space of both.
type prefix struct {
	addr
	mask addr
	bits uint8 // of the mask
}

func toPrefix(p netip.Prefix) prefix {
	n := p.Bits()
	if p.Addr().Is4() {
		n += 96
	}
	m := maskOf(n)
	a := toAddr(p.Addr())
	return prefix{addr{a.hi & m.hi, a.lo & m.lo}, m, uint8(n)}
}

func maskOf(n int) addr {
	switch {
	case n <= 0:
		return addr{}
	case n <= 64:
		return addr{^uint64(0) << (64 - n), 0}
	}
	return addr{^uint64(0), ^uint64(0) << (128 - n)}
}

func (p *prefix) contains(a addr) bool {
	// A short prefix is one of IPv6, and has no address of IPv4 in it, though ::/0 looks like it.
	return a.hi&p.mask.hi == p.hi && a.lo&p.mask.lo == p.lo && (p.bits >= 96 || !a.is4())
}

// containsAny reports whether one of the prefixes contains a.
func containsAny(ps []prefix, a addr) bool {
	for i := range ps {
		if ps[i].contains(a) {
			return true
		}
	}
	return false
}

// A tuple names a flow's packets in one direction. It has no padding: it is compared and
// hashed as bytes.
type tuple struct {
	src, dst addr
	// ports is source<<16 | destination. For an echo request it is the identifier as source,
	// for a reply as destination; 0 for other protocols.
	ports uint32
	proto uint32
}

// inverse returns the tuple of the answers to t's packets.
func (t *tuple) inverse() tuple {
	return tuple{t.dst, t.src, bits.RotateLeft32(t.ports, 16), t.proto}
}

func (t *tuple) sport() uint16 { return uint16(t.ports >> 16) }
func (t *tuple) dport() uint16 { return uint16(t.ports) }

func isEcho(proto uint32) bool { return proto == icmp4 || proto == icmp6 }

// Protocols that package packet has no names for.
const (
	icmp4 = 1
	icmp6 = 58
)

// hasPorts reports whether a tuple of the protocol has ports.
func hasPorts(proto uint32) bool { return proto == packet.TCP || proto == packet.UDP }

// A change is the difference that replacing words makes to a ones' complement sum: the sum of each new word and
// of the complement of the word that it replaces (RFC 1624).
type change uint64

func (c *change) words(from, to uint64) { *c += change(packet.Fold(to)) + change(^packet.Fold(from)) }

// apply returns a checksum field after the change (RFC 1624, equation 3).
func (c change) apply(field uint16) uint16 {
	return ^packet.Fold(uint64(^field) + uint64(c))
}

// applySum returns a field that holds a sum and not its complement: a partial checksum.
func (c change) applySum(field uint16) uint16 {
	return packet.Fold(uint64(field) + uint64(c))
}

// put16 writes v at b[at:] and adds the change to c. at is even in what the sum covers.
func put16(b []byte, at int, v uint16, c *change) {
	c.words(uint64(binary.BigEndian.Uint16(b[at:])), uint64(v))
	binary.BigEndian.PutUint16(b[at:], v)
}

// putAddr is put16 for an address.
func putAddr(b []byte, at int, is4 bool, a addr, c *change) {
	n := 16
	if is4 {
		n = 4
	}
	old := b[at : at+n]
	c.words(packet.Add(0, old), a.wordsOf(is4))
	a.put(old)
}

func (a addr) wordsOf(is4 bool) uint64 {
	if is4 {
		return a.lo & 0xffffffff
	}
	return a.sum()
}

// Package toeplitz computes the Toeplitz hash with which a Xen backend, like many network
// cards, chooses the queue of a packet: XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ of
// xen/include/public/io/netif.h.
//
// The input is the packet's source and destination address and, for TCP, the source and
// destination port, in network order. Nothing allocates but [NewTable].
package toeplitz

import (
	"barevif/pvnet/netif"
	"barevif/pvnet/packet"
)

// MaxKey is the longest key in bytes, as in Linux's netback
// (XEN_NETBK_MAX_HASH_KEY_SIZE): 36 bytes of input and one word.
const MaxKey = 40

// maxInput is the longest input: two IPv6 addresses and two ports.
const maxInput = 36

// A Table is a key, prepared so that a hash costs two loads for each byte of input. It is
// immutable.
type Table struct {
	// What each value of the upper and of the lower four bits of each byte of input
	// contributes to the hash.
	bytes [maxInput][2][16]uint32
}

// NewTable prepares a key. Bytes that a short key lacks are 0, as in Linux; those beyond
// MaxKey are not used. With an empty key every hash is 0.
func NewTable(key []byte) *Table {
	var k [MaxKey]byte
	copy(k[:], key)
	t := new(Table)
	for i := range t.bytes {
		var window uint64 // the key from byte i on
		for _, c := range k[i : i+5] {
			window = window<<8 | uint64(c)
		}
		for bit := range 8 { // it contributes the 32 bits of the key that begin at the same bit
			w := uint32(window >> (8 - bit))
			for v := range uint(16) {
				if v&(8>>(bit%4)) != 0 {
					t.bytes[i][bit/4][v] ^= w
				}
			}
		}
	}
	return t
}

// Sum returns the hash of in, of which only the first 36 bytes count.
func (t *Table) Sum(in []byte) (h uint32) { return t.sum(0, 0, in) }

// sum returns h with in added, which is the input from byte at on.
func (t *Table) sum(h uint32, at int, in []byte) uint32 {
	bytes := t.bytes[at:]
	for i, c := range in[:min(len(in), len(bytes))] {
		b := &bytes[i]
		h ^= b[0][c>>4] ^ b[1][c&15]
	}
	return h
}

// Frame returns the hash of a frame of total bytes that begins with head, and what it
// covers: the most specific of the types that are in flags, which is a set of
// [netif.HashType.Flag]. ok is false, and the hash 0, if none of them applies: then the
// frame is no IP packet, has a VLAN tag, or is of a type that is not in flags.
//
// As in Linux's netback (xenvif_set_skb_hash) a fragment of a TCP packet counts as
// non-TCP.
func (t *Table) Frame(head []byte, total int, flags uint32) (hash uint32, typ netif.HashType, ok bool) {
	h, ok := packet.Parse(head, total)
	if !ok || h.Tags != 0 {
		return 0, 0, false
	}
	plain, tcp := netif.HashIPv4, netif.HashIPv4TCP
	if h.Version == 6 {
		plain, tcp = netif.HashIPv6, netif.HashIPv6TCP
	}
	fragment := h.Fragment != packet.Whole || h.Extensions&packet.HasFragmentHeader != 0
	if flags&tcp.Flag() != 0 && h.Proto == packet.TCP && !fragment && h.L4 != 0 && len(head) >= h.L4+4 {
		in := h.Addresses(head)
		hash = t.sum(0, 0, in)
		return t.sum(hash, len(in), head[h.L4:h.L4+4]), tcp, true
	}
	if flags&plain.Flag() != 0 {
		return t.sum(0, 0, h.Addresses(head)), plain, true
	}
	return 0, 0, false
}

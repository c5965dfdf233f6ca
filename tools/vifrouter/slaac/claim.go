package slaac

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"barevif/pvnet/packet"
	"barevif/tools/vifrouter/mld"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Types of the messages that Claimed reads.
const (
	TypeSolicitation  = 135
	TypeAdvertisement = 136
)

const (
	mostDelay  = time.Second      // at random before the link is asked, so that not all stations do at once (RFC 4862, section 5.4.2)
	answerWait = time.Second      // how long an answer may take (RFC 4861, section 10: RETRANS_TIMER)
	askAgain   = 10 * time.Minute // for an address that somebody else had
)

// A claim is an address of this host, or one that it wants.
type claim struct {
	addr  netip.Addr
	state claimState
	at    time.Time // when the state ends
	nonce [6]byte   // of the solicitation, in state asked
	by    [6]byte   // in state taken: the MAC of the frame in which another station claimed it
}

type claimState uint8

const (
	waiting claimState = iota // until at, and then until Probes is called
	asked                     // until at; then it is ours
	ours                      // as long as its prefix lasts
	taken                     // until at; then it is waiting again
)

// A Taken is an address that this host would have, had no other station it.
type Taken struct {
	Addr netip.Addr
	By   [6]byte // the MAC of the station that says so
}

// claim makes c.claims those of the addresses that follow from those of c.prefixes that are not excluded, moves
// the claims whose state has ended to the next state, and returns all of them.
func (c *Client) claim(now time.Time) []claim {
	var want []netip.Addr
	for _, p := range c.prefixes {
		if p.Autonomous && !p.excluded {
			want = append(want, packet.EUI64(p.Prefix.Prefix, c.mac))
		}
	}
	if len(want) > 0 {
		want = append(want, packet.LinkLocal(c.mac))
	}
	c.claims = slices.DeleteFunc(c.claims, func(one claim) bool { return !slices.Contains(want, one.addr) })
	for _, a := range want {
		if !slices.ContainsFunc(c.claims, func(one claim) bool { return one.addr == a }) {
			c.claims = append(c.claims, claim{addr: a, at: now.Add(rand.N(mostDelay))})
		}
	}
	for i := range c.claims {
		switch one := &c.claims[i]; {
		case now.Before(one.at):
		case one.state == asked:
			one.state = ours
		case one.state == taken:
			one.state = waiting
		}
	}
	return c.claims
}

// has reports whether both an address and the link-local address are this host's.
func (c *Client) has(a netip.Addr) bool {
	n := 0
	for i := range c.claims {
		if one := &c.claims[i]; one.state == ours && (one.addr == a || one.addr.IsLinkLocalUnicast()) {
			n++
		}
	}
	return n == 2
}

// Again makes Probes ask again for the addresses that are not this host's yet: the card may be at another link,
// or the link may not have got the solicitations.
func (c *Client) Again(now time.Time) {
	for i := range c.claims {
		if one := &c.claims[i]; one.state != ours {
			one.state, one.at = waiting, now.Add(rand.N(mostDelay))
		}
	}
}

// Probes returns the solicitations that are due, one frame for each address. The caller sends them, but only
// after it has arranged that neighbour discovery messages about Settings.Tentative come to Claimed.
func (c *Client) Probes(now time.Time) (frames [][]byte) {
	for i := range c.claims {
		one := &c.claims[i]
		if one.state != waiting || now.Before(one.at) {
			continue
		}
		one.state, one.at = asked, now.Add(answerWait)
		binary.BigEndian.PutUint32(one.nonce[:], rand.Uint32())
		binary.BigEndian.PutUint16(one.nonce[4:], uint16(rand.Uint32()))
		frames = append(frames, probe(c.mac, one.addr, one.nonce))
	}
	return frames
}

// Claimed reads a neighbour solicitation or advertisement that came from the station with that MAC, with
// a hop limit of 255 and a right checksum. If the station says that it has or wants an address of which this
// host has not finished duplicate address detection, the address is taken, and Claimed returns it with ok true.
func (c *Client) Claimed(now time.Time, mac [6]byte, src, dst netip.Addr, message []byte) (a netip.Addr, ok bool) {
	const size = header.ICMPv6HeaderSize + header.NDPNSMinimumSize // an advertisement is as long
	if len(message) < size || message[1] != 0 {
		return a, false
	}
	a = netip.AddrFrom16([16]byte(message[8:24]))
	i := slices.IndexFunc(c.claims, func(one claim) bool { return one.addr == a && (one.state == waiting || one.state == asked) })
	if i < 0 {
		return a, false
	}
	one := &c.claims[i]
	const sourceLink, nonce = 1, 14
	for b := message[size:]; len(b) > 0; b = b[8*int(b[1]):] {
		if len(b) < 8 || b[1] == 0 || 8*int(b[1]) > len(b) {
			return a, false
		}
		switch {
		case message[0] != TypeSolicitation:
		case b[0] == sourceLink: // duplicate address detection has no such option (RFC 4861, section 7.1.1)
			return a, false
		case b[0] == nonce && b[1] == 1 && one.state == asked && [6]byte(b[2:8]) == one.nonce:
			return a, false // this host's own solicitation, which the link has looped back
		}
	}
	const solicited = 0x40
	switch message[0] {
	case TypeSolicitation: // one from an address of its own only resolves a neighbour's MAC
		ok = src == netip.IPv6Unspecified() && dst == mld.Group(a)
	case TypeAdvertisement:
		ok = !dst.IsMulticast() || message[4]&solicited == 0
	}
	if ok {
		one.state, one.at, one.by = taken, now.Add(askAgain), mac
	}
	return a, ok
}

// probe makes the frame that asks whether anybody has an address.
func probe(mac [6]byte, a netip.Addr, nonce [6]byte) []byte {
	g := mld.Group(a).As16()
	b := append([]byte{0x33, 0x33}, g[12:]...)
	b = append(b, mac[:]...)
	b = binary.BigEndian.AppendUint16(b, packet.IPv6)
	ip := len(b)
	const size = header.ICMPv6HeaderSize + header.NDPNSMinimumSize + 8
	b = append(b, make([]byte, header.IPv6MinimumSize+size)...)
	to := tcpip.AddrFrom16(g)
	header.IPv6(b[ip:]).Encode(&header.IPv6Fields{
		PayloadLength: size, TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: header.NDPHopLimit, SrcAddr: header.IPv6Any, DstAddr: to,
	})
	icmp := header.ICMPv6(b[ip+header.IPv6MinimumSize:])
	icmp.SetType(header.ICMPv6NeighborSolicit)
	ns := header.NDPNeighborSolicit(icmp.MessageBody())
	ns.SetTargetAddress(tcpip.AddrFrom16(a.As16()))
	ns.Options().Serialize(header.NDPOptionsSerializer{header.NDPNonceOption(nonce[:])})
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: header.IPv6Any, Dst: to}))
	return b
}

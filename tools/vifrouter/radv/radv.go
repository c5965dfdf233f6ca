// Package radv makes the router advertisements (RFC 4861) of a router whose guests have a link
// each, and a prefix of their own on it (RFC 8273). It knows no sockets: it returns frames.
package radv

import (
	"encoding/binary"
	"net/netip"
	"time"

	"barevif/pvnet/packet"
)

// Times of RFC 4861, section 6.2.1, and of RFC 8106. RouterLifetime is three times Interval, so that a guest may
// miss two of three advertisements.
const (
	Interval               = 200 * time.Second      // between unsolicited advertisements
	MinDelayBetweenRAs     = 3 * time.Second        // on a link (MIN_DELAY_BETWEEN_RAS)
	MinDelayBetweenAnswers = 500 * time.Millisecond // the same if the guest has asked: it is alone on its link
	RouterLifetime         = 3 * Interval           // and that of name servers
	ValidLifetime          = 24 * time.Hour         // of the prefix
	PreferredLifetime      = 4 * time.Hour          // of the prefix: how long its addresses are used for new connections
)

const servers = 3 // name servers in an advertisement, at most

// TypeRouterSolicitation is the ICMPv6 type of the message by which a guest asks for an advertisement.
const TypeRouterSolicitation = 133

const typeRouterAdvertisement = 134

// A Link is what the router advertises on the link of one guest.
type Link struct {
	MAC    [6]byte      // the router's
	Source netip.Addr   // the router's link-local address
	Prefix netip.Prefix // a /64, for the guest's addresses; zero: none
	DNS    []netip.Addr // name servers; the first three of IPv6 are advertised, those of IPv4 are not
	MTU    int          // bytes; 0: no MTU is advertised
	// Ceasing says that the router is no router of the link any more: every lifetime is 0 (RFC 4861, section 6.2.5).
	Ceasing bool
}

var allNodes = netip.AddrFrom16([16]byte{0: 0xff, 1: 2, 15: 1})

// Append appends to b the frame of an advertisement of l to all stations of the link, and returns the extended
// slice. It keeps nothing of l.
func Append(b []byte, l *Link) []byte {
	seconds := func(d time.Duration) uint32 {
		if l.Ceasing {
			return 0
		}
		return uint32(d / time.Second)
	}
	b = append(b, 0x33, 0x33, 0, 0, 0, 1)
	b = append(b, l.MAC[:]...)
	b = binary.BigEndian.AppendUint16(b, packet.IPv6)
	ip := len(b)
	b = append(b, 0x60, 0, 0, 0, 0, 0, 58, 255)
	src, dst := l.Source.As16(), allNodes.As16()
	b = append(append(b, src[:]...), dst[:]...)
	icmp := len(b)
	b = append(b, typeRouterAdvertisement, 0, 0, 0, 64, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(seconds(RouterLifetime)))
	b = append(b, make([]byte, 8)...) // reachable time and retransmission timer: the guest's own
	b = append(b, 1, 1)
	b = append(b, l.MAC[:]...)
	if l.MTU > 0 {
		b = append(b, 5, 1, 0, 0)
		b = binary.BigEndian.AppendUint32(b, uint32(l.MTU))
	}
	if l.Prefix.IsValid() {
		// For addresses, but not on the link: all that a guest sends goes to the router.
		b = append(b, 3, 4, 64, 0x40)
		b = binary.BigEndian.AppendUint32(b, seconds(ValidLifetime))
		b = binary.BigEndian.AppendUint32(b, seconds(PreferredLifetime))
		b = append(b, 0, 0, 0, 0)
		p := l.Prefix.Masked().Addr().As16()
		b = append(b, p[:]...)
	}
	var names []netip.Addr
	for _, a := range l.DNS {
		if a.Is6() && len(names) < servers {
			names = append(names, a)
		}
	}
	if len(names) > 0 {
		b = append(b, 25, byte(1+2*len(names)), 0, 0)
		b = binary.BigEndian.AppendUint32(b, seconds(RouterLifetime))
		for _, a := range names {
			x := a.As16()
			b = append(b, x[:]...)
		}
	}
	n := len(b) - icmp
	binary.BigEndian.PutUint16(b[ip+4:], uint16(n))
	sum := packet.Add(58+uint64(n), b[ip+8:icmp])
	binary.BigEndian.PutUint16(b[icmp+2:], ^packet.Fold(packet.Add(sum, b[icmp:])))
	return b
}

package packet

import (
	"encoding/binary"
	"net/netip"
)

// AppendAnnouncement appends the frame with which a station tells its neighbours that it
// has addr, and the switches between them where it is: for IPv4 a gratuitous ARP request
// (RFC 5227: an announcement), for IPv6 an unsolicited neighbour advertisement to all nodes
// that overrides what they know (RFC 4861, 7.2.6). Linux's netdev_notify_peers sends the
// same. It appends nothing for an addr that is no address of one station.
func AppendAnnouncement(b []byte, mac [6]byte, addr netip.Addr) []byte {
	addr = addr.Unmap().WithZone("")
	switch {
	case !addr.IsValid() || addr.IsUnspecified() || addr.IsMulticast():
		return b
	case addr.Is4():
		return appendARP(b, mac, addr.As4())
	}
	return appendAdvertisement(b, mac, addr.As16())
}

func appendARP(b []byte, mac [6]byte, ip [4]byte) []byte {
	b = append(b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	b = append(b, mac[:]...)
	b = append(b,
		0x08, 0x06, // ARP
		0, 1, 0x08, 0, 6, 4, // Ethernet, IPv4, and the lengths of their addresses
		0, 1) // request
	b = append(append(b, mac[:]...), ip[:]...) // the sender
	b = append(b, 0, 0, 0, 0, 0, 0)
	return append(b, ip[:]...) // the target
}

func appendAdvertisement(b []byte, mac [6]byte, ip [16]byte) []byte {
	const size, icmpv6 = 32, 58
	b = append(b, 0x33, 0x33, 0, 0, 0, 1) // of ff02::1
	b = append(b, mac[:]...)
	b = append(b, IPv6>>8, IPv6&0xff)
	at := len(b)
	b = append(b, 0x60, 0, 0, 0, 0, size, icmpv6, 255) // a smaller hop limit would be refused
	b = append(b, ip[:]...)
	b = append(b, 0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)
	b = append(b,
		136, 0, 0, 0, // neighbour advertisement; the checksum follows
		0x20, 0, 0, 0) // override
	b = append(b, ip[:]...)
	b = append(append(b, 2, 1), mac[:]...) // option: target link-layer address
	sum := Add(size+icmpv6, b[at+8:])      // the pseudo-header is the addresses, the length and the protocol
	binary.BigEndian.PutUint16(b[at+40+2:], ^Fold(sum))
	return b
}

package packet

import "net/netip"

// EUI64 returns the IPv6 address of a card with that MAC in a prefix of 64 bits. The half behind the prefix
// is the MAC's modified EUI-64 (RFC 4291, appendix A), as stateless autoconfiguration makes it (RFC 4862).
func EUI64(p netip.Prefix, mac [6]byte) netip.Addr {
	a := p.Masked().Addr().As16()
	copy(a[8:], []byte{mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]})
	return netip.AddrFrom16(a)
}

// LinkLocal returns the link-local IPv6 address of a card with that MAC.
func LinkLocal(mac [6]byte) netip.Addr {
	return EUI64(netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfe, 0x80}), 64), mac)
}

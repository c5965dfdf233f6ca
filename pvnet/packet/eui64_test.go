package packet

import (
	"net/netip"
	"testing"
)

// The second MAC and its identifier are the example of RFC 2464, section 4: the bit that says "given by the
// maker" is the other way round in an address.
func TestAddressesOfAMAC(t *testing.T) {
	for _, c := range []struct {
		mac    [6]byte
		prefix string
		want   string
	}{
		{[6]byte{0x00, 0x16, 0x3e, 0x01, 0x02, 0x03}, "2001:db8:1:2::/64", "2001:db8:1:2:216:3eff:fe01:203"},
		{[6]byte{0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde}, "fd00::/64", "fd00::3656:78ff:fe9a:bcde"},
		{[6]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}, "2001:db8::ffff:ffff:ffff:ffff/64", "2001:db8::fcff:ffff:feff:ffff"},
	} {
		if got := EUI64(netip.MustParsePrefix(c.prefix), c.mac); got != netip.MustParseAddr(c.want) {
			t.Errorf("%x in %s: %v, want %s", c.mac, c.prefix, got, c.want)
		}
	}
	if got := LinkLocal([6]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}); got != netip.MustParseAddr("fe80::fcff:ffff:feff:ffff") {
		t.Errorf("%v", got)
	}
	if n := testing.AllocsPerRun(100, func() { LinkLocal([6]byte{2}) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

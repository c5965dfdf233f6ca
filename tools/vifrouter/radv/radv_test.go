package radv

import (
	"net/netip"
	"slices"
	"testing"

	"barevif/pvnet/packet"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

var link = Link{
	MAC: [6]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}, Source: packet.LinkLocal([6]byte{0xfe, 0xff, 0xff, 0xff, 0xff, 0xff}),
	Prefix: netip.MustParsePrefix("fd00:137:0:5::/64"), MTU: 1400,
	DNS: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00:137:0:5::1")},
}

// parsed returns what gVisor, as a guest, reads in an advertisement.
func parsed(t *testing.T, b []byte) (ip header.IPv6, ra header.NDPRouterAdvert, options []header.NDPOption) {
	t.Helper()
	ip = header.IPv6(b[header.EthernetMinimumSize:])
	if !ip.IsValid(len(ip)) || ip.HopLimit() != 255 || int(ip.PayloadLength()) != len(ip.Payload()) {
		t.Fatalf("%x is no packet", b)
	}
	icmp := header.ICMPv6(ip.Payload())
	sum := header.PseudoHeaderChecksum(header.ICMPv6ProtocolNumber, ip.SourceAddress(), ip.DestinationAddress(), uint16(len(icmp)))
	if got := checksum.Checksum(icmp, sum); got != 0xffff {
		t.Errorf("the checksum is wrong: %#x", got)
	}
	if icmp.Type() != header.ICMPv6RouterAdvert {
		t.Fatalf("type %d", icmp.Type())
	}
	ra = header.NDPRouterAdvert(icmp.MessageBody())
	it, err := ra.Options().Iter(true)
	if err != nil {
		t.Fatal(err)
	}
	for {
		o, done, err := it.Next()
		if err != nil {
			t.Fatal(err)
		}
		if done {
			return ip, ra, options
		}
		options = append(options, o)
	}
}

func TestGuestReadsTheAdvertisement(t *testing.T) {
	ip, ra, options := parsed(t, Append(nil, &link))
	if ip.SourceAddress() != header.LinkLocalAddr(tcpip.LinkAddress(link.MAC[:])) || ip.DestinationAddress() != header.IPv6AllNodesMulticastAddress {
		t.Errorf("from %v to %v", ip.SourceAddress(), ip.DestinationAddress())
	}
	if ra.RouterLifetime() != RouterLifetime || ra.ManagedAddrConfFlag() || ra.OtherConfFlag() {
		t.Errorf("lifetime %v", ra.RouterLifetime())
	}
	var kinds []string
	for _, o := range options {
		switch o := o.(type) {
		case header.NDPSourceLinkLayerAddressOption:
			kinds = append(kinds, "link")
			if !slices.Equal([]byte(o.EthernetAddress()), link.MAC[:]) {
				t.Errorf("%v", o)
			}
		case header.NDPPrefixInformation:
			kinds = append(kinds, "prefix")
			if o.OnLinkFlag() || !o.AutonomousAddressConfigurationFlag() || o.PrefixLength() != 64 || o.ValidLifetime() != ValidLifetime || o.PreferredLifetime() != PreferredLifetime || o.Prefix().String() != "fd00:137:0:5::" {
				t.Errorf("%v", o)
			}
		case header.NDPRecursiveDNSServer:
			kinds = append(kinds, "dns")
			addrs, err := o.Addresses()
			if err != nil || len(addrs) != 1 || addrs[0].String() != "fd00:137:0:5::1" || o.Lifetime() != RouterLifetime {
				t.Errorf("%v, %v", addrs, err)
			}
		}
	}
	if !slices.Equal(kinds, []string{"link", "prefix", "dns"}) {
		t.Errorf("%v", kinds)
	}
}

func TestAdvertisementThatIsOverEndsEverything(t *testing.T) {
	l := link
	l.Ceasing = true
	_, ra, options := parsed(t, Append([]byte("before")[:0], &l))
	if ra.RouterLifetime() != 0 {
		t.Errorf("the router goes on for %v", ra.RouterLifetime())
	}
	for _, o := range options {
		switch o := o.(type) {
		case header.NDPPrefixInformation:
			if o.PreferredLifetime() != 0 {
				t.Errorf("%v", o)
			}
		case header.NDPRecursiveDNSServer:
			if o.Lifetime() != 0 {
				t.Errorf("%v", o)
			}
		}
	}
}

func TestAppendKeepsWhatIsBefore(t *testing.T) {
	b := Append([]byte("before"), &link)
	if string(b[:6]) != "before" {
		t.Fatalf("%q", b[:6])
	}
	parsed(t, b[6:])
}

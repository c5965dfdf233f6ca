package dhcp

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var testID = dhcpv4.TransactionID{1, 2, 3, 4}

// discover returns a request for which replyTo makes answers.
func discover() *dhcpv4.DHCPv4 {
	m, err := dhcpv4.NewDiscovery(testMAC[:], dhcpv4.WithTransactionID(testID))
	if err != nil {
		panic(err)
	}
	return m
}

// offer returns a server's offer.
func offer(change ...func(*dhcpv4.DHCPv4)) []byte {
	return replyTo(discover(), dhcpv4.MessageTypeOffer, change...).ToBytes()
}

// option sets an option to any bytes.
func option(code dhcpv4.OptionCode, v ...byte) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptGeneric(code, v)) }
}

// without removes an option.
func without(code dhcpv4.OptionCode) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.Options.Del(code) }
}

func yours(a ...byte) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.YourIPAddr = a }
}

func TestImpossibleLeasesAreRefused(t *testing.T) {
	for name, change := range map[string]func(*dhcpv4.DHCPv4){
		"no address":            yours(0, 0, 0, 0),
		"of this network":       yours(0, 0, 2, 1),
		"broadcast":             yours(255, 255, 255, 255),
		"multicast":             yours(224, 0, 0, 1),
		"reserved":              yours(240, 0, 0, 1),
		"loopback":              yours(127, 0, 0, 1),
		"link-local":            yours(169, 254, 1, 1),
		"the network":           yours(192, 0, 2, 0),
		"the network's last":    yours(192, 0, 2, 255),
		"holes in the mask":     option(dhcpv4.OptionSubnetMask, 255, 0, 255, 0),
		"long mask":             option(dhcpv4.OptionSubnetMask, 255, 255, 255, 0, 0),
		"everything on link":    option(dhcpv4.OptionSubnetMask, 0, 0, 0, 0),
		"half on link":          option(dhcpv4.OptionSubnetMask, 128, 0, 0, 0),
		"no time":               without(dhcpv4.OptionIPAddressLeaseTime),
		"time 0":                option(dhcpv4.OptionIPAddressLeaseTime, 0, 0, 0, 0),
		"9 seconds":             option(dhcpv4.OptionIPAddressLeaseTime, 0, 0, 0, 9),
		"short time":            option(dhcpv4.OptionIPAddressLeaseTime, 0, 1),
		"no server":             without(dhcpv4.OptionServerIdentifier),
		"server 0.0.0.0":        option(dhcpv4.OptionServerIdentifier, 0, 0, 0, 0),
		"server of a group":     option(dhcpv4.OptionServerIdentifier, 224, 0, 0, 1),
		"two servers":           option(dhcpv4.OptionServerIdentifier, 192, 0, 2, 1, 192, 0, 2, 2),
		"router cut off":        option(dhcpv4.OptionRouter, 192, 0, 2),
		"name server cut off":   option(dhcpv4.OptionDomainNameServer, 192, 0, 2, 1, 192),
		"routes cut off":        option(dhcpv4.OptionClasslessStaticRoute, 24, 10, 0, 0, 192, 0, 2),
		"route of 33 bits":      option(dhcpv4.OptionClasslessStaticRoute, 33, 10, 0, 0, 0, 0, 192, 0, 2, 1),
		"routes' length alone":  option(dhcpv4.OptionClasslessStaticRoute, 0),
		"another kind":          option(dhcpv4.OptionDHCPMessageType, byte(dhcpv4.MessageTypeInform)),
		"no kind":               without(dhcpv4.OptionDHCPMessageType),
		"an address of 0 bytes": option(dhcpv4.OptionServerIdentifier),
	} {
		if r, err := parse(offer(change), testID, testMAC); err == nil {
			t.Errorf("%s: %+v", name, r.lease)
		}
	}
	if r, err := parse(offer(), testID, testMAC); err != nil || r.lease == nil {
		t.Error(err)
	}
}

// Of a lease that can be, what cannot be is left out.
func TestOptionsThatCannotBeAreLeftOut(t *testing.T) {
	take := func(change ...func(*dhcpv4.DHCPv4)) *Lease {
		t.Helper()
		r, err := parse(offer(change...), testID, testMAC)
		if err != nil {
			t.Fatal(err)
		}
		return r.lease
	}
	for mtu, want := range map[uint16]int{0: 0, 67: 0, 68: 0, 575: 0, 576: 576, 1500: 1500, 65535: 65535} {
		if l := take(option(dhcpv4.OptionInterfaceMTU, binary.BigEndian.AppendUint16(nil, mtu)...)); l.MTU != want {
			t.Errorf("MTU %d: %d", mtu, l.MTU)
		}
	}
	if l := take(option(dhcpv4.OptionInterfaceMTU, 1, 2, 3)); l.MTU != 0 {
		t.Error("an MTU of 3 bytes: ", l.MTU)
	}
	if l := take(option(dhcpv4.OptionIPAddressLeaseTime, 255, 255, 255, 255)); l.Expire != MaxExpire || l.Renew != MaxExpire/2 {
		t.Errorf("a lease without end: %+v", l)
	}
	for _, times := range [][2]byte{{0, 0}, {20, 10}, {10, 200}, {10, 10}, {1, 50}} {
		l := take(option(dhcpv4.OptionIPAddressLeaseTime, 0, 0, 0, 100),
			option(dhcpv4.OptionRenewTimeValue, 0, 0, 0, times[0]), option(dhcpv4.OptionRebindingTimeValue, 0, 0, 0, times[1]))
		if l.Renew != 50*time.Second || l.Rebind != 87500*time.Millisecond {
			t.Errorf("%v: %+v", times, l)
		}
	}
	if l := take(option(dhcpv4.OptionRenewTimeValue, 0, 0, 0, 30), option(dhcpv4.OptionRebindingTimeValue, 0, 0, 0, 40)); l.Renew != 30*time.Second || l.Rebind != 40*time.Second {
		t.Errorf("%+v", l)
	}
	servers := bytes.Repeat([]byte{9, 9, 9, 9}, 50)
	if l := take(option(dhcpv4.OptionDomainNameServer, append([]byte{0, 0, 0, 0, 127, 0, 0, 1, 224, 0, 0, 1}, servers...)...)); len(l.DNS) != MaxServers || l.DNS[0] != netip.MustParseAddr("9.9.9.9") {
		t.Error(l.DNS)
	}
	if l := take(option(dhcpv4.OptionRouter, 255, 255, 255, 255)); len(l.Routes) != 0 {
		t.Error(l.Routes)
	}
	if l := take(option(dhcpv4.OptionRouter, 192, 0, 2, 77)); len(l.Routes) != 0 {
		t.Error("through this host: ", l.Routes)
	}
	for _, p := range []struct {
		addr []byte
		bits int
	}{{[]byte{10, 1, 2, 3}, 8}, {[]byte{172, 16, 2, 3}, 16}, {[]byte{192, 0, 2, 3}, 24}} {
		if l := take(without(dhcpv4.OptionSubnetMask), yours(p.addr...)); l.Addr.Bits() != p.bits {
			t.Error("without a mask: ", l.Addr)
		}
	}
	if l := take(option(dhcpv4.OptionSubnetMask, 255, 255, 255, 255)); l.Addr.Bits() != 32 || len(l.Routes) != 1 {
		t.Errorf("a network of one: %+v", l)
	}
	if l := take(option(dhcpv4.OptionSubnetMask, 255, 255, 255, 254), yours(192, 0, 2, 1)); l.Addr.Bits() != 31 {
		t.Errorf("a network of two: %+v", l)
	}
}

func TestClasslessRoutes(t *testing.T) {
	v := []byte{
		0, 192, 0, 2, 1, // a default route
		24, 10, 1, 2, 192, 0, 2, 2,
		20, 10, 1, 0xff, 192, 0, 2, 2, // host bits
		32, 10, 9, 9, 9, 0, 0, 0, 0, // on link
		1, 0, 192, 0, 2, 1, // half of all networks
		32, 169, 254, 169, 254, 192, 0, 2, 2, // a cloud's metadata
		9, 0, 0, 192, 0, 2, 2, // of this network
		0, 0, 0, 0, 0, // everything on link
		24, 224, 0, 0, 192, 0, 2, 2, // a group
		24, 10, 1, 3, 192, 0, 2, 77, // through this host
		24, 10, 1, 3, 224, 0, 0, 1, // through a group
		8, 127, 192, 0, 2, 2, // loopback
	}
	got, err := classless(v, testAddr)
	route := func(to, via string) Route {
		r := Route{To: netip.MustParsePrefix(to)}
		if via != "" {
			r.Via = netip.MustParseAddr(via)
		}
		return r
	}
	want := []Route{route("0.0.0.0/0", "192.0.2.1"), route("10.1.2.0/24", "192.0.2.2"),
		route("10.1.240.0/20", "192.0.2.2"), route("10.9.9.9/32", ""),
		route("0.0.0.0/1", "192.0.2.1"), route("169.254.169.254/32", "192.0.2.2")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if got, err = classless(bytes.Repeat(v[5:13], 50), testAddr); err != nil || len(got) != MaxRoutes {
		t.Errorf("%d routes, %v", len(got), err)
	}
	r, err := parse(offer(option(dhcpv4.OptionClasslessStaticRoute, v[5:13]...)), testID, testMAC)
	if err != nil || len(r.lease.Routes) != 1 || r.lease.Routes[0] != want[1] {
		t.Errorf("with a router, which does not count: %+v, %v", r.lease, err)
	}
}

// Whatever arrives, a lease that is taken can be used as it is.
func FuzzOffer(f *testing.F) {
	f.Add(offer())
	f.Add(offer(option(dhcpv4.OptionClasslessStaticRoute, 24, 10, 1, 2, 192, 0, 2, 2)))
	f.Add(offer(without(dhcpv4.OptionSubnetMask), option(dhcpv4.OptionInterfaceMTU, 2, 64)))
	f.Add(replyTo(discover(), dhcpv4.MessageTypeNak).ToBytes())
	f.Add(append(offer()[:240], 53, 1, 2, 51, 200, 1)) // an option longer than the message
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := parse(b, testID, testMAC)
		if err != nil {
			return
		}
		l := r.lease
		if !station(r.server) || (l == nil) != (r.typ == dhcpv4.MessageTypeNak) {
			t.Fatalf("%+v", r)
		}
		if l == nil {
			return
		}
		if !station(l.Addr.Addr()) || l.Addr.Bits() < 8 || l.Server != r.server ||
			l.Expire < MinExpire || l.Expire > MaxExpire || l.Renew <= 0 || l.Renew >= l.Rebind || l.Rebind >= l.Expire ||
			l.MTU != 0 && l.MTU < MinMTU || len(l.DNS) > MaxServers || len(l.Routes) > MaxRoutes {
			t.Fatalf("%+v", l)
		}
		for _, r := range l.Routes {
			if !r.To.IsValid() || r.To != r.To.Masked() || r.Via.IsValid() && !station(r.Via) || r.Via == l.Addr.Addr() {
				t.Fatal(r)
			}
		}
		for _, a := range l.DNS {
			if !station(a) {
				t.Fatal(a)
			}
		}
	})
}

package netstack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"barevif/pvnet"
)

func (s *Stack) requireNot(t *testing.T, addr string) {
	t.Helper()
	if s.network.has(netip.MustParsePrefix(addr + "/32")) {
		t.Errorf("the stack has %s", addr)
	}
}

func (s *Stack) answersAt(t *testing.T, addr string) {
	t.Helper()
	if _, err := s.Ping(within(t), netip.MustParseAddr(addr)); err != nil {
		t.Errorf("a ping to %s: %v", addr, err)
	}
}

func prefixes(list ...string) (out []netip.Prefix) {
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// A listener for any address takes connections to addresses that come later, of either family,
// and a connection of an address that stays goes on.
func TestAddressesChangeWhileTheStackRuns(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: frontIP, Later: true})
	back := newStack(t, w.Back, Config{Addr: backIP, Addrs: prefixes("198.51.100.2/24", "2001:db8::2/64")})
	l := listen(t, front, ":80")
	reached := func(host string) net.Conn {
		t.Helper()
		c, err := back.DialContext(within(t), "tcp", net.JoinHostPort(host, "80"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	client := reached("192.0.2.1")
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })

	gateway := netip.MustParseAddr("198.51.100.2")
	if err := front.SetAddresses(prefixes("198.51.100.1/24", frontIP.String(), "2001:db8::1/64"), []netip.Addr{gateway}); err != nil {
		t.Fatal(err)
	}
	if now := front.Settings(); fmt.Sprint(now.Addrs) != "[198.51.100.1/24 192.0.2.1/24 2001:db8::1/64]" || len(now.Routes) != 1 || now.Routes[0].Via != gateway {
		t.Errorf("%+v", now)
	}
	if !front.routed(netip.MustParseAddr("203.0.113.1")) {
		t.Error("no default route")
	}
	reached("198.51.100.1")
	reached("2001:db8::1")
	if _, err := client.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := server.Read(make([]byte, 1)); err != nil {
		t.Error(err)
	}

	// The old address is over, and so is the route.
	if err := front.SetAddresses(prefixes("192.0.2.9/24"), nil); err != nil {
		t.Fatal(err)
	}
	back.answersAt(t, "192.0.2.9")
	front.requireNot(t, "198.51.100.1")
	if front.routed(netip.MustParseAddr("203.0.113.1")) || front.Addr() != netip.MustParseAddr("192.0.2.9") {
		t.Errorf("%+v", front.Settings())
	}

	// None at all, and one again.
	if err := front.SetAddresses(nil, nil); err != nil || front.Addr().IsValid() {
		t.Errorf("%v, %+v", err, front.Settings())
	}
	if err := front.SetAddresses([]netip.Prefix{frontIP}, nil); err != nil {
		t.Fatal(err)
	}
	back.answersAt(t, frontIP.Addr().String())
	front.Close()
	if err := front.SetAddresses([]netip.Prefix{frontIP}, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// What is no set of addresses changes nothing.
func TestAddressesThatCannotBeSetLeaveTheOthers(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	front := newStack(t, w.Front, Config{Addr: frontIP})
	back := newStack(t, w.Back, Config{Addr: backIP})
	// An address that the stack has from elsewhere: the second of two is refused by gVisor.
	if err := front.network.add(netip.MustParsePrefix("192.0.2.77/24")); err != nil {
		t.Fatal(err)
	}
	was := fmt.Sprint(front.Settings())
	for want, c := range map[string]struct {
		addrs    []netip.Prefix
		gateways []netip.Addr
	}{
		"no address for a host": {addrs: prefixes("224.0.0.1/24")},
		"twice":                 {addrs: prefixes("192.0.2.3/24", "192.0.2.3/25")},
		"not another station":   {addrs: prefixes("192.0.2.3/24"), gateways: []netip.Addr{netip.MustParseAddr("198.51.100.1")}},
		"Later":                 {addrs: prefixes("2001:db8::1/64")},
		"192.0.2.77":            {addrs: prefixes("192.0.2.3/24", "192.0.2.77/24")},
	} {
		if err := front.SetAddresses(c.addrs, c.gateways); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", c, err, want)
		}
		if now := fmt.Sprint(front.Settings()); now != was {
			t.Errorf("%v: %s, was %s", c, now, was)
		}
	}
	back.answersAt(t, frontIP.Addr().String())
	front.requireNot(t, "192.0.2.3")
}

// Addresses are those of stations, and what a server is told fits its message.
func TestAConfigNamesStations(t *testing.T) {
	addr := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	net4 := netip.MustParsePrefix("192.0.2.2/24")
	for want, c := range map[string]Config{
		"0.1.2.3/8 is no address for a host":        {Addr: netip.MustParsePrefix("0.1.2.3/8")},
		"240.0.0.1/4 is no address for a host":      {Addr: netip.MustParsePrefix("240.0.0.1/4")},
		"192.0.2.2/0 has all addresses":             {Addr: netip.MustParsePrefix("192.0.2.2/0")},
		"2001:db8::1/0 has all addresses":           {Addrs: prefixes("2001:db8::1/0")},
		"Config.Gateway 192.0.2.255 is not another": {Addr: net4, Gateway: addr("192.0.2.255")},
		"Config.Gateway 192.0.2.0 is not another":   {Addr: net4, Gateway: addr("192.0.2.0")},
		"Config.Gateway fe80::1%0 is not another":   {Addrs: prefixes("2001:db8::1/64"), Gateway: addr("fe80::1%0")},
		"Config.DNS fe80::1%0 is no address":        {Addr: net4, DNS: []netip.Addr{addr("fe80::1%0")}},
		"Config.DNS 0.0.0.1 is no address":          {Addr: net4, DNS: []netip.Addr{addr("0.0.0.1")}},
		"Config.Hostname has 256 bytes, 255":        {DHCP: true, Hostname: strings.Repeat("x", 256)},
	} {
		if err := c.check(1500); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	for _, c := range []Config{
		{Addr: net4, Gateway: addr("192.0.2.254"), DNS: []netip.Addr{addr("192.0.2.255"), addr("fe80::1")}, Hostname: strings.Repeat("x", 255)},
		{Addr: netip.MustParsePrefix("192.0.2.2/31"), Gateway: addr("192.0.2.3")},
		{Addr: netip.MustParsePrefix("10.0.0.1/1")},
		{Addrs: prefixes("2001:db8::1/64"), Gateway: addr("2001:db8::")},
	} {
		if err := c.check(1500); err != nil {
			t.Error(err)
		}
	}
}

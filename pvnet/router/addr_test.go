package router

import (
	"net/netip"
	"testing"
)

func TestKindsOfAddresses(t *testing.T) {
	for s, want := range map[string]struct{ four, reserved, link, multicast, unspecified bool }{
		"0.0.0.0":              {four: true, reserved: true, unspecified: true},
		"0.1.2.3":              {four: true, reserved: true},
		"1.0.0.0":              {four: true},
		"127.255.0.1":          {four: true, reserved: true},
		"128.0.0.1":            {four: true},
		"126.0.0.1":            {four: true},
		"169.254.0.1":          {four: true, link: true},
		"169.253.0.1":          {four: true},
		"223.255.255.255":      {four: true},
		"224.0.0.1":            {four: true, multicast: true},
		"239.255.255.255":      {four: true, multicast: true},
		"240.0.0.1":            {four: true, reserved: true},
		"255.255.255.255":      {four: true, reserved: true},
		"::":                   {reserved: true, unspecified: true},
		"::1":                  {reserved: true},
		"::10.1.0.5":           {reserved: true},
		"::1:0:0":              {},
		"::fffe:10.1.0.5":      {},
		"64:ff9b::10.1.0.5":    {},
		"2001:db8::ffff:0:1":   {},
		"fe80::1":              {link: true},
		"febf::1":              {link: true},
		"fec0::1":              {},
		"ff02::1":              {multicast: true},
		"fdff::":               {},
		"2001:db8:0:0:1:2:3:4": {},
	} {
		a := toAddr(ip(s))
		got := struct{ four, reserved, link, multicast, unspecified bool }{a.is4(), a.reserved(), a.linkLocal(), a.multicast(), a.unspecified()}
		if got != want {
			t.Errorf("%s: %+v, want %+v", s, got, want)
		}
		if a.netip() != ip(s) {
			t.Errorf("%s becomes %v", s, a.netip())
		}
	}
}

func TestPrefixesContainWhatNetipSays(t *testing.T) {
	addrs := []string{"10.1.0.5", "10.1.1.5", "0.0.0.0", "255.255.255.255", "::", "ffff::", "2001:db8::1", "2001:db8:0:1::", "2001:db8::8000:0:0:1"}
	for _, a := range addrs {
		for n := range 129 {
			p, err := ip(a).Prefix(n)
			if err != nil {
				continue // longer than IPv4's
			}
			for _, b := range addrs {
				x := toPrefix(p)
				if got := x.contains(toAddr(ip(b))); got != p.Contains(ip(b)) {
					t.Errorf("%v contains %v: %v", p, b, got)
				}
			}
		}
	}
	if x := toPrefix(netip.MustParsePrefix("::/0")); x.mask != (addr{}) {
		t.Errorf("%+v", x)
	}
}

func TestZonesAreRefused(t *testing.T) {
	for name, edit := range map[string]func(*Config){
		"forward": func(c *Config) { c.Forwards = []Forward{{Proto: 6, Ports: PortRange{1, 1}, To: ip("fd01::5%eth0")}} },
		"mapped":  func(c *Config) { c.Forwards = []Forward{{Proto: 6, Ports: PortRange{1, 1}, To: ip("::ffff:10.1.0.5")}} },
		"source":  func(c *Config) { c.Ports[0].Sources = []netip.Prefix{netip.PrefixFrom(ip("::ffff:10.1.0.0"), 120)} },
	} {
		c := baseConfig()
		edit(&c)
		if c.Check() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

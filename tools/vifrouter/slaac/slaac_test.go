package slaac

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"barevif/pvnet/packet"
)

var (
	mac    = [6]byte{0x00, 0x16, 0x3e, 0x01, 0x02, 0x03}
	first  = netip.MustParseAddr("fe80::1")
	second = netip.MustParseAddr("fe80::2")
	now    = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
)

// message makes an advertisement, written down from RFC 4861, section 4.2.
func message(preference byte, lifetime uint16, options ...[]byte) []byte {
	b := []byte{134, 0, 0, 0, 64, preference << 3}
	b = binary.BigEndian.AppendUint16(b, lifetime)
	b = append(b, make([]byte, 8)...)
	for _, o := range options {
		b = append(b, o...)
	}
	return b
}

const (
	onLink = 0x80
	own    = 0x40
)

func prefixOption(p string, flags byte, valid, preferred uint32) []byte {
	n := netip.MustParsePrefix(p)
	b := []byte{3, 4, byte(n.Bits()), flags}
	b = binary.BigEndian.AppendUint32(b, valid)
	b = binary.BigEndian.AppendUint32(b, preferred)
	b = append(b, 0, 0, 0, 0)
	return append(b, n.Addr().AsSlice()...)
}

func mtuOption(n uint32) []byte { return binary.BigEndian.AppendUint32([]byte{5, 1, 0, 0}, n) }

func serverOption(lifetime uint32, addrs ...string) []byte {
	b := binary.BigEndian.AppendUint32([]byte{25, byte(1 + 2*len(addrs)), 0, 0}, lifetime)
	for _, a := range addrs {
		b = append(b, netip.MustParseAddr(a).AsSlice()...)
	}
	return b
}

func heard(t *testing.T, c *Client, at time.Time, from netip.Addr, m []byte) Settings {
	t.Helper()
	a, err := Parse(from, m)
	if err != nil {
		t.Fatal(err)
	}
	c.Hear(at, a)
	for i := range c.claim(at) {
		c.claims[i].state = ours // the link was asked, and nobody answered
	}
	return c.Settings(at)
}

func newClient() *Client {
	c := new(Client)
	c.Reset(mac)
	return c
}

func TestAnAdvertisementMakesAddressRouterServersAndMTU(t *testing.T) {
	s := heard(t, newClient(), now, first, message(0, 1800, []byte{1, 1, 2, 0, 0, 0, 0, 1}, mtuOption(1400),
		prefixOption("2001:db8:1::/64", onLink|own, 7200, 3600), prefixOption("2001:db8:2::/64", own, 600, 300),
		prefixOption("2001:db8:3::/56", onLink, 500, 500), serverOption(900, "2001:db8::53", "2001:db8::54")))
	until := func(s int) time.Time { return now.Add(time.Duration(s) * time.Second) }
	if len(s.Addrs) != 2 || s.Addrs[0] != (Address{netip.MustParsePrefix("2001:db8:1::216:3eff:fe01:203/64"), until(7200)}) ||
		s.Addrs[1] != (Address{netip.MustParsePrefix("2001:db8:2::216:3eff:fe01:203/128"), until(600)}) {
		t.Errorf("%v", s.Addrs)
	}
	if len(s.OnLink) != 1 || s.OnLink[0] != netip.MustParsePrefix("2001:db8:3::/56") || s.Router != first || s.MTU != 1400 ||
		len(s.DNS) != 2 || s.DNS[0] != netip.MustParseAddr("2001:db8::53") || s.Next != until(300) {
		t.Errorf("%+v", s)
	}
}

// Everything ends at its time, and Next says when.
func TestWhatWasAnnouncedEnds(t *testing.T) {
	c := newClient()
	s := heard(t, c, now, first, message(0, 100, prefixOption("2001:db8:1::/64", onLink|own, 300, 200), serverOption(400, "2001:db8::53")))
	var ends []int
	for !s.Next.IsZero() {
		ends = append(ends, int(s.Next.Sub(now)/time.Second))
		s = c.Settings(s.Next)
		switch at := ends[len(ends)-1]; {
		case s.Router.IsValid() == (at >= 100), (len(s.Addrs) == 1) == (at >= 300), (len(s.DNS) == 1) == (at >= 400):
			t.Errorf("after %d s: %+v", at, s)
		}
	}
	if len(ends) != 4 || ends[0] != 100 || ends[1] != 200 || ends[2] != 300 || ends[3] != 400 {
		t.Errorf("%v", ends)
	}
	// A lifetime without end has none.
	s = heard(t, c, now, first, message(0, 0, prefixOption("2001:db8:1::/64", own, 0xffffffff, 0xffffffff)))
	if s = c.Settings(now.AddDate(100, 0, 0)); len(s.Addrs) != 1 || s.Router.IsValid() {
		t.Errorf("%+v", s)
	}
}

func TestRoutersGoAndOthersTakeOver(t *testing.T) {
	c := newClient()
	heard(t, c, now, first, message(0, 1800))
	if s := heard(t, c, now, second, message(0, 1800, mtuOption(1300))); s.Router != first || s.MTU != 1300 {
		t.Errorf("the MTU of the link, which its other router says: %+v", s)
	}
	if s := heard(t, c, now, second, message(1, 1800)); s.Router != second || s.MTU != 1300 {
		t.Errorf("a router of high preference: %+v", s)
	}
	if s := heard(t, c, now, second, message(3, 1800)); s.Router != first || s.MTU != 1300 {
		t.Errorf("a router of low preference: %+v", s)
	}
	if s := heard(t, c, now, first, message(0, 1800, mtuOption(1350))); s.MTU != 1350 {
		t.Errorf("the router says an MTU itself: %+v", s)
	}
	if s := heard(t, c, now, second, message(3, 1800, mtuOption(1300))); s.Router != first || s.MTU != 1350 {
		t.Errorf("another router says another MTU: %+v", s)
	}
	if s := heard(t, c, now, first, message(0, 0)); s.Router != second {
		t.Errorf("a router that goes: %+v", s)
	}
	// The link's MTU is not a router's, and does not end with the last one.
	if s := c.Settings(now.Add(1801 * time.Second)); s.Router.IsValid() || s.MTU != 1300 {
		t.Errorf("the last router is over: %+v", s)
	}
	if s := heard(t, c, now.Add(1802*time.Second), second, message(0, 0, mtuOption(1400))); s.Router.IsValid() || s.MTU != 1400 {
		t.Errorf("one that is no default router says the MTU: %+v", s)
	}
	if c.Reset(mac); c.Settings(now).MTU != 0 {
		t.Error("the MTU of another link")
	}
}

// A forged advertisement cannot end an address at once (RFC 4862, section 5.5.3), but one may
// deprecate it, and it then comes behind others.
func TestAnAddressIsNotEndedAtOnce(t *testing.T) {
	c := newClient()
	heard(t, c, now, first, message(0, 1800, prefixOption("2001:db8:1::/64", onLink|own, 86400, 86400), prefixOption("2001:db8:2::/64", onLink|own, 86400, 86400)))
	s := heard(t, c, now, second, message(0, 0, prefixOption("2001:db8:1::/64", onLink|own, 0, 0)))
	if len(s.Addrs) != 2 || s.Addrs[1].Prefix.Addr() != packet.EUI64(netip.MustParsePrefix("2001:db8:1::/64"), mac) || s.Addrs[1].Until != now.Add(2*time.Hour) {
		t.Errorf("%v", s.Addrs)
	}
	// What has less left than that keeps it.
	later := now.Add(time.Hour)
	if s = heard(t, c, later, second, message(0, 0, prefixOption("2001:db8:1::/64", onLink|own, 60, 60))); s.Addrs[1].Until != now.Add(2*time.Hour) && s.Addrs[0].Until != now.Add(2*time.Hour) {
		t.Errorf("%v", s.Addrs)
	}
	// It may be made longer again, and a name server and a prefix of the link end at once.
	if s = heard(t, c, later, first, message(0, 1800, prefixOption("2001:db8:1::/64", onLink|own, 90000, 90000))); s.Addrs[0].Until != later.Add(90000*time.Second) {
		t.Errorf("%v", s.Addrs)
	}
	heard(t, c, later, first, message(0, 1800, serverOption(60, "2001:db8::53"), prefixOption("2001:db8:9::/64", onLink, 60, 60)))
	if s = heard(t, c, later, first, message(0, 1800, serverOption(0, "2001:db8::53"), prefixOption("2001:db8:9::/64", onLink, 0, 0))); len(s.DNS)+len(s.OnLink) != 0 {
		t.Errorf("%+v", s)
	}
}

func TestWhatCannotBeIsLeftOut(t *testing.T) {
	for what, o := range map[string][]byte{
		"a link-local prefix":             prefixOption("fe80::/64", onLink|own, 600, 600),
		"a multicast prefix":              prefixOption("ff05::/64", onLink|own, 600, 600),
		"the loopback":                    prefixOption("::1/128", onLink, 600, 600),
		"everything":                      prefixOption("::/0", onLink|own, 600, 600),
		"IPv4":                            prefixOption("::ffff:192.0.2.0/120", onLink, 600, 600),
		"a link that is too large":        prefixOption("2001::/16", onLink, 600, 600),
		"no 64 bits":                      prefixOption("2001:db8::/65", own, 600, 600),
		"nothing to do with it":           prefixOption("2001:db8::/64", 0, 600, 600),
		"preferred for longer than valid": prefixOption("2001:db8::/64", onLink|own, 600, 601),
		"not valid":                       prefixOption("2001:db8::/64", onLink|own, 0, 0),
		"an MTU that is too small":        mtuOption(1279),
		"an MTU that is too large":        mtuOption(1 << 20),
		"a server on the link":            serverOption(600, "fe80::53"),
		"an unknown option":               {99, 1, 0, 0, 0, 0, 0, 0},
	} {
		if s := heard(t, newClient(), now, first, message(0, 1800, o)); len(s.Addrs)+len(s.OnLink)+len(s.DNS)+s.MTU != 0 || s.Next != now.Add(1800*time.Second) {
			t.Errorf("%s: %+v", what, s)
		}
	}
	bits := prefixOption("2001:db8::/64", onLink|own, 600, 600)
	bits[2] = 129
	if s := heard(t, newClient(), now, first, message(0, 0, bits)); len(s.Addrs) != 0 {
		t.Errorf("a length of 129: %+v", s)
	}
}

func TestWhatIsNoAdvertisementIsRefused(t *testing.T) {
	good := message(0, 1800, prefixOption("2001:db8::/64", onLink|own, 600, 600))
	for what, c := range map[string]struct {
		from    netip.Addr
		message []byte
	}{
		"a global source":                 {netip.MustParseAddr("2001:db8::1"), good},
		"an IPv4 source":                  {netip.MustParseAddr("169.254.1.1"), good},
		"no source":                       {netip.IPv6Unspecified(), good},
		"nothing":                         {first, nil},
		"too short":                       {first, good[:15]},
		"another type":                    {first, append([]byte{133}, good[1:]...)},
		"another code":                    {first, append([]byte{134, 1}, good[2:]...)},
		"a server that is a group":        {first, message(0, 1800, serverOption(600, "ff02::53"))},
		"half an option":                  {first, good[:len(good)-1]},
		"no length":                       {first, message(0, 0, make([]byte, 8))},
		"a server option that ends early": {first, message(0, 0, []byte{25, 2, 0, 0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0, 0})},
	} {
		if a, err := Parse(c.from, c.message); err == nil {
			t.Errorf("%s: %+v", what, a)
		}
	}
}

// However many stations announce however much, what is kept has a bound, and what was there first
// stays.
func TestWhatIsKeptHasABound(t *testing.T) {
	c := newClient()
	heard(t, c, now, first, message(0, 1800, prefixOption("2001:db8::/64", onLink|own, 600, 600), serverOption(600, "2001:db8::53")))
	for i := range 1000 {
		from := netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 13: 1, 14: byte(i >> 8), 15: byte(i)})
		p := netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0x20, 1: 0x02, 4: byte(i >> 8), 5: byte(i)}), 64).String()
		s := heard(t, c, now, from, message(0, 1800, prefixOption(p, onLink|own, 600, 600), prefixOption(strings.Replace(p, "/64", "/63", 1), onLink, 600, 600),
			serverOption(600, strings.TrimSuffix(p, "/64"))))
		if s.Router != first || len(s.Addrs)+len(s.OnLink) > MaxPrefixes || len(s.DNS) > MaxServers || len(c.routers) > MaxRouters || s.Addrs[0].Prefix.Masked() != netip.MustParsePrefix("2001:db8::/64") {
			t.Fatalf("after %d: %+v", i, s)
		}
	}
	// One message is bounded, too.
	var many [][]byte
	for i := range 40 {
		many = append(many, prefixOption(fmt.Sprintf("2001:db8:%x::/64", i), onLink|own, 600, 600), serverOption(600, fmt.Sprintf("2001:db8::%x", i)))
	}
	if s := heard(t, newClient(), now, first, message(0, 1800, many...)); len(s.Addrs) != MaxPrefixes || len(s.DNS) != MaxServers {
		t.Errorf("%+v", s)
	}
	// When that is over there is room for others.
	if s := heard(t, c, now.Add(601*time.Second), second, message(0, 1800, prefixOption("2001:db8:7::/64", own, 600, 600))); len(s.Addrs) != 1 {
		t.Errorf("%+v", s)
	}
}

func TestSolicitationIsOne(t *testing.T) {
	b := Solicit([]byte{7}, mac)[1:]
	h, ok := packet.Parse(b, len(b))
	if !ok || h.Version != 6 || h.Proto != 58 || h.End != len(b) || b[h.L3+7] != 255 || b[h.L4] != 133 || b[h.L4+1] != 0 || len(b)-h.L4 != 8 {
		t.Fatalf("%+v, % x", h, b)
	}
	if packet.Fold(packet.Add(uint64(h.Pseudo(b, len(b)-h.L4)), b[h.L4:])) != 0xffff {
		t.Error("the checksum is wrong")
	}
	if [6]byte(b[:6]) != [6]byte{0x33, 0x33, 0, 0, 0, 2} || [6]byte(b[6:12]) != mac || netip.AddrFrom16([16]byte(b[h.L3+24:h.L3+40])) != netip.MustParseAddr("ff02::2") {
		t.Errorf("% x", b)
	}
}

func FuzzAdvertisement(f *testing.F) {
	f.Add(message(0, 1800, mtuOption(1400), prefixOption("2001:db8:1::/64", onLink|own, 7200, 3600), serverOption(900, "2001:db8::53", "2001:db8::54")))
	f.Add(message(3, 0, []byte{24, 2, 0, 0, 0, 0, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8}, []byte{31, 2, 0, 0, 0, 0, 0, 9, 3, 'a', 'b', 'c', 0, 0, 0, 0}))
	f.Fuzz(func(t *testing.T, m []byte) {
		a, err := Parse(first, m)
		if err != nil {
			return
		}
		c := newClient()
		for i := range 3 {
			c.Hear(now.Add(time.Duration(i)*time.Hour), a)
		}
		s := c.Settings(now.Add(2 * time.Hour))
		for _, one := range s.Addrs {
			if !host(one.Prefix.Addr()) || one.Prefix.Bits() != 64 && one.Prefix.Bits() != 128 || !one.Until.After(now) {
				t.Errorf("%+v", one)
			}
		}
		if s.MTU != 0 && (s.MTU < minMTU || s.MTU > 65535) || len(s.Addrs)+len(s.OnLink) > MaxPrefixes || len(s.DNS) > MaxServers || s.Router.IsValid() && s.Router != first {
			t.Errorf("%+v", s)
		}
	})
}

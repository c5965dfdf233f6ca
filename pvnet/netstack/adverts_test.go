package netstack

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"testing"
	"time"

	"barevif/pvnet/netstack/dhcp"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/faketime"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// A site is a network in virtual time, whose link the test is.
type site struct {
	*network
	t     testing.TB
	link  *channel.Endpoint
	clock *faketime.ManualClock
}

var (
	routerIP  = netip.MustParseAddr("fe80::1")
	allNodes  = netip.MustParseAddr("ff02::1")
	slaacAddr = netip.MustParsePrefix("2001:db8::216:3eff:fe00:1/64") // of frontMAC
)

func newSite(t testing.TB, cfg Config) *site {
	t.Helper()
	s := &site{t: t, link: channel.New(256, 1500, tcpip.LinkAddress(frontMAC[:])), clock: faketime.NewManualClock()}
	var err error
	if s.network, err = newNetwork(s.clock); err != nil {
		t.Fatal(err)
	}
	if err := s.addCard(&cfg, s.link, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.net.Destroy()
		s.link.Close()
	})
	return s
}

// pass lets time pass, and applies what has changed.
func (s *site) pass(d time.Duration) Settings {
	s.clock.Advance(d)
	s.apply()
	now, _ := s.settings()
	return now
}

// icmpPacket makes an ICMPv6 packet as routers and neighbours send it.
func icmpPacket(from, to netip.Addr, typ header.ICMPv6Type, body []byte) []byte {
	b := make([]byte, header.IPv6MinimumSize+4+len(body))
	header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(4 + len(body)), TransportProtocol: header.ICMPv6ProtocolNumber,
		HopLimit: header.NDPHopLimit, SrcAddr: toStack(from), DstAddr: toStack(to)})
	m := header.ICMPv6(b[header.IPv6MinimumSize:])
	copy(m[4:], body)
	m.SetType(typ)
	m.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: m, Src: toStack(from), Dst: toStack(to)}))
	return b
}

// hear makes the stack hear a packet.
func (s *site) hear(b []byte) {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
	defer p.DecRef()
	s.link.InjectInbound(header.IPv6ProtocolNumber, p)
}

// advert returns the body of a router advertisement.
func advert(router time.Duration, options ...[]byte) []byte {
	b := make([]byte, 12)
	b[0] = 64
	binary.BigEndian.PutUint16(b[2:], uint16(router/time.Second))
	return append(b, slices.Concat(options...)...)
}

// prefixOption is the option of RFC 4861, section 4.6.2, for addresses and on the link.
func prefixOption(p string, valid time.Duration) []byte {
	prefix := netip.MustParsePrefix(p)
	b := append([]byte{3, 4, byte(prefix.Bits()), 0xc0}, make([]byte, 28)...)
	binary.BigEndian.PutUint32(b[4:], uint32(valid/time.Second))
	binary.BigEndian.PutUint32(b[8:], uint32(valid/time.Second))
	copy(b[16:], prefix.Addr().AsSlice())
	return b
}

// serversOption is the option of RFC 8106, section 5.1.
func serversOption(lifetime time.Duration, servers ...netip.Addr) []byte {
	b := []byte{25, byte(1 + 2*len(servers)), 0, 0}
	b = binary.BigEndian.AppendUint32(b, uint32(lifetime/time.Second))
	for _, a := range servers {
		b = append(b, a.AsSlice()...)
	}
	return b
}

func (s *site) advertise(from netip.Addr, body []byte) {
	s.hear(icmpPacket(from, allNodes, header.ICMPv6RouterAdvert, body))
}

func TestRoutersGiveAddressesRoutesAndServers(t *testing.T) {
	s := newSite(t, Config{RA: true})
	dns := netip.MustParseAddr("2001:db8::53")
	s.advertise(routerIP, advert(30*time.Minute, prefixOption("2001:db8::/64", 4*time.Hour), serversOption(time.Hour, dns)))
	now := s.pass(0)
	if len(now.Addrs) != 0 {
		t.Errorf("%v in use before it was checked for duplicates", now.Addrs)
	}
	route := Route{To: netip.MustParsePrefix("::/0"), Via: routerIP}
	now = s.pass(time.Second)
	if len(now.Addrs) != 1 || now.Addrs[0] != (Address{slaacAddr, Announced}) || !slices.Equal(now.Routes, []Route{route}) || !slices.Equal(now.DNS, []netip.Addr{dns}) {
		t.Fatalf("%+v", now)
	}
	find := func(to string) (via tcpip.Address, ok bool) {
		r, err := s.net.FindRoute(0, tcpip.Address{}, toStack(netip.MustParseAddr(to)), header.IPv6ProtocolNumber, false)
		if err != nil {
			return via, false
		}
		defer r.Release()
		return r.NextHop(), true
	}
	if via, ok := find("2001:db8:1::1"); !ok || fromStack(via) != routerIP {
		t.Errorf("to another network by %v, %v", via, ok)
	}
	if via, ok := find("2001:db8::9"); !ok || fromStack(via) == routerIP {
		t.Errorf("to a neighbour by %v, %v", via, ok)
	}
	if now = s.pass(30 * time.Minute); len(now.Routes) != 0 || len(now.Addrs) != 1 || len(now.DNS) != 1 {
		t.Errorf("the router's lifetime is over: %+v", now)
	}
	if _, ok := find("2001:db8:1::1"); ok {
		t.Error("the route is still used")
	}
	if now = s.pass(30 * time.Minute); len(now.DNS) != 0 {
		t.Errorf("the name server's lifetime is over: %+v", now)
	}
	if now = s.pass(3 * time.Hour); len(now.Addrs) != 0 {
		t.Errorf("the prefix's lifetime is over: %+v", now)
	}
	if _, ok := find("2001:db8::9"); ok {
		t.Error("its network is still on the link")
	}
}

// An address that another station has is not used.
func TestAnnouncedAddressIsCheckedForDuplicates(t *testing.T) {
	s := newSite(t, Config{RA: true})
	s.advertise(routerIP, advert(time.Hour, prefixOption("2001:db8::/64", time.Hour)))
	body := append([]byte{0x20, 0, 0, 0}, slaacAddr.Addr().AsSlice()...)
	body = append(body, 2, 1, 2, 0, 0, 0, 0, 9)
	s.hear(icmpPacket(slaacAddr.Addr(), allNodes, header.ICMPv6NeighborAdvert, body))
	if now := s.pass(time.Minute); len(now.Addrs) != 0 {
		t.Errorf("%+v", now)
	}
}

// The caller's addresses work at once, and with a router's.
func TestStaticAddressBesideAnnouncedOnes(t *testing.T) {
	own := netip.MustParsePrefix("2001:db8:7::7/64")
	s := newSite(t, Config{RA: true, Addr: own})
	if s.net.CheckLocalAddress(0, header.IPv6ProtocolNumber, toStack(own.Addr())) != nic {
		t.Error("the static address is not there at once")
	}
	s.advertise(routerIP, advert(time.Hour, prefixOption("2001:db8::/64", time.Hour)))
	if now := s.pass(time.Second); len(now.Addrs) != 2 || now.Addrs[0] != (Address{own, Static}) || now.Addrs[1].Origin != Announced {
		t.Errorf("%+v", now)
	}
}

// Of several routers the preferred is first, then the one that came last.
func TestRoutersArePreferred(t *testing.T) {
	s := newSite(t, Config{RA: true})
	body := func(preference byte) []byte {
		b := advert(time.Hour)
		b[1] = preference << 3
		return b
	}
	const high, medium, low = 1, 0, 3
	router := func(n byte) netip.Addr { a := routerIP.As16(); a[15] = n; return netip.AddrFrom16(a) }
	for i, p := range []byte{medium, low, high, medium} {
		s.advertise(router(byte(i+1)), body(p))
	}
	var got []byte
	for _, r := range s.pass(0).Routes {
		a := r.Via.As16()
		got = append(got, a[15])
	}
	if !slices.Equal(got, []byte{3, 4, 1, 2}) {
		t.Errorf("%v", got)
	}
}

// Whatever routers advertise, it is bounded, and what no host could use is left out.
func TestAdvertisementsAreBounded(t *testing.T) {
	s := newSite(t, Config{RA: true})
	var names []netip.Addr
	for i := range byte(60) {
		names = append(names, netip.AddrFrom16([16]byte{0x20, 1, 15: i + 1}))
	}
	bad := netip.IPv6Loopback()
	for i := range 100 {
		a := routerIP.As16()
		a[14] = byte(i)
		p := netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 0, 0, byte(i)}), 64)
		s.advertise(netip.AddrFrom16(a), advert(time.Hour, prefixOption(p.String(), 0xffffffff*time.Second),
			serversOption(time.Hour, bad), serversOption(0xffffffff*time.Second, names...)))
	}
	now := s.pass(time.Minute)
	if len(now.Addrs) != 10 || len(now.Routes) != 10 || len(now.DNS) != dhcp.MaxServers || slices.Contains(now.DNS, bad) {
		t.Errorf("%d addresses, %d routes, servers %v", len(now.Addrs), len(now.Routes), now.DNS)
	}
	if n := len(s.net.GetRouteTable()); n > 25 {
		t.Errorf("%d routes", n)
	}
	// A server whose time a router ends makes room for another.
	s.advertise(routerIP, advert(0, serversOption(0, now.DNS...), serversOption(time.Hour, names[59])))
	if now = s.pass(0); !slices.Equal(now.DNS, names[59:]) {
		t.Error(now.DNS)
	}
}

// Routers are asked three times, unless one answers.
func TestRoutersAreSolicited(t *testing.T) {
	for _, answered := range []bool{false, true} {
		s := newSite(t, Config{RA: true})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		done := make(chan struct{})
		asked := make(chan []byte, 16)
		go func() {
			for p := s.link.ReadContext(ctx); p != nil; p = s.link.ReadContext(ctx) {
				b := p.ToView().AsSlice()
				if m := header.IPv6(b); m.TransportProtocol() == header.ICMPv6ProtocolNumber && header.ICMPv6(m.Payload()).Type() == header.ICMPv6RouterSolicit {
					asked <- slices.Clone(b)
				}
				p.DecRef()
			}
		}()
		s.clock.Advance(time.Second) // the link-local address is ours then
		go func() {
			defer close(done)
			s.solicit(ctx, tcpip.LinkAddress(frontMAC[:]))
		}()
		first := header.IPv6(<-asked)
		if from := fromStack(first.SourceAddress()); from != netip.MustParseAddr("fe80::216:3eff:fe00:1") || first.HopLimit() != 255 ||
			fromStack(first.DestinationAddress()) != netip.MustParseAddr("ff02::2") || len(first.Payload()) != 16 {
			t.Errorf("%x", first)
		}
		n := 1
		if answered {
			s.advertise(routerIP, advert(time.Hour))
		}
		for waiting := true; waiting; {
			select {
			case <-asked:
				n++
			case <-done:
				waiting = false
			default:
				s.clock.Advance(100 * time.Millisecond)
				time.Sleep(time.Millisecond) // for goroutines that run in real time
			}
		}
		if want := map[bool]int{false: 3, true: 1}[answered]; n != want {
			t.Errorf("answered=%v: asked %d times", answered, n)
		}
	}
}

// A card with another MAC gets other addresses of the routers' prefixes.
func TestAnnouncedAddressesFollowTheMAC(t *testing.T) {
	own := netip.MustParsePrefix("2001:db8:7::7/64")
	s := newSite(t, Config{RA: true, Addr: own})
	body := advert(time.Hour, prefixOption("2001:db8::/64", time.Hour))
	s.advertise(routerIP, body)
	s.pass(time.Second)
	old, other := s.link.LinkAddress(), tcpip.LinkAddress("\x00\x16\x3e\x07\x07\x07")
	s.link.SetLinkAddress(other)
	s.followMAC(old, other)
	if now := s.pass(0); len(now.Addrs) != 1 || len(now.Routes) != 0 {
		t.Errorf("before a router advertises again: %+v", now)
	}
	if s.net.CheckLocalAddress(0, header.IPv6ProtocolNumber, toStack(own.Addr())) != nic {
		t.Error("the static address is not there at once")
	}
	s.advertise(routerIP, body)
	now := s.pass(time.Second)
	if len(now.Addrs) != 2 || now.Addrs[1].Prefix != netip.MustParsePrefix("2001:db8::216:3eff:fe07:707/64") || len(now.Routes) != 1 {
		t.Errorf("%+v", now)
	}
	if s.ra.ownLink != netip.MustParseAddr("fe80::216:3eff:fe07:707") {
		t.Error("link-local: ", s.ra.ownLink)
	}
}

// Whatever is in an advertisement, the stack goes on, and its settings stay bounded.
func FuzzAdvertisement(f *testing.F) {
	f.Add(advert(time.Hour, prefixOption("2001:db8::/64", time.Hour), serversOption(time.Hour, routerIP)), uint16(10))
	f.Add(advert(time.Hour, []byte{24, 2, 64, 0, 0, 0, 1, 0, 0x20, 1, 0xd, 0xb8, 0, 0, 0, 0}), uint16(1))
	f.Add(advert(0, []byte{31, 2, 0, 0, 0, 0, 1, 0, 3, 'l', 'a', 'n', 0, 0, 0, 0}), uint16(4000))
	f.Add(advert(time.Hour, []byte{3, 0}), uint16(0))
	f.Fuzz(func(t *testing.T, body []byte, seconds uint16) {
		s := newSite(t, Config{RA: true})
		s.advertise(routerIP, body[:min(len(body), 1400)])
		for range 2 {
			now := s.pass(time.Duration(seconds) * time.Second)
			if len(now.Addrs) > 10 || len(now.Routes) > 10 || len(now.DNS) > dhcp.MaxServers {
				t.Fatalf("%+v", now)
			}
		}
	})
}

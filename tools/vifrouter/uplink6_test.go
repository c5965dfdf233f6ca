package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/tools/vifrouter/slaac"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// announced is standard with an uplink that lives on announcements, and a guest's address is
// translated.
var announced = strings.Replace(standard, "uplink ipv6 2001:db8::2/64 via 2001:db8::1", "uplink ipv6 auto\nuplink nat ipv4 ipv6", 1)

var worldLink = netip.MustParseAddr("fe80::99")

// toStack is the address as gVisor has it.
func toStack(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

// routerOfTheWorld gives the world's TCP/IP the link-local address of a router.
func (s *site) routerOfTheWorld() {
	s.Helper()
	err := s.world.GVisor().AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol: ipv6.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: toStack(worldLink), PrefixLen: 64},
	}, stack.AddressProperties{})
	if err != nil {
		s.Fatal(err)
	}
}

// discovery sends a message of neighbour discovery from the world; body is what follows its checksum.
func (s *site) discovery(src, dst netip.Addr, typ header.ICMPv6Type, body []byte) {
	s.Helper()
	size := header.ICMPv6HeaderSize + len(body)
	b := make([]byte, header.IPv6MinimumSize+size)
	header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(size), TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: header.NDPHopLimit, SrcAddr: toStack(src), DstAddr: toStack(dst)})
	icmp := header.ICMPv6(b[header.IPv6MinimumSize:])
	icmp.SetType(typ)
	copy(icmp.MessageBody(), body)
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: toStack(src), Dst: toStack(dst)}))
	if err := s.world.GVisor().WritePacketToRemote(1, header.EthernetAddressFromMulticastIPv6Address(toStack(dst)), ipv6.ProtocolNumber, buffer.MakeWithData(b)); err != nil {
		s.Error(err)
	}
}

var allNodes = netip.MustParseAddr("ff02::1")

// announce sends a router advertisement from the world, with gVisor's own encoding of its parts.
func (s *site) announce(lifetime uint16, options ...header.NDPOption) {
	s.Helper()
	s.announceMTU(lifetime, 0, options...)
}

// announceMTU also announces an MTU, unless it is 0: gVisor has no option for it.
func (s *site) announceMTU(lifetime uint16, mtu uint32, options ...header.NDPOption) {
	s.Helper()
	opts := header.NDPOptionsSerializer(options)
	ra := header.NDPRouterAdvert(make([]byte, header.NDPRAMinimumSize+opts.Length()))
	binary.BigEndian.PutUint16(ra[2:], lifetime)
	ra.Options().Serialize(opts)
	if mtu != 0 {
		ra = binary.BigEndian.AppendUint32(append(ra, 5, 1, 0, 0), mtu)
	}
	s.discovery(worldLink, allNodes, header.ICMPv6RouterAdvert, ra)
}

// prefixInformation announces a /64, for a day and an hour.
func prefixInformation(p string) header.NDPOption {
	b := make([]byte, 30)
	b[0], b[1] = 64, 0xc0
	binary.BigEndian.PutUint32(b[2:], 86400)
	binary.BigEndian.PutUint32(b[6:], 3600)
	a := netip.MustParseAddr(p).As16()
	copy(b[14:], a[:])
	return header.NDPPrefixInformation(b)
}

func nameServer(lifetime uint32, addr netip.Addr) header.NDPOption {
	b := make([]byte, 6)
	binary.BigEndian.PutUint32(b[2:], lifetime)
	return header.NDPRecursiveDNSServer(append(b, addr.AsSlice()...))
}

func (s *site) auto() slaac.Settings {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	return s.d.auto
}

func TestUplinkLivesOnAnnouncements(t *testing.T) {
	s := newSite(t, strings.Replace(announced, "dns to 192.0.2.1", "dns uplink", 1))
	s.routerOfTheWorld()
	s.listenDNS(s.world, "udp6")
	s.comes("the uplink is up", func() bool { return strings.Contains(s.said.String(), "uplink vif 0: connected") })
	var own netip.Addr
	s.comes("an address, a router and a name server", func() bool {
		s.announce(1800, prefixInformation("2001:db8::"), nameServer(600, worldAddr6))
		now := s.auto()
		if len(now.Addrs) != 1 || now.Router != worldLink || !slices.Equal(now.DNS, []netip.Addr{worldAddr6}) {
			return false
		}
		own = now.Addrs[0].Prefix.Addr()
		return true
	})
	if own != netip.MustParseAddr("2001:db8::216:3eff:fe00:100") || s.auto().Addrs[0].Prefix.Bits() != 64 {
		t.Errorf("%v", own)
	}
	g, _ := s.guest(firstDom)
	s.settled(g)
	if who, err := ask(s.ctx, g, "[2001:db8::1]:80"); err != nil || who != own.String() {
		t.Errorf("the world sees %q, %v, and not %v", who, err, own)
	}
	if _, err := ask(s.ctx, g, "web.test:80"); err != nil {
		t.Errorf("by name: %v", err)
	}
	now := s.d.state().(*state).Uplink
	if !slices.ContainsFunc(now.Addresses, func(a addressState) bool { return a.From == "router" && a.Address.Addr() == own && !a.Until.IsZero() }) ||
		!slices.Contains(now.Gateways, worldLink) || !slices.Contains(now.DNS, "[2001:db8::1]:53") {
		t.Errorf("%+v", now)
	}
	// The router goes, and the address stays: the world is on the link.
	s.comes("the router goes", func() bool {
		s.announce(0, nameServer(0, worldAddr6))
		now := s.auto()
		return !now.Router.IsValid() && len(now.DNS) == 0 && len(now.Addrs) == 1
	})
	if _, err := ask(s.ctx, g, "[2001:db8::1]:80"); err != nil {
		t.Error(err)
	}
	if !strings.Contains(s.said.String(), "uplink: no IPv6 router any more") {
		t.Error("it does not say so")
	}
	// A reload to an address of the file ends it, and one back begins it again.
	static := strings.Replace(standard, "dns to 192.0.2.1", "dns off", 1)
	if err := s.d.reload(parse(t, static)); err != nil {
		t.Fatal(err)
	}
	s.d.mu.Lock()
	up := s.d.up
	s.d.mu.Unlock()
	s.comes("an announcement that nobody reads", func() bool {
		s.announce(1800, prefixInformation("2001:db8:bad::"))
		return len(up.adverts) == mostAdverts
	})
	if who, err := ask(s.ctx, g, "[2001:db8::1]:80"); err != nil || !strings.HasPrefix(who, "fd00:137:") || len(s.auto().Addrs) != 0 {
		t.Errorf("%q, %v, %+v", who, err, s.auto())
	}
	if err := s.d.reload(parse(t, announced)); err != nil {
		t.Fatal(err)
	}
	s.comes("an address again", func() bool {
		s.announce(1800, prefixInformation("2001:db8::"))
		return len(s.auto().Addrs) > 0
	})
	if now := s.auto(); len(now.Addrs) != 1 {
		t.Errorf("what was announced before counts: %+v", now)
	}
	if who, err := ask(s.ctx, g, "[2001:db8::1]:80"); err != nil || who != own.String() {
		t.Errorf("%q, %v", who, err)
	}
}

// A station of the uplink's link that announces a guest's network, or something else each time,
// takes nothing from guests, and the router's configuration changes once a second at most.
func TestAStationThatAnnouncesWhatItLikes(t *testing.T) {
	s := newSite(t, announced)
	s.routerOfTheWorld()
	g, _ := s.guest(firstDom)
	s.settled(g)
	s.comes("a router, and no network of guests", func() bool {
		s.announce(1800, prefixInformation("fd00:137:0:7::"))
		return s.auto().Router == worldLink && strings.Contains(s.said.String(), "is left out, since it is a network of guests")
	})
	if n := len(s.auto().Addrs); n != 0 {
		t.Errorf("%+v", s.auto())
	}
	began := time.Now()
	for i := range 300 {
		s.announce(uint16(i%2)*1800, prefixInformation(fmt.Sprintf("2001:db8:%x::", i+1)), nameServer(600, netip.MustParseAddr(fmt.Sprintf("2001:db8::%x", i+1))))
	}
	s.comes("it has read some of it", func() bool { return len(s.auto().Addrs) > 0 })
	if now := s.auto(); len(now.Addrs) > slaac.MaxPrefixes || len(now.DNS) > slaac.MaxServers {
		t.Errorf("%+v", now)
	}
	changes := strings.Count(s.said.String(), "uplink: IPv6 router ") + strings.Count(s.said.String(), "uplink: no IPv6 router")
	if most := int(time.Since(began)/leastChange) + 3; changes > most {
		t.Errorf("%d changes of the router, at most %d are due", changes, most)
	}
	if n := strings.Count(s.said.String(), "is left out, since"); n != 1 {
		t.Errorf("%d lines about one prefix", n)
	}
	ctx, cancel := context.WithTimeout(s.ctx, limit)
	defer cancel()
	if _, err := ask(ctx, g, "192.0.2.1:80"); err != nil {
		t.Error(err)
	}
	if _, err := g.Ping(ctx, netip.MustParseAddr("fd00:137::1")); err != nil {
		t.Error(err)
	}
}

// A station that announces a network to which the file has a route, and itself as a router beside that of the
// file, neither takes the file's routes nor makes the core refuse the rest.
func TestAnnouncementsBesideRoutesOfTheFile(t *testing.T) {
	s := newSite(t, announced+"route ::/0 via fe80::9\nroute 2001:db8:5::/64 via fe80::9\n")
	s.routerOfTheWorld()
	s.comes("addresses of both prefixes, and a router", func() bool {
		s.announce(1800, prefixInformation("2001:db8:5::"), prefixInformation("2001:db8::"))
		return s.auto().Router == worldLink && s.has(netip.MustParseAddr("2001:db8:5::216:3eff:fe00:100")) && s.has(netip.MustParseAddr("2001:db8::216:3eff:fe00:100"))
	})
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	vias := map[string]string{}
	for _, r := range s.d.applied.Routes {
		vias[r.Prefix.String()] = r.Via.String()
	}
	if vias["::/0"] != "fe80::9" {
		t.Errorf("the router to all other networks is %q, not that of the file", vias["::/0"])
	}
}

// has reports whether the uplink's port in the core has an address.
func (s *site) has(a netip.Addr) bool {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	for _, p := range s.d.applied.Ports {
		if p.ID == uplinkPort && slices.ContainsFunc(p.Addrs, func(x netip.Prefix) bool { return x.Addr() == a }) {
			return true
		}
	}
	return false
}

// An address that gVisor's stack has at the uplink, or that a station there asks for at the same time,
// is not used: the log says so once and what to do, and so do status and the counters.
func TestAnAddressOfAnotherStationIsNotUsed(t *testing.T) {
	s := newSite(t, announced)
	s.routerOfTheWorld()
	s.comes("the uplink is up", func() bool { return strings.Contains(s.said.String(), "uplink vif 0: connected") })
	theirs, wanted, free := netip.MustParseAddr("2001:db8:1::216:3eff:fe00:100"), netip.MustParseAddr("2001:db8:2::216:3eff:fe00:100"), netip.MustParseAddr("2001:db8::216:3eff:fe00:100")
	err := s.world.GVisor().AddProtocolAddress(1, tcpip.ProtocolAddress{
		Protocol: ipv6.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: toStack(theirs), PrefixLen: 64},
	}, stack.AddressProperties{})
	if err != nil {
		t.Fatal(err)
	}
	group := netip.MustParseAddr("ff02::1:ff00:100")
	taken := func() []takenState { return s.d.state().(*state).Uplink.Taken }
	s.comes("one address, and two that are taken", func() bool {
		s.announce(1800, prefixInformation("2001:db8:1::"), prefixInformation("2001:db8:2::"), prefixInformation("2001:db8::"))
		s.discovery(netip.IPv6Unspecified(), group, header.ICMPv6NeighborSolicit, append(make([]byte, 4), wanted.AsSlice()...))
		if s.has(theirs) || s.has(wanted) {
			t.Fatal("an address of another station is used")
		}
		return s.has(free) && len(taken()) == 2
	})
	world := s.d.up.dev.MAC() // read by this test alone
	for _, a := range taken() {
		if a.Address != theirs && a.Address != wanted || a.Station == world.String() || len(a.Station) != 17 {
			t.Errorf("%+v", a)
		}
	}
	if n := strings.Count(s.said.String(), "is another station's and is not used: give the uplink's vif another MAC"); n != 2 {
		t.Errorf("%d lines about two addresses", n)
	}
	var b bytes.Buffer
	if err := s.d.writeMetrics(&b); err != nil || !strings.Contains(b.String(), "\nvifrouter_uplink_duplicate_addresses_total 2\n") {
		t.Errorf("%v\n%s", err, &b)
	}
	var text strings.Builder
	(&shown{state: *s.d.state().(*state)}).write(&text, time.Now())
	if !strings.Contains(text.String(), "address 2001:db8:1:0:216:3eff:fe00:100 is not used: station ") {
		t.Errorf("%s", &text)
	}
	// The one that is free is used, and what anybody says of it later changes nothing.
	g, _ := s.guest(firstDom)
	s.settled(g)
	s.discovery(free, allNodes, header.ICMPv6NeighborAdvert, append([]byte{0x20, 0, 0, 0}, free.AsSlice()...))
	if who, err := ask(s.ctx, g, "[2001:db8::1]:80"); err != nil || who != free.String() {
		t.Errorf("the world sees %q, %v", who, err)
	}
}

// A link-local address that another station has means that its MAC is the uplink's: no address is
// used.
func TestAnotherStationWithTheUplinksMAC(t *testing.T) {
	s := newSite(t, announced)
	s.routerOfTheWorld()
	own := netip.MustParseAddr("fe80::216:3eff:fe00:100")
	s.comes("it is noticed", func() bool {
		s.announce(1800, prefixInformation("2001:db8::"))
		s.discovery(own, allNodes, header.ICMPv6NeighborAdvert, append([]byte{0x20, 0, 0, 0}, own.AsSlice()...))
		return len(s.d.state().(*state).Uplink.Taken) == 1 && len(s.auto().Tentative) == 0
	})
	if now := s.auto(); len(now.Addrs) != 0 || now.Taken[0].Addr != own || now.Router != worldLink {
		t.Errorf("%+v", now)
	}
}

// The MTU that routers announce is that of the whole link: of both families, with and without an address
// of theirs.
func TestTheUplinkKeepsToTheAnnouncedMTU(t *testing.T) {
	s := newSite(t, announced)
	s.routerOfTheWorld()
	mtu := func(want int) bool {
		s.d.mu.Lock()
		defer s.d.mu.Unlock()
		for _, p := range s.d.applied.Ports {
			if p.ID == uplinkPort && p.MTU == want {
				return true
			}
		}
		return false
	}
	s.comes("the MTU alone", func() bool {
		s.announceMTU(1800, 1400)
		return mtu(1400)
	})
	if now := s.d.state().(*state).Uplink; now.MTU != 1400 || len(s.auto().Addrs) != 0 {
		t.Errorf("%+v", now)
	}
	s.comes("with an address", func() bool {
		s.announceMTU(1800, 1300, prefixInformation("2001:db8::"))
		return mtu(1300) && len(s.auto().Addrs) == 1
	})
	g, _ := s.guest(firstDom)
	s.settled(g)
	for _, at := range []string{"192.0.2.1:80", "[2001:db8::1]:80"} {
		if _, err := ask(s.ctx, g, at); err != nil {
			t.Error(err)
		}
	}
	s.comes("more than the device takes", func() bool {
		s.announceMTU(1800, 9000)
		return mtu(1500)
	})
	s.comes("less again", func() bool {
		s.announceMTU(0, 1400)
		return mtu(1400)
	})
	if err := s.d.reload(parse(t, standard)); err != nil {
		t.Fatal(err)
	}
	if !mtu(1500) {
		t.Error("an announced MTU is left, without announcements")
	}
}

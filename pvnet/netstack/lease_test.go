package netstack

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"barevif/pvnet"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

var (
	leasedIP = netip.MustParseAddr("192.0.2.77")
	otherMAC = pvnet.MAC{0, 0x16, 0x3e, 7, 7, 7}
)

// A server is a DHCP server on a stack. It leases 192.0.2.77 to frontMAC, and the next address to
// any other.
type server struct {
	t  *testing.T
	on *Stack

	mu      sync.Mutex
	seen    []*dhcpv4.DHCPv4
	unicast bool // it sends to the new address, not to all
	change  func(*dhcpv4.DHCPv4)
}

func newServer(t *testing.T, on *Stack) *server {
	t.Helper()
	d := &server{t: t, on: on}
	c, err := on.ListenPacket("udp4", ":67")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		b := make([]byte, 4096)
		for {
			n, _, err := c.ReadFrom(b)
			if err != nil {
				return // the stack was closed
			}
			m, err := dhcpv4.FromBytes(b[:n])
			if err != nil {
				t.Error(err)
				continue
			}
			d.answer(m)
		}
	}()
	return d
}

func (d *server) answer(m *dhcpv4.DHCPv4) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen = append(d.seen, m)
	typ := map[dhcpv4.MessageType]dhcpv4.MessageType{
		dhcpv4.MessageTypeDiscover: dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeRequest: dhcpv4.MessageTypeAck}[m.MessageType()]
	if typ == 0 {
		return
	}
	own, addr := backIP.Addr(), leasedIP
	if m.ClientHWAddr.String() != frontMAC.String() {
		addr = addr.Next()
	}
	a, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(typ), dhcpv4.WithYourIP(addr.AsSlice()),
		dhcpv4.WithOption(dhcpv4.OptServerIdentifier(own.AsSlice())), dhcpv4.WithNetmask([]byte{255, 255, 255, 0}),
		dhcpv4.WithRouter(own.AsSlice()), dhcpv4.WithDNS(own.AsSlice()), dhcpv4.WithLeaseTime(3600),
		dhcpv4.WithGeneric(dhcpv4.OptionInterfaceMTU, binary.BigEndian.AppendUint16(nil, 1300)))
	if err != nil {
		d.t.Error(err)
		return
	}
	if d.change != nil {
		d.change(a)
	}
	to, link := broadcast4, header.EthernetBroadcastAddress
	if d.unicast {
		to, link = addr, d.linkOf(m)
	}
	b := datagram(netip.AddrPortFrom(own, dhcpServer), netip.AddrPortFrom(to, dhcpClient), a.ToBytes())
	d.on.GVisor().WritePacketToRemote(NIC, link, ipv4.ProtocolNumber, buffer.MakeWithData(b))
}

func (d *server) linkOf(m *dhcpv4.DHCPv4) tcpip.LinkAddress { return tcpip.LinkAddress(m.ClientHWAddr) }

// types lists what clients have sent.
func (d *server) types() (list []dhcpv4.MessageType) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, m := range d.seen {
		list = append(list, m.MessageType())
	}
	return list
}

func within(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

// settled waits until the settings of s are as wanted.
func settled(t *testing.T, s *Stack, ok func(Settings) bool) Settings {
	t.Helper()
	var last Settings
	for now := range s.Changes(within(t)) {
		if last = now; ok(now) {
			return now
		}
	}
	t.Fatalf("the settings stay %+v", last)
	return last
}

func TestStackLeasesItsAddress(t *testing.T) {
	for _, unicast := range []bool{false, true} {
		w := newWire(t, 1500, pvnet.Config{})
		back := newStack(t, w.Back, Config{Addr: backIP})
		newServer(t, back).unicast = unicast
		front := newStack(t, w.Front, Config{DHCP: true})
		l := listen(t, front, ":80") // before there is an address
		addr, err := front.Ready(within(t))
		if err != nil || addr != netip.PrefixFrom(leasedIP, 24) || front.Addr() != leasedIP {
			t.Fatalf("unicast=%v: %v, %v", unicast, addr, err)
		}
		now := front.Settings()
		if len(now.Routes) != 1 || now.Routes[0].Via != backIP.Addr() || !slices.Equal(now.DNS, []netip.Addr{backIP.Addr()}) || now.MTU != 1300 {
			t.Errorf("%+v", now)
		}
		// The card follows after the change of settings, which no other change follows.
		eventually(t, "the card of the lease", func() bool { return front.card.MTU() == 1300 && front.card.tap.Load() == nil })
		c, err := back.DialContext(within(t), "tcp", "192.0.2.77:80")
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if a, err := l.Accept(); err != nil {
			t.Error(err)
		} else {
			a.Close()
		}
	}
}

// The vif is plugged again: the lease is confirmed if it is the same card, and another is got for
// another card. The old address is then no longer ours.
func TestLeaseFollowsTheLinkAndTheMAC(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	back := newStack(t, w.Back, Config{Addr: backIP})
	newServer(t, back)
	front := newStack(t, w.Front, Config{DHCP: true})
	if _, err := front.Ready(within(t)); err != nil {
		t.Fatal(err)
	}

	w.Plug(frontMAC, 1500)
	back = newStack(t, w.Back, Config{Addr: backIP})
	d := newServer(t, back)
	eventually(t, "the client asks again", func() bool { return len(d.types()) > 0 })
	if got := d.types(); got[0] != dhcpv4.MessageTypeRequest || front.Addr() != leasedIP {
		t.Errorf("the same card, again: %v, %v", got, front.Addr())
	}

	w.Plug(otherMAC, 1500)
	back = newStack(t, w.Back, Config{Addr: backIP})
	newServer(t, back)
	now := settled(t, front, func(s Settings) bool { return len(s.Addrs) == 1 && s.Addrs[0].Addr() == leasedIP.Next() })
	if front.GVisor().CheckLocalAddress(0, ipv4.ProtocolNumber, toStack(leasedIP)) != 0 {
		t.Errorf("the old address is still ours: %+v", now)
	}
	if _, err := back.Ping(within(t), leasedIP.Next()); err != nil {
		t.Error(err)
	}
}

// An address that another station has is declined.
func TestLeasedAddressIsCheckedForDuplicates(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	back := newStack(t, w.Back, Config{Addr: backIP, Addrs: []netip.Prefix{netip.PrefixFrom(leasedIP, 24)}})
	d := newServer(t, back)
	front := newStack(t, w.Front, Config{DHCP: true})
	eventually(t, "the address is declined", func() bool { return slices.Contains(d.types(), dhcpv4.MessageTypeDecline) })
	if front.Addr().IsValid() {
		t.Error(front.Addr())
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := front.Ready(ctx); err == nil || err.Error() != "netstack: no address yet: no DHCP server answered: context canceled" {
		t.Error(err)
	}
}

// A lease beside an address of the caller's, and one that is the caller's already.
func TestLeaseBesideAStaticAddress(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	back := newStack(t, w.Back, Config{Addr: backIP})
	newServer(t, back)
	front := newStack(t, w.Front, Config{DHCP: true, Addr: frontIP})
	now := settled(t, front, func(s Settings) bool { return len(s.Addrs) == 2 })
	if now.Addrs[0].Origin != Static || now.Addrs[1].Origin != Leased {
		t.Errorf("%+v", now)
	}
	for _, a := range now.Addrs {
		if _, err := back.Ping(within(t), a.Addr()); err != nil {
			t.Error(a, err)
		}
	}
}

// What is no datagram of a DHCP server to a client is not for it.
func TestOnlyAServersDatagramsAreForTheClient(t *testing.T) {
	from, to := netip.AddrPortFrom(backIP.Addr(), 67), netip.AddrPortFrom(leasedIP, 68)
	good := datagram(from, to, []byte("hello"))
	if string(toClient(good)) != "hello" {
		t.Fatalf("%q", toClient(good))
	}
	for n := range good {
		if b := toClient(good[:n]); b != nil {
			t.Errorf("the first %d bytes: %q", n, b)
		}
		bad := slices.Clone(good)
		bad[n] ^= 0x40
		if b := toClient(bad); b != nil {
			t.Errorf("byte %d is wrong: %q", n, b)
		}
	}
	for _, p := range [][2]uint16{{66, 68}, {67, 69}} {
		if toClient(datagram(netip.AddrPortFrom(backIP.Addr(), p[0]), netip.AddrPortFrom(leasedIP, p[1]), []byte("hello"))) != nil {
			t.Error(p)
		}
	}
	fragment := slices.Clone(good)
	ip := header.IPv4(fragment)
	ip.SetFlagsFragmentOffset(header.IPv4FlagMoreFragments, 0)
	ip.SetChecksum(0)
	ip.SetChecksum(^ip.CalculateChecksum())
	long := slices.Clone(good)
	header.UDP(long[20:]).SetLength(100)
	for _, b := range [][]byte{fragment, long} {
		if toClient(b) != nil {
			t.Errorf("%x", b)
		}
	}
}

// An advertisement reaches a stack on a vif, in real time.
func TestStackFollowsRouterAdvertisements(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	router := newStack(t, w.Back, Config{Addr: netip.MustParsePrefix("2001:db8::1/64"), Addrs: []netip.Prefix{netip.MustParsePrefix("fe80::1/64")}})
	front := newStack(t, w.Front, Config{RA: true})
	l := listen(t, front, ":80")
	body := advert(time.Hour, prefixOption("2001:db8::/64", time.Hour))
	b := icmpPacket(routerIP, allNodes, header.ICMPv6RouterAdvert, body)
	router.GVisor().WritePacketToRemote(NIC, header.EthernetAddressFromMulticastIPv6Address(toStack(allNodes)), header.IPv6ProtocolNumber, buffer.MakeWithData(b))
	addr, err := front.Ready(within(t))
	if err != nil || addr != slaacAddr {
		t.Fatal(addr, err)
	}
	c, err := router.DialContext(within(t), "tcp", net.JoinHostPort(slaacAddr.Addr().String(), "80"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	a, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(a, "hello")
	a.Close()
	if got, err := io.ReadAll(c); string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
}

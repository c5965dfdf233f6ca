package dhcpd

import (
	"bytes"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
)

var (
	own    = [6]byte{0, 0x16, 0x3e, 0, 0, 7}
	other  = [6]byte{0, 0x16, 0x3e, 0, 0, 8}
	addr   = netip.MustParseAddr("10.137.0.7")
	router = netip.MustParseAddr("10.137.0.1")
	began  = time.Unix(1e9, 0)
)

func newLink() *Link {
	return NewLink(own, Offer{Addr: addr, Router: router, DNS: []netip.Addr{router}, MTU: 1400, Lease: time.Hour})
}

// message returns a message of the guest.
func message(typ dhcpv4.MessageType, change func(*dhcpv4.DHCPv4)) []byte {
	zero := netip.IPv4Unspecified().AsSlice()
	m := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootRequest, HWType: 1, TransactionID: dhcpv4.TransactionID{1, 2, 3, 4}, ClientHWAddr: own[:],
		ClientIPAddr: zero, YourIPAddr: zero, ServerIPAddr: zero, GatewayIPAddr: zero, Options: dhcpv4.Options{},
	}
	m.UpdateOption(dhcpv4.OptMessageType(typ))
	if change != nil {
		change(m)
	}
	return m.ToBytes()
}

func answer(t *testing.T, r *Reply) *dhcpv4.DHCPv4 {
	t.Helper()
	if r == nil {
		t.Fatal("there is no answer")
	}
	m, err := dhcpv4.FromBytes(r.Message)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func server(a netip.Addr) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptServerIdentifier(a.AsSlice())) }
}

func wants(a netip.Addr) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) { m.UpdateOption(dhcpv4.OptRequestedIPAddress(a.AsSlice())) }
}

func all(list ...func(*dhcpv4.DHCPv4)) func(*dhcpv4.DHCPv4) {
	return func(m *dhcpv4.DHCPv4) {
		for _, f := range list {
			f(m)
		}
	}
}

func TestDiscoverAndRequestLease(t *testing.T) {
	l := newLink()
	r, _ := l.Handle(began, own, message(dhcpv4.MessageTypeDiscover, func(m *dhcpv4.DHCPv4) {
		m.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, []byte{1, 2, 3}))
	}))
	m := answer(t, r)
	if m.MessageType() != dhcpv4.MessageTypeOffer || address(m.YourIPAddr) != addr || address(m.ServerIdentifier()) != router ||
		m.TransactionID != (dhcpv4.TransactionID{1, 2, 3, 4}) || !bytes.Equal(m.Options.Get(dhcpv4.OptionClientIdentifier), []byte{1, 2, 3}) {
		t.Errorf("%v", m.Summary())
	}
	if r.To != addr || r.ToMAC != own {
		t.Errorf("the offer goes to %v at %x", r.To, r.ToMAC)
	}
	if _, ok := l.Lease(began); ok {
		t.Error("an offer is a lease already")
	}
	r, _ = l.Handle(began, own, message(dhcpv4.MessageTypeRequest, all(server(router), wants(addr), func(m *dhcpv4.DHCPv4) {
		m.UpdateOption(dhcpv4.OptHostName("web\n<script>1"))
		m.SetBroadcast()
	})))
	m = answer(t, r)
	ones, _ := m.SubnetMask().Size()
	if m.MessageType() != dhcpv4.MessageTypeAck || address(m.YourIPAddr) != addr || ones != 32 || m.IPAddressLeaseTime(0) != time.Hour ||
		len(m.Router()) != 1 || address(m.Router()[0]) != router || len(m.DNS()) != 1 || address(m.DNS()[0]) != router ||
		!bytes.Equal(m.Options.Get(dhcpv4.OptionInterfaceMTU), []byte{1400 >> 8, 1400 & 255}) || m.IPAddressRenewalTime(0) != 30*time.Minute {
		t.Errorf("%v", m.Summary())
	}
	if routes := fmt.Sprint(m.ClasslessStaticRoute()); routes != "[route to 10.137.0.1/32 via 0.0.0.0 route to 0.0.0.0/0 via 10.137.0.1]" {
		t.Error(routes)
	}
	if r.To != everybody || r.ToMAC != allMAC {
		t.Errorf("a broadcast was asked for, and the answer goes to %v at %x", r.To, r.ToMAC)
	}
	if got, ok := l.Lease(began.Add(59 * time.Minute)); !ok || got.Name != "webscript1" || got.MAC != own {
		t.Errorf("%+v", got)
	}
	if _, ok := l.Lease(began.Add(time.Hour)); ok {
		t.Error("the lease does not end")
	}
}

// Each case is what a guest sends, and what it gets.
func TestAnswers(t *testing.T) {
	elsewhere := netip.MustParseAddr("10.137.0.9")
	has := func(a netip.Addr) func(*dhcpv4.DHCPv4) {
		return func(m *dhcpv4.DHCPv4) { m.ClientIPAddr = a.AsSlice() }
	}
	const (
		ack  = dhcpv4.MessageTypeAck
		nak  = dhcpv4.MessageTypeNak
		none = dhcpv4.MessageTypeNone
	)
	for _, c := range []struct {
		name   string
		typ    dhcpv4.MessageType
		change func(*dhcpv4.DHCPv4)
		want   dhcpv4.MessageType
	}{
		{"selecting", dhcpv4.MessageTypeRequest, all(server(router), wants(addr)), ack},
		{"selecting another address", dhcpv4.MessageTypeRequest, all(server(router), wants(elsewhere)), nak},
		{"selecting no address", dhcpv4.MessageTypeRequest, server(router), nak},
		{"selecting another server", dhcpv4.MessageTypeRequest, all(server(elsewhere), wants(addr)), none},
		{"restarting", dhcpv4.MessageTypeRequest, wants(addr), ack},
		{"restarting with another address", dhcpv4.MessageTypeRequest, wants(elsewhere), nak},
		{"renewing", dhcpv4.MessageTypeRequest, has(addr), ack},
		{"renewing another address", dhcpv4.MessageTypeRequest, has(elsewhere), nak},
		{"asking for nothing", dhcpv4.MessageTypeRequest, nil, nak},
		{"informing", dhcpv4.MessageTypeInform, has(addr), ack},
		{"informing of another address", dhcpv4.MessageTypeInform, has(elsewhere), none},
		{"an offer", dhcpv4.MessageTypeOffer, nil, none},
		{"no type", none, nil, none},
		{"a relay", dhcpv4.MessageTypeDiscover, func(m *dhcpv4.DHCPv4) { m.GatewayIPAddr = router.AsSlice() }, none},
		{"hops", dhcpv4.MessageTypeDiscover, func(m *dhcpv4.DHCPv4) { m.HopCount = 1 }, none},
		{"a reply", dhcpv4.MessageTypeDiscover, func(m *dhcpv4.DHCPv4) { m.OpCode = dhcpv4.OpcodeBootReply }, none},
		{"another card", dhcpv4.MessageTypeDiscover, func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = other[:] }, none},
		{"no Ethernet", dhcpv4.MessageTypeDiscover, func(m *dhcpv4.DHCPv4) { m.HWType = 6 }, none},
	} {
		l := newLink()
		r, declined := l.Handle(began, own, message(c.typ, c.change))
		got := none
		if r != nil {
			m := answer(t, r)
			got = m.MessageType()
			if yours := address(m.YourIPAddr); got == nak && yours != netip.IPv4Unspecified() || c.typ == dhcpv4.MessageTypeInform && (yours != netip.IPv4Unspecified() || m.IPAddressLeaseTime(0) != 0) {
				t.Errorf("%s: %v", c.name, m.Summary())
			}
			if got == nak && (r.To != everybody || !m.IsBroadcast()) {
				t.Errorf("%s: the NAK goes to %v", c.name, r.To)
			}
		}
		if got != c.want || declined {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
		if _, leased := l.Lease(began); leased != (c.want == ack && c.typ == dhcpv4.MessageTypeRequest) {
			t.Errorf("%s: leased: %t", c.name, leased)
		}
		if st := l.Stats(); (c.want == none) != (st.Ignored == 1) {
			t.Errorf("%s: %+v", c.name, st)
		}
	}
}

func TestReleaseAndDecline(t *testing.T) {
	l := newLink()
	lease := func() {
		t.Helper()
		if r, _ := l.Handle(began, own, message(dhcpv4.MessageTypeRequest, wants(addr))); r == nil {
			t.Fatal("no lease")
		}
	}
	lease()
	had := func(m *dhcpv4.DHCPv4) { m.ClientIPAddr = addr.AsSlice() }
	l.Handle(began, own, message(dhcpv4.MessageTypeRelease, had)) // names no server
	if _, ok := l.Lease(began); !ok {
		t.Error("a release for nobody ended the lease")
	}
	l.Handle(began, own, message(dhcpv4.MessageTypeRelease, all(had, server(router))))
	if _, ok := l.Lease(began); ok {
		t.Error("the lease was not released")
	}
	lease()
	if _, declined := l.Handle(began, own, message(dhcpv4.MessageTypeDecline, all(server(router), wants(router)))); declined {
		t.Error("another address was declined")
	}
	if _, declined := l.Handle(began, own, message(dhcpv4.MessageTypeDecline, all(server(router), wants(addr)))); !declined {
		t.Error("the address was not declined")
	}
	if st := l.Stats(); st.Release != 1 || st.Decline != 1 {
		t.Errorf("%+v", st)
	}
}

func TestAnotherOfferEndsTheLease(t *testing.T) {
	l := newLink()
	l.Handle(began, own, message(dhcpv4.MessageTypeRequest, wants(addr)))
	l.SetOffer(Offer{Addr: netip.MustParseAddr("10.137.0.9"), Router: router, Lease: time.Hour})
	if _, ok := l.Lease(began); ok {
		t.Error("the lease of the old address goes on")
	}
	r, _ := l.Handle(began, own, message(dhcpv4.MessageTypeRequest, func(m *dhcpv4.DHCPv4) { m.ClientIPAddr = addr.AsSlice() }))
	if m := answer(t, r); m.MessageType() != dhcpv4.MessageTypeNak {
		t.Error(m.Summary())
	}
}

func TestFloodIsLimitedAndAnotherMACNotAnswered(t *testing.T) {
	l := newLink()
	answered := 0
	for range 1000 {
		if r, _ := l.Handle(began, own, message(dhcpv4.MessageTypeDiscover, nil)); r != nil {
			answered++
		}
	}
	if answered != Burst || l.Stats().Limited != 1000-Burst {
		t.Errorf("%d answered, %+v", answered, l.Stats())
	}
	if r, _ := l.Handle(began.Add(time.Second), own, message(dhcpv4.MessageTypeDiscover, nil)); r == nil {
		t.Error("nothing is answered a second later")
	}
	l = newLink()
	if r, _ := l.Handle(began, other, message(dhcpv4.MessageTypeDiscover, nil)); r != nil {
		t.Error("a message in another station's frame was answered")
	}
	if r, _ := l.Handle(began, other, message(dhcpv4.MessageTypeDiscover, func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = other[:] })); r != nil {
		t.Error("another station was answered")
	}
	if r, _ := NewLink([6]byte{}, l.offer).Handle(began, other, message(dhcpv4.MessageTypeDiscover, func(m *dhcpv4.DHCPv4) { m.ClientHWAddr = other[:] })); r == nil {
		t.Error("without a MAC of the toolstack's nobody is answered")
	}
}

func TestPoolGivesEachAnAddressAndTheSameAgain(t *testing.T) {
	first, last := netip.MustParseAddr("10.0.0.10"), netip.MustParseAddr("10.0.0.13")
	p := NewPool(first, last, netip.MustParseAddr("10.0.0.11"))
	take := func(vif, want string) {
		t.Helper()
		a, err := p.Take(began, vif, netip.Addr{})
		if got := a.String(); err != nil && want != "" || err == nil && got != want {
			t.Errorf("%s gets %v, %v; want %s", vif, a, err, want)
		}
	}
	take("a", "10.0.0.10")
	take("b", "10.0.0.12") // .11 is reserved
	take("c", "10.0.0.13")
	take("d", "")
	p.Give("b", netip.MustParseAddr("10.0.0.12"))
	take("b", "10.0.0.12")
	p.Give("b", netip.MustParseAddr("10.0.0.12"))
	take("d", "10.0.0.12") // nothing else is left
	take("b", "")
	p.Give("a", netip.MustParseAddr("10.0.0.12")) // not a's
	take("e", "")
	if a, err := p.Take(began, "fixed", netip.MustParseAddr("10.0.0.11")); err != nil || a.String() != "10.0.0.11" {
		t.Errorf("%v, %v", a, err)
	}
	if _, err := p.Take(began, "thief", netip.MustParseAddr("10.0.0.11")); err == nil {
		t.Error("two have one address")
	}
}

func TestDeclinedAddressesComeBackAndAreFew(t *testing.T) {
	p := NewPool(netip.MustParseAddr("10.0.0.0"), netip.MustParseAddr("10.0.0.7"))
	spoilt := 0
	for range 20 { // a hostile guest
		a, err := p.Take(began, "h", netip.Addr{})
		if err != nil {
			t.Fatal(err)
		}
		if !p.Spoil(began, "h", a) {
			break
		}
		spoilt++
	}
	if spoilt != 2 {
		t.Errorf("%d of 8 addresses were spoilt by one guest", spoilt)
	}
	for i := range 5 {
		if _, err := p.Take(began, fmt.Sprint(i), netip.Addr{}); err != nil {
			t.Error(err)
		}
	}
	if _, err := p.Take(began, "late", netip.Addr{}); err == nil {
		t.Error("a declined address is given away at once")
	}
	if _, err := p.Take(began.Add(spoiledFor), "late", netip.Addr{}); err != nil {
		t.Error(err)
	}
}

// One guest takes few addresses from a pool, however large it is.
func TestAGuestSpoilsFewAddresses(t *testing.T) {
	p := NewPool(netip.MustParseAddr("10.0.0.0"), netip.MustParseAddr("10.0.0.99"))
	declines := func(now time.Time, vif string) (n int) {
		for range 50 {
			a, err := p.Take(now, vif, netip.Addr{})
			if err != nil {
				t.Fatal(err)
			}
			if !p.Spoil(now, vif, a) {
				return n
			}
			n++
		}
		return n
	}
	if n := declines(began, "a"); n != spoiledEach {
		t.Errorf("one guest spoils %d addresses", n)
	}
	if n := declines(began, "b"); n != spoiledEach {
		t.Errorf("another spoils %d", n)
	}
	if n := declines(began.Add(spoiledFor), "a"); n != spoiledEach {
		t.Errorf("when those are given again, it spoils %d", n)
	}
}

func FuzzHandle(f *testing.F) {
	f.Add(message(dhcpv4.MessageTypeDiscover, nil))
	f.Add(message(dhcpv4.MessageTypeRequest, all(server(router), wants(addr))))
	f.Add(message(dhcpv4.MessageTypeInform, func(m *dhcpv4.DHCPv4) { m.ClientIPAddr = addr.AsSlice() }))
	f.Fuzz(func(t *testing.T, b []byte) {
		l := newLink()
		r, _ := l.Handle(began, own, b)
		if r == nil {
			return
		}
		m, err := dhcpv4.FromBytes(r.Message)
		if err != nil || m.OpCode != dhcpv4.OpcodeBootReply || len(r.Message) > 1472 {
			t.Fatalf("%d bytes, %v", len(r.Message), err)
		}
		if a := address(m.YourIPAddr); a != addr && a != netip.IPv4Unspecified() {
			t.Fatalf("the guest is given %v", a)
		}
		if r.To != addr && r.To != everybody {
			t.Fatalf("the answer goes to %v", r.To)
		}
	})
}

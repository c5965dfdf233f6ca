package main

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"barevif/pvnet/netstack"
	"barevif/tools/vifrouter/dhcpd"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"golang.org/x/net/dns/dnsmessage"
)

// resolves asks the router's name server from one socket for names that nobody has asked for, one
// after another, and requires an answer to each.
func (s *site) resolves(c net.Conn, first, n int) {
	s.Helper()
	b := make([]byte, 1500)
	for i := range n {
		name := dnsmessage.MustNewName(fmt.Sprintf("n%d.test.", first+i))
		m := dnsmessage.Message{
			Header:    dnsmessage.Header{ID: uint16(i), RecursionDesired: true},
			Questions: []dnsmessage.Question{{Name: name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		}
		q, err := m.Pack()
		if err != nil {
			s.Fatal(err)
		}
		if _, err := c.Write(q); err != nil {
			s.Fatal(err)
		}
		k, err := c.Read(b)
		if err != nil {
			s.Fatal(err)
		}
		var p dnsmessage.Parser
		if h, err := p.Start(b[:k]); err != nil || h.ID != uint16(i) || h.RCode != dnsmessage.RCodeNameError {
			s.Fatalf("question %d: %+v, %v", first+i, h, err)
		}
	}
}

// asker is a socket of a guest to the router's name server.
func (s *site) asker(g *netstack.Stack) net.Conn {
	s.Helper()
	c, err := g.DialContext(s.ctx, "udp", "10.137.0.1:53")
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { c.Close() })
	return c
}

// Each question that the router asks its name server has a port of its own, and so a flow that
// outlives it by minutes. However many there were, the router asks the next.
func TestNamesAreResolvedHoweverManyWereBefore(t *testing.T) {
	s := newSite(t, standard+"flows 256 per-guest 64\n")
	g, _ := s.guest(firstDom)
	s.settled(g)
	s.resolves(s.asker(g), 0, 200)
	other, _ := s.guest(firstDom + 1)
	s.settled(other)
	s.resolves(s.asker(other), 200, 3)
	if who, err := ask(s.ctx, other, netip.AddrPortFrom(worldAddr, 80).String()); err != nil || who != "192.0.2.2" {
		t.Errorf("the server sees %q, %v", who, err)
	}
}

// A guest that declines whatever it is given takes few addresses from others, and few lines of the log.
func TestAGuestThatDeclinesTakesLittle(t *testing.T) {
	s := newSite(t, standard)
	g, _ := s.guest(firstDom)
	s.settled(g)
	s.d.mu.Lock()
	var one *guest
	for _, one = range s.d.vifs {
	}
	s.d.mu.Unlock()
	decline := func() {
		s.d.mu.Lock()
		addr := one.addr
		s.d.mu.Unlock()
		m, err := dhcpv4.New(dhcpv4.WithMessageType(dhcpv4.MessageTypeDecline), dhcpv4.WithHwAddr(one.mac[:]),
			dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(addr.AsSlice())), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IPv4(10, 137, 0, 1))))
		if err != nil {
			t.Fatal(err)
		}
		one.handleDHCP(one.mac, m.ToBytes())
	}
	for range dhcpd.Burst {
		decline()
	}
	if n := strings.Count(s.said.String(), "a guest declines its address"); n != 3 {
		t.Errorf("%d lines of the log say that it declines", n)
	}
	// The pool has 11 addresses: two are spoilt, it has one.
	for i := range 8 {
		if _, err := one.pool.Take(time.Now(), fmt.Sprint(i), netip.Addr{}); err != nil {
			t.Errorf("guest %d: %v", i, err)
		}
	}
}

// Package dhcpd is a DHCP server for IPv4 (RFC 2131) for the guests of a router, each on a vif
// of its own. It knows neither sockets nor clocks: it is given messages, and returns answers.
//
// A vif has one address, which a [Pool] gave it or its owner fixed, and its [Link] leases that
// one alone: what a guest asks for, and how often, takes no address from another. The guest
// is told a network of one address, and routes to the router and through it
// (RFC 3442): everything that it sends goes to the router, also for guests of its own network.
//
// Messages are hostile. One that is not from the guest's own MAC, that is not of a client, or
// that came through a relay is not answered; of all messages of a link, [Rate] a second are.
package dhcpd

import (
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

const (
	// Rate is how many messages a second a link is answered, and Burst how many at once.
	Rate  = 10
	Burst = 20
	// MaxMessage is the size of the longest message that is read, in bytes.
	MaxMessage = 1472
	maxName    = 63
)

// Offer is what a guest is told.
type Offer struct {
	Addr   netip.Addr   // the guest's address
	Router netip.Addr   // the router's own, which is the server's too
	DNS    []netip.Addr // name servers; at most 8 are told
	MTU    int          // of the guest's card in bytes; 0: not told
	Lease  time.Duration
}

// A Reply is an answer for a guest.
type Reply struct {
	Message []byte
	To      netip.Addr // where it goes, to port 68; the limited broadcast if the guest cannot be told apart
	ToMAC   [6]byte    // the guest's, or that of all stations
}

// Stats counts the messages of a Link.
type Stats struct {
	Discover, Request, Decline, Release, Inform uint64 // received
	Offer, Ack, Nak                             uint64 // sent
	Ignored                                     uint64 // malformed, of another station, for another server
	Limited                                     uint64 // beyond the Rate
}

// A Lease is what a guest has.
type Lease struct {
	Addr  netip.Addr
	MAC   [6]byte
	Name  string // what the guest calls itself: letters, digits, - and _ of it
	Until time.Time
}

// A Link is the server's side of one vif. Its methods may be called from any goroutine.
type Link struct {
	mu     sync.Mutex
	mac    [6]byte // zero: any
	offer  Offer
	lease  Lease     // zero: none
	tokens float64   // messages that may be answered now
	filled time.Time // when tokens was computed
	stats  Stats
}

// NewLink makes the server of a vif. mac is the MAC of its guest, zero for any.
func NewLink(mac [6]byte, offer Offer) *Link {
	return &Link{mac: mac, offer: offer, tokens: Burst}
}

// SetOffer changes what the guest is told from now on. A guest with another address gets a NAK
// when it renews its lease, and then the new one.
func (l *Link) SetOffer(o Offer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.offer = o
	if l.lease.Addr != o.Addr {
		l.lease = Lease{}
	}
}

// Stats returns the counters.
func (l *Link) Stats() Stats {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stats
}

// Lease returns the lease; ok is false if the guest has none at that time.
func (l *Link) Lease(now time.Time) (lease Lease, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lease, l.lease.Addr.IsValid() && now.Before(l.lease.Until)
}

// Handle answers a message that came in a frame of station from. declined says that the guest
// has found another station with its address: the caller may give it another by SetOffer. The
// reply is nil if there is none.
func (l *Link) Handle(now time.Time, from [6]byte, b []byte) (r *Reply, declined bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.allow(now) {
		l.stats.Limited++
		return nil, false
	}
	m, ok := l.parse(from, b)
	if !ok {
		l.stats.Ignored++
		return nil, false
	}
	switch m.MessageType() {
	case dhcpv4.MessageTypeDiscover:
		l.stats.Discover++
		l.stats.Offer++
		return l.reply(m, dhcpv4.MessageTypeOffer), false
	case dhcpv4.MessageTypeRequest:
		l.stats.Request++
		return l.request(now, m), false
	case dhcpv4.MessageTypeDecline:
		if l.addressed(m) && l.wants(m) {
			l.stats.Decline++
			l.lease = Lease{}
			return nil, true
		}
	case dhcpv4.MessageTypeRelease:
		if l.addressed(m) && address(m.ClientIPAddr) == l.offer.Addr {
			l.stats.Release++
			l.lease = Lease{}
			return nil, false
		}
	case dhcpv4.MessageTypeInform:
		if address(m.ClientIPAddr) == l.offer.Addr {
			l.stats.Inform++
			l.stats.Ack++
			return l.reply(m, dhcpv4.MessageTypeAck), false
		}
	}
	l.stats.Ignored++
	return nil, false
}

// allow takes a token, or reports false: the link has no more.
func (l *Link) allow(now time.Time) bool {
	if !l.filled.IsZero() && now.After(l.filled) {
		l.tokens = min(Burst, l.tokens+now.Sub(l.filled).Seconds()*Rate)
	}
	if l.filled.IsZero() || now.After(l.filled) {
		l.filled = now
	}
	if l.tokens < 1 {
		return false
	}
	l.tokens--
	return true
}

// parse returns a message of the link's guest.
func (l *Link) parse(from [6]byte, b []byte) (*dhcpv4.DHCPv4, bool) {
	if len(b) > MaxMessage {
		return nil, false
	}
	m, err := dhcpv4.FromBytes(b)
	if err != nil || m.OpCode != dhcpv4.OpcodeBootRequest || m.HWType != iana.HWTypeEthernet || len(m.ClientHWAddr) != 6 {
		return nil, false
	}
	own := [6]byte(m.ClientHWAddr)
	switch {
	case own != from || l.mac != [6]byte{} && own != l.mac || own[0]&1 != 0:
		return nil, false
	case !unspecified(m.GatewayIPAddr) || m.HopCount != 0: // a relay
		return nil, false
	}
	return m, true
}

func unspecified(ip net.IP) bool { return len(ip) == 0 || ip.IsUnspecified() }

func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// addressed reports whether a message is for this server, which it must say.
func (l *Link) addressed(m *dhcpv4.DHCPv4) bool {
	return address(m.ServerIdentifier()) == l.offer.Router
}

// wants reports whether the client asks for the link's address.
func (l *Link) wants(m *dhcpv4.DHCPv4) bool { return address(m.RequestedIPAddress()) == l.offer.Addr }

// request answers a REQUEST: of a client that has an offer, that starts again, or that extends
// its lease (RFC 2131, section 4.3.2).
func (l *Link) request(now time.Time, m *dhcpv4.DHCPv4) *Reply {
	had := address(m.ClientIPAddr)
	switch server := m.ServerIdentifier(); {
	case !unspecified(server):
		if address(server) != l.offer.Router {
			l.stats.Ignored++ // it has taken the offer of another server
			return nil
		}
		if !l.wants(m) {
			return l.nak(m)
		}
	case !unspecified(m.RequestedIPAddress()):
		if !l.wants(m) {
			return l.nak(m)
		}
	case had != l.offer.Addr:
		return l.nak(m)
	}
	l.lease = Lease{Addr: l.offer.Addr, MAC: [6]byte(m.ClientHWAddr), Name: clean(m.HostName()), Until: now.Add(l.offer.Lease)}
	l.stats.Ack++
	return l.reply(m, dhcpv4.MessageTypeAck)
}

// clean leaves the letters of a name that a log may have.
func clean(s string) string {
	b := make([]byte, 0, maxName)
	for i := 0; i < len(s) && len(b) < maxName; i++ {
		if c := s[i]; c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' {
			b = append(b, c)
		}
	}
	return string(b)
}

var (
	everybody = netip.AddrFrom4([4]byte{255, 255, 255, 255})
	allMAC    = [6]byte{255, 255, 255, 255, 255, 255}
)

// answer returns the part that all answers to m have.
func (l *Link) answer(m *dhcpv4.DHCPv4, typ dhcpv4.MessageType) *dhcpv4.DHCPv4 {
	zero := netip.IPv4Unspecified().AsSlice()
	r := &dhcpv4.DHCPv4{
		OpCode: dhcpv4.OpcodeBootReply, HWType: m.HWType, ClientHWAddr: m.ClientHWAddr, TransactionID: m.TransactionID,
		Flags: m.Flags & 0x8000, ClientIPAddr: zero, YourIPAddr: zero, ServerIPAddr: zero, GatewayIPAddr: zero, Options: dhcpv4.Options{},
	}
	r.UpdateOption(dhcpv4.OptMessageType(typ))
	r.UpdateOption(dhcpv4.OptServerIdentifier(l.offer.Router.AsSlice()))
	if id := m.Options.Get(dhcpv4.OptionClientIdentifier); len(id) > 0 && len(id) <= 255 { // RFC 6842
		r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionClientIdentifier, id))
	}
	return r
}

func (l *Link) nak(m *dhcpv4.DHCPv4) *Reply {
	l.stats.Nak++
	r := l.answer(m, dhcpv4.MessageTypeNak)
	r.UpdateOption(dhcpv4.OptMessage("the address of this card is another"))
	r.SetBroadcast()
	return &Reply{Message: r.ToBytes(), To: everybody, ToMAC: allMAC}
}

// reply returns an OFFER or an ACK.
func (l *Link) reply(m *dhcpv4.DHCPv4, typ dhcpv4.MessageType) *Reply {
	o := &l.offer
	r := l.answer(m, typ)
	r.ServerIPAddr = o.Router.AsSlice()
	router := o.Router.AsSlice()
	r.UpdateOption(dhcpv4.OptSubnetMask(net.CIDRMask(32, 32)))
	// Only a client that asks for routes gets them, and they then take the place of the router.
	r.UpdateOption(dhcpv4.OptRouter(router))
	r.UpdateOption(dhcpv4.OptClasslessStaticRoute(
		&dhcpv4.Route{Dest: &net.IPNet{IP: router, Mask: net.CIDRMask(32, 32)}, Router: net.IPv4zero.To4()},
		&dhcpv4.Route{Dest: &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}, Router: router},
	))
	var servers []net.IP
	for _, a := range o.DNS[:min(len(o.DNS), 8)] {
		if a.Is4() {
			servers = append(servers, a.AsSlice())
		}
	}
	if len(servers) > 0 {
		r.UpdateOption(dhcpv4.OptDNS(servers...))
	}
	if o.MTU > 0 && o.MTU <= 65535 {
		r.UpdateOption(dhcpv4.OptGeneric(dhcpv4.OptionInterfaceMTU, []byte{byte(o.MTU >> 8), byte(o.MTU)}))
	}
	to := o.Addr
	if typ != dhcpv4.MessageTypeOffer {
		r.ClientIPAddr = m.ClientIPAddr
	}
	if m.MessageType() != dhcpv4.MessageTypeInform {
		r.YourIPAddr = o.Addr.AsSlice()
		r.UpdateOption(dhcpv4.OptIPAddressLeaseTime(o.Lease))
		r.UpdateOption(dhcpv4.OptRenewTimeValue(o.Lease / 2))
		r.UpdateOption(dhcpv4.OptRebindingTimeValue(o.Lease * 7 / 8))
	}
	mac := [6]byte(m.ClientHWAddr)
	if m.IsBroadcast() && unspecified(m.ClientIPAddr) {
		to, mac = everybody, allMAC
	}
	return &Reply{Message: r.ToBytes(), To: to, ToMAC: mac}
}

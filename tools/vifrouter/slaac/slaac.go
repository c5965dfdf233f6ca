// Package slaac is a host's side of IPv6 on a link with routers: it reads their advertisements
// (RFC 4861, RFC 8106, RFC 4191) and makes addresses of the prefixes that they announce (RFC
// 4862), from the MAC of the card. It knows no sockets and no clock: a caller gives it frames'
// payloads and times.
//
// Any station of the link can be the author of an advertisement, and nothing of it is believed
// beyond what RFC 4862 grants: bounds hold for how much is kept, lifetimes of prefixes in use
// cannot be cut below two hours at once, and what cannot be an address, a router or a link is
// left out. Whoever announces first fills what is kept, for as long as that lasts.
//
// An address is used once one solicitation asked the link for it and nobody answered within a second
// (duplicate address detection, RFC 4862, section 5.4, with the nonce of RFC 7527). The link-local address
// of the MAC is asked for as well, and without it no other is used. Since addresses follow from the MAC,
// one that another station has is not exchanged for a different one: it is left out, and asked for again
// every ten minutes. So any station of the link can keep this host from having an address, as it can by
// answering for its router; it cannot take one that is in use.
//
// A host that has networks of its own behind it names them to Exclude: a prefix that overlaps one of
// them gives no address, and the link is asked for none of it.
package slaac

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"barevif/pvnet/packet"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Bounds of what a Client keeps. It ignores what is announced beyond them until it has room again.
const (
	MaxRouters  = 4
	MaxPrefixes = 8 // of those that Exclude does not concern, and as many of those that it does
	MaxServers  = 3 // as many as resolv.conf(5) has
)

// Type is the ICMPv6 type of an advertisement.
const Type = 134

const (
	minMTU       = 1280          // of a link with IPv6 (RFC 8200)
	minBits      = 32            // a shorter prefix is ignored: no link is that large
	leastShorten = 2 * time.Hour // RFC 4862, section 5.5.3
)

// An Advert is what a router announced, with what was wrong in it left out.
type Advert struct {
	Router     netip.Addr
	Lifetime   time.Duration // as a default router; 0: it is none
	Preference int           // 1 high, 0, -1 low
	MTU        int           // of the link in bytes; 0: not said
	Prefixes   []Prefix      // all that the message has: which of them a Client excludes is not known here
	Servers    []Server
}

// A Prefix is one that a router announced.
type Prefix struct {
	Prefix           netip.Prefix
	OnLink           bool // its addresses are neighbours
	Autonomous       bool // hosts make addresses of it (RFC 4862); it is a /64
	Valid, Preferred time.Duration
}

// A Server is a recursive name server.
type Server struct {
	Addr     netip.Addr
	Lifetime time.Duration // 0: it is no longer to be used
}

// Parse reads an ICMPv6 message that came from a station of the link, with a hop limit of 255 and
// a right checksum. It leaves out the options that cannot be used. An error means that nothing of the
// message can be.
func Parse(from netip.Addr, message []byte) (*Advert, error) {
	if !from.Is6() || !from.IsLinkLocalUnicast() || from.Zone() != "" {
		return nil, fmt.Errorf("a router advertisement from %v, which is no link-local address", from)
	}
	if len(message) < header.ICMPv6HeaderSize+header.NDPRAMinimumSize || message[0] != Type || message[1] != 0 {
		return nil, errors.New("a message that is no router advertisement")
	}
	ra := header.NDPRouterAdvert(message[4:])
	a := &Advert{Router: from, Lifetime: ra.RouterLifetime()}
	switch ra.DefaultRouterPreference() {
	case header.HighRoutePreference:
		a.Preference = 1
	case header.LowRoutePreference:
		a.Preference = -1
	}
	options := message[4+header.NDPRAMinimumSize:]
	it, err := header.NDPOptions(options).Iter(true)
	if err != nil {
		return nil, fmt.Errorf("a router advertisement of %v: %w", from, err)
	}
	for {
		o, done, err := it.Next()
		if err != nil {
			return nil, fmt.Errorf("a router advertisement of %v: %w", from, err)
		}
		if done {
			break
		}
		switch o := o.(type) {
		case header.NDPPrefixInformation:
			a.prefix(o)
		case header.NDPRecursiveDNSServer:
			a.servers(o)
		}
	}
	// The library has no option for the MTU. Lengths were checked above.
	for b := options; len(b) >= 8; b = b[8*int(b[1]):] {
		if b[0] == 5 && b[1] == 1 {
			if n := binary.BigEndian.Uint32(b[4:]); n >= minMTU && n <= 65535 {
				a.MTU = int(n)
			}
		}
	}
	return a, nil
}

func addrOf(a tcpip.Address) (netip.Addr, bool) {
	b := a.AsSlice()
	if len(b) != 16 {
		return netip.Addr{}, false
	}
	return netip.AddrFrom16([16]byte(b)), true
}

// host reports whether an address can be a station's beyond its link.
func host(a netip.Addr) bool { return a.IsGlobalUnicast() && !a.Is4In6() }

func (a *Advert) prefix(o header.NDPPrefixInformation) {
	at, ok := addrOf(o.Prefix())
	bits := int(o.PrefixLength())
	if !ok || bits < minBits {
		return
	}
	p := Prefix{ // the zero Prefix, which host refuses, if bits is more than 128
		Prefix: netip.PrefixFrom(at, bits).Masked(), OnLink: o.OnLinkFlag(), Autonomous: o.AutonomousAddressConfigurationFlag() && bits == 64,
		Valid: o.ValidLifetime(), Preferred: o.PreferredLifetime(),
	}
	if !host(p.Prefix.Addr()) || p.Preferred > p.Valid || !p.OnLink && !p.Autonomous {
		return
	}
	a.Prefixes = append(a.Prefixes, p)
}

func (a *Advert) servers(o header.NDPRecursiveDNSServer) {
	list, err := o.Addresses()
	if err != nil {
		return
	}
	for _, one := range list {
		if s, ok := addrOf(one); ok && host(s) && len(a.Servers) < MaxServers {
			a.Servers = append(a.Servers, Server{s, o.Lifetime()})
		}
	}
}

// A Client keeps what routers announced. The zero Client has no MAC: Reset gives it one. It is
// not safe for concurrent use.
type Client struct {
	mac      [6]byte
	routers  []router
	prefixes []prefix
	servers  []server
	claims   []claim // of this host's addresses, at most one for each prefix and the link-local one
	excluded []netip.Prefix
	mtu      int // of the link, as announced last, by any router; 0: by none
}

type router struct {
	addr       netip.Addr
	preference int
	mtu        int
	until      time.Time
}

type prefix struct {
	Prefix
	until, preferred time.Time
	excluded         bool // it overlaps a network of Client.excluded
}

type server struct {
	addr  netip.Addr
	until time.Time
}

// Reset forgets everything that was announced, for a card with that MAC. What Exclude was given stays.
func (c *Client) Reset(mac [6]byte) { *c = Client{mac: mac, excluded: c.excluded} }

// Exclude makes networks those of which the host wants no address and no route, in the place of those
// before, and keeps the slice. It counts from the next call of Settings on, also for an address that the
// host has. Prefixes that it concerns are still kept, as far as there is room for such prefixes, and take no
// room from others: they are used once they are not excluded any more, if there is room for them then.
func (c *Client) Exclude(networks []netip.Prefix) {
	c.excluded = networks
	var changed []prefix
	c.prefixes = slices.DeleteFunc(c.prefixes, func(p prefix) bool {
		if c.excludes(p.Prefix.Prefix) == p.excluded {
			return false
		}
		p.excluded = !p.excluded
		changed = append(changed, p)
		return true
	})
	for _, p := range changed { // behind the others, so that these never make room for one that was excluded
		c.keep(p)
	}
}

// keep adds a prefix to those that are kept, if there is room. Those that are excluded have room of their own:
// however many of them are announced, they hide no other.
func (c *Client) keep(p prefix) {
	n := 0
	for i := range c.prefixes {
		if c.prefixes[i].excluded == p.excluded {
			n++
		}
	}
	if n < MaxPrefixes {
		c.prefixes = append(c.prefixes, p)
	}
}

func (c *Client) excludes(p netip.Prefix) bool {
	return slices.ContainsFunc(c.excluded, func(n netip.Prefix) bool { return n.Overlaps(p) })
}

// Hear applies an advertisement to what the Client keeps. It keeps nothing of a itself.
func (c *Client) Hear(now time.Time, a *Advert) {
	c.forget(now)
	if a.MTU != 0 {
		c.mtu = a.MTU // it has no lifetime of its own, and does not end with that of the router (RFC 4861, section 4.2)
	}
	i := slices.IndexFunc(c.routers, func(r router) bool { return r.addr == a.Router })
	switch {
	case i >= 0:
		r := &c.routers[i]
		r.preference, r.until = a.Preference, now.Add(a.Lifetime) // 0: forget removes it
		if a.MTU != 0 {
			r.mtu = a.MTU
		}
	case a.Lifetime > 0 && len(c.routers) < MaxRouters:
		c.routers = append(c.routers, router{a.Router, a.Preference, a.MTU, now.Add(a.Lifetime)})
	}
	for _, p := range a.Prefixes {
		c.hearPrefix(now, p)
	}
	for _, s := range a.Servers {
		i := slices.IndexFunc(c.servers, func(have server) bool { return have.addr == s.Addr })
		switch {
		case i >= 0:
			c.servers[i].until = now.Add(s.Lifetime)
		case s.Lifetime > 0 && len(c.servers) < MaxServers:
			c.servers = append(c.servers, server{s.Addr, now.Add(s.Lifetime)})
		}
	}
}

func (c *Client) hearPrefix(now time.Time, p Prefix) {
	i := slices.IndexFunc(c.prefixes, func(have prefix) bool { return have.Prefix.Prefix == p.Prefix })
	if i < 0 {
		if p.Valid > 0 {
			c.keep(prefix{p, now.Add(p.Valid), now.Add(p.Preferred), c.excludes(p.Prefix)})
		}
		return
	}
	have := &c.prefixes[i]
	until := now.Add(p.Valid)
	if have.Autonomous && until.Before(have.until) && p.Valid < leastShorten {
		// A forged advertisement must not end an address at once.
		until = have.until
		if most := now.Add(leastShorten); until.After(most) {
			until = most
		}
	}
	have.until, have.preferred = until, now.Add(p.Preferred)
	have.OnLink, have.Autonomous = have.OnLink || p.OnLink, have.Autonomous || p.Autonomous
	have.Valid, have.Preferred = p.Valid, p.Preferred
	c.forget(now)
}

// forget removes what is over.
func (c *Client) forget(now time.Time) {
	c.routers = slices.DeleteFunc(c.routers, func(r router) bool { return !now.Before(r.until) })
	c.prefixes = slices.DeleteFunc(c.prefixes, func(p prefix) bool { return !now.Before(p.until) })
	c.servers = slices.DeleteFunc(c.servers, func(s server) bool { return !now.Before(s.until) })
}

// An Address is one of this host's.
type Address struct {
	Prefix netip.Prefix // the address, with 64 bits if the other addresses of its prefix are on the link, else with 128
	Until  time.Time    // when it ends, unless its prefix is announced again
}

// Settings are what follows at one time from all that was announced. Their slices are the caller's.
type Settings struct {
	Addrs  []Address      // those to begin connections with come first, then the deprecated ones
	OnLink []netip.Prefix // prefixes on the link of which Addrs has no address
	Router netip.Addr     // the default router; zero: none
	DNS    []netip.Addr   // recursive name servers
	// Excluded are announced prefixes that overlap a network given to Exclude. Nothing else in Settings comes
	// from them.
	Excluded []netip.Prefix
	// Tentative are addresses that the link is or will be asked for: what its stations say of them is
	// to come to Claimed. Taken are those that others have.
	Tentative []netip.Addr
	Taken     []Taken
	// Listening are the addresses whose solicited-node groups this host has to listen to: its own, and
	// those that the link has been asked for. Their reports are to go out before the frames of Probes.
	Listening []netip.Addr
	MTU       int       // of the link, as Router says or, if it does not or there is none, as was said last; 0: nobody did
	Next      time.Time // when the first of these values changes unless something is announced; zero: none does
}

// Settings returns the Settings at that time. It also advances duplicate address detection: what was asked for
// long enough becomes this host's.
func (c *Client) Settings(now time.Time) (s Settings) {
	c.forget(now)
	next := func(t time.Time) {
		if t.After(now) && (s.Next.IsZero() || t.Before(s.Next)) {
			s.Next = t
		}
	}
	for i := range c.claim(now) {
		switch one := &c.claims[i]; one.state {
		case waiting, asked:
			s.Tentative = append(s.Tentative, one.addr)
			if one.state == asked {
				s.Listening = append(s.Listening, one.addr)
			}
			next(one.at)
		case ours:
			s.Listening = append(s.Listening, one.addr)
		case taken:
			s.Taken = append(s.Taken, Taken{one.addr, one.by})
			next(one.at)
		}
	}
	var old []Address
	for _, p := range c.prefixes {
		next(p.until)
		switch {
		case p.excluded:
			s.Excluded = append(s.Excluded, p.Prefix.Prefix)
		case p.Autonomous:
			a := Address{netip.PrefixFrom(packet.EUI64(p.Prefix.Prefix, c.mac), 128), p.until}
			if !c.has(a.Prefix.Addr()) {
				if p.OnLink {
					s.OnLink = append(s.OnLink, p.Prefix.Prefix)
				}
				continue
			}
			if p.OnLink {
				a.Prefix = netip.PrefixFrom(a.Prefix.Addr(), 64)
			}
			if next(p.preferred); p.preferred.After(now) {
				s.Addrs = append(s.Addrs, a)
			} else {
				old = append(old, a)
			}
		case p.OnLink:
			s.OnLink = append(s.OnLink, p.Prefix.Prefix)
		}
	}
	s.Addrs = append(s.Addrs, old...)
	best := -1
	for i, r := range c.routers {
		next(r.until)
		if best < 0 || r.preference > c.routers[best].preference {
			best = i
		}
	}
	s.MTU = c.mtu
	if best >= 0 {
		r := &c.routers[best]
		s.Router, s.MTU = r.addr, cmp.Or(r.mtu, c.mtu) // the MTU is the link's, whoever says it
	}
	for _, one := range c.servers {
		next(one.until)
		s.DNS = append(s.DNS, one.addr)
	}
	return s
}

// Solicit appends the frame that asks all routers of the link for an advertisement to b. It has
// no source address, so that the answer is for all stations: this one may have no address yet.
func Solicit(b []byte, mac [6]byte) []byte {
	b = append(b, 0x33, 0x33, 0, 0, 0, 2)
	b = append(b, mac[:]...)
	b = binary.BigEndian.AppendUint16(b, packet.IPv6)
	ip := len(b)
	b = append(b, make([]byte, header.IPv6MinimumSize+header.ICMPv6HeaderSize+header.NDPRSMinimumSize)...)
	icmp := header.ICMPv6(b[ip+header.IPv6MinimumSize:])
	to := header.IPv6AllRoutersLinkLocalMulticastAddress
	header.IPv6(b[ip:]).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(icmp)), TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: header.NDPHopLimit,
		SrcAddr: header.IPv6Any, DstAddr: to,
	})
	icmp.SetType(header.ICMPv6RouterSolicit)
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: header.IPv6Any, Dst: to}))
	return b
}

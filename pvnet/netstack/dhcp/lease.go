package dhcp

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/iana"
)

// A Lease is what a server granted, after it was checked. It lasts from the moment at which
// the client sent the request that the server acknowledged.
type Lease struct {
	Addr   netip.Prefix // our address and the network it is in
	Server netip.Addr   // the server that granted it
	Routes []Route      // at most MaxRoutes
	DNS    []netip.Addr // recursive name servers, at most MaxServers
	MTU    int          // of the network in bytes, MinMTU or more; 0: the server named none that can be used

	Renew, Rebind, Expire time.Duration // in ascending order; see RFC 2131, section 4.4.5
}

// A Route is a way to another network.
type Route struct {
	To  netip.Prefix
	Via netip.Addr // the router; zero: the network is on this link
}

// What a client takes from one lease at most, and the times and sizes that it takes.
const (
	MaxRoutes  = 16
	MaxServers = 3 // as many as resolv.conf(5) has
	MinMTU     = 576
	MinExpire  = 10 * time.Second
	// A longer lease, or one without end, is renewed as if it lasted this long: no server
	// can make a guest keep an address that it never asks for again.
	MaxExpire = 7 * 24 * time.Hour
)

// maxMessage is the size of the longest message that is read, in bytes.
const maxMessage = 4096

// A reply is a message of a server, whose lease, if it has one, was checked.
type reply struct {
	typ    dhcpv4.MessageType // offer, ack or nak
	server netip.Addr
	lease  *Lease // of an offer or an ack
}

var errForeign = errors.New("no answer to this client")

// parse reads a message that arrived at the client's port. It returns errForeign for one
// that does not answer the request xid of the station mac, and otherwise an error that names
// what cannot be.
func parse(b []byte, xid dhcpv4.TransactionID, mac [6]byte) (r reply, err error) {
	if len(b) > maxMessage {
		return r, errForeign
	}
	m, err := dhcpv4.FromBytes(b)
	if err != nil || m.OpCode != dhcpv4.OpcodeBootReply || m.TransactionID != xid ||
		m.HWType != iana.HWTypeEthernet || string(m.ClientHWAddr) != string(mac[:]) {
		return r, errForeign
	}
	r.typ = m.MessageType()
	id, err := one(m, dhcpv4.OptionServerIdentifier)
	if err != nil {
		return r, err
	}
	if r.server = id; !station(id) {
		return r, fmt.Errorf("the server calls itself %v", id)
	}
	switch r.typ {
	case dhcpv4.MessageTypeOffer, dhcpv4.MessageTypeAck:
		r.lease, err = leaseOf(m)
		if err == nil {
			r.lease.Server = id
		}
	case dhcpv4.MessageTypeNak:
	default:
		err = errForeign
	}
	return r, err
}

func leaseOf(m *dhcpv4.DHCPv4) (*Lease, error) {
	addr, _ := netip.AddrFromSlice(m.YourIPAddr.To4())
	if !station(addr) {
		return nil, fmt.Errorf("%v is no address for a host", addr)
	}
	l := new(Lease)
	bits, err := maskOf(m, addr)
	if err != nil {
		return nil, err
	}
	l.Addr = netip.PrefixFrom(addr, bits)
	if first, last := l.Addr.Masked().Addr(), lastOf(l.Addr); bits < 31 && (addr == first || addr == last) {
		return nil, fmt.Errorf("%v is the network or its broadcast address", l.Addr)
	}
	if err := l.setTimes(m); err != nil {
		return nil, err
	}
	if l.Routes, err = routesOf(m, l.Addr); err != nil {
		return nil, err
	}
	if l.DNS, err = stations(m, dhcpv4.OptionDomainNameServer, MaxServers); err != nil {
		return nil, err
	}
	// An MTU that cannot be is no reason to have no network at all.
	if v := m.Options.Get(dhcpv4.OptionInterfaceMTU); len(v) == 2 {
		if mtu := int(binary.BigEndian.Uint16(v)); mtu >= MinMTU {
			l.MTU = mtu
		}
	}
	return l, nil
}

// maskOf returns the length of the network's prefix. Without a mask it is that of the
// address's class.
func maskOf(m *dhcpv4.DHCPv4, addr netip.Addr) (bits int, err error) {
	v := m.Options.Get(dhcpv4.OptionSubnetMask)
	if v == nil {
		bits, _ = net.IP(addr.AsSlice()).DefaultMask().Size()
		return bits, nil
	}
	ones, size := net.IPMask(v).Size()
	if len(v) != 4 || size != 32 || ones < 8 {
		return 0, fmt.Errorf("%v is no mask of a network", net.IP(v))
	}
	return ones, nil
}

// lastOf returns the broadcast address of an IPv4 network.
func lastOf(p netip.Prefix) netip.Addr {
	a := p.Masked().Addr().As4()
	host := uint32(uint64(1)<<(32-p.Bits()) - 1)
	binary.BigEndian.PutUint32(a[:], binary.BigEndian.Uint32(a[:])|host)
	return netip.AddrFrom4(a)
}

// setTimes takes the times of the lease. Times of renewal that cannot be are replaced by those
// of RFC 2131.
func (l *Lease) setTimes(m *dhcpv4.DHCPv4) error {
	seconds := func(code dhcpv4.OptionCode) (time.Duration, bool) {
		v := m.Options.Get(code)
		if len(v) != 4 {
			return 0, false
		}
		return time.Duration(binary.BigEndian.Uint32(v)) * time.Second, true
	}
	expire, ok := seconds(dhcpv4.OptionIPAddressLeaseTime)
	if !ok || expire < MinExpire {
		return fmt.Errorf("a lease of %v, where %v is the least", expire, MinExpire)
	}
	l.Expire = min(expire, MaxExpire)
	renew, ok1 := seconds(dhcpv4.OptionRenewTimeValue)
	rebind, ok2 := seconds(dhcpv4.OptionRebindingTimeValue)
	l.Renew, l.Rebind = l.Expire/2, l.Expire*7/8
	if ok1 && ok2 && renew >= MinExpire/2 && renew < rebind && rebind < l.Expire {
		l.Renew, l.Rebind = renew, rebind
	}
	return nil
}

// routesOf returns the routes of the option for classless ones, which replaces the routers
// if it is there (RFC 3442), or else the first router.
func routesOf(m *dhcpv4.DHCPv4, own netip.Prefix) ([]Route, error) {
	if v := m.Options.Get(dhcpv4.OptionClasslessStaticRoute); v != nil {
		return classless(v, own.Addr())
	}
	routers, err := stations(m, dhcpv4.OptionRouter, 1)
	if err != nil || len(routers) == 0 || routers[0] == own.Addr() {
		return nil, err
	}
	return []Route{{To: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Via: routers[0]}}, nil
}

// classless parses the option of RFC 3442. It takes the first MaxRoutes of the routes that can
// be, without those through this host or into networks where no stations are.
func classless(v []byte, own netip.Addr) (routes []Route, err error) {
	for len(v) > 0 {
		bits := int(v[0])
		n := (bits + 7) / 8
		if bits > 32 || len(v) < 1+n+4 {
			return nil, errors.New("the option with routes is cut off")
		}
		var to, via [4]byte
		copy(to[:], v[1:1+n])
		copy(via[:], v[1+n:])
		v = v[1+n+4:]
		r := Route{To: netip.PrefixFrom(netip.AddrFrom4(to), bits).Masked(), Via: netip.AddrFrom4(via)}
		if r.Via.IsUnspecified() {
			r.Via = netip.Addr{}
		}
		usable := to[0] < 224 && to[0] != 127 && (to[0] != 0 || bits < 8) && r.Via != own &&
			(!r.Via.IsValid() || station(r.Via)) && (bits > 0 || r.Via.IsValid())
		if usable && len(routes) < MaxRoutes {
			routes = append(routes, r)
		}
	}
	return routes, nil
}

// station reports whether a is an address that one station of a network beyond this host may
// have.
func station(a netip.Addr) bool {
	return a.Is4() && !a.IsMulticast() && !a.IsLoopback() && !a.IsLinkLocalUnicast() &&
		a.As4()[0] != 0 && a.As4()[0] < 240
}

// one returns the address in an option that must have exactly one.
func one(m *dhcpv4.DHCPv4, code dhcpv4.OptionCode) (netip.Addr, error) {
	v := m.Options.Get(code)
	if len(v) != 4 {
		return netip.Addr{}, fmt.Errorf("option %v has %d bytes", code, len(v))
	}
	return netip.AddrFrom4([4]byte(v)), nil
}

// stations returns the first addresses of stations in an option with a list, most at most.
func stations(m *dhcpv4.DHCPv4, code dhcpv4.OptionCode, most int) (list []netip.Addr, err error) {
	v := m.Options.Get(code)
	if len(v)%4 != 0 {
		return nil, fmt.Errorf("option %v has %d bytes", code, len(v))
	}
	for ; len(v) > 0 && len(list) < most; v = v[4:] {
		if a := netip.AddrFrom4([4]byte(v)); station(a) {
			list = append(list, a)
		}
	}
	return list, nil
}

package netstack

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"barevif/pvnet/netstack/dhcp"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// An Origin says where an address comes from.
type Origin string

const (
	Static    Origin = "static" // the Config, or SetAddresses
	Leased    Origin = "DHCP"
	Announced Origin = "RA" // a router's advertisement
)

// An Address is an address of the stack.
type Address struct {
	netip.Prefix
	Origin Origin
}

// A Route is a way to another network.
type Route = dhcp.Route

// Settings are what the stack's addresses, routes and name servers are at one moment. IPv6
// addresses of the link alone are left out.
type Settings struct {
	Addrs  []Address    // static ones first, then the leased one, then announced ones
	Routes []Route      // through routers
	DNS    []netip.Addr // in the order in which they are asked
	MTU    int          // the lease's limit for the size of IP packets, in bytes; 0: it has none
}

// A network holds the addresses and routes of a gVisor stack, from all their sources.
type network struct {
	net     *stack.Stack
	log     *slog.Logger
	servers []netip.Addr // of the Config; immutable once there is a card
	adverts bool         // immutable once there is a card: router advertisements are followed

	applying sync.Mutex // taken by whoever changes the stack; before mu
	lease    *dhcp.Lease

	// gVisor calls our NDP dispatcher with locks of its own held, so nothing calls the
	// stack while it holds mu.
	mu       sync.Mutex
	static   []netip.Prefix // guarded by mu and written by holders of applying; replaced, never changed
	gateways []netip.Addr   // as static
	leased   *dhcp.Lease    // guarded by mu; in use
	ra       advertised     // guarded by mu
	changed  chan struct{}  // guarded by mu; closed at the next change
	dirty    chan struct{}  // has an element if the routes may be old
}

// configure copies the addresses, gateways, name servers and the logger of cfg. The stack has no card yet, so no other
// goroutine reads these fields.
func (n *network) configure(cfg *Config) {
	n.log, n.static, n.gateways, n.servers, n.adverts = cfg.Logger, cfg.addrs(), cfg.gateways(), slices.Clone(cfg.DNS), cfg.RA
	if n.log == nil {
		n.log = slog.New(slog.DiscardHandler)
	}
}

// addStatic gives the stack the addresses that the caller has assigned.
func (n *network) addStatic() error {
	for _, p := range n.static {
		if err := n.add(p); err != nil {
			return err
		}
	}
	n.apply()
	return nil
}

func (n *network) add(p netip.Prefix) error {
	err := n.net.AddProtocolAddress(nic, tcpip.ProtocolAddress{
		Protocol: protocol(p.Addr()), AddressWithPrefix: tcpip.AddressWithPrefix{Address: toStack(p.Addr()), PrefixLen: p.Bits()},
	}, stack.AddressProperties{})
	if err != nil {
		return fmt.Errorf("add the address %v: %s", p, err)
	}
	return nil
}

// follow applies what routers advertise, until ctx ends.
func (n *network) follow(ctx context.Context) {
	for {
		select {
		case <-n.dirty:
			n.apply()
		case <-ctx.Done():
			return
		}
	}
}

// touch says that what routers advertise has changed. It may be called with any lock held.
func (n *network) touch() {
	select {
	case n.dirty <- struct{}{}:
	default:
	}
}

// apply makes the stack's routes those of all sources, and tells watchers.
func (n *network) apply() {
	n.applying.Lock()
	defer n.applying.Unlock()
	n.applyLocked()
}

// applyLocked is apply for a holder of applying.
func (n *network) applyLocked() {
	n.mu.Lock()
	n.leased = n.lease
	routes := n.routesLocked()
	n.mu.Unlock()
	n.net.SetRouteTable(routes)
	n.mu.Lock()
	defer n.mu.Unlock()
	close(n.changed)
	n.changed = make(chan struct{})
}

// routesLocked returns the routes of all sources. gVisor takes the one with the longest prefix,
// and of several the first. The holder of mu calls it.
func (n *network) routesLocked() (routes []tcpip.Route) {
	onLink := func(p netip.Prefix) {
		routes = append(routes, tcpip.Route{Destination: subnet(p), NIC: nic})
	}
	through := func(r Route) {
		if !r.Via.IsValid() {
			onLink(r.To)
			return
		}
		routes = append(routes, tcpip.Route{Destination: subnet(r.To), Gateway: toStack(r.Via), NIC: nic})
	}
	for _, p := range n.static {
		onLink(p)
	}
	for _, g := range n.gateways {
		through(Route{To: everything(g), Via: g})
	}
	if l := n.leased; l != nil {
		onLink(l.Addr)
		for _, r := range l.Routes {
			through(r)
			if r.Via.IsValid() && !l.Addr.Contains(r.Via) { // a router beside the network
				onLink(netip.PrefixFrom(r.Via, r.Via.BitLen()))
			}
		}
	}
	if n.adverts {
		onLink(netip.MustParsePrefix("fe80::/64"))
	}
	for _, p := range n.ra.onLink {
		onLink(p)
	}
	for _, r := range n.ra.sorted() {
		through(r.Route)
	}
	return routes
}

// setStatic makes addrs and gateways the static ones. After an error they are those of before, as
// far as the stack takes them again.
func (n *network) setStatic(addrs []netip.Prefix, gateways []netip.Addr) error {
	n.applying.Lock()
	defer n.applying.Unlock()
	n.mu.Lock()
	was := n.static
	n.mu.Unlock()
	err := n.replace(was, addrs)
	if err != nil {
		addrs = slices.DeleteFunc(slices.Clone(was), func(p netip.Prefix) bool { return !n.has(p) })
		n.mu.Lock()
		gateways = n.gateways
		n.mu.Unlock()
	}
	n.mu.Lock()
	n.static, n.gateways = addrs, gateways
	n.mu.Unlock()
	n.applyLocked()
	return err
}

// replace takes the addresses that are not in next from the stack, and gives it the others. After
// an error it undoes that.
func (n *network) replace(was, next []netip.Prefix) error {
	var done []netip.Prefix
	for _, p := range was { // before others come: one may have the same address and another network
		if !slices.Contains(next, p) {
			_ = n.net.RemoveAddress(nic, toStack(p.Addr())) // it fails only if somebody else has removed it
		}
	}
	for _, p := range next {
		if slices.Contains(was, p) {
			continue
		}
		err := n.add(p)
		if err == nil {
			done = append(done, p)
			continue
		}
		for _, p := range done {
			_ = n.net.RemoveAddress(nic, toStack(p.Addr()))
		}
		for _, p := range was {
			if !slices.Contains(next, p) {
				_ = n.add(p) // setStatic looks whether it was taken
			}
		}
		return err
	}
	return nil
}

// has reports whether the stack has an address.
func (n *network) has(p netip.Prefix) bool {
	return n.net.CheckLocalAddress(0, protocol(p.Addr()), toStack(p.Addr())) == nic // of one card, gVisor does not look at an IPv4 address
}

// everything is the network of all addresses of a's family.
func everything(a netip.Addr) netip.Prefix {
	if a.Is6() {
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
}

// use makes a lease, or none, the stack's.
func (n *network) use(l *dhcp.Lease) error {
	n.applying.Lock()
	defer n.applying.Unlock()
	old := n.lease
	if old != nil && (l == nil || l.Addr != old.Addr) {
		_ = n.net.RemoveAddress(nic, toStack(old.Addr.Addr())) // it fails only if somebody else has removed it
		n.lease = nil
	}
	if l != nil && n.lease == nil {
		if err := n.add(l.Addr); err != nil {
			n.applyLocked()
			return err
		}
	}
	n.lease = l
	n.applyLocked()
	return nil
}

// settings returns the present settings, and a channel that is closed when they change.
func (n *network) settings() (s Settings, changed <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.static {
		s.Addrs = append(s.Addrs, Address{p, Static})
	}
	for _, g := range n.gateways {
		s.Routes = append(s.Routes, Route{To: everything(g), Via: g})
	}
	s.DNS = slices.Clone(n.servers)
	if l := n.leased; l != nil {
		s.Addrs = append(s.Addrs, Address{l.Addr, Leased})
		s.Routes = append(s.Routes, l.Routes...)
		s.DNS = append(s.DNS, l.DNS...)
		s.MTU = l.MTU
	}
	for _, p := range n.ra.usable() {
		s.Addrs = append(s.Addrs, Address{p, Announced})
	}
	for _, r := range n.ra.sorted() {
		s.Routes = append(s.Routes, r.Route)
	}
	s.DNS = append(s.DNS, n.ra.servers(n.net.Clock().NowMonotonic())...)
	return s, n.changed
}

// Settings returns the stack's addresses, routes and name servers.
func (s *Stack) Settings() Settings {
	now, _ := s.network.settings()
	return now
}

// SetAddresses makes addrs and gateways the stack's static addresses and routers, in place of those
// of the Config and of an earlier call. Those that stay keep their connections; connections of
// the others get no more packets through. The stack announces the new ones to its neighbours.
// Addresses of DHCP and of routers stay.
//
// After an error the addresses are as before: addrs or gateways are not what a Config takes,
// an address is one that the stack has from elsewhere, or is of a family that its Config had
// none of, without [Config].Later. net.ErrClosed after the stack has ended.
func (s *Stack) SetAddresses(addrs []netip.Prefix, gateways []netip.Addr) error {
	if s.ending.Err() != nil {
		return net.ErrClosed
	}
	cfg := Config{Addrs: slices.Clone(addrs), Gateways: slices.Clone(gateways)}
	if err := cfg.checkStatic(); err != nil {
		return fmt.Errorf("netstack: set addresses: %w", err)
	}
	for _, p := range addrs {
		if !s.has(p.Addr()) {
			return fmt.Errorf("netstack: set addresses: %v: %s, and its Config not Later", p, noFamily)
		}
	}
	before := s.Settings()
	if err := s.network.setStatic(cfg.Addrs, cfg.Gateways); err != nil {
		return fmt.Errorf("netstack: set addresses: %w", err)
	}
	for _, p := range addrs {
		if !slices.Contains(before.Addrs, Address{p, Static}) {
			s.announceOne(s.card.dev.MAC(), p.Addr())
		}
	}
	return nil
}

// Changes yields the present settings and then each change, until ctx or the stack ends. Changes
// that follow each other fast may be one.
func (s *Stack) Changes(ctx context.Context) iter.Seq[Settings] {
	return func(yield func(Settings) bool) {
		for ctx.Err() == nil && s.ending.Err() == nil {
			now, changed := s.network.settings()
			if !yield(now) {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
			case <-s.ending.Done():
			}
		}
	}
}

// Ready waits until the stack has an address, and returns the first. The error is ctx's cause,
// with what the stack waited for, or net.ErrClosed.
func (s *Stack) Ready(ctx context.Context) (netip.Prefix, error) {
	for now := range s.Changes(ctx) {
		if len(now.Addrs) > 0 {
			return now.Addrs[0].Prefix, nil
		}
	}
	if s.ending.Err() != nil {
		return netip.Prefix{}, net.ErrClosed
	}
	return netip.Prefix{}, fmt.Errorf("netstack: no address yet: no %s answered: %w", s.awaited, context.Cause(ctx))
}

// advertised is what routers have advertised. gVisor checks and bounds it (ndp.go): ten prefixes
// on the link, ten for addresses, ten routes.
type advertised struct {
	addrs   map[netip.Prefix]bool // whether it was found to be ours alone
	onLink  []netip.Prefix
	routes  []advertisedRoute
	names   []nameServer
	count   uint64     // of routes discovered
	ownLink netip.Addr // our link-local address, if it is ours alone
}

type advertisedRoute struct {
	Route
	preference int8   // more is better
	since      uint64 // a router discovered later is more likely in the network we are in now
}

type nameServer struct {
	addr    netip.Addr
	until   tcpip.MonotonicTime
	forever bool
}

func (a *advertised) init() { a.addrs = map[netip.Prefix]bool{} }

// usable returns the addresses that are ours alone, in a fixed order.
func (a *advertised) usable() (list []netip.Prefix) {
	for p, ours := range a.addrs {
		if ours {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, netip.Prefix.Compare)
	return list
}

// sorted returns the routes, the best first.
func (a *advertised) sorted() []advertisedRoute {
	list := slices.Clone(a.routes)
	slices.SortFunc(list, func(x, y advertisedRoute) int {
		return cmp.Or(cmp.Compare(y.preference, x.preference), cmp.Compare(y.since, x.since))
	})
	return list
}

// servers returns the name servers whose lifetime is not over.
func (a *advertised) servers(now tcpip.MonotonicTime) (list []netip.Addr) {
	for _, s := range a.names {
		if s.forever || now.Before(s.until) {
			list = append(list, s.addr)
		}
	}
	return list
}

// name takes a name server that a router has named for a time. A lifetime of 0 ends it. There
// are dhcp.MaxServers at most.
func (a *advertised) name(addr netip.Addr, lifetime time.Duration, forever bool, now tcpip.MonotonicTime) {
	a.names = slices.DeleteFunc(a.names, func(s nameServer) bool {
		return s.addr == addr || !s.forever && !now.Before(s.until)
	})
	if lifetime > 0 && len(a.names) < dhcp.MaxServers {
		a.names = append(a.names, nameServer{addr, now.Add(lifetime), forever})
	}
}

func protocol(ip netip.Addr) tcpip.NetworkProtocolNumber {
	if ip.Is6() {
		return ipv6.ProtocolNumber
	}
	return ipv4.ProtocolNumber
}

func toStack(a netip.Addr) tcpip.Address { return tcpip.AddrFromSlice(a.AsSlice()) }

func fromStack(a tcpip.Address) netip.Addr {
	ip, _ := netip.AddrFromSlice(a.AsSlice())
	return ip
}

// subnet converts a network for the stack.
func subnet(p netip.Prefix) tcpip.Subnet {
	return tcpip.AddressWithPrefix{Address: toStack(p.Masked().Addr()), PrefixLen: p.Bits()}.Subnet()
}

// networkOf converts a network of the stack.
func networkOf(s tcpip.Subnet) netip.Prefix { return netip.PrefixFrom(fromStack(s.ID()), s.Prefix()) }

package netstack

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// Resolver returns a resolver that asks the stack's name servers, over the stack: those of
// Config.DNS, of the lease and of routers, in this order. It follows them as they change. One that
// does not answer is asked last from then on.
//
// It is Go's own resolver. The machine's /etc/hosts is read before a server is asked, and
// options and the search list are those of its /etc/resolv.conf, but not its servers.
func (s *Stack) Resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return s.dialServer(ctx, network)
	}}
}

// errNoServers is why a name is not looked up.
var errNoServers = errors.New("netstack: no name servers: neither Config.DNS nor DHCP nor a router named one")

// dialServer connects to a name server, or for UDP opens a socket for one.
func (s *Stack) dialServer(ctx context.Context, network string) (net.Conn, error) {
	servers := s.Settings().DNS
	if len(servers) == 0 {
		return nil, errNoServers
	}
	turn := s.silent.Load()
	server := servers[turn%uint32(len(servers))]
	fail := func() { s.silent.CompareAndSwap(turn, turn+1) }
	c, err := s.DialContext(ctx, network, netip.AddrPortFrom(server, 53).String())
	if err != nil {
		fail()
		return nil, err
	}
	if p, ok := c.(*packetConn); ok {
		return &serverConn{p, fail}, nil
	}
	return c, nil
}

// A serverConn is a socket for a name server. fail is called if the server does not answer.
type serverConn struct {
	*packetConn
	fail func()
}

func (c *serverConn) Read(b []byte) (int, error) {
	n, err := c.packetConn.Read(b)
	if err != nil {
		c.fail()
	}
	return n, err
}

// mostTried is how many addresses of a name DialContext tries.
const mostTried = 4

// dialName connects to the addresses of a name in turn.
func (s *Stack) dialName(ctx context.Context, network, host, port string) (net.Conn, error) {
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return nil, &net.AddrError{Err: "not a port", Addr: port}
	}
	if len(s.Settings().DNS) == 0 {
		return nil, &net.AddrError{Err: "not an IP address, and the stack has no name servers", Addr: host}
	}
	family := "ip" + strings.TrimLeft(network, "tcpud")
	if !strings.HasSuffix(host, ".") {
		host += "." // the machine's search list has no part in this
	}
	addrs, err := s.Resolver().LookupNetIP(ctx, family, host)
	if err != nil {
		return nil, err
	}
	addrs = s.order(addrs)
	for i, a := range addrs {
		var c net.Conn
		part, cancel := share(ctx, len(addrs)-i)
		c, err = s.DialContext(part, network, net.JoinHostPort(a.String(), port))
		cancel()
		if err == nil || ctx.Err() != nil {
			return c, err
		}
	}
	if err == nil {
		err = &net.AddrError{Err: "no address of a family that the stack has", Addr: host}
	}
	return nil, err
}

// order returns the first addresses that the stack can try, those it has a route to first.
func (s *Stack) order(addrs []netip.Addr) (list []netip.Addr) {
	for _, a := range addrs {
		a = a.Unmap()
		if a.Is4() && s.has4 || a.Is6() && s.has6 {
			list = append(list, a)
		}
	}
	slices.SortStableFunc(list, func(a, b netip.Addr) int {
		switch x, y := s.routed(a), s.routed(b); {
		case x && !y:
			return -1
		case y && !x:
			return 1
		}
		return 0
	})
	return list[:min(len(list), mostTried)]
}

func (s *Stack) routed(a netip.Addr) bool {
	to := toStack(a)
	id := nic
	if !header.IsV6LinkLocalUnicastAddress(to) {
		id = 0
	}
	r, err := s.network.net.FindRoute(id, tcpip.Address{}, to, protocol(a), false)
	if err != nil {
		return false
	}
	r.Release()
	return true
}

// share gives one of n tries its share of the time.
func share(ctx context.Context, n int) (context.Context, context.CancelFunc) {
	end, ok := ctx.Deadline()
	if !ok || n == 1 {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, max(time.Until(end)/time.Duration(n), 2*time.Second))
}

package netstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Listen listens for TCP connections. network is "tcp", "tcp4" or "tcp6"; address
// is an IP address and the number of a port, such as "192.0.2.1:80", or ":80" for any address of
// the stack; names of hosts and of services are none. ":80" and "[::]:80" with "tcp" take IPv4 and IPv6. For port 0 the stack chooses one.
// The stack needs no address yet for ":80".
//
// Errors are *net.OpError: EADDRINUSE, EADDRNOTAVAIL, net.ErrClosed after the stack
// has ended.
func (s *Stack) Listen(network, address string) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	local, err := s.own(network, "tcp", address)
	if err != nil {
		return fail(err)
	}
	var queue waiter.Queue
	ep, refused := s.endpoint(tcp.ProtocolNumber, local, &queue)
	if refused != nil {
		return fail(s.errorOf(refused))
	}
	if refused = ep.Bind(local.full); refused == nil {
		refused = ep.Listen(backlog)
	}
	if refused != nil {
		ep.Close()
		return fail(s.errorOf(refused))
	}
	return &listener{TCPListener: gonet.NewTCPListener(s.network.net, &queue, ep), shared: shared{stack: s}}, nil
}

// backlog is how many connections may wait for Accept: Linux's net.core.somaxconn.
const backlog = 4096

// ListenPacket opens a UDP socket that receives from any sender. network is "udp",
// "udp4" or "udp6"; address and errors are as for Listen.
func (s *Stack) ListenPacket(network, address string) (net.PacketConn, error) {
	local, err := s.own(network, "udp", address)
	if err == nil {
		var c net.Conn
		if c, err = s.openUDP(local, false); err == nil {
			return c.(*packetConn), nil
		}
	}
	return nil, &net.OpError{Op: "listen", Net: network, Err: err}
}

// Dial is DialContext without a context.
func (s *Stack) Dial(network, address string) (net.Conn, error) {
	return s.DialContext(context.Background(), network, address)
}

// DialContext connects to a host and the number of a port, over TCP or UDP. A host that is no IP address is
// looked up with the stack's [Stack.Resolver], and its addresses are tried in turn. It fits the
// field DialContext of http.Transport.
//
// Errors are *net.OpError: ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT, a
// *net.DNSError, the context's cause, net.ErrClosed after the stack has ended.
func (s *Stack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	kind := "tcp"
	if strings.HasPrefix(network, "udp") {
		kind = "udp"
	}
	to, err := s.resolve(network, kind, address)
	var c net.Conn
	switch {
	case err == errIsName:
		host, port, _ := net.SplitHostPort(address)
		c, err = s.dialName(ctx, network, host, port)
		if _, wrapped := err.(*net.OpError); wrapped {
			return nil, err
		}
	case err != nil:
	case kind == "udp":
		c, err = s.openUDP(to, true)
	default:
		c, err = s.dialTCP(ctx, to)
	}
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: name(network, to.full), Err: err}
	}
	return c, nil
}

func name(network string, a tcpip.FullAddress) net.Addr {
	switch {
	case a.Addr.Len() == 0:
		return nil
	case strings.HasPrefix(network, "udp"):
		return &net.UDPAddr{IP: a.Addr.AsSlice(), Port: int(a.Port)}
	}
	return &net.TCPAddr{IP: a.Addr.AsSlice(), Port: int(a.Port)}
}

func (s *Stack) dialTCP(ctx context.Context, remote place) (net.Conn, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	var queue waiter.Queue
	ep, refused := s.endpoint(tcp.ProtocolNumber, remote, &queue)
	if refused != nil {
		return nil, s.errorOf(refused)
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents)
	queue.EventRegister(&entry)
	defer queue.EventUnregister(&entry)
	s.card.clock.expire()
	refused = ep.Connect(remote.full)
	if _, started := refused.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ready:
			refused = ep.LastError()
		case <-ctx.Done():
			ep.Close()
			return nil, context.Cause(ctx)
		case <-s.ending.Done():
			ep.Close()
			return nil, net.ErrClosed
		}
	}
	if refused != nil {
		ep.Close()
		return nil, s.errorOf(refused)
	}
	return &conn{TCPConn: gonet.NewTCPConn(&queue, ep), shared: shared{stack: s}}, nil
}

// openUDP opens a socket at a place of ours, or for another station.
func (s *Stack) openUDP(at place, remote bool) (net.Conn, error) {
	var queue waiter.Queue
	ep, refused := s.endpoint(udp.ProtocolNumber, at, &queue)
	if refused != nil {
		return nil, s.errorOf(refused)
	}
	if remote {
		if refused = ep.Bind(tcpip.FullAddress{NIC: at.full.NIC}); refused == nil {
			refused = ep.Connect(at.full)
		}
	} else {
		refused = ep.Bind(at.full)
	}
	if refused != nil {
		ep.Close()
		return nil, s.errorOf(refused)
	}
	c := &packetConn{UDPConn: gonet.NewUDPConn(&queue, ep), shared: shared{stack: s}, at: at}
	c.came = ep.Stats().(*tcpip.TransportEndpointStats)
	s.sockets.add(c)
	return c, nil
}

// A place is an address and a port in the stack's types.
type place struct {
	full   tcpip.FullAddress
	family tcpip.NetworkProtocolNumber
	both   bool // any address of ours of either family; family is IPv6
}

// takes reports whether a socket at the place can send to ip.
func (p *place) takes(ip netip.Addr) bool { return p.both || protocol(ip) == p.family }

// endpoint makes an endpoint for a place.
func (s *Stack) endpoint(transport tcpip.TransportProtocolNumber, at place, queue *waiter.Queue) (tcpip.Endpoint, tcpip.Error) {
	ep, refused := s.network.net.NewEndpoint(transport, at.family, queue)
	if refused == nil && at.family == ipv6.ProtocolNumber {
		ep.SocketOptions().SetV6Only(!at.both)
	}
	return ep, refused
}

// noFamily says why an address is of no use.
const noFamily = "the stack has no address of this family"

// errIsName means that an address has a name for its host.
var errIsName = errors.New("a name")

// has reports whether the stack has, or may get, an address of ip's family.
func (s *Stack) has(ip netip.Addr) bool { return ip.Is4() && s.has4 || ip.Is6() && s.has6 }

// resolve converts an address for the stack. An address without a host means any address
// of the stack.
func (s *Stack) resolve(network, kind, address string) (at place, err error) {
	family, ok := strings.CutPrefix(network, kind)
	if !ok || family != "" && family != "4" && family != "6" {
		return at, net.UnknownNetworkError(network)
	}
	if s.ending.Err() != nil {
		return at, net.ErrClosed
	}
	if family == "4" && !s.has4 || family == "6" && !s.has6 {
		return at, &net.AddrError{Err: noFamily, Addr: address}
	}
	if strings.HasPrefix(address, ":") {
		any := netip.IPv4Unspecified()
		if s.has6 && family != "4" {
			any = netip.IPv6Unspecified()
		}
		address = net.JoinHostPort(any.String(), address[1:])
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		if host, _, split := net.SplitHostPort(address); split == nil && isName(host) {
			return at, errIsName
		}
		return at, &net.AddrError{Err: "not an IP address and the number of a port", Addr: address}
	}
	ip := ap.Addr().Unmap()
	if !s.has(ip) || family == "4" && !ip.Is4() || family == "6" && !ip.Is6() {
		return at, &net.AddrError{Err: noFamily, Addr: address}
	}
	at = place{full: s.full(ip, ap.Port()), family: protocol(ip)}
	at.both = ip == netip.IPv6Unspecified() && s.has4 && family == ""
	return at, nil
}

// own converts an address of ours.
func (s *Stack) own(network, kind, address string) (place, error) {
	at, err := s.resolve(network, kind, address)
	if err == errIsName {
		err = &net.AddrError{Err: "not an IP address and the number of a port", Addr: address}
	}
	return at, err
}

// isName reports whether a host may be a name: not an address that was mistyped.
func isName(host string) bool {
	_, err := netip.ParseAddr(host)
	return host != "" && err != nil && !strings.ContainsAny(host, ":%/ ") &&
		strings.ContainsFunc(host, func(r rune) bool { return r > '9' })
}

// full converts an address and a port. The zero address is any of ours.
func (s *Stack) full(ip netip.Addr, port uint16) tcpip.FullAddress {
	a := tcpip.FullAddress{Port: port}
	if ip.Is6() && ip.IsLinkLocalUnicast() {
		a.NIC = nic // the zone: there is only one
	}
	if !ip.IsUnspecified() {
		a.Addr = toStack(ip.WithZone(""))
	}
	return a
}

// errorOf maps an error of gVisor's stack to an errno of the system.
func (s *Stack) errorOf(refused tcpip.Error) error {
	if s.ending.Err() != nil {
		return net.ErrClosed
	}
	switch refused.(type) {
	case *tcpip.ErrConnectionRefused:
		return syscall.ECONNREFUSED
	case *tcpip.ErrHostUnreachable, *tcpip.ErrHostDown:
		return syscall.EHOSTUNREACH
	case *tcpip.ErrNetworkUnreachable:
		return syscall.ENETUNREACH
	case *tcpip.ErrTimeout:
		return syscall.ETIMEDOUT
	case *tcpip.ErrPortInUse:
		return syscall.EADDRINUSE
	case *tcpip.ErrBadLocalAddress:
		return syscall.EADDRNOTAVAIL
	case *tcpip.ErrConnectionReset:
		return syscall.ECONNRESET
	case *tcpip.ErrConnectionAborted:
		return syscall.ECONNABORTED
	}
	return errors.New(refused.String())
}

// shared is the common part of the wrappers of gonet's types. It replaces gonet's own errors
// by net.ErrClosed and os.ErrDeadlineExceeded, which the net package returns.
type shared struct {
	stack  *Stack
	closed atomic.Bool
}

func (c *shared) fixError(err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	why := err
	op, isOp := errors.AsType[*net.OpError](err)
	if isOp {
		why = op.Err
	}
	timeout, canTime := errors.AsType[net.Error](why)
	switch {
	case c.closed.Load() || c.stack.ending.Err() != nil:
		why = net.ErrClosed
	case canTime && timeout.Timeout():
		why = os.ErrDeadlineExceeded
	default:
		if errno := errnoOf(why.Error()); errno != nil {
			why = errno
		}
	}
	if !isOp {
		return why
	}
	fixed := *op
	fixed.Err = why
	return &fixed
}

// errnoOf returns the errno for an error that gonet passed on as text, or nil.
func errnoOf(text string) error {
	switch text {
	case (&tcpip.ErrConnectionReset{}).String():
		return syscall.ECONNRESET
	case (&tcpip.ErrConnectionAborted{}).String(), (&tcpip.ErrAborted{}).String():
		return syscall.ECONNABORTED
	case (&tcpip.ErrConnectionRefused{}).String():
		return syscall.ECONNREFUSED
	case (&tcpip.ErrTimeout{}).String():
		return syscall.ETIMEDOUT
	case (&tcpip.ErrClosedForSend{}).String():
		return syscall.EPIPE
	case (&tcpip.ErrHostUnreachable{}).String():
		return syscall.EHOSTUNREACH
	case (&tcpip.ErrNetworkUnreachable{}).String():
		return syscall.ENETUNREACH
	case (&tcpip.ErrMessageTooLong{}).String():
		return syscall.EMSGSIZE
	case (&tcpip.ErrNoBufferSpace{}).String():
		return syscall.ENOBUFS
	}
	return nil
}

type listener struct {
	*gonet.TCPListener
	shared
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.TCPListener.Accept()
	if err != nil {
		if l.closed.Load() || l.stack.ending.Err() != nil {
			err = &net.OpError{Op: "accept", Net: "tcp", Err: net.ErrClosed}
		}
		return nil, err
	}
	return &conn{TCPConn: c.(*gonet.TCPConn), shared: shared{stack: l.stack}}, nil
}

// Close wakes Accept. It is idempotent.
func (l *listener) Close() error {
	if !l.closed.Swap(true) {
		l.Shutdown()
		return l.TCPListener.Close()
	}
	return nil
}

type conn struct {
	*gonet.TCPConn
	shared
}

func (c *conn) Read(b []byte) (int, error) {
	c.stack.card.clock.expire()
	n, err := c.TCPConn.Read(b)
	if err == io.EOF && (c.closed.Load() || c.stack.ending.Err() != nil) {
		return n, &net.OpError{Op: "read", Net: "tcp", Err: net.ErrClosed}
	}
	return n, c.fixError(err)
}

func (c *conn) Write(b []byte) (int, error) {
	c.stack.card.clock.expire()
	n, err := c.TCPConn.Write(b)
	return n, c.fixError(err)
}

// Close is idempotent and wakes readers and writers.
func (c *conn) Close() error {
	if !c.closed.Swap(true) {
		return c.TCPConn.Close()
	}
	return nil
}

type packetConn struct {
	*gonet.UDPConn
	shared
	readings
	at place
}

func (c *packetConn) Read(b []byte) (int, error) {
	c.stack.card.clock.expire()
	c.begins()
	n, err := c.UDPConn.Read(b)
	c.ends(err)
	return n, c.fixRead(err)
}

func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	c.stack.card.clock.expire()
	c.begins()
	n, from, err := c.UDPConn.ReadFrom(b)
	c.ends(err)
	return n, from, c.fixRead(err)
}

// fixRead turns io.EOF into net.ErrClosed: a datagram socket ends only with Close.
func (c *packetConn) fixRead(err error) error {
	if err == io.EOF {
		return &net.OpError{Op: "read", Net: "udp", Err: net.ErrClosed}
	}
	return c.fixError(err)
}

func (c *packetConn) Write(b []byte) (int, error) {
	c.stack.card.clock.expire()
	n, err := c.UDPConn.Write(b)
	return n, c.fixError(err)
}

// WriteTo takes a *net.UDPAddr of the socket's family.
func (c *packetConn) WriteTo(b []byte, to net.Addr) (int, error) {
	fail := func(err error) (int, error) {
		return 0, &net.OpError{Op: "write", Net: "udp", Addr: to, Err: err}
	}
	udp, ok := to.(*net.UDPAddr)
	if !ok {
		return fail(&net.AddrError{Err: "not a *net.UDPAddr", Addr: fmt.Sprint(to)}) // to may be nil
	}
	ip := udp.AddrPort().Addr().Unmap()
	if !ip.IsValid() || !c.stack.has(ip) || !c.at.takes(ip) {
		return fail(&net.AddrError{Err: noFamily, Addr: to.String()})
	}
	c.stack.card.clock.expire()
	n, err := c.UDPConn.WriteTo(b, &net.UDPAddr{IP: ip.AsSlice(), Port: udp.Port})
	return n, c.fixError(err)
}

// Close is idempotent and wakes readers.
func (c *packetConn) Close() error {
	if !c.closed.Swap(true) {
		c.stack.sockets.remove(c)
		return c.UDPConn.Close()
	}
	return nil
}

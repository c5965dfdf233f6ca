package netstack

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Listen listens for TCP connections. network is "tcp", "tcp4" or "tcp6"; address
// is an IP address and a port, such as "192.0.2.1:80", or ":80" for any address of the
// stack. For port 0 the stack chooses one.
//
// Errors are *net.OpError: EADDRINUSE, EADDRNOTAVAIL, net.ErrClosed after the stack
// has ended.
func (s *Stack) Listen(network, address string) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	local, err := s.resolve(network, "tcp", address)
	if err != nil {
		return fail(err)
	}
	var queue waiter.Queue
	ep, refused := s.net.NewEndpoint(tcp.ProtocolNumber, protocol(s.addr), &queue)
	if refused != nil {
		return fail(s.errorOf(refused))
	}
	if refused = ep.Bind(local); refused == nil {
		refused = ep.Listen(backlog)
	}
	if refused != nil {
		ep.Close()
		return fail(s.errorOf(refused))
	}
	return &listener{TCPListener: gonet.NewTCPListener(s.net, &queue, ep), shared: shared{stack: s}}, nil
}

// backlog is how many connections may wait for Accept: Linux's net.core.somaxconn.
const backlog = 4096

// ListenPacket opens a UDP socket that receives from any sender. network is "udp",
// "udp4" or "udp6"; address and errors are as for Listen.
func (s *Stack) ListenPacket(network, address string) (net.PacketConn, error) {
	local, err := s.resolve(network, "udp", address)
	if err == nil {
		var c net.Conn
		if c, err = s.openUDP(local, nil); err == nil {
			return c.(*packetConn), nil
		}
	}
	return nil, &net.OpError{Op: "listen", Net: network, Err: err}
}

// Dial is DialContext without a context.
func (s *Stack) Dial(network, address string) (net.Conn, error) {
	return s.DialContext(context.Background(), network, address)
}

// DialContext connects to an IP address and a port, over TCP or UDP. It looks up no names.
// It fits the field DialContext of http.Transport.
//
// Errors are *net.OpError: ECONNREFUSED, EHOSTUNREACH, ENETUNREACH, ETIMEDOUT, the
// context's cause, net.ErrClosed after the stack has ended.
func (s *Stack) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	var c net.Conn
	var remote tcpip.FullAddress
	var err error
	if strings.HasPrefix(network, "udp") {
		if remote, err = s.resolve(network, "udp", address); err == nil {
			c, err = s.openUDP(tcpip.FullAddress{}, &remote)
		}
	} else if remote, err = s.resolve(network, "tcp", address); err == nil {
		c, err = s.dialTCP(ctx, remote)
	}
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Addr: name(network, remote), Err: err}
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

func (s *Stack) dialTCP(ctx context.Context, remote tcpip.FullAddress) (net.Conn, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	var queue waiter.Queue
	ep, refused := s.net.NewEndpoint(tcp.ProtocolNumber, protocol(s.addr), &queue)
	if refused != nil {
		return nil, s.errorOf(refused)
	}
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents)
	queue.EventRegister(&entry)
	defer queue.EventUnregister(&entry)
	s.card.clock.expire()
	refused = ep.Connect(remote)
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

func (s *Stack) openUDP(local tcpip.FullAddress, remote *tcpip.FullAddress) (net.Conn, error) {
	var queue waiter.Queue
	ep, refused := s.net.NewEndpoint(udp.ProtocolNumber, protocol(s.addr), &queue)
	if refused != nil {
		return nil, s.errorOf(refused)
	}
	if refused = ep.Bind(local); refused == nil && remote != nil {
		refused = ep.Connect(*remote)
	}
	if refused != nil {
		ep.Close()
		return nil, s.errorOf(refused)
	}
	return &packetConn{UDPConn: gonet.NewUDPConn(&queue, ep), shared: shared{stack: s}}, nil
}

// resolve converts an address for the stack. An address without a host means any address
// of the stack.
func (s *Stack) resolve(network, kind, address string) (a tcpip.FullAddress, err error) {
	family, ok := strings.CutPrefix(network, kind)
	if !ok || family != "" && family != "4" && family != "6" {
		return a, net.UnknownNetworkError(network)
	}
	if s.ending.Err() != nil {
		return a, net.ErrClosed
	}
	if (family == "4") != s.addr.Is4() && family != "" {
		return a, &net.AddrError{Err: "the stack has no address of this family", Addr: address}
	}
	if strings.HasPrefix(address, ":") {
		any := netip.IPv4Unspecified()
		if s.addr.Is6() {
			any = netip.IPv6Unspecified()
		}
		address = net.JoinHostPort(any.String(), address[1:])
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return a, &net.AddrError{Err: "not an IP address and a port", Addr: address}
	}
	ip := ap.Addr().Unmap()
	if ip.Is4() != s.addr.Is4() {
		return a, &net.AddrError{Err: "the stack has no address of this family", Addr: address}
	}
	a.Port = ap.Port()
	if !ip.IsUnspecified() {
		a.Addr = tcpip.AddrFromSlice(ip.WithZone("").AsSlice())
	}
	return a, nil
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
}

func (c *packetConn) Read(b []byte) (int, error) {
	c.stack.card.clock.expire()
	n, err := c.UDPConn.Read(b)
	return n, c.fixRead(err)
}

func (c *packetConn) ReadFrom(b []byte) (int, net.Addr, error) {
	c.stack.card.clock.expire()
	n, from, err := c.UDPConn.ReadFrom(b)
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

// WriteTo takes a *net.UDPAddr of the stack's family.
func (c *packetConn) WriteTo(b []byte, to net.Addr) (int, error) {
	fail := func(err error) (int, error) {
		return 0, &net.OpError{Op: "write", Net: "udp", Addr: to, Err: err}
	}
	udp, ok := to.(*net.UDPAddr)
	if !ok {
		return fail(&net.AddrError{Err: "not a *net.UDPAddr", Addr: to.String()})
	}
	ip := udp.AddrPort().Addr().Unmap()
	if !ip.IsValid() || ip.Is4() != c.stack.addr.Is4() {
		return fail(&net.AddrError{Err: "the stack has no address of this family", Addr: to.String()})
	}
	c.stack.card.clock.expire()
	n, err := c.UDPConn.WriteTo(b, &net.UDPAddr{IP: ip.AsSlice(), Port: udp.Port})
	return n, c.fixError(err)
}

// Close is idempotent and wakes readers.
func (c *packetConn) Close() error {
	if !c.closed.Swap(true) {
		return c.UDPConn.Close()
	}
	return nil
}

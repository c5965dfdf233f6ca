//go:build linux

package netns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Socket opens a socket inside the namespace, with the rights of its root: it may be a
// raw socket. It is non-blocking. The caller owns it.
func (s *Sandbox) Socket(domain, typ, protocol int) (*os.File, error) {
	_, f, err := s.ask(request{Socket: &socketRequest{domain, typ, protocol}})
	if err == nil && f == nil {
		err = errors.New("netns: the child passed no socket")
	}
	return f, err
}

// DialContext connects from inside the namespace, through its TCP/IP. It has the
// signature of http.Transport's field. network is "tcp" or "udp", optionally with a 4 or
// 6. address is an IP address and a port; names are not looked up.
func (s *Sandbox) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	fail := func(err error) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	f, sa, err := s.open(network, address)
	if err != nil {
		return fail(err)
	}
	defer f.Close() // the net.Conn uses a duplicate
	if err := connect(ctx, f, sa); err != nil {
		return fail(err)
	}
	c, err := net.FileConn(f)
	if err != nil {
		return fail(err)
	}
	return c, nil
}

// Listen listens for TCP connections inside the namespace. network and address are as for
// DialContext; with port 0 the kernel chooses a port.
func (s *Sandbox) Listen(network, address string) (net.Listener, error) {
	fail := func(err error) (net.Listener, error) {
		return nil, &net.OpError{Op: "listen", Net: network, Err: err}
	}
	if !strings.HasPrefix(network, "tcp") {
		return fail(net.UnknownNetworkError(network))
	}
	f, sa, err := s.open(network, address)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	err = control(f, func(fd int) error {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
		if err := unix.Bind(fd, sa); err != nil {
			return os.NewSyscallError("bind", err)
		}
		return os.NewSyscallError("listen", unix.Listen(fd, unix.SOMAXCONN))
	})
	if err != nil {
		return fail(err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		return fail(err)
	}
	return l, nil
}

func (s *Sandbox) open(network, address string) (*os.File, unix.Sockaddr, error) {
	typ := 0
	switch network {
	case "tcp", "tcp4", "tcp6":
		typ = unix.SOCK_STREAM
	case "udp", "udp4", "udp6":
		typ = unix.SOCK_DGRAM
	default:
		return nil, nil, net.UnknownNetworkError(network)
	}
	ap, err := netip.ParseAddrPort(address)
	if err != nil {
		return nil, nil, &net.AddrError{Err: "not an IP address and a port", Addr: address}
	}
	ip := ap.Addr().Unmap()
	if strings.HasSuffix(network, "4") && !ip.Is4() || strings.HasSuffix(network, "6") && !ip.Is6() {
		return nil, nil, &net.AddrError{Err: "of the other family than " + network, Addr: address}
	}
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ip.As16()}
	domain := unix.AF_INET6
	if ip.Is4() {
		sa, domain = &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ip.As4()}, unix.AF_INET
	}
	f, err := s.Socket(domain, typ, 0)
	return f, sa, err
}

// connect waits until f is connected or ctx ends.
func connect(ctx context.Context, f *os.File, sa unix.Sockaddr) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	err := control(f, func(fd int) error { return unix.Connect(fd, sa) })
	if err == nil {
		return nil
	}
	if err != unix.EINPROGRESS {
		return os.NewSyscallError("connect", err)
	}
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { f.SetWriteDeadline(time.Unix(1, 0)) })
	var result error
	err = conn.Write(func(fd uintptr) (done bool) {
		result, done = connected(int(fd))
		return done
	})
	if !stop() { // connected or not: the socket has the deadline, or is about to get it
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	return os.NewSyscallError("connect", result)
}

// connected returns the result of a started connect, once it is done. A writable socket
// may still be connecting.
func connected(fd int) (err error, done bool) {
	errno, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err, true
	}
	if errno != 0 {
		return syscall.Errno(errno), true
	}
	_, err = unix.Getpeername(fd)
	if err == unix.ENOTCONN {
		return nil, false
	}
	return err, true
}

func control(f *os.File, do func(fd int) error) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := conn.Control(func(fd uintptr) { result = do(int(fd)) }); err != nil {
		return err
	}
	return result
}

package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// A localStack is the router's own TCP/IP: name server, counters, echo. It is gVisor's stack with
// one card that has all addresses of the router and no Ethernet. Which port a packet of its
// leaves by, and to which MAC, the router core decides as for any other packet.
type localStack struct {
	stack *stack.Stack
	ep    *channel.Endpoint

	mu    sync.Mutex
	addrs map[netip.Addr]bool // guarded by mu
	held  map[netip.Addr]bool // guarded by mu: addresses that stay while no port has them
}

const (
	localQueue = 512  // packets that may wait to leave
	localMTU   = 1280 // fits every port
)

// finishing is how long what is left of a connection is kept: in FIN-WAIT-2 and in TIME-WAIT. A minute, as is usual,
// would be memory for as many as guests can make in it, and what these wait for are packets of a link or two.
const finishing = 5 * time.Second

// localOptions are those of TCP. What is sent is given up after some twenty seconds without an
// acknowledgement. A connection's buffers hold the longest message of a name server.
func localOptions() []tcpip.SettableTransportProtocolOption {
	linger, wait, retries := tcpip.TCPLingerTimeoutOption(finishing), tcpip.TCPTimeWaitTimeoutOption(finishing), tcpip.TCPMaxRetriesOption(6)
	moderate := tcpip.TCPModerateReceiveBufferOption(false)
	return []tcpip.SettableTransportProtocolOption{&linger, &wait, &retries, &moderate,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: 1 << 16, Max: 1 << 16},
		&tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: 1 << 17, Max: 1 << 17},
	}
}

// localNIC is the number of the stack's only card.
const localNIC tcpip.NICID = 1

func newLocalStack() (*localStack, error) {
	l := &localStack{ep: channel.New(localQueue, localMTU, ""), addrs: map[netip.Addr]bool{}, held: map[netip.Addr]bool{}}
	l.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
		HandleLocal:        true,
	})
	if err := l.stack.CreateNIC(localNIC, l.ep); err != nil {
		l.stack.Destroy()
		return nil, fmt.Errorf("the router's own TCP/IP: %s", err)
	}
	for _, opt := range localOptions() {
		if err := l.stack.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			l.stack.Destroy()
			return nil, fmt.Errorf("the router's own TCP/IP: set %T: %s", opt, err)
		}
	}
	l.stack.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: localNIC},
		{Destination: header.IPv6EmptySubnet, NIC: localNIC},
	})
	return l, nil
}

// close ends the stack and all its sockets.
func (l *localStack) close() {
	l.stack.Close()
	l.ep.Close()
	l.stack.Wait()
}

// setAddrs makes list, and the addresses that are held, the addresses of the stack.
func (l *localStack) setAddrs(list []netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.setLocked(list)
}

// hold gives the stack an address for good, so that a socket listens there while no port has the address.
func (l *localStack) hold(a netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	list := []netip.Addr{a}
	for b := range l.addrs {
		list = append(list, b)
	}
	l.held[a] = true
	return l.setLocked(list)
}

func (l *localStack) setLocked(list []netip.Addr) error {
	want := map[netip.Addr]bool{}
	for _, a := range list {
		want[a] = true
	}
	for a := range l.held {
		want[a] = true
	}
	for a := range l.addrs {
		if !want[a] {
			l.stack.RemoveAddress(localNIC, tcpip.AddrFromSlice(a.AsSlice()))
			delete(l.addrs, a)
		}
	}
	for a := range want {
		if l.addrs[a] {
			continue
		}
		err := l.stack.AddProtocolAddress(localNIC, tcpip.ProtocolAddress{
			Protocol: protocolOf(a), AddressWithPrefix: tcpip.AddrFromSlice(a.AsSlice()).WithPrefix(),
		}, stack.AddressProperties{})
		if err != nil {
			return fmt.Errorf("give the router's own TCP/IP the address %v: %s", a, err)
		}
		l.addrs[a] = true
	}
	return nil
}

func protocolOf(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

func fullAddress(ap netip.AddrPort) tcpip.FullAddress {
	f := tcpip.FullAddress{NIC: localNIC, Port: ap.Port()}
	if ap.Addr().IsValid() {
		f.Addr = tcpip.AddrFromSlice(ap.Addr().AsSlice())
	}
	return f
}

// inject gives the stack an IP packet, which it copies.
func (l *localStack) inject(ip []byte) {
	if len(ip) == 0 {
		return
	}
	proto := ipv4.ProtocolNumber
	if ip[0]>>4 == 6 {
		proto = ipv6.ProtocolNumber
	}
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(ip)})
	l.ep.InjectInbound(proto, p)
	p.DecRef()
}

// next waits for a packet that the stack sends and appends it to b. It returns nil when ctx ends.
func (l *localStack) next(ctx context.Context, b []byte) []byte {
	p := l.ep.ReadContext(ctx)
	if p == nil {
		return nil
	}
	v := p.ToView()
	b = append(b, v.AsSlice()...)
	v.Release()
	p.DecRef()
	return b
}

func (l *localStack) listenTCP(at netip.AddrPort) (net.Listener, error) {
	return gonet.ListenTCP(l.stack, fullAddress(at), protocolOf(at.Addr()))
}

func (l *localStack) listenUDP(at netip.AddrPort) (net.PacketConn, error) {
	a := fullAddress(at)
	return gonet.DialUDP(l.stack, &a, nil, protocolOf(at.Addr()))
}

// dial connects from an address of the router's; gVisor chooses the port at random.
func (l *localStack) dial(ctx context.Context, network string, from netip.Addr, to netip.AddrPort) (net.Conn, error) {
	local, remote := fullAddress(netip.AddrPortFrom(from, 0)), fullAddress(to)
	if network == "udp" {
		return gonet.DialUDP(l.stack, &local, &remote, protocolOf(to.Addr()))
	}
	return gonet.DialTCPWithBind(ctx, l.stack, local, remote, protocolOf(to.Addr()))
}

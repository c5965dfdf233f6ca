package netstack

import (
	"bytes"
	"context"
	"net/netip"
	"time"

	"barevif/pvnet/netstack/dhcp"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// Ports of DHCP (RFC 2131, section 4.1).
const (
	dhcpServer = 67
	dhcpClient = 68
)

// mostReceived is how many messages may wait for the DHCP client. More are lost, like datagrams
// for a socket that is full.
const mostReceived = 16

// A leasing carries the messages of a DHCP client. While the stack has no address, its card
// listens for what is sent to the client's port at any address.
type leasing struct {
	s        *Stack
	ep       tcpip.Endpoint // the client's port, of all our addresses
	queue    waiter.Queue
	received chan []byte
	links    chan dhcp.Link // has the latest state at most
	link     dhcp.Link      // used by the watcher only
}

func newLeasing(s *Stack) (*leasing, error) {
	l := &leasing{s: s, received: make(chan []byte, mostReceived), links: make(chan dhcp.Link, 1)}
	ep, refused := s.network.net.NewEndpoint(udp.ProtocolNumber, ipv4.ProtocolNumber, &l.queue)
	if refused != nil {
		return nil, errorText("open the DHCP client's port", refused)
	}
	if refused = ep.Bind(tcpip.FullAddress{NIC: nic, Port: dhcpClient}); refused != nil {
		ep.Close()
		return nil, errorText("open the DHCP client's port", refused)
	}
	l.ep = ep
	return l, nil
}

// run runs the client until ctx ends.
func (l *leasing) run(ctx context.Context, hostname string) {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	l.queue.EventRegister(&entry)
	read := make(chan struct{})
	go func() {
		defer close(read)
		l.read(ctx, ready)
	}()
	n := l.s.network
	dhcp.Run(ctx, dhcp.Config{
		Broadcast: l.broadcast, Unicast: l.unicast, Received: l.received, Links: l.links,
		Leased: l.use, InUse: l.inUse, Acquire: l.acquire, Hostname: hostname, Logger: n.log,
	})
	<-read
	l.queue.EventUnregister(&entry)
	l.ep.Close()
}

// read passes on what arrives at the client's port.
func (l *leasing) read(ctx context.Context, ready <-chan struct{}) {
	for {
		var b bytes.Buffer
		_, err := l.ep.Read(&b, tcpip.ReadOptions{})
		if err == nil {
			l.take(b.Bytes())
			continue
		}
		if _, empty := err.(*tcpip.ErrWouldBlock); !empty && ctx.Err() != nil {
			return
		}
		select {
		case <-ready:
		case <-ctx.Done():
			return
		}
	}
}

func (l *leasing) take(b []byte) {
	select {
	case l.received <- b:
	default:
	}
}

// acquire makes the card listen, too, or no more.
func (l *leasing) acquire(on bool) {
	if !on {
		l.s.card.tap.Store(nil)
		return
	}
	tap := func(p *stack.PacketBuffer) {
		if p.NetworkProtocolNumber != ipv4.ProtocolNumber {
			return
		}
		if b := toClient(p.Data().AsRange().ToSlice()); b != nil {
			l.take(b)
		}
	}
	l.s.card.tap.Store(&tap)
}

// toClient returns the payload of a datagram of a DHCP server to a client, or nil for any other
// IPv4 packet.
func toClient(b []byte) []byte {
	ip := header.IPv4(b)
	if !ip.IsValid(len(b)) || !ip.IsChecksumValid() || ip.TransportProtocol() != header.UDPProtocolNumber ||
		ip.FragmentOffset() != 0 || ip.Flags()&header.IPv4FlagMoreFragments != 0 {
		return nil
	}
	u := header.UDP(ip.Payload())
	if len(u) < header.UDPMinimumSize || int(u.Length()) < header.UDPMinimumSize || int(u.Length()) > len(u) {
		return nil
	}
	u = u[:u.Length()]
	if u.SourcePort() != dhcpServer || u.DestinationPort() != dhcpClient {
		return nil
	}
	if u.Checksum() != 0 && !u.IsChecksumValid(ip.SourceAddress(), ip.DestinationAddress(), checksum.Checksum(u.Payload(), 0)) {
		return nil
	}
	return u.Payload()
}

// broadcast sends a message of a station that has no address, which the stack itself does not.
func (l *leasing) broadcast(m []byte) error {
	b := datagram(netip.AddrPortFrom(netip.IPv4Unspecified(), dhcpClient), netip.AddrPortFrom(broadcast4, dhcpServer), m)
	if refused := l.s.network.net.WritePacketToRemote(nic, header.EthernetBroadcastAddress, ipv4.ProtocolNumber, buffer.MakeWithData(b)); refused != nil {
		return errorText("send", refused)
	}
	return nil
}

// datagram returns an IPv4 packet with a UDP datagram.
func datagram(from, to netip.AddrPort, payload []byte) []byte {
	src, dst := toStack(from.Addr()), toStack(to.Addr())
	b := make([]byte, header.IPv4MinimumSize+header.UDPMinimumSize+len(payload))
	ip := header.IPv4(b)
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(b)), TTL: 64, Protocol: uint8(header.UDPProtocolNumber), SrcAddr: src, DstAddr: dst})
	ip.SetChecksum(^ip.CalculateChecksum())
	u := header.UDP(b[header.IPv4MinimumSize:])
	u.Encode(&header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: uint16(len(u))})
	copy(u.Payload(), payload)
	sum := header.PseudoHeaderChecksum(header.UDPProtocolNumber, src, dst, uint16(len(u)))
	u.SetChecksum(^u.CalculateChecksum(checksum.Checksum(payload, sum)))
	return b
}

func (l *leasing) unicast(m []byte, to netip.Addr) error {
	_, refused := l.ep.Write(bytes.NewReader(m), tcpip.WriteOptions{To: &tcpip.FullAddress{NIC: nic, Addr: toStack(to), Port: dhcpServer}})
	if refused != nil {
		return errorText("send", refused)
	}
	return nil
}

// use makes the lease, or none, the stack's.
func (l *leasing) use(lease *dhcp.Lease) error {
	if err := l.s.network.use(lease); err != nil {
		return err
	}
	limit := 0
	if lease != nil {
		limit = lease.MTU
		if limit > 0 && l.s.has6 {
			limit = max(limit, leastMTU6)
		}
		l.s.announceOne(l.s.card.dev.MAC(), lease.Addr.Addr())
	}
	l.s.card.limit.Store(int32(limit))
	return nil
}

// How another station is looked for that has a leased address (RFC 5227, in less time, as
// other clients do).
var probes = stack.DADConfigurations{DupAddrDetectTransmits: 3, RetransmitTimer: 200 * time.Millisecond}

// inUse asks the network whether another station has an address.
func (l *leasing) inUse(ctx context.Context, addr netip.Addr) bool {
	result := make(chan stack.DADResult, 1)
	how, refused := l.s.network.net.CheckDuplicateAddress(nic, ipv4.ProtocolNumber, toStack(addr), func(r stack.DADResult) { result <- r })
	if refused != nil || how == stack.DADDisabled {
		return false
	}
	select {
	case r := <-result:
		_, taken := r.(*stack.DADDupAddrDetected)
		return taken
	case <-ctx.Done():
		return false
	}
}

// follow tells the client the state of the link.
func (l *leasing) follow(up bool, mac [6]byte, room int) {
	if up && (!l.link.Up || mac != l.link.MAC) {
		l.link.Ups++
	}
	l.link.Up, l.link.Room = up, room
	if up {
		l.link.MAC = mac
	}
	select { // the client needs the latest state only
	case <-l.links:
	default:
	}
	l.links <- l.link
}

// Package netstack puts TCP/IP on a vif: a [Stack] is gVisor's network stack with a
// [pvnet.Device] for its card, and gives net.Listener, net.Conn and net.PacketConn
// on it. net/http serves straight off the vif.
//
// A frame is copied once each way: between the vif's page and the stack's buffer.
// The stack checks the checksum of every packet it receives. The card drops frames for
// other stations, of other VLANs and of unknown protocols before the stack sees them.
// VLAN 0 means no VLAN: the card takes its tag, which holds a priority, off.
//
// The stack follows its device: when the device reconnects with another MAC or MTU, the
// stack uses these from then on.
//
// A Stack has one address. It has no DHCP client and looks up no names.
package netstack

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"barevif/pvnet"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// Config configures a Stack. Addr is required.
type Config struct {
	Addr    netip.Prefix // our address and the network it is in
	Gateway netip.Addr   // router to all other networks; zero for none
	MTU     int          // size of the largest IP packet in bytes, 68 (IPv6: 1280) to the device's MTU; 0 means the device's
}

// A Stack is TCP/IP on one vif. Its methods may be called from any goroutine.
type Stack struct {
	net  *stack.Stack
	card *card
	addr netip.Addr

	closeOnce sync.Once
	ending    context.Context // done once Close is called or the device has ended
	end       context.CancelFunc
	watcher   sync.WaitGroup
}

// nic is the number of the card in the stack, its only one.
const nic tcpip.NICID = 1

// New makes a stack on dev and becomes the owner of all halves of dev, for good. The
// caller still disconnects the device; when the device ends, the stack ends, too.
//
// Errors: a field of cfg is invalid, or a half of dev has another owner
// ([pvnet.ErrOwned]).
func New(dev *pvnet.Device, cfg Config) (*Stack, error) {
	if err := cfg.check(dev.MTU()); err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	c, err := newCard(dev, cfg.MTU)
	if err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	opts := stack.Options{
		// No duplicate address detection: the caller has assigned the address, and
		// it works at once.
		NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol, arp.NewProtocol,
			ipv6.NewProtocolWithOptions(ipv6.Options{MLD: ipv6.MLDOptions{Enabled: true}})},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol,
			icmp.NewProtocol4, icmp.NewProtocol6},
		HandleLocal: true,
	}
	if c.clock != nil {
		opts.Clock = c.clock
	}
	s := &Stack{card: c, addr: cfg.Addr.Addr(), net: stack.New(opts)}
	if err := s.configure(cfg); err != nil {
		s.net.Destroy()
		return nil, fmt.Errorf("netstack: %w", err)
	}
	c.start()
	s.ending, s.end = context.WithCancel(context.Background())
	s.watcher.Go(func() {
		select {
		case <-s.ending.Done():
		case <-dev.Done():
			s.end()
		}
		s.net.Close() // wakes every blocked caller
	})
	return s, nil
}

func (cfg *Config) check(mtu int) error {
	addr := cfg.Addr.Addr()
	least := 68
	if addr.Is6() {
		least = 1280
	}
	switch {
	case !cfg.Addr.IsValid() || addr.Is4In6() || addr.IsUnspecified() || addr.IsMulticast():
		return fmt.Errorf("Config.Addr %v is no address for a host", cfg.Addr)
	case cfg.Gateway.IsValid() && (cfg.Gateway.BitLen() != addr.BitLen() || !cfg.Addr.Contains(cfg.Gateway)):
		return fmt.Errorf("Config.Gateway %v is not in the network %v", cfg.Gateway, cfg.Addr.Masked())
	case cfg.MTU != 0 && (cfg.MTU < least || cfg.MTU > mtu):
		return fmt.Errorf("Config.MTU %d is not between %d and the device's %d", cfg.MTU, least, mtu)
	}
	return nil
}

func (s *Stack) configure(cfg Config) error {
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	// Measured: with gVisor's RACK, a connection that lost packets can stall for good;
	// with its CUBIC, a window can fall to 0 without any loss, and stay there.
	recovery, control := tcpip.TCPRecovery(0), tcpip.CongestionControlOption("reno")
	for _, opt := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &recovery, &control,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: bufferSize, Max: bufferMost},
		&tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: bufferSize, Max: bufferMost},
	} {
		if err := s.net.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return fmt.Errorf("set a TCP option: %s", err)
		}
	}
	if err := s.net.CreateNICWithOptions(nic, s.card, stack.NICOptions{Name: "vif", QDisc: s.card}); err != nil {
		return fmt.Errorf("create the card: %s", err)
	}
	ip := cfg.Addr.Addr()
	address := tcpip.ProtocolAddress{
		Protocol:          protocol(ip),
		AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(ip.AsSlice()), PrefixLen: cfg.Addr.Bits()},
	}
	if err := s.net.AddProtocolAddress(nic, address, stack.AddressProperties{}); err != nil {
		return fmt.Errorf("add the address %v: %s", cfg.Addr, err)
	}
	subnet := address.AddressWithPrefix.Subnet()
	routes := []tcpip.Route{{Destination: subnet, NIC: nic}}
	if cfg.Gateway.IsValid() {
		all := tcpip.AddressWithPrefix{Address: tcpip.AddrFromSlice(make([]byte, len(ip.AsSlice())))}
		routes = append(routes, tcpip.Route{
			Destination: all.Subnet(), Gateway: tcpip.AddrFromSlice(cfg.Gateway.AsSlice()), NIC: nic,
		})
	}
	s.net.SetRouteTable(routes)
	return nil
}

// Initial and largest size of a connection's buffers, in bytes. The stack enlarges the
// buffers with the connection's speed.
const (
	bufferSize = 1 << 20
	bufferMost = 8 << 20
)

func protocol(ip netip.Addr) tcpip.NetworkProtocolNumber {
	if ip.Is6() {
		return ipv6.ProtocolNumber
	}
	return ipv4.ProtocolNumber
}

// Addr returns the stack's own address.
func (s *Stack) Addr() netip.Addr { return s.addr }

// Stats counts the frames that the stack drops. The Device counts the others.
type Stats struct {
	Foreign   uint64 // received: for another station or another VLAN
	Unknown   uint64 // received: the EtherType is not IPv4, IPv6 or ARP
	Malformed uint64 // received: too short, impossible headers or a wrong checksum
	Overflow  uint64 // to be sent: the card's queue was full
	Unsent    uint64 // to be sent: the device has ended or does not take their size
}

// Stats returns the counters. It may be called at any time.
func (s *Stack) Stats() Stats {
	c, n := s.card, s.net.Stats()
	st := Stats{
		Foreign: c.foreign.Load(), Unknown: c.unknown.Load(), Malformed: c.malformed.Load(),
		Overflow: c.overflow.Load(), Unsent: c.unsent.Load(),
	}
	for _, more := range [...]*tcpip.StatCounter{
		n.IP.MalformedPacketsReceived, n.ARP.MalformedPacketsReceived,
		n.ICMP.V4.PacketsReceived.Invalid, n.ICMP.V6.PacketsReceived.Invalid,
		n.TCP.InvalidSegmentsReceived, n.TCP.ChecksumErrors,
		n.UDP.MalformedPacketsReceived, n.UDP.ChecksumErrors,
	} {
		st.Malformed += more.Value()
	}
	return st
}

// Close ends the stack: it resets all connections, blocked callers return net.ErrClosed,
// and the stack's goroutines have ended when Close returns. It waits up to 100 ms for a
// peer with a full ring. It is idempotent and returns nil. The device stays connected.
func (s *Stack) Close() error {
	s.closeOnce.Do(func() {
		s.end()
		s.watcher.Wait()
		s.card.drain(closePatience)
		s.card.stop()
		s.net.Wait()
	})
	return nil
}

// closePatience is how long Close waits for a peer with a full ring to take the stack's
// last packets.
const closePatience = 100 * time.Millisecond

// Package netstack puts TCP/IP on a vif: a [Stack] is gVisor's network stack with a
// [pvnet.Device] for its card, and gives net.Listener, net.Conn and net.PacketConn
// on it. net/http serves straight off the vif.
//
// A frame is copied once each way: between the vif's page and the stack's buffer.
// The stack computes and checks every checksum itself. What the peer sends is the
// stack's to judge; frames for other stations, of other VLANs and of protocols it
// does not have are dropped before it sees them. VLAN 0 is no VLAN: its tag, which
// holds a priority, is taken off.
//
// The stack follows its device: when that comes back as another card, with another
// MAC or MTU, both are the stack's from then on.
//
// A Stack has one address. It asks no DHCP server and looks up no names.
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

// Config is what a stack needs to know. Addr is required.
type Config struct {
	Addr    netip.Prefix // our address and the network it is in
	Gateway netip.Addr   // where the rest of the world is; none if zero
	MTU     int          // most bytes of IP packet, 68 (IPv6: 1280) to the device's; 0 means the device's
}

// A Stack is TCP/IP on one vif. Its methods may be called from any goroutine.
type Stack struct {
	net  *stack.Stack
	card *card
	addr netip.Addr

	closeOnce sync.Once
	ending    context.Context // done from Close or the device's end on
	end       context.CancelFunc
	watcher   sync.WaitGroup
}

// nic is the card's number in the stack, which has no other.
const nic tcpip.NICID = 1

// New makes a stack on dev and becomes the owner of all its halves, for good. The
// device stays the caller's to disconnect; when it ends, the stack does.
func New(dev *pvnet.Device, cfg Config) (*Stack, error) {
	if err := cfg.check(dev.MTU()); err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	c, err := newCard(dev, cfg.MTU)
	if err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	opts := stack.Options{
		// The address is given, not chosen: nobody else is asked whether it is
		// taken, and it works at once.
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
		s.net.Close() // wakes everyone who uses the stack
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
	// Measured: with the stack's RACK, connections that lost packets stand still
	// for good; with its CUBIC a window may fall to 0 without any loss, and stay.
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

// Sizes of a connection's buffers in bytes. The stack lets them grow with the
// connection's speed.
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

// Addr is the stack's own address.
func (s *Stack) Addr() netip.Addr { return s.addr }

// Stats counts the frames the stack drops; the rest is in the Device's counters.
type Stats struct {
	Foreign   uint64 // received, for another station or another VLAN
	Unknown   uint64 // received, of an EtherType that is none of IPv4, IPv6 and ARP
	Malformed uint64 // received, cut short, with impossible headers or a wrong checksum
	Overflow  uint64 // to be sent, but more waited than the card holds
	Unsent    uint64 // to be sent, but the device has ended or does not take their size
}

// Stats may be called at any time.
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

// Close ends the stack: its connections are reset, everyone who uses it is woken
// with net.ErrClosed, and its goroutines have ended when Close returns. It is
// idempotent and returns nil. The device stays connected.
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

// closePatience is how long Close waits for a peer with a full ring to take what
// the stack says last.
const closePatience = 100 * time.Millisecond

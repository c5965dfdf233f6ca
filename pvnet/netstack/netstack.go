// Package netstack puts TCP/IP on a vif: a [Stack] is gVisor's network stack with a
// [pvnet.Device] for its card, and gives net.Listener, net.Conn and net.PacketConn
// on it. net/http serves straight off the vif.
//
// A frame is copied once each way: between the vif's page and the stack's buffer.
// The stack checks the checksum of every packet it receives. The card drops frames for
// other stations, of other VLANs and of unknown protocols before the stack sees them.
// VLAN 0 means no VLAN: the card takes its tag, which holds a priority, off.
//
// The stack follows its device: when the device gets another MTU, or reconnects with
// another MAC, the stack uses these from then on. A connection keeps its segment size, but
// longer packets are cut. While the link is down, or without a carrier, packets wait.
// Each time the link comes up, the stack announces its address by a gratuitous ARP request
// or an unsolicited neighbour advertisement.
//
// A Stack has addresses of either family, from its Config, by DHCP or by router advertisements,
// and a resolver. What arrives from servers and routers is checked and bounded: three name
// servers and sixteen routes of a lease, ten routes and ten prefixes of routers.
//
// From nothing to a net.Listener, on the Xen that the program is on or on an emulated one:
//
//	domain, err := anyxen.Open(ctx, anyxen.Config{})
//	stack, err := netstack.Connect(ctx, domain, "0", netstack.Config{})
//	l, err := stack.Listen("tcp", ":80")
package netstack

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/packet"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// A Stack is TCP/IP on one vif. Its methods may be called from any goroutine.
type Stack struct {
	network *network
	card    *card
	has4    bool
	has6    bool
	awaited string        // the sources of addresses that may take time
	silent  atomic.Uint32 // how often a name server did not answer
	owned   *pvnet.Device // disconnected by Close; nil: the caller's

	due      *dueClock
	sockets  sockets
	patience time.Duration // how long Hold waits for the stack, programs and neighbours to answer

	closeOnce sync.Once
	ending    context.Context // done once Close is called or the device has ended
	end       context.CancelFunc
	watcher   sync.WaitGroup
}

// NIC is the number of the card in gVisor's stack, its only one.
const NIC tcpip.NICID = 1

const nic = NIC

// New makes a stack on dev and becomes the owner of all halves of dev, for good. The
// caller still disconnects the device; when the device ends, the stack ends, too. It does not
// wait for addresses that DHCP or routers give: [Stack.Ready] does.
//
// Errors: a field of cfg is invalid, or a half of dev has another owner
// ([pvnet.ErrOwned]).
func New(dev *pvnet.Device, cfg Config) (*Stack, error) {
	return newOn(dev, cfg, newCardless)
}

// newOn is New on the stack that bare returns. It calls bare once cfg is valid and the halves are owned, and ends that
// stack if it fails.
func newOn(dev *pvnet.Device, cfg Config, bare func() (*cardless, error)) (*Stack, error) {
	if err := cfg.check(dev.MTU()); err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	c, err := newCard(dev, cfg.MTU)
	if err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	made, err := bare()
	if err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	c.clock = made.clock
	s := &Stack{network: made.network, card: c, due: made.due, patience: answerPatience}
	s.has4, s.has6 = cfg.families()
	if err = s.network.addCard(&cfg, c, c); err != nil {
		return nil, fmt.Errorf("netstack: %w", err)
	}
	var leases *leasing
	if cfg.DHCP {
		if leases, err = newLeasing(s); err != nil {
			s.network.net.Destroy()
			return nil, fmt.Errorf("netstack: %w", err)
		}
	}
	c.start()
	s.ending, s.end = context.WithCancel(context.Background())
	s.run(dev, &cfg, leases)
	return s, nil
}

// A cardless is a stack that has no card yet, which needs no device.
type cardless struct {
	network *network
	clock   *clock // nil for gVisor's standard clock
	due     *dueClock
}

func newCardless() (*cardless, error) {
	m := &cardless{clock: newClock(), due: &dueClock{Clock: tcpip.NewStdClock()}}
	if m.clock != nil {
		m.due.Clock = m.clock
	}
	var err error
	m.network, err = newNetwork(m.due)
	return m, err
}

// newNetwork makes gVisor's stack, without a card.
func newNetwork(clock tcpip.Clock) (*network, error) {
	n := &network{changed: make(chan struct{}), dirty: make(chan struct{}, 1)}
	n.ra.init()
	n.net = stack.New(stack.Options{
		Clock: clock,
		// No duplicate address detection: the caller has assigned the address, and
		// it works at once. startAdverts turns it on for other addresses.
		NetworkProtocols: []stack.NetworkProtocolFactory{
			ipv4.NewProtocol, arp.NewProtocolWithOptions(arp.Options{DADConfigs: probes}),
			ipv6.NewProtocolWithOptions(ipv6.Options{MLD: ipv6.MLDOptions{Enabled: true}, NDPDisp: advertising{n}})},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol,
			icmp.NewProtocol4, icmp.NewProtocol6},
		HandleLocal: true,
	})
	if err := configure(n.net); err != nil {
		n.net.Destroy()
		return nil, err
	}
	return n, nil
}

// addCard gives the stack its card, with the addresses of cfg. It ends the stack if it fails.
func (n *network) addCard(cfg *Config, link stack.LinkEndpoint, queue stack.QueueingDiscipline) error {
	n.configure(cfg)
	var err error
	if refused := n.net.CreateNICWithOptions(nic, link, stack.NICOptions{Name: "vif", QDisc: queue}); refused != nil {
		err = errorText("create the card", refused)
	}
	if err == nil {
		err = n.addStatic()
	}
	if err == nil && cfg.RA {
		err = n.startAdverts(link.LinkAddress())
	}
	if err != nil {
		n.net.Destroy()
	}
	return err
}

// run starts the goroutines that follow the device's link, routers and DHCP servers.
func (s *Stack) run(dev *pvnet.Device, cfg *Config, leases *leasing) {
	var waits []string
	if cfg.RA {
		waits = append(waits, "router")
		s.watcher.Go(func() { s.network.follow(s.ending) })
	}
	if leases != nil {
		waits = append(waits, "DHCP server")
		s.watcher.Go(func() { leases.run(s.ending, cfg.Hostname) })
	}
	s.awaited = strings.Join(waits, " and no ")
	s.watcher.Go(func() {
		s.watch(dev, leases)
		s.end()
		s.network.net.Close() // wakes every blocked caller
	})
}

// watch follows the device's link until Close, or the device's end.
func (s *Stack) watch(dev *pvnet.Device, leases *leasing) {
	mac, up := s.card.LinkAddress(), false
	stop := func() {}
	defer func() { stop() }()
	for ev := range dev.Links(s.ending) {
		s.card.down.Store(!ev.Up)
		if leases != nil {
			leases.follow(ev.Up, ev.MAC, ev.MTU)
		}
		was := up
		if up = ev.Up; !up {
			continue
		}
		now := tcpip.LinkAddress(ev.MAC[:])
		if s.network.adverts && (!was || now != mac) {
			if now != mac {
				s.network.followMAC(mac, now)
			}
			stop()
			stop = s.solicit(now)
		}
		mac = now
		s.announce(ev.MAC)
	}
}

// solicit asks routers to advertise, until one does or stop is called.
func (s *Stack) solicit(mac tcpip.LinkAddress) (stop func()) {
	ctx, cancel := context.WithCancel(s.ending)
	s.watcher.Go(func() { s.network.solicit(ctx, mac) })
	return cancel
}

// GVisor returns gVisor's stack, for what this package has no call for. Its card has the number
// [NIC]. Addresses and routes are this package's; it sets the routes again when they change.
func (s *Stack) GVisor() *stack.Stack { return s.network.net }

// announce tells the neighbours that the card has the stack's addresses, as Linux does when
// a card comes back elsewhere (netdev_notify_peers). It does not wait: a frame that finds
// the card's queue full is lost.
func (s *Stack) announce(mac pvnet.MAC) {
	for _, a := range s.Settings().Addrs {
		s.announceOne(mac, a.Addr())
	}
}

func (s *Stack) announceOne(mac pvnet.MAC, ip netip.Addr) {
	b := packet.AppendAnnouncement(nil, mac, ip)
	if b == nil {
		return
	}
	eth := header.Ethernet(b)
	_ = s.network.net.WritePacketToRemote(nic, eth.DestinationAddress(), eth.Type(),
		buffer.MakeWithData(b[header.EthernetMinimumSize:])) // a failure is in Stats
}

// configure sets the options of gVisor's TCP.
func configure(net *stack.Stack) error {
	sack, moderate := tcpip.TCPSACKEnabled(true), tcpip.TCPModerateReceiveBufferOption(true)
	// Measured: with gVisor's RACK, a connection that lost packets can stall for good;
	// with its CUBIC, a window can fall to 0 without any loss, and stay there.
	recovery, control := tcpip.TCPRecovery(0), tcpip.CongestionControlOption("reno")
	for _, opt := range []tcpip.SettableTransportProtocolOption{&sack, &moderate, &recovery, &control,
		&tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: bufferSize, Max: bufferMost},
		&tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: bufferSize, Max: bufferMost},
	} {
		if err := net.SetTransportProtocolOption(tcp.ProtocolNumber, opt); err != nil {
			return errorText("set a TCP option", err)
		}
	}
	return nil
}

// Initial and largest size of a connection's buffers, in bytes. The stack enlarges the
// buffers with the connection's speed.
const (
	bufferSize = 1 << 20
	bufferMost = 8 << 20
)

// Addr returns the stack's first address: of several, the first of the Config, else the leased
// one. It is zero as long as there is none.
func (s *Stack) Addr() netip.Addr {
	if now := s.Settings(); len(now.Addrs) > 0 {
		return now.Addrs[0].Addr()
	}
	return netip.Addr{}
}

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
	c, n := s.card, s.network.net.Stats()
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
// peer with a full ring. It is idempotent and returns nil. The device stays connected, unless
// it is [Connect]'s.
func (s *Stack) Close() error {
	s.closeOnce.Do(func() {
		s.end()
		s.watcher.Wait()
		s.card.drain(closePatience)
		s.card.stop()
		s.network.net.Wait()
		if s.owned != nil {
			s.owned.Disconnect()
		}
	})
	return nil
}

// closePatience is how long Close waits for a peer with a full ring to take the stack's
// last packets.
const closePatience = 100 * time.Millisecond

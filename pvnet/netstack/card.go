package netstack

import (
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/arp"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// batch is how many frames are moved at a time at most.
const batch = 32

// A card is the stack's link endpoint on a device, and its queueing discipline too.
type card struct {
	dev *pvnet.Device
	mtu int // 0: the device's
	tx  []*sender
	rx  []*pvnet.RX

	clock   *clock // the stack's; nil: the usual one
	known   atomic.Pointer[address]
	stack   atomic.Pointer[stack.NetworkDispatcher]
	workers sync.WaitGroup

	foreign, unknown, malformed atomic.Uint64
	overflow, unsent            atomic.Uint64
}

var (
	_ stack.LinkEndpoint       = (*card)(nil)
	_ stack.QueueingDiscipline = (*card)(nil)
	_ stack.GSOEndpoint        = (*card)(nil)
)

func newCard(dev *pvnet.Device, mtu int) (*card, error) {
	c := &card{dev: dev, mtu: mtu, clock: newClock()}
	for i := range dev.Queues() {
		rx, err := dev.OwnRX(i)
		if err != nil {
			return nil, err
		}
		tx, err := dev.OwnTX(i)
		if err != nil {
			return nil, err
		}
		c.rx = append(c.rx, rx)
		c.tx = append(c.tx, newSender(c, tx))
	}
	return c, nil
}

func (c *card) start() {
	for _, rx := range c.rx {
		c.workers.Go(func() { c.receive(rx) })
	}
	for _, tx := range c.tx {
		c.workers.Go(tx.work)
	}
}

// drain waits until the senders have nothing left, but not for long.
func (c *card) drain(patience time.Duration) {
	end := time.Now().Add(patience)
	for _, tx := range c.tx {
		tx.drain(end)
	}
}

// stop ends the goroutines and waits for them.
func (c *card) stop() {
	for _, rx := range c.rx {
		rx.SetDeadline(past)
	}
	for _, tx := range c.tx {
		tx.stop()
	}
	c.workers.Wait()
}

// past is a deadline that has passed.
var past = time.Unix(1, 0)

// receive gives the stack what rx receives, until the device ends or the deadline
// passes. It gives the frames back before the stack has a look at the copies. The
// stack's own merging of segments (GRO) costs more here than it saves.
func (c *card) receive(rx *pvnet.RX) {
	var frames [batch]pvnet.Frame
	var packets [batch]*stack.PacketBuffer
	for {
		n, err := rx.Receive(frames[:])
		if err != nil {
			return
		}
		count := 0
		for i := range frames[:n] {
			if p := c.packet(&frames[i]); p != nil {
				packets[count] = p
				count++
			}
		}
		_ = rx.Release(frames[:n]) // they came from rx: none is stale
		up := c.stack.Load()
		c.clock.expire()
		for i, p := range packets[:count] {
			if up != nil {
				(*up).DeliverNetworkPacket(p.NetworkProtocolNumber, p)
			}
			p.DecRef()
			packets[i] = nil
		}
	}
}

// packet copies a frame, or counts why it is dropped. The stack checks every
// checksum, so that one the peer left blank is completed.
func (c *card) packet(f *pvnet.Frame) *stack.PacketBuffer {
	if f.Len() < header.EthernetMinimumSize || f.CompleteChecksum() != nil {
		c.malformed.Add(1)
		return nil
	}
	view := buffer.NewViewSize(f.Len())
	f.CopyTo(view.AsSlice())
	// Only the copy is looked at: a lent page can still change.
	eth := header.Ethernet(view.AsSlice())
	own := c.LinkAddress()
	kind := tcpip.PacketHost
	var lost *atomic.Uint64 // where the frame is counted, if it is dropped
	switch dst := eth.DestinationAddress(); {
	case dst == own:
	case dst == header.EthernetBroadcastAddress:
		kind = tcpip.PacketBroadcast
	case header.IsMulticastEthernetAddress(dst):
		kind = tcpip.PacketMulticast
	default:
		lost = &c.foreign
	}
	if lost == nil {
		var tags int
		tags, lost = c.untag(eth)
		view.TrimFront(tags)
		eth = view.AsSlice()
	}
	if lost == nil && !handles(eth.Type()) {
		lost = &c.unknown
	}
	if lost != nil {
		view.Release()
		lost.Add(1)
		return nil
	}
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithView(view)})
	p.PktType = kind
	p.NetworkProtocolNumber = eth.Type()
	p.LinkHeader().Consume(header.EthernetMinimumSize)
	return p
}

// untag takes the VLAN tags off that name no VLAN: IEEE 802.1Q gives VLAN 0 to frames
// of the untagged network that carry a priority. It moves the addresses behind the
// tags and returns how many bytes are to be cut from the front. A frame of another
// VLAN is not for the stack; lost is where to count it.
func (c *card) untag(eth header.Ethernet) (tags int, lost *atomic.Uint64) {
	const addresses, tag = 12, 4
	for isTag(eth[tags:].Type()) {
		if len(eth) < tags+tag+header.EthernetMinimumSize {
			return 0, &c.malformed
		}
		if vlan := binary.BigEndian.Uint16(eth[tags+addresses+2:]) & 0xfff; vlan != 0 {
			return 0, &c.foreign
		}
		tags += tag
	}
	if tags > 0 {
		copy(eth[tags:tags+addresses], eth[:addresses])
	}
	return tags, nil
}

func isTag(t tcpip.NetworkProtocolNumber) bool { return t == 0x8100 || t == 0x88a8 }

// handles reports whether the stack has a protocol for frames of this type.
func handles(t tcpip.NetworkProtocolNumber) bool {
	return t == ipv4.ProtocolNumber || t == ipv6.ProtocolNumber || t == arp.ProtocolNumber
}

// WritePacket implements stack.QueueingDiscipline.
func (c *card) WritePacket(p *stack.PacketBuffer) tcpip.Error {
	one := [1]*stack.PacketBuffer{p}
	if c.sender(p).write(one[:]) == 0 {
		return &tcpip.ErrNoBufferSpace{}
	}
	return nil
}

// WritePackets implements stack.LinkEndpoint.
func (c *card) WritePackets(list stack.PacketBufferList) (int, tcpip.Error) {
	packets := list.AsSlice()
	for done := 0; done < len(packets); {
		tx, end := c.sender(packets[done]), done+1
		for end < len(packets) && c.sender(packets[end]) == tx {
			end++
		}
		n := tx.write(packets[done:end])
		if done += n; done < end {
			return done, &tcpip.ErrNoBufferSpace{}
		}
	}
	return len(packets), nil
}

// sender picks the same queue for all packets of a flow.
func (c *card) sender(p *stack.PacketBuffer) *sender {
	n := c.dev.Active()
	if n <= 1 {
		return c.tx[0]
	}
	return c.tx[p.Hash%uint32(n)]
}

// An address is the card's, in the words of the device and of the stack.
type address struct {
	mac  pvnet.MAC
	link tcpip.LinkAddress
}

// LinkAddress implements stack.LinkEndpoint. It is the device's, which may be another
// one with each connection.
func (c *card) LinkAddress() tcpip.LinkAddress {
	mac := c.dev.MAC()
	a := c.known.Load()
	if a == nil || a.mac != mac {
		a = &address{mac, tcpip.LinkAddress(mac[:])}
		c.known.Store(a)
	}
	return a.link
}

// MTU implements stack.LinkEndpoint. The device's may be another one with each
// connection.
func (c *card) MTU() uint32 {
	mtu := c.dev.MTU()
	if c.mtu != 0 {
		mtu = min(mtu, c.mtu)
	}
	return uint32(mtu)
}

// AddHeader implements stack.LinkEndpoint.
func (c *card) AddHeader(p *stack.PacketBuffer) {
	header.Ethernet(p.LinkHeader().Push(header.EthernetMinimumSize)).Encode(&header.EthernetFields{
		SrcAddr: c.LinkAddress(),
		DstAddr: p.EgressRoute.RemoteLinkAddress,
		Type:    p.NetworkProtocolNumber,
	})
}

// ParseHeader implements stack.LinkEndpoint.
func (c *card) ParseHeader(p *stack.PacketBuffer) bool {
	_, ok := p.LinkHeader().Consume(header.EthernetMinimumSize)
	return ok
}

// Attach implements stack.LinkEndpoint.
func (c *card) Attach(d stack.NetworkDispatcher) {
	if d == nil {
		c.stack.Store(nil)
		return
	}
	c.stack.Store(&d)
}

// IsAttached implements stack.LinkEndpoint.
func (c *card) IsAttached() bool { return c.stack.Load() != nil }

// Capabilities implements stack.LinkEndpoint. Of checksums only those of TCP are left
// to the peer, by way of HostGSOSupported.
func (c *card) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired
}

// SupportedGSO implements stack.GSOEndpoint: large segments of TCP go down whole if
// the peer takes them, and otherwise the stack cuts them at the last moment. A
// connection asks once.
func (c *card) SupportedGSO() stack.SupportedGSO {
	if c.dev.PeerTakes(pvnet.GSOTCPv4) && c.dev.PeerTakes(pvnet.GSOTCPv6) {
		return stack.HostGSOSupported
	}
	return stack.GVisorGSOSupported
}

// GSOMaxSize implements stack.GSOEndpoint.
func (c *card) GSOMaxSize() uint32 {
	if c.SupportedGSO() == stack.HostGSOSupported {
		return pvnet.MaxFrame - header.EthernetMinimumSize
	}
	return gsoSize
}

// gsoSize is in bytes; larger segments that the stack cuts bring no more.
const gsoSize = 1 << 15

// The rest of stack.LinkEndpoint and of stack.QueueingDiscipline. The card's
// goroutines are ended by the Stack, which knows what comes before.
func (c *card) MaxHeaderLength() uint16                 { return header.EthernetMinimumSize }
func (c *card) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }
func (c *card) SetMTU(uint32)                           {}
func (c *card) SetLinkAddress(tcpip.LinkAddress)        {}
func (c *card) SetOnCloseAction(func())                 {}
func (c *card) Wait()                                   {}
func (c *card) Close()                                  {}

package netstack

import (
	"encoding/binary"
	"errors"
	"fmt"
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

// batch is the largest number of frames that move in one call.
const batch = 32

// A card is the stack's link endpoint on a device, and also its queueing discipline.
type card struct {
	dev *pvnet.Device
	mtu int // 0 means the device's
	tx  []*sender
	rx  []*pvnet.RX

	clock   *clock // the stack's clock; nil for gVisor's standard clock
	known   atomic.Pointer[address]
	holds   holds
	down    atomic.Bool                               // the device's link is
	limit   atomic.Int32                              // of the lease for mtu; 0: none
	tap     atomic.Pointer[func(*stack.PacketBuffer)] // sees every packet received; nil: none
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
	c := &card{dev: dev, mtu: mtu}
	for i := range dev.Queues() {
		rx, err := dev.OwnRX(i)
		if err != nil {
			return nil, notOurs(dev, err)
		}
		tx, err := dev.OwnTX(i)
		if err != nil {
			return nil, notOurs(dev, err)
		}
		c.rx = append(c.rx, rx)
		c.tx = append(c.tx, newSender(c, tx))
	}
	return c, nil
}

// notOurs says of an owner's error what to do.
func notOurs(dev *pvnet.Device, err error) error {
	if errors.Is(err, pvnet.ErrOwned) {
		return fmt.Errorf("vif %s has another stack or owner, and one stack takes a device for good: connect another vif, or again after Disconnect: %w", dev.ID(), err)
	}
	return err
}

func (c *card) start() {
	for _, rx := range c.rx {
		c.workers.Go(func() { c.receive(rx) })
	}
	for _, tx := range c.tx {
		c.workers.Go(tx.work)
	}
}

// drain waits until the senders' queues are empty, but not longer than patience.
func (c *card) drain(patience time.Duration) {
	end := time.Now().Add(patience)
	for _, tx := range c.tx {
		tx.drain(end)
	}
}

// stop ends the card's goroutines and waits for them.
func (c *card) stop() {
	c.holds.close()
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

// receive delivers the frames of rx to the stack, until the device ends or the deadline
// passes. It releases the frames before the stack processes the copies. It does not use
// the stack's merging of segments (GRO), which costs more here than it saves.
func (c *card) receive(rx *pvnet.RX) {
	var frames [batch]pvnet.Frame
	var packets [batch]*stack.PacketBuffer
	for c.receives(rx, nil) {
		n, err := rx.Receive(frames[:])
		if err != nil {
			if !c.receives(rx, err) {
				return
			}
			continue
		}
		count := 0
		for i := range frames[:n] {
			if p := c.packet(&frames[i]); p != nil {
				packets[count] = p
				count++
			}
		}
		_ = rx.Release(frames[:n]) // cannot fail: the frames came from rx and are not stale
		up, tap := c.stack.Load(), c.tap.Load()
		c.clock.expire()
		for i, p := range packets[:count] {
			if tap != nil {
				(*tap)(p)
			}
			if up != nil {
				(*up).DeliverNetworkPacket(p.NetworkProtocolNumber, p)
			}
			p.DecRef()
			packets[i] = nil
		}
	}
}

// packet copies a frame into a packet, or counts why it drops the frame. It completes a
// checksum that the peer left to us, because the stack checks every checksum.
func (c *card) packet(f *pvnet.Frame) *stack.PacketBuffer {
	if f.Len() < header.EthernetMinimumSize || f.CompleteChecksum() != nil {
		c.malformed.Add(1)
		return nil
	}
	view := buffer.NewViewSize(f.Len())
	f.CopyTo(view.AsSlice())
	// Look only at the copy: the peer can still change a lent page.
	eth := header.Ethernet(view.AsSlice())
	own := c.LinkAddress()
	kind := tcpip.PacketHost
	var lost *atomic.Uint64 // the counter for a frame that is dropped
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

// untag takes off VLAN tags of VLAN 0, which IEEE 802.1Q gives to frames that carry a
// priority but belong to no VLAN. It moves the addresses to behind the tags and returns
// how many bytes the caller must cut from the front. lost is not nil if the frame must be
// dropped, because it belongs to a VLAN or is malformed; it is the counter for that.
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

// sender picks a queue by the packet's hash, so that a flow keeps to one queue and its
// order.
func (c *card) sender(p *stack.PacketBuffer) *sender {
	n := c.dev.Active()
	if n <= 1 {
		return c.tx[0]
	}
	return c.tx[p.Hash%uint32(n)]
}

// An address is the card's MAC address in the types of the device and of the stack.
type address struct {
	mac  pvnet.MAC
	link tcpip.LinkAddress
}

// LinkAddress implements stack.LinkEndpoint. It returns the device's address, which can
// change when the device reconnects.
func (c *card) LinkAddress() tcpip.LinkAddress {
	mac := c.dev.MAC()
	a := c.known.Load()
	if a == nil || a.mac != mac {
		a = &address{mac, tcpip.LinkAddress(mac[:])}
		c.known.Store(a)
	}
	return a.link
}

// MTU implements stack.LinkEndpoint. The device's MTU can change at any time.
func (c *card) MTU() uint32 {
	mtu := c.dev.MTU()
	if c.mtu != 0 {
		mtu = min(mtu, c.mtu)
	}
	if limit := c.limit.Load(); limit != 0 {
		mtu = min(mtu, int(limit))
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

// Capabilities implements stack.LinkEndpoint. The stack leaves only TCP checksums to the
// peer, which HostGSOSupported implies.
func (c *card) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityResolutionRequired
}

// SupportedGSO implements stack.GSOEndpoint. If the peer takes large TCP segments, the stack
// passes them to the card whole; otherwise it cuts them just before the card. A connection
// asks once.
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

// gsoSize is the size in bytes of the large segments that the stack later cuts itself. Larger
// ones are no faster.
const gsoSize = 1 << 15

// The rest of stack.LinkEndpoint and of stack.QueueingDiscipline. Close and Wait do nothing:
// the Stack ends the card's goroutines, after the senders' queues have drained.
func (c *card) MaxHeaderLength() uint16                 { return header.EthernetMinimumSize }
func (c *card) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }
func (c *card) SetMTU(uint32)                           {}
func (c *card) SetLinkAddress(tcpip.LinkAddress)        {}
func (c *card) SetOnCloseAction(func())                 {}
func (c *card) Wait()                                   {}
func (c *card) Close()                                  {}

package netstack

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// An advertising gets gVisor's reports about router advertisements for a network. Its
// methods are called with locks of gVisor's held, and call the stack's clock alone.
type advertising struct{ *network }

var _ ipv6.NDPDispatcher = advertising{}

// startAdverts begins to follow router advertisements. Addresses that the stack gets from now on
// are checked for duplicates; those of the caller are not, and work at once.
func (n *network) startAdverts(mac tcpip.LinkAddress) error {
	ep, refused := n.net.GetNetworkEndpoint(nic, ipv6.ProtocolNumber)
	if refused != nil {
		return errorText("find IPv6", refused)
	}
	ndp := ipv6.DefaultNDPConfigurations()
	ndp.MaxRtrSolicitations = 0            // solicit does that, again when the link comes up
	ndp.AutoGenTempGlobalAddresses = false // a server wants to be found
	ep.(ipv6.NDPEndpoint).SetNDPConfigurations(ndp)
	ep.(stack.DuplicateAddressDetector).SetDADConfigurations(stack.DefaultDADConfigurations())
	return n.addLinkLocal(mac)
}

func (n *network) addLinkLocal(mac tcpip.LinkAddress) error {
	addr := tcpip.AddressWithPrefix{Address: header.LinkLocalAddr(mac), PrefixLen: 64}
	err := n.net.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: ipv6.ProtocolNumber, AddressWithPrefix: addr},
		stack.AddressProperties{Disp: &ownAddress{n: n, prefix: prefixOf(addr)}})
	if err != nil {
		return errorText("add the link-local address", err)
	}
	return nil
}

// followMAC makes the addresses of a card with another MAC those of that MAC: gVisor forgets what
// routers advertised, and the next advertisement gives addresses of the new one. Addresses of
// the caller stay, and are not checked for duplicates again.
func (n *network) followMAC(old, now tcpip.LinkAddress) {
	n.applying.Lock()
	defer n.applying.Unlock()
	ep, refused := n.net.GetNetworkEndpoint(nic, ipv6.ProtocolNumber)
	if refused != nil {
		return // the stack is closed
	}
	_ = n.net.RemoveAddress(nic, header.LinkLocalAddr(old)) // gone if another station has it
	dad := ep.(stack.DuplicateAddressDetector)
	dad.SetDADConfigurations(stack.DADConfigurations{})
	ep.Disable()
	err := ep.Enable()
	dad.SetDADConfigurations(stack.DefaultDADConfigurations())
	if err != nil {
		n.log.Error("IPv6 does not follow the card's MAC", "err", err.String())
		return
	}
	if err := n.addLinkLocal(now); err != nil {
		n.log.Error("IPv6 does not follow the card's MAC", "err", err)
	}
}

// How routers are asked to advertise (RFC 4861, section 10).
const (
	solicitations   = 3
	solicitInterval = 4 * time.Second
)

// solicit asks routers to advertise, until one does, three times at most. It asks with our
// link-local address as soon as that is ours.
func (n *network) solicit(ctx context.Context, mac tcpip.LinkAddress) {
	heard := n.net.Stats().ICMP.V6.PacketsReceived.RouterAdvert
	before := heard.Value()
	timer := make(chan struct{}, 1)
	for range solicitations {
		n.sendSolicitation(mac)
		t := n.net.Clock().AfterFunc(solicitInterval, func() { timer <- struct{}{} })
		select {
		case <-timer:
		case <-ctx.Done():
			t.Stop()
			return
		}
		if heard.Value() != before {
			return
		}
	}
}

// sendSolicitation sends a router solicitation (RFC 4861, section 4.1).
func (n *network) sendSolicitation(mac tcpip.LinkAddress) {
	n.mu.Lock()
	own := n.ra.ownLink
	n.mu.Unlock()
	src := header.IPv6Any
	var opts header.NDPOptionsSerializer
	if own.IsValid() {
		src, opts = toStack(own), header.NDPOptionsSerializer{header.NDPSourceLinkLayerAddressOption(mac)}
	}
	size := header.ICMPv6HeaderSize + header.NDPRSMinimumSize + opts.Length()
	b := make([]byte, header.IPv6MinimumSize+size)
	header.IPv6(b).Encode(&header.IPv6Fields{PayloadLength: uint16(size), TransportProtocol: header.ICMPv6ProtocolNumber,
		HopLimit: header.NDPHopLimit, SrcAddr: src, DstAddr: header.IPv6AllRoutersLinkLocalMulticastAddress})
	icmp := header.ICMPv6(b[header.IPv6MinimumSize:])
	icmp.SetType(header.ICMPv6RouterSolicit)
	header.NDPRouterSolicit(icmp.MessageBody()).Options().Serialize(opts)
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: src, Dst: header.IPv6AllRoutersLinkLocalMulticastAddress}))
	_ = n.net.WritePacketToRemote(nic, header.EthernetAddressFromMulticastIPv6Address(header.IPv6AllRoutersLinkLocalMulticastAddress),
		ipv6.ProtocolNumber, buffer.MakeWithData(b)) // a failure is in Stats
}

// An ownAddress follows one address that the stack made from a router's advertisement, or from
// the card's MAC.
type ownAddress struct {
	n      *network
	prefix netip.Prefix
}

// OnChanged implements stack.AddressDispatcher.
func (a *ownAddress) OnChanged(_ stack.AddressLifetimes, state stack.AddressAssignmentState) {
	a.set(true, state == stack.AddressAssigned)
}

// OnRemoved implements stack.AddressDispatcher.
func (a *ownAddress) OnRemoved(why stack.AddressRemovalReason) {
	if why == stack.AddressRemovalDADFailed {
		a.n.log.Warn("another station has the address that a router's advertisement gives", "address", a.prefix.Addr())
	}
	a.set(false, false)
}

func (a *ownAddress) set(known, ours bool) {
	n := a.n
	n.mu.Lock()
	if a.prefix.Addr().IsLinkLocalUnicast() {
		n.ra.ownLink = netip.Addr{}
		if ours {
			n.ra.ownLink = a.prefix.Addr()
		}
		n.mu.Unlock()
		return
	}
	was := n.ra.addrs[a.prefix]
	if known {
		n.ra.addrs[a.prefix] = ours
	} else {
		delete(n.ra.addrs, a.prefix)
	}
	n.mu.Unlock()
	switch {
	case ours && !was:
		n.log.Info("RA: an address", "address", a.prefix)
	case was && !ours:
		n.log.Warn("RA: an address is over", "address", a.prefix)
	}
	n.touch()
}

// OnAutoGenAddress implements ipv6.NDPDispatcher.
func (n advertising) OnAutoGenAddress(_ tcpip.NICID, addr tcpip.AddressWithPrefix) stack.AddressDispatcher {
	return &ownAddress{n: n.network, prefix: prefixOf(addr)}
}

func prefixOf(a tcpip.AddressWithPrefix) netip.Prefix {
	return netip.PrefixFrom(fromStack(a.Address), a.PrefixLen)
}

// OnOffLinkRouteUpdated implements ipv6.NDPDispatcher.
func (n advertising) OnOffLinkRouteUpdated(_ tcpip.NICID, to tcpip.Subnet, via tcpip.Address, p header.NDPRoutePreference) {
	r := Route{To: networkOf(to), Via: fromStack(via)}
	preference := map[header.NDPRoutePreference]int8{header.HighRoutePreference: 1, header.LowRoutePreference: -1}[p]
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ra.dropRoute(r)
	n.ra.count++
	n.ra.routes = append(n.ra.routes, advertisedRoute{r, preference, n.ra.count})
	n.touch()
}

// OnOffLinkRouteInvalidated implements ipv6.NDPDispatcher.
func (n advertising) OnOffLinkRouteInvalidated(_ tcpip.NICID, to tcpip.Subnet, via tcpip.Address) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ra.dropRoute(Route{To: networkOf(to), Via: fromStack(via)})
	n.touch()
}

func (a *advertised) dropRoute(r Route) {
	a.routes = slices.DeleteFunc(a.routes, func(have advertisedRoute) bool { return have.Route == r })
}

// OnOnLinkPrefixDiscovered implements ipv6.NDPDispatcher.
func (n advertising) OnOnLinkPrefixDiscovered(_ tcpip.NICID, s tcpip.Subnet) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ra.onLink = append(n.ra.onLink, networkOf(s))
	n.touch()
}

// OnOnLinkPrefixInvalidated implements ipv6.NDPDispatcher.
func (n advertising) OnOnLinkPrefixInvalidated(_ tcpip.NICID, s tcpip.Subnet) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ra.onLink = slices.DeleteFunc(n.ra.onLink, func(p netip.Prefix) bool { return p == networkOf(s) })
	n.touch()
}

// OnRecursiveDNSServerOption implements ipv6.NDPDispatcher.
func (n advertising) OnRecursiveDNSServerOption(_ tcpip.NICID, addrs []tcpip.Address, lifetime time.Duration) {
	now := n.net.Clock().NowMonotonic()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range addrs {
		if ip := fromStack(a); ip.IsGlobalUnicast() || ip.IsLinkLocalUnicast() {
			n.ra.name(ip, lifetime, lifetime >= header.NDPInfiniteLifetime, now)
		}
	}
	n.touch()
}

// These methods of ipv6.NDPDispatcher do nothing: their reports change no route and no address,
// or an ownAddress gets them.
func (advertising) OnDuplicateAddressDetectionResult(tcpip.NICID, tcpip.Address, stack.DADResult) {}
func (advertising) OnAutoGenAddressDeprecated(tcpip.NICID, tcpip.AddressWithPrefix)               {}
func (advertising) OnAutoGenAddressInvalidated(tcpip.NICID, tcpip.AddressWithPrefix)              {}
func (advertising) OnDNSSearchListOption(tcpip.NICID, []string, time.Duration)                    {}
func (advertising) OnDHCPv6Configuration(tcpip.NICID, ipv6.DHCPv6ConfigurationFromNDPRA)          {}

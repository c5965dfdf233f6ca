// Package mld is a host's side of Multicast Listener Discovery: of version 2 (RFC 3810), and of version 1
// (RFC 2710) while that is what a querier of the link speaks. It knows no sockets and no clock: a caller
// gives it packets and times, and sends the frames that it returns.
//
// A switch with MLD snooping forwards frames of a group only to ports where a host has reported that it
// listens to the group. Neighbour solicitations go to the solicited-node group of the address that they ask
// for. So a host without reports cannot be found behind such a switch, and does not hear of duplicates of an
// address that it asks for. A [Listener] reports these groups for the addresses that its caller names, always
// for all sources.
//
// Any station of the link can send queries, as many as it likes. The Listener keeps no queries: it keeps one
// time of the answer for all groups and one for each group, and of the querier its version, its robustness and
// its query interval. It answers ten times a second at most. It answers a query that names sources as a query
// for the group. A report of another station never suppresses its own, as
// in version 2: reports can be forged, and a switch wants one from each of its ports.
package mld

import (
	"encoding/binary"
	"net/netip"
	"time"

	"barevif/pvnet/packet"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// TypeQuery is the ICMPv6 type of a query.
const TypeQuery = byte(header.ICMPv6MulticastListenerQuery)

// A Query asks which groups are listened to.
type Query struct {
	Group            netip.Addr    // the group that it asks about; :: for all groups
	MLDv1            bool          // it is of version 1, else of version 2
	MaxResponseDelay time.Duration // the answer is due within this time

	// The querier's own settings, which version 2 alone carries (QRV and QQI, RFC 3810, sections 5.1.8 and 5.1.9):
	// its robustness variable, which is how many times a host sends a report in case that one is lost, and the
	// time between two of its queries for all groups. 0: the query does not say.
	Robustness    int
	QueryInterval time.Duration
}

// alertSize is the size, in bytes, of the hop-by-hop options of each message that this package makes: the
// router alert, and padding.
const alertSize = 8

// Parse reads a query from an IPv6 packet, without what follows it in its frame. The caller has checked that
// it has a hop limit of 1, a link-local source and a right checksum. ok is false for what is no query,
// and for one that is to be ignored: without a router alert, behind other extension headers, of a length that
// is of neither version (RFC 3810, section 8.1), or shorter than its sources.
//
// It keeps nothing of the packet and allocates nothing.
func Parse(ip []byte) (q Query, ok bool) {
	if len(ip) < header.IPv6MinimumSize+alertSize || ip[6] != byte(header.IPv6HopByHopOptionsExtHdrIdentifier) {
		return q, false
	}
	options := ip[header.IPv6MinimumSize:]
	size := 8 * (1 + int(options[1]))
	if options[0] != byte(header.ICMPv6ProtocolNumber) || size > len(options) || !alerts(options[2:size]) {
		return q, false
	}
	message := options[size:]
	const old, least = header.ICMPv6HeaderSize + header.MLDMinimumSize, header.ICMPv6HeaderSize + header.MLDv2QueryMinimumSize
	if len(message) < old || message[0] != TypeQuery {
		return q, false
	}
	body := message[header.ICMPv6HeaderSize:]
	q.Group = netip.AddrFrom16([16]byte(body[4:20]))
	switch {
	case q.Group != netip.IPv6Unspecified() && !q.Group.IsMulticast():
		return q, false
	case len(message) == old:
		q.MLDv1, q.MaxResponseDelay = true, header.MLD(body).MaximumResponseDelay()
	case len(message) < least || len(message)-least < header.IPv6AddressSize*int(binary.BigEndian.Uint16(body[22:])):
		return q, false
	default:
		m := header.MLDv2Query(body)
		q.MaxResponseDelay = header.MLDv2MaximumResponseDelay(m.MaximumResponseCode())
		q.Robustness, q.QueryInterval = int(m.QuerierRobustnessVariable()), m.QuerierQueryInterval()
	}
	return q, true
}

// alerts reports whether hop-by-hop options are well-formed, hold one router alert, which is that of MLD
// (RFC 2711), and no option of a type that makes a host which does not know it drop the packet (RFC 8200,
// section 4.2).
func alerts(b []byte) (found bool) {
	const pad1, alert = 0, 5
	for len(b) > 0 {
		if b[0] == pad1 {
			b = b[1:]
			continue
		}
		if len(b) < 2 || 2+int(b[1]) > len(b) || b[0]&0xc0 != 0 {
			return false
		}
		if b[0] == alert {
			if found || b[1] != 2 || b[2] != 0 || b[3] != 0 {
				return false
			}
			found = true
		}
		b = b[2+int(b[1]):]
	}
	return found
}

// Group returns the solicited-node group of an IPv6 address (RFC 4291, section 2.7.1).
func Group(a netip.Addr) netip.Addr { return addrOf(header.SolicitedNodeAddr(toStack(a))) }

func toStack(a netip.Addr) tcpip.Address { return tcpip.AddrFrom16(a.As16()) }

func addrOf(a tcpip.Address) netip.Addr { return netip.AddrFrom16(a.As16()) }

// mostRecords is how many groups a report names at most, so that it fits the least MTU of IPv6, 1280 bytes.
const mostRecords = 60

// A record is what a report says about one group.
type record struct {
	group netip.Addr
	kind  header.MLDv2ReportRecordType
}

// reports makes the frames that report records, by the version of MLD that this host speaks.
func (l *Listener) reports(records []record) (frames [][]byte) {
	if l.v1 {
		for _, r := range records {
			typ, to := header.ICMPv6MulticastListenerReport, toStack(r.group)
			if r.kind == leave {
				typ, to = header.ICMPv6MulticastListenerDone, header.IPv6AllRoutersLinkLocalMulticastAddress
			}
			frames = append(frames, l.frame(to, typ, header.MLDMinimumSize, func(b []byte) { header.MLD(b).SetMulticastAddress(toStack(r.group)) }))
		}
		return frames
	}
	for len(records) > 0 {
		n := min(len(records), mostRecords)
		var s header.MLDv2ReportSerializer
		for _, r := range records[:n] {
			s.Records = append(s.Records, header.MLDv2ReportMulticastAddressRecordSerializer{RecordType: r.kind, MulticastAddress: toStack(r.group)})
		}
		frames = append(frames, l.frame(header.MLDv2RoutersAddress, header.ICMPv6MulticastListenerV2Report, s.Length(), s.SerializeInto))
		records = records[n:]
	}
	return frames
}

// frame makes the Ethernet frame of an MLD message to a group, whose size bytes behind the ICMPv6 header body
// fills in.
func (l *Listener) frame(to tcpip.Address, typ header.ICMPv6Type, size int, body func([]byte)) []byte {
	size += header.ICMPv6HeaderSize
	src, dst := toStack(l.from()), to.As16()
	b := append([]byte{0x33, 0x33}, dst[12:]...)
	b = append(b, l.mac[:]...)
	b = binary.BigEndian.AppendUint16(b, packet.IPv6)
	ip := len(b)
	b = append(b, make([]byte, header.IPv6MinimumSize+alertSize+size)...)
	header.IPv6(b[ip:]).Encode(&header.IPv6Fields{
		PayloadLength: uint16(alertSize + size), TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: header.MLDHopLimit, SrcAddr: src, DstAddr: to,
		ExtensionHeaders: header.IPv6ExtHdrSerializer{header.IPv6SerializableHopByHopExtHdr{&header.IPv6RouterAlertOption{Value: header.IPv6RouterAlertMLD}}},
	})
	icmp := header.ICMPv6(b[ip+header.IPv6MinimumSize+alertSize:])
	icmp.SetType(typ)
	body(icmp[header.ICMPv6HeaderSize:])
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{Header: icmp, Src: src, Dst: to}))
	return b
}

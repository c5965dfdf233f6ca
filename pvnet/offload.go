package pvnet

import (
	"encoding/binary"

	"barevif/pvnet/netif"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

// A GSO says how to cut a frame that is longer than the link's MTU (generic segmentation
// offload). The frame stays whole until it reaches a receiver that cannot take it, and is
// cut before that. The zero GSO means that the frame is not to be cut.
//
// A GSO frame is a TCP segment with one set of headers, a partial checksum
// ([ChecksumPartial]) and up to [MaxFrame] bytes.
type GSO struct {
	Type GSOType
	Size uint16 // bytes of TCP payload in each piece but the last
}

// GSOType is the protocol of a GSO frame: XEN_NETIF_GSO_TYPE_* of
// xen/include/public/io/netif.h.
type GSOType = netif.GSOType

const (
	GSONone  = netif.GSONone
	GSOTCPv4 = netif.GSOTCPv4
	GSOTCPv6 = netif.GSOTCPv6
)

// GSO returns how the frame is to be cut.
func (f *Frame) GSO() GSO { return f.gso }

// SetGSO sets how the frame is to be cut, and sets its checksum state to partial: the TCP
// checksum field must hold the sum of the pseudo-header. A frame that would be one piece
// only is not to be cut: its GSO is then zero. [ErrOffload] if the frame is no TCP
// segment of that type with its headers in the first piece, or if it would be cut into
// more than 8192 pieces. The zero GSO leaves the checksum state as it is.
func (f *Frame) SetGSO(g GSO) error {
	if g == (GSO{}) {
		f.gso = g
		return nil
	}
	cut, ok := g.cut()
	if !ok {
		return ErrOffload
	}
	h, ok := cut.Find(f.Bytes(), int(f.total))
	if !ok {
		return ErrOffload
	}
	f.csum, f.gso = ChecksumPartial, GSO{}
	if h.End-h.L5 > int(g.Size) {
		f.gso = g
	}
	return nil
}

// cut converts g for package packet; ok is false for an unknown type.
func (g GSO) cut() (cut packet.Cut, ok bool) {
	cut = packet.Cut{Proto: packet.TCP, Size: int(g.Size), Partial: true}
	switch g.Type {
	case GSOTCPv4:
		cut.Version = 4
	case GSOTCPv6:
		cut.Version = 6
	}
	return cut, cut.Version != 0
}

// gsoType returns the GSO type of a TCP segment with the IP version of h.
func gsoType(h *packet.Headers) GSOType {
	if h.Version == 4 {
		return GSOTCPv4
	}
	return GSOTCPv6
}

// SetChecksum sets the state of the TCP or UDP checksum. With ChecksumPartial the field
// must hold the sum of the pseudo-header; Send completes the checksum for a peer that
// does not take partial ones.
func (f *Frame) SetChecksum(c Checksum) { f.csum = c }

// CompleteChecksum completes a partial checksum and clears the GSO: a GSO frame becomes
// one long packet. The frame must have one holder. [ErrOffload] if the headers show no
// checksum field, [ErrShared] if the frame is read-only. A checksum that is not partial
// stays as it is.
func (f *Frame) CompleteChecksum() error {
	if f.csum == ChecksumPartial && f.buf.ReadOnly() {
		return ErrShared
	}
	if f.csum == ChecksumPartial && !f.completeChecksum() {
		return ErrOffload
	}
	f.gso = GSO{}
	return nil
}

// PartialAt returns the offset of the L4 segment in the frame, and the offset of the
// checksum field in that segment, in bytes. ok is false if the first piece has no such
// field.
func (f *Frame) PartialAt() (start, field int, ok bool) {
	_, p, ok := f.partial()
	return p.Start, p.Field - p.Start, ok
}

// offloads are the offloads that a peer takes.
type offloads uint8

const (
	takesCsum4 offloads = 1 << iota // partial TCP and UDP checksums over IPv4
	takesCsum6
	takesGSO4 // GSO frames of type GSOTCPv4
	takesGSO6
)

// A sendNeed is what a frame needs before it can be sent to a peer.
type sendNeed uint8

const (
	needNothing    sendNeed = iota
	needChecksum            // the checksum must be completed
	needCut                 // it must be cut
	needImpossible          // its headers do not match its offloads
)

// needs returns what f needs before it can be sent to a peer with these offers.
func (o offloads) needs(f *Frame) sendNeed {
	if f.csum != ChecksumPartial && f.gso.Size == 0 {
		return needNothing
	}
	h, _, ok := f.partial()
	if !ok {
		return needImpossible
	}
	if f.gso.Size != 0 && (f.csum != ChecksumPartial || h.Proto != packet.TCP || gsoType(&h) != f.gso.Type) {
		return needImpossible // the frame has been changed since SetGSO
	}
	csum, gso := takesCsum4, takesGSO4
	if h.Version == 6 {
		csum, gso = takesCsum6, takesGSO6
	}
	if h.Tags != 0 || h.Extensions != 0 {
		// Linux drops a frame with a VLAN tag and offloads (skb_checksum_setup). It no
		// longer leaves offloads of frames with extension headers to a card, since not
		// all cards can do them.
		o = 0
	}
	switch {
	case f.gso.Size != 0 && o&gso == 0:
		return needCut
	case f.gso.Size == 0 && o&csum == 0:
		return needChecksum
	}
	return needNothing
}

// admit returns what f needs before it can be sent, or the error of Send.
func (o offloads) admit(f *Frame) (sendNeed, error) {
	if !f.buf.Valid() {
		return 0, ErrStale
	}
	if f.total < MinFrame || f.total > MaxFrame || f.slots() == 0 {
		return 0, ErrFrameSize
	}
	w := o.needs(f)
	switch w {
	case needCut:
		return w, errMustCut
	case needImpossible:
		return w, ErrOffload
	}
	return w, nil
}

// extras returns the extra infos with which the frame is sent; hash is its hash, if hashed.
// This is the only place that makes them.
func (f *Frame) extras(hash FlowHash, hashed bool) (x netif.Extras) {
	if g := f.gso; g.Size != 0 {
		x.Add(netif.GSOExtra(netif.GSO{Size: g.Size, Type: netif.GSOType(g.Type)}))
	}
	if hashed {
		x.Add(hashExtra(hash))
	}
	return x
}

// extraSlots returns how many slots the extra infos take in a ring.
func (f *Frame) extraSlots(hashed bool) (n uint32) {
	if f.gso.Size != 0 {
		n++
	}
	if hashed {
		n++
	}
	return n
}

// takeOffloads checks the offloads of a received frame, which is private by now, and takes over
// what its extra infos say. It is the only place that reads them. keep says
// that this end offered to take them; otherwise arrived completes the checksum. It
// returns 0, or why the frame must be dropped.
func (f *Frame) takeOffloads(x *netif.Extras, keep bool, count *telemetry.Block) telemetry.Reason {
	if f.takeHash(x.Of(netif.ExtraHash)) {
		count.Add(telemetry.HashedPackets, 1)
	}
	g := x.Of(netif.ExtraGSO).GSO()
	if g.Size == 0 {
		if f.csum == ChecksumVerified {
			count.Add(telemetry.CsumVerified, 1)
		}
		if f.csum != ChecksumPartial {
			return 0
		}
		if keep {
			if _, _, ok := f.partial(); !ok {
				return telemetry.DropBadCsum
			}
		} else if !f.completeChecksum() {
			return telemetry.DropBadCsum
		}
		count.Add(telemetry.CsumPartial, 1)
		return 0
	}
	if !keep {
		return telemetry.DropBadGSO
	}
	whole := f.csum != ChecksumPartial
	if f.SetGSO(GSO{Type: GSOType(g.Type), Size: g.Size}) != nil {
		return telemetry.DropBadGSO
	}
	if whole { // as Linux does (rx_gso_checksum_fixup)
		h, p, _ := f.partial()
		if h.Extensions&packet.HasRoutingLeft != 0 {
			return telemetry.DropBadGSO // the pseudo-header's address is not in the IP header
		}
		binary.BigEndian.PutUint16(f.Bytes()[p.Field:], h.Pseudo(f.Bytes(), p.End-p.Start))
		count.Add(telemetry.GSOCsumFixup, 1)
	}
	count.Add(telemetry.CsumPartial, 1)
	if f.gso.Size != 0 {
		count.Add(telemetry.GSOPackets, 1)
	}
	return 0
}

// Headers parses the headers in the frame's first piece, which has all headers of a
// received or allocated frame. It reports whether the frame carries an IP packet.
func (f *Frame) Headers() (packet.Headers, bool) { return packet.Parse(f.Bytes(), int(f.total)) }

// partial locates the frame's TCP or UDP checksum. ok is false if the first piece has no
// such field.
func (f *Frame) partial() (h packet.Headers, p packet.Partial, ok bool) {
	if h, ok = f.Headers(); ok {
		p, ok = h.Partial(f.Bytes())
	}
	return h, p, ok
}

// completeChecksum completes a TCP or UDP checksum whose field holds the sum of the
// pseudo-header, as XEN_NETTXF_csum_blank says. The frame must be private and have one
// holder. It reports false if there is no such field.
func (f *Frame) completeChecksum() bool {
	_, p, ok := f.partial()
	if !ok {
		return false
	}
	var bufs [maxPieces][]byte
	if !p.Complete(f.gather(bufs[:0])) {
		return false
	}
	f.csum = ChecksumVerified
	return true
}

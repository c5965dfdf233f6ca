package pvnet

import (
	"encoding/binary"
	"errors"

	"barevif/pvnet/netif"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

// A GSO says how a frame that is longer than the link takes is cut, by the last one
// to whom that matters: generic segmentation offload. The zero GSO is a frame that
// is not to be cut.
//
// Such a frame is a TCP segment with one set of headers, a partial checksum
// ([ChecksumPartial]) and up to [MaxFrame] bytes.
type GSO struct {
	Type GSOType
	Size uint16 // bytes of TCP payload in each piece but the last
}

// GSOType is the protocol of a frame to be cut: XEN_NETIF_GSO_TYPE_* of
// xen/include/public/io/netif.h.
type GSOType uint8

const (
	GSONone  = GSOType(netif.GSONone)
	GSOTCPv4 = GSOType(netif.GSOTCPv4)
	GSOTCPv6 = GSOType(netif.GSOTCPv6)
)

// GSO is how the frame is to be cut.
func (f *Frame) GSO() GSO { return f.gso }

// SetGSO says how the frame is to be cut, and that its checksum is partial: the TCP
// checksum field must hold the sum of the pseudo-header. A frame that is one piece
// anyway stays whole. [ErrOffload] if the frame is no TCP segment of that type with
// its headers in the first piece, or would make more than 8192 pieces.
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

// cut is g in other words; ok is false for a type there is not.
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

// gsoType is how a TCP segment of this version of IP is cut.
func gsoType(h *packet.Headers) GSOType {
	if h.Version == 4 {
		return GSOTCPv4
	}
	return GSOTCPv6
}

// SetChecksum says what is known of the TCP or UDP checksum. With ChecksumPartial
// the field must hold the sum of the pseudo-header; whoever sends the frame to a peer
// that does not take it like that completes it.
func (f *Frame) SetChecksum(c Checksum) { f.csum = c }

// CompleteChecksum finishes a partial checksum, of a frame that is to be cut as of one
// long packet, which it then is. The frame must have one holder. [ErrOffload] if there
// is no checksum field where the headers say; nothing happens to a frame whose
// checksum is not partial.
func (f *Frame) CompleteChecksum() error {
	if f.csum == ChecksumPartial && !f.completeChecksum() {
		return ErrOffload
	}
	f.gso = GSO{}
	return nil
}

// PartialAt is where the L4 segment of a frame with a partial checksum starts and,
// from there, where its checksum field is, in bytes. ok is false for a frame that has
// no such field in its first piece.
func (f *Frame) PartialAt() (start, field int, ok bool) {
	_, p, ok := f.partial()
	return p.Start, p.Field - p.Start, ok
}

// offers is what a peer takes beyond whole frames with complete checksums.
type offers uint8

const (
	takesCsum4 offers = 1 << iota // partial TCP and UDP checksums over IPv4
	takesCsum6
	takesGSO4 // frames to be cut
	takesGSO6
)

// A fitting is what has to be done to a frame before a peer can be sent it.
type fitting uint8

const (
	fits       fitting = iota
	incomplete         // the checksum has to be completed
	uncut              // it has to be cut
	unfit              // its headers are not what it says they are
)

// fit says what f needs for a peer with these offers.
func (o offers) fit(f *Frame) fitting {
	if f.csum != ChecksumPartial && f.gso.Size == 0 {
		return fits
	}
	h, _, ok := f.partial()
	if !ok {
		return unfit
	}
	if f.gso.Size != 0 && (f.csum != ChecksumPartial || h.Proto != packet.TCP || gsoType(&h) != f.gso.Type) {
		return unfit // somebody has changed it since SetGSO
	}
	csum, gso := takesCsum4, takesGSO4
	if h.Version == 6 {
		csum, gso = takesCsum6, takesGSO6
	}
	if h.Tags != 0 || h.Extensions != 0 {
		// Linux drops such a frame behind a tag (skb_checksum_setup), and no longer leaves
		// anything of one with extension headers to a card: not all cards can do that.
		o = 0
	}
	switch {
	case f.gso.Size != 0 && o&gso == 0:
		return uncut
	case f.gso.Size == 0 && o&csum == 0:
		return incomplete
	}
	return fits
}

// errUncut asks the caller of send to cut the frame.
var errUncut = errors.New("pvnet: the frame has to be cut")

func (w fitting) err() error {
	if w == uncut {
		return errUncut
	}
	return ErrOffload
}

// slots is how many slots of a ring the frame takes for it.
func (g GSO) slots() uint32 {
	if g.Size != 0 {
		return 1
	}
	return 0
}

// extra is the extra info that goes with a frame to be cut.
func (g GSO) extra() netif.Extra {
	return netif.GSOExtra(netif.GSO{Size: g.Size, Type: netif.GSOType(g.Type)})
}

// arrived judges the offloads of a frame that came from a peer, which is private by
// now. keep says that they were offered; otherwise the frame is made whole. The
// reason is 0, or why the frame must be dropped.
func (f *Frame) arrived(g netif.GSO, keep bool, count *telemetry.Block) telemetry.Reason {
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

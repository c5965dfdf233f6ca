package pvnet

import (
	"encoding/binary"
	"errors"

	"barevif/pvnet/netif"
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

// maxCuts bounds what one frame becomes: enough for the smallest segments that IPv4
// requires hosts to take (536 bytes, RFC 9293), and half a ring.
const maxCuts = 128

// GSO is how the frame is to be cut.
func (f *Frame) GSO() GSO { return f.gso }

// SetGSO says how the frame is to be cut, and that its checksum is partial: the TCP
// checksum field must hold the sum of the pseudo-header. A frame that is one piece
// anyway stays whole. [ErrOffload] if the frame is no TCP segment of that type with
// its headers in the first piece, or would make more than 128 pieces.
func (f *Frame) SetGSO(g GSO) error {
	if g == (GSO{}) {
		f.gso = g
		return nil
	}
	h, ok := f.tcp()
	if !ok || g.Size == 0 || g.Type != h.gsoType() {
		return ErrOffload
	}
	payload := h.l4 + h.length - h.payload
	if payload > maxCuts*int(g.Size) {
		return ErrOffload
	}
	f.csum, f.gso = ChecksumPartial, GSO{}
	if payload > int(g.Size) {
		f.gso = g
	}
	return nil
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
	h, field, ok := f.field()
	return h.l4, field - h.l4, ok
}

// tcpHeaders is where a TCP segment's parts lie.
type tcpHeaders struct {
	headers
	ip      int // where the IP header starts
	payload int // where the TCP payload starts
}

// tcp finds the headers of a TCP segment, all of which lie in the first piece.
func (f *Frame) tcp() (h tcpHeaders, ok bool) {
	head := f.Bytes()
	if h.headers, ok = parse(head, int(f.total)); !ok || h.proto != protoTCP || h.length < 20 || len(head) < h.l4+20 {
		return h, false
	}
	h.payload = h.l4 + int(head[h.l4+12]>>4)*4
	h.ip = h.addrsAt - 8
	if h.gsoType() == GSOTCPv4 {
		h.ip = h.addrsAt - 12
	}
	return h, h.payload >= h.l4+20 && h.payload <= len(head) && h.payload <= h.l4+h.length
}

func (h *headers) gsoType() GSOType {
	if len(h.addrs) == 8 {
		return GSOTCPv4
	}
	return GSOTCPv6
}

// pseudo is the folded sum of the pseudo-header for a segment of n bytes.
func (h *headers) pseudo(n int) uint16 {
	return fold(add(0, h.addrs) + uint64(h.proto) + uint64(n))
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
	h, _, ok := f.field()
	if !ok {
		return unfit
	}
	if f.gso.Size != 0 && (f.csum != ChecksumPartial || h.proto != protoTCP || h.gsoType() != f.gso.Type) {
		return unfit // somebody has changed it since SetGSO
	}
	csum, gso := takesCsum4, takesGSO4
	if h.gsoType() == GSOTCPv6 {
		csum, gso = takesCsum6, takesGSO6
	}
	if kind := binary.BigEndian.Uint16(f.Bytes()[12:]); kind == 0x8100 || kind == 0x88a8 {
		o = 0 // Linux drops such a frame behind a tag: skb_checksum_setup
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
			if _, _, ok := f.field(); !ok {
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
		h, field, _ := f.field()
		binary.BigEndian.PutUint16(f.Bytes()[field:], h.pseudo(h.length))
		count.Add(telemetry.GSOCsumFixup, 1)
	}
	count.Add(telemetry.CsumPartial, 1)
	if f.gso.Size != 0 {
		count.Add(telemetry.GSOPackets, 1)
	}
	return 0
}

// A cutter makes frames of a link's size out of a long one, as Linux's
// tcp_gso_segment does.
type cutter struct {
	f    *Frame
	h    tcpHeaders
	size int // payload bytes in a piece
	at   int // payload bytes cut so far
	left int
	n    uint16 // pieces cut so far
}

func newCutter(f *Frame) (c cutter, ok bool) {
	h, ok := f.tcp()
	c = cutter{f: f, h: h, size: int(f.gso.Size), left: h.l4 + h.length - h.payload}
	return c, ok && c.left <= maxCuts*c.size
}

// pieces is how many are still to be cut, each of at most length bytes.
func (c *cutter) pieces() int { return (c.left + c.size - 1) / c.size }
func (c *cutter) length() int { return c.h.payload + min(c.size, c.left) }

// need is what sending all pieces takes.
func (c *cutter) need() need {
	bufs := buffersFor(c.length())
	return need{slots: c.pieces() * bufs, bufs: c.pieces() * bufs}
}

// next makes g, which has at least length bytes, the next piece.
func (c *cutter) next(g *Frame) {
	n := min(c.size, c.left)
	g.Truncate(c.h.payload + n)
	head := c.f.Bytes()[:c.h.payload]
	var srcs [1 + mostPieces][]byte
	srcs[0] = head
	k, skip, want := 1, c.h.payload+c.at, n
	for p := range c.f.Pieces() {
		if skip >= len(p) {
			skip -= len(p)
			continue
		}
		p = p[skip:min(len(p), skip+want)]
		skip, want = 0, want-len(p)
		srcs[k] = p
		if k++; want == 0 {
			break
		}
	}
	g.CopyFrom(srcs[:k]...)
	c.left -= n

	out := g.Bytes()
	segment := c.h.payload - c.h.l4 + n
	ip := out[c.h.ip:]
	if c.h.gsoType() == GSOTCPv4 {
		binary.BigEndian.PutUint16(ip[2:], uint16(c.h.l4-c.h.ip+segment))
		binary.BigEndian.PutUint16(ip[4:], binary.BigEndian.Uint16(ip[4:])+c.n)
		binary.BigEndian.PutUint16(ip[10:], 0)
		binary.BigEndian.PutUint16(ip[10:], ^fold(add(0, ip[:c.h.l4-c.h.ip])))
	} else {
		binary.BigEndian.PutUint16(ip[4:], uint16(segment))
	}
	tcp := out[c.h.l4:]
	binary.BigEndian.PutUint32(tcp[4:], binary.BigEndian.Uint32(tcp[4:])+uint32(c.at))
	if c.left > 0 {
		tcp[13] &^= tcpFIN | tcpPSH
	}
	if c.n > 0 {
		tcp[13] &^= tcpCWR
	}
	binary.BigEndian.PutUint16(tcp[16:], c.h.pseudo(segment))
	g.completeChecksum()
	c.at += n
	c.n++
}

// Flags of a TCP header that only the first or the last piece keeps.
const (
	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

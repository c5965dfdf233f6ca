package link

import (
	"encoding/binary"

	"barevif/pvnet/packet"
)

// Checksum is what is known of the transport checksum of a frame.
type Checksum uint8

const (
	ChecksumNone     Checksum = iota // as the sender left it
	ChecksumPartial                  // the field holds the pseudo header's sum; see Offload
	ChecksumVerified                 // found correct by the kernel
)

// GSOType is the kind of segments into which a frame has yet to be cut: gso_type of struct
// virtio_net_hdr (linux/virtio_net.h).
type GSOType uint8

const (
	GSONone  GSOType = 0
	GSOTCPv4 GSOType = 1
	GSOUFO   GSOType = 3 // one datagram, to be cut into IP fragments
	GSOTCPv6 GSOType = 4
	GSOUDP   GSOType = 5 // datagrams of GSOSize bytes each
)

// Offload is the work that is left to do to a frame. The zero Offload means none.
type Offload struct {
	Checksum  Checksum
	GSO       GSOType
	ECN       bool   // TCP segments carry CWR in the first only
	SumStart  uint16 // ChecksumPartial: where to start summing, bytes into the frame
	SumOffset uint16 // ChecksumPartial: where the field is, bytes after SumStart
	GSOSize   uint16 // bytes of payload in each segment
	HeaderLen uint16 // bytes of headers before the payload; a hint, 0 if unknown
}

// headerSize is the size of struct virtio_net_hdr without num_buffers, which
// neither kind of link uses.
const headerSize = 10

// Flags and the bit of gso_type of struct virtio_net_hdr (linux/virtio_net.h).
const (
	flagNeedsSum  = 1
	flagDataValid = 2
	gsoECN        = 0x80
)

// decode reads a header in the machine's byte order, the default of both TAPs and packet
// sockets.
func (o *Offload) decode(h *[headerSize]byte) {
	*o = Offload{
		GSO:       GSOType(h[1] &^ gsoECN),
		ECN:       h[1]&gsoECN != 0,
		HeaderLen: binary.NativeEndian.Uint16(h[2:]),
		GSOSize:   binary.NativeEndian.Uint16(h[4:]),
	}
	switch {
	case h[0]&flagNeedsSum != 0:
		o.Checksum = ChecksumPartial
		o.SumStart = binary.NativeEndian.Uint16(h[6:])
		o.SumOffset = binary.NativeEndian.Uint16(h[8:])
	case h[0]&flagDataValid != 0:
		o.Checksum = ChecksumVerified
	}
}

// encode is the reverse of decode. It leaves out ChecksumVerified: the interface has that
// flag only on the way out of a kernel.
func (o *Offload) encode(h *[headerSize]byte) {
	*h = [headerSize]byte{}
	if o.Checksum == ChecksumPartial {
		h[0] = flagNeedsSum
		binary.NativeEndian.PutUint16(h[6:], o.SumStart)
		binary.NativeEndian.PutUint16(h[8:], o.SumOffset)
	}
	if o.GSO == GSONone {
		return
	}
	h[1] = byte(o.GSO)
	if o.ECN {
		h[1] |= gsoECN
	}
	binary.NativeEndian.PutUint16(h[2:], o.HeaderLen)
	binary.NativeEndian.PutUint16(h[4:], o.GSOSize)
}

// shift adds n to all offsets, after n bytes were inserted in the Ethernet header.
func (o *Offload) shift(n uint16) {
	if o.Checksum == ChecksumPartial {
		o.SumStart += n
	}
	if o.HeaderLen != 0 {
		o.HeaderLen += n
	}
}

// Complete computes a partial checksum of the frame in the first n bytes of bufs, and
// sets o.Checksum to ChecksumNone. It handles Internet checksums and SCTP's CRC32c. Call it
// before a frame goes to a receiver that takes no partial checksums. ErrOffload: the field
// is not inside the frame, or not where the protocol has one; the frame must be dropped.
func (o *Offload) Complete(n int, bufs [][]byte) error {
	if o.Checksum != ChecksumPartial {
		return nil
	}
	var room [packet.MaxCutHeaders]byte
	p, ok := packet.PartialAt(headOf(n, bufs, &room), n, int(o.SumStart), int(o.SumOffset))
	if !ok || !p.Complete(bufs) {
		return ErrOffload
	}
	o.Checksum, o.SumStart, o.SumOffset = ChecksumNone, 0, 0
	return nil
}

// headOf returns the beginning of a frame of n bytes, with all headers. It is bufs[0], or a
// copy in room if bufs[0] is too short.
func headOf(n int, bufs [][]byte, room *[packet.MaxCutHeaders]byte) []byte {
	if len(bufs) > 0 && len(bufs[0]) >= min(n, len(room)) {
		return bufs[0][:min(n, len(bufs[0]))]
	}
	k := 0
	for _, b := range bufs {
		k += copy(room[k:min(n, len(room))], b)
	}
	return room[:k]
}

// cut returns how to cut the frame. The transport header begins where the sender says that
// the partial checksum begins, which may be inside a tunnel. ok is false for a GSO type
// that this package does not cut.
func (o *Offload) cut() (c packet.Cut, ok bool) {
	c = packet.Cut{Proto: packet.TCP, Size: int(o.GSOSize)}
	field := 16
	switch o.GSO {
	case GSOTCPv4:
		c.Version = 4
	case GSOTCPv6:
		c.Version = 6
	case GSOUDP:
		c.Proto, field = packet.UDP, 6
	default:
		return c, false
	}
	if o.Checksum == ChecksumPartial && int(o.SumOffset) == field {
		c.L4, c.Partial = int(o.SumStart), true
	}
	return c, true
}

// startCut prepares c to cut a frame, into pieces that are cut again of up to whole bytes of
// payload if whole is not 0. It reports whether c can cut the frame.
func (o *Offload) startCut(c *packet.Cutter, frame []byte, whole int) bool {
	cut, ok := o.cut()
	if !ok {
		return false
	}
	cut.Whole = whole
	ok = c.Init(frame, len(frame), cut)
	if !ok && cut.Proto == packet.TCP { // the checksum's offsets are wrong: let c find the header
		cut.L4, cut.Partial = 0, false
		ok = c.Init(frame, len(frame), cut)
	}
	return ok && c.Left() > 0
}

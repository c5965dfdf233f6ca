package link

import (
	"encoding/binary"

	"barevif/pvnet/packet"
)

// Checksum says how far the transport checksum of a frame can be believed.
type Checksum uint8

const (
	ChecksumNone     Checksum = iota // as the sender left it
	ChecksumPartial                  // the field holds the pseudo header's sum; see Offload
	ChecksumVerified                 // found correct by the kernel
)

// GSO is the kind of segments a frame is still to be cut into: gso_type of struct
// virtio_net_hdr (linux/virtio_net.h).
type GSO uint8

const (
	GSONone GSO = 0
	GSOTCP4 GSO = 1
	GSOUFO  GSO = 3 // one datagram, to be cut into IP fragments
	GSOTCP6 GSO = 4
	GSOUDP  GSO = 5 // datagrams of GSOSize bytes each
)

// Offload is what is left to do to a frame. The zero Offload: nothing.
type Offload struct {
	Checksum  Checksum
	GSO       GSO
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

// decode reads a header in the machine's byte order, in which both TAPs and packet
// sockets write it unless they are asked for another.
func (o *Offload) decode(h *[headerSize]byte) {
	*o = Offload{
		GSO:       GSO(h[1] &^ gsoECN),
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

// encode is the reverse of decode. ChecksumVerified is not passed on: on the way
// into a kernel the flag is not part of the interface.
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

// shift moves everything that counts from the frame's beginning n bytes back.
func (o *Offload) shift(n uint16) {
	if o.Checksum == ChecksumPartial {
		o.SumStart += n
	}
	if o.HeaderLen != 0 {
		o.HeaderLen += n
	}
}

// Complete does the work of a partial checksum in the first n bytes of bufs, and
// turns o into ChecksumNone: an internet checksum, or SCTP's CRC32c. It is for passing a
// frame on to something that does not take partial checksums. ErrOffload: the field is not
// inside the frame, or not where the protocol has one; the frame must be dropped.
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

// headOf is the beginning of a frame of n bytes, with all headers: in bufs, or a copy in
// room.
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

// cut is how a frame is to be cut, by what the sender said of its checksum: that is
// where the header is, which may be in a tunnel. ok is false for what cannot be cut here.
func (o *Offload) cut() (c packet.Cut, ok bool) {
	c = packet.Cut{Proto: packet.TCP, Size: int(o.GSOSize)}
	field := 16
	switch o.GSO {
	case GSOTCP4:
		c.Version = 4
	case GSOTCP6:
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

// begin makes c cut a frame, or reports that it cannot be cut.
func (o *Offload) begin(c *packet.Cutter, frame []byte, whole int) bool {
	cut, ok := o.cut()
	if !ok {
		return false
	}
	cut.Whole = whole
	ok = c.Init(frame, len(frame), cut)
	if !ok && cut.Proto == packet.TCP { // of the checksum's place not all is true
		cut.L4, cut.Partial = 0, false
		ok = c.Init(frame, len(frame), cut)
	}
	return ok && c.Left() > 0
}

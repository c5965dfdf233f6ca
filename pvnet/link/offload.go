package link

import "encoding/binary"

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
// turns o into ChecksumNone. It is for passing a frame on to something that
// does not take partial checksums. ErrOffload: the field is not inside the frame;
// the frame must be dropped.
func (o *Offload) Complete(n int, bufs [][]byte) error {
	if o.Checksum != ChecksumPartial {
		return nil
	}
	start, field := int(o.SumStart), int(o.SumStart)+int(o.SumOffset)
	if field+2 > n {
		return ErrOffload
	}
	var sum uint64
	var odd bool // the next byte is the second of its word
	at := 0      // bytes before b
	for _, b := range bufs {
		size := min(len(b), n-at)
		part := b[min(max(start-at, 0), size):size]
		at += size
		s := uint64(fold(addSum(0, part)))
		if odd { // part begins in the middle of a word
			s = s>>8 | s<<8&0xff00
		}
		sum += s
		odd = odd != (len(part)&1 != 0)
	}
	if at < n { // bufs holds less than the frame
		return ErrOffload
	}
	v := ^fold(sum)
	if v == 0 { // in UDP zero means "none"; the two are equal in ones' complement
		v = 0xffff
	}
	putByte(bufs, field, byte(v>>8))
	putByte(bufs, field+1, byte(v))
	o.Checksum, o.SumStart, o.SumOffset = ChecksumNone, 0, 0
	return nil
}

// putByte writes byte i of the frame in bufs, which the caller knows to be there.
func putByte(bufs [][]byte, i int, v byte) {
	for _, b := range bufs {
		if i < len(b) {
			b[i] = v
			return
		}
		i -= len(b)
	}
}

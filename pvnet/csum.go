package pvnet

import "barevif/pvnet/packet"

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

// gather appends the frame's pieces to bufs.
func (f *Frame) gather(bufs [][]byte) [][]byte {
	for p := range f.Pieces() {
		bufs = append(bufs, p)
	}
	return bufs
}

// completeChecksum completes a TCP or UDP checksum whose field holds the sum of the
// pseudo-header, as XEN_NETTXF_csum_blank says. The frame must be private and have one
// holder. It reports false if there is no such field.
func (f *Frame) completeChecksum() bool {
	_, p, ok := f.partial()
	if !ok {
		return false
	}
	var bufs [mostPieces][]byte
	if !p.Complete(f.gather(bufs[:0])) {
		return false
	}
	f.csum = ChecksumVerified
	return true
}

// flow returns a hash of the frame's addresses and ports, equal for all frames of one
// direction of a flow. Only the first fragment of a packet has ports, so those of
// fragments are left out.
func flow(head []byte) uint32 {
	h, ok := packet.Parse(head, MaxFrame)
	if !ok {
		return fnv(2166136261, head[:min(len(head), 12)])
	}
	sum := fnv(2166136261, h.Addresses(head))
	if (h.Proto == packet.TCP || h.Proto == packet.UDP) && h.Fragment == packet.Whole && h.L4 != 0 && len(head) >= h.L4+4 {
		sum = fnv(sum, head[h.L4:h.L4+4])
	}
	return sum
}

func fnv(h uint32, b []byte) uint32 {
	for _, c := range b {
		h = (h ^ uint32(c)) * 16777619
	}
	return h
}

package pvnet

import "barevif/pvnet/packet"

// Headers finds the frame's headers in its first piece, where a frame that was received or
// allocated has all of them. It reports whether it carries an IP packet.
func (f *Frame) Headers() (packet.Headers, bool) { return packet.Parse(f.Bytes(), int(f.total)) }

// partial is the frame's TCP or UDP checksum, whose field must be in the first piece.
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

// completeChecksum finishes a TCP or UDP checksum whose field holds the sum of
// the pseudo-header, as XEN_NETTXF_csum_blank says. The frame must be private
// and have one holder. It reports false for what has no such checksum.
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

// flow is a hash of the frame's addresses and ports: equal for all frames of a
// flow, in one direction. Of a packet in fragments only the first has ports, so none counts.
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

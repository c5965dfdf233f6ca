package link

import (
	"barevif/pvnet"
	"barevif/pvnet/packet"
)

// offloadOf returns the work that is left to do to a frame of a vif, as an Offload. It
// reports false for a frame whose headers contradict its checksum state or its GSO.
func offloadOf(f *pvnet.Frame) (off Offload, ok bool) {
	if f.Checksum() != pvnet.ChecksumPartial {
		return off, true
	}
	head := f.Bytes()
	h, ok := f.Headers()
	if !ok {
		return off, false
	}
	p, ok := h.Partial(head)
	if !ok {
		return off, false
	}
	off = Offload{Checksum: ChecksumPartial, SumStart: uint16(p.Start), SumOffset: uint16(p.Field - p.Start)}
	g := f.GSO()
	if g.Size == 0 {
		return off, true
	}
	off.GSO, off.GSOSize = GSOTCPv4, g.Size
	if g.Type == pvnet.GSOTCPv6 {
		off.GSO = GSOTCPv6
	}
	off.HeaderLen, off.ECN = uint16(h.L5), repeats(head, &h)
	return off, h.L5 != 0
}

// repeats reports whether a card without ECN support would repeat the CWR bit of a TCP
// segment in each piece. The vif protocol has no flag for ECN, so the header decides.
func repeats(head []byte, h *packet.Headers) bool {
	return h.Proto == packet.TCP && h.L5 != 0 && head[h.L4+13]&0x80 != 0
}

// setOffload marks f so that the vif, or its other end, does the work that off describes. It
// reports false, and leaves f unchanged, if the vif protocol cannot express that work.
func setOffload(f *pvnet.Frame, off Offload) bool {
	switch {
	case off.GSO == GSONone && off.Checksum == ChecksumNone:
		return true
	case off.GSO == GSONone && off.Checksum == ChecksumVerified:
		f.SetChecksum(pvnet.ChecksumVerified)
		return true
	case off.Checksum != ChecksumPartial:
		return false
	}
	if start, field, ok := f.PartialAt(); !ok || start != int(off.SumStart) || field != int(off.SumOffset) {
		return false
	}
	if off.GSO == GSONone {
		f.SetChecksum(pvnet.ChecksumPartial)
		return true
	}
	g, ok := off.vifGSO()
	return ok && !off.ECN && f.SetGSO(g) == nil // see repeats for ECN
}

// vifGSO returns the GSO of o for a frame of a vif. The vif protocol has types for TCP only.
func (o *Offload) vifGSO() (g pvnet.GSO, ok bool) {
	g.Size = o.GSOSize
	switch o.GSO {
	case GSOTCPv4:
		g.Type = pvnet.GSOTCPv4
	case GSOTCPv6:
		g.Type = pvnet.GSOTCPv6
	}
	return g, g.Type != pvnet.GSONone
}

package link

import "barevif/pvnet"

// leftOf is what a frame of a vif still needs, in the words of a link. It reports
// false for a frame whose headers are not what it says they are.
func leftOf(f *pvnet.Frame) (off Offload, ok bool) {
	if f.Checksum() != pvnet.ChecksumPartial {
		return off, true
	}
	start, field, ok := f.PartialAt()
	if !ok {
		return off, false
	}
	off = Offload{Checksum: ChecksumPartial, SumStart: uint16(start), SumOffset: uint16(field)}
	g := f.GSO()
	if g.Size == 0 {
		return off, true
	}
	off.GSO, off.GSOSize = GSOTCP4, g.Size
	if g.Type == pvnet.GSOTCPv6 {
		off.GSO = GSOTCP6
	}
	size, cwr, ok := tcpHeader(f, start)
	off.HeaderLen, off.ECN = uint16(size), cwr
	return off, ok
}

// leave has the vif, or its other end, do what off says is left to do to f. It
// reports false, and f is as it was, if they do not do that.
func leave(f *pvnet.Frame, off Offload) bool {
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
	g := pvnet.GSO{Size: off.GSOSize}
	switch off.GSO {
	case GSONone:
		f.SetChecksum(pvnet.ChecksumPartial)
		return true
	case GSOTCP4:
		g.Type = pvnet.GSOTCPv4
	case GSOTCP6:
		g.Type = pvnet.GSOTCPv6
	default:
		return false
	}
	// A vif has no word for ECN: a card behind it would repeat the CWR bit in each
	// segment.
	return !off.ECN && f.SetGSO(g) == nil
}

// longest is the size of the longest of the frames f will be cut into.
func longest(f *pvnet.Frame) int {
	g := f.GSO()
	if g.Size == 0 {
		return f.Len()
	}
	start, _, _ := f.PartialAt()
	size, _, _ := tcpHeader(f, start)
	return size + int(g.Size)
}

// tcpHeader is the size of all headers of a TCP segment that starts at l4, and
// whether CWR is set in it.
func tcpHeader(f *pvnet.Frame, l4 int) (size int, cwr, ok bool) {
	b := f.Bytes()
	if len(b) < l4+14 {
		return 0, false, false
	}
	return l4 + int(b[l4+12]>>4)*4, b[l4+13]&0x80 != 0, true
}

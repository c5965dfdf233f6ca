package pvnet

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/pvnet/netif"
	"barevif/pvnet/packet"
	"barevif/telemetry"
)

// udp4 returns a correct UDP datagram over IPv4, in a frame of n payload bytes.
func udp4(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, 14+20+8+n)
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0})
	ip := b[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, packet.UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(28+n))
	copy(ip[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	binary.BigEndian.PutUint16(ip[10:], ^naive(ip[:20]))
	udp := ip[20:]
	binary.BigEndian.PutUint16(udp, 1234)
	binary.BigEndian.PutUint16(udp[2:], 4321)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+n))
	for i := range n {
		udp[8+i] = byte(i * 3)
	}
	pseudo := append(append([]byte{}, ip[12:20]...), 0, packet.UDP, udp[4], udp[5])
	binary.BigEndian.PutUint16(udp[6:], ^naive(append(pseudo, udp...)))
	return b
}

// blank leaves only the sum of the pseudo-header in the checksum field, as a sender with
// checksum offload does.
func blank(b []byte) {
	ip := b[14:]
	pseudo := append(append([]byte{}, ip[12:20]...), 0, packet.UDP, ip[24], ip[25])
	binary.BigEndian.PutUint16(ip[26:], naive(pseudo))
}

// naive computes the Internet checksum in the slow way (RFC 1071).
func naive(b []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	if len(b)%2 == 1 {
		sum += uint32(b[len(b)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}

func TestAFlowHasOneHash(t *testing.T) {
	a, b := udp4(t, 10), udp4(t, 500)
	if flow(a) != flow(b) {
		t.Error("two frames of one flow differ")
	}
	b[14+20] ^= 1 // another port
	if flow(a) == flow(b) {
		t.Error("two flows agree")
	}
}

// extended returns a TCP segment behind IPv6 extension headers, given by their numbers.
// Its checksum field holds the sum of the pseudo-header.
func extended(payload int, exts ...byte) (b []byte, l4 int) {
	s := stream{v6: true, payload: payload, size: 1400}
	whole := s.frame()
	b = append([]byte(nil), whole[:54]...)
	next := 20
	for _, number := range exts {
		b[next] = number
		next = len(b)
		e := make([]byte, 24)
		e[1] = 2 // 24 bytes; cases below: 8 bytes, or in units of 4
		switch number {
		case 44:
			e = e[:8]
		case 51:
			e[1] = 4
		}
		b = append(b, e...)
	}
	b[next] = packet.TCP
	l4 = len(b)
	b = append(b, whole[54:]...)
	binary.BigEndian.PutUint16(b[18:], uint16(len(b)-54))
	return b, l4
}

// Linux guests leave the checksum and the segmentation of such packets to their card.
func TestExtensionHeadersArrive(t *testing.T) {
	count := telemetry.NewSet(1).RX(0)
	for _, exts := range [][]byte{nil, {0}, {60}, {43}, {44}, {51}, {0, 43, 60}, {0, 60, 43, 44, 60}} {
		for _, keep := range []bool{true, false} {
			b, l4 := extended(100, exts...)
			f := chop(t, arena.New(shm.Heap(8), shm.PageSize), b, 0)
			f.csum = ChecksumPartial
			if reason := f.takeOffloads(&netif.Extras{}, keep, count); reason != 0 {
				t.Errorf("%v: dropped as %v", exts, reason)
				continue
			}
			start, field, ok := f.PartialAt()
			if !ok || start != l4 || field != 16 || (f.Checksum() == ChecksumPartial) != keep {
				t.Errorf("%v: %d, %d, %v, %v", exts, start, field, ok, f.Checksum())
			}
			if h, _ := f.Headers(); !keep && !completed(f.Bytes(), h) {
				t.Errorf("%v: the checksum is wrong", exts)
			}
		}
		b, l4 := extended(20000, exts...)
		f := chop(t, arena.New(shm.Heap(8), shm.PageSize), b, 0)
		f.csum = ChecksumPartial
		reason := f.takeOffloads(extrasOf(netif.GSO{Size: 1400, Type: netif.GSOTCPv6}), true, count)
		if slices.Contains(exts, 51) {
			if reason != telemetry.DropBadGSO { // the authentication header would be wrong in each piece
				t.Errorf("%v: %v", exts, reason)
			}
			continue
		}
		if reason != 0 || f.GSO().Size != 1400 {
			t.Errorf("%v: to be cut: dropped as %v, %+v", exts, reason, f.GSO())
			continue
		}
		// Not every card takes such a frame, so it is cut for every peer.
		if w := (takesCsum6 | takesGSO6).needs(&f); (w == needNothing) != (exts == nil) || (w == needCut) != (exts != nil) {
			t.Errorf("%v: %d for who takes everything", exts, w)
		}
		pieces := cutAll(t, &f)
		if len(pieces) != 15 {
			t.Errorf("%v: %d pieces", exts, len(pieces))
		}
		for _, p := range pieces {
			if h, ok := packet.Parse(p, len(p)); !ok || h.L4 != l4 || !completed(p, h) {
				t.Errorf("%v: a wrong piece, %+v", exts, h)
			}
		}
	}
}

// With segments left in a routing header, the pseudo-header does not have the address of
// the IPv6 header. So a complete checksum is not made partial.
func TestARoutedFrameToBeCutNeedsAPartialChecksum(t *testing.T) {
	count := telemetry.NewSet(1).RX(0)
	for _, csum := range []Checksum{ChecksumPartial, ChecksumVerified, ChecksumUnknown} {
		b, _ := extended(20000, 43)
		b[54+3] = 1
		before := append([]byte(nil), b...)
		f := chop(t, arena.New(shm.Heap(8), shm.PageSize), b, 0)
		f.csum = csum
		reason := f.takeOffloads(extrasOf(netif.GSO{Size: 1400, Type: netif.GSOTCPv6}), true, count)
		if (reason == 0) != (csum == ChecksumPartial) || !bytes.Equal(bytesOf(&f), before) {
			t.Errorf("%v: %v", csum, reason)
		}
	}
}

// Neither netif.h nor Linux bounds how many segments a GSO frame is cut into.
func TestFramesOfManySegmentsArrive(t *testing.T) {
	count := telemetry.NewSet(1).RX(0)
	for _, size := range []int{8, 48, 88, 500, 536} {
		for _, v6 := range []bool{false, true} {
			s := stream{v6: v6, payload: 65000, size: size}
			f := chop(t, arena.New(shm.Heap(17), shm.PageSize), s.frame(), 0)
			f.csum = ChecksumPartial
			reason := f.takeOffloads(extrasOf(netif.GSO{Size: uint16(size), Type: s.gso().Type}), true, count)
			if reason != 0 || f.GSO() != s.gso() {
				t.Errorf("%d: %v, %+v", size, reason, f.GSO())
				continue
			}
			s.cut(t, cutAll(t, &f))
		}
	}
	// But a peer's page may not make more frames than Linux ever would.
	s := stream{payload: 65000, size: 7}
	f := chop(t, arena.New(shm.Heap(17), shm.PageSize), s.frame(), 0)
	if err := f.SetGSO(s.gso()); err != ErrOffload {
		t.Error(err)
	}
}

// All fragments of a packet have the same flow hash, and so do packets of one flow behind
// extension headers.
func TestAFlowOfFragmentsAndExtensions(t *testing.T) {
	first, later, other := udp4(t, 10), udp4(t, 10), udp4(t, 10)
	first[20], later[21], other[20] = 0x20, 5, 0x20
	later[34] ^= 1 // no port, since it is a later fragment
	other[26] ^= 1 // another source address
	if flow(first) != flow(later) {
		t.Error("two fragments differ")
	}
	if flow(first) == flow(other) {
		t.Error("fragments of two senders agree")
	}
	a, l4 := extended(10, 0, 60)
	b, _ := extended(500, 0, 60)
	if flow(a) != flow(b) {
		t.Error("two frames of one flow differ")
	}
	b[l4] ^= 1
	if flow(a) == flow(b) {
		t.Error("two flows agree")
	}
}

// extrasOf returns the extra infos of a frame that is to be cut as g says; the zero GSO
// stands for none.
func extrasOf(g netif.GSO) *netif.Extras {
	x := new(netif.Extras)
	if g.Size != 0 {
		x.Add(netif.GSOExtra(g))
	}
	return x
}

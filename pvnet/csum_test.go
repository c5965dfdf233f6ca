package pvnet

import (
	"encoding/binary"
	"testing"
)

// udp4 is a correct UDP datagram over IPv4 in a frame of n payload bytes.
func udp4(t testing.TB, n int) []byte {
	t.Helper()
	b := make([]byte, 14+20+8+n)
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0})
	ip := b[14:]
	ip[0], ip[8], ip[9] = 0x45, 64, protoUDP
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
	pseudo := append(append([]byte{}, ip[12:20]...), 0, protoUDP, udp[4], udp[5])
	binary.BigEndian.PutUint16(udp[6:], ^naive(append(pseudo, udp...)))
	return b
}

// blank leaves the pseudo-header's sum in the checksum field, as a sender with
// checksum offload does.
func blank(b []byte) {
	ip := b[14:]
	pseudo := append(append([]byte{}, ip[12:20]...), 0, protoUDP, ip[24], ip[25])
	binary.BigEndian.PutUint16(ip[26:], naive(pseudo))
}

// naive is the Internet checksum the slow way (RFC 1071).
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

func TestSumAgreesWithTheSlowOne(t *testing.T) {
	b := make([]byte, 300)
	pattern(b, 77)
	for n := range b {
		if got, want := fold(add(0, b[:n])), naive(b[:n]); got != want {
			t.Fatalf("%d bytes: %#x, want %#x", n, got, want)
		}
	}
}

func TestGarbageHasNoHeaders(t *testing.T) {
	good := udp4(t, 40)
	for n := range good {
		if h, ok := parse(good[:n], n); ok && h.l4+h.length > n {
			t.Fatalf("cut at %d: %+v", n, h)
		}
	}
	for i := range 40 {
		for _, v := range []byte{0, 1, 0x0f, 0x45, 0x4f, 0x60, 0x81, 0x88, 0xff} {
			b := append([]byte{}, good...)
			b[i] = v
			parse(b, len(b))
			flow(b)
		}
	}
}

func FuzzHeaders(f *testing.F) {
	f.Add([]byte{}, 0)
	f.Fuzz(func(t *testing.T, b []byte, total int) {
		if h, ok := parse(b, total); ok && (h.l4+h.length > total || h.length < 0) {
			t.Fatalf("%+v in %d bytes", h, total)
		}
		flow(b)
	})
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

package link

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// sum16 is the Internet checksum (RFC 1071), written as plainly as possible.
func sum16(b []byte) uint16 {
	var sum uint32
	for i, v := range b {
		if i%2 == 0 {
			sum += uint32(v) << 8
		} else {
			sum += uint32(v)
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// partialTCP returns an IPv4/TCP frame with a partial checksum, and its Offload.
func partialTCP(payload int) ([]byte, Offload) {
	f := make([]byte, 14+20+20+payload)
	copy(f, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0})
	ip, tcp := f[14:], f[34:]
	copy(ip, []byte{0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2})
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	binary.BigEndian.PutUint16(ip[10:], ^sum16(ip[:20]))
	copy(tcp, []byte{0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x18, 0xff, 0xff})
	for i := range tcp[20:] {
		tcp[20+i] = byte(i * 3)
	}
	binary.BigEndian.PutUint16(tcp[16:], pseudoSum(f))
	return f, Offload{Checksum: ChecksumPartial, SumStart: 34, SumOffset: 16}
}

func pseudoSum(f []byte) uint16 {
	ip := f[14:]
	pseudo := append([]byte(nil), ip[12:20]...)
	pseudo = append(pseudo, 0, ip[9])
	return sum16(binary.BigEndian.AppendUint16(pseudo, uint16(len(ip)-20)))
}

// tcpGood reports whether the TCP checksum of an IPv4 frame is correct.
func tcpGood(f []byte) bool {
	ip := f[14:]
	total := int(binary.BigEndian.Uint16(ip[2:]))
	pseudo := binary.BigEndian.AppendUint16(append(append([]byte(nil), ip[12:20]...), 0, 6), uint16(total-20))
	return sum16(append(pseudo, ip[20:total]...)) == 0xffff
}

func TestCompleteMakesTheChecksumRight(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for size := range 70 {
		whole, off := partialTCP(size)
		if tcpGood(whole) {
			t.Fatal("right before it was made so")
		}
		// Split at random, also into empty and one-byte pieces, with bytes to spare.
		b := append(bytes.Clone(whole), 1, 2, 3)
		var bufs [][]byte
		for rest := b; len(rest) > 0; {
			n := min(r.IntN(5)*r.IntN(8), len(rest))
			bufs = append(bufs, rest[:n])
			rest = rest[n:]
		}
		if err := off.Complete(len(whole), bufs); err != nil {
			t.Fatal(err)
		}
		if !tcpGood(b[:len(whole)]) || off != (Offload{}) {
			t.Fatalf("payload of %d: wrong checksum, %+v", size, off)
		}
		if b[len(whole)] != 1 {
			t.Fatal("wrote behind the frame")
		}
	}
}

func TestCompleteNeverWritesZero(t *testing.T) {
	b := make([]byte, 40)
	b[20], b[21] = 0xff, 0xff // the sum is ffff, its complement 0: "no checksum" in UDP
	off := Offload{Checksum: ChecksumPartial, SumStart: 14, SumOffset: 6}
	if err := off.Complete(len(b), [][]byte{b}); err != nil || b[20] != 0xff || b[21] != 0xff {
		t.Fatalf("% x, %v", b[20:22], err)
	}
}

func TestCompleteRefusesAFieldOutsideTheFrame(t *testing.T) {
	for _, off := range []Offload{
		{Checksum: ChecksumPartial, SumStart: 34, SumOffset: 65},
		{Checksum: ChecksumPartial, SumStart: 99},
		{Checksum: ChecksumPartial, SumStart: 65535, SumOffset: 65535},
	} {
		b := make([]byte, 200)
		if err := off.Complete(100, [][]byte{b[:100], b[100:]}); err != ErrOffload {
			t.Errorf("%+v: %v", off, err)
		}
		if !bytes.Equal(b, make([]byte, 200)) {
			t.Errorf("%+v: wrote", off)
		}
	}
	off := Offload{Checksum: ChecksumPartial}
	if err := off.Complete(100, [][]byte{make([]byte, 50)}); err != ErrOffload {
		t.Errorf("a frame longer than its buffers: %v", err)
	}
}

func TestCompleteLeavesOtherFramesAlone(t *testing.T) {
	for _, sum := range []Checksum{ChecksumNone, ChecksumVerified} {
		off := Offload{Checksum: sum, SumStart: 2}
		b := []byte{1, 2, 3, 4, 5, 6}
		if err := off.Complete(len(b), [][]byte{b}); err != nil || !bytes.Equal(b, []byte{1, 2, 3, 4, 5, 6}) {
			t.Fatalf("%v % x", err, b)
		}
	}
}

func TestHeaderSurvivesEncoding(t *testing.T) {
	for _, want := range []Offload{
		{},
		{Checksum: ChecksumPartial, SumStart: 34, SumOffset: 16},
		{Checksum: ChecksumPartial, SumStart: 0xfffe, SumOffset: 0xffff, GSO: GSOTCPv4, ECN: true, GSOSize: 1448, HeaderLen: 66},
		{GSO: GSOTCPv6, GSOSize: 1}, {GSO: GSOUDP, GSOSize: 0xffff}, {GSO: GSOUFO, GSOSize: 8},
	} {
		var h [headerSize]byte
		want.encode(&h)
		var got Offload
		got.decode(&h)
		if got != want {
			t.Errorf("%+v became %+v", want, got)
		}
	}
	// A verified checksum needs no flag on the way into a kernel.
	var h [headerSize]byte
	verified := Offload{Checksum: ChecksumVerified, SumStart: 9}
	verified.encode(&h)
	if h != [headerSize]byte{} {
		t.Errorf("% x", h)
	}
	h[0] = flagDataValid
	var got Offload
	if got.decode(&h); got != (Offload{Checksum: ChecksumVerified}) {
		t.Errorf("%+v", got)
	}
}

func FuzzComplete(f *testing.F) {
	whole, off := partialTCP(31)
	f.Add(whole, off.SumStart, off.SumOffset, uint8(7))
	f.Add([]byte{}, uint16(0), uint16(0), uint8(0))
	f.Add(make([]byte, 20), uint16(19), uint16(0), uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, start, offset uint16, step uint8) {
		one, many := bytes.Clone(b), bytes.Clone(b)
		var bufs [][]byte
		for rest := many; len(rest) > 0; {
			n := min(int(step)+1, len(rest))
			bufs, rest = append(bufs, rest[:n:n]), rest[n:]
		}
		o := Offload{Checksum: ChecksumPartial, SumStart: start, SumOffset: offset}
		p := o
		errOne, errMany := o.Complete(len(b), [][]byte{one}), p.Complete(len(b), bufs)
		if errOne != errMany || !bytes.Equal(one, many) {
			t.Fatalf("whole: %v % x; cut: %v % x", errOne, one, errMany, many)
		}
	})
}

package link

import (
	"bytes"
	"encoding/binary"
	"testing"

	"barevif/pvnet/packet"
)

// A gsoFrame is a packet that has yet to be cut: its bytes and its offload.
type gsoFrame struct {
	name  string
	frame []byte
	off   Offload
}

func gsoFrames() []gsoFrame {
	tcp4, off4 := partialTCP(4001)
	off4.GSO, off4.GSOSize, off4.HeaderLen = GSOTCPv4, 1448, 54
	binary.BigEndian.PutUint16(tcp4[20:], 0) // an unfragmentable packet may not have DF cleared by hand
	tcp4[20] = 0x40
	binary.BigEndian.PutUint16(tcp4[18:], 0xfffe) // the identification wraps
	sumIPv4(tcp4[14:])

	flags := bytes.Clone(tcp4)
	flags[47] = 0x99 // CWR, ACK, PSH, FIN
	offECN := off4
	offECN.ECN = true

	options := append(append(bytes.Clone(tcp4[:54]), 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2), tcp4[54:]...)
	options[46] = 0x80
	binary.BigEndian.PutUint16(options[16:], uint16(len(options)-14))
	sumIPv4(options[14:])
	binary.BigEndian.PutUint16(options[50:], pseudoSum(options))
	offOptions := off4
	offOptions.GSOSize, offOptions.HeaderLen = 1000, 66

	tcp6 := make([]byte, 14+40+20+3000)
	copy(tcp6, tcp4[:12])
	copy(tcp6[12:], []byte{0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, 6, 64})
	binary.BigEndian.PutUint16(tcp6[18:], uint16(len(tcp6)-54))
	copy(tcp6[22:], []byte{0x20, 1, 0xd, 0xb8, 15: 1})
	copy(tcp6[38:], []byte{0x20, 1, 0xd, 0xb8, 15: 2})
	copy(tcp6[54:], tcp4[34:34+20])
	for i := range tcp6[74:] {
		tcp6[74+i] = byte(i * 5)
	}
	pseudo := append(bytes.Clone(tcp6[22:54]), 0, 0, tcp6[18], tcp6[19], 0, 0, 0, 6)
	binary.BigEndian.PutUint16(tcp6[70:], sum16(pseudo))
	off6 := Offload{Checksum: ChecksumPartial, SumStart: 54, SumOffset: 16, GSO: GSOTCPv6, GSOSize: 1440, HeaderLen: 74}

	// Hop-by-hop options of 16 bytes, destination options of 8; both are padding.
	options6 := []byte{60, 1, 1, 12, 16: 6, 18: 1, 19: 4, 23: 0}
	extended := append(append(bytes.Clone(tcp6[:54]), options6...), tcp6[54:]...)
	extended[20] = 0
	binary.BigEndian.PutUint16(extended[18:], uint16(len(extended)-54))
	offExtended := off6
	offExtended.SumStart, offExtended.HeaderLen, offExtended.GSOSize = 78, 98, 1416

	udp := make([]byte, 14+20+8+2500)
	copy(udp, tcp4[:34])
	udp[23] = 17
	binary.BigEndian.PutUint16(udp[16:], uint16(len(udp)-14))
	sumIPv4(udp[14:])
	copy(udp[34:], []byte{0x30, 0x39, 0, 53})
	binary.BigEndian.PutUint16(udp[38:], uint16(len(udp)-34))
	for i := range udp[42:] {
		udp[42+i] = byte(i * 11)
	}
	binary.BigEndian.PutUint16(udp[40:], pseudoSum(udp))
	offUDP := Offload{Checksum: ChecksumPartial, SumStart: 34, SumOffset: 6, GSO: GSOUDP, GSOSize: 1200, HeaderLen: 42}

	even := bytes.Clone(tcp4[:54+2*1448])
	binary.BigEndian.PutUint16(even[16:], uint16(len(even)-14))
	sumIPv4(even[14:])
	binary.BigEndian.PutUint16(even[50:], pseudoSum(even))

	return []gsoFrame{
		{"tcp4", tcp4, off4}, {"tcp4 flags", flags, offECN}, {"tcp4 options", options, offOptions},
		{"tcp6", tcp6, off6}, {"udp4", udp, offUDP}, {"no rest", even, off4}, {"tcp6 options", extended, offExtended},
	}
}

func sumIPv4(ip []byte) {
	ip[10], ip[11] = 0, 0
	binary.BigEndian.PutUint16(ip[10:], ^sum16(ip[:20]))
}

func cut(t testing.TB, u gsoFrame) (segments [][]byte) {
	t.Helper()
	var c packet.Cutter
	if !u.off.startCut(&c, u.frame, 0) {
		t.Fatalf("%s: not cut", u.name)
	}
	for c.Left() > 0 {
		head, payload := c.Next([][]byte{u.frame}, nil)
		segments = append(segments, append(bytes.Clone(head), payload[0]...))
	}
	return segments
}

func TestSegmentsBehindATagAreThoseWithout(t *testing.T) {
	tag := []byte{0x81, 0, 0x20, 7}
	for _, u := range gsoFrames() {
		plain := cut(t, u)
		u.frame = append(append(bytes.Clone(u.frame[:12]), tag...), u.frame[12:]...)
		u.off.shift(4)
		for i, seg := range cut(t, u) {
			if !bytes.Equal(seg[12:16], tag) || !bytes.Equal(append(bytes.Clone(seg[:12]), seg[16:]...), plain[i]) {
				t.Errorf("%s: segment %d differs", u.name, i)
			}
		}
	}
}

func TestWhatCannotBeCutIsRefused(t *testing.T) {
	tcp, extended := gsoFrames()[0], gsoFrames()[6]
	change := func(f func(b []byte, off *Offload) []byte) (b []byte, off Offload) {
		off = tcp.off
		b = f(bytes.Clone(tcp.frame), &off)
		return b, off
	}
	for name, f := range map[string]func(b []byte, off *Offload) []byte{
		"empty":            func(b []byte, _ *Offload) []byte { return nil },
		"size of zero":     func(b []byte, o *Offload) []byte { o.GSOSize = 0; return b },
		"UFO":              func(b []byte, o *Offload) []byte { o.GSO = GSOUFO; return b },
		"unknown kind":     func(b []byte, o *Offload) []byte { o.GSO = 9; return b },
		"TCP said, UDP is": func(b []byte, o *Offload) []byte { b[23] = 17; return b },
		"UDP said, TCP is": func(b []byte, o *Offload) []byte { o.GSO = GSOUDP; return b },
		"IPv6 said":        func(b []byte, o *Offload) []byte { o.GSO = GSOTCPv6; return b },
		"a fragment":       func(b []byte, o *Offload) []byte { b[20] |= 0x20; return b },
		"short IP header":  func(b []byte, o *Offload) []byte { b[14] = 0x44; return b },
		"long IP header":   func(b []byte, o *Offload) []byte { b[14] = 0x4f; return b[:60] },
		"routed, but where to is not in the sum": func(_ []byte, o *Offload) []byte {
			b := bytes.Clone(extended.frame)
			*o, b[20], b[57] = extended.off, 43, 1
			o.SumStart--
			return b
		},
		"endless options": func(_ []byte, o *Offload) []byte {
			b := bytes.Clone(extended.frame)
			clear(b[54:])
			*o = extended.off
			return b
		},
		"options beyond it": func(_ []byte, o *Offload) []byte {
			b := bytes.Clone(extended.frame)
			*o, b[55] = extended.off, 255
			return b[:1000]
		},
		"short TCP header": func(b []byte, o *Offload) []byte { b[46] = 0x40; return b },
		"long TCP header":  func(b []byte, o *Offload) []byte { b[46] = 0xf0; return b[:80] },
		"headers only":     func(b []byte, o *Offload) []byte { return b[:54] },
		"three tags":       func(b []byte, o *Offload) []byte { copy(b[12:], bytes.Repeat([]byte{0x81, 0, 0, 1}, 3)); return b },
		"not IP":           func(b []byte, o *Offload) []byte { b[12] = 0x88; return b },
	} {
		var c packet.Cutter
		if b, off := change(f); off.startCut(&c, b, 0) {
			t.Errorf("%s: was cut", name)
		}
	}
}

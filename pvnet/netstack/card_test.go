package netstack

import (
	"bytes"
	"context"
	"encoding/binary"
	"runtime"
	"testing"
	"time"

	"barevif/pvnet"
)

// stationMAC and stationIP are the addresses of a neighbour, which the test plays.
var (
	stationMAC = pvnet.MAC{2, 0, 0, 0, 0, 9}
	stationIP  = []byte{192, 0, 2, 9}
)

// sum16 is the Internet checksum of b, which has an even length.
func sum16(b []byte) uint16 {
	var s uint32
	for i := 0; i < len(b); i += 2 {
		s += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// request returns an echo request from the station to the stack, with VLAN tags.
func request(seq byte, tags ...byte) []byte {
	b := append(append(append([]byte{}, frontMAC[:]...), stationMAC[:]...), tags...)
	b = append(b, 8, 0)
	ip := make([]byte, 48)
	ip[0], ip[8], ip[9] = 0x45, 64, 1
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	copy(ip[12:], stationIP)
	copy(ip[16:], frontIP.Addr().AsSlice())
	binary.BigEndian.PutUint16(ip[10:], sum16(ip[:20]))
	ip[20], ip[27] = 8, seq
	binary.BigEndian.PutUint16(ip[22:], sum16(ip[20:]))
	return append(b, ip...)
}

// arpAnswer returns the station's answer to a request for its address.
func arpAnswer(b []byte) []byte {
	r := append(append(append([]byte{}, b[6:12]...), stationMAC[:]...), b[12:20]...)
	r = append(append(append(r, 0, 2), stationMAC[:]...), stationIP...)
	return append(r, b[22:32]...)
}

func TestPriorityTagsAreTakenOffAndOtherVLANsAreForeign(t *testing.T) {
	w := newWire(t, 1500, pvnet.Config{})
	s := newStack(t, w.Front, Config{Addr: frontIP})
	answers := make(chan byte, 16)
	go w.Back.Listen(context.Background(), func(f pvnet.Frame) {
		b := make([]byte, f.Len())
		f.CopyTo(b)
		switch {
		case binary.BigEndian.Uint16(b[12:]) == 0x0806 && b[21] == 1 && bytes.Equal(b[38:42], stationIP):
			w.Back.Write(arpAnswer(b))
		case binary.BigEndian.Uint16(b[12:]) == 0x0800 && b[23] == 1 && b[34] == 0:
			answers <- b[41]
		}
	})
	for i, tags := range [][]byte{
		nil,
		{0x81, 0, 0, 0},
		{0x81, 0, 0x20, 0},
		{0x81, 0, 0xf0, 0}, // priority 7, drop eligible
		{0x88, 0xa8, 0, 0},
		{0x88, 0xa8, 0x60, 0, 0x81, 0, 0xa0, 0},
	} {
		if _, err := w.Back.Write(request(byte(i), tags...)); err != nil {
			t.Fatal(err)
		}
		select {
		case seq := <-answers:
			if seq != byte(i) {
				t.Fatalf("tags % x: the answer to another request", tags)
			}
		case <-time.After(limit):
			t.Fatalf("tags % x: no answer; %+v", tags, s.Stats())
		}
	}
	if st := s.Stats(); st != (Stats{}) {
		t.Fatalf("%+v", st)
	}

	// These frames are not for the stack. They are dropped and counted.
	for _, c := range []struct {
		name string
		b    []byte
		want Stats
	}{
		{"VLAN 5", request(0, 0x81, 0, 0, 5), Stats{Foreign: 1}},
		{"VLAN 5 behind VLAN 0", request(0, 0x88, 0xa8, 0, 0, 0x81, 0, 0xe0, 5), Stats{Foreign: 1}},
		{"VLAN 4095", request(0, 0x81, 0, 0xef, 0xff), Stats{Foreign: 1}},
		{"another station", append([]byte{2, 9, 9, 9, 9, 9}, request(0)[6:]...), Stats{Foreign: 1}},
		{"LLDP", append([]byte{1, 0x80, 0xc2, 0, 0, 14, 2, 0, 0, 0, 0, 9, 0x88, 0xcc}, make([]byte, 46)...), Stats{Unknown: 1}},
		{"a length, for LLC", append(append(frontMAC[:], stationMAC[:]...), make([]byte, 50)...), Stats{Unknown: 1}},
		{"LLDP behind VLAN 0", append(request(0, 0x81, 0, 0, 0, 0x88, 0xcc)[:18], make([]byte, 40)...), Stats{Unknown: 1}},
		{"a tag cut short", request(0, 0x81, 0, 0, 0)[:17], Stats{Malformed: 1}},
		{"a second tag cut short", request(0, 0x81, 0, 0, 0, 0x81, 0, 0, 0)[:21], Stats{Malformed: 1}},
		{"a tag alone", request(0, 0x81, 0)[:14], Stats{Malformed: 1}},
		{"an IP header cut short", request(0)[:20], Stats{Malformed: 1}},
		{"a wrong IP checksum", func() []byte { b := request(0); b[24]++; return b }(), Stats{Malformed: 1}},
	} {
		before := s.Stats()
		if _, err := w.Back.Write(c.b); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(limit); s.Stats() == before; runtime.Gosched() {
			if time.Now().After(end) {
				t.Fatalf("%s: in no counter", c.name)
			}
		}
		got := s.Stats()
		got.Foreign -= before.Foreign
		got.Unknown -= before.Unknown
		got.Malformed -= before.Malformed
		if got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	select {
	case seq := <-answers:
		t.Errorf("an answer, %d, to a frame that is not the stack's", seq)
	default:
	}
}

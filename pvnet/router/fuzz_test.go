package router

import (
	"bytes"
	"encoding/binary"
	"testing"
	"time"

	"barevif/pvnet/packet"
)

// valid reports whether the checksums of a packet that is not translated yet are right, as far
// as the frame is whole.
func valid(p *Packet) bool {
	h, ok := packet.Parse(p.Head, p.Total)
	if !ok || h.End > len(p.Head) || h.Fragment != packet.Whole || h.L4 == 0 || h.Extensions != 0 {
		return false
	}
	b := p.Head[h.L4:h.End]
	sum := packet.Add(0, b)
	switch h.Proto {
	case packet.TCP, packet.UDP, icmp6:
		if h.Proto == packet.UDP && len(b) >= 8 && (b[6]|b[7] == 0 || int(be16(b[4:])) != len(b)) {
			return false
		}
		if p.Partial {
			if len(b) < 20 {
				return false
			}
			at := 16
			if h.Proto == packet.UDP {
				at = 6
			}
			return be16(b[at:]) == h.Pseudo(p.Head, len(b))
		}
		sum += uint64(h.Pseudo(p.Head, len(b)))
	case icmp4:
	default:
		return false
	}
	return packet.Fold(sum) == 0xffff
}

// FuzzProcess gives a router two frames, so that the second may belong to the flow of the
// first, with any head, length, port and offload. It must not panic, must leave alone what
// does not go on, and must not make a right checksum wrong.
func FuzzProcess(f *testing.F) {
	add := func(s spec, then ...byte) { f.Add(s.frame(), then, uint16(s.in), uint8(0)) }
	syn4 := tcp(clientA, "10.1.0.5", 4000, server, 80, syn)
	syn4.options = []byte{1, 2, 4, 0xff, 0xff}
	add(syn4)
	add(tcp(clientA, "fd01::5", 4000, "2001:db8:1::9", 80, syn))
	add(udp(clientA, "10.1.0.5", 4000, server, 53))
	add(udp(clientA, "10.1.0.5", 4000, "10.1.0.1", 53))
	add(echo(clientA, "fd01::5", "2001:db8:1::9", 5, false))
	add(discoverySpec(clientA, "fd01::5", "ff02::1:ff00:1", 135, "fd01::1", []byte{1, 1, 2, 0, 0, 0, 1, 1}))
	add(icmpError(uplink, server, "192.0.2.2", 3, 1, 0, udp(uplink, "192.0.2.2", 4000, server, 53).frame()))
	frag := udp(clientA, "10.1.0.5", 4000, server, 53)
	frag.fragment = 0x2000
	second := spec{in: clientA, src: "10.1.0.5", dst: server, proto: 17, fragment: 2, payload: make([]byte, 9), noSum: true}
	add(frag, second.frame()...)
	f6 := fragment6(1, 0, true, make([]byte, 16))
	then := fragment6(1, 16, false, make([]byte, 16))
	f.Add(f6.Head, then.Head, uint16(clientA), uint8(0))
	f.Add(syn4.frame(), tcp(uplink, server, 80, "192.0.2.2", 4000, synAck).frame(), uint16(clientA), uint8(3))
	// Errors about the router's own connection, whose port is not translated, and about one to the router.
	own := tcp(LocalPort, "192.0.2.2", 4000, server, 80, syn)
	own.dmac, own.smac = macUp, macUp
	f.Add(own.frame(), icmpError(uplink, server, "192.0.2.2", 3, 4, 1300, own.frame()).frame(), uint16(LocalPort), uint8(1))
	later := own
	later.seq = 1 << 31
	f.Add(own.frame(), icmpError(uplink, server, "192.0.2.2", 3, 4, 1300, later.frame()[:14+28]).frame(), uint16(LocalPort), uint8(1))
	own = tcp(LocalPort, "2001:db8::2", 4000, "2001:db8:1::9", 80, syn)
	own.dmac, own.smac = macUp, macUp
	f.Add(own.frame(), icmpError(uplink, "2001:db8:1::9", "2001:db8::2", 2, 0, 1300, own.frame()).frame(), uint16(LocalPort), uint8(1))
	unknown := tcp(clientA, "10.1.0.1", 80, "10.1.0.5", 4000, synAck)
	f.Add(tcp(clientA, "10.1.0.5", 4000, "10.1.0.1", 80, syn).frame(), icmpError(clientA, "10.1.0.5", "10.1.0.1", 3, 1, 0, unknown.frame()).frame(), uint16(clientA), uint8(0))
	f.Add(query(nil).Head, query(func(f []byte) { f[21] = 255 }).Head, uint16(uplink), uint8(0))
	f.Fuzz(func(t *testing.T, one, two []byte, in uint16, how uint8) {
		if len(one)+len(two) > 1<<16 {
			return
		}
		w := newWorld(t, Limits{Flows: 16, Fragments: 4, Neighbours: 4}, func(c *Config) {
			forwardsTo(c)
			c.ClampMSS, c.Default = true, Reject
			c.Ports[2].Masquerade6, c.Ports[2].Listens = true, true
			c.LocalDefault = Accept
		})
		for i, frame := range [][]byte{one, two, one} {
			p := Packet{In: PortID(in), Head: bytes.Clone(frame), Total: len(frame)}
			if i == 1 && how&1 != 0 {
				p.In = uplink
			}
			p.Partial = how&2 != 0
			if how&4 != 0 {
				p.GSO = 536
			}
			if how&8 != 0 {
				p.Total += 500
			}
			if how&16 != 0 {
				p.Head = p.Head[:len(p.Head)/2]
			}
			if how&32 != 0 && len(p.Head) >= 34 && p.Head[12] == 8 { // let more of them in
				copy(p.Head, macA[:])
				copy(p.Head[26:], []byte{10, 1, 0, 5})
				n := min(14+int(p.Head[14]&15)*4, len(p.Head))
				p.Head[24], p.Head[25] = 0, 0
				binary.BigEndian.PutUint16(p.Head[24:], packet.Checksum(p.Head[14:n]))
			}
			before, wasValid := bytes.Clone(p.Head), valid(&p)
			guard := append(p.Head, 0xa5)[:len(p.Head)]
			p.Head = guard[:len(guard):len(guard)]
			batch := []Packet{p}
			w.Process(w.at, batch)
			p = batch[0]
			switch p.Verdict {
			case VerdictForward, VerdictLocal, VerdictFragment:
				if wasValid && !valid(&p) {
					t.Fatalf("a right checksum became wrong\n%x\n%x", before, p.Head)
				}
				if h, ok := packet.Parse(p.Head, p.Total); ok && h.Version == 4 {
					if n := int(p.Head[h.L3]&15) * 4; packet.Checksum(p.Head[h.L3:h.L3+n]) != 0 {
						t.Fatalf("a wrong IP checksum: %x", p.Head)
					}
				}
				if p.Verdict == VerdictFragment {
					var fr Fragmenter
					if fr.Init(p.Head, p.Total, p.MTU) {
						for n := 0; ; n++ {
							if _, from, size, ok := fr.Next(); !ok {
								break
							} else if from+size > p.Total || n > 70000 {
								t.Fatal("a fragment from outside the frame")
							}
						}
					}
				}
			default:
				if !bytes.Equal(p.Head, before) {
					t.Fatalf("%v changed the head", p.Verdict)
				}
			}
			if p.Verdict == VerdictNeighbour {
				w.AppendSolicit(nil, p.Out, p.Next)
				w.Unreachable(w.at, &p)
			}
			reply := p.AppendReply(nil)
			if (p.Verdict == VerdictReply) != (len(reply) > 0) || len(reply) > MaxReply {
				t.Fatalf("%v with a reply of %d bytes", p.Verdict, len(reply))
			}
			if len(reply) > 0 {
				if reply[12] == 8 && reply[13] == 6 {
					continue
				}
				if q := (Packet{Head: reply, Total: len(reply)}); !valid(&q) {
					t.Fatalf("a wrong reply: %x", reply)
				}
			}
		}
		w.consistent()
		w.at += 72 * time.Hour
		w.Tick(w.at)
		w.Process(w.at, nil)
		if n := w.Stats().Flows; n != 0 {
			t.Fatalf("%d flows are left", n)
		}
		w.consistent()
	})
}

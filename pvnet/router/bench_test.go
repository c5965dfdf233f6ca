package router

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/link/channel"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// benchBatch is the length of a batch of the data path.
const benchBatch = 32

// BenchmarkForward forwards packets of established flows, in batches, as a receiver does.
func BenchmarkForward(b *testing.B) {
	for _, size := range []int{64, 1500} {
		for _, kind := range []string{"IPv4", "IPv4-NAT", "IPv6"} {
			for _, flows := range []int{1, 4096} {
				b.Run(fmt.Sprintf("%s/size=%d/flows=%d", kind, size, flows), func(b *testing.B) { benchForward(b, kind, size, flows) })
			}
		}
	}
}

func benchForward(b *testing.B, kind string, size, flows int) {
	w := newWorld(b, Limits{}, func(c *Config) { c.Ports[2].Masquerade = kind == "IPv4-NAT" })
	var frames [][]byte
	for i := range flows {
		s := udp(clientA, "10.1.0.5", uint16(1000+i), server, 53)
		n := 42
		if kind == "IPv6" {
			s = udp(clientA, "fd01::5", uint16(1000+i), "2001:db8:1::9", 53)
			n = 62
		}
		s.payload = make([]byte, size-n)
		w.forwarded(s, uplink)
		frames = append(frames, s.frame())
	}
	b.ReportAllocs()
	batch := make([]Packet, benchBatch)
	heads := make([][]byte, benchBatch)
	for i := range heads {
		heads[i] = make([]byte, size)
	}
	n, next := 0, 0
	start := time.Now()
	for b.Loop() {
		for i := range batch {
			f := frames[next]
			if next++; next == len(frames) {
				next = 0
			}
			copy(heads[i], f[:62]) // the head as it arrives
			batch[i] = Packet{In: clientA, Head: heads[i], Total: size}
		}
		w.Process(w.at, batch)
		n += benchBatch
	}
	spent := time.Since(start)
	if batch[benchBatch-1].Verdict != VerdictForward {
		b.Fatal(batch[benchBatch-1].Reason)
	}
	b.ReportMetric(float64(spent.Nanoseconds())/float64(n), "ns/packet")
}

// BenchmarkNewFlows begins a translated flow with every packet.
func BenchmarkNewFlows(b *testing.B) {
	w := newWorld(b, Limits{Flows: 1 << 17, FlowsPerPort: 1 << 15}, nil)
	f := tcp(clientA, "10.1.0.5", 0, server, 80, syn).frame()
	batch := make([]Packet, benchBatch)
	heads := make([][]byte, benchBatch)
	for i := range heads {
		heads[i] = make([]byte, len(f))
	}
	b.ReportAllocs()
	n := uint32(0)
	start := time.Now()
	for b.Loop() {
		for i := range batch {
			copy(heads[i], f)
			n++
			binary.BigEndian.PutUint16(heads[i][34:], uint16(n))
			binary.BigEndian.PutUint16(heads[i][36:], uint16(n>>16)+1)
			batch[i] = Packet{In: clientA, Head: heads[i], Total: len(f)}
		}
		w.Process(w.at, batch)
	}
	spent := time.Since(start)
	if v := batch[benchBatch-1]; v.Verdict != VerdictForward {
		b.Fatal(v.Reason)
	}
	b.ReportMetric(float64(n)/spent.Seconds(), "flows/s")
}

// gvisorForwarder is gVisor's stack as a router without translation or filter, between two
// endpoints in memory without Ethernet.
type gvisorForwarder struct{ in, out *channel.Endpoint }

func newGvisorForwarder(t testing.TB) *gvisorForwarder {
	s := stack.New(stack.Options{NetworkProtocols: []stack.NetworkProtocolFactory{ipv4.NewProtocol}})
	g := &gvisorForwarder{in: channel.New(benchBatch, 1500, ""), out: channel.New(benchBatch, 1500, "")}
	check := func(err tcpip.Error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	check(s.CreateNIC(1, g.in))
	check(s.CreateNIC(2, g.out))
	for nic, a := range map[tcpip.NICID]string{1: "10.1.0.1", 2: "192.0.2.2"} {
		check(s.AddProtocolAddress(nic, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: tcpip.AddressWithPrefix{Address: tcpipAddr(ip(a)), PrefixLen: 24}}, stack.AddressProperties{}))
		_, err := s.SetNICForwarding(nic, ipv4.ProtocolNumber, true)
		check(err)
	}
	s.SetRouteTable([]tcpip.Route{{Destination: header.IPv4EmptySubnet, NIC: 2}})
	t.Cleanup(s.Destroy)
	return g
}

// forward forwards one IPv4 packet into to and returns its length.
func (g *gvisorForwarder) forward(packet, to []byte) int {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	g.in.InjectInbound(ipv4.ProtocolNumber, p)
	p.DecRef()
	q := g.out.Read()
	if q == nil {
		return 0
	}
	n := 0
	for _, s := range q.AsSlices() {
		n += copy(to[n:], s)
	}
	q.DecRef()
	return n
}

// BenchmarkBesideGvisor forwards the same packets by a Router, which translates, tracks and
// filters, and by gVisor's stack, which only forwards, in turns: x/gvisor is how many
// times longer gVisor takes.
func BenchmarkBesideGvisor(b *testing.B) {
	for _, size := range []int{64, 1500} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			w := newWorld(b, Limits{}, nil)
			g := newGvisorForwarder(b)
			s := udp(clientA, "10.1.0.5", 4000, server, 53)
			s.payload = make([]byte, size-42)
			frame := s.frame()
			batch, to := make([]Packet, benchBatch), make([]byte, 2000)
			heads := make([][]byte, benchBatch)
			for i := range heads {
				heads[i] = make([]byte, size)
			}
			var ours, theirs time.Duration
			for b.Loop() {
				start := time.Now()
				for i := range batch {
					copy(heads[i], frame)
					batch[i] = Packet{In: clientA, Head: heads[i], Total: size}
				}
				w.Process(w.at, batch)
				middle := time.Now()
				for range benchBatch {
					if g.forward(frame[14:], to) != size-14 {
						b.Fatal("gVisor did not forward it")
					}
				}
				ours += middle.Sub(start)
				theirs += time.Since(middle)
			}
			if batch[0].Verdict != VerdictForward {
				b.Fatal(batch[0].Reason)
			}
			b.ReportMetric(float64(theirs)/float64(ours), "x/gvisor")
		})
	}
}

// TestGvisorForwardsTheSame compares what both make of an IPv4 packet without translation.
func TestGvisorForwardsTheSame(t *testing.T) {
	w := newWorld(t, Limits{}, func(c *Config) { c.Ports[2].Masquerade = false })
	g := newGvisorForwarder(t)
	for i := range 200 {
		s := udp(clientA, "10.1.0.5", uint16(i*331), server, uint16(i*97))
		s.id, s.ttl, s.payload = uint16(i*277), uint8(2+i), bytes.Repeat([]byte{byte(i)}, i)
		to := make([]byte, 2000)
		n := g.forward(s.frame()[14:], to)
		p := w.send(s)
		if p.Verdict != VerdictForward || !bytes.Equal(p.Head[14:], to[:n]) {
			t.Fatalf("packet %d: %v\n ours   %x\n gVisor %x", i, p.Verdict, p.Head[14:], to[:n])
		}
	}
}

// BenchmarkShared has as many receivers as processors share a Router, beside one that has it to
// itself: what the one lock costs, for batches of 1 and of 32.
func BenchmarkShared(b *testing.B) {
	for _, size := range []int{1, benchBatch} {
		for _, shared := range []bool{false, true} {
			b.Run(fmt.Sprintf("batch=%d/shared=%v", size, shared), func(b *testing.B) {
				w := newWorld(b, Limits{}, nil)
				s := udp(clientA, "10.1.0.5", 4000, server, 53)
				w.forwarded(s, uplink)
				frame := s.frame()
				receive := func(next func() bool) {
					batch, heads := make([]Packet, size), make([][]byte, size)
					for i := range heads {
						heads[i] = make([]byte, len(frame))
					}
					for next() {
						for i := range batch {
							copy(heads[i], frame)
							batch[i] = Packet{In: clientA, Head: heads[i], Total: len(frame)}
						}
						w.Process(w.at, batch)
					}
				}
				start := time.Now()
				if shared {
					b.RunParallel(func(pb *testing.PB) { receive(pb.Next) })
				} else {
					left := b.N
					receive(func() bool { left--; return left >= 0 })
				}
				b.ReportMetric(float64(time.Since(start).Nanoseconds())/float64(b.N*size), "ns/packet")
			})
		}
	}
}

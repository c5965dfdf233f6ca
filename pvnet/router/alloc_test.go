package router

import (
	"bytes"
	"encoding/binary"
	"sync"
	"testing"
	"time"
)

func TestNothingAllocatesForAPacket(t *testing.T) {
	w := newWorld(t, Limits{Flows: 64, FlowsPerPort: 16}, func(c *Config) { c.ClampMSS = true; c.LocalDefault = Accept })
	port := w.open(4000)
	frag := udp(clientA, "10.1.0.5", 4000, server, 53)
	frag.fragment = 0x2000
	dead := udp(clientA, "10.1.0.5", 4000, server, 53)
	dead.ttl = 1
	list := []spec{
		tcp(clientA, "10.1.0.5", 4000, server, 80, ack), tcp(uplink, server, 80, "192.0.2.2", port, ack), udp(clientA, "fd01::5", 4000, "2001:db8:1::9", 53),
		frag, dead, echo(clientA, "10.1.0.5", server, 5, false), udp(clientA, "10.1.0.5", 4000, "10.1.0.1", 53), udp(clientA, "10.1.0.5", 4000, "10.2.0.5", 53),
		udp(clientA, "10.1.0.5", 4001, server, 53), // becomes a new flow each time, see below
	}
	var packets []Packet
	var before [][]byte
	for _, s := range list {
		p := s.packet()
		packets = append(packets, p)
		before = append(before, bytes.Clone(p.Head))
	}
	room := make([]byte, 0, MaxReply)
	sport := uint16(0)
	allocs := testing.AllocsPerRun(500, func() {
		for i := range packets {
			copy(packets[i].Head, before[i])
		}
		sport++
		last := packets[len(packets)-1].Head[34:]
		binary.BigEndian.PutUint16(last, sport)
		binary.BigEndian.PutUint16(last[6:], 0)
		w.Process(w.at, packets)
		packets[4].AppendReply(room)
		w.at += time.Millisecond
	})
	if allocs != 0 {
		t.Errorf("%v allocations for a batch of %d packets", allocs, len(packets))
	}
	if w.Stats().Evicted == 0 {
		t.Error("no new flows were made")
	}
}

// TestManyGoroutines shares a Router between receivers, a reader of counters and one who
// configures it; the race detector watches.
func TestManyGoroutines(t *testing.T) {
	w := newWorld(t, Limits{Flows: 16384, FlowsPerPort: 8192}, nil)
	var receivers, others sync.WaitGroup
	stop := make(chan struct{})
	for g := range 4 {
		receivers.Go(func() {
			in, src := clientA, "10.1.0.5"
			if g%2 == 1 {
				in, src = clientB, "10.2.0.5"
			}
			for i := range 400 {
				batch := make([]Packet, 0, 8)
				for j := range 8 {
					batch = append(batch, udp(in, src, uint16(g*1000+i*8+j), server, 53).packet())
				}
				w.Process(time.Hour+time.Duration(i)*time.Millisecond, batch)
				for j := range batch {
					if p := &batch[j]; p.Verdict != VerdictForward {
						t.Errorf("%v because of %v", p.Verdict, p.Reason)
						return
					}
					back := udp(uplink, server, 53, "192.0.2.2", look(batch[j].Head).sport).packet()
					one := []Packet{back}
					w.Process(time.Hour, one)
					if one[0].Verdict == VerdictForward && look(one[0].Head).dst != src {
						t.Errorf("an answer to %s went to %+v", src, look(one[0].Head))
						return
					}
				}
			}
		})
	}
	others.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			w.Stats()
			w.PortStats(clientA)
			w.RuleStats()
			w.Tick(time.Hour)
			w.AppendSolicit(nil, uplink, ip("192.0.2.1"))
			if err := w.Learn(time.Hour, clientB, ip("10.2.0.9"), hostB); err != nil {
				t.Error(err)
			}
			if err := w.Configure(w.cfg); err != nil {
				t.Error(err)
			}
		}
	})
	receivers.Wait()
	close(stop)
	others.Wait()
	a, _ := w.PortStats(clientA)
	b, _ := w.PortStats(clientB)
	up, _ := w.PortStats(uplink)
	if n := a.Forwarded + b.Forwarded; n != 4*400*8 || up.Sent != n {
		t.Fatalf("%d packets forwarded, %d sent", n, up.Sent)
	}
	w.idle()
}

package pvnet

import (
	"encoding/binary"
	"fmt"
	"log/slog"
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/pvnet/ctrl"
	"barevif/pvnet/netif"
	"barevif/pvnet/toeplitz"
	"barevif/telemetry"
)

// tcp4 fills b, of at least 54 bytes, with a TCP segment over IPv4.
func tcp4(b []byte) {
	copy(b, []byte{2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 3, 4})
	binary.BigEndian.PutUint16(b[16:], uint16(len(b)-14))
	b[46] = 0x50
}

// A backend that hashes what it sends allocates nothing, and neither does its frontend, nor
// the choice of a queue.
func TestTheHashedPathAllocatesNothing(t *testing.T) {
	f := plain
	f.queues = 2
	p := join(t, emu.Config{}, f, Config{})
	for _, q := range p.conns[1].queues {
		q.tx.(*backTX).steer = &p.back.steer
	}
	p.back.steer.Store(&steering{table: toeplitz.NewTable([]byte{1, 2, 3}), flags: netif.HashFlagsAll, mapping: []uint32{1, 0, 1}})
	tx, _ := own(t, p.back)
	_, rx := own(t, p.front)
	var frames [32]Frame
	for _, size := range []int{64, 1500, 20000} {
		batch := 32
		if size > 4096 {
			batch = 8
		}
		hashed, queue := 0, 0
		cycle := func() {
			n := tx.AllocSize(frames[:batch], size)
			for i := range frames[:n] {
				tcp4(frames[i].Bytes())
				binary.BigEndian.PutUint16(frames[i].Bytes()[16:], uint16(size-14))
				queue |= p.back.QueueFor(frames[i].Bytes())
			}
			if k, err := tx.Send(frames[:n]); k != n || err != nil {
				t.Fatal(k, n, err)
			}
			for got := 0; got < n; {
				k, err := rx.Receive(frames[:])
				if err != nil {
					t.Fatal(err)
				}
				for i := range frames[:k] {
					if _, ok := frames[i].Hash(); ok {
						hashed++
					}
				}
				rx.Release(frames[:k])
				got += k
			}
		}
		cycle()
		if hashed != batch {
			t.Errorf("%d of %d frames have a hash", hashed, batch)
		}
		if n := testing.AllocsPerRun(50, cycle); n != 0 {
			t.Errorf("size %d: %v allocations for %d frames", size, n, batch)
		}
	}
}

// A GSO frame that is cut for a peer takes a slot more for the hash of each piece: the cut
// neither fails nor waits for ever for the slots that it has.
func TestCutFramesAreHashed(t *testing.T) {
	f := plain
	f.queues = 2
	p := join(t, emu.Config{}, f, Config{})
	for _, q := range p.conns[1].queues {
		q.tx.(*backTX).steer = &p.back.steer
	}
	p.back.steer.Store(&steering{table: toeplitz.NewTable([]byte{1, 2, 3}), flags: netif.HashFlagsAll})
	tx, _ := own(t, p.back)
	_, rx := own(t, p.front)
	const frames, size = 40, 15000
	sent := make(chan error, 1)
	go func() {
		for range frames {
			var g [1]Frame
			if _, err := tx.AllocWait(g[:], size); err != nil {
				sent <- err
				return
			}
			tcp4(g[0].Bytes())
			binary.BigEndian.PutUint16(g[0].Bytes()[16:], size-14)
			if err := g[0].SetGSO(GSO{Type: GSOTCPv4, Size: 1000}); err != nil {
				sent <- err
				return
			}
			if n := tx.spaceFor(&g[0]); n != (space{slots: 2, bufs: 1}) {
				sent <- fmt.Errorf("a piece waits for %+v", n)
				return
			}
			if _, err := tx.SendWait(g[:]); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	pieces := (size - 54 + 999) / 1000
	var in [32]Frame
	for got := 0; got < frames*pieces; {
		n, err := rx.Receive(in[:])
		if err != nil {
			t.Fatalf("%d of %d pieces: %v", got, frames*pieces, err)
		}
		for i := range in[:n] {
			if h, ok := in[i].Hash(); !ok || h.Type != HashIPv4TCP {
				t.Fatalf("a piece has %+v, %v", h, ok)
			}
		}
		rx.Release(in[:n])
		got += n
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
}

// FuzzHashServer lets a frontend send any messages and change its pages meanwhile. The
// settings stay within their limits, and senders find a queue of the connection.
func FuzzHashServer(f *testing.F) {
	for _, seed := range [][]byte{
		{7, 1, 0, 0, 3, 0, 40, 0, 2, 15, 0, 0, 5, 4, 0, 0, 6, 0, 4, 0},
		{7, 1, 0, 0, 5, 128, 0, 0, 6, 0, 128, 0, 6, 0, 1, 127, 6, 0, 1, 128, 11, 9, 9, 9, 6, 0, 4, 0},
		{1, 0, 0, 0, 2, 15, 0, 0, 3, 1, 41, 0, 4, 0, 0, 0, 8, 0, 0, 0},
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		m, err := emu.New(emu.Config{})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		guest, err := m.NewDomain(1)
		if err != nil {
			t.Fatal(err)
		}
		driver, err := m.NewDomain(2)
		if err != nil {
			t.Fatal(err)
		}
		pages, err := guest.Share(2, 2, hypercall.ReadOnly)
		if err != nil {
			t.Fatal(err)
		}
		defer pages.End()
		const queues = 3
		d := newDevice("0", telemetry.Backend, driver, Config{Queues: queues, Logger: slog.New(slog.DiscardHandler)})
		client := ctrl.NewClient(pages.Slice(1, 1))
		server, err := ctrl.Attach(pages.Slice(1, 1))
		if err != nil {
			t.Fatal(err)
		}
		h := new(hashServer)
		h.connect(d, queues)
		h.serve(server, driver, 1)
		frame := make([]byte, 60)
		tcp4(frame)
		for ; len(in) >= 4; in = in[4:] {
			word := func(b byte) uint32 { // bytes at the top stand for words at the top
				if b > 200 {
					return uint32(b) | 0xffffff00
				}
				return uint32(b)
			}
			typ, data := netif.CtrlType(in[0]%12), [3]uint32{word(in[1]), word(in[2]), word(in[3])}
			if typ == 11 { // not a message: the guest writes its page
				for i := range 512 {
					pages.Page(0)[i] = in[1+i%3]
				}
				continue
			}
			if typ == netif.CtrlSetHashKey || typ == netif.CtrlSetHashMapping {
				data[0] = uint32(pages.Refs[0]) + data[0]
			}
			client.Ask(typ, data)
			if _, _, err := server.Serve(); err != nil {
				t.Fatal(err)
			}
			r, ok, err := client.Answer()
			if !ok || err != nil || r.Status > netif.CtrlInvalidParameter {
				t.Fatalf("%+v, %v, %v", r, ok, err)
			}
			if len(h.set.mapping) > hashMappingMax || h.set.flags&^netif.HashFlagsAll != 0 || h.algorithm > netif.HashToeplitz {
				t.Fatalf("%+v after %v with %v", h.set, typ, data)
			}
			if s := d.steer.Load(); s != nil {
				for i := range s.mapping {
					if s.mapping[i] >= queues {
						t.Fatalf("entry %d is queue %d after %v with %v", i, s.mapping[i], typ, data)
					}
				}
				if q := s.queue(frame, len(frame), queues); q < 0 || q >= queues {
					t.Fatalf("queue %d", q)
				}
			}
		}
	})
}

package pvnet

import (
	"testing"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/telemetry"
	"barevif/xenbus"
)

// wantAccount asserts that of the sent frames, received frames were received and the
// others were lost with their connection, each counted once.
func wantAccount(t *testing.T, from, to *Device, sent, received uint64) {
	t.Helper()
	s, r := from.Stats().TX, to.Stats().RX
	gone := s.Lost(telemetry.DropDisconnected) + r.Lost(telemetry.DropDisconnected)
	if s.Get(telemetry.Packets) != sent || r.Get(telemetry.Packets) != received || gone != sent-received {
		t.Errorf("sent %d, received %d, gone %d + %d; want %d, %d", s.Get(telemetry.Packets), r.Get(telemetry.Packets),
			s.Lost(telemetry.DropDisconnected), r.Lost(telemetry.DropDisconnected), sent, received)
	}
	if n := telemetry.Unaccounted(&s, &r); n != 0 {
		t.Errorf("%d frames are in no account", n)
	}
	if n := r.Get(telemetry.Violations) + s.Get(telemetry.Violations); n != 0 {
		t.Errorf("%d violations", n)
	}
}

// sendSizes sends a frame of each size, without waiting for room.
func sendSizes(t *testing.T, tx *TX, sizes ...int) {
	t.Helper()
	for i, size := range sizes {
		var f [1]Frame
		if tx.AllocSize(f[:], size) != 1 {
			t.Fatalf("frame %d: no room", i)
		}
		b := make([]byte, size)
		pattern(b, i)
		f[0].CopyFrom(b)
		if _, err := tx.Send(f[:]); err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
	}
}

// receiveN receives and releases n frames.
func receiveN(t *testing.T, rx *RX, n int) {
	t.Helper()
	var f [1]Frame
	for i := range n {
		if _, err := rx.Receive(f[:]); err != nil {
			t.Fatalf("frame %d: %v", i, err)
		}
		rx.Release(f[:])
	}
}

func TestFramesLeftInTheRingsAreInOneAccount(t *testing.T) {
	for name, c := range map[string]struct {
		sizes    []int
		received int
		parsed   bool // the receiver has parsed one more frame
	}{
		"none was received":                 {sizes: []int{60, 60, 1500}},
		"some were":                         {sizes: []int{60, 60, 1500, 60, 4096}, received: 2},
		"all were":                          {sizes: []int{60, 1500}, received: 2},
		"of several slots":                  {sizes: []int{9000, 60, 65535, 5000, 40000, 60}, received: 1},
		"the next is parsed":                {sizes: []int{60, 9000, 60}, received: 1, parsed: true},
		"the next is parsed, of 17 slots":   {sizes: []int{60, 65535, 60}, received: 1, parsed: true},
		"the last is parsed":                {sizes: []int{60, 9000}, received: 1, parsed: true},
		"the ring is full":                  {sizes: minimal(256)},
		"the ring is full, some received":   {sizes: minimal(256), received: 100},
		"nothing was sent":                  {},
		"the ring is full, the next parsed": {sizes: append([]int{9000}, minimal(253)...), parsed: true},
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, p *pair, from, to *Device) {
				tx, _ := own(t, from)
				totx, rx := own(t, to)
				sendSizes(t, tx, c.sizes...)
				receiveN(t, rx, c.received)
				if c.parsed {
					var small [1]Frame
					totx.AllocSize(small[:], 14)
					if _, err := rx.ReceiveInto(small[:]); err != ErrShortFrame {
						t.Fatal(err)
					}
					small[0].Release()
				}
				p.disconnect()
				wantAccount(t, from, to, uint64(len(c.sizes)), uint64(c.received))
			})
		})
	}
}

func minimal(n int) []int {
	s := make([]int, n)
	for i := range s {
		s[i] = MinFrame
	}
	return s
}

// Frames that the user holds when the connection ends count as received.
func TestFramesInTheUsersHandsAreReceived(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		sendSizes(t, tx, 60, 9000, 60)
		var f [2]Frame
		n, err := rx.Receive(f[:])
		if err != nil {
			t.Fatal(err)
		}
		p.disconnect()
		wantAccount(t, from, to, 3, uint64(n))
		rx.Release(f[:n])
	})
}

// An extra info takes a slot, but does not count as a frame.
func TestFramesWithExtrasAreInOneAccount(t *testing.T) {
	f := plain
	f.offload, f.peerTakes = true, takesCsum4|takesGSO4
	s := stream{payload: 9000, size: 1448}
	for name, from := range map[string]func(p *pair) (from, to *Device){
		"front to back": func(p *pair) (*Device, *Device) { return p.front, p.back },
		"back to front": func(p *pair) (*Device, *Device) { return p.back, p.front },
	} {
		t.Run(name, func(t *testing.T) {
			p := join(t, emu.Config{}, f, Config{Offload: true})
			from, to := from(p)
			tx, _ := own(t, from)
			_, rx := own(t, to)
			long := func() Frame {
				b, g := s.frame(), [1]Frame{}
				if tx.AllocSize(g[:], len(b)) != 1 {
					t.Fatal("no room")
				}
				g[0].CopyFrom(b)
				if err := g[0].SetGSO(s.gso()); err != nil {
					t.Fatal(err)
				}
				return g[0]
			}
			for range 3 {
				if _, err := tx.Send([]Frame{long()}); err != nil {
					t.Fatal(err)
				}
			}
			receiveN(t, rx, 1)
			p.disconnect()
			wantAccount(t, from, to, 3, 1)
		})
	}
}

// A failed copy to the frontend loses one frame, although both ends know of it.
func TestAFailedCopyIsLostOnce(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.back)
	_, rx := own(t, p.front)
	p.back.tx[0].eng.(*backTX).dom = failing{p.bdom}
	sendSizes(t, tx, 60, 9000)
	p.back.tx[0].eng.(*backTX).dom = p.bdom
	sendSizes(t, tx, 60)
	receiveN(t, rx, 1)
	p.disconnect()
	s, r := p.back.Stats().TX, p.front.Stats().RX
	if s.Get(telemetry.Packets) != 3 || s.Lost(telemetry.DropBadGref) != 2 || r.Lost(telemetry.DropBackendError) != 2 || r.Get(telemetry.Packets) != 1 {
		t.Errorf("sent %d, %d of them not copied; received %d, %d errors", s.Get(telemetry.Packets),
			s.Lost(telemetry.DropBadGref), r.Get(telemetry.Packets), r.Lost(telemetry.DropBackendError))
	}
	if n := telemetry.Unaccounted(&s, &r); n != 0 {
		t.Errorf("%d frames are in no account", n)
	}
	if n := s.Get(telemetry.CopiedBytes); n != 60 {
		t.Errorf("%d bytes copied", n)
	}
}

// failing is a domain in which every grant copy fails.
type failing struct{ hypercall.Domain }

func (f failing) Copy(ops []hypercall.CopyOp) error {
	for i := range ops {
		ops[i].Status = hypercall.BadGntref
	}
	return nil
}

// A backend that adopts live rings receives the requests that its predecessor did not
// answer. No frame is lost.
func TestABackendThatFollowsTakesWhatTheOtherLeft(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, frx := own(t, p.front)
	btx, rx := own(t, p.back)
	sendSizes(t, tx, 60, 9000, 60)
	sendSizes(t, btx, 60, 9000)
	receiveN(t, rx, 1)
	var small [1]Frame
	btx.AllocSize(small[:], 14)
	if _, err := rx.ReceiveInto(small[:]); err != ErrShortFrame {
		t.Fatal(err)
	}
	small[0].Release()
	p.back.quiesce(p.conns[1], "handed over")
	p.back.detach(p.conns[1])

	c := new(conn)
	m := &setup{dom: p.bdom, peer: 1, log: p.back.log, quarantined: &p.back.quarantined, limiter: &p.back.limiter, groups: &p.back.groups, c: c}
	q, err := m.makeQueue(plain, p.conns[0].queues[0].keys, &p.back.cfg, p.back.rx[0].count, p.back.tx[0].count)
	if err == nil {
		err = m.bindQueue(&q)
	}
	if err != nil {
		t.Fatal(err)
	}
	c.queues = append(c.queues, q)
	p.conns[1] = c
	p.back.bringUp(c, 1, xenbus.Connected)
	receiveN(t, rx, 2)
	receiveN(t, frx, 2)
	p.disconnect()
	wantAccount(t, p.front, p.back, 3, 3)
	wantAccount(t, p.back, p.front, 2, 2)
}

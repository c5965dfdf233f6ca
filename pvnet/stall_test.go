package pvnet

import (
	"testing"
	"testing/synctest"
	"time"

	"barevif/telemetry"
)

// A stalled is a sender that has more to send than its peer takes.
type stalled struct {
	t    *testing.T
	p    *pair
	l    *lifecycle
	dev  *Device // the sender's
	rx   *RX     // its peer's
	tx   *TX
	sent chan error
}

func newStalled(t *testing.T, p *pair, from, to *Device) *stalled {
	s := &stalled{t: t, p: p, dev: from, sent: make(chan error, 1)}
	c := p.conns[0]
	if from == p.back {
		c = p.conns[1]
	}
	s.l = &lifecycle{d: from, conn: c, running: true}
	s.tx, _ = own(t, from)
	_, s.rx = own(t, to)
	s.tx.SetDeadline(time.Time{})
	return s
}

// fill sends until only free slots of the ring are left.
func (s *stalled) fill(free int) {
	for s.room() > uint32(free) {
		put(s.t, s.tx, 1, 60)
	}
}

func (s *stalled) room() uint32 {
	switch e := s.tx.eng.(type) {
	case *frontTX:
		return e.ring.Free()
	case *backTX:
		n, err := e.ring.Reload()
		if err != nil {
			s.t.Fatal(err)
		}
		return n
	}
	panic("another engine")
}

// wait starts a call that waits until a frame of size bytes is sent.
func (s *stalled) wait(size int) {
	go func() {
		var f [1]Frame
		_, err := s.tx.AllocWait(f[:], size)
		if err == nil {
			_, err = s.tx.SendWait(f[:])
		}
		s.sent <- err
	}()
	synctest.Wait()
}

// tick lets a second pass and asserts how many stalls have begun and ended by now, in the
// counters and in the events.
func (s *stalled) tick(begun, ended int) {
	s.t.Helper()
	time.Sleep(time.Second)
	s.l.tick()
	synctest.Wait()
	st := s.dev.Stats()
	if n := st.TX.Get(telemetry.Stalls); n != uint64(begun) {
		s.t.Fatalf("%d stalls counted, want %d", n, begun)
	}
	var b, e int
	for _, ev := range s.dev.counters.Events() {
		switch ev.Kind {
		case telemetry.EventStall:
			b++
		case telemetry.EventStallOver:
			e++
		}
	}
	if b != begun || e != ended {
		s.t.Fatalf("%d stalls and %d ends recorded, want %d and %d", b, e, begun, ended)
	}
}

func (s *stalled) last() telemetry.Event {
	ev := s.dev.counters.Events()
	return ev[len(ev)-1]
}

// both runs test with each end as the sender.
func both(t *testing.T, f features, test func(t *testing.T, s *stalled)) {
	t.Run("front to back", func(t *testing.T) {
		virtually(t, f, Config{}, func(t *testing.T, p *pair) { test(t, newStalled(t, p, p.front, p.back)) })
	})
	t.Run("back to front", func(t *testing.T) {
		virtually(t, f, Config{}, func(t *testing.T, p *pair) { test(t, newStalled(t, p, p.back, p.front)) })
	})
}

func TestAStallIsCountedOnceAndItsEndSeen(t *testing.T) {
	for _, f := range []features{plain, {queues: 1, frontSG: true, backSG: true}} {
		both(t, f, func(t *testing.T, s *stalled) {
			s.tick(0, 0)
			s.fill(0)
			s.tick(0, 0) // the ring is full, but no call waits for room
			s.tick(0, 0)
			for n := 1; n <= 3; n++ {
				s.wait(60)
				s.tick(n-1, n-1)
				for range 5 { // a stall is seen within two seconds, and counted once
					s.tick(n, n-1)
				}
				if e := s.last(); e.Queue != 0 || e.A != 1 || time.Duration(e.B) != time.Second {
					t.Errorf("recorded %+v", e)
				}
				take(t, s.rx, 256)
				if err := <-s.sent; err != nil {
					t.Fatal(err)
				}
				s.tick(n, n)
				if e := s.last(); e.Queue != 0 || e.A != 0 || time.Duration(e.B) != 6*time.Second {
					t.Errorf("recorded %+v", e)
				}
				s.fill(0)
				s.tick(n, n)
				s.tick(n, n)
			}
		})
	}
}

// XSA-392: one slot was free, the packet needed two, and no stall was noticed.
func TestAStallIsFewerSlotsThanTheFrameNeeds(t *testing.T) {
	both(t, plain, func(t *testing.T, s *stalled) {
		var f [1]Frame // in the backend's pages; a frontend has to copy it
		if _, err := s.p.back.tx[0].AllocWait(f[:], 5000); err != nil {
			t.Fatal(err)
		}
		if n := s.tx.eng.spaceFor(&f[0]).slots; n != 2 {
			t.Fatalf("it takes %d slots", n)
		}
		s.fill(1)
		go func() {
			_, err := s.tx.SendWait(f[:])
			s.sent <- err
		}()
		synctest.Wait()
		s.tick(0, 0)
		s.tick(1, 0)
		s.tick(1, 0)
		if e := s.last(); e.A != 1 {
			t.Errorf("short of %d slots", e.A)
		}
		take(t, s.rx, 254)
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		s.tick(1, 1)
	})
}

// A caller that keeps calling without waiting has stalled, too; one that has given up has
// not.
func TestAStallOfACallerThatKeepsTrying(t *testing.T) {
	both(t, plain, func(t *testing.T, s *stalled) {
		s.fill(0)
		try := func() {
			t.Helper()
			var f [1]Frame
			if s.tx.AllocSize(f[:], 60) == 1 {
				if _, err := s.tx.Send(f[:]); err != ErrFull {
					t.Fatal(err)
				}
				f[0].Release()
			}
		}
		try()
		s.tick(0, 0)
		s.tick(0, 0) // the caller gave up
		try()
		s.tick(0, 0)
		try()
		s.tick(1, 0)
		for range 3 {
			try()
			s.tick(1, 0)
		}
		take(t, s.rx, 256)
		s.fill(0)
		s.tick(1, 1)
	})
}

// A slow peer has not stalled.
func TestASlowPeerHasNotStalled(t *testing.T) {
	both(t, plain, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.wait(40000)
		for range 4 {
			take(t, s.rx, 1) // one slot, of about ten
			s.tick(0, 0)
		}
		s.tick(1, 0)
		take(t, s.rx, 1)
		s.tick(1, 1) // the index moved, though not far enough
		s.tick(2, 1)
		if e := s.last(); e.A != 5 {
			t.Errorf("short of %d slots", e.A)
		}
		take(t, s.rx, 250)
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		s.tick(2, 2)
	})
}

// A scriptedProgress is a sender that implements only the method progress.
type scriptedProgress struct {
	sender
	index, goal, tries uint32
}

func (s *scriptedProgress) peerProgress() (index, goal, tries uint32) {
	return s.index, s.goal, s.tries
}

// No stall: indices wrap, a goal behind the index needs no wait, and two ticks right
// after each other are less than a second apart.
func TestWhatIsNoStall(t *testing.T) {
	for _, c := range []struct {
		goal   uint32 // ahead of the index
		pause  time.Duration
		stalls int
	}{
		{1, time.Second, 1}, {256, time.Second, 1}, {1, stallAfter, 1},
		{0, time.Second, 0}, {^uint32(0), time.Second, 0}, {1, stallAfter - 1, 0}, {1, 0, 0},
	} {
		for _, index := range []uint32{0, 100, ^uint32(0), 1 << 31} {
			d := newDevice("0", telemetry.Frontend, nil, Config{})
			tx, now := d.tx[0], time.Now()
			eng := &scriptedProgress{index: index, goal: index + c.goal}
			for range 3 {
				eng.tries++
				tx.checkStall(eng, now)
			}
			now = now.Add(c.pause)
			eng.tries++
			tx.checkStall(eng, now)
			if n := len(d.counters.Events()); n != c.stalls {
				t.Errorf("goal %d ahead of %#x for %v: %d stalls", int32(c.goal), index, c.pause, n)
			}
		}
	}
}

// A stall does not outlive its connection.
func TestANewConnectionBeginsWithoutAStall(t *testing.T) {
	both(t, plain, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.wait(60)
		s.tick(0, 0)
		s.tick(1, 0)
		for i, d := range []*Device{s.p.front, s.p.back} {
			d.quiesce(s.p.conns[i], "again")
		}
		for i, d := range []*Device{s.p.back, s.p.front} {
			d.detach(s.p.conns[1-i])
		}
		s.p.connect(t, plain)
		s.l.conn = s.p.conns[0]
		if s.dev == s.p.back {
			s.l.conn = s.p.conns[1]
		}
		if err := <-s.sent; err != nil && err != ErrStale { // its page was freed with the connection
			t.Fatal(err)
		}
		s.tick(1, 0)
		s.fill(0)
		s.wait(60)
		s.tick(1, 0)
		s.tick(2, 0)
		take(t, s.rx, 1)
		s.tick(2, 1)
	})
}

package pvnet

import (
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/telemetry"
)

// virtually runs test with a pair on virtual time, which passes only while every
// goroutine waits. So each delay is exactly what the test makes it.
func virtually(t *testing.T, f features, cfg Config, test func(t *testing.T, p *pair)) {
	synctest.Test(t, func(t *testing.T) { test(t, join(t, emu.Config{}, f, cfg)) })
}

// delays are at the edges of the histogram's buckets, and within them.
var delays = []time.Duration{
	0, 100, 1024, 1025, 3000, 1 << 15, 1<<15 + 1, 400 * time.Microsecond, 3 * time.Millisecond, 1 << 22, 1<<22 + 1, 3 * time.Second,
}

// latencies returns the samples, buckets and sum of request_latency.
func latencies(v *telemetry.Values) (samples uint64, buckets []uint64, sum time.Duration) {
	for _, f := range telemetry.Fields() {
		if f.Name == "request_latency" {
			b, s := v.Histogram(f)
			for _, n := range b {
				samples += n
			}
			return samples, b, time.Duration(s)
		}
	}
	panic("no field request_latency")
}

// want asserts that request_latency holds exactly one sample of each of delays.
func want(t *testing.T, v *telemetry.Values, delays ...time.Duration) {
	t.Helper()
	set := telemetry.NewSet(1)
	var sum time.Duration
	for _, d := range delays {
		set.RX(0).Observe(telemetry.RequestLatency, uint64(d))
		sum += d
	}
	set.RX(0).Flush()
	st := set.Snapshot()
	_, should, _ := latencies(&st.RX)
	if _, have, total := latencies(v); !slices.Equal(have, should) || total != sum {
		t.Errorf("latencies of %v: %v in all %v, want %v", delays, have, total, should)
	}
}

// put sends n frames of size bytes without waiting.
func put(t *testing.T, tx *TX, n, size int) {
	t.Helper()
	var f [1]Frame
	for range n {
		if tx.AllocSize(f[:], size) != 1 {
			t.Fatal("no buffer")
		}
		if _, err := tx.Send(f[:]); err != nil {
			t.Fatal(err)
		}
	}
}

// take receives n frames.
func take(t *testing.T, rx *RX, n int) {
	t.Helper()
	var f [32]Frame
	for n > 0 {
		k, err := rx.Receive(f[:min(n, len(f))])
		if err != nil {
			t.Fatal(err)
		}
		rx.Release(f[:k])
		n -= k
	}
}

// The peer answers after a while, and the owner looks for the response meanwhile.
func TestRequestLatencyIsWhatThePeerTook(t *testing.T) {
	for _, d := range delays {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			tx.eng.sample()
			put(t, tx, 1, 60)
			step := d / 20
			for range 20 {
				time.Sleep(step)
				put(t, tx, 1, 60) // each send is a look
			}
			time.Sleep(d - 20*step)
			take(t, rx, 21)
			put(t, tx, 1, 60)
			st := p.front.Stats()
			want(t, &st.TX, d)
			put(t, tx, 5, 60) // no further sample was asked for
			take(t, rx, 6)
			st = p.front.Stats()
			want(t, &st.TX, d)
		})
	}
}

// A sender that waits for room sees the response as soon as it comes.
func TestRequestLatencyOfASenderThatWaits(t *testing.T) {
	for _, d := range delays {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			tx.eng.sample()
			put(t, tx, 256, 60)
			sent := make(chan error, 1)
			go func() {
				var f [1]Frame
				_, err := tx.AllocWait(f[:], 60)
				f[0].Release()
				sent <- err
			}()
			time.Sleep(d)
			take(t, rx, 256)
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			st := p.front.Stats() // the request of the first frame was timed
			want(t, &st.TX, d)
		})
	}
}

// Time that the owner spends elsewhere does not count as the peer's.
func TestRequestLatencyIsNotIdleness(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		tx.eng.sample()
		put(t, tx, 1, 60)
		take(t, rx, 1)
		time.Sleep(time.Second)
		put(t, tx, 1, 60)
		st := p.front.Stats()
		want(t, &st.TX)

		// Nor does it after a wait that ended before the response came.
		put(t, tx, 254, 60)
		take(t, rx, 200)
		tx.eng.sample()
		put(t, tx, 201, 60)
		tx.SetDeadline(time.Now().Add(time.Millisecond))
		var f [1]Frame
		if _, err := tx.AllocWait(f[:], 60); !errors.Is(err, errTimeout) {
			t.Fatal(err)
		}
		take(t, rx, 256)
		time.Sleep(time.Minute)
		put(t, tx, 1, 60)
		st = p.front.Stats()
		want(t, &st.TX)

		// The next sample counts.
		tx.eng.sample()
		put(t, tx, 1, 60)
		time.Sleep(time.Millisecond)
		put(t, tx, 1, 60)
		take(t, rx, 2)
		put(t, tx, 1, 60)
		st = p.front.Stats()
		want(t, &st.TX, time.Millisecond)
	})
}

// A slowDomain takes some time for each batch of copies.
type slowDomain struct {
	hypercall.Domain
	d time.Duration
}

func (s *slowDomain) Copy(ops []hypercall.CopyOp) error {
	time.Sleep(s.d)
	return s.Domain.Copy(ops)
}

// A backend's request latency is its own time: how long it holds the requests of a batch.
func TestRequestLatencyOfABackendIsItsOwn(t *testing.T) {
	for _, d := range delays {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			ftx, frx := own(t, p.front)
			btx, brx := own(t, p.back)
			slow := &slowDomain{p.bdom, d}
			btx.eng.(*backTX).dom, brx.eng.(*backRX).dom = slow, slow
			p.back.tx[0].eng.sample()
			p.back.rx[0].eng.sample()
			time.Sleep(time.Second) // no request has come yet
			if n, err := brx.Poll(make([]Frame, 1)); n != 0 || err != nil {
				t.Fatal(n, err)
			}
			put(t, ftx, 32, 60)
			take(t, brx, 32)
			put(t, btx, 32, 60)
			take(t, frx, 32)
			st := p.back.Stats()
			want(t, &st.RX, d)
			want(t, &st.TX, d)
			st = p.front.Stats()
			want(t, &st.RX) // a sample would show how long nobody sent
		})
	}
}

type nowhere struct{}

func (nowhere) Open(telemetry.Info) (telemetry.Mirror, error) {
	return nil, errors.New("nowhere to mirror")
}

// The tick of an idle device ends no wait, whether the counters are mirrored or not.
func TestTheTickWakesNoOwner(t *testing.T) {
	for _, mirrored := range []bool{false, true} {
		cfg := Config{}
		if mirrored {
			cfg.Counters = nowhere{}
		}
		virtually(t, plain, cfg, func(t *testing.T, p *pair) {
			_, rx := own(t, p.back)
			rx.SetDeadline(time.Time{})
			got := make(chan error, 1)
			go func() {
				_, err := rx.Receive(make([]Frame, 1))
				got <- err
			}()
			synctest.Wait()
			parks := rx.waitSeq.Load()
			l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
			for range 10 {
				time.Sleep(time.Second)
				l.tick()
				synctest.Wait()
			}
			if n := rx.waitSeq.Load() - parks; n != 0 {
				t.Errorf("mirrored %v: the tick ended %d waits", mirrored, n/2)
			}
			rx.interrupt()
			<-got
		})
	}
}

// The rule that makes timing cheap: without a tick nothing is timed, and each half times
// one request per tick.
func TestAMillionFramesAreNotTimed(t *testing.T) {
	const frames, batch, ticks = 1_000_000, 32, 5
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	var f [batch]Frame
	for i := range frames / batch {
		if i%(frames/batch/ticks) == 1000 {
			tx.eng.sample()
			rx.eng.sample()
		}
		n := tx.AllocSize(f[:], 60)
		if k, err := tx.Send(f[:n]); k != batch || err != nil {
			t.Fatal(k, err)
		}
		if k, err := rx.Receive(f[:]); k != batch || err != nil {
			t.Fatal(k, err)
		}
		rx.Release(f[:])
	}
	sent, received := p.front.Stats(), p.back.Stats()
	for _, v := range []*telemetry.Values{&sent.TX, &received.RX} {
		if n := v.Get(telemetry.Packets); n != frames {
			t.Fatalf("%d frames", n)
		}
		if n := v.Get(telemetry.Parks); n > 1 {
			t.Fatalf("%d parks", n)
		}
	}
	// Here the sender looks only after each batch is answered, so its samples do not
	// count; the backend's always do.
	if n, _, _ := latencies(&sent.TX); n > ticks {
		t.Errorf("%d requests timed of %d asked for", n, ticks)
	}
	if n, _, _ := latencies(&received.RX); n != ticks {
		t.Errorf("%d batches timed of %d asked for", n, ticks)
	}
}

// A sample reads the clock a few times, not at every look.
func TestASampleReadsTheClockAFewTimes(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		set := telemetry.NewSet(1)
		var w stopwatch
		w.sample()
		if !w.begin() || w.begin() {
			t.Fatal("one sample at a time")
		}
		reads := 0
		for last, i := w.missed, 0; i < 1<<20; i++ {
			time.Sleep(time.Nanosecond)
			w.look(set.TX(0), false)
			if w.missed != last {
				last = w.missed
				reads++
			}
		}
		if reads != 21 { // 2^0 to 2^20
			t.Errorf("%d reads", reads)
		}
		w.look(set.TX(0), true)
		set.TX(0).Flush()
		st := set.Snapshot()
		want(t, &st.TX, 1<<20)
	})
}

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

// beat lets a second pass and asserts how many stalls have begun and ended by now, in the
// counters and in the events.
func (s *stalled) beat(begun, ended int) {
	s.t.Helper()
	time.Sleep(time.Second)
	s.l.tick()
	synctest.Wait()
	st := s.dev.Stats()
	if n := st.TX.Get(telemetry.Stalls); n != uint64(begun) {
		s.t.Fatalf("%d stalls counted, want %d", n, begun)
	}
	var b, e int
	for _, ev := range s.dev.set.Events() {
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
	ev := s.dev.set.Events()
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
			s.beat(0, 0)
			s.fill(0)
			s.beat(0, 0) // the ring is full, but no call waits for room
			s.beat(0, 0)
			for n := 1; n <= 3; n++ {
				s.wait(60)
				s.beat(n-1, n-1)
				for range 5 { // a stall is seen within two seconds, and counted once
					s.beat(n, n-1)
				}
				if e := s.last(); e.Queue != 0 || e.A != 1 || time.Duration(e.B) != time.Second {
					t.Errorf("recorded %+v", e)
				}
				take(t, s.rx, 256)
				if err := <-s.sent; err != nil {
					t.Fatal(err)
				}
				s.beat(n, n)
				if e := s.last(); e.Queue != 0 || e.A != 0 || time.Duration(e.B) != 6*time.Second {
					t.Errorf("recorded %+v", e)
				}
				s.fill(0)
				s.beat(n, n)
				s.beat(n, n)
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
		s.beat(0, 0)
		s.beat(1, 0)
		s.beat(1, 0)
		if e := s.last(); e.A != 1 {
			t.Errorf("short of %d slots", e.A)
		}
		take(t, s.rx, 254)
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		s.beat(1, 1)
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
		s.beat(0, 0)
		s.beat(0, 0) // the caller gave up
		try()
		s.beat(0, 0)
		try()
		s.beat(1, 0)
		for range 3 {
			try()
			s.beat(1, 0)
		}
		take(t, s.rx, 256)
		s.fill(0)
		s.beat(1, 1)
	})
}

// A slow peer has not stalled.
func TestASlowPeerHasNotStalled(t *testing.T) {
	both(t, plain, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.wait(40000)
		for range 4 {
			take(t, s.rx, 1) // one slot, of about ten
			s.beat(0, 0)
		}
		s.beat(1, 0)
		take(t, s.rx, 1)
		s.beat(1, 1) // the index moved, though not far enough
		s.beat(2, 1)
		if e := s.last(); e.A != 5 {
			t.Errorf("short of %d slots", e.A)
		}
		take(t, s.rx, 250)
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		s.beat(2, 2)
	})
}

// A scriptedProgress is a sender that implements only the method progress.
type scriptedProgress struct {
	sender
	index, goal, tries uint32
}

func (s *scriptedProgress) progress() (index, goal, tries uint32) { return s.index, s.goal, s.tries }

// No stall: indices wrap, a goal behind the index needs no wait, and two beats right
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
			if n := len(d.set.Events()); n != c.stalls {
				t.Errorf("goal %d ahead of %#x for %v: %d stalls", int32(c.goal), index, c.pause, n)
			}
		}
	}
}

// If the tick asks for something just before the owner waits, the owner does it before it
// waits.
func TestWhatIsDueDoesNotWaitForAnEvent(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		_, rx := own(t, p.back)
		rx.SetDeadline(time.Time{})
		got := make(chan error, 1)
		receive := func() {
			_, err := rx.Receive(make([]Frame, 1))
			got <- err
		}
		go receive() // consumes the event of the bind
		synctest.Wait()
		rx.interrupt()
		<-got
		rx.ending.Store(false)
		rx.park.Load().wait(rx.dir, time.Now()) // consumes the wake of the interrupt
		rx.requests.Or(requestStall)
		go receive()
		synctest.Wait()
		st := p.back.Stats()
		if n := st.RX.Get(telemetry.Stalls); n != 1 {
			t.Errorf("%d", n)
		}
		rx.interrupt()
		<-got
	})
}

// A stall does not outlive its connection.
func TestANewConnectionBeginsWithoutAStall(t *testing.T) {
	both(t, plain, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.wait(60)
		s.beat(0, 0)
		s.beat(1, 0)
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
		s.beat(1, 0)
		s.fill(0)
		s.wait(60)
		s.beat(1, 0)
		s.beat(2, 0)
		take(t, s.rx, 1)
		s.beat(2, 1)
	})
}

// With one channel for both directions an event counts once, and as spurious only if
// neither half had work.
func TestEventsAreCountedAndThoseForNothing(t *testing.T) {
	for _, f := range []features{plain, {queues: 1, frontSG: true, backSG: true}} {
		virtually(t, f, Config{}, func(t *testing.T, p *pair) {
			ftx, _ := own(t, p.front)
			btx, brx := own(t, p.back)
			events := func() (all, spurious uint64) {
				st := p.back.Stats()
				for _, v := range []*telemetry.Values{&st.RX, &st.TX} {
					all += v.Get(telemetry.Events)
					spurious += v.Get(telemetry.EventsSpurious)
				}
				return all, spurious
			}
			ends := make(chan error, 2)
			received := make(chan bool)
			brx.SetDeadline(time.Time{})
			btx.SetDeadline(time.Time{})
			go func() {
				var f [1]Frame
				for {
					n, err := brx.Receive(f[:])
					if err != nil {
						ends <- err
						return
					}
					brx.Release(f[:n])
					received <- true
				}
			}()
			// The sender waits, too: for room.
			put(t, btx, 256, 60)
			go func() {
				var f [1]Frame
				btx.AllocSize(f[:], 60)
				_, err := btx.SendWait(f[:])
				f[0].Release()
				ends <- err
			}()
			synctest.Wait()
			time.Sleep(2 * time.Second)
			synctest.Wait()
			all, spurious := events()
			for range 10 { // with work
				put(t, ftx, 1, 60)
				<-received
				synctest.Wait()
			}
			if a, s := events(); a-all != 10 || s-spurious > 1 { // an earlier event may only now turn out to be spurious
				t.Errorf("split %v: 10 events with work count as %d, %d of them for nothing", f.split, a-all, s-spurious)
			}
			all, spurious = events()
			for range 10 {
				p.front.tx[0].eng.(*frontTX).port.Notify()
				time.Sleep(2 * time.Second) // longer than the waiter holds events back
				synctest.Wait()
			}
			if a, s := events(); a-all != 10 || s-spurious != 10 {
				t.Errorf("split %v: 10 events for nothing count as %d, %d of them for nothing", f.split, a-all, s-spurious)
			}
			all, spurious = events()
			for range 10 { // wakes are no events
				brx.park.Load().wake()
				synctest.Wait()
			}
			if a, s := events(); a != all || s != spurious {
				t.Errorf("split %v: 10 wakes count as %d events, %d for nothing", f.split, a-all, s-spurious)
			}
			brx.interrupt()
			<-ends
			btx.SetDeadline(time.Unix(1, 0))
			<-ends
		})
	}
}

func TestFullPollsAreCounted(t *testing.T) {
	each(t, func(t *testing.T, p *pair, from, to *Device) {
		tx, _ := own(t, from)
		_, rx := own(t, to)
		put(t, tx, 70, 60)
		var f [32]Frame
		for _, want := range []struct {
			n    int
			full uint64
		}{{32, 1}, {32, 2}, {6, 2}} {
			n, err := rx.Receive(f[:])
			if n != want.n || err != nil {
				t.Fatal(n, err)
			}
			rx.Release(f[:n])
			st := to.Stats()
			if got := st.RX.Get(telemetry.PollsFull); got != want.full {
				t.Errorf("after %d frames: %d full polls, want %d", want.n, got, want.full)
			}
		}
		st := to.Stats()
		if n := st.RX.Get(telemetry.Polls); n != 3 {
			t.Errorf("%d polls", n)
		}
	})
}

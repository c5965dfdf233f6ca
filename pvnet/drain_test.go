package pvnet

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall/emu"
	"barevif/telemetry"
	"barevif/xenbus"
)

// linux are the times of a frontend that notifies.
var linux = new(ServeConfig).timeouts(true)

// draining runs test with a backend that sends to a frontend, with the times t.
func draining(t *testing.T, times timeouts, test func(t *testing.T, s *stalled)) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		s := newStalled(t, p, p.back, p.front)
		s.tx.drain.reset(times)
		test(t, s)
	})
}

// pass lets n seconds pass, with a slow tick in each.
func (s *stalled) pass(n int) {
	for range n {
		time.Sleep(time.Second)
		s.l.tick()
		synctest.Wait()
	}
}

// ended reports whether the call that waited has returned, without an error.
func (s *stalled) ended() bool {
	s.t.Helper()
	select {
	case err := <-s.sent:
		if err != nil {
			s.t.Fatal(err)
		}
		return true
	default:
		return false
	}
}

// lost asserts how many frames were dropped for the guest, and that no others were.
func (s *stalled) lost(n uint64) {
	s.t.Helper()
	st := s.dev.Stats()
	if k, all := st.TX.Lost(telemetry.DropGuestStalled), st.TX.Dropped()+st.TX.Errors(); k != n || all != n {
		s.t.Fatalf("%d frames dropped for the guest, %d in all, want %d", k, all, n)
	}
}

func TestFramesForAGuestThatTakesNoneAreDropped(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.pass(30) // nothing waits, so nothing is dropped
		s.lost(0)
		tap := tapOf(t, s.dev, TapConfig{})
		start := time.Now()
		s.wait(60)
		s.pass(9)
		s.lost(0)
		s.pass(3)
		if took := time.Since(start); !s.ended() {
			t.Fatalf("it waits %v", took)
		}
		s.lost(1)
		if got := seen(tap); len(got) != 1 || got[0].Dropped != telemetry.DropGuestStalled || got[0].Dir != telemetry.TX || len(got[0].Data) != 60 {
			t.Errorf("a tap sees %+v", got)
		}
		tap.Close()

		// The guest has stopped: later calls do not wait, whatever they have to send.
		before := time.Now()
		for range 100 {
			s.wait(60)
			if !s.ended() {
				t.Fatal("a call waits for a guest that has stopped")
			}
		}
		if n, err := s.dev.Write(make([]byte, 60)); n != 0 || err != ErrOwned {
			t.Fatal(n, err)
		}
		s.lost(101)
		if took := time.Since(before); took != 0 {
			t.Errorf("drops took %v", took)
		}

		// It takes frames again: they pass at once, and calls wait again, also before the
		// next tick.
		take(t, s.rx, 10)
		for range 10 {
			s.wait(60)
			if !s.ended() {
				t.Fatal("a frame waits although there is room")
			}
		}
		s.wait(60)
		if s.ended() {
			t.Error("dropped, although the guest has only just taken frames")
		}
		s.lost(101)
		take(t, s.rx, 1)
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		s.pass(1)
		s.lost(101)
	})
}

// A guest that takes one frame now and then has not stopped, but what waits for longer than
// the drain time is dropped all the same.
func TestFramesForASlowGuestAreDroppedWhenTheyAreOld(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		s.fill(0)
		for range 3 {
			was := s.dev.Stats()
			var frames [20]Frame
			if n, err := s.tx.AllocWait(frames[:], 60); n != len(frames) || err != nil {
				t.Fatal(n, err)
			}
			start := time.Now()
			go func() {
				n, err := s.tx.SendWait(frames[:])
				if n != len(frames) {
					t.Errorf("took %d frames", n)
				}
				s.sent <- err
			}()
			synctest.Wait()
			for range 3 {
				s.pass(3)
				take(t, s.rx, 1)
				synctest.Wait()
			}
			if s.ended() {
				t.Fatal("dropped after 9 s")
			}
			s.pass(3)
			if !s.ended() {
				t.Fatalf("it waits %v", time.Since(start))
			}
			st := s.dev.Stats()
			if sent, lost := st.TX.Get(telemetry.Packets)-was.TX.Get(telemetry.Packets), st.TX.Dropped()-was.TX.Dropped(); sent != 3 || lost != 17 {
				t.Errorf("%d sent, %d dropped, want 3 and 17", sent, lost)
			}
		}
	})
}

// Without feature-rx-notify frames wait 30 ms, and the ring is looked at meanwhile.
func TestAGuestThatNotifiesNothingGets30Milliseconds(t *testing.T) {
	draining(t, new(ServeConfig).timeouts(false), func(t *testing.T, s *stalled) {
		s.fill(0)
		lift := s.p.fdom.Fail(emu.Fault{Op: emu.OpNotify, Times: -1, Event: emu.EventLost})
		for _, posted := range []time.Duration{0, time.Millisecond, 14 * time.Millisecond, 29 * time.Millisecond} {
			start := time.Now()
			s.wait(60)
			time.Sleep(posted)
			take(t, s.rx, 1)
			if err := <-s.sent; err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took > posted+longestLook || took > 30*time.Millisecond {
				t.Errorf("a page posted after %v was seen after %v", posted, took)
			}
		}
		lift()
		s.lost(0)
		start := time.Now()
		s.wait(60)
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 30*time.Millisecond {
			t.Errorf("dropped after %v", took)
		}
		s.lost(1)

		// A deadline that is sooner ends the call, and the caller keeps its frame.
		s.tx.SetDeadline(time.Now().Add(10 * time.Millisecond))
		start = time.Now()
		var f [1]Frame
		s.tx.AllocSize(f[:], 60)
		if n, err := s.tx.SendWait(f[:]); n != 0 || err != errTimeout {
			t.Error(n, err)
		}
		f[0].Release()
		if took := time.Since(start); took != 10*time.Millisecond {
			t.Errorf("given up after %v", took)
		}
		s.tx.SetDeadline(time.Time{})
		s.lost(1)
		s.pass(100)
		if s.dev.Stalled() {
			t.Error("the carrier is off")
		}
	})
}

// A frontend, and a backend that is told so, waits for ever.
func TestWithoutADrainTimeFramesWait(t *testing.T) {
	for _, back := range []bool{false, true} {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			from, to := p.front, p.back
			if back {
				from, to = to, from
			}
			s := newStalled(t, p, from, to)
			if back {
				s.tx.drain.reset((&ServeConfig{DrainTimeout: -1, StallTimeout: -1}).timeouts(true))
			}
			s.fill(0)
			s.wait(60)
			s.pass(1000)
			if s.ended() || s.dev.Stalled() {
				t.Error("given up")
			}
			s.lost(0)
			take(t, s.rx, 200)
			if err := <-s.sent; err != nil {
				t.Fatal(err)
			}
		})
	}
}

// An owner in Busy mode never parks, and learns of the tick's verdict all the same.
func TestABusySenderDropsToo(t *testing.T) {
	for _, times := range []timeouts{linux, {drain: 30 * time.Millisecond}} {
		p := join(t, emu.Config{}, plain, Config{Wait: Busy})
		s := newStalled(t, p, p.back, p.front)
		s.tx.drain.reset(times)
		s.fill(0)
		go func() {
			var f [1]Frame
			_, err := s.tx.AllocWait(f[:], 60)
			if err == nil {
				_, err = s.tx.SendWait(f[:])
			}
			s.sent <- err
		}()
		for s.tx.drain.call.Load()%2 == 0 && times == linux { // it waits
			time.Sleep(time.Millisecond)
		}
		for now := time.Now(); times == linux && now.Before(time.Now().Add(12*time.Second)); now = now.Add(time.Second) {
			s.tx.checkStall(s.tx.eng, now)
		}
		if err := <-s.sent; err != nil {
			t.Fatal(err)
		}
		s.lost(1)
	}
}

// XSA-392, again: one slot is free, the frame needs two.
func TestAFrameLongerThanTheFreeSlotsIsDropped(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		s.fill(1)
		s.wait(5000)
		s.pass(12)
		if !s.ended() {
			t.Fatal("it waits")
		}
		s.lost(1)
		s.wait(60) // this one fits
		if !s.ended() {
			t.Fatal("it waits")
		}
		s.lost(1)
		s.pass(60)
		if !s.dev.Stalled() {
			t.Error("the carrier is on, although a frame of two pages found one for 60 s")
		}
	})
}

// A stale frame is the caller's mistake, and no loss.
func TestAStaleFrameIsNotDroppedForTheGuest(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.wait(60)
		s.pass(12)
		if !s.ended() {
			t.Fatal("it waits")
		}
		var f [3]Frame
		s.tx.AllocSize(f[:], 60)
		f[1].Release()
		if n, err := s.tx.SendWait(f[:]); n != 1 || err != ErrStale {
			t.Error(n, err)
		}
		s.lost(2)
		f[2].Release()
	})
}

// A GSO frame of which some pieces were sent is dropped once; the next one starts anew.
func TestAFrameThatIsHalfSentIsDroppedOnce(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		long := func() {
			f := stream{payload: 20000, size: 1000}.put(t, s.tx)
			go func() {
				_, err := s.tx.SendWait(f[:])
				s.sent <- err
			}()
			synctest.Wait()
		}
		s.fill(5)
		long()
		was := s.dev.Stats().TX.Get(telemetry.Packets)
		s.pass(12)
		if !s.ended() {
			t.Fatal("it waits")
		}
		s.lost(1)
		take(t, s.rx, 256)
		long()
		if !s.ended() {
			t.Fatal("it waits")
		}
		if n := s.dev.Stats().TX.Get(telemetry.Packets) - was; n != 20 {
			t.Errorf("%d pieces of the next frame were sent, want 20", n)
		}
		s.lost(1)
	})
}

// The carrier goes off 60 s after the guest has taken the last frame, and on with the next.
func TestTheCarrierOfAGuestThatTakesNothingGoesOff(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		events := make(chan LinkEvent, 16)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		go func() {
			for ev := range s.dev.Links(ctx) {
				events <- ev
			}
		}()
		synctest.Wait()
		if ev := <-events; !ev.Up || ev.Stalled {
			t.Fatalf("%+v", ev)
		}
		expect := func(off bool) {
			t.Helper()
			synctest.Wait()
			select {
			case ev := <-events:
				if !ev.Up || ev.Stalled != off || ev.MTU != 1500 {
					t.Errorf("%+v", ev)
				}
			default:
				t.Fatal("no event")
			}
			if s.dev.Stalled() != off {
				t.Error("Stalled says otherwise")
			}
		}
		quiet := func() {
			t.Helper()
			synctest.Wait()
			if len(events) > 0 {
				t.Fatalf("%+v", <-events)
			}
		}
		s.fill(0)
		s.pass(200) // nobody sends
		quiet()
		for n := uint64(1); n <= 2; n++ {
			s.wait(60) // and from here on nobody again
			s.pass(59)
			quiet()
			s.pass(2)
			expect(true)
			if !s.ended() {
				t.Error("it waits")
			}
			s.pass(200)
			quiet()
			st := s.dev.Stats()
			if k := st.TX.Get(telemetry.CarrierOff); k != n {
				t.Errorf("counted %d times, want %d", k, n)
			}
			take(t, s.rx, 1)
			s.pass(1)
			expect(false)
			if e := s.last(); e.Kind != telemetry.EventCarrierOn || e.Queue != telemetry.NoQueue || time.Duration(e.B) != 201*time.Second {
				t.Errorf("recorded %+v", e)
			}
			s.fill(0)
			s.pass(1)
			quiet()
		}
		var off telemetry.Event
		for _, e := range s.dev.counters.Events() {
			if e.Kind == telemetry.EventCarrierOff {
				off = e
			}
		}
		if off.Queue != 0 || time.Duration(off.B) != 60*time.Second {
			t.Errorf("recorded %+v", off)
		}
	})
}

// The carrier is on only if no queue has stalled.
func TestOneQueueTurnsTheCarrierOff(t *testing.T) {
	two := plain
	two.queues = 2
	virtually(t, two, Config{}, func(t *testing.T, p *pair) {
		l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
		var txs [2]*TX
		var rxs [2]*RX
		for i := range txs {
			txs[i], _ = p.back.OwnTX(i)
			rxs[i], _ = p.front.OwnRX(i)
			txs[i].drain.reset(linux)
			for free, _ := txs[i].eng.freeSlots(); free > 0; free, _ = txs[i].eng.freeSlots() {
				put(t, txs[i], 1, 60)
			}
		}
		pass := func(n int, want bool) {
			t.Helper()
			for range n {
				time.Sleep(time.Second)
				l.tick()
			}
			if p.back.Stalled() != want {
				t.Fatalf("carrier off: %v", !want)
			}
		}
		try := func(i int) {
			var f [1]Frame
			txs[i].AllocSize(f[:], 60)
			if _, err := txs[i].Send(f[:]); err != ErrFull {
				t.Fatal(err)
			}
			f[0].Release()
		}
		pass(1, false)
		try(1)
		pass(60, false)
		pass(1, true)
		try(0)
		pass(70, true)
		take(t, rxs[1], 1)
		pass(5, true) // queue 0 has nothing yet
		take(t, rxs[0], 1)
		pass(1, false)
		if n := p.back.Stats().TX.Get(telemetry.CarrierOff); n != 1 {
			t.Errorf("counted %d times", n)
		}
	})
}

// A new connection starts with the carrier on, with the whole time before it, and without
// what the last one had come to.
func TestANewConnectionBeginsWithItsTimes(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.wait(60)
		s.pass(62)
		if !s.dev.Stalled() || !s.ended() {
			t.Fatal("not stalled")
		}
		for i, d := range []*Device{s.p.back, s.p.front} {
			d.quiesce(s.p.conns[1-i], "again")
			d.detach(s.p.conns[1-i])
		}
		if s.dev.Stalled() {
			t.Error("stalled, and down")
		}
		s.p.connect(t, plain)
		s.l.conn = s.p.conns[1]
		s.tx.drain.reset(linux)
		if s.dev.Stalled() || s.dev.last.Stalled {
			t.Error("stalled already")
		}
		s.fill(0)
		s.wait(60)
		s.pass(9)
		if s.ended() {
			t.Error("dropped already")
		}
		s.pass(3)
		if !s.ended() {
			t.Error("it waits")
		}
		s.pass(50)
		if !s.dev.Stalled() {
			t.Error("the carrier is on")
		}
	})
}

// While the link is down a guest can take nothing. A call that waits since before begins its
// time again, also if the connection is the same one.
func TestTheTimeThatALinkIsDownDoesNotCount(t *testing.T) {
	downFor := func(s *stalled, times timeouts, down time.Duration) {
		c := s.p.conns[1]
		s.dev.quiesce(c, "for a while")
		s.l.running = false
		time.Sleep(down)
		c.timeouts = times
		s.dev.bringUp(c, s.p.fdom.ID(), xenbus.Connected)
		s.l.running = true
		synctest.Wait()
	}
	for _, before := range []int{9, 11} { // the second one is late by then, if it does not know it yet
		draining(t, linux, func(t *testing.T, s *stalled) {
			s.fill(0)
			s.wait(60)
			s.pass(9)
			if before > 9 {
				s.dev.tx[0].drain.late.Store(s.tx.drain.call.Load())
			}
			downFor(s, linux, time.Minute)
			if s.pass(9); s.ended() || s.dev.Stalled() {
				t.Error("the time that the link was down counts")
			}
			if s.pass(3); !s.ended() {
				t.Error("it waits")
			}
			s.lost(1)
			if s.pass(45); s.dev.Stalled() {
				t.Error("the carrier is off too early")
			}
			if s.pass(10); !s.dev.Stalled() {
				t.Error("the carrier is on")
			}
		})
	}
	short := new(ServeConfig).timeouts(false)
	draining(t, short, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.wait(60)
		time.Sleep(short.drain - 10*time.Millisecond)
		downFor(s, short, time.Second)
		time.Sleep(short.drain - 10*time.Millisecond)
		synctest.Wait()
		if s.ended() {
			t.Error("the time that the link was down counts")
		}
		time.Sleep(20 * time.Millisecond)
		synctest.Wait()
		if !s.ended() {
			t.Error("it waits")
		}
	})
}

// A sender in a Poller never waits. Its frames are its owner's to drop, except in a call
// that waits, which drops them once the guest has stopped.
func TestAPolledSenderOfAStoppedGuest(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		s.fill(0)
		p, err := NewPoller(s.p.bdom, PollerConfig{})
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if err := p.Add(s.tx, nil); err != nil {
			t.Fatal(err)
		}
		var f [1]Frame
		send := func(call func([]Frame) (int, error)) error {
			if s.tx.AllocSize(f[:], 60) != 1 {
				t.Fatal("no buffer")
			}
			_, err := call(f[:])
			f[0].Release()
			return err
		}
		if err := send(s.tx.Send); err != ErrFull {
			t.Error(err)
		}
		if err := send(s.tx.SendWait); err != ErrPolled {
			t.Error(err)
		}
		s.pass(12)
		if err := send(s.tx.Send); err != ErrFull {
			t.Error(err)
		}
		s.lost(0)
		if err := send(s.tx.SendWait); err != nil {
			t.Error(err)
		}
		s.lost(1)
		p.Remove(s.tx)
	})
}

func TestDroppingAllocatesNothing(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	s := newStalled(t, p, p.back, p.front)
	s.tx.drain.reset(linux)
	s.fill(0)
	var f [4]Frame
	if n := s.tx.AllocSize(f[:1], 60); n != 1 {
		t.Fatal("no buffer")
	}
	if _, err := s.tx.Send(f[:1]); err != ErrFull {
		t.Fatal(err)
	}
	f[0].Release()
	for i := range 12 {
		s.tx.checkStall(s.tx.eng, time.Now().Add(time.Duration(i)*time.Second))
	}
	n := testing.AllocsPerRun(100, func() {
		k := s.tx.AllocSize(f[:], 60)
		if n, err := s.tx.SendWait(f[:k]); n != k || err != nil {
			t.Fatal(n, err)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
	s.lost(4 * 101)
}

func TestTimeoutsAreChecked(t *testing.T) {
	for _, c := range []struct {
		cfg  ServeConfig
		want string // in the error; "": none
		// for a frontend that notifies, and one that does not
		times, silent timeouts
	}{
		{ServeConfig{}, "", timeouts{10 * time.Second, time.Minute}, timeouts{drain: 30 * time.Millisecond}},
		{ServeConfig{DrainTimeout: -1, StallTimeout: -1}, "", timeouts{}, timeouts{}},
		{ServeConfig{DrainTimeout: time.Millisecond, StallTimeout: time.Second}, "", timeouts{time.Millisecond, time.Second}, timeouts{drain: time.Millisecond}},
		{ServeConfig{DrainTimeout: 24 * time.Hour, StallTimeout: 24 * time.Hour}, "", timeouts{24 * time.Hour, 24 * time.Hour}, timeouts{drain: 30 * time.Millisecond}},
		{cfg: ServeConfig{DrainTimeout: time.Microsecond}, want: "DrainTimeout is 1µs"},
		{cfg: ServeConfig{DrainTimeout: 25 * time.Hour}, want: "DrainTimeout is 25h"},
		{cfg: ServeConfig{StallTimeout: 999 * time.Millisecond}, want: "StallTimeout is 999ms"},
		{cfg: ServeConfig{StallTimeout: 25 * time.Hour}, want: "StallTimeout is 25h"},
	} {
		err := c.cfg.checkTimeouts()
		if c.want == "" {
			if err != nil {
				t.Error(err)
			}
			if a, b := c.cfg.timeouts(true), c.cfg.timeouts(false); a != c.times || b != c.silent {
				t.Errorf("%v and %v, want %v and %v", a, b, c.times, c.silent)
			}
			continue
		}
		p := join(t, emu.Config{}, plain, Config{})
		err = Serve(context.Background(), p.bdom, c.cfg, nil)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

// The carrier stays off until the guest has given what the frame lacked.
func TestTheCarrierStaysOffForTooFewSlots(t *testing.T) {
	draining(t, linux, func(t *testing.T, s *stalled) {
		s.fill(0)
		s.wait(5000)
		s.pass(63)
		if !s.dev.Stalled() || !s.ended() {
			t.Fatal("not stalled")
		}
		take(t, s.rx, 1)
		s.pass(3)
		if !s.dev.Stalled() {
			t.Error("the carrier is on for one slot of two")
		}
		take(t, s.rx, 1)
		s.pass(1)
		if s.dev.Stalled() {
			t.Error("the carrier stays off")
		}
	})
}

package pvnet

import (
	"encoding/json"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/xenbus"
	"barevif/xenbus/xenstore/server/labtest"
)

// halfOf returns the half of queue 0 of a ring.
func halfOf(t *testing.T, s *RingState, ring string) HalfState {
	t.Helper()
	for _, h := range s.Halves {
		if h.Queue == 0 && h.Ring == ring {
			return h
		}
	}
	t.Fatalf("no %s ring in %+v", ring, s)
	return HalfState{}
}

// Both ends tell the same of the ring's page, and each what it holds.
func TestRingsShowWhatIsOutstanding(t *testing.T) {
	two := plain
	two.queues = 2
	p := join(t, emu.Config{}, two, Config{})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	sendSizes(t, tx, 60, 61, 9000)
	f, b := p.front.Rings(), p.back.Rings()
	if len(f.Halves) != 4 || len(b.Halves) != 4 || f.Halves[2].Queue != 1 || !f.Up || f.Role != "frontend" || b.Role != "backend" || f.Own != 1 || f.Peer != 2 || f.Epoch != 1 || f.Queues != 2 {
		t.Fatalf("%+v", f)
	}
	ft, bt := halfOf(t, f, "tx"), halfOf(t, b, "tx")
	if ft.Half != "tx" || bt.Half != "rx" || ft.Owner != "away" || ft.RingRef == 0 || ft.RingRef != bt.RingRef {
		t.Errorf("%+v\n%+v", ft, bt)
	}
	n := ft.ReqProd - ft.RspProd
	if n < 5 || ft.Outstanding != n || ft.Free != 256-n || ft.Size != 256 || bt.Waiting != n || bt.ReqProd != ft.ReqProd || int(n) != len(ft.Slots) || bt.Outstanding != 0 || ft.RspEvent == 0 {
		t.Errorf("%d slots\n%+v\n%+v", n, ft, bt)
	}
	refs := map[hypercall.GrantRef]bool{}
	firsts := 0
	for _, s := range ft.Slots {
		refs[s.Ref] = true
		if s.Of == "frame" {
			firsts++
		}
	}
	if len(refs) != int(n) || firsts != 3 {
		t.Errorf("%+v", ft.Slots)
	}
	fr, br := halfOf(t, f, "rx"), halfOf(t, b, "rx")
	posted := uint32(len(fr.Slots)) // fewer than the ring has: the emulator limits the grants
	if posted < 32 || fr.Slots[9].Of != "posted" || fr.Slots[9].ID != 9 || fr.Slots[9].Ref == 0 || fr.Outstanding != posted ||
		br.Waiting != posted || br.Free != posted || br.Half != "tx" {
		t.Errorf("%d slots: %+v\n%+v", posted, fr.Indexes, br.Indexes)
	}
	if ft.Port == 0 || fr.Port == 0 || ft.Port == fr.Port || ft.Joined == nil || !*ft.Joined {
		t.Errorf("ports %d and %d, %v", ft.Port, fr.Port, ft.Joined)
	}
	receiveN(t, rx, 3)
	if bt = halfOf(t, p.back.Rings(), "tx"); bt.Waiting != 0 || bt.RspProd != bt.ReqProd {
		t.Errorf("%+v", bt)
	}
	if ft = halfOf(t, p.front.Rings(), "tx"); ft.Waiting != n || ft.Outstanding != n {
		t.Errorf("responses that were not taken: %+v", ft)
	}
	if _, err := json.Marshal(f); err != nil {
		t.Error(err)
	}
	p.disconnect()
	if s := p.front.Rings(); s.Up || s.Reason == "" || len(s.Halves) != 4 || s.Halves[0].Owner != "shut" || s.Halves[0].Unread || s.Halves[0].Size != 0 {
		t.Errorf("%+v", s)
	}
}

// Whatever the owner of a half does, the half is shown.
func TestRingsAreShownWhateverTheOwnerDoes(t *testing.T) {
	for _, mode := range []WaitMode{Park, Adaptive, Busy} {
		p := join(t, emu.Config{}, plain, Config{Wait: mode})
		tx, _ := own(t, p.front)
		_, rx := own(t, p.back)
		rx.SetDeadline(time.Time{})
		done := make(chan int)
		go func() {
			total := 0
			for total < 100 {
				var f [32]Frame
				n, err := rx.Receive(f[:])
				if err != nil {
					t.Error(err)
					break
				}
				total += n
				rx.Release(f[:n])
			}
			done <- total
		}()
		want := map[WaitMode]string{Park: "waiting", Busy: "inside"}[mode]
		for end := time.Now().Add(labtest.Limit); ; runtime.Gosched() {
			h := halfOf(t, p.back.Rings(), "tx")
			if h.Unread || h.Size != 256 || h.RspPrivate != h.ReqPrivate {
				t.Fatalf("mode %v: %+v", mode, h)
			}
			if h.Owner == want || want == "" {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("mode %v: the owner is %q", mode, h.Owner)
			}
		}
		for range 100 {
			sendSizes(t, tx, 60)
			if h := halfOf(t, p.back.Rings(), "tx"); h.Unread {
				t.Fatalf("mode %v: %+v", mode, h)
			}
		}
		if n := <-done; n != 100 {
			t.Errorf("mode %v: %d frames", mode, n)
		}
	}
}

func TestRingsShowAMemberThatSleeps(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	_, rx := own(t, p.back)
	poller, err := NewPoller(p.bdom, PollerConfig{})
	if err != nil {
		t.Skip("this system has no groups of event channels: ", err)
	}
	defer poller.Close()
	if err := poller.Add(rx, nil); err != nil {
		t.Fatal(err)
	}
	poller.SetDeadline(time.Now().Add(50 * time.Millisecond))
	poller.Wait()
	if h := halfOf(t, p.back.Rings(), "tx"); h.Unread || h.Owner != "asleep" && h.Owner != "away" || h.Size != 256 {
		t.Errorf("%+v", h)
	}
}

// A caller that is stuck inside a half is not waited for; what it left undone is taken
// back.
func TestAStuckCallerIsShownAsSuch(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		p.front.tx[0].gate.enter()
		before := time.Now()
		s := p.front.Rings()
		if h := halfOf(t, s, "tx"); !h.Unread || h.Owner != "inside" || h.Size != 0 {
			t.Errorf("%+v", h)
		}
		if h := halfOf(t, s, "rx"); h.Unread {
			t.Errorf("the other half: %+v", h)
		}
		if took := time.Since(before); took < visitPatience || took > visitPatience+2*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		if p.front.tx[0].task.Load() != nil {
			t.Error("a task is left at the half")
		}
		p.front.tx[0].gate.leave()
		if halfOf(t, p.front.Rings(), "tx").Unread {
			t.Error("it is still unread")
		}
	})
}

// goneFault is what the runtime panics with at a load of memory that was taken away.
type goneFault struct{}

func (goneFault) Error() string { return "fault" }
func (goneFault) Addr() uintptr { return 1 }

// A half is shown with the ring of one connection, also while connections change. The race
// detector sees what is read outside of the half.
func TestRingsAreShownWhileConnectionsChange(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !stop.Load() {
			for _, h := range p.back.Rings().Halves {
				if h.Owner != "shut" && (h.RingRef == 0) != (h.Size == 0) {
					t.Errorf("%+v", h)
				}
			}
			runtime.Gosched() // there may be one thread
		}
	}()
	for range 100 {
		p.back.quiesce(p.conns[1], "for a moment")
		p.back.bringUp(p.conns[1], p.fdom.ID(), xenbus.Connected)
		runtime.Gosched()
	}
	stop.Store(true)
	<-done
}

// A fault in a visitor's function that the caller inside the half runs is the visitor's,
// who does not wait for ever.
func TestAVisitEndsWithAFault(t *testing.T) {
	virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
		h := &p.front.tx[0].half
		h.gate.enter()
		ran := make(chan bool)
		go func() { ran <- h.visit(time.Now().Add(time.Hour), func() { panic(goneFault{}) }) }()
		comes(t, "the visit", func() bool { return h.requests.Load()&requestTask != 0 })
		if v := catchFault(h.serveRequests); v != nil {
			t.Error("the caller met the visitor's fault:", v)
		}
		if <-ran {
			t.Error("the function is said to have run")
		}
		h.gate.leave()
	})
}

// A fault of a user's own memory stays what it is: visit changes nothing of the goroutine
// that calls it.
func TestAVisitLeavesFaultsOfItsCallerAlone(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.front.Rings()
		p.front.Kick(true)
		if debug.SetPanicOnFault(false) {
			t.Error("faults of the goroutine have become panics")
		}
	}()
	<-done
}

// A kick makes a receiver look whose event was lost, at either end.
func TestAKickReachesBothEnds(t *testing.T) {
	for _, kicker := range []string{"the sender", "the receiver"} {
		virtually(t, plain, Config{}, func(t *testing.T, p *pair) {
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			rx.SetDeadline(time.Now().Add(time.Minute))
			got := make(chan time.Duration)
			began := time.Now()
			go func() {
				var f [1]Frame
				if _, err := rx.Receive(f[:]); err != nil {
					t.Error(err)
				}
				rx.Release(f[:])
				got <- time.Since(began)
			}()
			synctest.Wait()
			if _, err := p.m.Fail(emu.Fault{Dom: 1, Op: emu.OpNotify, Event: emu.EventLost}); err != nil {
				t.Fatal(err)
			}
			sendSizes(t, tx, 60)
			time.Sleep(5 * time.Second)
			n := 0
			if kicker == "the sender" {
				n = p.front.Kick(true)
			} else {
				n = p.back.Kick(false)
			}
			if took := <-got; took != 5*time.Second || n != 2 {
				t.Errorf("%s kicked %d halves, and the frame came after %v", kicker, n, took)
			}
			p.disconnect()
			if n := p.front.Kick(true); n != 0 {
				t.Errorf("%d halves kicked without a link", n)
			}
		})
	}
}

// A receiver that copies posts the pages of a frame again with the frame: however many frames its
// user holds, the other end has the whole ring, and needs no low-water rule.
func TestPagesOfReceivedFramesArePostedAtOnce(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{})
	tx, _ := own(t, p.back)
	_, rx := own(t, p.front)
	var frames [8]Frame
	held := 0
	for _, size := range []int{60, 1500, 9000} {
		sendSizes(t, tx, size)
		n, err := rx.Receive(frames[held:])
		if err != nil {
			t.Fatal(err)
		}
		held += n
		h := halfOf(t, p.front.Rings(), "rx")
		if n := h.ReqProd - h.RspProd; n != 256 || h.Size != 256 {
			t.Errorf("%d of %d pages are posted while %d frames are held", n, h.Size, held)
		}
	}
	if held != 3 {
		t.Errorf("%d frames", held)
	}
	if err := rx.Release(frames[:held]); err != nil {
		t.Error(err)
	}
}

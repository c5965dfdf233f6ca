package pvnet

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet/netif"
	"barevif/xenbus/xenstore/server/labtest"
)

// joinCtrl is join with a control ring between the ends, which is down.
func joinCtrl(t testing.TB) (*ctrlClient, *ctrlServer) {
	t.Helper()
	p := join(t, emu.Config{}, plain, Config{})
	fm := &setup{dom: p.fdom, peer: p.bdom.ID(), log: p.front.log, quarantined: &p.front.quarantined, c: new(conn)}
	bm := &setup{dom: p.bdom, peer: p.fdom.ID(), log: p.back.log, quarantined: &p.back.quarantined, c: new(conn)}
	c, err := fm.askCtrl(p.front)
	if err != nil {
		t.Fatal(err)
	}
	page, err := bm.ringPage("ctrl", c.keys.ring)
	if err != nil {
		t.Fatal(err)
	}
	s, err := bm.serveCtrl(p.back, page, c.keys)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stopCtrl(t, s)
		stopCtrl(t, c)
		bm.c.undo.run()
		fm.c.undo.run()
	})
	return c, s
}

// stopCtrl stops an end of a control ring.
func stopCtrl(t testing.TB, e ctrlEnd) {
	t.Helper()
	e.leave()
	if !e.waitGone(time.Now().Add(labtest.Limit)) {
		t.Fatal("the goroutine of the control ring does not end")
	}
}

func require(t testing.TB, c *ctrlClient, typ netif.CtrlType, want uint32) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), ctrlTimeout)
	defer cancel()
	if status, data, err := c.call(ctx, typ, [3]uint32{}); status != netif.CtrlSuccess || data != want || err != nil {
		t.Fatalf("%v: %v, %d, %v; want %d", typ, status, data, err, want)
	}
}

func answerWith(data uint32) func(netif.CtrlRequest) (netif.CtrlStatus, uint32) {
	return func(netif.CtrlRequest) (netif.CtrlStatus, uint32) { return netif.CtrlSuccess, data }
}

// Requests beyond the first few hundred are paced: in virtual time that costs none.
func TestCalls(t *testing.T) { synctest.Test(t, testCalls) }

func testCalls(t *testing.T) {
	c, s := joinCtrl(t)
	s.server.Handle(netif.CtrlGetHashFlags, answerWith(15))
	s.server.Handle(netif.CtrlGetHashMappingSize, answerWith(128))
	if _, _, err := c.call(t.Context(), netif.CtrlGetHashFlags, [3]uint32{}); err != ErrLinkDown {
		t.Errorf("before the link is up: %v", err)
	}
	for range 3 { // the link goes down and comes up with the same ring
		s.start()
		c.start()
		done := make(chan struct{})
		for range 8 {
			go func() {
				defer func() { done <- struct{}{} }()
				for range 50 {
					require(t, c, netif.CtrlGetHashFlags, 15)
					require(t, c, netif.CtrlGetHashMappingSize, 128)
				}
			}()
		}
		for range 8 {
			<-done
		}
		if status, _, err := c.call(t.Context(), netif.CtrlDelGrefMapping, [3]uint32{}); status != netif.CtrlNotSupported || err != nil {
			t.Errorf("what nobody serves: %v, %v", status, err)
		}
		stopCtrl(t, c)
		stopCtrl(t, s)
	}
}

// A backend that does not answer costs its caller the time of the call, and delays other
// calls: a second request does not go out before the first has its response.
func TestCallsThatAreNotAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, s := joinCtrl(t)
		s.server.Handle(netif.CtrlGetHashFlags, answerWith(1))
		s.server.Handle(netif.CtrlGetHashMappingSize, answerWith(2))
		c.start()
		var filled atomic.Int32
		fill := func() [3]uint32 { filled.Add(1); return [3]uint32{} }
		for i, want := range []int32{1, 1, 1} { // the other requests wait behind the first
			begin := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), ctrlTimeout)
			_, _, err := c.callWith(ctx, netif.CtrlGetHashFlags, fill)
			cancel()
			if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("call %d: %v", i, err)
			}
			if d := time.Since(begin); d != ctrlTimeout || filled.Load() != want {
				t.Errorf("call %d took %v, %d requests made", i, d, filled.Load())
			}
		}
		s.start()
		require(t, c, netif.CtrlGetHashMappingSize, 2)
		if filled.Load() != 1 {
			t.Errorf("the calls that were given up were made all the same: %d", filled.Load())
		}
		// A link that goes down ends the calls under way.
		stopCtrl(t, s)
		ended := make(chan error, 2)
		for range 2 {
			go func() {
				_, _, err := c.call(context.Background(), netif.CtrlGetHashFlags, [3]uint32{})
				ended <- err
			}()
		}
		synctest.Wait()
		stopCtrl(t, c)
		for range 2 {
			if err := <-ended; err != ErrLinkDown {
				t.Errorf("the link went down: %v", err)
			}
		}
		s.start()
		c.start()
		require(t, c, netif.CtrlGetHashMappingSize, 2)
	})
}

// What is to be told to the backend is told each time the link comes up, and given up when
// it goes down.
func TestWhenUp(t *testing.T) {
	c, s := joinCtrl(t)
	s.server.Handle(netif.CtrlGetHashFlags, answerWith(15))
	told := make(chan error, 2)
	c.whenUp = append(c.whenUp, func(ctx context.Context) {
		_, _, err := c.call(ctx, netif.CtrlGetHashFlags, [3]uint32{})
		told <- err
	}, func(ctx context.Context) {
		<-ctx.Done()
		_, _, err := c.call(ctx, netif.CtrlGetHashFlags, [3]uint32{})
		told <- err
	})
	for range 2 {
		s.start()
		c.start()
		if err := <-told; err != nil {
			t.Error(err)
		}
		stopCtrl(t, c)
		if err := <-told; err == nil {
			t.Error("told after the link went down")
		}
		stopCtrl(t, s)
	}
}

// A loss of the backend's event is noticed by the slow tick.
func TestWatchWakesTheControlRing(t *testing.T) {
	c, s := joinCtrl(t)
	s.server.Handle(netif.CtrlGetHashFlags, answerWith(15))
	s.port.Close() // its notifications reach nobody
	s.start()
	c.start()
	answered := make(chan struct{})
	go func() {
		require(t, c, netif.CtrlGetHashFlags, 15)
		close(answered)
	}()
	for {
		select {
		case <-answered:
			return
		case <-time.After(time.Millisecond):
			s.watch()
			c.watch()
		}
	}
}

func TestCtrlPace(t *testing.T) {
	var p ctrlPace
	now := time.Now()
	ask := func(n int) (paused time.Duration) {
		for range n {
			d := p.pause(now, 0)
			paused += d
			now = now.Add(d)
		}
		return paused
	}
	if d := ask(ctrlAtOnce); d != 0 {
		t.Errorf("the first requests waited %v", d)
	}
	if d := ask(1000); d < 999*ctrlEvery || d > 1000*ctrlEvery {
		t.Errorf("1000 more waited %v", d)
	}
	now = now.Add(time.Hour)
	if d := ask(ctrlAtOnce); d != 0 {
		t.Errorf("after an hour of rest they waited %v", d)
	}
	if d := ask(10); d < 9*ctrlEvery {
		t.Errorf("an hour gave more than %d at once", ctrlAtOnce)
	}
}

// A request that takes long to answer, as one that names 511 grants and one that is none, does
// not buy a frontend the processor: it counts for as many as it takes the time of.
func TestCtrlPaceCountsWhatRequestsCost(t *testing.T) {
	for _, took := range []time.Duration{500 * time.Microsecond, ctrlEvery, 10 * time.Millisecond} {
		var p ctrlPace
		now, worked := time.Now(), time.Duration(0)
		for begun := now; now.Sub(begun) < time.Minute; {
			now = now.Add(took)
			worked += took
			now = now.Add(p.pause(now, took))
		}
		if worked > time.Minute/ctrlShare+2*ctrlAtOnce*ctrlEvery/ctrlShare {
			t.Errorf("requests of %v: %v of work in a minute", took, worked)
		}
	}
	// A request that waits for the owner of a queue works no longer than some milliseconds.
	var p ctrlPace
	if d := p.pause(time.Now(), 2*time.Second); d != 0 {
		t.Errorf("a request that waited is followed by a pause of %v", d)
	}
}

package hostile

import (
	"slices"
	"strings"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/pvnet"
	"barevif/telemetry"
	"barevif/test/hostile/raw"
	"barevif/xenbus/xenstore"
)

// drained returns how many frames our backend sent to the guest, and how many it dropped
// because the guest took none.
func drained(t testing.TB, d *pvnet.Device) (sent, lost uint64) {
	t.Helper()
	st := d.Stats()
	if st.TX.Dropped()+st.TX.Errors() != st.TX.Lost(telemetry.DropGuestStalled) {
		t.Errorf("dropped %d, errors %d, for the guest %d", st.TX.Dropped(), st.TX.Errors(), st.TX.Lost(telemetry.DropGuestStalled))
	}
	return st.TX.Get(telemetry.Packets), st.TX.Lost(telemetry.DropGuestStalled)
}

// write writes frames until the channel is closed, as somebody who waits for room.
func (g *guest) write(stop <-chan struct{}) <-chan error {
	ended := make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				ended <- nil
				return
			case <-time.After(100 * time.Millisecond):
			}
			if _, err := g.dev.Write(pattern(60, 0)); err != nil {
				ended <- err
				return
			}
		}
	}()
	return ended
}

// Linux: xenvif_rx_queue_drop_expired and xenvif_rx_queue_stalled of
// drivers/net/xen-netback/rx.c.
func TestT16TimersForAFrontendThatTakesLittle(t *testing.T) {
	for _, c := range []struct {
		name   string
		notify string // feature-rx-notify; "": none
		play   func(g *guest)

		sent, lost [2]uint64 // at least, and at most
		carrierOff bool
	}{
		// Each call of Write waits 10 to 12 s the first time, and then none waits.
		{"takes nothing", "1", func(*guest) { time.Sleep(3 * time.Minute) }, [2]uint64{3, 3}, [2]uint64{1500, 1800}, true},
		// A post ends the wait of one frame, and lets the next one wait. No frame is old.
		{"posts a page every 9 s", "1", func(g *guest) {
			for range 20 {
				time.Sleep(9 * time.Second)
				g.Post(1)
			}
		}, [2]uint64{22, 23}, [2]uint64{0, 0}, false},
		// It stops between two pages.
		{"posts a page every 30 s", "1", func(g *guest) {
			for range 6 {
				time.Sleep(30 * time.Second)
				g.Post(1)
			}
		}, [2]uint64{8, 9}, [2]uint64{600, 1300}, false},
		// The slow tick finds what was not notified.
		{"never notifies", "1", func(g *guest) {
			for range 60 {
				time.Sleep(3 * time.Second)
				g.postSilently(1)
			}
		}, [2]uint64{61, 63}, [2]uint64{0, 0}, false},
		// It says that it never notifies: frames wait 30 ms, and pages are found at once.
		{"has no rx-notify", "", func(g *guest) {
			for range 60 {
				time.Sleep(3 * time.Second)
				g.postSilently(1)
			}
		}, [2]uint64{62, 63}, [2]uint64{1000, 1800}, false},
		{"says 0", "0", func(g *guest) { time.Sleep(3 * time.Minute) }, [2]uint64{3, 3}, [2]uint64{1000, 1800}, false},
		{"says nonsense", "maybe", func(g *guest) { time.Sleep(3 * time.Minute) }, [2]uint64{3, 3}, [2]uint64{1000, 1800}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				l := newServingLab(t)
				g, _ := l.attackBackendWith(xenstore.Values{"feature-rx-notify": c.notify})
				g.Post(3)
				stop := make(chan struct{})
				ended := g.write(stop)
				c.play(g)
				sent, lost := drained(t, g.dev)
				if sent < c.sent[0] || sent > c.sent[1] || lost < c.lost[0] || lost > c.lost[1] {
					t.Errorf("%d sent, %d dropped, want %d and %d", sent, lost, c.sent, c.lost)
				}
				if g.dev.Stalled() != c.carrierOff {
					t.Errorf("carrier off: %v", !c.carrierOff)
				}
				if n := count(g.dev, telemetry.CarrierOff); (n == 1) != c.carrierOff || n > 1 {
					t.Errorf("the carrier went off %d times", n)
				}

				// Back to work: frames pass at once, and the carrier is on within a second.
				start := time.Now()
				g.Post(20)
				for was, _ := drained(t, g.dev); was == sent; was, _ = drained(t, g.dev) {
					time.Sleep(10 * time.Millisecond)
				}
				if took := time.Since(start); took > 150*time.Millisecond {
					t.Errorf("the next frame passed after %v", took)
				}
				time.Sleep(time.Second)
				if g.dev.Stalled() {
					t.Error("the carrier stays off")
				}
				close(stop)
				g.Post(5)
				if err := wait(t, ended); err != nil {
					t.Error(err)
				}
				g.disconnect()
			})
		})
	}
}

// postSilently posts pages without a notification.
func (g *guest) postSilently(n int) {
	for range n {
		i := g.RxProd % raw.Size
		g.Rx.Put(g.RxProd, i, uint32(g.Posted.Refs[int(i)%len(g.Posted.Refs)]))
		g.RxProd++
	}
	g.Rx.Store(raw.ReqProd, g.RxProd)
}

// One goroutine forwards to many guests, through a Poller. Those that have stopped, or post
// a page now and then, cost the others nothing: every frame for them arrives, when it is sent.
func TestT16AStoppedGuestCostsTheOthersNothing(t *testing.T) {
	inVirtualTime(t, testT16AStoppedGuestCostsTheOthersNothing)
}

func testT16AStoppedGuestCostsTheOthersNothing(t *testing.T) {
	l := newLab(t, emu.Config{})
	l.serve(pvnet.ServeConfig{})
	const guests, frames = 8, 600
	p, err := pvnet.NewPoller(l.drv, pvnet.PollerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	var all []*guest
	var txs []*pvnet.TX
	for range guests {
		g := l.newGuest()
		g.attach()
		tx, err := g.dev.OwnTX(0)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Add(tx, nil); err != nil {
			t.Fatal(err)
		}
		g.Post(8)
		all, txs = append(all, g), append(txs, tx)
	}
	bad := func(i int) bool { return i%4 == 1 }  // takes nothing more
	slow := func(i int) bool { return i%4 == 3 } // takes a frame every 9 s
	good := func(i int) bool { return i%2 == 0 } // takes every frame
	var f [1]pvnet.Frame
	for n := range frames {
		start := time.Now()
		for i, tx := range txs {
			if tx.AllocSize(f[:], 100) != 1 {
				t.Fatal("a guest that has stopped keeps pages")
			}
			k, err := tx.Send(f[:])
			if k == 1 {
				continue
			}
			if err != pvnet.ErrFull || good(i) {
				t.Fatalf("guest %d, frame %d: %v", i, n, err)
			}
			f[0].Release()
			if err := tx.CountDropped(telemetry.DropGuestStalled, 1); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); took != 0 {
			t.Fatalf("a round takes %v", took)
		}
		for i, g := range all {
			if good(i) {
				g.awaitReceived(1)
				g.Post(1)
			} else if slow(i) && n%90 == 89 {
				g.Post(1)
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	for i, g := range all {
		sent, lost := drained(t, g.dev)
		want := [2]uint64{8, frames - 8}
		switch {
		case good(i):
			want = [2]uint64{frames, 0}
		case slow(i):
			want = [2]uint64{8 + frames/90, frames - 8 - frames/90}
		}
		if sent != want[0] || lost != want[1] {
			t.Errorf("guest %d: %d sent, %d dropped, want %d", i, sent, lost, want)
		}
	}
	time.Sleep(4 * time.Second)
	for i, g := range all {
		if g.dev.Stalled() != bad(i) {
			t.Errorf("guest %d: carrier off: %v", i, g.dev.Stalled())
		}
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	for _, g := range slices.Backward(all) { // each compares what is left with what was there before it
		g.disconnect()
	}
}

// Writers of different vifs do not wait for each other, however their guests behave.
func TestT16WritersWaitForTheirOwnGuest(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		l := newServingLab(t)
		stopped, busy := l.attackBackend(), l.attackBackend()
		stopped.Post(1)
		stop := make(chan struct{})
		ended := stopped.write(stop)
		for n := range 200 {
			busy.Post(1)
			start := time.Now()
			if _, err := busy.dev.Write(pattern(60, 0)); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(start); took != 0 {
				t.Fatalf("frame %d waits %v", n, took)
			}
			busy.awaitReceived(1)
			time.Sleep(100 * time.Millisecond)
		}
		if sent, lost := drained(t, busy.dev); sent != 200 || lost != 0 {
			t.Errorf("%d sent, %d dropped", sent, lost)
		}
		if sent, lost := drained(t, stopped.dev); sent != 1 || lost == 0 {
			t.Errorf("%d sent, %d dropped for the guest that has stopped", sent, lost)
		}
		close(stop)
		if err := wait(t, ended); err != nil {
			t.Error(err)
		}
		busy.disconnect()
		stopped.disconnect()
	})
}

// A guest cannot make the log grow: a line when the carrier goes off, and one when it is on
// again, at most once in the stall time.
func TestT16ACarrierThatComesAndGoes(t *testing.T) {
	inVirtualTime(t, func(t *testing.T) {
		l := newServingLab(t)
		g := l.attackBackend()
		g.Post(1)
		stop := make(chan struct{})
		ended := g.write(stop)
		lines := func() int { return strings.Count(l.log.String(), "carrier") }
		before := lines()
		// Ten minutes. Whenever the carrier is off it posts pages for two seconds of frames, so
		// that the tick that follows finds some left: one page alone may be gone by then.
		for range 600 {
			time.Sleep(time.Second)
			if g.dev.Stalled() {
				g.Post(20)
			}
		}
		if n := count(g.dev, telemetry.CarrierOff); n < 8 || n > 10 {
			t.Errorf("the carrier went off %d times in ten minutes", n)
		}
		if n := lines() - before; n > 20 {
			t.Errorf("%d lines", n)
		}
		close(stop)
		g.Post(5)
		if err := wait(t, ended); err != nil {
			t.Error(err)
		}
		g.disconnect()
	})
}

// A vif that is removed, and a backend that ends, do not wait for the drain time.
func TestT16AStoppedGuestDoesNotDelayTheEnd(t *testing.T) {
	for _, how := range []string{"removed", "ended"} {
		t.Run(how, func(t *testing.T) {
			inVirtualTime(t, func(t *testing.T) {
				l := newServingLab(t)
				g := l.attackBackend()
				g.Post(1)
				stop := make(chan struct{})
				ended := g.write(stop)
				time.Sleep(3 * time.Second)
				start := time.Now()
				if how == "removed" {
					g.disconnect()
				} else {
					l.stopServing()
				}
				if took := time.Since(start); took > 5*time.Second {
					t.Errorf("%s after %v", how, took)
				}
				if err := wait(t, ended); err == nil {
					t.Error("Write goes on")
				}
				if how == "ended" {
					g.setState("6")
					l.removeVif(g.v)
					if err := g.Close(); err != nil {
						t.Error(err)
					}
				}
				close(stop)
			})
		})
	}
}

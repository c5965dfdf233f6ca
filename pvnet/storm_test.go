package pvnet

import (
	"runtime"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
	"barevif/hypercall/emu"
	"barevif/telemetry"
	"barevif/xenbus/xenstore/server/labtest"
)

// storm notifies p in a loop until stop is called.
func storm(p hypercall.Port) (stop func()) {
	end := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-end:
				return
			default:
				p.Notify()
				runtime.Gosched() // there may be one thread
			}
		}
	})
	return func() { close(end); wg.Wait() }
}

// parkedAfter waits until h is in its nth wait.
func parkedAfter(t testing.TB, h *half, n uint32) {
	t.Helper()
	for end := time.Now().Add(labtest.Limit); h.waitSeq.Load() < 2*n-1 || h.waitSeq.Load()%2 == 0; time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("%d waits, not %d", (h.waitSeq.Load()+1)/2, n)
		}
	}
}

// While the waiter holds events back after a storm, the event of a frame is late by up to
// a second. The watchdog cannot tell it from a lost one, and ends the wait.
func TestTheTickFindsAnEventThatIsHeldBack(t *testing.T) {
	for name, f := range map[string]features{
		"two channels": plain,
		"one channel":  {queues: 1, frontSG: true, backSG: true},
	} {
		t.Run(name, func(t *testing.T) {
			p := join(t, emu.Config{}, f, Config{})
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			got := make(chan error)
			receive := func() {
				var f [1]Frame
				_, err := rx.Receive(f[:])
				rx.Release(f[:])
				got <- err
			}
			stop := storm(p.front.tx[0].eng.(*frontTX).port)
			l := &lifecycle{d: p.back, conn: p.conns[1], running: true}
			frames := uint64(0)
			for len(l.suspects) == 0 {
				if frames++; frames > 5 {
					t.Fatal("no frame was held back")
				}
				waits := (rx.waitSeq.Load() + 1) / 2
				go receive()
				parkedAfter(t, &rx.half, waits+13) // the first one or two have no delay, then 1, 2 ... 1000 ms
				var f [1]Frame
				tx.AllocSize(f[:], 60)
				if n, err := tx.Send(f[:]); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				if l.tick(); len(l.suspects) == 0 { // the machine was slow: the frame has come already
					if err := <-got; err != nil {
						t.Fatal(err)
					}
				}
			}
			<-l.recheckAt
			l.rescue()
			if err := <-got; err != nil {
				t.Fatal(err)
			}
			stop()
			st := p.back.Stats()
			if n := st.RX.Get(telemetry.RescuedWakeups); n > 1 { // 0: the event came during the grace
				t.Errorf("%d rescues counted", n)
			}
			if n := st.RX.Get(telemetry.Packets); n != frames {
				t.Errorf("%d frames", n)
			}
		})
	}
}

// fill makes tx send until it waits for room that its peer does not make. The sending
// ends with the test.
func fill(t testing.TB, tx *TX) {
	t.Helper()
	var sending sync.WaitGroup
	t.Cleanup(func() {
		tx.SetDeadline(time.Unix(1, 0))
		sending.Wait()
	})
	sending.Go(func() {
		var f [1]Frame
		for {
			if _, err := tx.AllocWait(f[:], 60); err != nil {
				return
			}
			if _, err := tx.SendWait(f[:]); err != nil {
				f[0].Release()
				return
			}
		}
	})
	for end := time.Now().Add(labtest.Limit); tx.waitSeq.Load()%2 == 0 || tx.eng.ready(1); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatal("the sender does not wait")
		}
	}
}

// With one channel for both directions an event may be for a half that has no work, or
// that nobody uses. The waiter delays a storm all the same, and stops that with the first
// frame.
func TestAStormOnOneChannelForBothHalves(t *testing.T) {
	for name, waits := range map[string]bool{"nobody sends": false, "a sender waits": true} {
		t.Run(name, func(t *testing.T) {
			p := join(t, emu.Config{}, features{queues: 1, frontSG: true, backSG: true}, Config{})
			tx, fromBack := own(t, p.front)
			toFront, rx := own(t, p.back)
			if waits {
				fill(t, toFront)
			}
			got := make(chan error, 1)
			go func() {
				var f [1]Frame
				_, err := rx.Receive(f[:])
				rx.Release(f[:])
				got <- err
			}()
			parkedAfter(t, &rx.half, 1)
			parks := func() uint64 {
				st := p.back.Stats()
				return st.RX.Get(telemetry.Parks) + st.TX.Get(telemetry.Parks)
			}
			before, began := parks(), time.Now()
			stop := storm(p.front.tx[0].eng.(*frontTX).port)
			time.Sleep(1200 * time.Millisecond)
			// 1, 2, 4 ... 512 ms: the tenth comes after more than a second, and later ones once a
			// second. Both halves wake up for each.
			n := parks() - before
			took := time.Since(began)
			if n > 2*(16+uint64((took-1200*time.Millisecond)/time.Second)) {
				t.Errorf("%d wake-ups in %v", n, took)
			}
			var f [1]Frame
			if waits { // the other half waits for the same events
				if n, err := fromBack.Receive(f[:]); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				fromBack.Release(f[:])
			}
			tx.AllocSize(f[:], 60)
			if n, err := tx.Send(f[:]); n != 1 || err != nil {
				t.Fatal(n, err)
			}
			if err := <-got; err != nil {
				t.Fatal(err)
			}
			stop()
		})
	}
}

// Events for one half do not count as spurious because the other half has no work: else
// each frame would take a second, and the deadline would pass.
func TestAnIdleHalfDoesNotBrakeTheOther(t *testing.T) {
	p := join(t, emu.Config{}, features{queues: 1, frontSG: true, backSG: true}, Config{})
	tx, _ := own(t, p.front)
	toFront, rx := own(t, p.back)
	fill(t, toFront)
	got := make(chan error, 1)
	go func() {
		var f [1]Frame
		for {
			_, err := rx.Receive(f[:])
			rx.Release(f[:])
			got <- err
			if err != nil {
				return
			}
		}
	}()
	for i := range 200 {
		var f [1]Frame
		tx.AllocWait(f[:], 60)
		if n, err := tx.Send(f[:]); n != 1 || err != nil {
			t.Fatal(i, n, err)
		}
		if err := <-got; err != nil {
			t.Fatal(i, err)
		}
		for rx.waitSeq.Load()%2 == 0 { // so that each frame causes an event
			time.Sleep(10 * time.Microsecond)
		}
	}
}

package pvnet

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"barevif/hypercall/emu"
	"barevif/telemetry"
)

func TestOwnersCountWhatTheyLose(t *testing.T) {
	var log bytes.Buffer
	p := join(t, emu.Config{}, plain, Config{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	for _, d := range []*Device{p.front, p.back} {
		d.Logger().Warn("said by an owner")
		tx, rx := d.tx[0], d.rx[0]
		count := func(want error) {
			t.Helper()
			for _, err := range []error{tx.CountDropped(telemetry.DropTooLong, 3), tx.CountUndelivered(4), rx.CountUndelivered(5)} {
				if err != want {
					t.Errorf("%v, want %v", err, want)
				}
			}
		}
		least := 1e9
		for range 5 { // what runs beside the test allocates now and then
			least = min(least, testing.AllocsPerRun(1, func() { count(nil) }))
		}
		if least != 0 {
			t.Errorf("%v allocations", least)
		}
		st := d.Stats() // AllocsPerRun counts once before it looks
		if st.TX.Lost(telemetry.DropTooLong) != 30 || st.TX.Errors() != 30 || st.TX.Get(telemetry.Undelivered) != 40 ||
			st.RX.Get(telemetry.Undelivered) != 50 || st.RX.Errors()+st.RX.Dropped() != 0 {
			t.Errorf("%+v", st)
		}
		tx.gate.enter()
		if err := tx.CountUndelivered(1); err != ErrBusy {
			t.Errorf("inside another call: %v", err)
		}
		tx.gate.leave()
	}
	p.disconnect()
	for _, d := range []*Device{p.front, p.back} {
		before := d.Stats()
		if err := d.tx[0].CountUndelivered(1); err != ErrDisconnected {
			t.Errorf("once it has ended: %v", err)
		}
		if after := d.Stats(); after.TX != before.TX {
			t.Error("counted all the same")
		}
	}
	if n := strings.Count(log.String(), "said by an owner"); n != 2 {
		t.Errorf("%d lines", n)
	}
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

package pvnet

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"barevif/hypercall/emu"
	"barevif/xenbus/xenstore/server/labtest"
)

// few is as few buffers as a device may have.
const few = 17

// eachStarved runs a test with a receiver that has few buffers, holds them all in frames of so
// many bytes, and has been told so. More frames wait in the ring.
func eachStarved(t *testing.T, test func(t *testing.T, to *Device, rx *RX, held []Frame)) {
	for _, c := range []struct {
		name         string
		toBack, lend bool
		size         int
	}{
		{"to the back", true, false, 60},
		{"to the back, long", true, false, 9000},
		{"to the back, lent", true, true, 600},
		{"to the front", false, false, 60},
		{"to the front, long", false, false, 9000},
		{"to the front, lent", false, true, 600},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := join(t, emu.Config{}, plain, Config{Buffers: few, LendRx: c.lend})
			from, to := p.back, p.front
			if c.toBack {
				from, to = p.front, p.back
				if c.lend {
					static(t, p)
				}
			}
			tx, _ := own(t, from)
			_, rx := own(t, to)
			var held []Frame
			frames := make([]Frame, 32)
			for {
				n := tx.AllocSize(frames, c.size)
				if _, err := tx.SendWait(frames[:n]); err != nil {
					t.Fatal(err)
				}
				for {
					n, err := rx.Poll(frames)
					if err == ErrNoBuffers {
						defer releaseAll(held) // also if the test fails
						test(t, to, rx, held)
						return
					}
					if err != nil {
						t.Fatal(err)
					}
					if n == 0 {
						break
					}
					held = append(held, frames[:n]...)
				}
			}
		})
	}
}

// waits reports whether the owner of a half waits in it.
func waits(h *half) bool { return h.waitSeq.Load()%2 == 1 }

func comes(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(labtest.Limit); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s never came", what)
		}
	}
}

// awaitBuffers has another goroutine wait for buffers, until over or an error, which it gives. It
// returns once that waits.
func awaitBuffers(t testing.TB, rx *RX, over *atomic.Bool) <-chan error {
	t.Helper()
	woken := make(chan error, 1)
	go func() {
		for rounds := 1; ; rounds++ {
			err := rx.AwaitBuffers()
			if rounds > 1000 {
				err = errors.New("it looks again all the time")
			}
			if err != nil || over.Load() {
				woken <- err
				return
			}
		}
	}()
	comes(t, "the wait", func() bool { return waits(&rx.half) })
	return woken
}

// Whoever releases a frame wakes the receiver who holds all others. The watchdog, which finds
// frames in the ring, does not take that for a lost event.
func TestAReleaseWakesAReceiverWithoutBuffers(t *testing.T) {
	eachStarved(t, func(t *testing.T, _ *Device, rx *RX, held []Frame) {
		for len(held) > 0 { // a long frame may need more than one gives back
			var over atomic.Bool
			woken := awaitBuffers(t, rx, &over)
			if rx.eng.overdue() {
				t.Error("the watchdog would wake it")
			}
			over.Store(true)
			held[0].Release()
			held = held[1:]
			if err := <-woken; err != nil {
				t.Fatal(err)
			}
			var f [1]Frame
			n, err := rx.Poll(f[:])
			if err == nil && n == 1 {
				f[0].Release()
				break
			}
			if err != ErrNoBuffers {
				t.Fatal(n, err)
			}
			if len(held) == 0 {
				t.Error("it received nothing")
			}
		}
	})
}

// What came back before the wait began ends it at once, also if somebody who looked at the rings
// has collected it.
func TestNoReleaseIsMissedBeforeTheWait(t *testing.T) {
	eachStarved(t, func(t *testing.T, to *Device, rx *RX, held []Frame) {
		held[0].Release()
		if to.Rings() == nil {
			t.Fatal("no rings")
		}
		if err := rx.AwaitBuffers(); err != nil {
			t.Fatal(err)
		}
		rx.Release(held[1:]) // an owner's own release is seen, too
		if err := rx.AwaitBuffers(); err != nil {
			t.Fatal(err)
		}
		var f [1]Frame
		if n, err := rx.Poll(f[:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		f[0].Release()
		if err := rx.AwaitBuffers(); err != nil { // nothing is missing
			t.Fatal(err)
		}
	})
}

// What came back after receive had looked, and before it took note, counts too.
func TestNoReleaseIsMissedBeforeTheNote(t *testing.T) {
	eachStarved(t, func(t *testing.T, _ *Device, rx *RX, held []Frame) {
		held[len(held)-1].Release() // a copy, also if others are lent
		switch e := rx.eng.(type) {
		case *frontRX:
			e.starve(e.atHand())
		case *backRX:
			e.starve(e.atHand())
		}
		if rx.eng.starving() {
			t.Error("the receiver waits, and has a page")
		}
	})
}

func TestWhatEndsAWaitForBuffers(t *testing.T) {
	eachStarved(t, func(t *testing.T, to *Device, rx *RX, held []Frame) {
		var over atomic.Bool
		rx.SetDeadline(time.Time{})
		woken := awaitBuffers(t, rx, &over)
		rx.SetDeadline(time.Now().Add(time.Millisecond))
		if err := <-woken; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("after the deadline: %v", err)
		}
		p := newPoller(t, to.domain, PollerConfig{})
		if err := p.Add(rx, nil); err != nil {
			t.Fatal(err)
		}
		if err := rx.AwaitBuffers(); err != ErrPolled {
			t.Errorf("in a Poller: %v", err)
		}
	})
}

// A wait for buffers ends with the connection, and one of a device that has ended says so.
func TestAWaitForBuffersEndsWithTheDevice(t *testing.T) {
	p := join(t, emu.Config{}, plain, Config{Buffers: few})
	tx, _ := own(t, p.front)
	_, rx := own(t, p.back)
	send(t, tx, few+1)
	held := make([]Frame, few)
	defer releaseAll(held)
	if n, err := rx.Receive(held); n != few || err != nil {
		t.Fatal(n, err)
	}
	var f [1]Frame
	if _, err := rx.Receive(f[:]); err != ErrNoBuffers {
		t.Fatal(err)
	}
	var over atomic.Bool
	woken := awaitBuffers(t, rx, &over)
	p.disconnect()
	if err := <-woken; !errors.Is(err, ErrDisconnected) {
		t.Errorf("%v", err)
	}
}

// A Poller does not look at a member whose owner holds all buffers, and lists it once one has come
// back, by whoever released it.
func TestAPollerWaitsForBuffers(t *testing.T) {
	for name, mode := range waitModes {
		t.Run(name, func(t *testing.T) {
			eachStarved(t, func(t *testing.T, to *Device, rx *RX, held []Frame) {
				p := newPoller(t, to.domain, PollerConfig{Wait: mode})
				if err := p.Add(rx, nil); err != nil {
					t.Fatal(err)
				}
				quiet := func() {
					t.Helper()
					p.SetDeadline(time.Now().Add(10 * time.Millisecond))
					if ready, err := p.Wait(); !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Fatalf("%d listed, %v", len(ready), err)
					}
					p.SetDeadline(time.Now().Add(labtest.Limit))
				}
				listed := func(how string) {
					t.Helper()
					if ready, err := p.Wait(); len(ready) != 1 || err != nil {
						t.Fatalf("%s: %d listed, %v", how, len(ready), err)
					}
				}
				var f [1]Frame
				defer func() { releaseAll(held) }()
				starve := func() {
					t.Helper()
					for {
						listed("what is there")
						n, err := rx.Poll(f[:])
						if err == ErrNoBuffers {
							return
						}
						if n != 1 || err != nil {
							t.Fatal(n, err)
						}
						held = append(held, f[0])
					}
				}
				starve()
				quiet()
				go held[0].Release()
				listed("another goroutine's release")
				starve()
				quiet()
				held[1].Release()
				to.Rings()
				listed("a release that a visitor has collected")
				starve()
				quiet()
				rx.Release(held[2:])
				listed("the owner's release")
				if n, err := rx.Poll(f[:]); n != 1 || err != nil {
					t.Fatal(n, err)
				}
				rx.Release(f[:])
				p.Remove(rx)
			})
		})
	}
}

// Frames that are released by many goroutines, in any order, never leave their receiver asleep.
func TestNoWakeForBuffersIsLost(t *testing.T) {
	const frames, releasers = 20000, 3
	for _, polled := range []bool{false, true} {
		t.Run(fmt.Sprintf("polled=%t", polled), func(t *testing.T) {
			p := join(t, emu.Config{}, plain, Config{Buffers: few})
			tx, _ := own(t, p.front)
			_, rx := own(t, p.back)
			given := make(chan Frame, few) // so that the receiver never waits for it
			var wg sync.WaitGroup
			for range releasers {
				wg.Go(func() {
					for f := range given {
						f.Release()
					}
				})
			}
			sent := make(chan error, 1)
			go func() { sent <- sendAll(tx, frames) }()
			var q *Poller
			if polled {
				q = newPoller(t, p.bdom, PollerConfig{})
				if err := q.Add(rx, nil); err != nil {
					t.Fatal(err)
				}
			}
			var f [few]Frame
			for got := 0; got < frames; {
				var n int
				var err error
				if polled {
					if _, err = q.Wait(); err != nil {
						t.Fatalf("after %d frames: %v", got, err)
					}
					n, err = rx.Poll(f[:])
				} else {
					n, err = rx.Receive(f[:])
				}
				if err == ErrNoBuffers {
					if !polled {
						err = rx.AwaitBuffers()
					} else {
						err = nil
					}
				}
				if err != nil {
					t.Fatalf("after %d frames: %v", got, err)
				}
				for i := range f[:n] {
					given <- f[i]
				}
				got += n
			}
			close(given)
			wg.Wait()
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			if polled {
				q.Remove(rx)
			}
		})
	}
}

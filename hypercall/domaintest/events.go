package domaintest

import (
	"errors"
	"runtime"
	"testing"
	"time"

	"barevif/hypercall"
)

func bindFiresTheBinder(t *testing.T, p pair) {
	wa, wb := waiter(t, p.front), waiter(t, p.back)
	a, err := wa.Unbound(p.back.ID())
	if err != nil {
		t.Fatal(err)
	}
	if a.ID() == 0 {
		t.Fatal("port 0")
	}
	notify(t, a) // the port is not bound yet: not an error
	b, err := wb.Bind(p.front.ID(), a.ID())
	if err != nil {
		t.Fatal(err)
	}
	if b.ID() == 0 {
		t.Fatal("port 0")
	}
	wait(t, wb)
	quiet(t, wa, 20*time.Millisecond)
	quiet(t, wb, 20*time.Millisecond)
}

func bindFiresWhoWaitsAlready(t *testing.T, p pair) {
	wa, wb := waiter(t, p.front), waiter(t, p.back)
	a, err := wa.Unbound(p.back.ID())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- wb.Wait(time.Time{}, true) }()
	time.Sleep(10 * time.Millisecond) // the waiter is probably parked by now; the test is valid either way
	if _, err := wb.Bind(p.front.ID(), a.ID()); err != nil {
		t.Fatal(err)
	}
	ends(t, done, nil, "Wait does not see the new port")
}

func onlyOnePeerBindsOnce(t *testing.T, p pair) {
	wa, wb := waiter(t, p.front), waiter(t, p.back)
	a, err := wa.Unbound(p.back.ID())
	if err != nil {
		t.Fatal(err)
	}
	if !p.loopback() {
		if _, err := wa.Bind(p.front.ID(), a.ID()); !errors.Is(err, hypercall.ErrNoPort) {
			t.Errorf("a port for domain %d, bound by %d: %v", p.back.ID(), p.front.ID(), err)
		}
	}
	if _, err := wb.Bind(p.front.ID(), 1<<30); !errors.Is(err, hypercall.ErrNoPort) {
		t.Errorf("a port that is not there: %v", err)
	}
	if _, err := wb.Bind(p.front.ID(), 0); !errors.Is(err, hypercall.ErrNoPort) {
		t.Errorf("port 0: %v", err)
	}
	b, err := wb.Bind(p.front.ID(), a.ID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wb.Bind(p.front.ID(), a.ID()); !errors.Is(err, hypercall.ErrNoPort) {
		t.Errorf("a second bind: %v", err)
	}
	// The port of the binding end is connected to us already, so we cannot bind to it.
	if _, err := wa.Bind(p.back.ID(), b.ID()); !errors.Is(err, hypercall.ErrNoPort) {
		t.Errorf("a bind to the bound end: %v", err)
	}
}

func notifyWakesTheOtherEnd(t *testing.T, p pair) {
	wa, wb, a, b := channel(t, p)
	for range 3 {
		done := make(chan error, 1)
		go func() { done <- wb.Wait(time.Now().Add(soon), true) }()
		notify(t, a)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		go func() { done <- wa.Wait(time.Now().Add(soon), true) }()
		notify(t, b)
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
}

func eventsFromBeforeWaitCount(t *testing.T, p pair) {
	_, wb, a, _ := channel(t, p)
	for range 5 {
		notify(t, a)
	}
	wait(t, wb)
	// While the port is masked, events merge into one, which the next Wait returns.
	notify(t, a)
	notify(t, a)
	wait(t, wb)
	quiet(t, wb, 20*time.Millisecond)
}

func wakeFromBeforeWaitCounts(t *testing.T, p pair) {
	_, wb, _, _ := channel(t, p)
	wb.Wake()
	wait(t, wb)
	quiet(t, wb, 20*time.Millisecond)
	done := make(chan error, 1)
	go func() { done <- wb.Wait(time.Time{}, true) }()
	wb.Wake()
	ends(t, done, nil, "Wake did not end Wait")
}

func waitKeepsItsDeadline(t *testing.T, p pair) {
	_, wb, a, _ := channel(t, p)
	if err := wb.Wait(time.Now().Add(-time.Second), true); !errors.Is(err, hypercall.ErrDeadlineExceeded) {
		t.Fatalf("a deadline that has passed: %v", err)
	}
	start := time.Now()
	quiet(t, wb, 30*time.Millisecond)
	if d := time.Since(start); d < 30*time.Millisecond {
		t.Fatalf("returned after %v", d)
	}
	// A deadline does not outlive its Wait.
	done := make(chan error, 1)
	go func() { done <- wb.Wait(time.Time{}, true) }()
	select {
	case err := <-done:
		t.Fatalf("Wait without a deadline ended: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	notify(t, a)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// nudgeEndsNoWait passes with a Waiter that is no Nudger.
func nudgeEndsNoWait(t *testing.T, p pair) {
	_, wb, a, _ := channel(t, p)
	n, ok := wb.(hypercall.Nudger)
	if !ok {
		return
	}
	nudge := func(d time.Duration) {
		for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(time.Millisecond) {
			n.Nudge()
		}
	}
	n.Nudge() // before Wait
	start, done := time.Now(), make(chan error, 1)
	go func() { done <- wb.Wait(start.Add(60*time.Millisecond), true) }()
	nudge(30 * time.Millisecond)
	ends(t, done, hypercall.ErrDeadlineExceeded, "a nudge took the deadline away")
	if d := time.Since(start); d < 60*time.Millisecond {
		t.Fatalf("ended after %v", d)
	}
	go func() { done <- wb.Wait(time.Time{}, true) }()
	nudge(20 * time.Millisecond)
	select {
	case err := <-done:
		t.Fatalf("a nudge ended Wait: %v", err)
	default:
	}
	notify(t, a)
	ends(t, done, nil, "no event after a nudge")
	if err := wb.Close(); err != nil {
		t.Fatal(err)
	}
	n.Nudge() // harmless
}

// CheckNudge fails the test unless a Wait of w that is nudged returns an event from before the nudge while another
// goroutine keeps the only processor busy: without the nudge Go's scheduler would look for the event ten
// milliseconds later. fire makes an event of w, which is there once fire returns. It sets GOMAXPROCS meanwhile.
func CheckNudge(t *testing.T, w hypercall.Nudger, fire func()) {
	t.Helper()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	const rounds = 20
	late := 0
	for range rounds {
		done := make(chan error, 1)
		go func() { done <- w.Wait(time.Now().Add(soon), true) }()
		time.Sleep(2 * time.Millisecond) // Wait has begun
		fire()
		const turns = 100 // together less than a millisecond
		for i := 0; i < turns && len(done) == 0; i++ {
			w.Nudge()
			runtime.Gosched()
		}
		if len(done) == 0 {
			late++ // on a busy machine the thread of Wait may not have returned from its system call
		}
		ends(t, done, nil, "no event")
	}
	if late > rounds/2 {
		t.Errorf("%d of %d events came late", late, rounds)
	}
}

func closeEndsWait(t *testing.T, p pair) {
	_, wb, a, b := channel(t, p)
	done := make(chan error, 1)
	go func() { done <- wb.Wait(time.Time{}, true) }()
	if err := wb.Close(); err != nil {
		t.Fatal(err)
	}
	closes(t, done)
	if err := wb.Close(); err != nil {
		t.Fatal("second Close:", err)
	}
	if err := wb.Wait(time.Time{}, true); !errors.Is(err, hypercall.ErrClosed) {
		t.Fatalf("Wait after Close: %v", err)
	}
	wb.Wake() // harmless
	if err := b.Close(); err != nil {
		t.Fatal("the port closed with its waiter:", err)
	}
	if err := b.Notify(); !errors.Is(err, hypercall.ErrClosed) {
		t.Fatalf("Notify of a closed port: %v", err)
	}
	if _, err := wb.Unbound(p.front.ID()); !errors.Is(err, hypercall.ErrClosed) {
		t.Fatalf("Unbound after Close: %v", err)
	}
	if _, err := wb.Bind(p.front.ID(), a.ID()); !errors.Is(err, hypercall.ErrClosed) {
		t.Fatalf("Bind after Close: %v", err)
	}
	notify(t, a) // the other end is closed: not an error
}

func peerMayGoSilently(t *testing.T, p pair) {
	wa, wb, a, b := channel(t, p)
	notify(t, a)
	notify(t, b)
	wait(t, wa)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal("second Close:", err)
	}
	quiet(t, wa, 20*time.Millisecond)
	notify(t, a)
	// The event pending on b may still arrive, but no other.
	_ = wb.Wait(time.Now().Add(20*time.Millisecond), true)
	quiet(t, wb, 20*time.Millisecond)
}

// reusedPortHearsNothingOld closes one end and opens ports until its number is in use again.
// The old far end must not reach the new port.
func reusedPortHearsNothingOld(t *testing.T, p pair) {
	_, _, a, b := channel(t, p)
	notify(t, a)
	old := b.ID()
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	w := waiter(t, p.back)
	for range 16 {
		n, err := w.Unbound(p.front.ID())
		if err != nil {
			t.Fatal(err)
		}
		if n.ID() == old {
			break
		}
	}
	_ = w.Wait(time.Now(), true) // an earlier event may be pending
	notify(t, a)
	quiet(t, w, 20*time.Millisecond)
}

// twoPorts makes a waiter of back with two ports, and consumes the events that binding leaves
// pending. far are the far ends.
func twoPorts(t testing.TB, p pair) (wb hypercall.Waiter, far []hypercall.Port) {
	t.Helper()
	wa, wb := waiter(t, p.front), waiter(t, p.back)
	for range 2 {
		a, err := wa.Unbound(p.back.ID())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := wb.Bind(p.front.ID(), a.ID()); err != nil {
			t.Fatal(err)
		}
		far = append(far, a)
	}
	wait(t, wb)
	for wb.Wait(time.Now().Add(20*time.Millisecond), true) == nil {
	}
	return wb, far
}

func twoPortsShareAWaiter(t *testing.T, p pair) {
	wb, far := twoPorts(t, p)
	for i := range 6 {
		notify(t, far[i%2])
		wait(t, wb)
	}
	// One port is masked while the other fires.
	notify(t, far[0])
	wait(t, wb)
	notify(t, far[1])
	wait(t, wb)
	if err := far[0].Close(); err != nil {
		t.Fatal(err)
	}
	notify(t, far[1])
	wait(t, wb)
}

// stormIsDelayedButNotWakeNorDeadline notifies as fast as it can, and calls Wait like a caller
// that finds no work.
func stormIsDelayedButNotWakeNorDeadline(t *testing.T, p pair) {
	_, wb, a, _ := channel(t, p)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				if a.Notify() != nil {
					return
				}
				time.Sleep(50 * time.Microsecond)
			}
		}
	}()
	defer func() { close(stop); <-stopped }()

	spurious := func() (woken int) {
		end := time.Now().Add(600 * time.Millisecond)
		for time.Now().Before(end) {
			if err := wb.Wait(end, false); err == nil {
				woken++
			} else if !errors.Is(err, hypercall.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
		}
		return woken
	}
	// The delays begin at 1 ms and double: nine of them end within half a second.
	if woken := spurious(); woken == 0 || woken > 20 {
		t.Errorf("a storm of 600 ms woke us %d times", woken)
	}

	// The tenth delay lasts until a second has passed. It must not delay a deadline, a Wake
	// or an event after useful work. One quick try of several is enough: a busy machine is late
	// now and then, but the delay would occur every time.
	const much = 300 * time.Millisecond
	quickest := func(what string, wait func(start time.Time) error) {
		t.Helper()
		best := soon
		for try := 0; try < 5 && best > much; try++ {
			if try > 0 {
				spurious() // until the delays are long again
			}
			start := time.Now()
			if err := wait(start); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			best = min(best, time.Since(start))
		}
		if best > much {
			t.Errorf("%s took %v", what, best)
		}
	}
	quickest("a deadline of 10 ms", func(start time.Time) error {
		for { // a pending event comes first
			if err := wb.Wait(start.Add(10*time.Millisecond), false); err != nil {
				if errors.Is(err, hypercall.ErrDeadlineExceeded) {
					return nil
				}
				return err
			}
		}
	})
	quickest("Wake", func(start time.Time) error {
		wb.Wake()
		return wb.Wait(start.Add(soon), false)
	})
	// Useful work ends the delay.
	quickest("an event after useful work", func(start time.Time) error { return wb.Wait(start.Add(soon), true) })
}

func spuriousEventsDelayTheirPort(t *testing.T, p pair) {
	wb, far := twoPorts(t, p)
	spuriousEventsDelay(t, far, func(deadline time.Time, worked bool) error { return wb.Wait(deadline, worked) })
}

// spuriousEventsDelay checks how long events are delayed that bring no work. far are the far
// ends of two ports of one waiter. next waits for the next event; worked says whether the last
// one brought work.
//
// A delay is never shorter than it must be. It may be longer on a busy machine, so where an
// event must come at once, one of several tries counts.
func spuriousEventsDelay(t *testing.T, far []hypercall.Port, next func(deadline time.Time, worked bool) error) {
	const free = 4 // spurious events in a row that delay nothing
	send := func(a hypercall.Port, worked bool) {
		t.Helper()
		notify(t, a)
		if err := next(time.Now().Add(soon), worked); err != nil {
			t.Fatal(err)
		}
	}
	best := soon
	for try := 0; try < 20 && best > 5*time.Millisecond; try++ {
		send(far[0], true)
		start := time.Now()
		for range free {
			send(far[0], false)
		}
		best = min(best, time.Since(start))
	}
	if best > 5*time.Millisecond { // delays of 1, 2 and 4 ms after the second are too many
		t.Errorf("the event after %d spurious ones came %v after the first", free, best)
	}

	best = soon
	held := false
	for try := 0; try < 5 && (best > 30*time.Millisecond || !held); try++ {
		send(far[0], true)
		start := time.Now()
		for range free + 6 {
			send(far[0], false)
		}
		if d := time.Since(start); d < 63*time.Millisecond { // 1 + 2 + ... + 32
			t.Errorf("the event after %d spurious ones came %v after the first", free+6, d)
		}
		// The port is delayed by 64 ms now. The other port has its own count.
		notify(t, far[0])
		start = time.Now()
		for range free {
			send(far[1], false)
		}
		best = min(best, time.Since(start))
		err := next(time.Now().Add(10*time.Millisecond), false)
		held = held || errors.Is(err, hypercall.ErrDeadlineExceeded)
		// Work of both resets both.
		notify(t, far[1])
		for next(time.Now().Add(20*time.Millisecond), true) == nil {
		}
	}
	if best > 30*time.Millisecond {
		t.Errorf("%d events of another port took %v", free, best)
	}
	if !held {
		t.Error("the event of a delayed port came with those of another")
	}
}

func notifyDoesNotAllocate(t *testing.T, p pair) {
	wa, wb, a, b := channel(t, p)
	deadline := time.Now().Add(soon)
	notify(t, b) // the first notification may look up the other end
	wait(t, wa)
	n := testing.AllocsPerRun(100, func() {
		deadline = deadline.Add(time.Millisecond)
		if a.Notify() != nil || wb.Wait(deadline, true) != nil ||
			b.Notify() != nil || wa.Wait(time.Time{}, true) != nil {
			t.Fatal("no round trip")
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// pingPong hangs if a wake-up is lost: each side parks until the other's event.
func pingPong(t *testing.T, p pair) {
	wa, wb, a, b := channel(t, p)
	const rounds = 5000
	deadline := time.Now().Add(time.Minute)
	echo := make(chan error, 1)
	go func() {
		for range rounds {
			if err := wb.Wait(deadline, true); err != nil {
				echo <- err
				return
			}
			if err := b.Notify(); err != nil {
				echo <- err
				return
			}
		}
		echo <- nil
	}()
	for i := range rounds {
		if err := a.Notify(); err != nil {
			t.Fatal(err)
		}
		if err := wa.Wait(deadline, true); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
	if err := <-echo; err != nil {
		t.Fatal(err)
	}
}

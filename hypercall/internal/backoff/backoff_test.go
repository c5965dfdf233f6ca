package backoff

import (
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"time"
)

type testPort struct {
	Port
	name string
}

// A testWaiter is a waiter whose clock the test sets.
type testWaiter struct {
	Masked[*testPort]
	now      time.Time
	unmasked []string
	err      error
}

func newTestWaiter() *testWaiter { return &testWaiter{now: time.Unix(1000, 0)} }

func (w *testWaiter) unmask(p *testPort) { w.unmasked = append(w.unmasked, p.name) }

// fire makes each port fire, and the wake-up bring work or none.
func (w *testWaiter) fire(t *testing.T, worked bool, ports ...*testPort) {
	t.Helper()
	for _, p := range ports {
		if !w.Fire(p) {
			t.Fatalf("%s is masked", p.name)
		}
		if w.Fire(p) {
			t.Fatalf("%s fired while it was masked", p.name)
		}
	}
	if !slices.Equal(w.Fired(), ports) {
		t.Fatalf("%d ports fired, not %d", len(w.Fired()), len(ports))
	}
	w.Settle(worked, w.now, w.unmask)
	if len(w.Fired()) > 0 {
		t.Fatal("ports fired after Settle")
	}
}

func (w *testWaiter) UnmaskDue(now time.Time) error {
	w.Masked.UnmaskDue(now, w.unmask)
	return w.err
}

// after moves the clock and unmasks the ports that are due.
func (w *testWaiter) after(d time.Duration) {
	w.now = w.now.Add(d)
	_ = w.UnmaskDue(w.now)
}

func (w *testWaiter) want(t *testing.T, names ...string) {
	t.Helper()
	if !slices.Equal(w.unmasked, names) {
		t.Fatalf("unmasked %q, not %q", w.unmasked, names)
	}
	w.unmasked = nil
}

// storm makes p late: it stays masked for 1 ms.
func (w *testWaiter) storm(t *testing.T, p *testPort) {
	t.Helper()
	for range Free {
		w.fire(t, false, p)
		w.want(t, p.name)
	}
	w.fire(t, false, p)
	w.want(t)
}

func TestDelayIsBounded(t *testing.T) {
	var last time.Duration
	for n := range 256 {
		d := delay(uint8(n))
		if d < last || d > maxDelay || (d > 0) != (n > Free) {
			t.Errorf("after %d: %v", n, d)
		}
		last = d
	}
	if last != maxDelay {
		t.Errorf("never more than %v", last)
	}
}

func TestDelayDoublesUpToASecond(t *testing.T) {
	w, p := newTestWaiter(), &testPort{name: "a"}
	w.storm(t, p)
	for _, ms := range []time.Duration{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000, 1000} {
		due := w.now.Add(ms * time.Millisecond)
		if next := w.Next(time.Time{}); !next.Equal(due) || !w.Late() {
			t.Fatalf("due at %v, not %v", next, due)
		}
		w.after(ms*time.Millisecond - 1)
		w.want(t)
		w.after(1)
		w.want(t, "a")
		if w.Late() || !w.Next(time.Time{}).IsZero() {
			t.Fatal("late after it was due")
		}
		w.fire(t, false, p)
		w.want(t)
	}
	for range 300 { // the count does not wrap
		w.after(time.Second)
		w.want(t, "a")
		w.fire(t, false, p)
		w.want(t)
	}
}

func TestOnlyThePortThatFiresForNothingIsLate(t *testing.T) {
	w, a, b := newTestWaiter(), &testPort{name: "a"}, &testPort{name: "b"}
	w.storm(t, a)
	for range Free {
		w.fire(t, false, b)
		w.want(t, "b")
	}
	w.after(time.Millisecond)
	w.want(t, "a")
	w.fire(t, false, a, b) // both are late now: a for 2 ms, b for 1 ms
	w.want(t)
	w.after(time.Millisecond)
	w.want(t, "b")
	w.after(time.Millisecond)
	w.want(t, "a")
}

func TestWorkUnmasksAllButResetsOnlyItsOwnPort(t *testing.T) {
	w, a, b := newTestWaiter(), &testPort{name: "a"}, &testPort{name: "b"}
	w.storm(t, a)
	w.fire(t, true, b)
	w.want(t, "b", "a")
	w.fire(t, false, a) // late again: the work was that of b
	w.want(t)
	w.Settle(true, time.Time{}, w.unmask) // work without an event
	w.want(t, "a")
	w.fire(t, true, a)
	w.want(t, "a")
	w.storm(t, a)
}

func TestWakeUpsWithoutAnEventChangeNothing(t *testing.T) {
	w, a := newTestWaiter(), &testPort{name: "a"}
	w.storm(t, a)
	for range 10 {
		w.Settle(false, w.now, w.unmask)
	}
	w.want(t)
	w.now = w.now.Add(time.Millisecond)
	w.Settle(false, w.now, w.unmask) // unmasks what is due
	w.want(t, "a")
	w.fire(t, false, a)
	if next := w.Next(time.Time{}); !next.Equal(w.now.Add(2 * time.Millisecond)) {
		t.Errorf("late for %v", next.Sub(w.now))
	}
}

func TestNextIsTheEarliest(t *testing.T) {
	w, a, b := newTestWaiter(), &testPort{name: "a"}, &testPort{name: "b"}
	soon, later := w.now.Add(time.Microsecond), w.now.Add(time.Hour)
	if !w.Next(time.Time{}).IsZero() || !w.Next(later).Equal(later) {
		t.Error("a deadline without a late port")
	}
	w.storm(t, a)
	w.after(time.Millisecond)
	w.want(t, "a")
	w.fire(t, false, a) // for 2 ms
	w.storm(t, b)
	due := w.now.Add(time.Millisecond)
	for deadline, want := range map[time.Time]time.Time{{}: due, soon: soon, later: due} {
		if got := w.Next(deadline); !got.Equal(want) {
			t.Errorf("deadline %v: %v, not %v", deadline, got, want)
		}
	}
}

func TestRemovedPortIsNeverUnmasked(t *testing.T) {
	w, a, b, c := newTestWaiter(), &testPort{name: "a"}, &testPort{name: "b"}, &testPort{name: "c"}
	w.storm(t, a)
	w.Fire(b)
	w.Fire(c)
	w.Remove(a)
	w.Remove(b)
	w.Settle(true, time.Time{}, w.unmask)
	w.after(time.Hour)
	w.want(t, "c")
}

func TestMaskedDoesNotAllocate(t *testing.T) {
	var w Masked[*testPort]
	a, b := new(testPort), new(testPort)
	w.Grow(2)
	now, n := time.Now(), 0
	unmask := func(*testPort) { n++ }
	if got := testing.AllocsPerRun(100, func() {
		w.Fire(a)
		w.Fire(b)
		w.Settle(false, now, unmask)
		now = w.Next(now)
		w.UnmaskDue(now.Add(time.Hour), unmask)
	}); got != 0 {
		t.Errorf("%v allocations", got)
	}
	if n != 202 {
		t.Errorf("unmasked %d times", n)
	}
}

func TestWaitersWithLatePorts(t *testing.T) {
	var l Waiters[*testWaiter]
	w, v := newTestWaiter(), newTestWaiter()
	a, b := &testPort{name: "a"}, &testPort{name: "b"}
	if l.Add(w) || l.Late() || !l.Next(time.Time{}).IsZero() {
		t.Error("a waiter without late ports was added")
	}
	w.storm(t, a)
	v.storm(t, b)
	v.after(time.Millisecond)
	v.want(t, "b")
	v.fire(t, false, b) // for 2 ms, from now.Add(time.Millisecond)
	// Adding one twice does no harm.
	for _, added := range []*testWaiter{w, w, v} {
		if !l.Add(added) || !l.Late() {
			t.Error("a waiter with a late port was not added")
		}
	}
	start := w.now
	if next := l.Next(time.Time{}); !next.Equal(start.Add(time.Millisecond)) {
		t.Errorf("due after %v", next.Sub(start))
	}
	if err := l.UnmaskDue(start.Add(time.Millisecond)); err != nil {
		t.Error(err)
	}
	w.want(t, "a")
	v.want(t)
	if next := l.Next(time.Time{}); !l.Late() || !next.Equal(start.Add(3*time.Millisecond)) {
		t.Errorf("due after %v", next.Sub(start))
	}
	v.err = net.ErrClosed // it is being closed: not an error of the group
	if err := l.UnmaskDue(start); err != nil {
		t.Error(err)
	}
	v.err = io.ErrUnexpectedEOF
	if err := l.UnmaskDue(start); !errors.Is(err, v.err) {
		t.Errorf("%v, want %v", err, v.err)
	}
	l.Remove(v)
	if l.Late() {
		t.Error("a removed waiter is there")
	}
	_ = l.UnmaskDue(start.Add(time.Hour))
	v.want(t)
}

package domaintest

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"barevif/hypercall"
)

// groupCases are checked on groups of either kind.
var groupCases = []struct {
	name string
	f    func(*testing.T, pair, bool)
}{
	{"TellsWhoseEventItIs", groupTellsWhoseEventItIs},
	{"EventsFromBeforeAddCount", eventsFromBeforeAddCount},
	{"FiredWaiterIsToldOfOnceUntilRearm", firedWaiterIsToldOfOnceUntilRearm},
	{"RemovedWaiterIsWaitedForByItself", removedWaiterIsWaitedForByItself},
	{"EventOfAnEarlierWaitIsRearmed", eventOfAnEarlierWaitIsRearmed},
	{"ToldBeforeRemoveIsToldAgain", toldBeforeRemoveIsToldAgain},
	{"ClosedWaiterLeavesItsGroup", closedWaiterLeavesItsGroup},
	{"OneTagAndOneGroupEach", oneTagAndOneGroupEach},
	{"KeepsDeadlineAndWake", groupKeepsDeadlineAndWake},
	{"CloseEndsWait", closeEndsGroupWait},
	{"DelaysSpuriousEventsOfOneWaiterOnly", groupDelaysSpuriousEventsOfOneWaiterOnly},
	{"SpuriousEventsDelayTheirPort", groupSpuriousEventsDelayTheirPort},
	{"DelayedEventComesInAnotherGroup", delayedEventComesInAnotherGroup},
	{"ManyEventsComeInParts", manyEventsComeInParts},
	{"DoesNotAllocate", groupDoesNotAllocate},
	{"LosesNoEvent", groupLosesNoEvent},
}

// groupsOf is the cases on groups of one kind.
func groupsOf(onThread bool) (cases []suiteCase) {
	for _, c := range groupCases {
		cases = append(cases, suiteCase{c.name, func(t *testing.T, p pair) { c.f(t, p, onThread) }})
	}
	return cases
}

// group makes a Group of d, for a goroutine that is locked to its thread if onThread.
func group(t testing.TB, d hypercall.Domain, onThread bool) hypercall.Group {
	t.Helper()
	if o, ok := d.(blockingDomain); ok {
		d = o.ThreadDomain
	}
	gd, ok := d.(hypercall.GroupDomain)
	if !ok {
		t.Fatalf("a %T has no groups", d)
	}
	g, err := gd.Group(onThread)
	if errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	atEnd(t, "Close", g.Close)
	return g
}

// members makes a group of n waiters of back, each with one port. far are the far ends of
// these ports.
func members(t testing.TB, p pair, n int, onThread bool) (g hypercall.Group, ws []hypercall.Waiter, far []hypercall.Port) {
	t.Helper()
	g = group(t, p.back, onThread)
	for i := range n {
		_, w, a, _ := channel(t, p)
		// A Wait unmasks the port, which the channel's first event has masked.
		quiet(t, w, time.Millisecond)
		if err := g.Add(w, i*3); err != nil {
			t.Fatal("Add:", err)
		}
		ws, far = append(ws, w), append(far, a)
	}
	return g, ws, far
}

// told fails unless the group's Wait returns these tags, and no others for a moment.
func told(t testing.TB, g hypercall.Group, want ...int) {
	t.Helper()
	var got []int
	var tags [8]int
	for end := time.Now().Add(soon); len(got) < len(want); {
		n, err := g.Wait(tags[:], end)
		if err != nil {
			t.Fatalf("Wait: %v; told of %v, want %v", err, got, want)
		}
		got = append(got, tags[:n]...)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Fatalf("told of %v, want %v", got, want)
	}
	calm(t, g)
}

// calm fails if the group's Wait returns any tag.
func calm(t testing.TB, g hypercall.Group) {
	t.Helper()
	var tags [8]int
	for end := time.Now().Add(10 * time.Millisecond); ; {
		n, err := g.Wait(tags[:], end)
		if errors.Is(err, hypercall.ErrDeadlineExceeded) {
			return
		}
		if n > 0 || err != nil {
			t.Fatalf("Wait without an event: %v, %v", tags[:n], err)
		}
	}
}

func rearm(t testing.TB, g hypercall.Group, w hypercall.Waiter, worked bool) {
	t.Helper()
	if err := g.Rearm(w, worked); err != nil {
		t.Fatal("Rearm:", err)
	}
}

func groupTellsWhoseEventItIs(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 5, onThread)
	calm(t, g)
	notify(t, far[3])
	told(t, g, 9)
	rearm(t, g, ws[3], true)
	calm(t, g)
	notify(t, far[1])
	notify(t, far[4])
	notify(t, far[4])
	told(t, g, 3, 12)
	var tags [8]int
	if n, err := g.Poll(tags[:]); n != 0 || err != nil {
		t.Fatalf("Poll without an event: %d, %v", n, err)
	}
	notify(t, far[0])
	for end := time.Now().Add(soon); ; {
		n, err := g.Poll(tags[:])
		if n == 1 && tags[0] == 0 && err == nil {
			break
		}
		if n > 0 || err != nil || time.Now().After(end) {
			t.Fatalf("Poll: %v, %v", tags[:n], err)
		}
	}
}

func eventsFromBeforeAddCount(t *testing.T, p pair, onThread bool) {
	_, w, a, _ := channel(t, p)
	quiet(t, w, time.Millisecond)
	notify(t, a)
	g := group(t, p.back, onThread)
	if err := g.Add(w, hypercall.MaxTag); err != nil {
		t.Fatal(err)
	}
	told(t, g, hypercall.MaxTag)
}

func firedWaiterIsToldOfOnceUntilRearm(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 2, onThread)
	notify(t, far[0])
	told(t, g, 0)
	notify(t, far[0])
	notify(t, far[1])
	told(t, g, 3)
	rearm(t, g, ws[0], true) // the event that came before Rearm counts
	told(t, g, 0)
	rearm(t, g, ws[0], true)
	rearm(t, g, ws[0], true)
	calm(t, g)
}

func removedWaiterIsWaitedForByItself(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 2, onThread)
	g.Remove(ws[0])
	g.Remove(ws[0])
	notify(t, far[0])
	calm(t, g)
	wait(t, ws[0])
	rearm(t, g, ws[0], true) // no effect: the waiter was removed
	// Remove a waiter that fired and was not rearmed.
	notify(t, far[1])
	told(t, g, 3)
	g.Remove(ws[1])
	notify(t, far[1])
	wait(t, ws[1])
	// Add it again, with the first waiter's tag.
	if err := g.Add(ws[1], 0); err != nil {
		t.Fatal(err)
	}
	rearm(t, g, ws[1], true)
	notify(t, far[1])
	told(t, g, 0)
}

// An event that the waiter's own Wait returned leaves its port masked. Rearm unmasks it, as another Wait would.
func eventOfAnEarlierWaitIsRearmed(t *testing.T, p pair, onThread bool) {
	g := group(t, p.back, onThread)
	_, w, far, _ := channel(t, p)
	quiet(t, w, time.Millisecond)
	notify(t, far)
	wait(t, w)
	if err := g.Add(w, 1); err != nil {
		t.Fatal(err)
	}
	rearm(t, g, w, true)
	notify(t, far)
	told(t, g, 1)
}

// A waiter that left its group without Rearm, and waited by itself, is told of once it is added again.
func toldBeforeRemoveIsToldAgain(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 1, onThread)
	notify(t, far[0])
	told(t, g, 0)
	g.Remove(ws[0])
	quiet(t, ws[0], time.Millisecond)
	if err := g.Add(ws[0], 0); err != nil {
		t.Fatal(err)
	}
	notify(t, far[0])
	told(t, g, 0)
}

func closedWaiterLeavesItsGroup(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 2, onThread)
	notify(t, far[0])
	if err := ws[0].Close(); err != nil {
		t.Fatal(err)
	}
	notify(t, far[0])
	calm(t, g)
	_, w, a, _ := channel(t, p)
	quiet(t, w, time.Millisecond)
	if err := g.Add(w, 0); err != nil {
		t.Fatal("its tag is not free:", err)
	}
	notify(t, a)
	told(t, g, 0)
	if err := g.Add(ws[0], 1); !errors.Is(err, hypercall.ErrClosed) {
		t.Fatalf("a closed waiter: %v", err)
	}
}

func oneTagAndOneGroupEach(t *testing.T, p pair, onThread bool) {
	g, ws, _ := members(t, p, 1, onThread)
	other := group(t, p.back, onThread)
	free := waiter(t, p.back)
	for _, err := range []error{g.Add(ws[0], 1), other.Add(ws[0], 1), g.Add(free, 0)} {
		if !errors.Is(err, hypercall.ErrGrouped) {
			t.Errorf("%v, want %v", err, hypercall.ErrGrouped)
		}
	}
	for _, tag := range []int{-1, hypercall.MaxTag + 1} {
		if g.Add(free, tag) == nil {
			t.Errorf("tag %d was taken", tag)
		}
	}
	if err := other.Add(free, 1); err != nil {
		t.Error(err)
	}
	other.Remove(ws[0]) // no effect: the waiter is in the first group
	if err := other.Add(ws[0], 2); !errors.Is(err, hypercall.ErrGrouped) {
		t.Errorf("after another group's Remove: %v", err)
	}
}

func groupKeepsDeadlineAndWake(t *testing.T, p pair, onThread bool) {
	g, _, far := members(t, p, 1, onThread)
	var tags [1]int
	start := time.Now()
	if _, err := g.Wait(tags[:], start.Add(30*time.Millisecond)); !errors.Is(err, hypercall.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	if d := time.Since(start); d < 30*time.Millisecond {
		t.Fatalf("returned after %v", d)
	}
	if _, err := g.Wait(tags[:], start); !errors.Is(err, hypercall.ErrDeadlineExceeded) {
		t.Fatalf("a deadline that has passed: %v", err)
	}
	g.Wake()
	if n, err := g.Wait(tags[:], time.Now().Add(soon)); n != 0 || err != nil {
		t.Fatalf("after Wake: %d, %v", n, err)
	}
	calm(t, g)
	done := make(chan error, 1)
	go func() {
		n, err := g.Wait(tags[:], time.Time{})
		if err == nil && n != 0 {
			err = errors.New("told of an event")
		}
		done <- err
	}()
	time.Sleep(5 * time.Millisecond)
	g.Wake()
	ends(t, done, nil, "Wake did not end Wait")
	notify(t, far[0])
	told(t, g, 0)
}

func closeEndsGroupWait(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 1, onThread)
	done := make(chan error, 1)
	go func() {
		_, err := g.Wait(make([]int, 1), time.Time{})
		done <- err
	}()
	time.Sleep(5 * time.Millisecond)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	closes(t, done)
	if _, err := g.Poll(make([]int, 1)); !errors.Is(err, hypercall.ErrClosed) {
		t.Fatalf("Poll: %v", err)
	}
	if err := g.Add(ws[0], 0); !errors.Is(err, hypercall.ErrClosed) {
		t.Fatalf("Add: %v", err)
	}
	g.Wake()
	notify(t, far[0])
	wait(t, ws[0]) // the waiter has left the group
}

func groupDelaysSpuriousEventsOfOneWaiterOnly(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 2, onThread)
	var tags [2]int
	spurious := 0
	for end := time.Now().Add(300 * time.Millisecond); time.Now().Before(end); {
		notify(t, far[0])
		n, err := g.Wait(tags[:], time.Now().Add(time.Millisecond))
		if err != nil && !errors.Is(err, hypercall.ErrDeadlineExceeded) {
			t.Fatal(err)
		}
		for range tags[:n] {
			spurious++
			rearm(t, g, ws[0], false)
		}
	}
	if spurious < 2 || spurious > 20 {
		t.Errorf("a storm of 300 ms was told of %d times", spurious)
	}
	// The delay of one waiter does not delay events of the other. The quickest of several
	// tries counts: a busy machine is late now and then.
	best := soon
	for range 5 {
		start := time.Now()
		notify(t, far[1])
		for n := 0; n == 0 || tags[0] != 3; {
			var err error
			if n, err = g.Wait(tags[:1], start.Add(soon)); err != nil {
				t.Fatal(err)
			}
			if n > 0 && tags[0] == 0 {
				rearm(t, g, ws[0], false)
			}
		}
		rearm(t, g, ws[1], true)
		best = min(best, time.Since(start))
	}
	if best > 100*time.Millisecond {
		t.Errorf("another's event took %v", best)
	}
	// The delayed event arrives in the end.
	notify(t, far[0])
	for n := 0; n == 0; {
		var err error
		if n, err = g.Wait(tags[:], time.Now().Add(soon)); err != nil {
			t.Fatal(err)
		}
	}
}

func groupSpuriousEventsDelayTheirPort(t *testing.T, p pair, onThread bool) {
	w, far := twoPorts(t, p)
	g := group(t, p.back, onThread)
	if err := g.Add(w, 1); err != nil {
		t.Fatal(err)
	}
	var tags [1]int
	fired := false
	spuriousEventsDelay(t, far, func(deadline time.Time, worked bool) error {
		if fired {
			rearm(t, g, w, worked)
		}
		n, err := g.Wait(tags[:], deadline)
		fired = n > 0
		return err
	})
}

func delayedEventComesInAnotherGroup(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 1, onThread)
	var tags [1]int
	for range 8 { // until the delay is some milliseconds
		notify(t, far[0])
		if n, err := g.Wait(tags[:], time.Now().Add(soon)); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		rearm(t, g, ws[0], false)
	}
	g.Remove(ws[0])
	other := group(t, p.back, onThread)
	if err := other.Add(ws[0], 5); err != nil {
		t.Fatal(err)
	}
	notify(t, far[0])
	if n, err := other.Wait(tags[:], time.Now().Add(soon)); n != 1 || tags[0] != 5 || err != nil {
		t.Fatal(n, err)
	}
}

func manyEventsComeInParts(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 10, onThread)
	for _, a := range far {
		notify(t, a)
	}
	seen := map[int]int{}
	var tags [3]int
	for len(seen) < len(ws) {
		n, err := g.Wait(tags[:], time.Now().Add(soon))
		if err != nil {
			t.Fatalf("%v, after %v", err, seen)
		}
		for _, tag := range tags[:n] {
			if seen[tag]++; seen[tag] > 1 {
				t.Fatalf("told of %d again", tag)
			}
		}
	}
}

func groupDoesNotAllocate(t *testing.T, p pair, onThread bool) {
	g, ws, far := members(t, p, 2, onThread)
	var tags [2]int
	deadline := time.Now().Add(soon)
	round := func() {
		notify(t, far[1])
		if n, err := g.Wait(tags[:], deadline); n != 1 || err != nil {
			t.Fatal("no event:", n, err)
		}
		if _, err := g.Poll(tags[:]); err != nil {
			t.Fatal(err)
		}
		rearm(t, g, ws[1], true)
	}
	round()
	if n := testing.AllocsPerRun(100, round); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// groupLosesNoEvent hangs if an event is lost: each far end waits for an answer to its event
// before it sends the next one.
func groupLosesNoEvent(t *testing.T, p pair, onThread bool) {
	const n, rounds = 4, 1000
	g := group(t, p.back, onThread)
	var near []hypercall.Port
	var ws []hypercall.Waiter
	var senders sync.WaitGroup
	stop := time.Now().Add(soon)
	errs := make(chan error, n)
	for i := range n {
		wa, wb, a, b := channel(t, p)
		quiet(t, wb, time.Millisecond)
		if err := g.Add(wb, i); err != nil {
			t.Fatal(err)
		}
		ws, near = append(ws, wb), append(near, b)
		senders.Go(func() {
			for range rounds {
				err := a.Notify()
				if err == nil {
					err = wa.Wait(stop, true)
				}
				if err != nil {
					errs <- err
					return
				}
			}
		})
	}
	var tags [n]int
	for answered := 0; answered < n*rounds; {
		k, err := g.Wait(tags[:], stop)
		if err != nil {
			t.Fatalf("after %d answers: %v", answered, err)
		}
		for _, tag := range tags[:k] {
			rearm(t, g, ws[tag], true)
			notify(t, near[tag])
			answered++
		}
	}
	senders.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
}

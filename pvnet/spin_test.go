package pvnet

import (
	"testing"
	"time"
)

// A lateRing is ready after a given number of looks.
type lateRing struct {
	engine
	after, looks int
}

func (r *lateRing) ready(int) bool {
	r.looks++
	return r.looks > r.after
}

// testLook is the cost of one look in these tests.
const testLook = 10 * time.Nanosecond

func adaptive() *spinner {
	s := new(spinner)
	s.setCost(1024 * testLook)
	return s
}

// wait makes s wait for a frame that comes after looked if s looks, and after parked if
// it parks at once. It reports whether a look found the frame.
func wait(t *testing.T, s *spinner, looked, parked time.Duration) (found bool) {
	t.Helper()
	h := &half{}
	h.gate.state.Store(gateBusy)
	r := &lateRing{after: int(looked / testLook)}
	if s.spin(h, r, 1) {
		return true
	}
	if r.looks > 0 {
		parked = looked - lookTime // the wait after the looks
	}
	if parked > 0 {
		s.ended(parked)
	}
	return false
}

// share returns how many of n waits ended with a look, in percent.
func share(t *testing.T, s *spinner, n int, looked, parked time.Duration) int {
	t.Helper()
	found := 0
	for range n {
		if wait(t, s, looked, parked) {
			found++
		}
	}
	return found * 100 / max(n, 1)
}

const us = time.Microsecond

func TestAdaptiveTakesTheFasterWay(t *testing.T) {
	for _, tt := range []struct {
		name           string
		looked, parked time.Duration
		least, most    int // percent of the waits that end with a look
	}{
		{"frames come at once", 1 * us, 25 * us, 95, 100},
		{"the peer wakes up first", 30 * us, 55 * us, 95, 100},
		{"no faster, but cheaper than a wake-up", 10 * us, 10 * us, 95, 100},
		{"no faster, and dearer than a wake-up", 50 * us, 50 * us, 0, 5},
		{"who looks is in the way of who sends", 90 * us, 50 * us, 0, 5},
		{"the same, with short waits", 18 * us, 10 * us, 0, 5},
		{"frames come later than looking lasts", 300 * us, 300 * us, 0, 0},
		{"no wait sleeps at all", 1 * us, 0, 0, 100},
	} {
		s := adaptive()
		share(t, s, 100, tt.looked, tt.parked)
		if got := share(t, s, 10000, tt.looked, tt.parked); got < tt.least || got > tt.most {
			t.Errorf("%s: looks end %d %% of the waits, want %d to %d", tt.name, got, tt.least, tt.most)
		}
	}
}

func TestAdaptiveFollowsWhatChanges(t *testing.T) {
	s := adaptive()
	for range 3 {
		share(t, s, 200, 900*us, 900*us)
		r := &lateRing{after: 1 << 30}
		h := &half{}
		h.gate.state.Store(gateBusy)
		for range 1000 { // frames come rarely
			if s.spin(h, r, 1) {
				t.Fatal("found what was not there")
			}
			s.ended(900 * us)
		}
		if most := 1000 * int(lookTime/testLook) / 30; r.looks > most {
			t.Errorf("%d looks in 1000 waits for what comes late, at most %d", r.looks, most)
		}
		// Frames come quickly again. At least every 64th wait looks.
		if i := waitsUntil(t, s, 2*us, 50*us); i > 400 {
			t.Errorf("%d waits until looking was seen to pay", i)
		}
		if got := share(t, s, 1000, 2*us, 50*us); got < 95 {
			t.Errorf("looks end %d %% of the waits", got)
		}
	}
}

// waitsUntil returns how many waits there are until three in a row end with a look.
func waitsUntil(t *testing.T, s *spinner, looked, parked time.Duration) (n int) {
	t.Helper()
	for row := 0; row < 3 && n < 1_000_000; n++ {
		if row++; !wait(t, s, looked, parked) {
			row = 0
		}
	}
	return n
}

func TestAdaptiveForgetsPauses(t *testing.T) {
	s := adaptive()
	share(t, s, 1000, 2*us, 50*us)
	for range 100 {
		wait(t, s, time.Second, time.Second)
		if got := share(t, s, 9, 2*us, 50*us); got < 70 { // 9 waits: one may be a trial, one after it
			t.Fatalf("after a pause looks end %d %% of the waits", got)
		}
	}
}

// Two ends that both park would see each other's wake-ups for ever if the looks did not
// last longer than a wake-up.
func TestAdaptivePingPongGetsGoing(t *testing.T) {
	const wakeUp, turn = 40 * us, us
	for _, start := range [][2]int{{0, 0}, {1, 0}, {500, 0}} {
		ends := [2]*spinner{adaptive(), adaptive()}
		for i, s := range ends {
			share(t, s, start[i], 300*us, 300*us)
		}
		// The two ends wait in turn, and each wait ends after the wait of the other end
		// before it.
		h := &half{}
		h.gate.state.Store(gateBusy)
		asleep := false // the waiting end is parked
		trips, quick := 0, 0
		for ; quick < 100 && trips < 20000; trips++ {
			s := ends[trips%2]
			took := turn // until the frame comes
			if asleep {
				took += wakeUp
			}
			asleep = !s.spin(h, &lateRing{after: int(took / testLook)}, 1)
			if asleep {
				s.ended(took + wakeUp)
				quick = 0
			} else {
				quick++
			}
		}
		if trips > 1000 {
			t.Errorf("after %v waits for what came late: not going after %d turns", start, trips)
		}
	}
}

func TestParkNeverLooks(t *testing.T) {
	var s spinner
	r := &lateRing{}
	if s.spin(&half{}, r, 1) || r.looks != 0 || s.measures() {
		t.Errorf("%d looks", r.looks)
	}
}

func TestBusyLooksUntilTheGateCloses(t *testing.T) {
	h := &half{}
	h.gate.state.Store(gateBusy)
	s := spinner{most: -1, cost: 1024 * testLook}
	r := &lateRing{after: 3 * mostYield}
	if !s.spin(h, r, 1) {
		t.Error("gave up")
	}
	h.gate.state.Store(gateClosing)
	*r = lateRing{after: 1 << 30}
	if s.spin(h, r, 1) || r.looks > mostYield+1 {
		t.Errorf("%d looks behind a gate that closes", r.looks)
	}
}

func TestYieldsTakeASmallShare(t *testing.T) {
	for _, tt := range []struct {
		yield time.Duration
		want  int // looks
	}{
		{0, leastYield},
		{200 * time.Nanosecond, 160},
		{3 * us, 2400},
		{50 * us, mostYield},
	} {
		s := adaptive()
		for range 3 {
			if tt.yield > 0 {
				s.yielded(tt.yield)
			}
		}
		if got := s.yieldEvery(); got < tt.want || got > tt.want*21/20 {
			t.Errorf("yields of %v: every %d looks, want %d", tt.yield, got, tt.want)
		}
	}
	// Yields to busy goroutines do not raise the estimated cost; a lock to a thread does
	// in the end.
	s := adaptive()
	s.yielded(200 * time.Nanosecond)
	for range 20 {
		s.yielded(100 * us)
	}
	if got := s.yieldEvery(); got > 200 {
		t.Errorf("every %d looks, since others had work", got)
	}
	for range 2000 {
		s.yielded(5 * us)
	}
	if got := s.yieldEvery(); got != 4000 {
		t.Errorf("every %d looks on a goroutine that was locked to its thread", got)
	}
}

func TestALookOfNoTimeIsShort(t *testing.T) {
	s := new(spinner)
	s.setCost(0) // a coarse clock measured 0
	if s.most <= 0 || s.yieldEvery() != leastYield {
		t.Errorf("%d looks, a yield every %d", s.most, s.yieldEvery())
	}
}

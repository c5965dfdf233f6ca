package pvnet

import (
	"runtime"
	"time"
)

// WaitMode is how a call waits.
type WaitMode uint8

const (
	// Park waits for an event without looking first: an idle device costs no CPU time.
	Park WaitMode = iota
	// Adaptive looks at the ring for up to some 100 us before it parks, as long as its
	// waits are shorter that way than with parking at once. It tries the other way now
	// and then. If looking does not pay, because frames come later or because the sender
	// needs this CPU, it nearly always parks at once.
	Adaptive
	// Busy never parks: it looks at the ring until there is work, and occupies a CPU.
	Busy
)

const (
	// lookTime is how long Adaptive looks. It is longer than the wake-up of a parked
	// peer: if only this end looks, each wait still contains the wake-up of the other
	// end.
	lookTime = 100 * time.Microsecond

	// wakeTime is how long an idle CPU takes to wake up. Looking for a shorter time is
	// cheaper than parking, even if the frame comes no sooner.
	wakeTime = 20 * time.Microsecond

	// longWait is the longest wait that counts; a longer one is a pause of the traffic,
	// and counts as this.
	longWait = time.Millisecond

	// trialEvery is the least number of waits between two trials, which are waits in the
	// way that is not the usual one.
	trialEvery = 64

	// firstWaits is how many waits each way gets before one is chosen. The shortest of
	// them counts, since traffic starts with pauses.
	firstWaits = 4

	// maxRarity bounds how much rarer trials become if the other way is far slower.
	maxRarity = 1024
)

// A long series of looks yields to other goroutines now and then, and checks whether the
// caller must leave. Yields take about an eighth of the time, but there are at least
// leastYield and at most mostYield looks between two of them: some 0.2 and 10 us. A yield
// costs several microseconds in a goroutine that is locked to its thread, and a tenth of
// that in others. If both ends run on one processor, the other end cannot answer before
// this one yields.
const (
	leastYield = 64
	mostYield  = 4096
	yieldShare = 8
)

// The two ways to wait: Adaptive chooses one for each wait.
const (
	parking = iota
	looking
)

// A spinTarget is what a spinner looks at: ready reports whether there is a frame, or room
// for need slots.
type spinTarget interface{ ready(need int) bool }

// A spinCaller is the caller on whose behalf a spinner looks. mustLeave reports whether it
// must stop.
type spinCaller interface{ mustLeave() bool }

// A spinner looks at the ring before its half parks, or at the rings of a Poller's
// members. It measures time in looks, whose cost it knows, so it does not read the clock
// while it finds frames. It reads the clock when the connection comes up, around a yield
// and, in Adaptive, around a park.
type spinner struct {
	most  int           // looks before parking; negative: no limit; 0: Park
	cost  time.Duration // of 1024 looks
	yield time.Duration // the least cost of a yield

	// For Adaptive only.
	usual   int              // the way that most waits go
	way     int              // the way of the present wait
	left    int              // waits until the other way is tried
	seen    [2]uint8         // by way: how many waits there were, up to firstWaits
	typical [2]time.Duration // by way: roughly the median time of a wait
	looked  time.Duration    // time spent on looks in the present wait
	open    bool             // the end of the present wait has not been seen
}

// calibrate measures what looks at e cost and sets how many of them the mode allows.
func (s *spinner) calibrate(m WaitMode, e spinTarget) {
	*s = spinner{}
	if m == Park {
		return
	}
	const looks = 256
	best := time.Duration(1 << 62)
	for range 8 { // the fastest of these was not interrupted
		start := time.Now()
		for range looks {
			e.ready(maxFrameBuffers)
		}
		best = min(best, time.Since(start))
	}
	s.setCost(best * 1024 / looks)
	if m == Busy {
		s.most = -1
	}
}

// setCost makes s adaptive. cost is the time of 1024 looks.
func (s *spinner) setCost(cost time.Duration) {
	cost = max(cost, 1) // a coarse clock may have measured 0
	*s = spinner{most: int(lookTime * 1024 / cost), cost: cost, left: 1}
}

// spin looks at e on behalf of h, for as long as the mode says, and reports whether e is
// ready.
func (s *spinner) spin(h spinCaller, e spinTarget, need int) bool {
	switch {
	case s.most == 0:
		return false
	case s.most < 0:
		ready, _ := s.look(h, e, need, s.most)
		return ready
	}
	if s.open { // the last wait ended without a park
		s.ended(0)
	}
	s.open, s.looked, s.way = true, 0, s.usual
	if s.left <= 0 {
		s.way = 1 - s.usual
	}
	s.left--
	if s.way == parking {
		return false
	}
	ready, looks := s.look(h, e, need, s.most)
	s.looked = time.Duration(looks) * s.cost / 1024
	if ready {
		s.ended(0)
	}
	return ready
}

// always reports whether the caller never parks.
func (s *spinner) always() bool { return s.most < 0 }

// measures reports whether the caller has to measure parks for ended.
func (s *spinner) measures() bool { return s.most > 0 }

// ended records that the present wait is over, of which parked was spent in a park, and
// chooses the way of the next waits.
func (s *spinner) ended(parked time.Duration) {
	s.open = false
	d := min(s.looked+parked, longWait)
	switch t := &s.typical[s.way]; {
	case s.seen[s.way] < firstWaits:
		if s.seen[s.way]++; s.seen[s.way] == 1 || d < *t {
			*t = d + 1
		}
	case d > *t: // a longer wait moves it by one step only, however long it was, as in a median
		*t += *t/8 + 1
	case d < *t:
		*t -= max(*t/8, (*t-d)/4)
	}
	park, look := s.typical[parking], s.typical[looking]
	if s.seen[looking] < firstWaits { // parking comes first
		s.left = 0
		if s.seen[parking] < firstWaits {
			s.left = 1
		}
		return
	}
	best := parking
	if look < park*7/8 || look <= wakeTime && look <= park*9/8 {
		best = looking
	}
	if best == s.usual && s.way == s.usual {
		return
	}
	s.usual = best
	if s.way != best && d < s.typical[best]*7/8 {
		s.left = 0 // a good trial is repeated at once
		return
	}
	rarer := (s.typical[1-best] + 1) / (s.typical[best] + 1)
	s.left = trialEvery * int(min(max(rarer, 1), maxRarity))
}

func (s *spinner) look(h spinCaller, e spinTarget, need, most int) (ready bool, looks int) {
	next := s.yieldEvery()
	for i := 0; most < 0 || i < most; i++ {
		if e.ready(need) {
			return true, i
		}
		if i == next {
			if h.mustLeave() {
				return false, i
			}
			start := time.Now()
			runtime.Gosched()
			s.yielded(time.Since(start))
			next += s.yieldEvery()
		}
	}
	return false, most
}

// yieldEvery returns how many looks there are between two yields.
func (s *spinner) yieldEvery() int {
	return min(max(int(s.yield*yieldShare*1024/s.cost), leastYield), mostYield)
}

// yielded records the time of one yield. The least time is the cost; a longer yield ran
// other goroutines. It raises the cost a little, since the goroutine may have been locked
// to its thread meanwhile.
func (s *spinner) yielded(d time.Duration) {
	if s.yield == 0 || d < s.yield {
		s.yield = max(d, 1)
	} else {
		s.yield += s.yield/256 + 1
	}
}

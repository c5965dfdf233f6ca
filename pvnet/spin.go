package pvnet

import (
	"runtime"
	"time"
)

// WaitMode is what a call does that has to wait.
type WaitMode uint8

const (
	// Park waits for an event at once: an idle device costs nothing.
	Park WaitMode = iota
	// Adaptive looks at the ring before it parks, up to some 100 us, as long as that
	// makes its waits shorter than parking at once does. It tries the other way now
	// and then. Where looking does not pay, because frames come later than that or
	// because whoever makes them needs the CPU, it parks at once nearly always.
	Adaptive
	// Busy never parks. It keeps a CPU for itself.
	Busy
)

const (
	// lookTime is how long Adaptive looks: for longer than a peer takes to wake up
	// that has parked, since the first of two ends to look does not shorten the
	// other's wake-up.
	lookTime = 100 * time.Microsecond

	// wakeTime is what waking an idle CPU costs. Looking for less is cheaper than
	// parking even if the frame comes no sooner.
	wakeTime = 20 * time.Microsecond

	// longWait is the longest wait that says anything; beyond it is a pause.
	longWait = time.Millisecond

	// trialEvery is how many waits there are at least between two that go the
	// other way than the others.
	trialEvery = 64

	// firstWaits is how many waits there are of either way before one is chosen. The
	// shortest counts: a start has pauses.
	firstWaits = 4

	// mostTrials bounds how much rarer the trials of a far slower way become.
	mostTrials = 1024
)

// A look that lasts lets other goroutines run now and then, and asks whether the caller
// is to leave: so often that the yields take an eighth of the time, between these
// numbers of looks, some 0.2 and 10 us. Yielding costs a goroutine that is locked to its
// thread several microseconds, and another one a tenth of that; and of two goroutines
// on one processor the other cannot answer before this one yields.
const (
	leastYield = 64
	mostYield  = 4096
	yieldShare = 8
)

// The ways to wait, between which Adaptive chooses.
const (
	parking = iota
	looking
)

// A looker is what a spinner looks at: is there a frame, or room for need slots?
type looker interface{ ready(need int) bool }

// A waiting is who a spinner looks for. It is asked now and then whether it is to leave.
type waiting interface{ leaving() bool }

// A spinner looks at the ring before its half parks, or at those of a Poller's members. It counts looks, and knows what
// one takes: the clock is read when the connection comes up, around a yield and, by
// Adaptive, around a park, but not while frames are found.
type spinner struct {
	most  int           // looks before parking; negative: no end
	cost  time.Duration // of 1024 looks
	yield time.Duration // what a yield costs at least

	// Of Adaptive only.
	usual   int              // the way of most waits
	way     int              // the way of this one
	left    int              // waits until the other way is tried
	seen    [2]uint8         // waits of either way, up to firstWaits
	typical [2]time.Duration // what a wait takes in either way, about the median
	looked  time.Duration    // of this wait
	open    bool             // this wait has not ended, as far as is known
}

// calibrate finds how many looks at e the mode stands for.
func (s *spinner) calibrate(m WaitMode, e looker) {
	*s = spinner{}
	if m == Park {
		return
	}
	const looks = 256
	best := time.Duration(1 << 62)
	for range 8 { // one that is not interrupted
		start := time.Now()
		for range looks {
			e.ready(maxPieces)
		}
		best = min(best, time.Since(start))
	}
	s.begin(best * 1024 / looks)
	if m == Busy {
		s.most = -1
	}
}

// begin makes s adaptive, with looks of which 1024 take cost.
func (s *spinner) begin(cost time.Duration) {
	cost = max(cost, 1) // a clock may not see so little
	*s = spinner{most: int(lookTime * 1024 / cost), cost: cost, left: 1}
}

// found reports whether the ring is ready for a wait of h, after looks for as long
// as the mode says.
func (s *spinner) found(h waiting, e looker, need int) bool {
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

// measures reports whether the time of a park matters.
func (s *spinner) measures() bool { return s.most > 0 }

// ended takes in that the wait is over, of which parked was spent in a park, and
// chooses the way of those that follow.
func (s *spinner) ended(parked time.Duration) {
	s.open = false
	d := min(s.looked+parked, longWait)
	switch t := &s.typical[s.way]; {
	case s.seen[s.way] < firstWaits:
		if s.seen[s.way]++; s.seen[s.way] == 1 || d < *t {
			*t = d + 1
		}
	case d > *t: // pauses, which are long, count as one more, as in a median
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
	s.left = trialEvery * int(min(max(rarer, 1), mostTrials))
}

func (s *spinner) look(h waiting, e looker, need, most int) (ready bool, looks int) {
	next := s.yieldEvery()
	for i := 0; most < 0 || i < most; i++ {
		if e.ready(need) {
			return true, i
		}
		if i == next {
			if h.leaving() {
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

// yieldEvery is how many looks there are between two yields.
func (s *spinner) yieldEvery() int {
	return min(max(int(s.yield*yieldShare*1024/s.cost), leastYield), mostYield)
}

// yielded takes in how long a yield took. Those longer than the shortest were other
// goroutines at work, but for a goroutine that has been locked to its thread since.
func (s *spinner) yielded(d time.Duration) {
	if s.yield == 0 || d < s.yield {
		s.yield = max(d, 1)
	} else {
		s.yield += s.yield/256 + 1
	}
}

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
	// Adaptive looks at the ring for about as long as a wake-up takes, then parks.
	// Where looking does not pay, because frames come later than that, it parks at
	// once most of the time.
	Adaptive
	// Busy never parks. It keeps a CPU for itself.
	Busy
)

// spinTime is how long Adaptive looks: what waking an idle CPU costs.
const spinTime = 20 * time.Microsecond

// spinYield is how many looks there are between two that let other goroutines run
// and ask whether the caller is to leave: some 10 us. On a goroutine that is locked
// to its thread a yield costs several microseconds itself.
const spinYield = 4096

// A spinner looks at the ring before its half parks. It counts looks: the clock is
// read when the connection comes up, and never while frames move.
type spinner struct {
	most   int  // looks before parking; negative: no end
	misses uint // waits in a row for which looking did not pay
	skip   int  // waits that park at once because of that
}

// mostMisses bounds how many waits in a row park at once: 1 << mostMisses.
const mostMisses = 6

// calibrate finds how many looks at e the mode stands for.
func (s *spinner) calibrate(m WaitMode, e engine) {
	*s = spinner{}
	switch m {
	case Adaptive:
		const looks = 256
		start := time.Now()
		for range looks {
			e.ready(maxPieces)
		}
		s.most = int(looks * spinTime / max(time.Since(start), 1))
	case Busy:
		s.most = -1
	}
}

// found reports whether the ring is ready for a wait of h, after looks for as long
// as the mode says.
func (s *spinner) found(h *half, e engine, need int) bool {
	switch {
	case s.most == 0:
		return false
	case s.most < 0:
		ready, _ := s.look(h, e, need, s.most)
		return ready
	case s.skip > 0:
		s.skip--
		return false
	}
	ready, looks := s.look(h, e, need, s.most)
	// A frame that came late would have cost less asleep.
	if looks < s.most/2 {
		s.misses = 0
		return ready
	}
	s.misses = min(s.misses+1, mostMisses)
	s.skip = 1<<s.misses - 1
	return ready
}

func (s *spinner) look(h *half, e engine, need, most int) (ready bool, looks int) {
	for i := 0; most < 0 || i < most; i++ {
		if e.ready(need) {
			return true, i
		}
		if i%spinYield == spinYield-1 {
			if h.gate.state.Load() != gateBusy || h.ending.Load() || h.expired() {
				return false, i
			}
			runtime.Gosched()
		}
	}
	return false, most
}

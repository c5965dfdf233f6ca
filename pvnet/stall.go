package pvnet

import (
	"sync/atomic"
	"time"

	"barevif/telemetry"
)

// A shortage is how far the peer's index must move before a sender has room again. The
// owner stores it when it finds no room, which is off the fast path; the slow tick reads
// it.
type shortage struct {
	goal  atomic.Uint32 // the index that the peer has to reach
	tries atomic.Uint32 // how many calls found no room
}

func (s *shortage) set(goal uint32) {
	s.goal.Store(goal)
	s.tries.Add(1)
}

// stallAfter is how long a peer may make no progress before it counts as a stall: one
// interval of the slow tick, less some for a tick that comes early.
const stallAfter = 900 * time.Millisecond

// A stall is what the slow tick has seen of one sender. A stall of a second is only
// counted; what a backend does about a longer one is in its drainWatch.
type stall struct {
	eng     sender
	tries   uint32    // shortage.tries at the last tick
	index   uint32    // the peer's index at the last tick
	since   time.Time // since when a sender waits at this index; zero: none waits
	stalled bool
	drainWatch
}

// checkStall compares the sender with the last tick. It has stalled if the peer's index does
// not move while a call waits for more slots than are free, or calls for them keep
// coming. It reports whether the call that waits must be woken, because it waits no longer.
func (tx *TX) checkStall(eng sender, now time.Time) (wake bool) {
	s := &tx.stall
	if s.eng != eng {
		*s = stall{eng: eng}
	}
	index, goal, tries := eng.peerProgress()
	short := int32(goal - index)
	waits := short > 0 && (tries != s.tries || tx.waitSeq.Load()%2 == 1)
	moved := index != s.index
	s.index, s.tries = index, tries
	if moved {
		if s.stalled {
			tx.dev.counters.Record(telemetry.EventStallOver, tx.queue, uint64(max(short, 0)), uint64(now.Sub(s.since)))
		}
		s.stalled, s.since = false, time.Time{}
	}
	switch {
	case s.stalled:
	case !waits:
		s.since = time.Time{}
	case s.since.IsZero():
		s.since = now
	case now.Sub(s.since) >= stallAfter:
		s.stalled = true
		tx.dev.counters.Record(telemetry.EventStall, tx.queue, uint64(short), uint64(now.Sub(s.since)))
		tx.request(requestStall)
	}
	return tx.checkDrain(index, short, moved, now)
}

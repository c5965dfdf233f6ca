package pvnet

import (
	"sync/atomic"
	"time"

	"barevif/telemetry"
)

// A stopwatch times a request once in a while. The slow tick asks for one; the
// rest is done by whoever is inside the gate. So the clock is read a few times a
// second, however many frames there are.
type stopwatch struct {
	asked atomic.Bool

	// Inside the gate.
	runs   bool
	waited bool      // the owner has waited for its peer since the response was missing
	looks  uint      // that found it missing
	start  time.Time // when the request was shown, or taken
	missed time.Time // when the response was still missing, as far as the clock was read
}

// sample has the next request timed, unless one is being timed.
func (w *stopwatch) sample() { w.asked.Store(true) }

// begin starts the watch if a sample is wanted.
func (w *stopwatch) begin() (began bool) {
	if w.runs || !w.asked.Load() {
		return false
	}
	w.asked.Store(false)
	w.runs, w.looks, w.start = true, 0, time.Now()
	w.missed = w.start
	return true
}

// end counts the time since begin, if the watch runs.
func (w *stopwatch) end(b *telemetry.Block) {
	if w.runs {
		w.runs = false
		b.Observe(telemetry.RequestLatency, uint64(time.Since(w.start)))
	}
}

// look is told whether the response of the request that is timed is there. How
// long it has been there the clock does not say, and an owner may have been
// elsewhere. So the time counts only if it is mostly the peer's: the owner waited
// for it, or saw the response missing in the latter half. The 1st, 2nd, 4th and so
// on of such looks reads the clock, which is enough for that.
func (w *stopwatch) look(b *telemetry.Block, there bool) {
	if !there {
		if w.looks++; w.looks&(w.looks-1) == 0 {
			w.missed = time.Now()
		}
		return
	}
	w.runs = false
	now := time.Now()
	if took := now.Sub(w.start); w.waited || now.Sub(w.missed) <= took/2 {
		b.Observe(telemetry.RequestLatency, uint64(took))
	}
}

// A shortage is what a sender lacks that only its peer can give. The owner says so
// where it finds no room, which is off the fast path; the slow tick reads it.
type shortage struct {
	goal  atomic.Uint32 // what the peer's index has to reach
	tries atomic.Uint32 // how often it had not
}

func (s *shortage) lack(goal uint32) {
	s.goal.Store(goal)
	s.tries.Add(1)
}

// stallAfter is how long a peer makes no progress before that is a stall: a beat
// of the slow tick, which may come a little early.
const stallAfter = 900 * time.Millisecond

// A stall is what the slow tick knows of one sender. Linux's netback stops queueing
// to a frontend that gave no slots for 10 s, and takes it for dead after 60 s
// (drivers/net/xen-netback: rx_drain_timeout_msecs, rx_stall_timeout_msecs). Here
// nothing queues, so a stall is only counted.
type stall struct {
	eng   sender
	tries uint32    // as of the beat before
	index uint32    // the peer's, as of the beat before
	since time.Time // when a sender was first seen to wait at this index; zero: none does
	lasts bool
}

// watch compares what a sender waits for with the beat before. It has stalled if a
// call waits, or calls keep coming, that need more slots than are free, while the
// peer's index stays where it was.
func (tx *TX) watch(eng sender, now time.Time) {
	s := &tx.stall
	if s.eng != eng {
		*s = stall{eng: eng}
	}
	index, goal, tries := eng.standing()
	short := int32(goal - index)
	waits := short > 0 && (tries != s.tries || tx.parked.Load()%2 == 1)
	moved := index != s.index
	s.index, s.tries = index, tries
	if moved {
		if s.lasts {
			tx.dev.set.Record(telemetry.EventStallOver, tx.queue, uint64(max(short, 0)), uint64(now.Sub(s.since)))
		}
		s.lasts, s.since = false, time.Time{}
	}
	switch {
	case s.lasts:
	case !waits:
		s.since = time.Time{}
	case s.since.IsZero():
		s.since = now
	case now.Sub(s.since) >= stallAfter:
		s.lasts = true
		tx.dev.set.Record(telemetry.EventStall, tx.queue, uint64(short), uint64(now.Sub(s.since)))
		tx.remind(dueStall)
	}
}

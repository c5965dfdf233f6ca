package pvnet

import (
	"sync/atomic"
	"time"

	"barevif/telemetry"
)

// A stopwatch times a request once in a while. The slow tick asks for a sample; the
// caller inside the gate takes it. So the clock is read a few times a second, however
// many frames there are.
type stopwatch struct {
	asked atomic.Bool

	// Inside the gate.
	runs   bool
	waited bool      // the owner has waited for the peer since it saw the response missing
	looks  uint      // how many looks found the response missing
	start  time.Time // when the request was published, or taken
	missed time.Time // the last time read at which the response was missing
}

// sample asks for the timing of the next request. One that is being timed is finished
// first.
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

// look records whether the timed request has its response. It cannot tell since when the
// response is there: the owner may have been busy elsewhere. So the time counts only if
// it is mostly the peer's: the owner waited for the response, or saw it missing in the
// latter half of the time. Only the 1st, 2nd, 4th, 8th... look reads the clock, which is
// enough for that.
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

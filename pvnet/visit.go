package pvnet

import (
	"runtime/debug"
	"time"
)

// A task is a function that somebody outside of a half wants to run on its engine.
type task struct {
	run  func()
	ran  bool          // run has returned, and met no fault; written before done is closed
	done chan struct{} // closed once run is over
}

// do runs the task that was left at the half, if any. Nobody else may use the engine
// meanwhile. A fault in it is the visitor's: the caller inside the gate meets its own.
func (h *half) do() {
	if e := h.task.Swap(nil); e != nil {
		e.ran = catchFault(e.run) == nil
		close(e.done)
	}
}

// visit runs f on the engine of h and reports whether it did: not while the gate is shut,
// and not if the caller inside the gate has no moment for it before end. Any goroutine may
// call it. It delays the data path by the time of f, and wakes nobody.
//
// There are three ways to the engine. If no caller is inside the gate, visit borrows the
// gate. If the caller inside waits, it has lent what it uses, as to the slow tick.
// Otherwise the caller inside runs f itself, within 32 frames.
func (h *half) visit(end time.Time, f func()) (ran bool) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // the goroutine may be a user's
	e := &task{run: f, done: make(chan struct{})}
	posted := false
	withdraw := func() bool { return posted && !h.task.CompareAndSwap(e, nil) }
	here := func() bool {
		if withdraw() {
			return e.ran
		}
		return catchFault(f) == nil
	}
	for pause := 50 * time.Microsecond; ; pause = min(2*pause, time.Millisecond) {
		switch {
		case h.gate.state.CompareAndSwap(gateOpen, gateBorrowed):
			ran = here()
			h.gate.state.Store(gateOpen)
			return ran
		case h.counterUser.CompareAndSwap(countersLent, countersBorrowed):
			ran = here()
			h.returnCounters()
			return ran
		}
		over := h.gate.state.Load() == gateShut || !time.Now().Before(end)
		if over {
			if !withdraw() {
				return false
			}
			<-e.done // somebody has it, and is about to be done
			return e.ran
		}
		if !posted && h.task.CompareAndSwap(nil, e) {
			posted = true
			h.requests.Or(requestTask)
		}
		t := time.NewTimer(pause)
		select {
		case <-e.done:
			t.Stop()
			return e.ran
		case <-t.C:
		}
	}
}

package pvnet

import "sync/atomic"

// A pageWait is what a receiving engine knows while there are too few pages for the next frame. The
// owner uses it inside the gate.
//
// Pages come back by releases of other goroutines, of which the arena tells the owner once it has
// asked ([arena.Arena.WakeOnReturn]), and by the owner's own. What counts is not whether one has
// come back but how many are there: someone who looks at the rings meanwhile may have collected
// them.
type pageWait struct {
	starved atomic.Bool // the last receive found no page for the next frame; the watchdog reads it
	had     int         // the pages that the engine had then
}

// starve takes note that so many pages were too few: those that receive has found, and not those
// that have come back since it looked.
func (w *pageWait) starve(had int) {
	w.had = had
	w.starved.Store(true)
}

// fed takes note that the engine tries again.
func (w *pageWait) fed() {
	if w.starved.Load() {
		w.starved.Store(false)
	}
}

// refilled reports whether there are more pages than when there were too few.
func (w *pageWait) refilled(stock int) bool { return stock > w.had }

// wakeOwner wakes the owner of h, or the Poller that it waits in.
func (h *half) wakeOwner() {
	if p := h.park.Load(); p != nil {
		p.wake()
	}
}

// AwaitBuffers waits, after a call of rx that returned [ErrNoBuffers], until a frame has been
// released, the deadline (os.ErrDeadlineExceeded) or the end of the device. The frames that
// others hold may be released by any goroutine, which wakes this one; those that the caller holds
// it must release itself, before. The frames that have arrived stay in the ring meanwhile.
//
// It may return early, for instance when the link goes down or when one page has come back and
// the next frame needs several: the caller calls Receive again. It returns at once if the last
// call did not find the buffers missing. Errors are those of [RX.Receive]; [ErrPolled] if the
// half is in a [Poller], which waits for buffers itself.
func (rx *RX) AwaitBuffers() error {
	if err := rx.enter(); err != nil {
		return rx.afterShutGate(err)
	}
	var err error
	if rx.eng.starving() && !rx.ending.Load() {
		err = rx.parkUntil(rx.deadline(), false)
	}
	rx.gate.leave()
	return rx.dev.callError(err)
}

package pvnet

import (
	"runtime"
	"sync/atomic"
	"time"
)

// A gate lets one caller at a time into a half. With it the lifecycle goroutine keeps callers
// out and waits until the last one has left. It is not a lock: a caller never waits at
// it.
type gate struct {
	state  atomic.Uint32
	left   chan struct{} // one token: the caller that was inside when the gate was shut has left
	inside bool          // lifecycle goroutine only: a caller was inside when the gate was shut
}

const (
	gateOpen = iota
	gateBusy
	gateClosing // busy, and the caller has been asked to leave
	gateShut
	gateBorrowed // the slow tick or Stats is inside, briefly: callers spin
)

func (g *gate) init() {
	g.left = make(chan struct{}, 1)
	g.state.Store(gateShut)
}

// enter reports whether the caller is now inside.
func (g *gate) enter() bool { return g.state.CompareAndSwap(gateOpen, gateBusy) }

func (g *gate) leave() {
	if !g.state.CompareAndSwap(gateBusy, gateOpen) {
		g.state.Store(gateShut)
		g.left <- struct{}{}
	}
}

// occupied reports whether a caller is inside.
func (g *gate) occupied() bool {
	s := g.state.Load()
	return s == gateBusy || s == gateClosing
}

// shut keeps callers out from now on. It calls wake for a caller that is parked
// inside.
func (g *gate) shut(wake func()) {
	for !g.inside {
		if g.state.CompareAndSwap(gateOpen, gateShut) || g.state.Load() == gateShut {
			return
		}
		g.inside = g.state.CompareAndSwap(gateBusy, gateClosing)
		runtime.Gosched()
	}
	wake()
}

// waitEmpty waits, after shut, until no caller is inside. It reports false if one still is at
// end: that caller may never leave.
func (g *gate) waitEmpty(end time.Time) bool {
	if !g.inside {
		return true
	}
	t := time.NewTimer(time.Until(end))
	defer t.Stop()
	select {
	case <-g.left:
		g.inside = false
	case <-t.C:
		select {
		case <-g.left:
			g.inside = false
		default:
		}
	}
	return !g.inside
}

// open lets callers in again. The gate must be empty.
func (g *gate) open() { g.state.Store(gateOpen) }

package pvnet

import (
	"time"
)

// How fast a life follows a peer that keeps changing its state.
const (
	stepsAtOnce  = 40               // enough for five connections and their ends
	stepsBetween = 8                // moves between two pauses: one more connection
	firstPause   = time.Second / 16 // doubles
	longestPause = time.Second
	forgetAfter  = time.Minute
)

// A pace bounds the cost of a peer that comes and goes without end. A move is a step that
// takes pages, uses xenstore or tells the user. The first moves are made at once, so that
// an orderly peer is connected quickly; later ones have pauses between them. After a
// pause only the peer's latest state counts.
type pace struct {
	steps int
	pause time.Duration
	until time.Time // zero: no pause
	last  time.Time
}

func (p *pace) step(now time.Time) {
	if now.Sub(p.last) > forgetAfter {
		*p = pace{}
	}
	p.last = now
	p.steps++
	if over := p.steps - stepsAtOnce; over >= 0 && over%stepsBetween == 0 {
		p.pause = min(max(2*p.pause, firstPause), longestPause)
		p.until = now.Add(p.pause)
	}
}

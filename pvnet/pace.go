package pvnet

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// How fast a life follows a peer that never rests.
const (
	movesAtOnce  = 40               // five connections, made and ended
	movesBetween = 8                // pauses: one connection more
	firstPause   = time.Second / 16 // doubles
	longestPause = time.Second
	forgetAfter  = time.Minute
)

// A pace bounds what a peer that comes and goes for ever costs: a move is whatever
// takes pages, talks to xenstore or tells the user. The first are made at once, so
// that an orderly peer is back soon; then pauses come between them. What the peer
// wrote meanwhile counts for nothing but the last.
type pace struct {
	moves int
	pause time.Duration
	until time.Time // zero: no pause
	last  time.Time
}

func (p *pace) move(now time.Time) {
	if now.Sub(p.last) > forgetAfter {
		*p = pace{}
	}
	p.last = now
	p.moves++
	if over := p.moves - movesAtOnce; over >= 0 && over%movesBetween == 0 {
		p.pause = min(max(2*p.pause, firstPause), longestPause)
		p.until = now.Add(p.pause)
	}
}

// What a device says at most: so many lines at once, and one in a while.
const (
	linesAtOnce = 20
	lineEvery   = 30 * time.Second
)

// A quiet handler lets a device say only so much of what its peer does. The last
// line of those suppressed comes later, and whichever comes next says how many
// there were. Errors are final for a device, and are never suppressed.
type quiet struct {
	slog.Handler
	*hush
}

// hush is of a device, however many handlers With makes of the one it began with.
type hush struct {
	mu     sync.Mutex
	left   int          // guarded by mu: lines that may come at once
	filled time.Time    // guarded by mu: left is as of then
	kept   slog.Record  // guarded by mu: the last that was suppressed
	to     slog.Handler // guarded by mu: where it was to go; nil: there is none
	unsaid int          // guarded by mu
}

func newQuiet(h slog.Handler) quiet {
	return quiet{h, &hush{left: linesAtOnce, filled: time.Now()}}
}

func (q quiet) WithAttrs(a []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(a), q.hush} }
func (q quiet) WithGroup(name string) slog.Handler   { return quiet{q.Handler.WithGroup(name), q.hush} }

func (q quiet) Handle(ctx context.Context, r slog.Record) error {
	q.mu.Lock()
	if !q.mayLocked() && r.Level < slog.LevelError {
		q.kept, q.to = r.Clone(), q.Handler
		q.unsaid++
		q.mu.Unlock()
		return nil
	}
	r = q.takeLocked(r, q.unsaid)
	q.mu.Unlock()
	return q.Handler.Handle(ctx, r)
}

// catchUp says what was kept, if it is time, or whatever the time if this is the
// end.
func (h *hush) catchUp(end bool) {
	h.mu.Lock()
	to, r := h.to, h.kept
	if to == nil || !h.mayLocked() && !end {
		h.mu.Unlock()
		return
	}
	r = h.takeLocked(r, h.unsaid-1)
	h.mu.Unlock()
	to.Handle(context.Background(), r)
}

func (h *hush) mayLocked() bool {
	if n := time.Since(h.filled) / lineEvery; n > 0 {
		h.left = int(min(time.Duration(h.left)+n, linesAtOnce))
		h.filled = h.filled.Add(n * lineEvery)
	}
	return h.left > 0
}

// takeLocked spends a line on r.
func (h *hush) takeLocked(r slog.Record, others int) slog.Record {
	h.left = max(h.left-1, 0)
	if others > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("suppressed", others))
	}
	h.kept, h.to, h.unsaid = slog.Record{}, nil, 0
	return r
}

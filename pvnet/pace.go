package pvnet

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// How fast a life follows a peer that keeps changing its state.
const (
	movesAtOnce  = 40               // enough for five connections and their ends
	movesBetween = 8                // moves between two pauses: one more connection
	firstPause   = time.Second / 16 // doubles
	longestPause = time.Second
	forgetAfter  = time.Minute
)

// A pace bounds the cost of a peer that comes and goes without end. A move is a step that
// takes pages, uses xenstore or tells the user. The first moves are made at once, so that
// an orderly peer is connected quickly; later ones have pauses between them. After a
// pause only the peer's latest state counts.
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

// How many lines a device logs at most: linesAtOnce, and then one every lineEvery.
const (
	linesAtOnce = 20
	lineEvery   = 30 * time.Second
)

// A quiet handler limits how much a device logs about its peer. The last suppressed line
// is logged later, and the next line that is logged has the number of suppressed ones.
// Errors are final for a device and are never suppressed.
type quiet struct {
	slog.Handler
	*hush
}

// A hush is the rate limit of a device, shared by all handlers that With derives from the
// first.
type hush struct {
	mu     sync.Mutex
	left   int          // guarded by mu: lines that may come at once
	filled time.Time    // guarded by mu: when left was last increased
	kept   slog.Record  // guarded by mu: the last suppressed line
	to     slog.Handler // guarded by mu: the handler of kept; nil: no line is kept
	unsaid int          // guarded by mu: how many lines were suppressed
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

// catchUp logs the suppressed line that was kept, if the rate allows it or this is the
// end of the device.
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

// takeLocked uses up one line for r, and adds the number of suppressed ones.
func (h *hush) takeLocked(r slog.Record, others int) slog.Record {
	h.left = max(h.left-1, 0)
	if others > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("suppressed", others))
	}
	h.kept, h.to, h.unsaid = slog.Record{}, nil, 0
	return r
}

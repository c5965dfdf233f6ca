// Package loglimit bounds how much is logged about a peer that never rests: some lines at
// once, then a line now and then, with the number of lines left out.
package loglimit

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// At most linesAtOnce lines are logged, and then one every lineEvery.
const (
	linesAtOnce = 20
	lineEvery   = 30 * time.Second
)

// A Handler passes lines on to another handler, at most so many. The next line that it
// passes on has the number of those that it suppressed. Errors are never suppressed.
type Handler struct {
	slog.Handler
	*limit
}

// A limit is shared by all handlers that WithAttrs and WithGroup derive from the first.
type limit struct {
	mu         sync.Mutex
	left       int          // guarded by mu: lines that may come at once
	filled     time.Time    // guarded by mu: when left was last increased
	kept       slog.Record  // guarded by mu: the last suppressed line
	to         slog.Handler // guarded by mu: the handler of kept; nil: no line is kept
	suppressed int          // guarded by mu: how many lines were suppressed
}

// New makes a Handler that passes lines on to h.
func New(h slog.Handler) Handler {
	return Handler{h, &limit{left: linesAtOnce, filled: time.Now()}}
}

// WithAttrs implements [slog.Handler].
func (h Handler) WithAttrs(a []slog.Attr) slog.Handler {
	return Handler{h.Handler.WithAttrs(a), h.limit}
}

// WithGroup implements [slog.Handler].
func (h Handler) WithGroup(name string) slog.Handler {
	return Handler{h.Handler.WithGroup(name), h.limit}
}

// Handle passes r on, or keeps it for CatchUp.
func (h Handler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	if !h.mayLocked() && r.Level < slog.LevelError {
		h.kept, h.to = r.Clone(), h.Handler
		h.suppressed++
		h.mu.Unlock()
		return nil
	}
	r = h.takeLocked(r, h.suppressed)
	h.mu.Unlock()
	return h.Handler.Handle(ctx, r)
}

// CatchUp passes on the last suppressed line, if the rate allows it or if this is the
// end. Its user calls it now and then, so that the last thing that happened is said.
func (h *limit) CatchUp(end bool) {
	h.mu.Lock()
	to, r := h.to, h.kept
	if to == nil || !h.mayLocked() && !end {
		h.mu.Unlock()
		return
	}
	r = h.takeLocked(r, h.suppressed-1)
	h.mu.Unlock()
	to.Handle(context.Background(), r)
}

func (h *limit) mayLocked() bool {
	if n := time.Since(h.filled) / lineEvery; n > 0 {
		h.left = int(min(time.Duration(h.left)+n, linesAtOnce))
		h.filled = h.filled.Add(n * lineEvery)
	}
	return h.left > 0
}

// takeLocked uses up one line for r, and adds the number of suppressed ones.
func (h *limit) takeLocked(r slog.Record, others int) slog.Record {
	h.left = max(h.left-1, 0)
	if others > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("suppressed", others))
	}
	h.kept, h.to, h.suppressed = slog.Record{}, nil, 0
	return r
}

package xenbus

import (
	"context"
	"errors"
	"net"
	"slices"
	"strconv"
	"strings"

	"barevif/xenbus/wire"
)

// maxDirty bounds the paths one watch remembers; beyond it stands for everything.
const maxDirty = 16

// A Watch hears when a node, or one below it, may have changed. What it says is a
// hint: events are merged, may come for nothing, and say nothing of the value. It
// is set again on each new connection, and then reports everything as changed.
type Watch struct {
	c     *Client
	path  string
	token string // ours, and short
	ch    chan struct{}

	// The rest is guarded by c.mu.
	set   bool // the server has said OK
	over  bool // ch is closed
	err   error
	dirty []string
	all   bool
}

// Watch sets a watch on path, a node that need not exist or "@introduceDomain" or
// "@releaseDomain". A first event comes at once. The caller closes the Watch.
func (c *Client) Watch(ctx context.Context, path string) (*Watch, error) {
	if !validWatch(path) {
		return nil, &Error{Op: opName(wire.Watch), Path: clip(path), Code: ErrInvalid}
	}
	w := &Watch{c: c, path: path, ch: make(chan struct{}, 1)}
	c.mu.Lock()
	c.tokens++
	w.token = "b" + strconv.FormatUint(c.tokens, 36)
	c.watches[w.token] = w // the first event may overtake the reply
	c.mu.Unlock()

	r := w.request()
	r.again = true
	r.settled = func() {
		w.set = r.err == nil
		if r.gone || r.err != nil {
			w.dropLocked(r.sentOn)
		}
	}
	if _, err := c.do(ctx, r); err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		w.endLocked(net.ErrClosed)
		if c.flight[r.id] != r { // else the server has yet to answer
			delete(c.watches, w.token)
		}
		return nil, err
	}
	return w, nil
}

func (w *Watch) request() *request {
	return &request{op: wire.Watch, path: w.path, parts: []string{w.path, "\x00", w.token, "\x00"}}
}

// renewLocked is the request that sets w again on a new connection.
func (w *Watch) renewLocked(epoch uint64) *request {
	r := w.request()
	r.epoch, r.done = epoch, make(chan struct{})
	r.settled = func() {
		switch {
		case r.err == nil || errors.Is(r.err, ErrExists):
			w.all = true // whatever happened while nobody watched
			w.fireLocked()
		case errors.Is(r.err, ErrLost): // the next connection tries again
		default:
			w.endLocked(r.err)
			delete(w.c.watches, w.token)
		}
	}
	return r
}

// C delivers when there is something to look at, once for any number of events.
// It is closed by Close, by the Client's Close, and if the watch could not be set
// again on a new connection: see Err. One goroutine at a time should wait on it.
func (w *Watch) C() <-chan struct{} { return w.ch }

// Err says why C was closed, nil if it is open.
func (w *Watch) Err() error {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	return w.err
}

// Paths takes the paths events named since the last call, as the server spelt
// them, at most 16. all means that there were more, or that the watch was set
// again: everything below may have changed.
func (w *Watch) Paths() (paths []string, all bool) {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	paths, all = w.dirty, w.all
	w.dirty, w.all = nil, false
	if all {
		paths = nil
	}
	return paths, all
}

// Close ends the watch without waiting for the server. It is idempotent and
// returns nil.
func (w *Watch) Close() error {
	c := w.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if w.over {
		return nil
	}
	w.endLocked(net.ErrClosed)
	w.dropLocked(c.epoch)
	return nil
}

// endLocked closes C. The token stays known until the server has forgotten it, so
// that stragglers are not taken for strangers.
func (w *Watch) endLocked(err error) {
	if w.over {
		return
	}
	w.over, w.err = true, err
	w.dirty = nil
	close(w.ch)
}

// dropLocked makes the server forget a watch it took on connection epoch.
func (w *Watch) dropLocked(epoch uint64) {
	c := w.c
	if !w.set || epoch != c.epoch {
		delete(c.watches, w.token)
		return
	}
	w.set = false // not to be set again
	r := &request{op: wire.Unwatch, path: w.path, epoch: epoch, done: make(chan struct{}),
		parts: []string{w.path, "\x00", w.token, "\x00"}}
	r.settled = func() { delete(c.watches, w.token) }
	if c.postLocked(r) != nil {
		delete(c.watches, w.token)
	}
}

func (w *Watch) fireLocked() {
	if w.over {
		return
	}
	select {
	case w.ch <- struct{}{}:
	default:
		w.c.stats.Coalesced++
	}
}

// event takes the payload of a WATCH_EVENT: path, NUL, token, NUL.
func (c *Client) event(payload []byte) error {
	path, rest, ok1 := strings.Cut(string(payload), "\x00")
	token, _, ok2 := strings.Cut(rest, "\x00")
	if !ok1 || !ok2 {
		return &ProtocolError{"a watch event without path and token"}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stats.Events++
	w := c.watches[token]
	if w == nil {
		c.stats.UnknownTokens++
		return nil
	}
	if w.over {
		return nil
	}
	switch {
	case w.all || slices.Contains(w.dirty, path):
	case len(w.dirty) == maxDirty || !below(path, w.path):
		w.dirty, w.all = nil, true
	default:
		w.dirty = append(w.dirty, path)
	}
	w.fireLocked()
	return nil
}

package xenstore

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

// maxDirty bounds the paths that one Watch remembers. After more, Paths reports all.
const maxDirty = 16

// A Watch tells when a node, or one below it, may have changed. It is a hint: events are
// merged, may come without a change, and do not carry the value. The Client sets the
// Watch again on each new connection and then reports everything as changed.
//
// xenstored allows a domain 128 watches. So a Watch below a broad watch is not set at
// xenstored; the Client passes it the broad watch's events. See Config.Watches.
type Watch struct {
	c     *Client
	path  string
	token string // chosen by us, and short
	broad bool   // WatchTree or domains: may cover others
	ch    chan struct{}

	// The rest is guarded by c.mu.
	set    bool     // the server has accepted it
	over   bool     // ch is closed
	under  *Watch   // the broad watch that covers it; nil: it is, or was, set at the server
	covers []*Watch // the watches that it covers, if broad
	err    error
	dirty  []string
	all    bool
}

// domains is the path of the broad watch that covers the other ends of all devices.
// xenstored sends a domain only the events of nodes that the domain may read.
const domains = "/local/domain"

// Watch watches path: a node, which need not exist, "@introduceDomain" or
// "@releaseDomain". A first event comes at once. The caller closes the Watch.
func (c *Client) Watch(ctx context.Context, path string) (*Watch, error) {
	if w := c.cover(path); w != nil {
		return w, nil
	}
	if !below(path, domains) {
		return c.watch(ctx, path, false)
	}
	var w *Watch
	err := error(ErrQuota)
	if !c.many() {
		w, err = c.watch(ctx, path, false)
	}
	if errors.Is(err, ErrQuota) && c.widen(ctx) == nil {
		if w := c.cover(path); w != nil {
			return w, nil
		}
	}
	if w == nil && err == ErrQuota {
		return c.watch(ctx, path, false) // ask anyway: xenstored's own error says more than ErrQuota
	}
	return w, err
}

// cover returns a Watch on path that a broad watch covers, nil if none does.
func (c *Client) cover(path string) *Watch {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.watches {
		if b.broad && b.set && below(path, b.path) {
			w := &Watch{c: c, path: path, ch: make(chan struct{}, 1)}
			w.coverLocked(b)
			return w
		}
	}
	return nil
}

func (w *Watch) coverLocked(b *Watch) {
	w.under = b
	b.covers = append(b.covers, w)
	w.noteLocked(w.path)
}

// narrowLocked returns the watches on nodes of other domains that are set one by one.
func (c *Client) narrowLocked() (all []*Watch) {
	for _, w := range c.watches {
		if w.set && !w.over && !w.broad && w.under == nil && below(w.path, domains) {
			all = append(all, w)
		}
	}
	return all
}

// many reports whether narrowLocked gives as many watches as Config.Watches allows.
func (c *Client) many() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cfg.Watches > 0 && len(c.narrowLocked()) >= c.cfg.Watches
}

// widen replaces all watches on nodes of other domains by one broad watch.
func (c *Client) widen(ctx context.Context) error {
	select { // one goroutine at a time
	case c.wide <- struct{}{}:
		defer func() { <-c.wide }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if w := c.cover(domains); w != nil {
		return w.Close()
	}
	_, err := c.watch(ctx, domains, true)
	if errors.Is(err, ErrQuota) {
		// Our own watches may fill the quota: drop one to make room.
		c.mu.Lock()
		narrow := c.narrowLocked()
		c.mu.Unlock()
		if len(narrow) == 0 {
			return err
		}
		w := narrow[0]
		c.mu.Lock()
		w.dropLocked(c.epoch) // queued before the watch that follows
		c.mu.Unlock()
		_, err = c.watch(ctx, domains, true)
		c.mu.Lock()
		b := c.broadLocked(domains)
		switch {
		case w.over:
		case err == nil && b != nil:
			w.coverLocked(b)
		default:
			w.restoreLocked()
		}
		c.mu.Unlock()
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	b := c.broadLocked(domains)
	if b == nil { // the server has refused it since, on another connection, or the Client has ended
		return ErrQuota
	}
	for _, w := range c.narrowLocked() {
		w.dropLocked(c.epoch)
		w.coverLocked(b)
	}
	return nil
}

// restoreLocked sets w, which dropLocked has dropped, once more. As after a lost connection, any node below
// may have changed meanwhile.
func (w *Watch) restoreLocked() {
	c := w.c
	if c.postLocked(w.renewLocked(c.epoch)) != nil {
		w.endLocked(hypercall.ErrClosed)
		return
	}
	w.set, c.watches[w.token] = true, w
}

// broadLocked returns the broad watch on path, nil if there is none.
func (c *Client) broadLocked(path string) *Watch {
	for _, w := range c.watches {
		if w.broad && w.path == path {
			return w
		}
	}
	return nil
}

// WatchTree is Watch for a caller that will set many Watches below path. While it is
// open, they cost none of the watches that xenstored allows.
func (c *Client) WatchTree(ctx context.Context, path string) (*Watch, error) {
	return c.watch(ctx, path, true)
}

// watch sets a watch at the server.
func (c *Client) watch(ctx context.Context, path string, broad bool) (*Watch, error) {
	if !validWatch(path) {
		return nil, &Error{Op: opName(wire.Watch), Path: Clip(path), Code: ErrInvalid}
	}
	w := &Watch{c: c, path: path, broad: broad, ch: make(chan struct{}, 1)}
	c.mu.Lock()
	c.tokens++
	w.token = "b" + strconv.FormatUint(c.tokens, 36)
	c.watches[w.token] = w // before the request is sent: the first event may overtake the reply
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
		w.endLocked(hypercall.ErrClosed)
		if c.flight[r.id] != r { // else the server has still to answer the request
			delete(c.watches, w.token)
		}
		return nil, err
	}
	return w, nil
}

func (w *Watch) request() *request {
	return &request{op: wire.Watch, path: w.path, parts: []string{w.path, "\x00", w.token, "\x00"}}
}

// renewLocked returns the request that sets w again on a new connection.
func (w *Watch) renewLocked(epoch uint64) *request {
	r := w.request()
	r.epoch, r.done = epoch, make(chan struct{})
	r.settled = func() {
		switch {
		case r.err == nil || errors.Is(r.err, ErrExists):
			for _, v := range append([]*Watch{w}, w.covers...) {
				v.all = true // changes without a watch went unnoticed
				v.fireLocked()
			}
		case errors.Is(r.err, ErrLost): // the next connection tries again
		default:
			w.endLocked(r.err)
			delete(w.c.watches, w.token)
		}
	}
	return r
}

// C delivers when something may have changed, once for any number of events. It is closed
// by Close, by the Client's Close, and when the watch could not be set again on a new
// connection: see Err. One goroutine at a time should receive from it.
func (w *Watch) C() <-chan struct{} { return w.ch }

// Err returns why C was closed, nil while it is open.
func (w *Watch) Err() error {
	w.c.mu.Lock()
	defer w.c.mu.Unlock()
	return w.err
}

// Paths returns the paths of the events since the last call, as the server spelt them, at
// most 16. all means that there were more, or that the watch was set again: any node
// below may have changed.
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
	w.over, w.err, w.dirty = true, hypercall.ErrClosed, nil
	close(w.ch)
	switch b := w.under; {
	case b != nil:
		b.covers = slices.DeleteFunc(b.covers, func(v *Watch) bool { return v == w })
		if b.over && len(b.covers) == 0 {
			b.dropLocked(c.epoch)
		}
	case len(w.covers) == 0: // else the last covered Watch drops it when it closes
		w.dropLocked(c.epoch)
	}
	return nil
}

// endLocked closes C of w and of the watches that w covers. The token stays known until
// the server has dropped the watch, so that late events do not count as unknown.
func (w *Watch) endLocked(err error) {
	for _, v := range w.covers {
		v.endLocked(err)
	}
	w.covers = nil
	if w.over {
		return
	}
	w.over, w.err = true, err
	w.dirty = nil
	close(w.ch)
}

// dropLocked makes the server drop a watch that it accepted on connection epoch.
func (w *Watch) dropLocked(epoch uint64) {
	c := w.c
	if !w.set || epoch != c.epoch {
		delete(c.watches, w.token)
		return
	}
	w.set = false // begin must not set it again
	r := &request{op: wire.Unwatch, path: w.path, epoch: epoch, done: make(chan struct{}),
		parts: []string{w.path, "\x00", w.token, "\x00"}}
	r.settled = func() {
		if !w.set { // else it was set again meanwhile
			delete(c.watches, w.token)
		}
	}
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

// event handles the payload of a WATCH_EVENT: path, NUL, token, NUL.
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
	for _, v := range w.covers {
		switch {
		case below(path, v.path):
			v.noteLocked(path)
		case below(v.path, path): // a node above v.path was removed
			v.noteLocked(v.path)
		}
	}
	w.noteLocked(path)
	return nil
}

// noteLocked records an event about path.
func (w *Watch) noteLocked(path string) {
	if w.over {
		return
	}
	switch {
	case w.all || slices.Contains(w.dirty, path):
	case len(w.dirty) == maxDirty || !below(path, w.path):
		w.dirty, w.all = nil, true
	default:
		w.dirty = append(w.dirty, path)
	}
	w.fireLocked()
}

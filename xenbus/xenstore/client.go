package xenstore

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

// Config adapts a [Client] to its transport. The zero Config works with every transport.
type Config struct {
	// MaxPayload bounds the payload of a request, in bytes. 0 means 4080, because the
	// kernel's /dev/xen/xenbus buffers 4096 bytes with the header. A socket or a ring
	// takes 4096, the most the protocol allows.
	MaxPayload int

	// Pipeline is how many requests may be unanswered at once. 0 means the number that a
	// [Pipeliner] transport gives, else 1: one open file of the kernel's node mixes up the
	// bodies of several requests. A socket or a ring takes more. At 20 unanswered requests
	// xenstored stops reading an unprivileged domain.
	Pipeline int

	// Watches is how many nodes of other domains the Client watches one by one. Beyond it
	// one watch on /local/domain replaces them; xenstored sends a domain only the events
	// of nodes it may read. 0 means as many as xenstored allows. Domain 0 may read
	// everything, and has no quota of watches.
	Watches int

	// Logger gets one line for each lost connection. nil: silent.
	Logger *slog.Logger
}

// A Pipeliner is a transport that knows how many requests may be unanswered at once.
type Pipeliner interface {
	Pipeline() int
}

const (
	nodePayload = 4096 - wire.HeaderSize // drivers/xen/xenbus/xenbus_dev_frontend.c
	maxTries    = 8                      // connections that one request may be sent on
)

// A Client is a connection to xenstore. It connects again when the connection breaks. Its
// methods may be called from any goroutine. Those with a context block until the answer
// comes, on a new connection if need be; they end with the context's cause, or with
// net.ErrClosed after Close. A refusal by xenstored is an [*Error].
//
// A request that changes something fails with [ErrLost] if the connection breaks before
// the answer.
type Client struct {
	open   func(context.Context) (io.ReadWriteCloser, error)
	cfg    Config
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	done   chan struct{} // closed when run has ended
	wake   chan struct{} // holds one: there may be something to send
	trans  chan struct{} // holds one while a transaction is open
	wide   chan struct{} // holds one while a broad watch is being set

	mu      sync.Mutex
	closed  bool                // guarded by mu
	epoch   uint64              // guarded by mu; counts connections, 0: none yet
	queue   []*request          // guarded by mu; not sent yet
	flight  map[uint32]*request // guarded by mu; sent, not answered
	lastID  uint32              // guarded by mu
	tokens  uint64              // guarded by mu; tokens given out
	watches map[string]*Watch   // guarded by mu; by token
	useful  bool                // guarded by mu; this connection answered something
	stats   Stats               // guarded by mu
}

// Stats counts what a Client has seen since Dial.
type Stats struct {
	Requests      uint64 // messages sent
	Events        uint64 // watch events received
	Coalesced     uint64 // events merged with an earlier one that was not yet taken
	UnknownTokens uint64 // events whose token belongs to no watch of ours; ignored
	Reconnects    uint64 // connections after the first
	Violations    uint64 // connections given up for a [*ProtocolError]
	Conflicts     uint64 // transactions that ended with EAGAIN and were run again
}

// A request is one message to xenstore and its answer.
type request struct {
	op      wire.Op
	tx      uint32
	parts   []string
	path    string // for errors
	again   bool   // changes nothing, so it may be sent again on the next connection
	epoch   uint64 // the only connection it may be sent on, 0: any
	lost    error  // the error it gets when the connection of epoch is gone; nil: ErrLost
	settled func() // runs with Client.mu held once reply and err are set

	// Guarded by Client.mu until done is closed.
	id     uint32 // request id of the last sending
	sentOn uint64 // epoch of the last sending
	tries  int
	gone   bool // nobody waits for it

	done  chan struct{} // closed when reply and err are set
	reply string
	err   error
}

// Dial opens a connection with open and returns a Client that owns it. Whenever the
// connection is lost, the Client calls open again, with a context that ends at Close;
// calls never overlap. Close of the connection must unblock its Read and Write. Dial
// fails with the error of open.
func Dial(ctx context.Context, open func(context.Context) (io.ReadWriteCloser, error), cfg Config) (*Client, error) {
	if cfg.MaxPayload == 0 {
		cfg.MaxPayload = nodePayload
	}
	if cfg.MaxPayload < 0 || cfg.MaxPayload > wire.MaxPayload || cfg.Pipeline < 0 || cfg.Watches < 0 {
		return nil, fmt.Errorf("xenstore: Config.MaxPayload is %d, Pipeline %d and Watches %d: use 1 to %d, or 0 for %d, and at least 0 for the others", cfg.MaxPayload, cfg.Pipeline, cfg.Watches, wire.MaxPayload, nodePayload)
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	rwc, err := open(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to xenstore: %w", err)
	}
	if p, ok := rwc.(Pipeliner); ok && cfg.Pipeline == 0 {
		cfg.Pipeline = p.Pipeline()
	}
	cfg.Pipeline = max(cfg.Pipeline, 1)
	c := &Client{
		open:    open,
		cfg:     cfg,
		done:    make(chan struct{}),
		wake:    make(chan struct{}, 1),
		trans:   make(chan struct{}, 1),
		wide:    make(chan struct{}, 1),
		flight:  make(map[uint32]*request),
		watches: make(map[string]*Watch),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	go c.run(rwc)
	return c, nil
}

// Close closes the connection, and with it every watch and open transaction. It
// waits until the Client's goroutines have ended, is idempotent and returns nil.
func (c *Client) Close() error {
	c.cancel()
	<-c.done
	return nil
}

// Done returns a channel that is closed when, after Close, no goroutine of the Client
// runs.
func (c *Client) Done() <-chan struct{} { return c.done }

// Logger returns Config.Logger, or a silent logger; never nil.
func (c *Client) Logger() *slog.Logger { return c.cfg.Logger }

// Stats returns a snapshot of the counters.
func (c *Client) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

// do sends r and waits for its answer.
func (c *Client) do(ctx context.Context, r *request) (string, error) {
	if err := context.Cause(ctx); err != nil {
		return "", r.wrap(err)
	}
	if err := c.post(r); err != nil {
		return "", err
	}
	return c.await(ctx, r)
}

// await waits for the answer to a request that was posted.
func (c *Client) await(ctx context.Context, r *request) (string, error) {
	select {
	case <-r.done:
	case <-ctx.Done():
		if c.abandon(r) {
			return "", r.wrap(context.Cause(ctx))
		}
	}
	return r.reply, r.err
}

// together sends requests that do not depend on each other, as many at once as the
// pipeline allows. Each request has its own reply and error.
func (c *Client) together(ctx context.Context, rs []*request) (replies []string, errs []error) {
	replies, errs = make([]string, len(rs)), make([]error, len(rs))
	for i, r := range rs {
		if err := context.Cause(ctx); err != nil {
			errs[i] = r.wrap(err)
		} else {
			errs[i] = c.post(r)
		}
	}
	for i, r := range rs {
		if errs[i] == nil {
			replies[i], errs[i] = c.await(ctx, r)
		}
	}
	return replies, errs
}

// post queues r. Its answer comes through r.done and r.settled.
func (c *Client) post(r *request) error {
	n := 0
	for _, p := range r.parts {
		n += len(p)
	}
	if n > c.cfg.MaxPayload {
		return &Error{Op: opName(r.op), Path: Clip(r.path), Code: ErrTooBig}
	}
	r.done = make(chan struct{})
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.postLocked(r)
}

func (c *Client) postLocked(r *request) error {
	if c.closed {
		return r.wrap(hypercall.ErrClosed)
	}
	c.queue = append(c.queue, r)
	c.kick()
	return nil
}

func (c *Client) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// abandon notes that nobody waits for r any more. It reports false if r has its answer
// already.
func (c *Client) abandon(r *request) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-r.done:
		return false
	default:
	}
	r.gone = true
	if i := slices.Index(c.queue, r); i >= 0 {
		c.queue = slices.Delete(c.queue, i, i+1)
		c.settleLocked(r, "", r.wrap(context.Canceled))
	}
	return true
}

// wrap adds the request to an error that did not come from xenstored.
func (r *request) wrap(err error) error {
	return fmt.Errorf("xenstore %s: %w", strings.TrimSpace(opName(r.op)+" "+Clip(r.path)), err)
}

// settleLocked gives r its answer.
func (c *Client) settleLocked(r *request, reply string, err error) {
	r.reply, r.err = reply, err
	if r.settled != nil {
		r.settled()
	}
	close(r.done)
}

package server

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/xenstore/wire"
)

// A client is one connection. The goroutine that called ServeConn reads it; another
// goroutine writes it. Store.mu guards all fields but the first group.
type client struct {
	s       *Store
	conn    io.ReadWriteCloser
	closing sync.Once // guards conn.Close
	dom     *domain
	backlog int // bytes of out over which the client is behind; over twice as many it is ended
	pending int // replies in out at which its requests are no longer read

	err     error         // why the client ended; nil while it lives
	ended   chan struct{} // closed with err
	flush   bool          // messages still in out at the end are to be written
	changed *sync.Cond    // on Store.mu: err, out or replies changed

	watches []*watch // in order of registration
	txs     map[uint32]*transaction
	lastTx  uint32

	out     []message           // to be written, oldest first
	waiting map[string]struct{} // payloads of the events in out
	queued  int                 // bytes that out holds
	replies int                 // replies in out or being written
	moved   time.Time           // when the client last read something, or its queue was empty
	behind  *client             // the client whose backlog the last request filled
}

type message struct {
	hdr     wire.Header
	payload string
	event   bool // may merge with a waiting event of the same payload
}

// messageCost is roughly the overhead of a waiting message, in bytes.
const messageCost = 128

// writeChunk bounds the bytes that a writer takes out of the queue at once: events that
// it has taken can no longer merge.
const writeChunk = 32 << 10

// stallTime is how long a client that is behind may read nothing before it is ended.
const stallTime = time.Second

// flushTime is how long a client that has sent its last request may take to read the last
// replies.
const flushTime = time.Second

// ServeConn serves one connection of the domain, which is domain 0 or was introduced. It
// blocks until the client closes the connection (nil), sends a malformed message, does
// not read its events ([ErrBacklog]), the domain dies ([hypercall.ErrNoDomain]) or the
// store is closed ([net.ErrClosed]). Then it closes conn. Close of conn must unblock its
// Read and Write.
//
// A domain may have several connections; they share its quotas.
func (s *Store) ServeConn(conn io.ReadWriteCloser, dom hypercall.DomID) error {
	c, err := s.connect(conn, dom)
	if err != nil {
		conn.Close()
		return err
	}
	defer s.running.Done()

	written := make(chan struct{})
	go func() {
		defer close(written)
		c.writeAll()
	}()
	err = c.readAll()

	s.mu.Lock()
	c.resetLocked()
	bounded, ok := conn.(interface{ SetWriteDeadline(time.Time) error })
	c.flush = ok && c.err == nil
	c.stopLocked(err)
	flush, err := c.flush, c.err
	s.clients = slices.DeleteFunc(s.clients, func(o *client) bool { return o == c })
	c.dom.clients--
	s.stats.Connections--
	s.mu.Unlock()

	if flush {
		bounded.SetWriteDeadline(time.Now().Add(flushTime))
		<-written
	}
	c.close()
	<-written
	if err == io.EOF {
		return nil
	}
	return err
}

// Admit reserves a place in the domain's quota of connections before the connection is
// made, so that the caller learns why it is refused. The next ServeConn of the domain
// uses that place.
func (s *Store) Admit(dom hypercall.DomID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.domains[dom]
	switch {
	case s.closed != nil:
		return s.closed
	case d == nil: // connect checks the domain again
		return nil
	case !d.privileged && d.clients >= s.cfg.Quota.Connections:
		return fmt.Errorf("%w: it has %d, and the embedded xenstore allows no more (Quota.Connections); each frontend device and each backend process takes one", ErrConnections, d.clients)
	}
	d.clients++
	d.admitted++
	return nil
}

// connect admits a connection or refuses it.
func (s *Store) connect(conn io.ReadWriteCloser, dom hypercall.DomID) (*client, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.domains[dom]
	if s.closed != nil {
		return nil, s.closed
	}
	if d == nil {
		return nil, hypercall.ErrNoDomain
	}
	c := &client{
		s: s, conn: conn, dom: d,
		backlog: s.cfg.Backlog,
		pending: s.cfg.Quota.Outstanding,
		ended:   make(chan struct{}),
		changed: sync.NewCond(&s.mu),
		txs:     make(map[uint32]*transaction),
		waiting: make(map[string]struct{}),
	}
	admitted := d.admitted > 0
	if d.privileged {
		c.backlog *= privilegedFactor
		c.pending *= privilegedFactor
	} else if !admitted && d.clients >= s.cfg.Quota.Connections {
		return nil, ErrConnections
	}
	if admitted {
		d.admitted--
	} else {
		d.clients++
	}
	s.running.Add(1)
	s.clients = append(s.clients, c)
	s.stats.Connections++
	return c, nil
}

// readAll handles requests until the connection ends, and returns why it ended.
func (c *client) readAll() error {
	buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
	in := bufio.NewReaderSize(c.conn, len(buf)) // else each message would take two read calls
	for {
		h, p, err := wire.ReadMessage(in, buf)
		if err != nil {
			if errors.Is(err, wire.ErrTooLong) {
				c.s.mu.Lock()
				c.s.stats.ProtocolKills++
				c.s.mu.Unlock()
			}
			return err
		}
		if err := c.handle(h, p); err != nil {
			return err
		}
	}
}

// handle runs one request and waits until the client may send the next.
func (c *client) handle(h wire.Header, p []byte) error {
	c.s.mu.Lock()
	if c.err == nil {
		c.s.stats.Requests++
		r := &request{s: c.s, dom: c.dom, c: c, hdr: h, arg: p}
		if err := r.run(); err != nil {
			c.s.stats.Errors++
			r.reply(wire.Error, string(err.(Errno))+"\x00")
		}
	}
	c.waitLocked()
	err, pause := c.err, c.dom.pauseLocked()
	c.s.mu.Unlock()
	if err != nil || pause == 0 {
		return err
	}
	select {
	case <-time.After(pause):
	case <-c.ended:
	}
	return nil // the next call of handle returns c.err
}

// waitLocked waits until the client has read enough replies. If this client filled the
// backlog of a client that does read, it also waits until that one has caught up.
func (c *client) waitLocked() {
	if c.err == nil && c.replies >= c.pending {
		c.s.stats.RepliesUnread++
		for c.err == nil && c.replies >= c.pending {
			c.changed.Wait()
		}
	}
	w := c.behind
	if w == nil {
		return
	}
	c.s.stats.Throttled++
	waiting := true
	var timer *time.Timer
	timer = time.AfterFunc(stallTime, func() {
		c.s.mu.Lock()
		defer c.s.mu.Unlock()
		if w.endIfStalledLocked(); waiting {
			timer.Reset(stallTime)
		}
	})
	for c.err == nil && w.err == nil && w.queued > w.backlog/2 {
		w.changed.Wait()
	}
	waiting = false
	timer.Stop()
	c.behind = nil
}

func (c *client) endIfStalledLocked() {
	if c.err == nil && c.queued > c.backlog/2 && time.Since(c.moved) >= stallTime {
		c.s.stats.BacklogKills++
		c.endLocked(ErrBacklog)
	}
}

// checkBacklogLocked is called after an event was queued. It ends a client over its
// backlog that does not read. If the client does read, it makes the unprivileged client
// that caused the event wait.
func (c *client) checkBacklogLocked(cause *request) {
	if c.queued <= c.backlog {
		return
	}
	c.endIfStalledLocked()
	if c.err == nil && c.queued > 2*c.backlog {
		c.s.stats.BacklogKills++
		c.endLocked(ErrBacklog)
	}
	if c.err == nil && cause != nil && cause.c != nil && cause.c != c && !cause.dom.privileged {
		cause.c.behind = c
	}
}

func (c *client) queueLocked(m message) {
	if c.err != nil {
		return
	}
	if len(c.out) == 0 {
		c.moved = time.Now()
	}
	c.out = append(c.out, m)
	c.queued += messageCost + len(m.payload)
	c.changed.Broadcast()
}

// writeAll writes the queue until the client ends. If flush is set, it then writes what
// is left.
func (c *client) writeAll() {
	var buf []byte
	for {
		var replies int
		buf, replies = c.take(buf[:0])
		if len(buf) == 0 {
			return
		}
		_, err := c.conn.Write(buf)
		c.s.mu.Lock()
		c.replies -= replies
		c.moved = time.Now()
		if err != nil {
			c.endLocked(err)
		}
		c.changed.Broadcast()
		c.s.mu.Unlock()
	}
}

// take encodes the next messages into buf. It returns none once the client has ended.
func (c *client) take(buf []byte) (_ []byte, replies int) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for len(c.out) == 0 && c.err == nil {
		c.changed.Wait()
	}
	if c.err != nil && !c.flush {
		return buf, 0
	}
	n := 0
	for ; n < len(c.out) && len(buf) < writeChunk; n++ {
		m := &c.out[n]
		buf, _ = wire.Append(buf, m.hdr, m.payload) // queued messages fit, so there is no error
		c.queued -= messageCost + len(m.payload)
		if m.event {
			delete(c.waiting, m.payload)
		}
		if m.hdr.Op != wire.WatchEvent {
			replies++
		}
		*m = message{}
	}
	c.out = c.out[n:]
	if len(c.out) == 0 {
		c.out = nil
	}
	c.changed.Broadcast()
	return buf, replies
}

// stopLocked records why the client ended, unless it has ended already, and wakes every
// goroutine that waits for it.
func (c *client) stopLocked(err error) (first bool) {
	if c.err != nil {
		return false
	}
	c.err = err
	close(c.ended)
	c.changed.Broadcast()
	if c.behind != nil {
		c.behind.changed.Broadcast()
	}
	return true
}

// endLocked ends the client from a goroutine that is not its reader.
func (c *client) endLocked(err error) {
	if c.stopLocked(err) {
		go c.close() // Close may block, and the caller holds Store.mu
	}
}

func (c *client) close() {
	c.closing.Do(func() { c.conn.Close() })
}

// resetLocked removes the client's watches and transactions.
func (c *client) resetLocked() {
	for _, w := range c.watches {
		c.forgetWatchLocked(w)
	}
	c.watches = nil
	for _, t := range c.txs {
		c.endTxLocked(t)
	}
}

package store

import (
	"errors"
	"io"
	"slices"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/wire"
)

// A client is one connection. Its reader is the goroutine that called ServeConn,
// its writer one more. All but the first group is guarded by Store.mu.
type client struct {
	s       *Store
	conn    io.ReadWriteCloser
	closing sync.Once // guards conn.Close
	dom     *domain
	backlog int // bytes of out at which the client counts as dead
	pending int // replies in out at which its requests are not read any more

	err     error      // why it ended; nil while it lives
	changed *sync.Cond // on Store.mu: err, out or replies changed

	watches []*watch // in order of registration
	txs     map[uint32]*transaction
	lastTx  uint32

	out     []message           // to be written, oldest first
	waiting map[string]struct{} // payloads of the events in out
	queued  int                 // bytes that out holds on to
	replies int                 // in out or being written
}

type message struct {
	hdr     wire.Header
	payload string
	event   bool // may merge with one of the same payload
}

// messageCost is what a waiting message takes beside its payload, roughly.
const messageCost = 128

// writeChunk bounds what a writer takes out of the queue at once: what it has
// taken can merge with nothing any more.
const writeChunk = 32 << 10

// flushTime is how long a client that sent its last request may take to read its
// last replies.
const flushTime = time.Second

// ServeConn serves one connection of the domain: one that Introduce made known, or
// domain 0. It blocks until the client closes it (nil), sends what is no message,
// does not read its events ([ErrBacklog]), the domain dies
// ([hypercall.ErrNoDomain]) or the store is closed ([net.ErrClosed]), and closes
// conn. Close of conn must end a Read and a Write that are blocked.
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
	if c.err == nil {
		c.err = err
	}
	err = c.err
	c.changed.Broadcast()
	s.clients = slices.DeleteFunc(s.clients, func(o *client) bool { return o == c })
	c.dom.clients--
	s.stats.Connections--
	s.mu.Unlock()

	// Replies to the last requests may still be on their way.
	if d, ok := conn.(interface{ SetWriteDeadline(time.Time) error }); ok && err == io.EOF {
		d.SetWriteDeadline(time.Now().Add(flushTime))
		<-written
	}
	c.close()
	<-written
	if err == io.EOF {
		return nil
	}
	return err
}

// connect is where a connection is let in or not.
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
		changed: sync.NewCond(&s.mu),
		txs:     make(map[uint32]*transaction),
		waiting: make(map[string]struct{}),
	}
	if d.privileged {
		c.backlog *= privilegedFactor
		c.pending *= privilegedFactor
	} else if d.clients >= s.cfg.Quota.Connections {
		return nil, ErrConnections
	}
	d.clients++
	s.running.Add(1)
	s.clients = append(s.clients, c)
	s.stats.Connections++
	return c, nil
}

// readAll handles requests until the connection ends, and says why.
func (c *client) readAll() error {
	buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
	for {
		h, p, err := wire.ReadMessage(c.conn, buf)
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
	defer c.s.mu.Unlock()
	if c.err == nil {
		c.s.stats.Requests++
		r := &request{s: c.s, dom: c.dom, c: c, hdr: h, arg: p}
		if err := r.run(); err != nil {
			c.s.stats.Errors++
			r.reply(wire.Error, string(err.(Errno))+"\x00")
		}
	}
	for c.err == nil && c.replies >= c.pending {
		c.changed.Wait()
	}
	return c.err
}

func (c *client) queueLocked(m message) {
	if c.err != nil {
		return
	}
	c.out = append(c.out, m)
	c.queued += messageCost + len(m.payload)
	c.changed.Broadcast()
}

// writeAll writes what is queued until the client ends and, if it ended by itself,
// what was queued by then.
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
		if err != nil {
			c.endLocked(err)
		}
		c.changed.Broadcast()
		c.s.mu.Unlock()
	}
}

// take encodes the next messages to buf, none once the client has ended.
func (c *client) take(buf []byte) (_ []byte, replies int) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for len(c.out) == 0 && c.err == nil {
		c.changed.Wait()
	}
	if c.err != nil && c.err != io.EOF {
		return buf, 0
	}
	n := 0
	for ; n < len(c.out) && len(buf) < writeChunk; n++ {
		m := &c.out[n]
		buf, _ = wire.Append(buf, m.hdr, m.payload) // queued messages fit
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
	return buf, replies
}

// endLocked ends the client for the reason given, unless it has ended already.
func (c *client) endLocked(err error) {
	if c.err != nil {
		return
	}
	c.err = err
	c.changed.Broadcast()
	go c.close() // may block, and the store must not
}

func (c *client) close() {
	c.closing.Do(func() { c.conn.Close() })
}

// resetLocked takes away watches and transactions.
func (c *client) resetLocked() {
	for _, w := range c.watches {
		c.forgetWatchLocked(w)
	}
	c.watches = nil
	for _, t := range c.txs {
		c.endTxLocked(t)
	}
}

package xenstore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/internal/pause"
	"barevif/xenbus/xenstore/wire"
)

// run keeps a connection open until Close, with a growing delay between attempts.
// net.ErrClosed from open means that the domain has ended: then run ends the client too.
func (c *Client) run(rwc io.ReadWriteCloser) {
	defer close(c.done)
	const first, last = 5 * time.Millisecond, time.Second
	delay := first
	for {
		if rwc != nil {
			err := c.serve(rwc)
			c.mu.Lock()
			if c.useful {
				delay = first
			}
			c.mu.Unlock()
			if c.ctx.Err() == nil {
				c.cfg.Logger.Warn("xenstore connection lost", "err", err)
			}
		}
		if pause.Wait(c.ctx, pause.Jitter(delay)) != nil {
			break
		}
		delay = min(2*delay, last)
		var err error
		if rwc, err = c.open(c.ctx); err != nil {
			rwc = nil
		}
		if errors.Is(err, hypercall.ErrClosed) {
			break
		}
	}
	c.end()
}

// end fails every waiting request and watch. No request can be posted afterwards.
func (c *Client) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for _, r := range c.queue {
		c.settleLocked(r, "", r.wrap(hypercall.ErrClosed))
	}
	c.queue = nil
	for _, w := range c.watches {
		w.endLocked(hypercall.ErrClosed)
	}
	clear(c.watches)
}

// serve runs one connection until it breaks, and closes it.
func (c *Client) serve(rwc io.ReadWriteCloser) error {
	c.begin()
	quit := make(chan struct{})
	written := make(chan error, 1)
	var once sync.Once
	shut := func() { once.Do(func() { rwc.Close() }) } // unblocks a pending Read and Write
	unhook := context.AfterFunc(c.ctx, shut)
	go func() {
		err := c.writeLoop(rwc, quit)
		if err != nil {
			shut()
		}
		written <- err
	}()
	err := c.readLoop(rwc)
	close(quit)
	unhook()
	shut()
	if werr := <-written; werr != nil {
		err = werr
	}
	c.broken(err)
	return err
}

// begin starts a new epoch. It queues the requests that set the watches again before all
// others.
func (c *Client) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch++
	if c.epoch > 1 {
		c.stats.Reconnects++
	}
	c.useful = false
	var again []*request
	for _, w := range c.watches {
		if w.set {
			again = append(again, w.renewLocked(c.epoch))
		}
	}
	c.queue = append(again, c.queue...)
}

// broken settles the requests that were in flight on the lost connection. It queues those
// that may be sent again, in their old order.
func (c *Client) broken(cause error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var violation *ProtocolError
	if errors.As(cause, &violation) {
		c.stats.Violations++
	}
	sent := make([]*request, 0, len(c.flight))
	for _, r := range c.flight {
		sent = append(sent, r)
	}
	slices.SortFunc(sent, func(a, b *request) int { return int(int32(a.id - b.id)) })
	clear(c.flight)

	var keep []*request
	for _, r := range sent {
		switch {
		case r.epoch != 0 && r.lost != nil:
			c.settleLocked(r, "", r.lost)
		case r.again && r.epoch == 0 && !r.gone && r.tries < maxTries:
			keep = append(keep, r)
		default:
			c.settleLocked(r, "", r.wrap(fmt.Errorf("%w (%w)", ErrLost, cause)))
		}
	}
	c.queue = append(keep, c.queue...)
}

// writeLoop sends the queued requests, as far as the pipeline allows.
func (c *Client) writeLoop(w io.Writer, quit <-chan struct{}) error {
	buf := make([]byte, 0, wire.HeaderSize+wire.MaxPayload)
	for {
		var last *request
		n := 0
		for buf = buf[:0]; len(buf) < writeChunk; n++ { // join the queued messages into one write
			r := c.next()
			if r == nil {
				break
			}
			var err error
			buf, err = wire.Append(buf, wire.Header{Op: r.op, ReqID: r.id, TxID: r.tx}, r.parts...)
			if err != nil {
				return err // cannot happen: post has checked the length
			}
			last = r
		}
		if n == 0 {
			select {
			case <-c.wake:
				continue
			case <-quit:
				return nil
			}
		}
		if _, err := w.Write(buf); err != nil && (n > 1 || !c.refusedByWrite(last, err)) {
			return err
		}
	}
}

// writeChunk is the length in bytes from which writeLoop adds no further message to a
// write.
const writeChunk = 1024

// next takes the next request that may be sent and gives it an id.
func (c *Client) next() *request {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) > 0 && len(c.flight) < c.cfg.Pipeline {
		r := c.queue[0]
		c.queue = slices.Delete(c.queue, 0, 1)
		if r.epoch != 0 && r.epoch != c.epoch {
			err := r.lost
			if err == nil {
				err = r.wrap(ErrLost)
			}
			c.settleLocked(r, "", err)
			continue
		}
		c.lastID++
		for c.lastID == 0 || c.flight[c.lastID] != nil {
			c.lastID++
		}
		r.id, r.sentOn = c.lastID, c.epoch
		r.tries++
		c.flight[r.id] = r
		c.stats.Requests++
		return r
	}
	return nil
}

// refusedByWrite reports whether a failed write was the answer to r. The kernel's node
// refuses a watch with the errno of write(2), and the connection stays usable. Only a
// file reports its errors as a PathError; a broken socket does not.
func (c *Client) refusedByWrite(r *request, err error) bool {
	var file *fs.PathError
	if r.op != wire.Watch || !errors.As(err, &file) || errors.Is(err, fs.ErrClosed) {
		return false
	}
	refused := &Error{Op: opName(r.op), Path: r.path, Code: ErrUnknown, Text: Clip(file.Err.Error())}
	for _, code := range []Code{ErrAccess, ErrNotFound, ErrExists} {
		if errors.Is(err, code.portable()) {
			refused.Code, refused.Text = code, ""
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.flight[r.id] == r {
		delete(c.flight, r.id)
		c.settleLocked(r, "", refused)
	}
	return true
}

// readLoop takes each message as soon as it arrives; it never waits for a consumer.
func (c *Client) readLoop(r io.Reader) error {
	buf := make([]byte, wire.HeaderSize+wire.MaxPayload)
	r = bufio.NewReaderSize(r, len(buf)) // else each message would take two read calls
	for {
		h, payload, err := wire.ReadMessage(r, buf)
		if errors.Is(err, wire.ErrTooLong) {
			return &ProtocolError{fmt.Sprintf("a message of %d bytes", h.Len)}
		}
		if err != nil {
			return err
		}
		// Look at the type first: an event has no defined request id.
		if h.Op == wire.WatchEvent {
			err = c.event(payload)
		} else {
			err = c.answer(h, payload)
		}
		if err != nil {
			return err
		}
	}
}

// answer settles the request that a reply belongs to.
func (c *Client) answer(h wire.Header, payload []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.flight[h.ReqID]
	if r == nil {
		return &ProtocolError{fmt.Sprintf("a reply to request %d, which is not outstanding", h.ReqID)}
	}
	if h.Op != r.op && h.Op != wire.Error {
		return &ProtocolError{fmt.Sprintf("a reply of type %d to request type %d", h.Op, r.op)}
	}
	delete(c.flight, h.ReqID)
	c.useful = true
	c.kick() // the pipeline has room for another request
	if h.Op == wire.Error {
		code, text := parseCode(string(payload))
		c.settleLocked(r, "", &Error{Op: opName(r.op), Path: r.path, Code: code, Text: text})
	} else {
		c.settleLocked(r, string(payload), nil)
	}
	return nil
}

//go:build linux

package handover

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet"
)

// A Client takes vifs over from the process that listens. Its methods may be called from
// any goroutine.
type Client struct {
	conn    *conn
	id      Identity
	program string
	settled chan struct{} // closed when every vif of the hello has been settled

	turn chan struct{} // one token: whoever holds it has the session, from a take to its took or cannot

	mu    sync.Mutex
	left  map[string]bool // guarded by mu; vifs of the hello that were not settled
	moved time.Time       // guarded by mu; when the last one was
	taken int             // guarded by mu
	err   error           // guarded by mu; why the session is over
}

// Dial connects to the process that listens at path, and agrees with it. The error is a
// [*RefusedError] if it hands nothing over, or else fs.ErrNotExist or ECONNREFUSED if
// nobody listens, and os.ErrPermission for a process of another user.
func Dial(ctx context.Context, path string, id Identity) (*Client, error) {
	nc, err := new(net.Dialer).DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("handover: %w", err)
	}
	c := &Client{
		id: id, conn: newConn(nc.(*net.UnixConn)), settled: make(chan struct{}), turn: make(chan struct{}, 1),
		left: make(map[string]bool), moved: time.Now(),
	}
	c.turn <- struct{}{}
	stop := context.AfterFunc(ctx, func() { nc.Close() })
	defer stop()
	if err := c.hello(id); err != nil {
		nc.Close()
		return nil, err
	}
	return c, nil
}

func (c *Client) hello(id Identity) error {
	if _, err := checkPeer(c.conn); err != nil {
		return err
	}
	if err := c.conn.send(id.hello(nil), nil); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	m, files, err := c.conn.receive(time.Now().Add(helloPatience))
	if err != nil {
		return fmt.Errorf("handover: no answer: %w", err)
	}
	closeAll(files)
	if m.Op == opNo {
		return &RefusedError{clip(m.Program), clip(m.Why)}
	}
	if why := id.agree(m); why != "" {
		return &RefusedError{clip(m.Program), why}
	}
	for _, vif := range m.Vifs {
		if validName(vif) {
			c.left[vif] = true
		}
	}
	c.program = clip(m.Program)
	if len(c.left) == 0 {
		close(c.settled)
	}
	return nil
}

// Program returns how the other process calls itself.
func (c *Client) Program() string { return c.program }

// Taken returns how many vifs have come.
func (c *Client) Taken() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.taken
}

// TakeOver is a [pvnet.ServeConfig].TakeOver and, with Identity.Frontend, an ask of
// [pvnet.TakeOver]: peer is the domain of the other end. Vifs come one after another: it
// waits for the one before. If ctx ends first, it fails with the cause. If the other process
// was asked for the vif by then, the session is over: that process keeps the vif, and those that
// have not come.
func (c *Client) TakeOver(ctx context.Context, peer hypercall.DomID, id string) (*pvnet.TakenVif, error) {
	vif := c.id.name(peer, id)
	select {
	case <-c.turn:
	case <-ctx.Done():
		c.settle(vif, false)
		return nil, context.Cause(ctx)
	}
	pass := func() { c.turn <- struct{}{} }
	in, err := c.take(ctx, vif)
	if in == nil {
		c.settle(vif, false)
		pass()
		return nil, err
	}
	in.Accept = func() error {
		defer pass()
		err := c.fail(c.conn.send(&message{Op: opTook, Vif: vif}, nil))
		c.settle(vif, err == nil)
		return err
	}
	in.Refuse = func(why error) {
		defer pass()
		_ = c.fail(c.conn.send(&message{Op: opCannot, Vif: vif, Why: clip(why.Error())}, nil))
		c.settle(vif, false)
	}
	return in, nil
}

// Offers reports whether the other process has vif id, whose other end is in domain peer, as far as this one
// knows: it has said so, and the vif has neither come nor been declined.
func (c *Client) Offers(peer hypercall.DomID, id string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.left[c.id.name(peer, id)]
}

// Decline says that this process does not want vif id, whose other end is in domain peer: the other
// process keeps it until it ends, and Finish does not wait for it.
func (c *Client) Decline(peer hypercall.DomID, id string) { c.settle(c.id.name(peer, id), false) }

// take asks for a vif. It returns nil if the other process does not have it, or has ended. If
// ctx ends before the answer has come the session is over: an answer that came later would be
// taken for that about the next vif.
func (c *Client) take(ctx context.Context, vif string) (*pvnet.TakenVif, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	c.mu.Lock()
	over := c.err != nil
	c.mu.Unlock()
	if over {
		return nil, nil
	}
	stop := c.failAfter(ctx)
	in, err := c.ask(vif)
	if stop() {
		return in, err
	}
	if in != nil {
		closeAll(in.Files)
	}
	// The function of failAfter may not have run yet.
	return nil, c.fail(fmt.Errorf("handover: vif %s has not come: %w", vif, context.Cause(ctx)))
}

// failAfter ends the session when ctx ends, unless stop is called before, which then reports true.
func (c *Client) failAfter(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = c.fail(context.Cause(ctx)) })
}

// ask sends the request for a vif, and waits for the answer.
func (c *Client) ask(vif string) (*pvnet.TakenVif, error) {
	if err := c.fail(c.conn.send(&message{Op: opTake, Vif: vif}, nil)); err != nil {
		return nil, err
	}
	m, files, err := c.conn.receive(time.Now().Add(holdPatience + answerPatience + 30*time.Second)) // its callers may take 10 s to leave, as may its control ring, and lent frames 2 s
	switch {
	case err != nil:
		return nil, c.fail(err)
	case m.Op == opGiven && m.Vif == vif:
		in := &pvnet.TakenVif{Held: max(0, time.Duration(m.Held)), Files: files}
		if m.State != 0 {
			if in.State, err = c.conn.receiveState(m.State, time.Now().Add(answerPatience)); err != nil {
				closeAll(files)
				return nil, c.fail(err)
			}
		}
		return in, nil
	case m.Op == opNone && m.Vif == vif:
		closeAll(files)
		if m.Why != notServed {
			return nil, fmt.Errorf("handover: the other process keeps the vif: %s", clip(m.Why))
		}
		return nil, nil
	}
	closeAll(files)
	return nil, c.fail(fmt.Errorf("handover: the answer for vif %s is %q for vif %q", vif, clip(m.Op), clip(m.Vif)))
}

// fail ends the session if err is not nil, and returns err.
func (c *Client) fail(err error) error {
	if err == nil {
		return nil
	}
	if err == io.EOF || errors.Is(err, os.ErrDeadlineExceeded) {
		err = fmt.Errorf("handover: the process that served the vifs does not answer: %w", err)
	}
	c.mu.Lock()
	if c.err == nil {
		c.err = err
	}
	c.mu.Unlock()
	c.conn.Close()
	return err
}

// settle notes that it is known who has the vif.
func (c *Client) settle(vif string, taken bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if taken {
		c.taken++
	}
	c.moved = time.Now()
	if c.left[vif] {
		if delete(c.left, vif); len(c.left) == 0 {
			close(c.settled)
		}
	}
}

// quiet is how long Finish waits for the next vif: one whose directory is gone never comes.
const quiet = 5 * time.Second

// Finish waits until all vifs of the other process have come, or 5 s after the last one,
// and then tells that process to end; the vifs that it still has are given up and can be
// claimed. It returns once that process no longer listens. The error says why it may serve
// on: it does not answer, or ctx has ended first.
func (c *Client) Finish(ctx context.Context) error {
	for waiting := true; waiting; {
		c.mu.Lock()
		left := time.Until(c.moved.Add(quiet))
		c.mu.Unlock()
		t := time.NewTimer(left)
		select {
		case <-c.settled:
			waiting = false
		case <-t.C:
			waiting = left > 0
		case <-ctx.Done():
			t.Stop()
			c.conn.Close()
			return context.Cause(ctx)
		}
		t.Stop()
	}
	defer c.conn.Close()
	select {
	case <-c.turn:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { c.turn <- struct{}{} }()
	c.mu.Lock()
	err := c.err
	c.mu.Unlock()
	if err != nil {
		return err
	}
	stop := c.failAfter(ctx)
	err = c.dismiss()
	if !stop() && err != nil {
		return context.Cause(ctx)
	}
	return err
}

// dismiss tells the other process to end, and waits for its answer.
func (c *Client) dismiss() error {
	if err := c.fail(c.conn.send(&message{Op: opDone}, nil)); err != nil {
		return err
	}
	m, files, err := c.conn.receive(time.Now().Add(helloPatience))
	closeAll(files)
	switch {
	case err == io.EOF:
		return c.over() // it ended at once
	case err != nil:
		return c.fail(err)
	case m.Op != opBye:
		return c.fail(fmt.Errorf("handover: the answer to the end is %q", clip(m.Op)))
	}
	return c.over()
}

// over makes later calls of TakeOver find nothing.
func (c *Client) over() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = net.ErrClosed
	return nil
}

// Close ends the session; the other process keeps the vifs that were not taken.
func (c *Client) Close() error { return c.conn.Close() }

package netstack

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"barevif/pvnet"
)

// A holds is the state of Hold and Resume.
type holds struct {
	asked atomic.Bool // the receivers are to rest; written under mu

	mu      sync.Mutex
	held    bool          // guarded by mu; between Hold and Resume
	resume  chan struct{} // guarded by mu; closed by goOn; nil: the receivers are not to rest
	resting int           // guarded by mu; receivers that wait for goOn
	over    bool          // guarded by mu; Close was called
}

// rest waits for goOn if the receivers are to rest, and reports whether the receiver goes on; it
// has no deadline then.
func (h *holds) rest(dev *pvnet.Device, rx *pvnet.RX) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if resume := h.resume; resume != nil { // else a Hold has given up, or Close was called
		h.resting++
		h.mu.Unlock()
		select {
		case <-resume:
		case <-dev.Done():
		}
		h.mu.Lock()
	}
	if !h.over { // Close sets over before the deadline that ends the receiver
		rx.SetDeadline(time.Time{})
	}
	return !h.over
}

// begin takes note of a Hold, unless there is one.
func (h *holds) begin() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.over || h.held {
		return errors.New("netstack: the stack is closed, or held already")
	}
	h.held = true
	return nil
}

// stop makes the receivers rest. What they have received by then they give to the stack; they
// leave the rest in the ring.
func (h *holds) stop(rxs []*pvnet.RX) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.over {
		return
	}
	if h.resume == nil {
		h.resume = make(chan struct{})
	}
	h.asked.Store(true)
	for _, rx := range rxs {
		rx.SetDeadline(past)
	}
}

// goOn ends stop.
func (h *holds) goOn() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.goOnLocked()
}

func (h *holds) goOnLocked() {
	h.asked.Store(false)
	h.resting = 0
	if h.resume != nil {
		close(h.resume)
		h.resume = nil
	}
}

// allRest reports whether n receivers rest.
func (h *holds) allRest(n int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.resting == n
}

// close ends Hold for good.
func (h *holds) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.over = true
	h.goOnLocked()
}

// answerPatience is the default of Stack.patience.
const answerPatience = 100 * time.Millisecond

// A program may read its datagrams in one goroutine and answer them in another, which nobody
// can see. So Hold also waits until no datagram was sent for quietTime, and quietMost at most,
// if the stack has datagram sockets that were read.
const (
	quietTime = 3 * time.Millisecond
	quietMost = 30 * time.Millisecond
)

// Hold stops the stack's card between two frames, so that its device can be handed to another
// process (pvnet/handover): no more frames are received, which wait in the device's ring, those
// that were received are answered, the answers are sent, and later packets wait for Resume.
//
// An answer may wait for a neighbour to say its MAC address, or for the program that reads a
// datagram socket. Hold waits for both, up to 100 ms, and says in the device's log what was
// not answered in that time. A program has answered a datagram when it reads again; a socket
// that was never read holds up nothing. No answer is awaited on TCP connections, which do not
// outlive the process, and to fragments of packets.
//
// Hold fails if ctx ends first, if the device takes none of the packets for 100 ms although its
// link is up, or after Close, and the stack goes on then. One goroutine at a time calls Hold
// and Resume.
//
// The other process has a stack of its own. It knows nothing of this one's connections: it
// answers their segments with a RST.
func (s *Stack) Hold(ctx context.Context) error {
	if err := s.card.holds.begin(); err != nil {
		return err
	}
	err := s.hold(ctx)
	if err != nil {
		s.Resume()
	}
	return err
}

func (s *Stack) hold(ctx context.Context) error {
	c := s.card
	end := time.Now().Add(s.patience)
	for {
		// While frames are still received, and among them what a neighbour answers.
		if err := c.until(ctx, end, func() bool { return !s.resolves() }); err != nil {
			return err
		}
		c.holds.stop(c.rx)
		if err := c.until(ctx, time.Time{}, func() bool { return c.holds.allRest(len(c.rx)) }); err != nil {
			return err
		}
		if err := c.until(ctx, end, func() bool { return s.due.n.Load() == 0 && !s.sockets.owe() }); err != nil {
			return err
		}
		if !s.resolves() || !time.Now().Before(end) {
			break
		}
		c.holds.goOn()
	}
	if why := s.owes(); why != "" {
		c.dev.Logger().Warn("a stack is held, and has not answered all it received", "vif", c.dev.ID(), "why", why)
	}
	if err := s.quiet(ctx); err != nil {
		return err
	}
	end = time.Now().Add(closePatience)
	for _, tx := range c.tx {
		if !tx.hold(end) {
			return errors.New("netstack: packets wait for room in the device's ring")
		}
	}
	return nil
}

// owes says why frames that were received are not answered; "": they are.
func (s *Stack) owes() string {
	switch {
	case s.resolves():
		return "a neighbour has not said its MAC address"
	case s.sockets.owe():
		return "a program has not answered a datagram"
	case s.due.n.Load() > 0:
		return "the stack has had no time to do what is due"
	}
	return ""
}

// quiet waits until programs with datagram sockets send no more.
func (s *Stack) quiet(ctx context.Context) error {
	if !s.sockets.read() {
		return nil
	}
	c := s.card
	last, since := c.written(), time.Now()
	return c.until(ctx, since.Add(quietMost), func() bool {
		now := time.Now()
		if n := c.written(); n != last {
			last, since = n, now
		}
		return now.Sub(since) >= quietTime
	})
}

// until waits until done reports true, or until end; the zero Time: until done. It fails if ctx
// or the device ends.
func (c *card) until(ctx context.Context, end time.Time, done func() bool) error {
	var t *time.Ticker
	for !done() {
		if t == nil {
			t = time.NewTicker(time.Millisecond / 4)
			defer t.Stop()
		}
		select {
		case now := <-t.C:
			if !end.IsZero() && !now.Before(end) {
				return nil
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-c.dev.Done():
			return pvnet.ErrDisconnected
		}
	}
	return nil
}

// written returns how often the stack has written packets that are not TCP's.
func (c *card) written() (n uint64) {
	for _, tx := range c.tx {
		n += tx.written()
	}
	return n
}

// receives reports whether a receiver may receive, or go on after err.
func (c *card) receives(rx *pvnet.RX, err error) bool {
	if err != nil && err != os.ErrDeadlineExceeded {
		return false
	}
	for err != nil || c.holds.asked.Load() { // again after rest, which clears the deadline of a later stop
		if !c.holds.rest(c.dev, rx) {
			return false
		}
		err = nil
	}
	return true
}

// Resume ends a Hold. It does nothing if the stack is not held.
func (s *Stack) Resume() {
	h := &s.card.holds
	h.mu.Lock()
	h.held = false
	h.goOnLocked()
	h.mu.Unlock()
	for _, tx := range s.card.tx {
		tx.resume()
	}
}

package pvnet

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"barevif/hypercall"
	"barevif/pvnet/ctrl"
	"barevif/pvnet/netif"
)

// A ctrlClient is the frontend's end of a control ring. Any goroutine may call its method
// call.
type ctrlClient struct {
	ctrlLoop
	keys   ctrlKeys
	queues int                // of the connection
	client *ctrl.Client       // the goroutine's
	pages  *hypercall.Share   // the ring and args
	static *grantClient       // nil: no static grants
	kept   bool               // what the hash client knows of the backend still holds: after a handover. Written while the goroutine does not run
	args   []byte             // a page that the backend may read, for what a request names; written in fill of callWith
	ref    hypercall.GrantRef // of args

	// whenUp is what to tell the backend each time the link comes up. The functions run one
	// after the other, on a goroutine of their own, and end when ctx does, which is when the
	// link goes down. They are added before the connection is brought up.
	whenUp  []func(ctx context.Context)
	cancel  context.CancelFunc // lifecycle goroutine only
	telling sync.WaitGroup     // whenUp runs

	mu    sync.Mutex
	up    bool        // guarded by mu: the goroutine runs
	queue []*ctrlCall // guarded by mu: calls whose requests are not in the ring yet
	asked *ctrlCall   // guarded by mu: the call whose request is in flight; nil: none, or its caller left
}

// A ctrlCall is a call that waits for its response.
type ctrlCall struct {
	typ    netif.CtrlType
	fill   func() [3]uint32
	answer chan netif.CtrlResponse // capacity 1; closed: the link went down
}

// ctrlPages is how many pages a frontend shares for its control ring: the ring and args.
const ctrlPages = 2

// askCtrl makes a control ring and the event channel for it.
func (m *setup) askCtrl(d *Device) (*ctrlClient, error) {
	pages, err := m.dom.Share(m.peer, ctrlPages, hypercall.ReadWrite)
	if err != nil {
		return nil, err
	}
	m.own(pages)
	c := newCtrlClient(d, pages, ctrl.NewClient(pages.Slice(0, 1)))
	if err := c.open(m, func(w hypercall.Waiter) (hypercall.Port, error) { return w.Unbound(m.peer) }); err != nil {
		return nil, err
	}
	c.keys = ctrlKeys{pages.Refs[0], c.port.ID()}
	return c, nil
}

func newCtrlClient(d *Device, pages *hypercall.Share, client *ctrl.Client) *ctrlClient {
	return &ctrlClient{
		ctrlLoop: ctrlLoop{d: d}, client: client, pages: pages, args: pages.Page(1), ref: pages.Refs[1],
	}
}

func (c *ctrlClient) start() {
	c.mu.Lock()
	c.up = true
	c.mu.Unlock()
	c.d.ctrl.Store(c)
	c.run(c.step)
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	c.telling.Go(func() {
		for _, tell := range c.whenUp {
			if ctx.Err() == nil {
				tell(ctx)
			}
		}
	})
}

func (c *ctrlClient) leave() {
	if c.end == nil {
		return
	}
	c.d.ctrl.Store(nil)
	c.cancel()
	c.ctrlLoop.leave()
	c.mu.Lock()
	c.up = false
	waiting := c.queue
	if c.asked != nil { // its response, if it comes after all, is for nobody
		waiting = append(waiting, c.asked)
	}
	c.queue, c.asked = nil, nil
	c.mu.Unlock()
	for _, k := range waiting {
		close(k.answer)
	}
}

func (c *ctrlClient) waitGone(end time.Time) bool {
	gone := c.ctrlLoop.waitGone(end)
	if gone {
		c.telling.Wait() // its calls have ended
	}
	return gone
}

func (c *ctrlClient) watch() {
	if c.client.Overdue() {
		c.w.Wake()
	}
}

// ctrlTimeout is how long a request waits for its response, where no caller says.
const ctrlTimeout = 5 * time.Second

// call makes a request and waits for the response, until ctx ends. There is one request in
// flight at a time: others wait for its response, also if its caller has left. The error is
// [ErrLinkDown], or says that ctx ended; neither changes the link.
//
// The backend may read a page that data names until a later call returns without an error,
// or the connection ends: fill in callWith is where such a page may be written.
func (c *ctrlClient) call(ctx context.Context, typ netif.CtrlType, data [3]uint32) (netif.CtrlStatus, uint32, error) {
	return c.callWith(ctx, typ, func() [3]uint32 { return data })
}

// callWith is call with the data that fill returns. fill runs when no request is in flight,
// so that no page that an earlier request named is in use any more.
func (c *ctrlClient) callWith(ctx context.Context, typ netif.CtrlType, fill func() [3]uint32) (netif.CtrlStatus, uint32, error) {
	k := &ctrlCall{typ: typ, fill: fill, answer: make(chan netif.CtrlResponse, 1)}
	c.mu.Lock()
	if !c.up {
		c.mu.Unlock()
		return 0, 0, ErrLinkDown
	}
	c.queue = append(c.queue, k)
	c.mu.Unlock()
	c.w.Wake()
	select {
	case r, ok := <-k.answer:
		if !ok {
			return 0, 0, ErrLinkDown
		}
		return r.Status, r.Data, nil
	case <-ctx.Done():
		c.mu.Lock()
		if c.asked == k {
			c.asked = nil
		}
		c.queue = slices.DeleteFunc(c.queue, func(q *ctrlCall) bool { return q == k })
		c.mu.Unlock()
		return 0, 0, fmt.Errorf("no answer from the backend to %v: %w", typ, context.Cause(ctx))
	}
}

// step delivers a response, makes a request if none is in flight, or else arms the ring.
func (c *ctrlClient) step() (worked, wait bool, err error) {
	slot := c.client.Slot()
	r, ok, err := c.client.Answer()
	if err != nil {
		return false, false, c.violation(slot, err.Error())
	}
	if ok {
		c.mu.Lock()
		k := c.asked
		c.asked = nil
		c.mu.Unlock()
		if k != nil {
			k.answer <- r
		}
		return true, false, nil
	}
	if k := c.next(); k != nil {
		if c.client.Ask(k.typ, k.fill()) {
			c.port.Notify()
		}
		return true, false, nil
	}
	more, err := c.client.Arm()
	if err != nil {
		return false, false, c.violation(slot, err.Error())
	}
	return false, !more, nil
}

// next takes the call whose request is to be made now; nil if there is none.
func (c *ctrlClient) next() *ctrlCall {
	if c.client.Waiting() {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) == 0 {
		return nil
	}
	k := c.queue[0]
	c.queue = c.queue[1:]
	c.asked = k
	return k
}

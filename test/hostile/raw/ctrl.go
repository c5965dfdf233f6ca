package raw

import (
	"errors"
	"fmt"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/xenstore"
)

// A CtrlReq is a request on the control ring.
type CtrlReq struct {
	ID, Type uint16
	Data     [3]uint32
}

// A CtrlRsp is a response on the control ring.
type CtrlRsp struct {
	ID, Type     uint16
	Status, Data uint32
}

// A Ctrl is one end of a control ring.
type Ctrl struct {
	Ring   Ring
	Waiter hypercall.Waiter
	Port   hypercall.Port
	Prod   uint32 // a frontend's requests put, a backend's responses
	Cons   uint32 // responses or requests taken

	share   *hypercall.Share // a frontend's
	mapping *hypercall.Mapping
}

// NewCtrlFront makes the frontend's end of a control ring in dom, for peer.
func NewCtrlFront(dom hypercall.Domain, peer hypercall.DomID) (c *Ctrl, err error) {
	c = new(Ctrl)
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	if c.share, err = dom.Share(peer, 1, hypercall.ReadWrite); err != nil {
		return c, err
	}
	c.Ring = CtrlRing(c.share.Page(0))
	c.Ring.Store(ReqEvent, 1)
	c.Ring.Store(RspEvent, 1)
	if c.Waiter, err = dom.Waiter(); err != nil {
		return c, err
	}
	c.Port, err = c.Waiter.Unbound(peer)
	return c, err
}

// Keys returns the keys that a correct frontend publishes.
func (c *Ctrl) Keys() xenstore.Values {
	return xenstore.Values{
		"ctrl-ring-ref":      fmt.Sprint(uint32(c.share.Refs[0])),
		"event-channel-ctrl": fmt.Sprint(c.Port.ID()),
	}
}

// NewCtrlBack maps the control ring that a frontend published, and binds to its port.
func NewCtrlBack(dom hypercall.Domain, peer hypercall.DomID, keys xenstore.Values) (c *Ctrl, err error) {
	c = new(Ctrl)
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
	ref, err1 := keys.Uint("ctrl-ring-ref", 1<<32-1, 0)
	port, err2 := keys.Uint("event-channel-ctrl", 1<<32-1, 0)
	if err = errors.Join(err1, err2); err != nil {
		return c, err
	}
	if c.mapping, err = dom.Map(peer, []hypercall.GrantRef{hypercall.GrantRef(ref)}, hypercall.ReadWrite); err != nil {
		return c, err
	}
	c.Ring = CtrlRing(c.mapping.Page(0))
	if c.Waiter, err = dom.Waiter(); err != nil {
		return c, err
	}
	c.Port, err = c.Waiter.Bind(peer, hypercall.PortID(port))
	return c, err
}

// Put writes requests. The backend does not see them before Push.
func (c *Ctrl) Put(reqs ...CtrlReq) {
	for _, r := range reqs {
		c.Ring.Put(c.Prod, pair(r.ID, r.Type), r.Data[0], r.Data[1], r.Data[2])
		c.Prod++
	}
}

// Push publishes the requests and notifies, whether or not the backend asked for it.
func (c *Ctrl) Push() {
	c.Ring.Store(ReqProd, c.Prod)
	c.Port.Notify()
}

// Answers waits for n responses.
func (c *Ctrl) Answers(n int, deadline time.Time) (rsp []CtrlRsp, err error) {
	if err = c.await(RspProd, RspEvent, n, deadline); err != nil {
		return nil, err
	}
	for range n {
		at := c.Ring.at(c.Cons)
		w := c.Ring.Load(at)
		rsp = append(rsp, CtrlRsp{uint16(w), uint16(w >> 16), c.Ring.Load(at + 4), c.Ring.Load(at + 8)})
		c.Cons++
	}
	return rsp, nil
}

// Requests waits for n requests.
func (c *Ctrl) Requests(n int, deadline time.Time) (reqs []CtrlReq, err error) {
	if err = c.await(ReqProd, ReqEvent, n, deadline); err != nil {
		return nil, err
	}
	for range n {
		at := c.Ring.at(c.Cons)
		w := c.Ring.Load(at)
		reqs = append(reqs, CtrlReq{uint16(w), uint16(w >> 16), [3]uint32{c.Ring.Load(at + 4), c.Ring.Load(at + 8), c.Ring.Load(at + 12)}})
		c.Cons++
	}
	return reqs, nil
}

// Answer puts responses and publishes them.
func (c *Ctrl) Answer(rsp ...CtrlRsp) {
	for _, r := range rsp {
		c.Ring.Put(c.Prod, pair(r.ID, r.Type), r.Status, r.Data)
		c.Prod++
	}
	c.Ring.Store(RspProd, c.Prod)
	c.Port.Notify()
}

// await waits until the peer's index is n ahead of what was taken.
func (c *Ctrl) await(prod, event, n int, deadline time.Time) error {
	for {
		c.Ring.Store(event, c.Cons+uint32(n))
		if have := c.Ring.Load(prod) - c.Cons; have > CtrlSize {
			return fmt.Errorf("the peer's index is %d, %d slots taken", c.Cons+have, c.Cons)
		} else if int(have) >= n {
			return nil
		}
		if err := c.Waiter.Wait(deadline, true); err != nil {
			return fmt.Errorf("waiting for %d slots: %w", n, err)
		}
	}
}

// Close gives the page back and closes the port. The error is [hypercall.ErrInUse] if the
// backend still maps the page.
func (c *Ctrl) Close() (err error) {
	if c.share != nil {
		err = c.share.End()
	}
	if c.mapping != nil {
		err = errors.Join(err, c.mapping.Release())
	}
	if c.Waiter != nil {
		err = errors.Join(err, c.Waiter.Close())
	}
	return err
}

// Package ctrl is the protocol of a vif's control ring
// (xen/include/public/io/netif.h): a [Client] makes the requests of the frontend, a
// [Server] answers them in the backend.
//
// Both check all that the peer writes: a slot is copied once, and an index or a response
// that no correct peer writes is an error that is final for the ring. They know no event
// channel and no xenstore: methods report when to notify the peer, and Arm when it is safe
// to wait. Neither is safe for concurrent use, except where a method says so.
package ctrl

import (
	"errors"

	"barevif/arena/shm"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
)

// ErrUnasked is returned for a response whose id or type is not that of the request in
// flight. It is final.
var ErrUnasked = errors.New("ctrl: response to a request that was not made")

// A Client is the frontend's end. It has at most one request in flight, as the Windows
// frontend has: a backend may answer requests in any order.
type Client struct {
	ring  *ring.Front[netif.CtrlRequest, netif.CtrlResponse]
	asked netif.CtrlRequest // the last request
}

// NewClient initialises a ring page, which must be zeroed and not known to the peer yet.
func NewClient(page shm.Memory) *Client {
	return &Client{ring: ring.NewFront[netif.CtrlRequest, netif.CtrlResponse](page, netif.CtrlStride)}
}

// ResumeClient returns the client of a ring page on which another has stopped, with no
// request in flight: next is the index of its next request, id that of its last. The error
// is [ring.ErrCorrupt] if the index does not fit the page.
func ResumeClient(page shm.Memory, next uint32, id uint16) (*Client, error) {
	r, err := ring.ResumeFront[netif.CtrlRequest, netif.CtrlResponse](page, netif.CtrlStride, next, next)
	if err != nil {
		return nil, err
	}
	return &Client{ring: r, asked: netif.CtrlRequest{ID: id}}, nil
}

// At returns what [ResumeClient] needs.
func (c *Client) At() (next uint32, id uint16) { return c.ring.Next(), c.asked.ID }

// Waiting reports whether a request has no response yet.
func (c *Client) Waiting() bool { return c.ring.InFlight() > 0 }

// Ask makes a request and reports whether the peer asked to be notified. It panics if a
// request is in flight. Words of data that t does not use must be 0.
func (c *Client) Ask(t netif.CtrlType, data [3]uint32) (notify bool) {
	if c.Waiting() {
		panic("ctrl: a second request in flight")
	}
	c.asked = netif.CtrlRequest{ID: c.asked.ID + 1, Type: t, Data: data}
	c.ring.Put(c.asked)
	return c.ring.Publish()
}

// Answer returns the response to the request in flight; ok is false if there is none yet.
// The error is [ring.ErrCorrupt], also for a response while no request is in flight, or
// [ErrUnasked].
func (c *Client) Answer() (r netif.CtrlResponse, ok bool, err error) {
	n, err := c.ring.Poll()
	if n == 0 || err != nil {
		return r, false, err
	}
	r = c.ring.Take()
	if r.ID != c.asked.ID || r.Type != c.asked.Type {
		return r, false, ErrUnasked
	}
	return r, true, nil
}

// Slot returns the free-running index of the slot of the next response.
func (c *Client) Slot() uint32 { return c.ring.Consumed() }

// Arm asks the peer to notify when the next response comes, and reports whether one has
// come already. The caller may wait only if none has. The error is [ring.ErrCorrupt].
func (c *Client) Arm() (more bool, err error) { return c.ring.Arm(1) }

// Overdue reports whether the response that Arm asked for has come. A watchdog calls it
// for an owner that waits: any goroutine may, while the page is mapped.
func (c *Client) Overdue() bool { return c.ring.Overdue() }

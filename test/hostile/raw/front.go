package raw

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/xenstore"
)

// A Front is the frontend's half of a vif: rings and frame pages that it has granted, and
// ports to which the backend may bind. It writes nothing to xenstore.
type Front struct {
	Tx, Rx         Ring
	Rings          *hypercall.Share // tx, rx
	Pages          *hypercall.Share // pages to transmit from: granted read-only
	Posted         *hypercall.Share // pages to receive into
	Waiter         hypercall.Waiter
	TxPort, RxPort hypercall.Port
	TxProd, TxCons uint32 // requests put, responses taken
	RxProd, RxCons uint32
}

// NewFront makes a frontend in dom for peer, with n pages in each direction. With split
// each ring has its own event channel.
func NewFront(dom hypercall.Domain, peer hypercall.DomID, n int, split bool) (f *Front, err error) {
	f = new(Front)
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close())
		}
	}()
	if f.Rings, err = dom.Share(peer, 2, hypercall.ReadWrite); err != nil {
		return f, err
	}
	if f.Pages, err = dom.Share(peer, n, hypercall.ReadOnly); err != nil {
		return f, err
	}
	if f.Posted, err = dom.Share(peer, n, hypercall.ReadWrite); err != nil {
		return f, err
	}
	f.Tx, f.Rx = TxRing(f.Rings.Page(0)), RxRing(f.Rings.Page(1))
	for _, r := range []Ring{f.Tx, f.Rx} {
		r.Store(ReqEvent, 1)
		r.Store(RspEvent, 1)
	}
	if f.Waiter, err = dom.Waiter(); err != nil {
		return f, err
	}
	if f.TxPort, err = f.Waiter.Unbound(peer); err != nil {
		return f, err
	}
	f.RxPort = f.TxPort
	if split {
		f.RxPort, err = f.Waiter.Unbound(peer)
	}
	return f, err
}

// Keys returns the keys that a correct frontend publishes.
func (f *Front) Keys() xenstore.Values {
	v := xenstore.Values{
		"tx-ring-ref":       strconv.Itoa(int(f.Rings.Refs[0])),
		"rx-ring-ref":       strconv.Itoa(int(f.Rings.Refs[1])),
		"request-rx-copy":   "1",
		"feature-rx-notify": "1",
		"feature-sg":        "1",
	}
	if f.TxPort == f.RxPort {
		v["event-channel"] = fmt.Sprint(f.TxPort.ID())
	} else {
		v["event-channel-tx"] = fmt.Sprint(f.TxPort.ID())
		v["event-channel-rx"] = fmt.Sprint(f.RxPort.ID())
	}
	return v
}

// Req returns a request for size bytes of transmit page i.
func (f *Front) Req(i int, offset, size, flags uint16) TxReq {
	n := len(f.Pages.Refs)
	return TxReq{Ref: uint32(f.Pages.Refs[i%n]), Offset: offset, Size: size, Flags: flags, ID: uint16(i)}
}

// Put writes slots of the tx ring. The backend does not see them before Push.
func (f *Front) Put(slots ...[3]uint32) {
	for _, s := range slots {
		f.Tx.Put(f.TxProd, s[:]...)
		f.TxProd++
	}
}

// Push publishes the slots and notifies, whether or not the backend asked for it.
func (f *Front) Push() {
	f.Tx.Store(ReqProd, f.TxProd)
	f.TxPort.Notify()
}

// Answers waits for n responses on the tx ring.
func (f *Front) Answers(n int, deadline time.Time) (rsp []TxRsp, err error) {
	for len(rsp) < n {
		prod := f.Tx.Load(RspProd)
		if prod-f.TxCons > Size {
			return rsp, fmt.Errorf("rsp_prod is %d, %d responses taken", prod, f.TxCons)
		}
		for ; f.TxCons != prod; f.TxCons++ {
			w := f.Tx.Get(f.TxCons)[0]
			rsp = append(rsp, TxRsp{uint16(w), int16(w >> 16)})
		}
		if len(rsp) >= n {
			break
		}
		f.Tx.Store(RspEvent, f.TxCons+1)
		if f.Tx.Load(RspProd) != f.TxCons {
			continue
		}
		if err = f.Waiter.Wait(deadline, true); err != nil {
			return rsp, fmt.Errorf("%d of %d responses: %w", len(rsp), n, err)
		}
	}
	return rsp, nil
}

// Post posts n receive pages, each in the next slot of the rx ring.
func (f *Front) Post(n int) {
	for range n {
		i := f.RxProd % Size
		f.Rx.Put(f.RxProd, i, uint32(f.Posted.Refs[int(i)%len(f.Posted.Refs)]))
		f.RxProd++
	}
	f.Rx.Store(ReqProd, f.RxProd)
	f.RxPort.Notify()
}

// Received waits for n responses on the rx ring.
func (f *Front) Received(n int, deadline time.Time) (rsp []RxRsp, err error) {
	for len(rsp) < n {
		prod := f.Rx.Load(RspProd)
		if prod-f.RxCons > Size {
			return rsp, fmt.Errorf("rsp_prod is %d, %d responses taken", prod, f.RxCons)
		}
		for ; f.RxCons != prod; f.RxCons++ {
			rsp = append(rsp, RxRspOf(f.Rx.Get(f.RxCons)))
		}
		if len(rsp) >= n {
			break
		}
		f.Rx.Store(RspEvent, f.RxCons+1)
		if f.Rx.Load(RspProd) != f.RxCons {
			continue
		}
		if err = f.Waiter.Wait(deadline, true); err != nil {
			return rsp, fmt.Errorf("%d of %d responses: %w", len(rsp), n, err)
		}
	}
	return rsp, nil
}

// Close ends the grants and closes the ports. The error is [hypercall.ErrInUse] if the
// backend still maps a page.
func (f *Front) Close() (err error) {
	for _, s := range []*hypercall.Share{f.Rings, f.Pages, f.Posted} {
		if s != nil {
			err = errors.Join(err, s.End())
		}
	}
	if f.Waiter != nil {
		err = errors.Join(err, f.Waiter.Close())
	}
	return err
}

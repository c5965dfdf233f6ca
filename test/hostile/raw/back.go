package raw

import (
	"errors"
	"fmt"
	"time"

	"barevif/hypercall"
	"barevif/xenbus/xenstore"
)

// A Back is the backend's half of a vif: it maps the frontend's rings and binds to its
// ports. It writes nothing to xenstore.
type Back struct {
	Tx, Rx         Ring
	dom            hypercall.Domain
	peer           hypercall.DomID
	maps           []*hypercall.Mapping
	Waiter         hypercall.Waiter
	TxPort, RxPort hypercall.Port
	TxProd, TxCons uint32 // responses put, requests taken
	RxProd, RxCons uint32
}

// BackKeys returns the keys that a correct backend publishes.
func BackKeys() xenstore.Values {
	return xenstore.Values{
		"feature-rx-copy": "1", "feature-sg": "1", "feature-split-event-channels": "1",
		"multi-queue-max-queues": "1",
	}
}

// NewBack maps the rings and binds to the ports that the frontend published.
func NewBack(dom hypercall.Domain, peer hypercall.DomID, keys xenstore.Values) (b *Back, err error) {
	b = &Back{dom: dom, peer: peer}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.Close())
		}
	}()
	number := func(key string) uint32 {
		n, e := keys.Uint(key, 1<<32-1, 0)
		err = errors.Join(err, e)
		return uint32(n)
	}
	for _, key := range []string{"tx-ring-ref", "rx-ring-ref"} {
		ref := hypercall.GrantRef(number(key))
		m, err := dom.Map(peer, []hypercall.GrantRef{ref}, hypercall.ReadWrite)
		if err != nil {
			return b, err
		}
		b.maps = append(b.maps, m)
	}
	b.Tx, b.Rx = TxRing(b.maps[0].Page(0)), RxRing(b.maps[1].Page(0))
	if b.Waiter, err = dom.Waiter(); err != nil {
		return b, err
	}
	tx, rx := "event-channel-tx", "event-channel-rx"
	if !keys.Has(tx) {
		tx, rx = "event-channel", "event-channel"
	}
	if b.TxPort, err = b.Waiter.Bind(peer, hypercall.PortID(number(tx))); err != nil {
		return b, err
	}
	b.RxPort = b.TxPort
	if rx != tx {
		b.RxPort, err = b.Waiter.Bind(peer, hypercall.PortID(number(rx)))
	}
	return b, err
}

// await waits until r has n requests that were not taken yet.
func (b *Back) await(r Ring, cons uint32, n int, deadline time.Time) error {
	for {
		r.Store(ReqEvent, cons+uint32(n))
		if have := r.Load(ReqProd) - cons; int(have) >= n {
			return nil
		} else if have > Size {
			return fmt.Errorf("req_prod is %d, %d requests taken", cons+have, cons)
		}
		if err := b.Waiter.Wait(deadline, true); err != nil {
			return fmt.Errorf("waiting for %d requests: %w", n, err)
		}
	}
}

// Requests waits for n requests on the tx ring.
func (b *Back) Requests(n int, deadline time.Time) (reqs []TxReq, err error) {
	if err = b.await(b.Tx, b.TxCons, n, deadline); err != nil {
		return nil, err
	}
	for range n {
		reqs = append(reqs, TxReqOf(b.Tx.Get(b.TxCons)))
		b.TxCons++
	}
	return reqs, nil
}

// Answer puts responses on the tx ring and publishes them.
func (b *Back) Answer(rsp ...TxRsp) {
	for _, r := range rsp {
		b.Tx.Put(b.TxProd, r.Word())
		b.TxProd++
	}
	b.Tx.Store(RspProd, b.TxProd)
	b.TxPort.Notify()
}

// Posted waits for n requests on the rx ring and returns the refs of their pages.
func (b *Back) Posted(n int, deadline time.Time) (refs []hypercall.GrantRef, err error) {
	if err = b.await(b.Rx, b.RxCons, n, deadline); err != nil {
		return nil, err
	}
	for range n {
		refs = append(refs, hypercall.GrantRef(b.Rx.Get(b.RxCons)[1]))
		b.RxCons++
	}
	return refs, nil
}

// Deliver puts slots on the rx ring and publishes them.
func (b *Back) Deliver(slots ...[2]uint32) {
	b.PutRx(slots...)
	b.PushRx()
}

// PutRx writes slots of the rx ring. The frontend does not see them before PushRx.
func (b *Back) PutRx(slots ...[2]uint32) {
	for _, s := range slots {
		b.Rx.Put(b.RxProd, s[0], s[1])
		b.RxProd++
	}
}

// PushRx publishes the slots and notifies the frontend.
func (b *Back) PushRx() {
	b.Rx.Store(RspProd, b.RxProd)
	b.RxPort.Notify()
}

// Fill copies p to a page that the frontend posted.
func (b *Back) Fill(ref hypercall.GrantRef, offset uint16, p []byte) error {
	op := []hypercall.CopyOp{{
		Src: hypercall.Area{Local: p},
		Dst: hypercall.Area{Dom: b.peer, Ref: ref, Offset: offset},
		Len: uint32(len(p)),
	}}
	return b.copy(op)
}

// Read copies a page of the frontend, or part of it.
func (b *Back) Read(ref hypercall.GrantRef, offset uint16, p []byte) error {
	op := []hypercall.CopyOp{{
		Src: hypercall.Area{Dom: b.peer, Ref: ref, Offset: offset},
		Dst: hypercall.Area{Local: p},
		Len: uint32(len(p)),
	}}
	return b.copy(op)
}

func (b *Back) copy(op []hypercall.CopyOp) error {
	if err := b.dom.Copy(op); err != nil {
		return err
	}
	if st := op[0].Status; st != hypercall.OK {
		return fmt.Errorf("copy: %v", st)
	}
	return nil
}

// Close unmaps the rings and closes the ports.
func (b *Back) Close() (err error) {
	if b.Waiter != nil {
		err = b.Waiter.Close()
	}
	for _, m := range b.maps {
		err = errors.Join(err, m.Release())
	}
	b.maps = nil
	return err
}

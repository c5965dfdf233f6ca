// Package ring implements both ends of a Xen shared ring.
//
// A ring is a page that two domains write at once (xen/include/public/io/ring.h). Each
// index in it has exactly one writer, and no value that the peer wrote is used before it
// is checked. Requests and responses share the slots: a response takes the slot of an
// answered request.
//
// A [Front] or [Back] has one owner; neither is safe for concurrent use. They do not know
// event channels: Publish reports when to notify the peer, Arm when it is safe to wait.
package ring

import (
	"errors"
	"sync/atomic"

	"barevif/arena/shm"
)

// Offsets of struct __name##_sring of ring.h: four indices, then a private area,
// then the slots.
const (
	reqProd  = 0
	reqEvent = 4
	rspProd  = 8
	rspEvent = 12
	slots    = 64
)

// ErrCorrupt is returned when an index has a value that no correct peer could have
// written: more slots ahead than there are, or behind its last value. It is final.
var ErrCorrupt = errors.New("ring: the peer's index is impossible")

// Entries returns how many slots of stride bytes a ring page holds: the largest power of
// two that fits (__RING_SIZE).
func Entries(stride int) int {
	n := 1
	for n*2*stride <= shm.PageSize-slots {
		n *= 2
	}
	return n
}

// publisher is the half of a ring that this end produces.
type publisher[T any] struct {
	slots shm.Slots[T]
	prod  shm.Out // we are its only writer
	event shm.In  // the peer writes the index at which it wants to be notified
	next  uint32  // next slot to fill
	shown uint32  // last value stored in prod
}

func (p *publisher[T]) put(v T) {
	p.slots.Store(p.next, v)
	p.next++
}

func (p *publisher[T]) publish() (notify bool) {
	old := p.shown
	if p.next == old {
		return false
	}
	p.shown = p.next
	p.prod.Store(p.next) // ordered before the load of event: Go's atomics are sequentially consistent
	return p.next-p.event.Load() < p.next-old
}

// observer is the half of a ring that the peer produces.
type observer[T any] struct {
	slots shm.Slots[T]
	prod  shm.In
	event shm.Out
	cons  uint32        // next slot to take
	seen  uint32        // last value loaded from prod and checked
	armed atomic.Uint32 // last value stored in event; atomic because overdue runs in any goroutine
	base  atomic.Uint32 // cons at that store; atomic because answered runs in any goroutine
}

func (o *observer[T]) init(slots shm.Slots[T], prod shm.In, event shm.Out, at uint32) {
	o.slots, o.prod, o.event = slots, prod, event
	o.cons, o.seen = at, at
	o.armed.Store(at + 1)
}

// poll returns how many slots may be taken. limit is how far past cons the index of a
// correct peer can be.
func (o *observer[T]) poll(limit uint32) (uint32, error) {
	if n := o.seen - o.cons; n != 0 {
		return n, nil
	}
	return o.load(limit)
}

func (o *observer[T]) load(limit uint32) (uint32, error) {
	prod := o.prod.Load()
	n := prod - o.cons
	if n > limit || n < o.seen-o.cons { // too far, or backwards
		return 0, ErrCorrupt
	}
	o.seen = prod
	return n, nil
}

// take returns a copy of the next slot.
func (o *observer[T]) take() T {
	o.mustHavePolled()
	v := o.slots.Load(o.cons)
	o.cons++
	return v
}

// takeTo is take into *v.
func (o *observer[T]) takeTo(v *T) {
	o.mustHavePolled()
	o.slots.Fetch(o.cons, v)
	o.cons++
}

func (o *observer[T]) mustHavePolled() {
	if o.cons == o.seen {
		panic("ring: slot taken that was not polled")
	}
}

func (o *observer[T]) arm(after, limit uint32) (more bool, err error) {
	o.base.Store(o.cons)
	o.armed.Store(o.cons + after)
	o.event.Store(o.cons + after)
	n, err := o.load(limit) // ordered after the store of event: finds slots of a peer that did not see it
	return n >= after, err
}

// overdue reports whether the peer has reached the index at which we asked it to notify.
func (o *observer[T]) overdue() bool { return int32(o.prod.Load()-o.armed.Load()) >= 0 }

// A Front produces requests and takes responses.
type Front[Req, Rsp any] struct {
	req    publisher[Req]
	rsp    observer[Rsp]
	n      uint32
	header header // for Inspect
}

// NewFront initialises page for slots of stride bytes and returns its front end. The page
// must be zeroed, and the peer must not know it yet.
func NewFront[Req, Rsp any](page shm.Memory, stride int) *Front[Req, Rsp] {
	return newFront[Req, Rsp](page, stride, 0)
}

// newFront starts the indices at first, where the protocol has 0, so that tests can cross
// 2^32.
func newFront[Req, Rsp any](page shm.Memory, stride int, first uint32) *Front[Req, Rsp] {
	n := Entries(stride)
	f := &Front[Req, Rsp]{n: uint32(n), header: headerOf(page)}
	f.req = publisher[Req]{
		slots: shm.NewSlots[Req](page, slots, n, stride),
		prod:  page.Out(reqProd), event: page.In(reqEvent),
		next: first, shown: first,
	}
	f.rsp.init(shm.NewSlots[Rsp](page, slots, n, stride), page.In(rspProd), page.Out(rspEvent), first)
	// SHARED_RING_INIT: the producer indices start at first, the event indices one past
	// it. The peer does not know the page yet, so we may set its words too.
	f.req.prod.Store(first)
	page.Out(rspProd).Store(first)
	f.rsp.event.Store(first + 1)
	page.Out(reqEvent).Store(first + 1)
	return f
}

// ResumeFront returns the front end of a page on which another front end has stopped, with
// all requests published: next is the index of the next request to fill, cons that of the
// next response to take. It never writes the header. The error is [ErrCorrupt] if these
// indices do not fit each other, or the page.
func ResumeFront[Req, Rsp any](page shm.Memory, stride int, next, cons uint32) (*Front[Req, Rsp], error) {
	n := Entries(stride)
	f := &Front[Req, Rsp]{n: uint32(n), header: headerOf(page)}
	if next-cons > f.n || page.In(reqProd).Load() != next { // we are its writer from now on and never load it again
		return nil, ErrCorrupt
	}
	f.req = publisher[Req]{
		slots: shm.NewSlots[Req](page, slots, n, stride),
		prod:  page.Out(reqProd), event: page.In(reqEvent),
		next: next, shown: next,
	}
	f.rsp.init(shm.NewSlots[Rsp](page, slots, n, stride), page.In(rspProd), page.Out(rspEvent), cons)
	if _, err := f.rsp.load(f.InFlight()); err != nil {
		return nil, err
	}
	return f, nil
}

// Size returns the number of slots.
func (f *Front[Req, Rsp]) Size() uint32 { return f.n }

// Free returns how many requests may be put.
func (f *Front[Req, Rsp]) Free() uint32 { return f.n - (f.req.next - f.rsp.cons) }

// InFlight returns how many requests are published and have no response that was taken.
func (f *Front[Req, Rsp]) InFlight() uint32 { return f.req.shown - f.rsp.cons }

// Next returns the free-running index of the slot that Put fills.
func (f *Front[Req, Rsp]) Next() uint32 { return f.req.next }

// Put fills the next slot with a request; it panics if no slot is free. The peer does not
// see the request before Publish.
func (f *Front[Req, Rsp]) Put(v Req) {
	if f.req.next-f.rsp.cons >= f.n {
		panic("ring: request without a free slot")
	}
	f.req.put(v)
}

// Publish shows the peer all requests put so far and reports whether the peer asked to be
// notified.
func (f *Front[Req, Rsp]) Publish() (notify bool) { return f.req.publish() }

// Poll returns how many responses can be taken: the rest of an earlier Poll, or else as
// many as one load of the peer's index shows. The error is [ErrCorrupt].
func (f *Front[Req, Rsp]) Poll() (uint32, error) { return f.rsp.poll(f.InFlight()) }

// Consumed returns the free-running index of the slot that Take reads.
func (f *Front[Req, Rsp]) Consumed() uint32 { return f.rsp.cons }

// Take returns a copy of the next response. It panics unless Poll has counted that
// response.
func (f *Front[Req, Rsp]) Take() Rsp { return f.rsp.take() }

// TakeTo is Take into *v.
func (f *Front[Req, Rsp]) TakeTo(v *Rsp) { f.rsp.takeTo(v) }

// Arm asks the peer to notify once after further responses have come, at least one and at
// most as many as are in flight, and reports whether they have come already. The caller
// may wait only if they have not. The error is [ErrCorrupt].
func (f *Front[Req, Rsp]) Arm(after uint32) (more bool, err error) {
	return f.rsp.arm(max(1, min(after, f.InFlight())), f.InFlight())
}

// Answered reports whether any response has come since the last Arm, even if fewer than
// Arm asked for. Any goroutine may call it while the page is mapped.
func (f *Front[Req, Rsp]) Answered() bool { return f.rsp.prod.Load() != f.rsp.base.Load() }

// Overdue reports whether the responses that Arm asked for have come. A watchdog calls it
// for an owner that waits: any goroutine may, while the page is mapped.
func (f *Front[Req, Rsp]) Overdue() bool { return f.rsp.overdue() }

// Peer returns the peer's index, unchecked, for a watchdog that compares it with an
// earlier value. Any goroutine may call it while the page is mapped.
func (f *Front[Req, Rsp]) Peer() uint32 { return f.rsp.prod.Load() }

// A Back takes requests and produces responses.
type Back[Req, Rsp any] struct {
	req    observer[Req]
	rsp    publisher[Rsp]
	n      uint32
	header header // for Inspect
}

// AttachBack returns the back end of a page that a front end initialised. It starts at
// the page's response index, so that it can follow another back end on a live ring:
// requests without a response are taken again. It never writes the header. The error is
// [ErrCorrupt] if the indices are impossible.
func AttachBack[Req, Rsp any](page shm.Memory, stride int) (*Back[Req, Rsp], error) {
	n := Entries(stride)
	at := page.In(rspProd).Load() // we are its writer from now on and never load it again
	b := &Back[Req, Rsp]{n: uint32(n), header: headerOf(page)}
	b.req.init(shm.NewSlots[Req](page, slots, n, stride), page.In(reqProd), page.Out(reqEvent), at)
	b.rsp = publisher[Rsp]{
		slots: shm.NewSlots[Rsp](page, slots, n, stride),
		prod:  page.Out(rspProd), event: page.In(rspEvent),
		next: at, shown: at,
	}
	if _, err := b.req.load(b.n); err != nil {
		return nil, err
	}
	return b, nil
}

// Size returns the number of slots.
func (b *Back[Req, Rsp]) Size() uint32 { return b.n }

// Unanswered returns how many requests were taken and have no response yet.
func (b *Back[Req, Rsp]) Unanswered() uint32 { return b.req.cons - b.rsp.next }

// limit returns how many requests a correct front end can have published: it cannot have
// reused a slot before the response in it was published.
func (b *Back[Req, Rsp]) limit() uint32 { return b.n - (b.req.cons - b.rsp.shown) }

// Poll returns how many requests can be taken: the rest of an earlier Poll, or else as
// many as one load of the peer's index shows. The error is [ErrCorrupt].
func (b *Back[Req, Rsp]) Poll() (uint32, error) { return b.req.poll(b.limit()) }

// Reload is Poll, but it loads the peer's index even if polled requests are left.
func (b *Back[Req, Rsp]) Reload() (uint32, error) { return b.req.load(b.limit()) }

// Consumed returns the free-running index of the slot that Take reads.
func (b *Back[Req, Rsp]) Consumed() uint32 { return b.req.cons }

// Take returns a copy of the next request. It panics unless Poll has counted that
// request.
func (b *Back[Req, Rsp]) Take() Req { return b.req.take() }

// TakeTo is Take into *v.
func (b *Back[Req, Rsp]) TakeTo(v *Req) { b.req.takeTo(v) }

// Put fills the next response slot. It panics if every request has a response.
func (b *Back[Req, Rsp]) Put(v Rsp) {
	if b.req.cons == b.rsp.next {
		panic("ring: response without a request")
	}
	b.rsp.put(v)
}

// Publish shows the peer all responses put so far and reports whether the peer asked to
// be notified.
func (b *Back[Req, Rsp]) Publish() (notify bool) { return b.rsp.publish() }

// Arm asks the peer to notify once after further requests have come, at least one, and
// reports whether they have come already. The caller may wait only if they have not. The
// error is [ErrCorrupt].
func (b *Back[Req, Rsp]) Arm(after uint32) (more bool, err error) {
	return b.req.arm(max(1, min(after, b.limit())), b.limit())
}

// Overdue reports whether the requests that Arm asked for have come. A watchdog calls it
// for an owner that waits: any goroutine may, while the page is mapped.
func (b *Back[Req, Rsp]) Overdue() bool { return b.req.overdue() }

// Peer returns the peer's index, unchecked, for a watchdog that compares it with an
// earlier value. Any goroutine may call it while the page is mapped.
func (b *Back[Req, Rsp]) Peer() uint32 { return b.req.prod.Load() }

// Package ring implements both ends of a Xen shared ring.
//
// A ring is a page that two domains write at once (xen/include/public/io/ring.h).
// Each index in it has exactly one writer, and nothing the peer wrote is used
// before it is checked. Requests and responses share the slots: a response goes
// where a request was answered.
//
// A [Front] or [Back] has one owner; neither is safe for concurrent use. Neither
// knows event channels: Publish says when to notify, Arm when it is safe to wait.
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

// ErrCorrupt is an index that no correct peer could have written: further ahead
// than there are slots for, or behind where it was. It is final.
var ErrCorrupt = errors.New("ring: the peer's index is impossible")

// Entries is how many slots of stride bytes a ring page holds: the largest power
// of two that fits (__RING_SIZE).
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
	event shm.In  // the peer writes when it wants to be woken
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
	p.prod.Store(p.next) // before the load of event: Go's atomics are sequentially consistent
	return p.next-p.event.Load() < p.next-old
}

// observer is the half of a ring that the peer produces.
type observer[T any] struct {
	slots shm.Slots[T]
	prod  shm.In
	event shm.Out
	cons  uint32        // next slot to take
	seen  uint32        // last value loaded from prod, and checked
	armed atomic.Uint32 // last value stored in event; for overdue, which is not the owner's
	base  atomic.Uint32 // cons when it was stored; for answered, likewise
}

func (o *observer[T]) init(slots shm.Slots[T], prod shm.In, event shm.Out, at uint32) {
	o.slots, o.prod, o.event = slots, prod, event
	o.cons, o.seen = at, at
	o.armed.Store(at + 1)
}

// poll returns how many slots may be taken. limit is how far past cons a correct
// peer can be.
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

func (o *observer[T]) take() T {
	v := o.slots.Load(o.cons)
	o.cons++
	return v
}

func (o *observer[T]) arm(after, limit uint32) (more bool, err error) {
	o.base.Store(o.cons)
	o.armed.Store(o.cons + after)
	o.event.Store(o.cons + after)
	n, err := o.load(limit) // after the store of event: a peer that missed it is seen here
	return n >= after, err
}

// overdue reports whether the peer has passed the index it was asked to notify
// at.
func (o *observer[T]) overdue() bool { return int32(o.prod.Load()-o.armed.Load()) >= 0 }

// A Front produces requests and takes responses.
type Front[Req, Rsp any] struct {
	req publisher[Req]
	rsp observer[Rsp]
	n   uint32
}

// NewFront initialises page for slots of stride bytes and returns its front. The
// page must be zeroed and not yet known to the peer.
func NewFront[Req, Rsp any](page shm.Memory, stride int) *Front[Req, Rsp] {
	return newFront[Req, Rsp](page, stride, 0)
}

// newFront starts the indices at first, where the protocol has 0: for tests of
// what happens at 2^32.
func newFront[Req, Rsp any](page shm.Memory, stride int, first uint32) *Front[Req, Rsp] {
	n := Entries(stride)
	f := &Front[Req, Rsp]{n: uint32(n)}
	f.req = publisher[Req]{
		slots: shm.NewSlots[Req](page, slots, n, stride),
		prod:  page.Out(reqProd), event: page.In(reqEvent),
		next: first, shown: first,
	}
	f.rsp.init(shm.NewSlots[Rsp](page, slots, n, stride), page.In(rspProd), page.Out(rspEvent), first)
	// SHARED_RING_INIT: producers where we start, events one past. The peer does
	// not know the page yet, so its own words may be set too.
	f.req.prod.Store(first)
	page.Out(rspProd).Store(first)
	f.rsp.event.Store(first + 1)
	page.Out(reqEvent).Store(first + 1)
	return f
}

// Size is the number of slots.
func (f *Front[Req, Rsp]) Size() uint32 { return f.n }

// Free is how many requests may be put.
func (f *Front[Req, Rsp]) Free() uint32 { return f.n - (f.req.next - f.rsp.cons) }

// InFlight is how many requests were published and not yet answered, as far as
// was taken.
func (f *Front[Req, Rsp]) InFlight() uint32 { return f.req.shown - f.rsp.cons }

// Next is the free-running index of the slot that Put fills.
func (f *Front[Req, Rsp]) Next() uint32 { return f.req.next }

// Put fills the next slot, which must be free. The peer does not see it yet.
func (f *Front[Req, Rsp]) Put(v Req) {
	if f.req.next-f.rsp.cons >= f.n {
		panic("ring: request without a free slot")
	}
	f.req.put(v)
}

// Publish shows the peer every request put so far and reports whether it asked
// to be notified.
func (f *Front[Req, Rsp]) Publish() (notify bool) { return f.req.publish() }

// Poll returns how many responses can be taken: what is left of an earlier Poll,
// or what one load of the peer's index shows. [ErrCorrupt].
func (f *Front[Req, Rsp]) Poll() (uint32, error) { return f.rsp.poll(f.InFlight()) }

// Consumed is the free-running index of the slot that Take reads.
func (f *Front[Req, Rsp]) Consumed() uint32 { return f.rsp.cons }

// Take copies the next response. Poll must have counted it.
func (f *Front[Req, Rsp]) Take() Rsp {
	if f.rsp.cons == f.rsp.seen {
		panic("ring: response taken that was not polled")
	}
	return f.rsp.take()
}

// TakeTo is Take to where v points.
func (f *Front[Req, Rsp]) TakeTo(v *Rsp) {
	if f.rsp.cons == f.rsp.seen {
		panic("ring: response taken that was not polled")
	}
	f.rsp.slots.Fetch(f.rsp.cons, v)
	f.rsp.cons++
}

// Arm asks the peer to notify once after more responses are there, at least one
// and at most as many as are in flight, and reports whether they already are.
// Only if they are not may the caller wait. [ErrCorrupt].
func (f *Front[Req, Rsp]) Arm(after uint32) (more bool, err error) {
	return f.rsp.arm(max(1, min(after, f.InFlight())), f.InFlight())
}

// Answered reports whether there is any response that was not there at the last
// Arm, be it fewer than it asked for. Any goroutine may call it while the page is
// mapped.
func (f *Front[Req, Rsp]) Answered() bool { return f.rsp.prod.Load() != f.rsp.base.Load() }

// Overdue reports whether the responses Arm asked for are there. Any goroutine may
// call it while the page is mapped: a watchdog does, for an owner that waits.
func (f *Front[Req, Rsp]) Overdue() bool { return f.rsp.overdue() }

// Peer is the peer's index as it stands, unchecked: for a watchdog that compares it
// with where it stood before. Any goroutine may call it while the page is mapped.
func (f *Front[Req, Rsp]) Peer() uint32 { return f.rsp.prod.Load() }

// A Back takes requests and produces responses.
type Back[Req, Rsp any] struct {
	req observer[Req]
	rsp publisher[Rsp]
	n   uint32
}

// AttachBack is the back of a page that a front initialised. It starts where the
// page's responses are, so that it may follow another back on a live ring:
// requests that were not answered are taken again. It never writes the header.
// [ErrCorrupt] if the indices are impossible.
func AttachBack[Req, Rsp any](page shm.Memory, stride int) (*Back[Req, Rsp], error) {
	n := Entries(stride)
	at := page.In(rspProd).Load() // ours from now on, never loaded again
	b := &Back[Req, Rsp]{n: uint32(n)}
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

// Size is the number of slots.
func (b *Back[Req, Rsp]) Size() uint32 { return b.n }

// Unanswered is how many requests were taken and have no response yet.
func (b *Back[Req, Rsp]) Unanswered() uint32 { return b.req.cons - b.rsp.next }

// limit is how many requests may lie before us: the front cannot have used a
// slot again whose response it has not been shown.
func (b *Back[Req, Rsp]) limit() uint32 { return b.n - (b.req.cons - b.rsp.shown) }

// Poll returns how many requests can be taken: what is left of an earlier Poll,
// or what one load of the peer's index shows. [ErrCorrupt].
func (b *Back[Req, Rsp]) Poll() (uint32, error) { return b.req.poll(b.limit()) }

// Reload is Poll that looks at the peer's index even if requests are left.
func (b *Back[Req, Rsp]) Reload() (uint32, error) { return b.req.load(b.limit()) }

// Consumed is the free-running index of the slot that Take reads.
func (b *Back[Req, Rsp]) Consumed() uint32 { return b.req.cons }

// Take copies the next request. Poll must have counted it.
func (b *Back[Req, Rsp]) Take() Req {
	if b.req.cons == b.req.seen {
		panic("ring: request taken that was not polled")
	}
	return b.req.take()
}

// TakeTo is Take to where v points.
func (b *Back[Req, Rsp]) TakeTo(v *Req) {
	if b.req.cons == b.req.seen {
		panic("ring: request taken that was not polled")
	}
	b.req.slots.Fetch(b.req.cons, v)
	b.req.cons++
}

// Put fills the next response slot. There must be an unanswered request.
func (b *Back[Req, Rsp]) Put(v Rsp) {
	if b.req.cons == b.rsp.next {
		panic("ring: response without a request")
	}
	b.rsp.put(v)
}

// Publish shows the peer every response put so far and reports whether it asked
// to be notified.
func (b *Back[Req, Rsp]) Publish() (notify bool) { return b.rsp.publish() }

// Arm asks the peer to notify once after more requests are there, at least one,
// and reports whether they already are. Only if they are not may the caller
// wait. [ErrCorrupt].
func (b *Back[Req, Rsp]) Arm(after uint32) (more bool, err error) {
	return b.req.arm(max(1, min(after, b.limit())), b.limit())
}

// Overdue reports whether the requests Arm asked for are there. Any goroutine may
// call it while the page is mapped: a watchdog does, for an owner that waits.
func (b *Back[Req, Rsp]) Overdue() bool { return b.req.overdue() }

// Peer is the peer's index as it stands, unchecked: for a watchdog that compares it
// with where it stood before. Any goroutine may call it while the page is mapped.
func (b *Back[Req, Rsp]) Peer() uint32 { return b.req.prod.Load() }

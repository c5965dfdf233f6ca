package ring

import "barevif/arena/shm"

// Indexes are the indexes of a ring at one moment, for people who look at it. All are
// free-running: their difference modulo 2^32 is a number of slots.
type Indexes struct {
	Size uint32 `json:"size"` // slots

	// The words of the shared page. The peer writes two of them, unchecked here: ring.h
	// says which.
	ReqProd  uint32 `json:"req_prod"`
	ReqEvent uint32 `json:"req_event"`
	RspProd  uint32 `json:"rsp_prod"`
	RspEvent uint32 `json:"rsp_event"`

	// Our private indexes. At a front end they are the next request to fill
	// (req_prod_pvt) and the next response to take (rsp_cons); at a back end the next
	// request to take (req_cons) and the next response to fill (rsp_prod_pvt).
	ReqPrivate uint32 `json:"req_private"`
	RspPrivate uint32 `json:"rsp_private"`

	// Outstanding is the number of requests that this end has to care about: at a front
	// end those without a response that was taken, at a back end those taken without a
	// response.
	Outstanding uint32 `json:"outstanding"`

	// Free is the number of slots that this end may fill now: at a front end requests, at
	// a back end requests of the peer that it has not taken, at most Size.
	Free uint32 `json:"free"`

	// Waiting is the number of the peer's slots that this end has not taken, as its index
	// tells, and not checked: more than Size is impossible for a correct peer.
	Waiting uint32 `json:"waiting"`
}

// The header of a page is read through words of its own. The ends keep none of what they
// wrote there, and read nothing of it back for their work.
type header struct{ reqProd, reqEvent, rspProd, rspEvent shm.In }

func headerOf(page shm.Memory) header {
	return header{page.In(reqProd), page.In(reqEvent), page.In(rspProd), page.In(rspEvent)}
}

func (h *header) read(x *Indexes) {
	x.ReqProd, x.ReqEvent = h.reqProd.Load(), h.reqEvent.Load()
	x.RspProd, x.RspEvent = h.rspProd.Load(), h.rspEvent.Load()
}

// Inspect returns the indexes of the ring. The owner calls it, like every other method.
func (f *Front[Req, Rsp]) Inspect() (x Indexes) {
	f.header.read(&x)
	x.Size, x.ReqPrivate, x.RspPrivate = f.n, f.req.next, f.rsp.cons
	x.Outstanding, x.Free = f.InFlight(), f.Free()
	x.Waiting = x.RspProd - x.RspPrivate
	return x
}

// Inspect returns the indexes of the ring. The owner calls it, like every other method.
func (b *Back[Req, Rsp]) Inspect() (x Indexes) {
	b.header.read(&x)
	x.Size, x.ReqPrivate, x.RspPrivate = b.n, b.req.cons, b.rsp.next
	x.Outstanding = b.Unanswered()
	x.Waiting = x.ReqProd - x.ReqPrivate
	x.Free = min(x.Waiting, b.n)
	return x
}

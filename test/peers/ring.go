package main

import (
	"errors"
	"sync/atomic"

	"barevif/hypercall"
	"barevif/pvnet/netif"
)

const (
	ringSlots = 256
	pageSize  = 4096
)

// indexes begin the page of a Xen ring: struct netif_tx_sring, netif_rx_sring.
type indexes struct {
	reqProd, reqEvent, rspProd, rspEvent atomic.Uint32
	_                                    [48]byte
}

// A txAnswer is a response in a slot of 12 bytes, the size of a request.
type txAnswer struct {
	netif.TxResponse
	_ [8]byte
}

// A rawRing moves frames through the indexes, the slots and the pages of one Xen ring. It has
// nothing else of a device: no grants, checks, buffer management, counters or events. On the
// tx ring the sender produces requests and gets its pages back with the responses. On the rx
// ring the receiver produces requests for pages to fill, and the sender produces responses. A
// frame takes one slot per page, and the same copies as a frame of a vif:
//
//	tx: into the page, into a private page, out of that
//	rx: into a private page, into the page, into a private page, out of that
type rawRing struct {
	mem    *memory
	size   int
	batch  int
	rx     bool
	out    *atomic.Uint32 // index that the sender writes
	back   *atomic.Uint32 // index that the receiver writes
	event  *atomic.Uint32 // event index that the sender reads when it publishes
	pages  []byte
	tx     *[ringSlots]netif.TxRequest
	txRsp  *[ringSlots]txAnswer
	rxReq  *[ringSlots]netif.RxRequest
	rxRsp  *[ringSlots]netif.RxResponse
	slots  uint32 // slots per frame
	credit uint32 // the sender may fill slots up to back+credit

	_    [128]byte
	prod uint32 // the sender's private index
	seen uint32 // the sender's last reading of back
	from pool

	_    [128]byte
	cons uint32 // the receiver's private index
	to   pool
}

// A pool holds the private pages of one end, which are used in turn.
type pool struct {
	pages []byte
	next  int
}

func (p *pool) get(size int) []byte {
	if p.next+size > len(p.pages) {
		p.next = 0
	}
	b := p.pages[p.next : p.next+size]
	p.next += (size + pageSize - 1) &^ (pageSize - 1)
	return b
}

func newRawRing(size, batch int, rx bool) (*rawRing, error) {
	mem, err := newMemory("peers-ring", (1+ringSlots)*pageSize)
	if err != nil {
		return nil, err
	}
	ix := at[indexes](mem.b, 0)
	r := &rawRing{
		mem: mem, size: size, batch: batch, rx: rx,
		out: &ix.reqProd, back: &ix.rspProd, event: &ix.reqEvent, credit: ringSlots,
		pages: mem.b[pageSize:],
		tx:    at[[ringSlots]netif.TxRequest](mem.b, 64),
		txRsp: at[[ringSlots]txAnswer](mem.b, 64),
		rxReq: at[[ringSlots]netif.RxRequest](mem.b, 64),
		rxRsp: at[[ringSlots]netif.RxResponse](mem.b, 64),
		slots: uint32((size + pageSize - 1) / pageSize),
		from:  pool{pages: make([]byte, buffers*pageSize)},
		to:    pool{pages: make([]byte, buffers*pageSize)},
	}
	if rx {
		r.out, r.back, r.event, r.credit = &ix.rspProd, &ix.reqProd, &ix.rspEvent, 0
		for i := range uint32(ringSlots) {
			r.rxReq[i] = netif.RxRequest{ID: uint16(i), Ref: hypercall.GrantRef(i)}
		}
		r.back.Store(ringSlots)
	}
	return r, nil
}

func (r *rawRing) page(ref uint32) []byte {
	off := int(ref%ringSlots) * pageSize
	return r.pages[off : off+pageSize]
}

// room reports whether the ring has room for a batch.
func (r *rawRing) room() bool {
	need := uint32(r.batch) * r.slots
	if r.seen+r.credit-r.prod >= need {
		return true
	}
	r.seen = r.back.Load()
	return r.seen+r.credit-r.prod >= need
}

// put fills the slots of one frame. The receiver sees them only after publish.
func (r *rawRing) put(frame []byte) {
	if r.rx {
		private := r.from.get(len(frame))
		copy(private, frame)
		frame = private
	}
	size := len(frame)
	for first := true; len(frame) > 0; first = false {
		slot := r.prod % ringSlots
		if r.rx {
			req := r.rxReq[slot]
			n := copy(r.page(uint32(req.Ref)), frame)
			rsp := netif.RxResponse{ID: req.ID, Status: int16(n)}
			if frame = frame[n:]; len(frame) > 0 {
				rsp.Flags = netif.RxMoreData
			}
			r.rxRsp[slot] = rsp
		} else {
			n := copy(r.page(slot), frame)
			req := netif.TxRequest{Ref: hypercall.GrantRef(slot), ID: uint16(slot), Size: uint16(n)}
			if first {
				req.Size = uint16(size)
			}
			if frame = frame[n:]; len(frame) > 0 {
				req.Flags = netif.TxMoreData
			}
			r.tx[slot] = req
		}
		r.prod++
	}
}

// publish makes the new slots visible to the receiver. It reads the event index, as a vif
// must, but ignores it, because the receiver polls.
func (r *rawRing) publish() {
	r.out.Store(r.prod)
	_ = r.event.Load()
}

// ready reports whether a frame can be taken.
func (r *rawRing) ready() bool { return r.out.Load() != r.cons }

// take copies up to a batch of frames, one after the other, into the sink's frame, and
// returns their pages to the sender.
func (r *rawRing) take(s *sink) (n int, err error) {
	for prod := r.out.Load(); r.cons != prod && n < r.batch; n++ {
		private := r.to.get(r.size)
		for off := 0; off < r.size; r.cons++ {
			slot := r.cons % ringSlots
			if r.rx {
				rsp := r.rxRsp[slot]
				off += copy(private[off:], r.page(uint32(rsp.ID))[:rsp.Status])
				r.rxReq[slot] = netif.RxRequest{ID: rsp.ID, Ref: hypercall.GrantRef(rsp.ID)}
			} else {
				req := r.tx[slot]
				off += copy(private[off:], r.page(uint32(req.Ref))[:min(r.size-off, pageSize)])
				r.txRsp[slot].TxResponse = netif.TxResponse{ID: req.ID}
			}
		}
		if k := copy(s.frame, private); s.want.verify {
			err = errors.Join(err, s.check(s.frame[:k]))
		}
	}
	if r.rx {
		r.back.Store(r.cons + ringSlots)
	} else {
		r.back.Store(r.cons)
	}
	return n, err
}

// A rawLink streams on one raw ring or more, and has one for answers. Both ends poll, all rings
// in turn.
type rawLink struct {
	streams []*rawRing
	answers *rawRing
}

// rawPeer streams on tx rings, or on rx rings if rx. Round trips use one of each.
func rawPeer(rings, batch int, rx bool) peer {
	return setupFunc(func(j *job) (link, error) {
		j.warm *= uint64(rings)
		l := new(rawLink)
		add := func(batch int, rx bool) (*rawRing, error) {
			r, err := newRawRing(j.size, batch, rx)
			if err != nil {
				return nil, errors.Join(err, l.close())
			}
			return r, nil
		}
		for range rings {
			r, err := add(j.limitBatch(batch), rx)
			if err != nil {
				return nil, err
			}
			l.streams = append(l.streams, r)
		}
		var err error
		if l.answers, err = add(1, !rx); err != nil {
			return nil, err
		}
		return l, nil
	})
}

func (l *rawLink) close() error {
	for _, r := range l.streams {
		r.mem.close()
	}
	if l.answers != nil {
		l.answers.mem.close()
	}
	return nil
}

func (l *rawLink) send(j *job) error {
	sources, sent := make([]*source, len(l.streams)), tally{to: &j.sent}
	for i := range sources {
		sources[i] = j.source()
	}
	for !j.stopped() {
		full := true
		for i, r := range l.streams {
			if !r.room() {
				continue
			}
			for range r.batch {
				r.put(sources[i].next())
			}
			r.publish()
			sent.add(r.batch)
			full = false
		}
		if full {
			spinPause()
		}
	}
	return nil
}

func (l *rawLink) receive(j *job) error {
	sinks, rcvd := make([]*sink, len(l.streams)), tally{to: &j.rcvd}
	for i := range sinks {
		sinks[i] = j.sink()
	}
	for !j.stopped() {
		empty := true
		for i, r := range l.streams {
			if !r.ready() {
				continue
			}
			n, err := r.take(sinks[i])
			if err != nil {
				return err
			}
			rcvd.add(n)
			empty = false
		}
		if empty {
			spinPause()
		}
	}
	return nil
}

func (l *rawLink) ping(j *job, rtt []int64) error {
	src, s, there := j.source(), j.sink(), l.streams[0]
	for i := range rtt {
		start := nano()
		for !there.room() {
			spinPause()
		}
		there.put(src.next())
		there.publish()
		for !l.answers.ready() {
			if j.stopped() {
				return nil
			}
		}
		if _, err := l.answers.take(s); err != nil {
			return err
		}
		rtt[i] = nano() - start
	}
	return nil
}

func (l *rawLink) echo(j *job) error {
	s, there := j.sink(), l.streams[0]
	s.want.verify = false // the other end compares
	for !j.stopped() {
		if !there.ready() {
			continue
		}
		if _, err := there.take(s); err != nil {
			return err
		}
		for !l.answers.room() {
			spinPause()
		}
		l.answers.put(s.frame)
		l.answers.publish()
	}
	return nil
}

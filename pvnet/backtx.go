package pvnet

import (
	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
)

// A backTX sends to the frontend. Requests on the rx ring name pages of the peer, into
// which it copies the frames, many in one batch. Each response goes into the slot of its
// request.
type backTX struct {
	ring    *ring.Back[netif.RxRequest, netif.RxResponse]
	bufs    *arena.Arena // private buffers for Alloc
	port    hypercall.Port
	scatter bool   // the peer takes frames of several slots
	peer    offers // the offloads that the peer takes

	copyBatch
	rsp    [256]netif.RxResponse
	nrsp   int
	placed [128]placedFrame
	own    [128]bool // by frame of sendPlain: its buffer is one of bufs, and was taken

	stopwatch
	shortage
}

func (e *backTX) alloc(frames []Frame, size int) (n int, err error) {
	n = buildAll(e.bufs, size, frames)
	if n == 0 && len(frames) > 0 {
		e.count.Add(telemetry.AllocFailed, 1)
	}
	return n, nil
}

func (e *backTX) send(frames []Frame) (n int, err error) {
	for n < len(frames) && err == nil {
		k := 0
		if k, err = e.sendPlain(frames[n:]); k > 0 || err != nil {
			n += k
			continue
		}
		e.nops, e.nrsp = 0, 0
		for n+k < len(frames) && k < len(e.placed) && e.nops+maxFrameOps <= batchOps {
			if err = e.put(&frames[n+k], &e.placed[k]); err != nil {
				break
			}
			if k == 0 {
				e.begin()
			}
			k++
		}
		e.copy(frames[n : n+k])
		n += k
	}
	notify := e.ring.Publish()
	e.end(e.count)
	if notify {
		e.count.Add(telemetry.NotifiesSent, 1)
		e.port.Notify()
	} else if n > 0 {
		e.count.Add(telemetry.NotifiesSpared, 1)
	}
	if err == ErrFull {
		e.count.Add(telemetry.RingFull, 1)
		e.lack(e.ring.Consumed() + uint32(e.wants(&frames[n]).slots))
	}
	return n, err
}

// sendPlain sends frames of one slot without offloads, in one pass and one batch of
// copies. It stops at the first frame that is something else, is stale, or has no slot;
// put then handles that frame or returns its error.
func (e *backTX) sendPlain(frames []Frame) (n int, err error) {
	frames = frames[:min(len(frames), len(e.placed))]
	avail, err := e.ring.Poll()
	if err == nil && int(avail) < len(frames) {
		avail, err = e.ring.Reload()
	}
	if err != nil {
		return 0, e.violation(err)
	}
	frames = frames[:min(len(frames), int(avail))]
	e.nops = 0
	var r netif.RxRequest
	for n < len(frames) {
		f := &frames[n]
		if !f.plain() {
			break
		}
		var src []byte
		i, ok := e.bufs.TakeOne(f.buf)
		if e.own[n] = ok; ok {
			src = e.bufs.Bytes(i)[f.off : f.off+f.n]
		} else if f.buf.Valid() {
			src = f.Bytes()
		} else {
			break
		}
		if n == 0 {
			e.begin()
		}
		e.ring.TakeTo(&r)
		e.to(r.Ref, 0, src)
		e.rsp[n] = netif.RxResponse{ID: r.ID, Status: int16(f.n)}
		if f.csum == ChecksumVerified {
			e.rsp[n].Flags = netif.RxDataValidated
		}
		n++
	}
	if n == 0 {
		return 0, nil
	}
	e.nrsp = n
	e.grantCopy()
	t := tally{block: e.count}
	uncopied := uint64(0)
	for i := range frames[:n] {
		o := &e.ops[i]
		t.plain(int(o.Len), o.Src.Local) // counted as sent, like in a frontend, which learns of a failure later
		if o.Status != hypercall.OK {
			e.count.Add(telemetry.GrantErrors, 1)
			e.count.Drop(telemetry.DropBadGref, 1)
			uncopied += uint64(o.Len)
			e.rsp[i].Status = int16(netif.Error)
		}
		e.ring.Put(e.rsp[i])
		if e.own[i] {
			e.bufs.PutTaken(frames[i].buf)
		} else {
			frames[i].buf.Release()
		}
	}
	t.settle()
	e.count.Add(telemetry.CopiedBytes, t.bytes-uncopied)
	t.count(e.ring.Unanswered(), e.bufs.Free())
	return n, nil
}

// put takes the requests that one frame needs and adds its copies to the batch.
func (e *backTX) put(f *Frame, p *placedFrame) error {
	if !f.buf.Valid() {
		return ErrStale
	}
	if f.total < MinFrame || f.total > MaxFrame {
		return ErrFrameSize
	}
	need := uint32(f.pages()) + f.gso.slots()
	if f.slots() == 0 {
		return ErrFrameSize
	}
	fit := e.peer.fit(f)
	if fit > incomplete {
		return fit.err()
	}
	if f.total > shm.PageSize && !e.scatter {
		return ErrFrameSize
	}
	avail, err := e.ring.Poll()
	if err == nil && avail < need {
		avail, err = e.ring.Reload()
	}
	if err != nil {
		return e.violation(err)
	}
	if avail < need {
		return ErrFull
	}
	if fit == incomplete && !e.complete(f) {
		return ErrFull
	}
	p.op, p.rsp, p.extra = e.nops, e.nrsp, f.gso.Size != 0
	f.CopyTo(p.head[:])
	var r netif.RxRequest
	room, left := 0, f.total // bytes left in the page of r, and of the frame
	for src := range f.Pieces() {
		for len(src) > 0 {
			if room == 0 {
				first := left == f.total
				r = e.ring.Take()
				out := netif.RxResponse{ID: r.ID, Status: int16(min(left, shm.PageSize))}
				if first {
					out.Flags = rxFlags(f)
				}
				if left > shm.PageSize {
					out.Flags |= netif.RxMoreData
				}
				e.respond(out)
				if first && p.extra {
					e.ring.Take() // its page is not used
					e.respond(f.gso.extra().RxResponse())
				}
				left -= min(left, shm.PageSize)
				room = shm.PageSize
			}
			k := min(len(src), room)
			e.to(r.Ref, uint16(shm.PageSize-room), src[:k])
			src, room = src[k:], room-k
		}
	}
	p.ops, p.rsps = e.nops-p.op, e.nrsp-p.rsp
	return nil
}

func (e *backTX) respond(r netif.RxResponse) {
	e.rsp[e.nrsp] = r
	e.nrsp++
}

// complete completes the checksum of f, in a copy if f has other holders. It reports
// false if there is no buffer for the copy.
func (e *backTX) complete(f *Frame) bool {
	if !f.buf.Exclusive() {
		var g Frame
		if !build(e.bufs, int(f.total), &g) {
			return false
		}
		g.copyFrame(f)
		f.buf.Release()
		*f = g
	}
	return f.completeChecksum()
}

// rxFlags returns the flags of the frame's first response: checksum and extra infos.
func rxFlags(f *Frame) (flags netif.RxFlags) {
	switch f.csum {
	case ChecksumPartial:
		flags = netif.RxCsumBlank | netif.RxDataValidated
	case ChecksumVerified:
		flags = netif.RxDataValidated
	}
	if f.gso.Size != 0 {
		flags |= netif.RxExtraInfo
	}
	return flags
}

// copy runs the batch, puts its responses, and releases the frames.
func (e *backTX) copy(frames []Frame) {
	if e.nops == 0 {
		return
	}
	e.grantCopy()
	t := tally{block: e.count}
	uncopied := uint64(0)
	for i := range frames {
		f, p := &frames[i], &e.placed[i]
		if e.failed(p.op, p.ops) > 0 {
			e.count.Drop(telemetry.DropBadGref, 1)
			uncopied += uint64(f.total)
			for j := range e.rsp[p.rsp : p.rsp+p.rsps] {
				if j != 1 || !p.extra {
					e.rsp[p.rsp+j].Status = int16(netif.Error)
				}
			}
		}
		t.sent(f, p.rsps, p.head[:]) // counted as sent, like in a frontend, which learns of a failure later
		if f.buf.Of(e.bufs) {
			e.bufs.Release(f.buf)
		} else {
			f.buf.Release()
		}
	}
	for i := range e.rsp[:e.nrsp] {
		e.ring.Put(e.rsp[i])
	}
	t.settle()
	e.count.Add(telemetry.CopiedBytes, t.bytes-uncopied)
	t.count(e.ring.Unanswered(), e.bufs.Free())
}

func (e *backTX) violation(err error) error {
	e.count.Add(telemetry.Violations, 1)
	return &PeerError{Ring: "rx", Slot: e.ring.Consumed(), Reason: err.Error()}
}

func (e *backTX) wants(f *Frame) need {
	n := need{slots: f.pages() + int(f.gso.slots())}
	if !f.buf.Exclusive() && e.peer.fit(f) == incomplete {
		n.bufs = buffersFor(int(f.total)) // see complete
	}
	return n
}

// pages returns how many pages of the peer the frame fills.
func (f *Frame) pages() int { return int(f.total+shm.PageSize-1) / shm.PageSize }

func (e *backTX) offers() offers { return e.peer }

func (e *backTX) avail() (int, error) {
	n, err := e.ring.Poll()
	if err != nil {
		return 0, e.violation(err)
	}
	return int(n), nil
}

func (e *backTX) room(n need) (bool, error) {
	avail, err := e.ring.Reload()
	if err != nil {
		return false, e.violation(err)
	}
	if int(avail) >= n.slots && e.bufs.Free() >= n.bufs {
		return true, nil
	}
	e.lack(e.ring.Consumed() + uint32(n.slots))
	return false, nil
}

func (e *backTX) stuck(n need) error {
	if e.bufs.Free() < n.bufs {
		return ErrNoBuffers
	}
	return nil
}

func (e *backTX) arm(n need) (bool, error) {
	if n.slots == 0 { // the call waits only for buffers, and stuck found enough
		return true, nil
	}
	more, err := e.ring.Arm(uint32(n.slots))
	if err != nil {
		return false, e.violation(err)
	}
	return more, nil
}

func (e *backTX) rested() error { return nil }

func (e *backTX) settle() error { return nil } // send puts all responses itself

func (e *backTX) answered() bool { return e.ring.Overdue() }

func (e *backTX) standing() (index, goal, tries uint32) {
	return e.ring.Peer(), e.goal.Load(), e.tries.Load()
}

func (e *backTX) ready(slots int) bool {
	n, err := e.ring.Reload()
	return n >= uint32(slots) || err != nil
}

func (e *backTX) overdue() bool { return e.ring.Overdue() }

func (e *backTX) drain() {}

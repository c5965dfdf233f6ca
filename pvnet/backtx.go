package pvnet

import (
	"sync/atomic"
	"time"

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
	ring      *ring.Back[netif.RxRequest, netif.RxResponse]
	private   *arena.Arena // private buffers for Alloc
	scatter   bool         // the peer takes frames of several slots
	peerTakes offloads     // the offloads that the peer takes

	steer *atomic.Pointer[steering] // the device's; nil: the connection has one queue, so that nothing is hashed
	hash  *steering                 // of the batch; nil: frames are sent without a hash

	bound
	peerLink
	copyBatch
	rsp     [256]netif.RxResponse
	nrsp    int
	batched [128]batched
	layout  packer    // of the frame that put adds to the batch
	groups  *groups   // the frontend's multicast filter
	dest    [6]byte   // of the frame that filter looks at
	ours    [128]bool // by frame of sendPlain: its buffer is one of bufs, and was taken

	stopwatch
	shortage
}

func (e *backTX) alloc(frames []Frame, size int) (n int, err error) {
	n = buildAll(e.private, size, frames)
	if n == 0 && len(frames) > 0 {
		e.count.Add(telemetry.AllocFailed, 1)
	}
	return n, nil
}

func (e *backTX) send(frames []Frame) (n int, err error) {
	e.hash = e.hashes()
	for n < len(frames) && err == nil {
		k, end := 0, len(frames)
		if e.groups.on.Load() {
			var run []Frame
			if run, k = e.filter(frames[n:]); k > 0 {
				n += k
				continue
			}
			end = n + len(run)
		}
		if e.hash == nil { // a hash takes a slot of its own
			if k, err = e.sendPlain(frames[n:end]); k > 0 || err != nil {
				n += k
				continue
			}
		}
		e.nops, e.nrsp = 0, 0
		e.takeUp()
		for n+k < end && k < len(e.batched) && e.nops+maxFrameOps <= batchOps {
			if err = e.put(&frames[n+k], &e.batched[k]); err != nil {
				break
			}
			if k == 0 {
				e.begin()
			}
			k++
		}
		e.copyBatched(frames[n : n+k])
		n += k
	}
	asked := e.ring.Publish()
	e.end(e.count)
	e.notify(asked, n)
	if err == ErrFull {
		e.count.Add(telemetry.RingFull, 1)
		e.set(e.ring.Consumed() + uint32(e.spaceFor(&frames[n]).slots))
	}
	return n, err
}

// sendPlain sends frames of one slot without offloads, in one pass and one batch of
// copies. It stops at the first frame that is something else, is stale, or has no slot;
// put then handles that frame or returns its error.
func (e *backTX) sendPlain(frames []Frame) (n int, err error) {
	frames = frames[:min(len(frames), len(e.batched))]
	avail, err := e.ring.Poll()
	if err == nil && int(avail) < len(frames) {
		avail, err = e.ring.Reload()
	}
	if err != nil {
		return 0, e.violation(err.Error())
	}
	frames = frames[:min(len(frames), int(avail))]
	if e.takeUp() != nil {
		return e.sendMapped(frames), nil
	}
	e.nops = 0
	var r netif.RxRequest
	for n < len(frames) {
		src := e.takeFrame(&frames[n], &e.ours[n])
		if src == nil {
			break
		}
		if n == 0 {
			e.begin()
		}
		e.ring.TakeTo(&r)
		e.addWrite(r.Ref, 0, src)
		e.rsp[n] = plainResponse(r.ID, &frames[n])
		n++
	}
	if n == 0 {
		return 0, nil
	}
	e.nrsp = n
	e.grantCopy(e.count)
	t := tally{block: e.count}
	uncopied := uint64(0)
	for i := range frames[:n] {
		o := &e.ops[i]
		t.plain(int(o.Len), o.Src.Local) // counted as sent, like in a frontend, which learns of a failure later
		if o.Status != hypercall.OK {
			uncopied += e.countFailed(&frames[i], &e.rsp[i], o.Len)
		}
		e.ring.Put(e.rsp[i])
		e.giveBack(&frames[i], e.ours[i])
	}
	t.countCopied(uncopied, e.ring.Unanswered(), e.private.Free())
	return n, nil
}

// takeFrame takes over a plain frame and returns its bytes, or nil for a frame that is
// something else or stale. ours says whether its buffer is one of our own, which is
// taken; another's is only read.
func (e *backTX) takeFrame(f *Frame, ours *bool) []byte {
	if !f.plain() {
		return nil
	}
	i, ok := e.private.TakeOne(f.buf)
	if *ours = ok; ok {
		return e.private.Bytes(i)[f.off : f.off+f.n]
	}
	if f.buf.Valid() {
		return f.Bytes()
	}
	return nil
}

// giveBack gives back the buffer of a frame that was sent.
func (e *backTX) giveBack(f *Frame, ours bool) {
	if ours {
		e.private.PutTaken(f.buf)
	} else {
		f.buf.Release()
	}
}

func plainResponse(id uint16, f *Frame) netif.RxResponse {
	r := netif.RxResponse{ID: id, Status: int16(f.n)}
	if f.csum == ChecksumVerified {
		r.Flags = netif.RxDataValidated
	}
	return r
}

// countFailed makes r the response to f, whose n bytes could not be copied, and returns n.
func (e *backTX) countFailed(f *Frame, r *netif.RxResponse, n uint32) uint64 {
	e.count.Add(telemetry.GrantErrors, 1)
	e.count.Drop(telemetry.DropBadGref, 1)
	e.lostSent(f, telemetry.DropBadGref)
	r.Status = int16(netif.Error)
	return uint64(n)
}

// put takes the requests that one frame needs and adds its copies to the batch.
func (e *backTX) put(f *Frame, p *batched) error {
	fit, err := e.peerTakes.admit(f)
	if err != nil {
		return err
	}
	if f.total > shm.PageSize && !e.scatter {
		return ErrFrameSize
	}
	p.hashed = false
	var hash FlowHash
	if e.hash != nil {
		hash, p.hashed = e.hash.hash(f)
	}
	p.extras = f.extras(hash, p.hashed)
	e.layout.place(f)
	need := uint32(e.layout.pages() + p.extras.Len())
	avail, err := e.ring.Poll()
	if err == nil && avail < need {
		avail, err = e.ring.Reload()
	}
	if err != nil {
		return e.violation(err.Error())
	}
	if avail < need || fit == needChecksum && !e.complete(f) {
		return ErrFull
	}
	p.firstOp, p.firstRsp = e.nops, e.nrsp
	f.CopyTo(p.head[:])
	e.addToBatch(f, &p.extras)
	p.ops, p.rsps = e.nops-p.firstOp, e.nrsp-p.firstRsp
	return nil
}

// addToBatch takes a request for each page of layout and for each extra info, and adds the
// copies and the responses to the batch.
func (e *backTX) addToBatch(f *Frame, extras *netif.Extras) {
	var r netif.RxRequest
	slots := e.layout.pages()
	slot, room := 0, 0 // the next slot, and bytes that the one before still gets
	for src := range f.Pieces() {
		for len(src) > 0 {
			if room == 0 {
				r = e.ring.Take()
				room = int(e.layout.sizes[slot])
				out := netif.RxResponse{ID: r.ID, Status: int16(room)}
				if slot == 0 {
					out.Flags = rxFlags(f)
					if extras.Len() > 0 {
						out.Flags |= netif.RxExtraInfo
					}
				}
				if slot < slots-1 {
					out.Flags |= netif.RxMoreData
				}
				e.respond(out)
				if slot == 0 {
					for i := range extras.Len() {
						e.ring.Take() // its page is not used
						e.respond(extras.At(i).RxResponse())
					}
				}
				slot++
			}
			k := min(len(src), room)
			e.write(r.Ref, e.layout.sizes[slot-1]-uint16(room), src[:k])
			src, room = src[k:], room-k
		}
	}
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
		if !build(e.private, int(f.total), &g) {
			return false
		}
		g.copyFrame(f)
		f.buf.Release()
		*f = g
	}
	return f.completeChecksum()
}

// hashes returns how frames are hashed now; nil if they are not.
func (e *backTX) hashes() *steering {
	if e.steer == nil {
		return nil
	}
	return e.steer.Load()
}

// mayHash reports whether a frame may be sent with a hash.
func (e *backTX) mayHash() bool {
	h := e.hashes()
	return h != nil && h.flags != 0
}

func (e *backTX) pieceExtras(*Frame) int {
	if e.mayHash() {
		return 1
	}
	return 0
}

// rxFlags returns the flags that the frame's checksum has in its first response.
func rxFlags(f *Frame) (flags netif.RxFlags) {
	switch f.csum {
	case ChecksumPartial:
		flags = netif.RxCsumBlank | netif.RxDataValidated
	case ChecksumVerified:
		flags = netif.RxDataValidated
	}
	return flags
}

// copyBatched runs the batch, puts its responses, and releases the frames.
func (e *backTX) copyBatched(frames []Frame) {
	if len(frames) == 0 {
		return
	}
	e.grantCopy(e.count)
	t := tally{block: e.count}
	uncopied := uint64(0)
	for i := range frames {
		f, p := &frames[i], &e.batched[i]
		if e.failed(p.firstOp, p.ops, e.count) > 0 {
			e.count.Drop(telemetry.DropBadGref, 1)
			e.lostSent(f, telemetry.DropBadGref)
			uncopied += uint64(f.total)
			for j := range e.rsp[p.firstRsp : p.firstRsp+p.rsps] {
				if j == 0 || j > p.extras.Len() {
					e.rsp[p.firstRsp+j].Status = int16(netif.Error)
				}
			}
		}
		if p.hashed {
			e.count.Add(telemetry.HashedPackets, 1)
		}
		t.sent(f, p.rsps, p.head[:]) // counted as sent, like in a frontend, which learns of a failure later
		if f.buf.Of(e.private) {
			e.private.Release(f.buf)
		} else {
			f.buf.Release()
		}
	}
	for i := range e.rsp[:e.nrsp] {
		e.ring.Put(e.rsp[i])
	}
	t.countCopied(uncopied, e.ring.Unanswered(), e.private.Free())
}

func (e *backTX) violation(reason string) error { return e.fail(e.ring.Consumed(), reason) }

func (e *backTX) spaceFor(f *Frame) space {
	var l packer
	l.place(f)
	n := space{slots: l.pages() + int(f.extraSlots(e.mayHash()))}
	if !f.buf.Exclusive() && e.peerTakes.needs(f) == needChecksum {
		n.bufs = buffersFor(int(f.total)) // see complete
	}
	return n
}

func (e *backTX) peerOffloads() offloads { return e.peerTakes }

func (e *backTX) freeSlots() (int, error) {
	n, err := e.ring.Poll()
	if err != nil {
		return 0, e.violation(err.Error())
	}
	return int(n), nil
}

func (e *backTX) hasSpace(n space) (bool, error) {
	avail, err := e.ring.Reload()
	if err != nil {
		return false, e.violation(err.Error())
	}
	if int(avail) >= n.slots && e.private.Free() >= n.bufs {
		return true, nil
	}
	e.set(e.ring.Consumed() + uint32(n.slots))
	return false, nil
}

func (e *backTX) starved(n space) error {
	if e.private.Free() < n.bufs {
		return ErrNoBuffers
	}
	return nil
}

func (e *backTX) arm(n space) (bool, error) {
	if n.slots == 0 { // the call waits only for buffers, and starved found enough
		return true, nil
	}
	more, err := e.ring.Arm(uint32(n.slots))
	if err != nil {
		return false, e.violation(err.Error())
	}
	return more, nil
}

func (e *backTX) afterWait() error { return nil }

func (e *backTX) settle() error { return nil } // send puts all responses itself

func (e *backTX) givesEarly() bool { return e.ring.Overdue() }

func (e *backTX) peerProgress() (index, goal, tries uint32) {
	return e.ring.Peer(), e.goal.Load(), e.tries.Load()
}

func (e *backTX) ready(slots int) bool {
	n, err := e.ring.Reload()
	return n >= uint32(slots) || err != nil
}

func (e *backTX) overdue() bool { return e.ring.Overdue() }

func (e *backTX) drain(time.Time) {}

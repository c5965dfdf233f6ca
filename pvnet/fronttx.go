package pvnet

import (
	"time"

	"barevif/arena"
	"barevif/arena/shm"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
)

// A frontTX sends on the tx ring. Its requests name pages that stay granted, read-only,
// for the whole connection. The id of a request is the number of its buffer.
type frontTX struct {
	ring           *ring.Front[netif.TxRequest, netif.TxResponse]
	shared         *arena.Arena
	refs           []hypercall.GrantRef // by buffer
	scatter        bool                 // the peer takes frames of several slots
	peerTakes      offloads             // the offloads that the peer takes
	takesHash      bool                 // the peer knows the hash's extra info: it offered the control ring
	state          []uint8              // by buffer, which is also the request id
	extrasInFlight int                  // extra infos that have no response yet
	lister

	bound
	peerLink
	stopwatch
	shortage
	lastFirst uint32 // buffer of the first request of the last frame
	timed     uint32 // buffer of the request that is timed
}

// What the request of a buffer is.
const (
	idFree  = iota
	idFirst // the first slot of a frame
	idMore  // a later slot
)

func (e *frontTX) alloc(frames []Frame, size int) (n int, err error) {
	n = buildAll(e.shared, size, frames)
	if n == len(frames) {
		return n, nil
	}
	if err = e.reap(); err != nil {
		return n, err
	}
	n += buildAll(e.shared, size, frames[n:])
	if n == 0 {
		e.count.Add(telemetry.AllocFailed, 1)
		e.noteShortage(space{bufs: buffersFor(size)})
	}
	return n, nil
}

func (e *frontTX) send(frames []Frame) (n int, err error) {
	if e.runs {
		if err = e.reap(); err != nil {
			return 0, err
		}
	}
	t := tally{block: e.count}
	if e.takesHash && e.shared.Marked() && anyHashToSend(frames) {
		for n < len(frames) && err == nil {
			if err = e.put(&frames[n], &t); err == nil {
				n++
			}
		}
	}
	for n < len(frames) && err == nil {
		f := &frames[n]
		if f.plain() && e.ring.Free() > 0 {
			if i, ok := e.shared.TakeOne(f.buf); ok {
				t.plain(int(f.n), e.shared.Bytes(i)[f.off:])
				e.state[i], e.lastFirst = idFirst, i
				e.ring.Put(netif.TxRequest{Ref: e.refs[i], Offset: f.off, ID: uint16(i), Size: f.n, Flags: txFlags(f)})
				n++
				continue
			}
		}
		if err = e.put(f, &t); err == nil {
			n++
		}
	}
	if n > 0 && e.begin() {
		e.timed = e.lastFirst
	}
	e.notify(e.ring.Publish(), n)
	t.count(e.ring.Size()-e.ring.Free(), e.shared.Free())
	if err == ErrFull {
		e.count.Add(telemetry.RingFull, 1)
		e.noteShortage(e.spaceFor(&frames[n]))
	}
	return n, err
}

// noteShortage tells the slow tick how far the peer's index must move before there is room for
// n.
func (e *frontTX) noteShortage(n space) {
	missing := max(n.slots-int(e.ring.Free()), n.bufs-e.shared.Free(), 0)
	e.set(e.ring.Consumed() + min(uint32(missing), e.ring.InFlight()))
}

// put sends one frame and takes it over.
func (e *frontTX) put(f *Frame, t *tally) error {
	fit, err := e.peerTakes.admit(f)
	if err != nil {
		return err
	}
	hash, _ := f.Hash()
	slots, extras := uint32(f.slots()), f.extras(hash, e.hashed(f))
	if slots > 1 && !e.scatter && f.total > shm.PageSize {
		return ErrFrameSize
	}
	need := slots + uint32(extras.Len())
	if e.ring.Free() < need {
		if err := e.reap(); err != nil {
			return err
		}
		if e.ring.Free() < need {
			return ErrFull
		}
	}
	if e.mustCopy(f, slots) || fit == needChecksum && !f.buf.Exclusive() {
		return e.putCopy(f, t)
	}
	if fit == needChecksum {
		f.completeChecksum()
	}
	i, err := e.shared.Take(f.buf)
	if err == arena.ErrShared {
		return e.putCopy(f, t)
	}
	if err != nil {
		return err
	}
	t.sent(f, int(need), e.shared.Bytes(i)[f.off:f.off+f.n])
	e.putSlots(f, i, &extras)
	return nil
}

// putSlots fills the slots of a frame that begins in buffer i: the first request, the
// extra infos, and a request for each further piece.
func (e *frontTX) putSlots(f *Frame, i uint32, extras *netif.Extras) {
	r := netif.TxRequest{Ref: e.refs[i], Offset: f.off, ID: uint16(i), Size: uint16(f.total), Flags: txFlags(f)}
	if extras.Len() > 0 {
		r.Flags |= netif.TxExtraInfo
	}
	e.lastFirst, e.state[i] = i, idFirst
	left := f.total - uint32(f.n)
	next, off, n, more := e.unlinkNext(i)
	if left > 0 {
		r.Flags |= netif.TxMoreData
	}
	e.ring.Put(r)
	for x := range extras.Len() {
		e.ring.Put(extras.At(x).TxRequest())
	}
	e.extrasInFlight += extras.Len()
	for more {
		r = netif.TxRequest{Ref: e.refs[next], Offset: off, ID: uint16(next), Size: n}
		e.state[next] = idMore
		if left -= uint32(n); left > 0 {
			r.Flags = netif.TxMoreData
		}
		next, off, n, more = e.unlinkNext(next)
		e.ring.Put(r)
	}
}

// unlinkNext unlinks the chain after buffer i and returns the next piece, if there is one. It
// frees empty pieces, which Truncate leaves: they take no slot.
func (e *frontTX) unlinkNext(i uint32) (next uint32, off, n uint16, ok bool) {
	next, off, n, ok = e.shared.Unlink(i)
	for ok && n == 0 {
		empty := next
		next, off, n, ok = e.shared.Unlink(empty)
		e.shared.Put(empty)
	}
	return next, off, n, ok
}

// hashed reports whether f is sent with its hash.
func (e *frontTX) hashed(f *Frame) bool { return e.takesHash && f.hash&hashToSend != 0 }

func (e *frontTX) pieceExtras(f *Frame) int {
	if e.hashed(f) {
		return 1
	}
	return 0
}

// anyHashToSend reports whether any of frames is to be sent with its hash. Those of another
// device are not sent on the short way in any case, so this matters for ours only, and only
// once SetHash was called for one of them.
func anyHashToSend(frames []Frame) bool {
	var h uint8
	for i := range frames {
		h |= frames[i].hash
	}
	return h&hashToSend != 0
}

// txFlags returns the flags that the frame's checksum has in its first request.
func txFlags(f *Frame) (flags netif.TxFlags) {
	switch f.csum {
	case ChecksumPartial:
		flags = netif.TxCsumBlank | netif.TxDataValidated
	case ChecksumVerified:
		flags = netif.TxDataValidated
	}
	return flags
}

// mustCopy reports whether f, which has that many slots, must be copied before it can be
// sent.
func (e *frontTX) mustCopy(f *Frame, slots uint32) bool {
	return !f.buf.Of(e.shared) || f.n < MinFrame || slots > 1 && !e.scatter
}

// putCopy sends a copy of a frame whose pages the peer has no grant for, or which another
// holder may still read or write.
func (e *frontTX) putCopy(f *Frame, t *tally) error {
	var g Frame
	if !build(e.shared, int(f.total), &g) {
		if err := e.reap(); err != nil {
			return err
		}
		if !build(e.shared, int(f.total), &g) {
			return ErrFull
		}
	}
	if e.ring.Free() < uint32(g.pieces)+f.extraSlots(e.hashed(f)) { // the copy has headroom, so it may have one more piece than f
		e.shared.Release(g.buf)
		return ErrFull
	}
	g.copyFrame(f)
	e.count.Add(telemetry.CopiedBytes, uint64(f.total))
	if err := e.put(&g, t); err != nil {
		e.shared.Release(g.buf)
		return err
	}
	f.buf.Release()
	return nil
}

// reap takes the responses that are in the ring and frees their buffers.
func (e *frontTX) reap() error {
	n, err := e.ring.Poll()
	if err != nil {
		return e.violation(err.Error())
	}
	for ; n > 0; n-- {
		r := e.ring.Take()
		if r.Status == netif.Null {
			if e.extrasInFlight == 0 {
				return e.violation("response to an extra that was not sent")
			}
			e.extrasInFlight-- // the id of a response to an extra info is undefined
			continue
		}
		id := uint32(r.ID)
		if id >= uint32(len(e.state)) || e.state[id] == idFree {
			if e.answered(r) {
				continue
			}
			e.dropWrongID()
			return e.violation("response id is not outstanding")
		}
		if r.Status < 0 && e.state[id] == idFirst {
			e.count.Drop(telemetry.DropBackendError, 1)
		}
		e.state[id] = idFree
		e.shared.PutOne(id)
	}
	if e.runs {
		e.look(e.count, e.state[e.timed] == idFree)
	}
	return nil
}

// dropWrongID counts one frame as lost to a response with a wrong id. Nobody knows which
// frame it was for, so it takes any; the others in flight are counted as lost with the
// connection.
func (e *frontTX) dropWrongID() {
	for id, s := range e.state {
		if s == idFirst {
			e.state[id] = idMore
			e.count.Drop(telemetry.DropBadID, 1)
			return
		}
	}
}

func (e *frontTX) violation(reason string) error { return e.fail(e.ring.Consumed(), reason) }

func (e *frontTX) spaceFor(f *Frame) space {
	n := space{slots: f.slots()}
	if e.mustCopy(f, uint32(n.slots)) || !f.buf.Exclusive() {
		n.bufs = buffersFor(int(f.total))
		n.slots = max(n.slots, n.bufs)
	}
	n.slots += int(f.extraSlots(e.hashed(f)))
	return n
}

func (e *frontTX) hasSpace(n space) (bool, error) {
	if int(e.ring.Free()) < n.slots || e.shared.Free() < n.bufs {
		if err := e.reap(); err != nil {
			return false, err
		}
	}
	if int(e.ring.Free()) >= n.slots && e.shared.Free() >= n.bufs {
		return true, nil
	}
	e.noteShortage(n)
	return false, nil
}

func (e *frontTX) peerOffloads() offloads  { return e.peerTakes }
func (e *frontTX) freeSlots() (int, error) { return int(e.ring.Free()), nil }

func (e *frontTX) starved(n space) error {
	if e.ring.InFlight() == 0 && e.shared.Free() < n.bufs {
		return ErrNoBuffers
	}
	return nil
}

func (e *frontTX) arm(n space) (bool, error) {
	slots, bufs := n.slots-int(e.ring.Free()), n.bufs-e.shared.Free()
	if slots <= 0 && bufs <= 0 {
		return true, nil
	}
	// Wake up after half of the requests in flight: that means few wake-ups, and the
	// other half keeps the peer busy meanwhile. If the peer holds responses back, the
	// slow tick wakes us.
	after := max(int(e.ring.InFlight()/2), slots, bufs, 1)
	more, err := e.ring.Arm(uint32(after))
	if err != nil {
		return false, e.violation(err.Error())
	}
	return more, nil
}

func (e *frontTX) afterWait() error {
	if !e.runs {
		return nil
	}
	e.waited = true
	err := e.reap()
	e.waited = false
	return err
}

func (e *frontTX) settle() error {
	before := e.ring.Consumed()
	err := e.reap()
	if e.ring.Consumed() != before {
		e.count.Set(telemetry.RingUsed, uint64(e.ring.Size()-e.ring.Free()))
		e.count.Set(telemetry.BuffersFree, uint64(e.shared.Free()))
	}
	return err
}

func (e *frontTX) givesEarly() bool { return e.ring.Answered() }

func (e *frontTX) peerProgress() (index, goal, tries uint32) {
	return e.ring.Peer(), e.goal.Load(), e.tries.Load()
}

func (e *frontTX) ready(int) bool {
	n, err := e.ring.Poll()
	return n > 0 || err != nil
}

func (e *frontTX) overdue() bool { return e.ring.Overdue() }

func (e *frontTX) drain(time.Time) {
	catchFault(func() { e.reap() }) // the connection is over: neither a violation nor a fault on the ring matters
	for id, s := range e.state {
		if s == idFree {
			continue
		}
		if s == idFirst {
			e.count.Drop(telemetry.DropDisconnected, 1)
		}
		e.state[id] = idFree
		e.shared.Put(uint32(id))
	}
	e.extrasInFlight, e.lister = 0, lister{}
}

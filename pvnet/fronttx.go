package pvnet

import (
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
	ring    *ring.Front[netif.TxRequest, netif.TxResponse]
	bufs    *arena.Arena
	refs    []hypercall.GrantRef // by buffer
	port    hypercall.Port
	scatter bool    // the peer takes frames of several slots
	peer    offers  // the offloads that the peer takes
	state   []uint8 // by buffer, which is also the request id
	extras  int     // extra infos that have no response yet
	count   *telemetry.Block

	stopwatch
	shortage
	last  uint32 // buffer of the last request that was put
	timed uint32 // buffer of the request that is timed
}

// What the request of a buffer is.
const (
	idFree  = iota
	idFirst // the first slot of a frame
	idMore  // a later slot
)

func (e *frontTX) alloc(frames []Frame, size int) (n int, err error) {
	n = buildAll(e.bufs, size, frames)
	if n == len(frames) {
		return n, nil
	}
	if err = e.reap(); err != nil {
		return n, err
	}
	n += buildAll(e.bufs, size, frames[n:])
	if n == 0 {
		e.count.Add(telemetry.AllocFailed, 1)
		e.short(need{bufs: buffersFor(size)})
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
	for n < len(frames) {
		f := &frames[n]
		if f.plain() && e.ring.Free() > 0 {
			if i, ok := e.bufs.TakeOne(f.buf); ok {
				t.plain(int(f.n), e.bufs.Bytes(i)[f.off:])
				e.state[i], e.last = idFirst, i
				e.ring.Put(netif.TxRequest{Ref: e.refs[i], Offset: f.off, ID: uint16(i), Size: f.n, Flags: txFlags(f)})
				n++
				continue
			}
		}
		if err = e.put(f, &t); err != nil {
			break
		}
		n++
	}
	if n > 0 && e.begin() {
		e.timed = e.last
	}
	if e.ring.Publish() {
		e.count.Add(telemetry.NotifiesSent, 1)
		e.port.Notify()
	} else if n > 0 {
		e.count.Add(telemetry.NotifiesSpared, 1)
	}
	t.count(e.ring.Size()-e.ring.Free(), e.bufs.Free())
	if err == ErrFull {
		e.count.Add(telemetry.RingFull, 1)
		e.short(e.wants(&frames[n]))
	}
	return n, err
}

// short tells the slow tick how far the peer's index must move before there is room for
// n.
func (e *frontTX) short(n need) {
	missing := max(n.slots-int(e.ring.Free()), n.bufs-e.bufs.Free(), 0)
	e.lack(e.ring.Consumed() + min(uint32(missing), e.ring.InFlight()))
}

// put fills the slots of one frame and takes the frame over.
func (e *frontTX) put(f *Frame, t *tally) error {
	if !f.buf.Valid() {
		return ErrStale
	}
	if f.total < MinFrame || f.total > MaxFrame {
		return ErrFrameSize
	}
	need := uint32(f.slots())
	if need == 0 {
		return ErrFrameSize
	}
	fit := e.peer.fit(f)
	if fit > incomplete {
		return fit.err()
	}
	if need > 1 && !e.scatter && f.total > shm.PageSize {
		return ErrFrameSize
	}
	if free := need + f.gso.slots(); e.ring.Free() < free {
		if err := e.reap(); err != nil {
			return err
		}
		if e.ring.Free() < free {
			return ErrFull
		}
	}
	if e.copies(f, need) || fit == incomplete && !f.buf.Exclusive() {
		return e.putCopy(f, t)
	}
	if fit == incomplete {
		f.completeChecksum()
	}
	i, err := e.bufs.Take(f.buf)
	if err != nil {
		if err == arena.ErrShared {
			return e.putCopy(f, t)
		}
		return err
	}
	need += f.gso.slots()
	t.sent(f, int(need), e.bufs.Bytes(i)[f.off:f.off+f.n])
	r := netif.TxRequest{Ref: e.refs[i], Offset: f.off, ID: uint16(i), Size: uint16(f.total), Flags: txFlags(f)}
	e.last = i
	e.state[i] = idFirst
	if f.pieces <= 1 && need == 1 {
		e.ring.Put(r)
		return nil
	}
	for left, extra := f.total-uint32(f.n), f.gso.Size != 0; ; {
		next, off, n, ok := e.behind(i)
		if left > 0 {
			r.Flags |= netif.TxMoreData
		}
		e.ring.Put(r)
		if extra {
			e.ring.Put(f.gso.extra().TxRequest())
			e.extras++
			extra = false
		}
		if !ok {
			return nil
		}
		left -= uint32(n)
		e.state[next] = idMore
		r = netif.TxRequest{Ref: e.refs[next], Offset: off, ID: uint16(next), Size: n}
		i = next
	}
}

// behind unlinks the chain after buffer i and returns the next piece, if there is one. It
// frees empty pieces, which Truncate leaves: they take no slot.
func (e *frontTX) behind(i uint32) (next uint32, off, n uint16, ok bool) {
	next, off, n, ok = e.bufs.Unlink(i)
	for ok && n == 0 {
		empty := next
		next, off, n, ok = e.bufs.Unlink(empty)
		e.bufs.Put(empty)
	}
	return next, off, n, ok
}

// txFlags returns the flags of the frame's first request: checksum and extra infos.
func txFlags(f *Frame) (flags netif.TxFlags) {
	switch f.csum {
	case ChecksumPartial:
		flags = netif.TxCsumBlank | netif.TxDataValidated
	case ChecksumVerified:
		flags = netif.TxDataValidated
	}
	if f.gso.Size != 0 {
		flags |= netif.TxExtraInfo
	}
	return flags
}

// copies reports whether f, which has that many slots, must be copied before it can be
// sent.
func (e *frontTX) copies(f *Frame, slots uint32) bool {
	return !f.buf.Of(e.bufs) || f.n < MinFrame || slots > 1 && !e.scatter
}

// putCopy sends a copy of a frame whose pages the peer has no grant for, or which another
// holder may still read or write.
func (e *frontTX) putCopy(f *Frame, t *tally) error {
	var g Frame
	if !build(e.bufs, int(f.total), &g) {
		if err := e.reap(); err != nil {
			return err
		}
		if !build(e.bufs, int(f.total), &g) {
			return ErrFull
		}
	}
	if e.ring.Free() < uint32(g.pieces)+f.gso.slots() { // the copy has headroom, so it may have one more piece than f
		e.bufs.Release(g.buf)
		return ErrFull
	}
	g.copyFrame(f)
	e.count.Add(telemetry.CopiedBytes, uint64(f.total))
	if err := e.put(&g, t); err != nil {
		e.bufs.Release(g.buf)
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
			if e.extras == 0 {
				return e.violation("response to an extra that was not sent")
			}
			e.extras-- // the id of a response to an extra info is undefined
			continue
		}
		id := uint32(r.ID)
		if id >= uint32(len(e.state)) || e.state[id] == idFree {
			e.misanswered()
			return e.violation("response id is not outstanding")
		}
		if r.Status < 0 && e.state[id] == idFirst {
			e.count.Drop(telemetry.DropBackendError, 1)
		}
		e.state[id] = idFree
		e.bufs.PutOne(id)
	}
	if e.runs {
		e.look(e.count, e.state[e.timed] == idFree)
	}
	return nil
}

// misanswered counts one frame as lost to a response with a wrong id. Nobody knows which
// frame it was for, so it takes any; the others in flight are counted as lost with the
// connection.
func (e *frontTX) misanswered() {
	for id, s := range e.state {
		if s == idFirst {
			e.state[id] = idMore
			e.count.Drop(telemetry.DropBadID, 1)
			return
		}
	}
}

func (e *frontTX) violation(reason string) error {
	e.count.Add(telemetry.Violations, 1)
	return &PeerError{Ring: "tx", Slot: e.ring.Consumed(), Reason: reason}
}

func (e *frontTX) wants(f *Frame) need {
	n := need{slots: f.slots()}
	if e.copies(f, uint32(n.slots)) || !f.buf.Exclusive() {
		n.bufs = buffersFor(int(f.total))
		n.slots = max(n.slots, n.bufs)
	}
	n.slots += int(f.gso.slots())
	return n
}

func (e *frontTX) room(n need) (bool, error) {
	if int(e.ring.Free()) < n.slots || e.bufs.Free() < n.bufs {
		if err := e.reap(); err != nil {
			return false, err
		}
	}
	if int(e.ring.Free()) >= n.slots && e.bufs.Free() >= n.bufs {
		return true, nil
	}
	e.short(n)
	return false, nil
}

func (e *frontTX) offers() offers      { return e.peer }
func (e *frontTX) avail() (int, error) { return int(e.ring.Free()), nil }

func (e *frontTX) stuck(n need) error {
	if e.ring.InFlight() == 0 && e.bufs.Free() < n.bufs {
		return ErrNoBuffers
	}
	return nil
}

func (e *frontTX) arm(n need) (bool, error) {
	slots, bufs := n.slots-int(e.ring.Free()), n.bufs-e.bufs.Free()
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

func (e *frontTX) rested() error {
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
		e.count.Set(telemetry.BuffersFree, uint64(e.bufs.Free()))
	}
	return err
}

func (e *frontTX) answered() bool { return e.ring.Answered() }

func (e *frontTX) standing() (index, goal, tries uint32) {
	return e.ring.Peer(), e.goal.Load(), e.tries.Load()
}

func (e *frontTX) ready(int) bool {
	n, err := e.ring.Poll()
	return n > 0 || err != nil
}

func (e *frontTX) overdue() bool { return e.ring.Overdue() }

func (e *frontTX) drain() {
	trapped(func() { e.reap() }) // the connection is over: neither a violation nor a fault on the ring matters
	for id, s := range e.state {
		if s == idFree {
			continue
		}
		if s == idFirst {
			e.count.Drop(telemetry.DropDisconnected, 1)
		}
		e.state[id] = idFree
		e.bufs.Put(uint32(id))
	}
	e.extras = 0
}

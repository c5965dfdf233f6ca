package pvnet

import (
	"barevif/arena"
	"barevif/hypercall"
	"barevif/pvnet/netif"
	"barevif/pvnet/ring"
	"barevif/telemetry"
)

// A frontTX sends on the tx ring: requests name pages that stay granted, read-only,
// for the whole connection. A request's id is its buffer's number.
type frontTX struct {
	ring    *ring.Front[netif.TxRequest, netif.TxResponse]
	bufs    *arena.Arena
	refs    []hypercall.GrantRef // by buffer
	port    hypercall.Port
	scatter bool    // the peer takes frames of several slots
	state   []uint8 // by buffer, which is by id
	count   *telemetry.Block
}

// What a buffer is in the ring as.
const (
	idFree  = iota
	idFirst // the first slot of a frame
	idMore  // a later one
)

func (e *frontTX) alloc(frames []Frame, size int) (n int, err error) {
	for n < len(frames) && build(e.bufs, size, &frames[n]) {
		n++
	}
	if n == len(frames) {
		return n, nil
	}
	if err = e.reap(); err != nil {
		return n, err
	}
	for n < len(frames) && build(e.bufs, size, &frames[n]) {
		n++
	}
	if n == 0 {
		e.count.Add(telemetry.AllocFailed, 1)
	}
	return n, nil
}

func (e *frontTX) send(frames []Frame) (n int, err error) {
	var t tally
	for n < len(frames) {
		if err = e.put(&frames[n], &t); err != nil {
			break
		}
		n++
	}
	if e.ring.Publish() {
		e.count.Add(telemetry.NotifiesSent, 1)
		e.port.Notify()
	} else if n > 0 {
		e.count.Add(telemetry.NotifiesSpared, 1)
	}
	t.count(e.count)
	if err == ErrFull {
		e.count.Add(telemetry.RingFull, 1)
	}
	return n, err
}

// put fills the slots of one frame, and takes it over.
func (e *frontTX) put(f *Frame, t *tally) error {
	if !f.buf.Valid() {
		return ErrStale
	}
	if f.total < MinFrame || f.total > MaxFrame {
		return ErrFrameSize
	}
	need := uint32(f.slots())
	if need > 1 && !e.scatter {
		return ErrFrameSize
	}
	if e.ring.Free() < need {
		if err := e.reap(); err != nil {
			return err
		}
		if e.ring.Free() < need {
			return ErrFull
		}
	}
	if !f.buf.Of(e.bufs) || f.n < MinFrame {
		return e.putCopy(f, t)
	}
	i, err := e.bufs.Take(f.buf)
	if err != nil {
		if err == arena.ErrShared {
			return e.putCopy(f, t)
		}
		return err
	}
	t.add(f, int(need), e.bufs.Bytes(i)[f.off:f.off+f.n])
	r := netif.TxRequest{Ref: e.refs[i], Offset: f.off, ID: uint16(i), Size: uint16(f.total)}
	if f.pieces <= 1 {
		e.ring.Put(r)
		e.state[i] = idFirst
		return nil
	}
	e.state[i] = idFirst
	for left := f.total - uint32(f.n); ; {
		next, off, n, ok := e.bufs.Unlink(i)
		if left > 0 {
			r.Flags = netif.TxMoreData
		}
		if ok && left == 0 { // what Truncate cut off
			e.bufs.PutChain(next)
			ok = false
		}
		e.ring.Put(r)
		if !ok {
			return nil
		}
		left -= uint32(n)
		e.state[next] = idMore
		r = netif.TxRequest{Ref: e.refs[next], Offset: off, ID: uint16(next), Size: n}
		i = next
	}
}

// putCopy sends a frame whose pages the peer has no grant for, or which somebody
// else may still write.
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
	if e.ring.Free() < uint32(g.pieces) { // behind the headroom it may take one more
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

// reap takes the responses that are there and frees their buffers.
func (e *frontTX) reap() error {
	n, err := e.ring.Poll()
	if err != nil {
		return e.violation(err.Error())
	}
	for ; n > 0; n-- {
		r := e.ring.Take()
		if r.Status == netif.Null {
			return e.violation("response to an extra that was not sent")
		}
		id := uint32(r.ID)
		if id >= uint32(len(e.state)) || e.state[id] == idFree {
			return e.violation("response id is not outstanding")
		}
		if r.Status < 0 && e.state[id] == idFirst {
			e.count.Drop(telemetry.DropBackendError, 1)
		}
		e.state[id] = idFree
		e.bufs.Put(id)
	}
	return nil
}

func (e *frontTX) violation(reason string) error {
	e.count.Add(telemetry.Violations, 1)
	return &PeerError{Ring: "tx", Slot: e.ring.Consumed(), Reason: reason}
}

func (e *frontTX) arm(need int) (bool, error) {
	inflight := e.ring.InFlight()
	if inflight == 0 {
		if e.bufs.Free() < max(1, need) {
			return false, ErrNoBuffers
		}
		return true, nil
	}
	// A quarter of what is out: few wake-ups, and yet room while a peer that
	// frees late, as netback does, holds on to most of it.
	after := max(inflight/4, 1)
	if free := e.ring.Free(); uint32(need) > free {
		after = max(after, uint32(need)-free)
	}
	more, err := e.ring.Arm(after)
	if err != nil {
		return false, e.violation(err.Error())
	}
	return more, nil
}

func (e *frontTX) ready(int) bool {
	n, err := e.ring.Poll()
	return n > 0 || err != nil || e.ring.InFlight() == 0
}

func (e *frontTX) overdue() bool { return e.ring.Overdue() }

func (e *frontTX) drain() {
	e.reap() // a violation no longer matters
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
}

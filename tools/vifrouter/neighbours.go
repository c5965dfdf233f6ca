package main

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/router"
)

// Frames wait while the MAC of their neighbour is unknown, so that the first of a flow is not lost.
const (
	waitPerHop   = 16 // frames for one neighbour
	waitPerPort  = 64 // frames that came in at one port
	waitOwn      = 32 // frames of the router's own for neighbours at one port, so that a guest who asks and does not answer costs no other an answer
	spareRooms   = 64 // unused buffers for frames of the router's own that are kept
	spareHops    = 64 // neighbours whose memory is kept, so that a guest who names many that are not there makes no garbage
	solicitEvery = time.Second
	solicits     = 3 // solicitations; after them the neighbour is unreachable
	waitTick     = 200 * time.Millisecond
)

type hopKey struct {
	out  router.PortID
	next netip.Addr
}

// A hopWait is what waits for one neighbour.
type hopWait struct {
	list  []waiter
	asked int           // solicitations sent
	last  time.Duration // when the last was, by plane.clock
}

// A waiter is a frame of a port, or of the router's own.
type waiter struct {
	in    *port       // nil: the router's own
	frame pvnet.Frame // with in
	own   []byte      // without
}

type neighbourWait struct {
	mu    sync.Mutex
	hops  map[hopKey]*hopWait    // guarded by mu
	own   [router.MaxPorts]uint8 // guarded by mu: frames of the router's own that wait now, by the port they leave by
	total uint64                 // guarded by mu: frames that have waited
	lost  uint64                 // guarded by mu: frames for which there was no room

	spare []*hopWait // guarded by mu: at most spareHops, without frames
	rooms [][]byte   // guarded by mu: unused buffers for frames of the router's own; at most spareRooms
}

// add keeps a frame, which it takes over, or if in is nil a copy of own. It reports whether the
// caller is to solicit the neighbour.
func (w *neighbourWait) add(in *port, f pvnet.Frame, own []byte, out router.PortID, next netip.Addr, now time.Duration) (ask bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := w.hops[hopKey{out, next}]
	full := h != nil && len(h.list) >= waitPerHop || in != nil && in.held.Load() >= waitPerPort || in == nil && w.own[out] >= waitOwn
	if full {
		w.lost++
		if in != nil {
			f.Release()
		}
		return false
	}
	if h == nil {
		h = w.newHopLocked()
		h.asked, h.last = 1, now
		w.hops[hopKey{out, next}] = h
		ask = true
	}
	if in != nil {
		in.held.Add(1)
	} else {
		w.own[out]++
		own = append(w.newRoomLocked(), own...)
	}
	w.total++
	h.list = append(h.list, waiter{in, f, own})
	return ask
}

func (w *neighbourWait) newHopLocked() *hopWait {
	n := len(w.spare)
	if n == 0 {
		return &hopWait{list: make([]waiter, 0, waitPerHop)}
	}
	h := w.spare[n-1]
	w.spare = w.spare[:n-1]
	return h
}

func (w *neighbourWait) newRoomLocked() []byte {
	n := len(w.rooms)
	if n == 0 {
		return make([]byte, 0, ethernet+localMTU)
	}
	b := w.rooms[n-1]
	w.rooms = w.rooms[:n-1]
	return b[:0]
}

// done takes back the buffer of a frame of the router's own that has waited.
func (w *neighbourWait) done(own []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.rooms) < spareRooms && cap(own) <= 2*(ethernet+localMTU) {
		w.rooms = append(w.rooms, own)
	}
}

// take removes the frames that wait for neighbours of a port, and appends them to list.
func (w *neighbourWait) take(out router.PortID, list []waiter) []waiter {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, h := range w.hops {
		if key.out == out {
			list = w.removeLocked(key, h, list)
		}
	}
	return list
}

// takeOne removes the frames that wait for one neighbour, and appends them to list.
func (w *neighbourWait) takeOne(key hopKey, list []waiter) []waiter {
	w.mu.Lock()
	defer w.mu.Unlock()
	if h := w.hops[key]; h != nil {
		list = w.removeLocked(key, h, list)
	}
	return list
}

// removeLocked appends the frames that wait for a neighbour to list, and forgets the neighbour.
func (w *neighbourWait) removeLocked(key hopKey, h *hopWait, list []waiter) []waiter {
	for i := range h.list {
		if in := h.list[i].in; in != nil {
			in.held.Add(-1)
		} else {
			w.own[key.out]--
		}
	}
	list = append(list, h.list...)
	w.forgetLocked(key, h)
	return list
}

// forgetLocked forgets a neighbour whose frames the caller has.
func (w *neighbourWait) forgetLocked(key hopKey, h *hopWait) {
	delete(w.hops, key)
	clear(h.list)
	h.list = h.list[:0]
	if len(w.spare) < spareHops {
		w.spare = append(w.spare, h)
	}
}

// drop releases the frames that wait for neighbours of a port that goes, and the port's own frames that wait.
func (w *neighbourWait) drop(p *port) {
	release := w.take(p.id, nil)
	w.mu.Lock()
	for key, h := range w.hops {
		kept := h.list[:0]
		for _, one := range h.list {
			if one.in == p {
				p.held.Add(-1)
				release = append(release, one)
			} else {
				kept = append(kept, one)
			}
		}
		clear(h.list[len(kept):])
		if h.list = kept; len(kept) == 0 {
			w.forgetLocked(key, h)
		}
	}
	w.mu.Unlock()
	for i := range release {
		if release[i].in != nil {
			release[i].frame.Release()
		}
	}
}

// due appends to ask the neighbours that are to be solicited again, and to over the frames whose neighbour did
// not answer. It forgets the latter neighbours.
func (w *neighbourWait) due(now time.Duration, ask []hopKey, over []waiter) ([]hopKey, []waiter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, h := range w.hops {
		switch {
		case now-h.last < solicitEvery:
		case h.asked < solicits:
			h.asked++
			h.last = now
			ask = append(ask, key)
		default:
			over = w.removeLocked(key, h, over)
		}
	}
	return ask, over
}

// retry processes again the frames that wait for a neighbour of a port, which has answered. Those that wait for
// others stay: a guest that says where it is, again and again, would have them processed as often, and
// keep them waiting for ever.
func (pl *plane) retry(p *port, w *worker, next netip.Addr) {
	w.waited = pl.wait.takeOne(hopKey{p.id, next}, w.waited[:0])
	pl.again(w, false)
}

// again processes the frames of w.waited. over says that their neighbour did not answer.
func (pl *plane) again(w *worker, over bool) {
	for i := range w.waited {
		one := &w.waited[i]
		d := &w.decided[0]
		if one.in != nil {
			*d = packetOf(one.in, &one.frame)
		} else {
			*d = router.Packet{In: router.LocalPort, Head: one.own, Total: len(one.own)}
		}
		pl.core.Process(pl.clock(), w.decided[:])
		if over && d.Verdict == router.VerdictNeighbour {
			pl.core.Unreachable(pl.clock(), d)
		}
		if one.in == nil {
			pl.sentOwn(w, one.own, d)
			pl.wait.done(one.own)
		} else {
			w.frames[0] = one.frame
			if lost := pl.dispatch(one.in, w, w.frames[:], w.decided[:]); lost > 0 {
				pl.n.undelivered.Add(uint64(lost))
			}
		}
		*d, *one = router.Packet{}, waiter{}
	}
	w.waited = w.waited[:0]
}

// runNeighbours solicits neighbours again, gives up those that do not answer, and ends old flows, until ctx ends.
func (pl *plane) runNeighbours(ctx context.Context) {
	t := time.NewTicker(waitTick)
	defer t.Stop()
	w, last := new(worker), pl.clock()
	var ask []hopKey
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := pl.clock()
		ask, w.waited = pl.wait.due(now, ask[:0], w.waited[:0])
		for _, key := range ask {
			pl.solicit(w, key.out, key.next)
		}
		pl.again(w, true)
		if now-last >= time.Second {
			last = now
			pl.core.Tick(now)
		}
	}
}

package main

import (
	"context"
	"net/netip"
	"sync"
	"time"

	"barevif/pvnet"
	"barevif/pvnet/router"
)

// Frames wait for the address of a neighbour, so that the first of a flow is not lost. How many
// do is bounded for the neighbour, for the port that they came in at, and for the router's own.
const (
	waitPerHop   = 16
	waitPerPort  = 64
	waitOwn      = 64
	solicitEvery = time.Second
	solicits     = 3 // then the neighbour is unreachable
	waitTick     = 200 * time.Millisecond
)

type hopKey struct {
	out  router.PortID
	next netip.Addr
}

// A hopWait is what waits for one neighbour.
type hopWait struct {
	list  []waiter
	asked int
	last  time.Duration
}

// A waiter is a frame of a port, or of the router's own.
type waiter struct {
	in    *port // nil: the router's own
	frame pvnet.Frame
	own   []byte
}

type neighbourWait struct {
	mu    sync.Mutex
	hops  map[hopKey]*hopWait // guarded by mu
	own   int                 // guarded by mu
	total uint64              // guarded by mu: frames that have waited
	lost  uint64              // guarded by mu: frames for which there was no room
}

// add keeps a frame, which it takes over. It reports whether the neighbour is to be asked for.
func (w *neighbourWait) add(in *port, f pvnet.Frame, own []byte, out router.PortID, next netip.Addr, now time.Duration) (ask bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := w.hops[hopKey{out, next}]
	full := h != nil && len(h.list) >= waitPerHop || in != nil && in.held.Load() >= waitPerPort || in == nil && w.own >= waitOwn
	if full {
		w.lost++
		if in != nil {
			f.Release()
		}
		return false
	}
	if h == nil {
		h = &hopWait{asked: 1, last: now}
		w.hops[hopKey{out, next}] = h
		ask = true
	}
	if in != nil {
		in.held.Add(1)
	} else {
		w.own++
	}
	w.total++
	h.list = append(h.list, waiter{in, f, own})
	return ask
}

// take removes the frames that wait for neighbours of a port.
func (w *neighbourWait) take(out router.PortID) (list []waiter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for key, h := range w.hops {
		if key.out == out {
			list = append(list, w.removeLocked(key, h)...)
		}
	}
	return list
}

func (w *neighbourWait) removeLocked(key hopKey, h *hopWait) []waiter {
	for i := range h.list {
		if in := h.list[i].in; in != nil {
			in.held.Add(-1)
		} else {
			w.own--
		}
	}
	delete(w.hops, key)
	return h.list
}

// drop releases what waits for neighbours of a port that goes, and what waits of its own frames.
func (w *neighbourWait) drop(p *port) {
	release := w.take(p.id)
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
		if h.list = kept; len(kept) == 0 {
			delete(w.hops, key)
		}
	}
	w.mu.Unlock()
	for i := range release {
		if release[i].in != nil {
			release[i].frame.Release()
		}
	}
}

// due returns the neighbours to ask again, and the frames whose neighbour did not answer.
func (w *neighbourWait) due(now time.Duration) (ask []hopKey, over []waiter) {
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
			over = append(over, w.removeLocked(key, h)...)
		}
	}
	return ask, over
}

// retry processes again what waits for neighbours of a port, one of which has answered.
func (pl *plane) retry(p *port) {
	if list := pl.wait.take(p.id); len(list) > 0 {
		pl.again(list, false)
	}
}

// again processes frames that have waited. over says that their neighbour did not answer.
func (pl *plane) again(list []waiter, over bool) {
	b := new(batch)
	for _, one := range list {
		d := router.Packet{In: router.LocalPort, Head: one.own, Total: len(one.own)}
		if one.in != nil {
			f := &one.frame
			d = router.Packet{In: one.in.id, Head: f.Bytes(), Total: f.Len(), Partial: f.Checksum() == pvnet.ChecksumPartial, GSO: f.GSO().Size}
		}
		batch := [1]router.Packet{d}
		pl.core.Process(pl.now(), batch[:])
		if over && batch[0].Verdict == router.VerdictNeighbour {
			pl.core.Unreachable(pl.now(), &batch[0])
		}
		if one.in == nil {
			pl.sentLocal(one.own, &batch[0])
			continue
		}
		b.frames[0], b.packets[0] = one.frame, batch[0]
		if lost := pl.dispatch(one.in, b, 1); lost > 0 {
			pl.n.undelivered.Add(uint64(lost))
		}
	}
}

// runNeighbours asks for neighbours again, and gives those up that do not answer, until ctx ends.
func (pl *plane) runNeighbours(ctx context.Context) {
	t := time.NewTicker(waitTick)
	defer t.Stop()
	last := pl.now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now := pl.now()
		ask, over := pl.wait.due(now)
		for _, key := range ask {
			pl.solicit(key.out, key.next)
		}
		pl.again(over, true)
		if now-last >= time.Second {
			last = now
			pl.core.Tick(now)
		}
	}
}

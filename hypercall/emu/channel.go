package emu

import (
	"sync/atomic"

	"barevif/hypercall"
)

// An event word holds flags below a generation, which changes each time the port is
// opened. Both ends of a channel change it by compare-and-swap.
const (
	portOpen    = 1 << 0
	portBound   = 1 << 1 // the far end is bound
	portPending = 1 << 2
	portMasked  = 1 << 3
	portGen     = 8 // shift
)

// fire makes the port pending, as evtchn_set_pending does. wake reports that its waiter
// must be woken: not if the port was pending already or is masked.
func fire(w *atomic.Uint32, gen uint32) (wake, stale bool) {
	for {
		v := w.Load()
		if v>>portGen != gen || v&portOpen == 0 {
			return false, true
		}
		if v&portPending != 0 {
			return false, false
		}
		if w.CompareAndSwap(v, v|portPending) {
			return v&portMasked == 0, false
		}
	}
}

// take takes a pending event from an unmasked port, and masks the port.
func take(w *atomic.Uint32, gen uint32) bool {
	for {
		v := w.Load()
		if v>>portGen != gen || v&(portOpen|portPending|portMasked) != portOpen|portPending {
			return false
		}
		if w.CompareAndSwap(v, v&^portPending|portMasked) {
			return true
		}
	}
}

// flag sets and clears flags of a port that is still open in generation gen.
func flag(w *atomic.Uint32, gen, set, reset uint32) {
	for {
		v := w.Load()
		if v>>portGen != gen || v&portOpen == 0 || w.CompareAndSwap(v, v&^reset|set) {
			return
		}
	}
}

// A channel is the machine's record of a port; Machine.mu guards it.
type channel struct {
	open    bool
	gen     uint32
	peer    hypercall.DomID // the domain that may bind, or has bound
	far     *guest          // nil: not bound
	farPort hypercall.PortID
	waiter  uint64
}

// A channelEnd is a port as its domain sees it.
type channelEnd struct {
	ID  hypercall.PortID
	Gen uint32
}

// A farEnd is the other end of an event channel, as a notify uses it: the word with its
// pending bit, and the bell of its waiter.
type farEnd struct {
	word *atomic.Uint32
	gen  uint32
	bell bell
	free func()
}

// openPortLocked opens a free port. It reuses numbers at once, as Xen does.
func (g *guest) openPortLocked(waiter uint64, peer hypercall.DomID) (hypercall.PortID, error) {
	if g.waiters[waiter] == nil {
		return 0, errNoWaiter
	}
	var id hypercall.PortID
	if n := len(g.freePort); n > 0 {
		id, g.freePort = g.freePort[n-1], g.freePort[:n-1]
	} else if len(g.channels) < len(g.ports) {
		id = hypercall.PortID(len(g.channels))
		g.channels = append(g.channels, channel{})
	} else {
		return 0, hypercall.ErrNoPorts
	}
	gen := (g.ports[id].Load()>>portGen + 1) & (1<<(32-portGen) - 1)
	g.ports[id].Store(gen<<portGen | portOpen)
	g.channels[id] = channel{open: true, gen: gen, peer: peer, waiter: waiter}
	g.open++
	return id, nil
}

func (g *guest) unbound(waiter uint64, peer hypercall.DomID) (channelEnd, error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	if g.dead {
		return channelEnd{}, errDead
	}
	id, err := g.openPortLocked(waiter, g.peerID(peer))
	if err != nil {
		return channelEnd{}, err
	}
	return channelEnd{id, g.channels[id].gen}, nil
}

func (g *guest) bind(waiter uint64, peer hypercall.DomID, remote hypercall.PortID) (channelEnd, error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	p, err := g.peerLocked(peer)
	if err != nil {
		return channelEnd{}, err
	}
	if uint64(remote) >= uint64(len(p.channels)) {
		return channelEnd{}, hypercall.ErrNoPort
	}
	if c := p.channels[remote]; !c.open || c.far != nil || c.peer != g.id {
		return channelEnd{}, hypercall.ErrNoPort
	}
	id, err := g.openPortLocked(waiter, p.id)
	if err != nil {
		return channelEnd{}, err
	}
	c, r := &g.channels[id], &p.channels[remote]
	c.far, c.farPort = p, remote
	r.far, r.farPort = g, id
	flag(&p.ports[remote], r.gen, portBound, 0)
	flag(&g.ports[id], c.gen, portBound|portPending, 0)
	return channelEnd{id, c.gen}, nil
}

func (g *guest) closePort(id hypercall.PortID, gen uint32) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	if uint64(id) < uint64(len(g.channels)) && g.channels[id].gen == gen {
		g.closePortLocked(id)
	}
}

// closePortLocked closes a port if it is open. The far end is unbound again, so that its
// domain could be bound to anew (evtchn_close). It gets no event, except from a process
// that was killed.
func (g *guest) closePortLocked(id hypercall.PortID) {
	c := &g.channels[id]
	if !c.open {
		return
	}
	if c.far != nil {
		r := &c.far.channels[c.farPort]
		r.far = nil
		w := &c.far.ports[c.farPort]
		flag(w, r.gen, 0, portBound)
		if g.crashed {
			if wake, _ := fire(w, r.gen); wake && c.far.waiters[r.waiter] != nil {
				c.far.waiters[r.waiter].ring()
			}
		}
	}
	g.ports[id].Store(c.gen << portGen)
	*c = channel{gen: c.gen}
	g.freePort = append(g.freePort, id)
	g.open--
}

func (g *guest) farEnd(id hypercall.PortID, gen uint32) (*farEnd, error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	far, r := g.farLocked(id, gen)
	if far == nil {
		return nil, nil
	}
	c := &far.channels[r]
	return &farEnd{word: &far.ports[r], gen: c.gen, bell: far.waiters[c.waiter], free: func() {}}, nil
}

func (g *guest) farLocked(id hypercall.PortID, gen uint32) (*guest, hypercall.PortID) {
	if uint64(id) >= uint64(len(g.channels)) {
		return nil, 0
	}
	c := &g.channels[id]
	if !c.open || c.gen != gen || c.far == nil {
		return nil, 0
	}
	return c.far, c.farPort
}

func (g *guest) newWaiter(shared bool) (uint64, bell, error) {
	bells := g.m.bells
	if shared {
		bells = g.m.sys.eventfd
	}
	b, err := bells()
	if err != nil {
		return 0, nil, err
	}
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	g = g.presentLocked()
	if g.dead {
		b.close()
		return 0, nil, errDead
	}
	id := g.m.next()
	g.waiters[id] = b
	return id, b, nil
}

func (g *guest) closeWaiter(id uint64) {
	g.m.mu.Lock()
	b := g.presentLocked().closeWaiterLocked(id)
	g.m.mu.Unlock()
	if b != nil {
		b.close()
	}
}

// closeWaiterLocked closes the waiter's ports. The caller closes its bell, if there is one.
func (g *guest) closeWaiterLocked(id uint64) bell {
	b := g.waiters[id]
	delete(g.waiters, id)
	delete(g.holders, id)
	for i := range g.channels {
		if g.channels[i].open && g.channels[i].waiter == id {
			g.closePortLocked(hypercall.PortID(i))
		}
	}
	return b
}

package emu

import (
	"maps"
	"slices"

	"barevif/hypercall"
)

// A program is one process of a domain that lives outside the machine's process. What it
// opened ends with it, except what another program has adopted, while the domain lives as
// long as it has a program.
type program struct {
	g    *guest
	held map[uint64]kind // by id; used by the goroutine that serves the program only
	more map[uint64]int  // by id of what it holds: how often it has adopted that besides; likewise
}

// A kind says how an object is given back.
type kind uint8

const (
	heldPages kind = iota
	heldShare
	heldMapping
	heldWaiter // with its ports
	heldStore
)

// newProgram makes a program of domain id, and the domain unless it lives. beside: the
// domain may live. hangUp closes the connection to the program.
func (m *Machine) newProgram(id hypercall.DomID, beside bool, hangUp func()) (*program, error) {
	m.mu.Lock() // throughout: else another program could make or end the domain meanwhile
	defer m.mu.Unlock()
	if g := m.guests[id]; beside && g != nil && !g.dead && !g.leaving && len(g.programs) > 0 {
		return g.addProgramLocked(hangUp), nil
	}
	g, err := m.newGuestLocked(id)
	if err != nil {
		return nil, err
	}
	return g.addProgramLocked(hangUp), nil
}

func (g *guest) addProgramLocked(hangUp func()) *program {
	p := &program{g, make(map[uint64]kind), make(map[uint64]int)}
	g.programs[p] = hangUp
	return p
}

// end ends the program, and with the last one the domain. crashed: the process ended
// without leaving.
func (p *program) end(crashed bool) {
	g := p.g
	g.m.mu.Lock()
	delete(g.programs, p)
	g.leaving = len(g.programs) == 0
	last := g.leaving
	g.m.mu.Unlock()
	switch {
	case last && crashed:
		g.crash()
	case last:
		g.destroy()
	default:
		p.giveBack(crashed)
	}
}

// giveBack gives back what the program holds. The other ends of a crashed program's event
// channels get an event, as from [guest.crash].
func (p *program) giveBack(crashed bool) {
	g := p.g
	var bells []bell
	g.m.mu.Lock()
	was := g.crashed
	g.crashed = was || crashed
	maps.DeleteFunc(g.offers, func(_ uint64, o *offer) bool { return o.by == p })
	for id, n := range p.more {
		for range n {
			g.otherHoldsLocked(id)
		}
	}
	maps.DeleteFunc(p.held, func(id uint64, _ kind) bool { return g.otherHoldsLocked(id) })
	for id, kind := range p.held {
		if b := g.waiters[id]; kind == heldWaiter && b != nil {
			bells = append(bells, g.closeWaiterLocked(id))
		}
	}
	g.crashed = was
	var hangUps []func()
	for id, kind := range p.held {
		if hangUp := g.conns[id]; kind == heldStore && hangUp != nil {
			hangUps = append(hangUps, hangUp)
			delete(g.conns, id)
		}
	}
	g.m.mu.Unlock()
	for _, b := range bells {
		b.close()
	}
	for _, hangUp := range hangUps {
		hangUp()
	}
	for _, id := range slices.Collect(maps.Keys(p.held)) {
		switch p.held[id] {
		case heldMapping:
			_ = g.unmapGrants(id)
		case heldShare:
			_ = g.endShare(id, false) // pages in use are set aside
		case heldPages:
			g.dropPages(id)
		}
	}
	clear(p.held)
	clear(p.more)
}

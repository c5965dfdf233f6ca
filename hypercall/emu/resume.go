package emu

import (
	"errors"

	"barevif/hypercall"
)

var errElsewhere = errors.New("emu: a domain in another process cannot be resumed")

// Resume makes domain from, of this process, continue as domain to, as a domain does that
// is restored from a file, or migrated. As on Xen, from ends: all its ports close, its grants
// end, and what it maps is unmapped. The program in it keeps its Waiters, Shares and private
// memory, and is told nothing. A Notify on a port of before does nothing, and its numbers
// may be another's.
//
// The connections to xenstore break, and those that the program opens next are of domain to.
// Linux keeps its files of /dev/xen/xenbus open instead and sets their watches again, with
// the same result for a client that sets its own again: every watch fires.
//
// The caller makes the home directory of to before, and the vifs in it, as the toolstack does.
func (m *Machine) Resume(from, to hypercall.DomID) error {
	next, err := m.newGuest(to)
	if err != nil {
		return err
	}
	g, d, err := m.resumable(from)
	if err != nil {
		next.destroy()
		return err
	}
	d.gate.Lock() // nobody is inside a call that reaches other memory
	m.mu.Lock()   // nor in one that the machine answers: each comes before all of this, or after it
	if g.dead || next.dead {
		m.mu.Unlock()
		d.gate.Unlock()
		next.destroy()
		return hypercall.ErrNoDomain
	}
	for i := range g.channels { // before the bells move
		g.closePortLocked(hypercall.PortID(i))
	}
	g.domain, next.domain = nil, d
	next.pages, next.private, g.pages, g.private = g.pages, g.private, nil, 0
	next.waiters, g.waiters = g.waiters, nil // without ports
	g.resumed = next
	d.now.Store(&identity{to, next})
	m.mu.Unlock()
	d.gate.Unlock()
	d.forgetPeers()
	g.destroy()
	return nil
}

// resumable returns a domain of this process, and its record.
func (m *Machine) resumable(id hypercall.DomID) (*guest, *Domain, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	g := m.guests[id]
	switch {
	case g == nil:
		return nil, nil, hypercall.ErrNoDomain
	case g.domain == nil:
		return nil, nil, errElsewhere
	}
	return g, g.domain, nil
}

// presentLocked returns the record that has the waiters and private pages of g's domain, which
// may have been resumed since the caller asked for g.
func (g *guest) presentLocked() *guest {
	for g.resumed != nil {
		g = g.resumed
	}
	return g
}

// again calls f with the record of the domain in the machine, and once more if f finds that
// the domain is gone, but a resume has given it another record meanwhile.
func (d *Domain) again(f func(hv hypervisor) error) error {
	for {
		hv := d.hv()
		if err := f(hv); !errors.Is(err, errDead) || d.hv() == hv {
			return err
		}
	}
}

package emu

import (
	"io"
	"maps"
	"slices"

	"barevif/hypercall"
)

// A hypervisor is what a Domain calls to set something up or to give it up: a guest of a
// machine in this process, or a connection to the host.
type hypervisor interface {
	keepPages(n int) (uint64, error) // accounts for private pages
	dropPages(id uint64)

	share(peer hypercall.DomID, pages int, access hypercall.Access) (grants, backing, error)
	endShare(id uint64, refuse bool) error

	mapGrants(peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) (mapped, error)
	unmapGrants(id uint64) error

	// attach returns the share that ref belongs to, if ref is granted to us.
	attach(peer hypercall.DomID, ref hypercall.GrantRef) (grants, backing, error)
	// lookup returns the tables of a living domain.
	lookup(peer hypercall.DomID) (guestTables, error)

	newWaiter(shared bool) (uint64, bell, error) // shared: make an fdBell
	closeWaiter(id uint64)
	// forgetWaiter is forget for a waiter with the bell b.
	forgetWaiter(id uint64, b bell)
	unbound(waiter uint64, peer hypercall.DomID) (channelEnd, error)
	bind(waiter uint64, peer hypercall.DomID, remote hypercall.PortID) (channelEnd, error)
	closePort(id hypercall.PortID, gen uint32)
	// farEnd returns nil if the port is not bound.
	farEnd(id hypercall.PortID, gen uint32) (*farEnd, error)

	store() (uint64, io.ReadWriteCloser, error)
	closeStore(id uint64)

	// Of [hypercall.HandoverDomain]. by is nil, except inside the machine.
	offer(by *program, shares, waiters []uint64) (token uint64, err error)
	withdraw(token uint64)
	adoptShare(token uint64, i int) (adoptedShare, backing, error)
	adoptWaiter(token uint64, i int) (adoptedWaiter, error)
	// forget lets go of a share that another process of the domain may have.
	forget(id uint64)

	// own returns our own tables.
	own() guestTables
	// leave ends the domain.
	leave()
}

// grants describes a share to other domains.
type grants struct {
	Serial uint64
	Access hypercall.Access
	Refs   []hypercall.GrantRef
}

// mapped describes a mapping as runs of consecutive pages.
type mapped struct {
	ID   uint64
	Runs []run
}

// A run is n consecutive pages of one share; the first is granted as Ref.
type run struct {
	Serial   uint64
	Ref      hypercall.GrantRef
	First, N uint32
}

// A share belongs to the machine. Machine.mu guards it.
type share struct {
	grants
	owner  *guest
	peer   hypercall.DomID
	pages  backing
	aside  *int   // the count to which its pages are added once they are given up
	mapped []int  // by page: number of mappings
	ended  []bool // by page
	given  bool   // the owner gave it up; pages that are not ended are quarantined
	stuck  bool   // injected fault: treat every page as mapped
}

// A guest is the machine's record of a domain, and the hypervisor of a domain in this
// process. Machine.mu guards every field that is not immutable.
type guest struct {
	m  *Machine
	id hypercall.DomID
	guestTables
	dead    bool
	crashed bool          // its process was killed: as Linux's UNMAP_NOTIFY_SEND_EVENT, its ports notify
	died    chan struct{} // closed when destroy is done
	domain  *Domain       // nil if it is in another process

	// The processes that are the domain, each with what closes its connection; empty if it
	// is in this process.
	programs map[*program]func()
	leaving  bool // the last of them has ended

	resumed *guest // the domain goes on as this one

	shares      map[uint64]*share
	granter     []granter             // by ref
	free        []hypercall.GrantRef  // the last is used next: Linux, too, reuses refs at once
	granted     int                   // pages granted
	quarantined int                   // pages set aside
	pages       map[uint64]int        // by id: numbers of private pages
	private     int                   // sum of pages
	maps        map[uint64][]mappedBy // by mapping
	mapped      int                   // pages of other domains

	channels []channel
	freePort []hypercall.PortID
	open     int
	waiters  map[uint64]bell
	conns    map[uint64]func() // by id: closes the domain's end of a connection

	offers  map[uint64]*offer // by token
	holders map[uint64]int    // by id of a share or waiter: processes that have it, beyond one
}

// A granter is the page that a ref names.
type granter struct {
	*share
	page int
}

type mappedBy = granter

func (m *Machine) newGuest(id hypercall.DomID) (*guest, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.newGuestLocked(id)
}

func (m *Machine) newGuestLocked(id hypercall.DomID) (*guest, error) {
	switch {
	case m.closed:
		return nil, errClosed
	case id >= hypercall.DomSelf:
		return nil, hypercall.ErrNoDomain
	case m.guests[id] != nil:
		return nil, ErrDomainExists
	}
	t, err := m.tables.open()
	if err != nil {
		return nil, err
	}
	t.incarnation = m.next()
	g := &guest{
		m: m, id: id, guestTables: t,
		died:     make(chan struct{}),
		shares:   make(map[uint64]*share),
		granter:  make([]granter, len(t.grants)),
		pages:    make(map[uint64]int),
		maps:     make(map[uint64][]mappedBy),
		channels: make([]channel, 1),
		waiters:  make(map[uint64]bell),
		conns:    make(map[uint64]func()),
		programs: make(map[*program]func()),
		offers:   make(map[uint64]*offer),
		holders:  make(map[uint64]int),
	}
	for ref := len(t.grants) - 1; ref >= reservedRefs; ref-- {
		g.free = append(g.free, hypercall.GrantRef(ref))
	}
	g.grants[0].Store(g.incarnation)
	m.guests[id] = g
	return g, nil
}

// peerID replaces DOMID_SELF by our own id.
func (g *guest) peerID(id hypercall.DomID) hypercall.DomID {
	if id == hypercall.DomSelf {
		return g.id
	}
	return id
}

// peerLocked returns a living domain.
func (g *guest) peerLocked(id hypercall.DomID) (*guest, error) {
	if g.dead {
		return nil, errDead
	}
	if p := g.m.guests[g.peerID(id)]; p != nil {
		return p, nil
	}
	return nil, hypercall.ErrNoDomain
}

func (g *guest) own() guestTables { return g.guestTables }

func (g *guest) lookup(peer hypercall.DomID) (guestTables, error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	p, err := g.peerLocked(peer)
	if err != nil {
		return guestTables{}, err
	}
	return p.guestTables, nil
}

func (g *guest) keepPages(n int) (uint64, error) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	g = g.presentLocked()
	if g.dead {
		return 0, errDead
	}
	id := g.m.next()
	g.pages[id] = n
	g.private += n
	return id, nil
}

func (g *guest) dropPages(id uint64) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	g = g.presentLocked()
	g.private -= g.pages[id]
	delete(g.pages, id)
}

func (g *guest) leave() { g.destroy() }

// crash is destroy for a domain whose process ended without leaving. As a kernel would,
// it notifies the other ends of the domain's event channels.
func (g *guest) crash() {
	g.m.mu.Lock()
	g.crashed = true
	g.m.mu.Unlock()
	g.destroy()
}

// destroy ends the domain once, and returns when it has ended.
func (g *guest) destroy() {
	m := g.m
	m.mu.Lock()
	if g.dead {
		m.mu.Unlock()
		<-g.died
		return
	}
	g.dead = true
	for i := range g.channels {
		g.closePortLocked(hypercall.PortID(i))
	}
	for id := range g.maps {
		g.unmapLocked(id)
	}
	for _, s := range g.shares {
		s.stuck = false // the fault was injected into a domain that is gone
		s.giveUpLocked()
		s.aside = &m.orphans
	}
	m.orphans += g.quarantined
	g.quarantined, g.private = 0, 0
	for i := range g.grants {
		g.grants[i].Store(0)
	}
	conns := g.conns
	g.conns = nil
	waiters := g.waiters
	g.waiters = nil
	delete(m.guests, g.id)
	domain, gone, onDeath := g.domain, maps.Clone(g.programs), slices.Clone(m.onDeath) // a program may end meanwhile
	m.mu.Unlock()

	if domain != nil {
		domain.die()
	}
	for _, hangUp := range conns {
		hangUp()
	}
	for _, b := range waiters {
		b.close()
	}
	m.tables.release(g.guestTables)
	for _, f := range onDeath {
		f(g.id)
	}
	for _, hangUp := range gone { // last: a domain in another process learns by this that all is done
		hangUp()
	}
	close(g.died)
}

func (g *guest) store() (uint64, io.ReadWriteCloser, error) {
	near, far := newPipe()
	id, err := g.serve(far, func() { near.Close() })
	if err != nil {
		return 0, nil, err
	}
	return id, near, nil
}

// serve passes the machine's end of a xenstore connection to Config.Store. hangUp makes
// that end read io.EOF.
func (g *guest) serve(conn io.ReadWriteCloser, hangUp func()) (uint64, error) {
	m := g.m
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case g.dead:
		return 0, errDead
	case m.cfg.Store == nil:
		return 0, errNoStore
	}
	if m.cfg.Admit != nil {
		if err := m.cfg.Admit(g.id); err != nil {
			return 0, err
		}
	}
	id := m.next()
	g.conns[id] = hangUp
	m.stores.Go(func() {
		defer conn.Close()
		m.cfg.Store(g.id, conn)
	})
	return id, nil
}

// closeStore drops a connection that its domain has closed. The machine's end lives until
// it has read everything that was sent.
func (g *guest) closeStore(id uint64) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	delete(g.conns, id)
}

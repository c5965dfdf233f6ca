package emu

import (
	"io"
	"slices"

	"barevif/hypercall"
)

// A hypervisor is what a Domain asks when something is set up or given up: a guest
// of a machine in this process, or a connection to the host that has one.
type hypervisor interface {
	keepPages(n int) (uint64, error) // accounts for private pages
	dropPages(id uint64)

	share(peer hypercall.DomID, pages int, access hypercall.Access) (grants, backing, error)
	endShare(id uint64, refuse bool) error

	mapGrants(peer hypercall.DomID, refs []hypercall.GrantRef, access hypercall.Access) (mapped, error)
	unmapGrants(id uint64) error

	// attach gives the share that ref belongs to, if ref is granted to us.
	attach(peer hypercall.DomID, ref hypercall.GrantRef) (grants, backing, error)
	// lookup gives the tables of a living domain.
	lookup(peer hypercall.DomID) (guestTables, error)

	newWaiter(shared bool) (uint64, bell, error) // shared: an fdBell
	closeWaiter(id uint64)
	unbound(waiter uint64, peer hypercall.DomID) (channelEnd, error)
	bind(waiter uint64, peer hypercall.DomID, remote hypercall.PortID) (channelEnd, error)
	closePort(id hypercall.PortID, gen uint32)
	// farEnd is nil when the port is not bound.
	farEnd(id hypercall.PortID, gen uint32) (*farEnd, error)

	store() (uint64, io.ReadWriteCloser, error)
	closeStore(id uint64)

	// tables are our own.
	own() guestTables
	// leave ends the domain.
	leave()
}

// grants is a share as others see it.
type grants struct {
	Serial uint64
	Access hypercall.Access
	Refs   []hypercall.GrantRef
}

// mapped is what was asked to be mapped, as runs of consecutive pages.
type mapped struct {
	ID   uint64
	Runs []run
}

// A run is n consecutive pages of one share, the first of which is granted as Ref.
type run struct {
	Serial   uint64
	Ref      hypercall.GrantRef
	First, N uint32
}

// A share belongs to the machine; Machine.mu guards it.
type share struct {
	grants
	owner  *guest
	peer   hypercall.DomID
	pages  backing
	aside  *int   // where its pages count once they are given up
	mapped []int  // by page: how often
	ended  []bool // by page
	given  bool   // the owner gave it up; what is not ended is quarantined
	stuck  bool   // pretend that every page is mapped, for ever
}

// guest is the machine's record of a domain, and its way in when the domain is in
// this process. Machine.mu guards every field that is not immutable.
type guest struct {
	m  *Machine
	id hypercall.DomID
	guestTables
	dead    bool
	crashed bool          // its process was killed: Linux's UNMAP_NOTIFY_SEND_EVENT
	died    chan struct{} // closed when destroy is done
	domain  *Domain       // nil if it is in another process
	gone    func()        // hangs up on that process

	shares      map[uint64]*share
	granter     []granter             // by ref
	free        []hypercall.GrantRef  // the last is the next: Linux, too, reuses at once
	granted     int                   // pages
	quarantined int                   // pages
	pages       map[uint64]int        // private ones
	private     int                   // their sum
	maps        map[uint64][]mappedBy // by mapping
	mapped      int                   // pages of others

	channels []channel
	freePort []hypercall.PortID
	open     int
	waiters  map[uint64]bell
	conns    map[uint64]func() // ends the domain's end
}

// granter says which page a ref stands for.
type granter struct {
	*share
	page int
}

type mappedBy = granter

func (m *Machine) newGuest(id hypercall.DomID) (*guest, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
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
	}
	for ref := len(t.grants) - 1; ref >= reservedRefs; ref-- {
		g.free = append(g.free, hypercall.GrantRef(ref))
	}
	g.grants[0].Store(g.incarnation)
	m.guests[id] = g
	return g, nil
}

// peerID resolves DOMID_SELF.
func (g *guest) peerID(id hypercall.DomID) hypercall.DomID {
	if id == hypercall.DomSelf {
		return g.id
	}
	return id
}

// peerLocked is a living domain.
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
	g.private -= g.pages[id]
	delete(g.pages, id)
}

func (g *guest) leave() { g.destroy() }

// crash is destroy for a domain whose process ended without a word. The kernel of a
// domain tells the other ends of its event channels.
func (g *guest) crash() {
	g.m.mu.Lock()
	g.crashed = true
	g.m.mu.Unlock()
	g.destroy()
}

// destroy ends the domain, once, and returns when it has ended.
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
		s.stuck = false // injected into a domain that is no more
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
	domain, gone, onDeath := g.domain, g.gone, slices.Clone(m.onDeath)
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
	if gone != nil { // last: this is how a domain elsewhere learns that all is done
		gone()
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

// serve hands the machine's end of a xenstore connection to Config.Store. hangUp
// makes it read io.EOF.
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

// closeStore forgets a connection that its domain has closed. The machine's end
// lives on until what was sent has been read.
func (g *guest) closeStore(id uint64) {
	g.m.mu.Lock()
	defer g.m.mu.Unlock()
	delete(g.conns, id)
}
